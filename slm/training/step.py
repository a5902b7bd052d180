"""Make training steps from objectives and reparameterisations."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from slm import reparam
from slm.objectives.losses import Batch, Sums
from slm.objectives.setup import Objective
from slm.training import optim
from slm.weights import sharding, tree
from slm.weights.axes import Params


@flax.struct.dataclass
class State:
  """What training changes, donated to every step; `beside` is trained beside theta, often {}."""

  step: jax.Array
  theta: Params
  beside: Params
  opt_state: Any


def trained(theta: Params, beside: Params) -> Params:
  """Return the optimiser's weights: theta, or {'student': theta, **beside} if there are others."""
  return {'student': theta, **beside} if beside else theta


def apart(weights: Params, beside: Params) -> tuple[Params, Params]:
  """Split weights as `trained` joins them into theta and those beside it."""
  if not beside:
    return weights, {}
  return weights['student'], {name: x for name, x in weights.items() if name != 'student'}


def init_state(theta: Params, tx: optax.GradientTransformation, beside: Params) -> State:
  """Return the state before the first step."""
  return State(jnp.zeros((), jnp.int32), theta, beside, tx.init(trained(theta, beside)))


def make_sums(
  objective: Objective, rep: reparam.Reparam, dtype: str
) -> Callable[[Params, Params, Batch], Sums]:
  """Make sums(theta, frozen, batch [groups,rows,t]): materialise, cast, apply the objective.

  The objective's student must be reparam.map_groups(rep, forward). Independent models each have a
  loss: the objective itself is mapped over groups and the sums are per group.
  """

  def sums(theta, frozen, batch):
    rows = {name: x for name, x in batch.items() if name != 'condition'}
    condition = batch['condition'] if rep.clusters else None
    params = tree.cast(rep.materialize(theta, frozen, condition), jnp.dtype(dtype))
    frozen = tree.cast(frozen, jnp.dtype(dtype))
    if rep.independent:
      in_axes = (reparam.group_axes(rep, params), None, 0)
      return sharding.vmap_groups(objective, in_axes)(params, frozen, rows)
    rows = jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), rows)
    return objective(params, frozen, rows)

  return sums


def make_train_step(
  sums: Callable[[Params, Params, Batch], Sums],
  tx: optax.GradientTransformation,
  independent: bool = False,
  reduction: str = 'mean',
) -> Callable[[State, Params, Batch], tuple[State, dict[str, jax.Array]]]:
  """Make step(state, frozen, batch) -> (state, metrics).

  `sums(theta, frozen, microbatch)` returns {name: (sum, weight)}, scalars or one value per group;
  `frozen` includes what is trained beside theta. Batch leaves lead with the accumulation axis. The
  loss is sum / weight over everything. With `independent` groups it is the sum of each group's
  sum / weight, so that its gradient is the same as if the group were trained alone. The gradient of
  `reduction` 'sum' is that of the sum; the metrics are those of the mean. Where the weights of the
  loss are not tokens, the sum of 'tokens' is their number.
  """

  def gradient(state, frozen, micro):
    def loss(weights):
      theta, beside = apart(weights, state.beside)
      values = sums(theta, frozen | beside, micro)
      return values['loss'][0].sum(), values

    return jax.grad(loss, has_aux=True)(trained(state.theta, state.beside))

  def step(state: State, frozen: Params, batch: Batch):
    accum = jax.tree.leaves(batch)[0].shape[0]
    micro = lambda i: jax.tree.map(lambda x: x[i], batch)
    grads, values = gradient(state, frozen, micro(0))
    if accum > 1:
      rest = jax.tree.map(lambda x: x[1:], batch)
      add = lambda carry, m: (jax.tree.map(jnp.add, carry, gradient(state, frozen, m)), None)
      (grads, values), _ = jax.lax.scan(add, (grads, values), rest)
    weight = values['loss'][1]
    if reduction == 'sum':
      normalise = lambda g: g
    elif independent:
      normalise = lambda g: g / weight.reshape((-1,) + (1,) * (g.ndim - 1))
    else:
      normalise = lambda g: g / weight.sum()
    grads = jax.tree.map(normalise, grads)
    weights = trained(state.theta, state.beside)
    updates, opt_state = tx.update(grads, state.opt_state, weights)
    theta, beside = apart(optax.apply_updates(weights, updates), state.beside)
    norms = jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)])
    metrics = {name: value.sum() / weight.sum() for name, (value, weight) in values.items()}
    metrics['tokens'] = values.get('tokens', (weight,))[0].sum()
    metrics['grad_norm'] = jnp.sqrt(norms.sum())
    bad = ~jnp.isfinite(norms)
    metrics['bad_leaf'] = jnp.where(bad.any(), jnp.argmax(bad), -1)  # index of the first; -1: none
    metrics |= optim.skips(opt_state)
    return State(state.step + 1, theta, beside, opt_state), metrics

  return step


_OVER_UPDATES = {'tokens': jnp.sum} | dict.fromkeys(('bad_leaf', 'skipped', 'not_finite'), jnp.max)


def in_sequence(
  update: Callable[[State, Params, Batch], tuple[State, dict[str, jax.Array]]],
) -> Callable[[State, Params, Batch], tuple[State, dict[str, jax.Array]]]:
  """Make a step of several updates, one for each entry of the axis that batches then lead with.

  Its metrics are means over the updates, but `tokens` is their sum, and of the optimiser's counts
  and `bad_leaf` the largest is taken: after a gradient that is not finite none is.
  """

  def step(state: State, frozen: Params, batch: Batch):
    after, values = jax.lax.scan(lambda state, b: update(state, frozen, b), state, batch)
    metrics = {name: _OVER_UPDATES.get(name, jnp.mean)(x) for name, x in values.items()}
    return after.replace(step=state.step + 1), metrics

  return step
