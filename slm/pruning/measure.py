"""What is summed over calibration rows: functions of (params, batch) whose results add up.

    stats = {'sums': {...}, 'count': sequences, 'tokens': tokens}

So passes can be interrupted, and stats of other rows and devices be merged, without a difference.
"""

from collections.abc import Callable, Mapping
from typing import Any

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
Measure = Callable[[Params, Batch], Params]
# What adds to the residual stream: without them a layer passes on what it got.
WRITERS = ('wo', 'bo', 'w_down', 'b_down')


def summing(measure: Measure) -> Callable[[Params, Batch], Stats]:
  """Compile a measure; the sums come as float64 on the host."""

  @jax.jit
  def one(params, batch):
    real = batch['segments'] > 0
    return measure(params, batch), real.any(1).sum(), real.sum()

  def call(params, batch):
    found, count, tokens = jax.device_get(one(params, batch))
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    return {'sums': sums, 'count': int(count), 'tokens': int(tokens)}

  return call


def merge(a: Stats, b: Stats) -> Stats:
  """Add stats of different rows up."""
  if not a or not b:
    return a or b
  return {
    'sums': jax.tree.map(np.add, a['sums'], b['sums']),
    'count': a['count'] + b['count'],
    'tokens': a['tokens'] + b['tokens'],
  }


def activations(model: models.Model, dtype: str) -> Measure:
  """Sum what slm.models.observe says of every site, and how often each id occurs."""

  def measure(params, batch):
    _, found = model.observe(tree.cast(params, jnp.dtype(dtype)), batch)
    ids = jnp.zeros(model.cfg.vocab).at[batch['inputs']].add(batch['segments'] > 0)
    return {**found['blocks'], 'vocab': ids}

  return measure


def gradients(model: models.Model, dtype: str, chunk: int) -> Measure:
  """Sum the gradients of the next-token loss."""
  loss = next_token.next_token(NextTokenConfig(chunk=chunk), {'student': model.forward})

  def measure(params, batch):
    total = lambda p: loss(tree.cast(p, jnp.dtype(dtype)), {}, batch)['loss'][0]
    return jax.grad(total)(params)

  return measure


def windows(num_layers: int, width: int) -> np.ndarray:
  """Return gates [n+1,l]: each of the n windows of layers closed, then none."""
  starts, layers = np.arange(num_layers - width + 1)[:, None], np.arange(num_layers)
  gates = (layers < starts) | (layers >= starts + width)
  return np.concatenate([gates, np.ones((1, num_layers), bool)]).astype(np.float32)


def silence(params: Params, gates: jax.Array) -> Params:
  """Multiply what each layer adds to the stream by its gate [l]; 0 is the model without it."""

  def one(path, w):
    if path[-1].key not in WRITERS:
      return w
    return w * gates.reshape((-1,) + (1,) * (w.ndim - 1)).astype(w.dtype)

  return {**params, 'blocks': jax.tree_util.tree_map_with_path(one, params['blocks'])}


def losses(model: models.Model, dtype: str, chunk: int, gates: np.ndarray) -> Measure:
  """Sum the next-token losses with each of some gates [n,l], one compilation for all."""

  def measure(params, batch):
    params = tree.cast(params, jnp.dtype(dtype))
    gated = lambda g: token_losses(model.forward, silence(params, g), batch, chunk).sum()
    return {'nll': jax.lax.map(gated, jnp.asarray(gates)), 'weight': batch['weights'].sum()[None]}

  return measure


def shrinkage(model: models.Model, dtype: str, kept: np.ndarray) -> Measure:
  """Sum, at every norm, by how much the root mean square changes if these channels alone stay."""
  there = np.zeros(model.cfg.embed, np.float32)
  there[kept] = 1

  def measure(params, batch):
    mask = {p: jnp.broadcast_to(there, w.shape) for p, w in flatten(params) if p[-1] == 'scale'}
    params = tree.cast(params, jnp.dtype(dtype))
    _, found = model.observe(params, batch, unflatten(mask))
    return unflatten({p: x for p, x in flatten(found) if p[-1] == 'gain'})

  return measure
