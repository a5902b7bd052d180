"""Cached generation and sampling."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm import models
from slm.models.decoder import by_layer, init_cache, unembed
from slm.weights import sharding
from slm.weights.axes import Params

Sampler = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [b,v], key or keys [b]) -> ids [b]
_MIN_TEMPERATURE = 1e-6  # logits divided by less could overflow float32


class Completions(NamedTuple):
  """Generated ids and log-probabilities [b,max_tokens], and lengths [b] up to an end id."""

  tokens: jax.Array
  logprobs: jax.Array
  lengths: jax.Array


def greedy(logits: jax.Array, key: jax.Array) -> jax.Array:
  """Take the most probable id."""
  return jnp.argmax(logits, axis=-1)


def sampled(
  logits: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
  """Sample at a temperature from the top_k ids (0: all) and the smallest set with top_p mass.

  Temperatures below _MIN_TEMPERATURE are raised to it: they still give the most probable id.
  """
  logits = logits / max(temperature, _MIN_TEMPERATURE)
  if top_k:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    # Keep the ids with less than top_p mass before them.
    last = jnp.sum(mass - jax.nn.softmax(ordered, axis=-1) < top_p, axis=-1, keepdims=True) - 1
    cut = jnp.take_along_axis(ordered, last, axis=-1)
    logits = jnp.where(logits < cut, -jnp.inf, logits)
  return jax.random.categorical(key, logits, axis=-1)


def drawn(logits: jax.Array, keys: jax.Array, temperature: float = 1.0) -> jax.Array:
  """Sample each row of logits [b,v] at a temperature by its own key of keys [b]."""
  return jax.vmap(jax.random.categorical)(keys, logits / temperature)


def _restrict(logits: jax.Array, known: jax.Array) -> jax.Array:
  """Exclude from logits [b,v] the ids that are not known [tokenizer's vocab]."""
  size = logits.shape[-1]
  known = jnp.pad(jnp.asarray(known), (0, max(size - len(known), 0)))[None, :size]
  return jnp.where(known, logits, -jnp.inf)


@functools.partial(
  jax.jit, static_argnames=('model', 'max_tokens', 'sampler', 'end', 'temperature')
)
def generate(
  model: models.Model,
  params: Params,
  prompts: jax.Array,
  prompt_mask: jax.Array,
  key: jax.Array,
  *,
  max_tokens: int,
  sampler: Sampler = greedy,
  end: frozenset[int] = frozenset(),
  known: jax.Array | None = None,
  temperature: float = 1.0,
) -> Completions:
  """Continue prompts [b,t], padded on the left where prompt_mask [b,t] is 0.

  A row stops at any id of `end`, which then fills the rest of its tokens. With `known`, a bool
  [tokenizer's vocab], only ids of the tokenizer are chosen, not embeddings that pad a vocabulary.
  Log-probabilities are the model's at `temperature`, over all ids. A `key` of the shape [b] has one
  for each row, which `sampler` then gets folded with the number of the token.
  """
  b, t = prompts.shape
  mask = prompt_mask.astype(jnp.int32)
  cache = init_cache(model.cfg, b, t + max_tokens, params['embedding'].dtype)
  positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
  batch = {'inputs': prompts, 'positions': positions, 'segments': mask}
  out = model.forward(params, batch, cache)
  cache, logits = out.cache, unembed(params, out.replace(hidden=out.hidden[:, -1]))
  params, cache = by_layer(params), by_layer(cache)
  ones = jnp.ones((b, 1), jnp.int32)

  def pick(logits, i, last, done):
    allowed = logits if known is None else _restrict(logits, known)
    fold = jax.vmap(jax.random.fold_in, (0, None)) if key.ndim else jax.random.fold_in
    ids = sampler(allowed, fold(key, i)).astype(jnp.int32)
    ids = jnp.where(done, last, ids)
    logprob = _log_prob(logits / temperature, ids)
    ended = done | jnp.isin(ids, jnp.array(sorted(end), jnp.int32))
    return ids, jnp.where(done, 0.0, logprob), ended

  def step(carry, i):
    ids, position, cache, done = carry
    batch = {'inputs': ids[:, None], 'positions': position[:, None], 'segments': ones}
    out = model.forward(params, batch, cache)
    ids, logprob, ended = pick(unembed(params, out)[:, -1], i, ids, done)
    return (ids, position + 1, out.cache, ended), (ids, logprob, done)

  start = jnp.zeros((b,), bool)
  ids, logprob, done = pick(logits, 0, prompts[:, -1].astype(jnp.int32), start)
  carry = (ids, positions[:, -1] + 1, cache, done)
  _, rest = jax.lax.scan(step, carry, jnp.arange(1, max_tokens))
  join = lambda first, rest: jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], axis=1)
  tokens, logprobs, ended = map(join, (ids, logprob, start), rest)
  return Completions(tokens, logprobs, jnp.sum(~ended, axis=1))


