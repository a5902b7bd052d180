"""What a pass sums over calibration rows; the sums of different rows add up.

    stats = {'sums': {...}, 'count': sequences, 'tokens': tokens}

A pass can therefore be interrupted and split over batches and devices: its result is the same.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm import models
from slm.objectives import next_token
from slm.objectives.losses import token_losses
from slm.runs.config import NextTokenConfig
from slm.weights import tree
from slm.weights.axes import Params
from slm.weights.tree import flatten, unflatten

Stats = dict[str, Any]
Batch = Mapping[str, jax.Array]
# The weights whose products are added to the residual stream: a layer without them is the identity.
WRITERS = ('wo', 'bo', 'w_down', 'b_down')


class Measure(NamedTuple):
  """A function (params, batch) -> sums, and its cost per token in forward passes."""

  sums: Callable[[Params, Batch], Params]
  passes: float = 1.0


def summing(measure: Measure) -> Callable[[Params, Batch], Stats]:
  """Compile a measure; the sums are float64 on the host."""

  @jax.jit
  def compiled(params, batch):
    real = batch['segments'] > 0
    return measure.sums(params, batch), real.any(1).sum(), real.sum()

  def stats(params, batch):
    sums, count, tokens = jax.device_get(compiled(params, batch))
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    return {'sums': sums, 'count': int(count), 'tokens': int(tokens)}

  return stats


def merge(a: Stats, b: Stats) -> Stats:
  """Add the stats of different rows; {} is those of none."""
  return jax.tree.map(operator.add, a, b) if a and b else a or b


def activations(model: models.Model, dtype: str) -> Measure:
  """Sum the statistics that slm.models.observe takes at every site, and count every id."""

  def sums(params, batch):
    _, observed = model.observe(tree.cast(params, jnp.dtype(dtype)), batch)
    ids = jnp.zeros(model.cfg.vocab).at[batch['inputs']].add(batch['segments'] > 0)
    return {**observed['blocks'], 'vocab': ids}

  return Measure(sums)


def gradients(model: models.Model, dtype: str, chunk: int) -> Measure:
  """Sum the gradients of the next-token loss."""
  loss = next_token.next_token(NextTokenConfig(chunk=chunk), {'student': model.forward})

  def total(params, batch):
    return loss(tree.cast(params, jnp.dtype(dtype)), {}, batch)['loss'][0]

  return Measure(jax.grad(total), passes=3.0)


def windows(num_layers: int, width: int) -> np.ndarray:
  """Return gates [n+1,l] of layers: each of the n windows of this width closed, then all open."""
  starts, layers = np.arange(num_layers - width + 1)[:, None], np.arange(num_layers)
  gates = (layers < starts) | (layers >= starts + width)
  return np.concatenate([gates, np.ones((1, num_layers), bool)]).astype(np.float32)


def losses(model: models.Model, dtype: str, chunk: int, gates: np.ndarray) -> Measure:
  """Sum the next-token losses under each of the gates [n,l]; a layer with gate 0 is skipped."""

  def sums(params, batch):
    params = tree.cast(params, jnp.dtype(dtype))

    def loss(gate):
      def close(path, w):
        if path[-1].key not in WRITERS:
          return w
        return w * gate.reshape((-1,) + (1,) * (w.ndim - 1)).astype(w.dtype)

      blocks = jax.tree_util.tree_map_with_path(close, params['blocks'])
      return token_losses(model.forward, {**params, 'blocks': blocks}, batch, chunk).sum()

    return {'nll': jax.lax.map(loss, jnp.asarray(gates)), 'weight': batch['weights'].sum()[None]}

  return Measure(sums, passes=len(gates))


def shrinkage(model: models.Model, dtype: str, kept: np.ndarray) -> Measure:
  """Sum rms(kept channels) / rms(all channels) at every norm."""
  channels = np.zeros(model.cfg.embed, np.float32)
  channels[kept] = 1

  def sums(params, batch):
    mask = {p: jnp.broadcast_to(channels, w.shape) for p, w in flatten(params) if p[-1] == 'scale'}
    params = tree.cast(params, jnp.dtype(dtype))
    _, observed = model.observe(params, batch, unflatten(mask))
    return unflatten({p: x for p, x in flatten(observed) if p[-1] == 'gain'})

  return Measure(sums)
