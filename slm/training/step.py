"""The one step maker: objectives and reparameterisations come in as functions."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from slm.weights.axes import Params

Batch = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class State:
  """What training changes; donated to every step."""

  step: jax.Array
  theta: Params
  opt_state: Any


def init_state(theta: Params, tx: optax.GradientTransformation) -> State:
  """Start from weights."""
  return State(jnp.zeros((), jnp.int32), theta, tx.init(theta))


def make_train_step(
  sums: Callable[[Params, Params, Batch], Sums],
  tx: optax.GradientTransformation,
  independent: bool = False,
) -> Callable[[State, Params, Batch], tuple[State, dict[str, jax.Array]]]:
  """Make step(state, frozen, batch) -> (state, metrics).

  `sums(theta, frozen, microbatch)` returns {name: (sum, weight)}, each a scalar or one value per
  group. Batch leaves lead with the accumulation axis. The loss is sum / weight over everything;
  with `independent` groups it is the sum over groups of their own sum / weight, so that each
  group's gradient is what it would be if trained alone.
  """

  def gradient(theta, frozen, micro):
    def loss(theta):
      values = sums(theta, frozen, micro)
      return values['loss'][0].sum(), values

    return jax.grad(loss, has_aux=True)(theta)

  def step(state: State, frozen: Params, batch: Batch):
    accum = jax.tree.leaves(batch)[0].shape[0]
    micro = lambda i: jax.tree.map(lambda x: x[i], batch)
    grads, values = gradient(state.theta, frozen, micro(0))
    if accum > 1:
      rest = jax.tree.map(lambda x: x[1:], batch)
      add = lambda carry, m: (
        jax.tree.map(jnp.add, carry, gradient(state.theta, frozen, m)),
        None,
      )
      (grads, values), _ = jax.lax.scan(add, (grads, values), rest)
    weight = values['loss'][1]
    if independent:
      over = lambda g: g / weight.reshape((-1,) + (1,) * (g.ndim - 1))
    else:
      over = lambda g: g / weight.sum()
    grads = jax.tree.map(over, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.theta)
    theta = optax.apply_updates(state.theta, updates)
    norms = jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)])
    metrics = {name: value.sum() / weight.sum() for name, (value, weight) in values.items()}
    metrics['tokens'] = weight.sum()
    metrics['grad_norm'] = jnp.sqrt(norms.sum())
    # Index of the first leaf with a non-finite gradient, -1 if there is none.
    bad = ~jnp.isfinite(norms)
    metrics['bad_leaf'] = jnp.where(bad.any(), jnp.argmax(bad), -1)
    return State(state.step + 1, theta, opt_state), metrics

  return step