def answer(
  model: models.Model,
  params: Params,
  prompts: jax.Array,
  lengths: jax.Array,
  keys: jax.Array,
  *,
  slots: int,
  max_tokens: int,
  sampler: Sampler = drawn,
  end: frozenset[int] = frozenset(),
  known: jax.Array | None = None,
  temperature: float = 1.0,
) -> Completions:
  """Continue prompts [n,t], padded on the right, as `generate` does, once for each key.

  There are n * samples `keys`, those of a prompt one after the other. `slots` continuations are
  drawn at once: where one has ended, the next of the queue takes its place, so that none waits for
  the longest. What is drawn depends neither on the slots nor on the order. On a mesh each device
  has slots and a queue of its own, and holds all weights that are not split by `tensor`.
  """
  choose = functools.partial(
    _choose, sampler=sampler, end=end, known=known, temperature=temperature, max_tokens=max_tokens
  )

  def local(params, prompts, lengths, keys):
    return _queue(model, params, prompts, lengths, keys, slots, max_tokens, choose)

  if axes := sharding.batch_axes():
    rows = jax.sharding.PartitionSpec(axes)
    local = sharding.map_rows(local, (jax.sharding.PartitionSpec(), rows, rows, rows), rows)
  return local(params, prompts, lengths, keys)


def _choose(logits, keys, number, sampler, end, known, temperature, max_tokens):
  """Draw the token of a `number` in each answer; return it, its log-probability, whether it ends.

  Arrays are [b]; an answer ends at an id of `end` too, or once it has max_tokens.
  """
  allowed = logits if known is None else _restrict(logits, known)
  ids = sampler(allowed, jax.vmap(jax.random.fold_in)(keys, number)).astype(jnp.int32)
  ended = jnp.isin(ids, jnp.array(sorted(end), jnp.int32)) | (number == max_tokens - 1)
  return ids, _log_prob(logits / temperature, ids), ended


def _queue(model, params, prompts, lengths, keys, slots, max_tokens, choose) -> Completions:
  """Answer on one device; see `answer`. A slot's text has the number of its answer as segment."""
  (n, t), count = prompts.shape, len(keys)
  b, samples = min(slots, count), len(keys) // n
  cache = init_cache(model.cfg, b, t + max_tokens, params['embedding'].dtype, ring=True)
  params, cache = by_layer(params), by_layer(cache)
  made = Completions(
    jnp.zeros((count, max_tokens), jnp.int32),
    jnp.zeros((count, max_tokens), jnp.float32),
    jnp.zeros((count,), jnp.int32),
  )
  column = lambda x: x[:, None]

  def step(carry):
    item, place, last, following, cache, made = carry
    mine = jnp.minimum(item, count - 1)  # a slot without work repeats the last answer, unrecorded
    size = jnp.maximum(lengths[mine // samples], 1)
    read = jnp.where(place < size, prompts[mine // samples, jnp.minimum(place, t - 1)], last)
    segments = jnp.where(item < count, item + 1, 0)
    batch = {'inputs': column(read), 'positions': column(place), 'segments': column(segments)}
    out = model.forward(params, batch, cache)
    number = jnp.maximum(place - size + 1, 0)
    ids, logprob, ended = choose(unembed(params, out)[:, -1], keys[mine], number)
    writes = place >= size - 1
    at = jnp.where(writes & (item < count), item, count), number  # out of bounds is not written
    put = lambda old, at, new: old.at[at].set(new, mode='drop')
    made = Completions(
      put(made.tokens, at, ids),
      put(made.logprobs, at, logprob),
      put(made.lengths, at[0], number + 1),
    )
    ended &= writes & (item < count)
    item = jnp.where(ended, following + jnp.cumsum(ended) - 1, item)
    place = jnp.where(ended, 0, place + 1)
    return item, place, ids, following + ended.sum(), out.cache, made

  zero = jnp.zeros((b,), jnp.int32)
  carry = jnp.arange(b), zero, zero, jnp.int32(b), cache, made
  made = jax.lax.while_loop(lambda carry: jnp.any(carry[0] < count), step, carry)[-1]
  # As `generate` does, the last id of an answer fills the rest of its tokens.
  final = jnp.take_along_axis(made.tokens, made.lengths[:, None] - 1, axis=1)
  within = jnp.arange(max_tokens)[None] < made.lengths[:, None]
  return made._replace(tokens=jnp.where(within, made.tokens, final))


def _log_prob(logits: jax.Array, ids: jax.Array) -> jax.Array:
  """Return log softmax of logits [b,v] at ids [b]."""
  return jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames=('model', 'sampler'), donate_argnames=('cache',))
def follow(
  model: models.Model,
  params: Params,
  cache: dict[str, jax.Array],
  ids: jax.Array,
  count: int,
  key: jax.Array,
  *,
  sampler: Sampler,
  known: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Append the first `count` of ids [1,t] to a cache, and choose the id that follows them.

  Returns the id [1], one of `known` as in `generate`, and the cache, which needs room for all t
  ids. Setting back its `index` removes later entries.
  """
  offsets = jnp.arange(ids.shape[1])[None]
  batch = {
    'inputs': ids,
    'positions': cache['index'] + offsets,
    'segments': (offsets < count).astype(jnp.int32),
  }
  out = model.forward(params, batch, cache)
  last = jax.lax.dynamic_slice_in_dim(out.hidden, count - 1, 1, axis=1)[:, 0]
  logits = unembed(params, out.replace(hidden=last))
  return sampler(_restrict(logits, known), key), {**out.cache, 'index': cache['index'] + count}
