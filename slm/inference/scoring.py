"""Log-probabilities of continuations, and greedy continuations, of any number of requests.

Requests are sorted by length and padded to few lengths, as each length is a compilation; the answer
to a request does not depend on the others.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slm import models
from slm.data import chat, tokenizer
from slm.interchange import convert, families
from slm.models import decode
from slm.models.config import DecoderConfig
from slm.models.decoder import head
from slm.objectives import losses
from slm.runs import config, load, rundir
from slm.weights import sharding, tree
from slm.weights.axes import Params

_SHORTEST = 32  # the smallest padded length; the others are twice the one before


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A dense model ready to score: weights in the compute dtype, tokenizer, compiled programs."""

  params: Params
  tok: tokenizer.Tokenizer
  context: int  # the most tokens read at a time
  begin: tuple[int, ...]  # the ids before every text: a begin token, or none
  step: int
  mesh: jax.sharding.Mesh
  batch_size: int
  sums: Callable[..., jax.Array]  # (params, batch [b,t]) -> [b,2]: NLL, tokens that are not greedy
  # (params, ids [b,t], mask [b,t], max_tokens[, sampler, key]): greedy unless a sampler is given
  generate: Callable[..., decode.Completions]

  def encode(self, text: str, rendered: bool = False) -> list[int]:
    """Encode a text as the model was trained to read it: after `begin`.

    A rendered conversation holds its special tokens, and is encoded without adding any.
    """
    return chat.encode(self.tok, text) if rendered else self.tok.begun(text, self.begin)

  def pair(
    self, context: str, continuation: str, rendered: bool = False
  ) -> tuple[list[int], list[int]]:
    """Encode both as one text and split the ids where the context ends; neither part is empty.

    Raises:
      ValueError: if the continuation has no token.
    """
    whole = self.encode(context + continuation, rendered)
    if not continuation or not self.tok.encode(continuation):
      raise ValueError(f'continuation: expected text with a token, found {continuation!r}')
    cut = min(len(self.encode(context, rendered)), len(whole) - 1)
    return whole[:cut] or [self.tok.start], whole[cut:]


