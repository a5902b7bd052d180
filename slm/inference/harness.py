"""A run, or a directory of transformers, as a model of the lm-evaluation-harness."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from slm.data import chat
from slm.inference import scoring
from slm.weights import sharding


@register_model('slm')
class SLM(TemplateLM):
  """A run (RUN or RUN@STEP) or a directory of transformers as a model of the harness.

  `add_bos_token` and `max_length` are those of the harness's `hf` model; their defaults are the
  tokenizer's rule and the context that the model was trained with. `data` is a directory with the
  tokenizer, if neither the run nor its data have it. The harness passes `device` and
  `max_batch_size` to every model; they are ignored, and all devices used. Decoding is greedy.

  Answers equal those of `hf` on the exported model, except where `hf` fails or loses a space: a
  continuation that merges into the context's last token is scored by that token, and generated text
  keeps its leading space.
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
    options = {'data': data, 'context': int(max_length), 'begin': add_bos_token}
    self.scorer = scoring.open_model(pretrained, mesh, int(batch_size), **options)

  @property
  def eot_token_id(self) -> int:
    """Return the id that ends a text."""
    return self.scorer.tok.ids.eos

  @property
  def prefix_token_id(self) -> int:
    """Return the id that stands for an empty context."""
    return self.scorer.tok.start

  @property
  def tokenizer_name(self) -> str:
    """Return the key of the harness's cache of requests."""
    return self.scorer.tok.fingerprint

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Return the chat template for the harness to record with its results."""
    return self.scorer.tok.chat_template if chat_template else None

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Render messages by the model's chat template; without a generation prompt end in the last.

    Raises:
      ValueError: if the model has no template, or it fails.
    """
    tok = self.scorer.tok
    if not tok.chat_template:
      raise ValueError('apply_chat_template: the tokenizer has no chat template')
    options = {f'{name}_token': text for name, text in tok.special().items()}
    options['add_generation_prompt'] = add_generation_prompt
    text = chat.render(chat_history, tok.chat_template, **options)
    if add_generation_prompt:
      return text
    before, last, _ = text.rpartition(chat_history[-1]['content'].strip())
    if not last:
      raise ValueError('apply_chat_template: the template changes the text of the last message')
    return before + last

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Encode a text, with the begin token if the flag, or by default the model, requires it."""
    if add_special_tokens is None:
      return self.scorer.encode(string)
    return [*self.scorer.tok.begin] * add_special_tokens + self.scorer.tok.encode(string)

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    head = context.rstrip()
    return self.scorer.pair(head, context[len(head) :] + continuation)

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
  ) -> list[tuple[float, bool]]:
    pairs = [(before or [self.prefix_token_id], after) for _, before, after in requests]
    answers = scoring.loglikelihoods(self.scorer, pairs)
    return self._cache('loglikelihood', [texts for texts, *_ in requests], answers)

  def _cache(self, method: str, arguments: list[Any], answers: list[Any]) -> list[Any]:
    for key, answer in zip(arguments, answers, strict=True):
      self.cache_hook.add_partial(method, key, answer)
    return answers

  def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
    """Score whole texts after the token that stands for an empty context.

    As with `hf`, the begin token is predicted too where texts begin with one: a run and its export
    have the same likelihood.
    """
    pairs = [([self.prefix_token_id], self.scorer.encode(r.args[0])) for r in requests]
    answers = [logprob for logprob, _ in scoring.loglikelihoods(self.scorer, pairs)]
    return self._cache('loglikelihood_rolling', [r.args for r in requests], answers)

  def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
    """Continue contexts greedily up to a stop string, the end token or max_gen_toks.

    Raises:
      ValueError: if a request asks for sampling or leaves no room for its context.
    """
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for i, request in enumerate(requests):
      options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
      if options['do_sample']:
        raise ValueError(f'generation_kwargs: expected greedy decoding, found {request.args[1]}')
      groups.setdefault((options['max_gen_toks'], tuple(options['until'])), []).append(i)
    texts = [''] * len(requests)
    for (max_tokens, until), members in groups.items():
      prompts = [self.tok_encode(requests[i].args[0]) for i in members]
      answers = scoring.continuations(self.scorer, prompts, max_tokens, until)
      self._cache('generate_until', [requests[i].args for i in members], answers)
      for i, text in zip(members, answers, strict=True):
        texts[i] = text
    return texts
