"""Cached generation and sampling."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm import models
from slm.models.decoder import by_layer, init_cache, unembed
from slm.weights.axes import Params

Sampler = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [b,v], key) -> ids [b]
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


def _restrict(logits: jax.Array, known: jax.Array) -> jax.Array:
  """Exclude from logits [b,v] the ids that are not known [tokenizer's vocab]."""
  size = logits.shape[-1]
  known = jnp.pad(jnp.asarray(known), (0, max(size - len(known), 0)))[None, :size]
  return jnp.where(known, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnames=('model', 'max_tokens', 'sampler', 'end'))
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
) -> Completions:
  """Continue prompts [b,t], padded on the left where prompt_mask [b,t] is 0.

  A row stops at any id of `end`, which then fills the rest of its tokens. With `known`, a bool
  [tokenizer's vocab], only ids of the tokenizer are chosen, not embeddings that pad a vocabulary.
  Log-probabilities are the model's, over all ids.
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
    ids = sampler(allowed, jax.random.fold_in(key, i)).astype(jnp.int32)
    ids = jnp.where(done, last, ids)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=-1)[:, 0]
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