def make(
  model: models.Model, params: Params, tok: tokenizer.Tokenizer, mesh: jax.sharding.Mesh, *,
  context: int, begin: Sequence[int], batch_size: int, step: int = 0, dtype: str = 'float32',
  chunk: int = 512,
) -> Scorer:  # fmt: skip
  """Make a scorer of a model's dense weights; batches are rounded up to fill the mesh.

  Raises:
    ValueError: if the tokenizer has more ids than the model has embeddings.
  """
  if tok.vocab > model.cfg.vocab:
    raise ValueError(
      f'the tokenizer has {tok.vocab:,} ids, the model {model.cfg.vocab:,} embeddings: they do not '
      'belong together'
    )
  # Whole on every device, so that every process can read the results.
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  program = functools.partial(jax.jit, out_shardings=everywhere)

  def measures(logits, targets):
    wrong = jnp.argmax(logits, axis=-1) != targets
    return losses.cross_entropy(logits, targets), wrong.astype(jnp.float32)

  @program
  def sums(params, batch):
    out = model.forward(params, batch)
    tokens = head(params), out.hidden, batch['targets'], out.cap
    values = losses.over_tokens(measures, *tokens, chunk)
    return jnp.stack([jnp.sum(x * batch['weights'], axis=-1) for x in values], axis=-1)

  @functools.partial(program, static_argnums=(3, 4))
  def generate(params, ids, mask, max_tokens, sampler=decode.greedy, key=None):
    options = {'end': tok.ends, 'known': tok.known, 'max_tokens': max_tokens, 'sampler': sampler}
    key = jax.random.key(0) if key is None else key  # not used by greedy decoding
    return decode.generate(model, params, ids, mask, key, **options)

  devices = sharding.batch_devices(mesh)
  batch_size = -(-batch_size // devices) * devices
  params = jax.jit(lambda p: tree.cast(p, jnp.dtype(dtype)))(params)
  return Scorer(params, tok, context, tuple(begin), step, mesh, batch_size, sums, generate)


def shape(ref: str | Path) -> DecoderConfig:
  """Read the shape of RUN, RUN@STEP or a directory of transformers."""
  if rundir.of_transformers(path := rundir.split_ref(ref)[0]):
    return convert.read_config(path)[1]
  return config.of(ref).model


def open_model(
  ref: str | Path, mesh: jax.sharding.Mesh, batch_size: int, *, data: str = '', context: int = 0,
  begin: bool | None = None,
) -> Scorer:  # fmt: skip
  """Open RUN, RUN@STEP or a directory of transformers; `context` 0 is what it was trained with.

  Whether texts begin with a begin token is the tokenizer's matter unless `begin` is given. The
  tokenizer is in the data directory `data`, or else in the run or its data.

  Raises:
    ValueError: if the run holds several specialists, the tokenizer is not the one it was trained
      with, or `begin` is True and there is no begin token.
  """
  path = rundir.split_ref(ref)[0]
  if rundir.of_transformers(path):
    model, params, hf, *_ = convert.read(path, mesh, 'float32')
    tok = tokenizer.load(path)
    longest, first, options = families.resolve(hf)['max_position_embeddings'], tok.begin, {}
  else:
    loaded = load.load(ref, mesh)
    model, params, cfg = loaded.model, loaded.params(), loaded.cfg
    tok, first = load.reads(loaded, data)
    longest = cfg.context
    options = {'step': loaded.step, 'dtype': cfg.dtype, 'chunk': cfg.objective.chunk}
  if begin is not None:
    if begin and tok.ids.bos is None:
      raise ValueError(f'{ref}: its tokenizer has no begin token to put before texts')
    first = [tok.ids.bos] if begin else []
  options |= {'context': context or longest, 'begin': first, 'batch_size': batch_size}
  return make(model, params, tok, mesh, **options)


def windows(ids: Sequence[int], start: int, context: int) -> Iterator[tuple[Sequence[int], int]]:
  """Cut ids into pieces (ids, n) of at most context + 1 ids, of which the last n are predicted.

  Each id from `start` >= 1 is predicted once, after as many ids as fit.
  """
  for first in range(start, len(ids), context):
    end = min(first + context, len(ids))
    yield ids[max(end - context - 1, 0) : end], end - first


def batches(
  lengths: Sequence[int], batch_size: int, longest: int
) -> Iterator[tuple[int, list[int]]]:
  """Yield (padded length, indices of at most batch_size requests), the longest first."""
  padded = lambda i: min(max(_SHORTEST, 1 << (lengths[i] - 1).bit_length()), longest)
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  for size, group in itertools.groupby(order, padded):
    members = list(group)
    for i in range(0, len(members), batch_size):
      yield size, members[i : i + batch_size]


def loglikelihoods(
  scorer: Scorer, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[float, bool]]:
  """Score (context ids, continuation ids): log-probability in nats, and whether it is greedy.

  A long context is truncated on the left; a continuation longer than the model reads is predicted
  piece by piece, each id once.

  Raises:
    ValueError: if a context or continuation is empty: it must not count as probability 1.
    FloatingPointError: if a log-probability is not finite.
  """
  for which, (before, after) in enumerate(requests):
    if not (len(before) and len(after)):
      raise ValueError(
        f'request {which} of {len(requests)}: expected a context and a continuation of at least '
        f'one token, found {len(before)} and {len(after)} tokens'
      )
  pieces = [
    (which, *piece)
    for which, (before, after) in enumerate(requests)
    for piece in windows([*before, *after], len(before), scorer.context)
  ]
  totals, where = np.zeros((len(requests), 2)), sharding.batch_sharding(scorer.mesh)
  lengths = [len(ids) - 1 for _, ids, _ in pieces]
  with jax.set_mesh(scorer.mesh):
    for size, members in batches(lengths, scorer.batch_size, scorer.context):
      shape = (scorer.batch_size, size)
      batch = {k: np.zeros(shape, np.int32) for k in ('inputs', 'targets', 'segments')}
      batch |= {'weights': np.zeros(shape, np.float32)}
      batch |= {'positions': np.tile(np.arange(size, dtype=np.int32), (shape[0], 1))}
      for row, i in enumerate(members):
        _, ids, predicted = pieces[i]
        n = lengths[i]
        batch['inputs'][row, :n], batch['targets'][row, :n] = ids[:-1], ids[1:]
        batch['segments'][row, :n], batch['weights'][row, n - predicted : n] = 1, 1
      values = np.asarray(scorer.sums(scorer.params, jax.device_put(batch, where)))
      np.add.at(totals, [pieces[i][0] for i in members], values[: len(members)])
  if bad := int(np.sum(~np.isfinite(totals[:, 0]))):
    raise FloatingPointError(
      f'the likelihoods of {bad} of {len(totals)} texts are not finite: weights or activations '
      'overflow'
    )
  return [(-float(nll), not wrong) for nll, wrong in totals]


def left_padded(
  prompts: Sequence[Sequence[int]], count: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pad prompts on the left, and add empty ones: ids and mask, int32 [count,size]."""
  ids = np.zeros((count, size), np.int32)
  mask = np.zeros_like(ids)
  for row, prompt in enumerate(prompts):
    ids[row, size - len(prompt) :], mask[row, size - len(prompt) :] = prompt, 1
  return ids, mask


def continuations(
  scorer: Scorer, prompts: Sequence[Sequence[int]], max_tokens: int, until: Sequence[str]
) -> list[str]:
  """Continue prompts (ids) greedily, up to an end token or the first of the strings `until`.

  Prompts are truncated on the left to leave room for max_tokens.

  Raises:
    ValueError: if max_tokens leaves no room for a prompt.
  """
  return [text for text, _ in completions(scorer, prompts, max_tokens, until)]


def completions(
  scorer: Scorer, prompts: Sequence[Sequence[int]], max_tokens: int, until: Sequence[str],
  temperature: float = 0.0, seed: int = 0,
) -> list[tuple[str, bool]]:  # fmt: skip
  """Continue prompts as `continuations` does; return each text, and whether it ended.

  With a temperature texts are sampled; the draws depend on `seed`, the prompts and their order.
  """
  room = scorer.context - max_tokens
  if room < 1 or max_tokens < 1:
    raise ValueError(f'max_tokens={max_tokens}: expected 1 to {scorer.context - 1} (context - 1)')
  prompts = [list(p)[-room:] or [scorer.tok.start] for p in prompts]
  found = [('', False)] * len(prompts)
  where, key = sharding.batch_sharding(scorer.mesh), jax.random.key(seed)
  sampler = _sampler(temperature)
  with jax.set_mesh(scorer.mesh):
    groups = batches([len(p) for p in prompts], scorer.batch_size, room)
    for number, (size, members) in enumerate(groups):
      padded = left_padded([prompts[i] for i in members], scorer.batch_size, size)
      drawn = max_tokens, sampler, jax.random.fold_in(key, number)
      out = scorer.generate(scorer.params, *jax.device_put(padded, where), *drawn)
      for i, row, n in zip(members, np.asarray(out.tokens), np.asarray(out.lengths), strict=False):
        text = scorer.tok.continued(prompts[i], row[:n].tolist())
        cut = min((text.find(stop) for stop in until if stop and stop in text), default=len(text))
        found[i] = text[:cut], int(row[n - 1]) in scorer.tok.ends or cut < len(text)
  return found


@functools.lru_cache(8)
def _sampler(temperature: float) -> Callable[..., jax.Array]:
  """Return how ids are chosen: the same function for one temperature, so that it compiles once."""
  if not temperature:
    return decode.greedy
  return functools.partial(decode.sampled, temperature=temperature, top_k=0, top_p=1.0)
