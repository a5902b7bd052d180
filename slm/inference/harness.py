"""A run, or a directory of transformers, as a model of the lm-evaluation-harness."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from slm.inference import scoring
from slm.weights import sharding


@register_model('slm')
class SLM(TemplateLM):
  """A run (RUN or RUN@STEP) or a directory of transformers, as the harness wants it.

  `add_bos_token` and `max_length` are those of the harness's `hf` model; what a model was trained
  with is their default, which `hf` reads off the tokenizer. `data` holds the tokenizer, if neither
  the run nor its data do. The harness passes `device` and `max_batch_size` to every model; here all
  devices are used. Decoding is greedy.
  """

  max_gen_toks = 256

  def __init__(
    self, pretrained: str, batch_size: int | str = 32, max_length: int = 0,
    add_bos_token: bool | None = None, data: str = '', device: str | None = None,
    max_batch_size: int | None = None,
  ):  # fmt: skip
    super().__init__()
    if not str(batch_size).isdigit():
      raise ValueError(f'batch_size: expected a number, found {batch_size!r}')
    mesh = sharding.fit_mesh(scoring.shape(pretrained).embed)
    how = {'data': data, 'context': int(max_length), 'begin': add_bos_token}
    self.scorer = scoring.open_model(pretrained, mesh, int(batch_size), **how)

  @property
  def eot_token_id(self) -> int:
    """Return the id that ends a text."""
    return self.scorer.tok.ids.eos

  @property
  def prefix_token_id(self) -> int:
    """Return the id that an empty context stands for."""
    return self.scorer.tok.ids.bos

  @property
  def tokenizer_name(self) -> str:
    """Return what keys the harness's cache of requests."""
    return self.scorer.tok.fingerprint

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Encode, with the begin token where the model expects it or the flag asks for it."""
    if add_special_tokens is None:
      return self.scorer.encode(string)
    return [self.prefix_token_id] * add_special_tokens + self.scorer.tok.encode(string)

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
  ) -> list[tuple[float, bool]]:
    pairs = [(before or [self.prefix_token_id], after) for _, before, after in requests]
    found = scoring.loglikelihoods(self.scorer, pairs)
    for (texts, *_), answer in zip(requests, found, strict=True):
      self.cache_hook.add_partial('loglikelihood', texts, answer)
    return found

  def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
    """Score whole texts; the begin token is their context and never predicted."""
    encode = self.scorer.tok.encode
    pairs = [([self.prefix_token_id], encode(request.args[0])) for request in requests]
    found = [logprob for logprob, _ in scoring.loglikelihoods(self.scorer, pairs)]
    for request, answer in zip(requests, found, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, answer)
    return found

  def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
    """Continue contexts greedily up to a stop string, the end token or max_gen_toks.

    Raises:
      ValueError: if a request asks for sampling or leaves no room for its context.
    """
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for i, request in enumerate(requests):
      how = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
      if how['do_sample']:
        raise ValueError(f'generation_kwargs: expected greedy decoding, found {request.args[1]}')
      groups.setdefault((how['max_gen_toks'], tuple(how['until'])), []).append(i)
    texts = [''] * len(requests)
    for (max_tokens, until), members in groups.items():
      prompts = [self.tok_encode(requests[i].args[0]) for i in members]
      found = scoring.continuations(self.scorer, prompts, max_tokens, until)
      for i, text in zip(members, found, strict=True):
        texts[i] = text
        self.cache_hook.add_partial('generate_until', requests[i].args, text)
    return texts
