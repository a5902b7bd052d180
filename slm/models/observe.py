"""Statistics of activations for calibration, summed over sequences.

A model applied with the collection 'stats' mutable sows these sums; otherwise they are not
computed. Sums add up over batches, runs and devices, so calibration is exact on any mesh.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STATS = 'stats'
KEPT = 'kept'  # a collection: for each scale, 1 where its channel is kept, see `shrinkage`
# Over the tokens of a sequence, see `over_tokens`.
AGGREGATORS = ('mean', 'l2', 'var')


def over_tokens(x: jax.Array, real: jax.Array) -> jax.Array:
  """Aggregate x [b,t,...] over the real tokens [b,t] of each sequence: [3,b,...] in float32.

  The aggregates are the mean of |x|, the root of the sum of x^2, and the variance (Minitron, arXiv
  2407.14679 §2.2). Aggregating over sequences first gives another, worse score.
  """
  x = x.astype(jnp.float32)
  w = real.astype(jnp.float32).reshape(real.shape + (1,) * (x.ndim - 2))
  count = jnp.maximum(w.sum(1), 1.0)
  mean, square = (x * w).sum(1) / count, (x * x * w).sum(1)
  return jnp.stack(
    [
      (jnp.abs(x) * w).sum(1) / count,
      jnp.sqrt(square),
      jnp.maximum(square / count - mean * mean, 0.0),
    ]
  )


def moments(x: jax.Array, real: jax.Array) -> jax.Array:
  """Sum the aggregates u of x [b,t,...] and their squares over sequences: [3,2,...]."""
  u = over_tokens(x, real)
  return jnp.stack([u.sum(1), (u * u).sum(1)], axis=1)


def turn(before: jax.Array, after: jax.Array, real: jax.Array) -> jax.Array:
  """Sum 1 - cos(before, after) of [b,t,d] over real tokens, and count them: [2] (ShortGPT)."""
  a, b = before.astype(jnp.float32), after.astype(jnp.float32)
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  distance = 1 - (a * b).sum(-1) / jnp.maximum(norms, 1e-12)
  w = real.astype(jnp.float32)
  return jnp.stack([(distance * w).sum(), w.sum()])


def shrinkage(x: jax.Array, kept: jax.Array, eps: float, real: jax.Array) -> jax.Array:
  """Sum rms(kept channels of x) / rms(x) over real tokens, and count them: [2].

  x is [b,t,d] and kept [d] has n ones. Epsilon counts d / n times for the kept channels, so that
  removing channels that are zero gives exactly sqrt(d / n).
  """
  square, kept = jnp.square(x.astype(jnp.float32)), kept.reshape(1, 1, -1)
  n = kept.sum()
  kept_square = (square * kept).sum(-1) / n + eps * x.shape[-1] / n
  ratio = jnp.sqrt(kept_square / (square.mean(-1) + eps))
  w = real.astype(jnp.float32)
  return jnp.stack([(ratio * w).sum(), w.sum()])


def note(module: nn.Module, name: str, measure: Callable[..., Any], *x: Any) -> None:
  """Sow measure(*x) under a name if the collection 'stats' is mutable."""
  if module.is_mutable_collection(STATS):
    module.sow(STATS, name, measure(*x), reduce_fn=lambda _, new: new, init_fn=lambda: None)
