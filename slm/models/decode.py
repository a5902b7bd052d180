"""Cached generation and sampling."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm import models
from slm.models.decoder import init_cache, unembed
from slm.weights.axes import Params

Sampler = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [b,v], key) -> ids [b]


_COLDEST = 1e-6  # logits over a smaller temperature leave float32


class Completions(NamedTuple):
  """Generated ids [b,max_tokens], their log-probabilities, and lengths [b] up to an end id."""

  tokens: jax.Array
  logprobs: jax.Array
  lengths: jax.Array


def greedy(logits: jax.Array, key: jax.Array) -> jax.Array:
  """Take the most probable id."""
  return jnp.argmax(logits, axis=-1)


def sampled(
  logits: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
  """Draw from the softmax at a temperature, cut to top_k ids (0: all) and to top_p mass.

  A temperature below _COLDEST is that: the draw is then the most probable id.
  """
  logits = logits / max(temperature, _COLDEST)
  if top_k:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    # Keep the smallest set that reaches top_p: the ids before which less than top_p lies.
    last = jnp.sum(mass - jax.nn.softmax(ordered, axis=-1) < top_p, axis=-1, keepdims=True) - 1
    cut = jnp.take_along_axis(ordered, last, axis=-1)
    logits = jnp.where(logits < cut, -jnp.inf, logits)
  return jax.random.categorical(key, logits, axis=-1)


def _fit(known: jax.Array, logits: jax.Array) -> jax.Array:
  """Return known [1,v], false for embeddings beyond the tokenizer's."""
  size = logits.shape[-1]
  return jnp.pad(jnp.asarray(known), (0, max(size - len(known), 0)))[None, :size]


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

  A row stops at any id of `end`; what follows it in tokens is that id again. Only ids that a
  tokenizer has are chosen, where known [tokenizer's vocab] is true: embeddings that no token has,
  such as those that pad a vocabulary, mean nothing. Log-probabilities are the model's, over all.
  """
  b, t = prompts.shape
  mask = prompt_mask.astype(jnp.int32)
  cache = init_cache(model.cfg, b, t + max_tokens, params['embedding'].dtype)
  positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
  batch = {'inputs': prompts, 'positions': positions, 'segments': mask}
  out = model.forward(params, batch, cache)
  cache, logits = out.cache, unembed(params, out.replace(hidden=out.hidden[:, -1]))
  ones = jnp.ones((b, 1), jnp.int32)

  def pick(logits, i, last, done):
    among = logits if known is None else jnp.where(_fit(known, logits), logits, -jnp.inf)
    ids = sampler(among, jax.random.fold_in(key, i)).astype(jnp.int32)
    ids = jnp.where(done, last, ids)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=-1)[:, 0]
    done_now = done | jnp.isin(ids, jnp.array(sorted(end), jnp.int32))
    return ids, jnp.where(done, 0.0, picked), done_now

  def one(carry, i):
    ids, position, cache, done = carry
    batch = {'inputs': ids[:, None], 'positions': position[:, None], 'segments': ones}
    out = model.forward(params, batch, cache)
    ids, logprob, now_done = pick(unembed(params, out)[:, -1], i, ids, done)
    return (ids, position + 1, out.cache, now_done), (ids, logprob, done)

  start = jnp.zeros((b,), bool)
  ids, logprob, done = pick(logits, 0, prompts[:, -1].astype(jnp.int32), start)
  carry = (ids, positions[:, -1] + 1, cache, done)
  _, rest = jax.lax.scan(one, carry, jnp.arange(1, max_tokens))
  first = (ids, logprob, start)
  tokens, logprobs, ended = (
    jnp.concatenate([a[:, None], b.swapaxes(0, 1)], axis=1)
    for a, b in zip(first, rest, strict=True)
  )
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
  """Read the first `count` of ids [1,t] after what a cache holds; choose what follows them.

  Returns the id [1], one that is `known` as in `generate`, and the cache, which needs room for all
  t. Its `index` may be set back to forget what came later.
  """
  at = jnp.arange(ids.shape[1])[None]
  batch = {'inputs': ids, 'positions': cache['index'] + at}
  out = model.forward(params, {**batch, 'segments': (at < count).astype(jnp.int32)}, cache)
  last = jax.lax.dynamic_slice_in_dim(out.hidden, count - 1, 1, axis=1)[:, 0]
  logits = unembed(params, out.replace(hidden=last))
  ids = sampler(jnp.where(_fit(known, logits), logits, -jnp.inf), key)
  return ids, {**out.cache, 'index': cache['index'] + count}
