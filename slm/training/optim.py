"""The optimiser: learning-rate schedules, clipping, AdamW with weight decay by the axis table."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from slm.runs.config import OptimConfig, ScheduleConfig
from slm.weights.axes import INPUTS, Params

Schedule = Callable[[jax.Array], jax.Array]
# Batches in a row whose gradient is not finite that end a run although it skips such batches.
MOST_NOT_FINITE = 10
_WINDOW = 128  # latest gradient norms that a new one is compared with
_LEAST = 32  # norms without which none is an outlier


def constant(c: ScheduleConfig, steps: int) -> Schedule:
  """Warm up linearly, then hold the peak (the paper's schedule)."""
  return optax.schedules.warmup_constant_schedule(c.peak / (c.warmup + 1), c.peak, c.warmup)


def cosine(c: ScheduleConfig, steps: int) -> Schedule:
  """Warm up linearly, then decay along a cosine to final x peak."""
  start, end = c.peak / (c.warmup + 1), c.final * c.peak  # not from 0: the first step counts
  return optax.schedules.warmup_cosine_decay_schedule(start, c.peak, c.warmup, steps, end)


def inverse_sqrt(c: ScheduleConfig, steps: int) -> Schedule:
  """Warm up linearly, then decay as 1 / sqrt(step) (Vaswani et al. 2017, §5.3).

  It does not depend on the number of steps: every checkpoint is the end of a shorter run.
  """
  warmup = c.warmup + 1
  return lambda step: c.peak * jnp.minimum((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)


def wsd(c: ScheduleConfig, steps: int) -> Schedule:
  """Warm up, hold, then decay linearly over the last `decay` share of the steps."""
  length = max(int(c.decay * steps), 1)
  fall = optax.schedules.linear_schedule(c.peak, c.final * c.peak, length)
  return optax.schedules.join_schedules([constant(c, steps), fall], [steps - length])


def linear(c: ScheduleConfig, steps: int) -> Schedule:
  """Warm up linearly, then decay linearly to final x peak."""
  fall = optax.schedules.linear_schedule(c.peak, c.final * c.peak, steps - c.warmup)
  return optax.schedules.join_schedules([constant(c, steps), fall], [c.warmup])


SCHEDULES = {
  'constant': constant,
  'cosine': cosine,
  'inverse_sqrt': inverse_sqrt,
  'linear': linear,
  'wsd': wsd,
}


def schedule(cfg: ScheduleConfig, steps: int, updates: int = 1) -> Schedule:
  """Build the learning rate by update, of which a step has `updates`.

  The rate of an update is that of the fraction of a step at which it begins.

  Raises:
    ValueError: if there is no schedule of this name, or the warm-up is too long.
  """
  if cfg.name not in SCHEDULES:
    raise ValueError(f'schedule.name: expected one of {sorted(SCHEDULES)}, found {cfg.name!r}')
  if not 0 <= cfg.warmup < steps:
    raise ValueError(f'schedule.warmup={cfg.warmup}: expected less than steps={steps}')
  rate = SCHEDULES[cfg.name](cfg, steps)
  return rate if updates == 1 else lambda update: rate(update / updates)


def build(
  cfg: OptimConfig, learning_rate: Schedule, independent: bool
) -> optax.GradientTransformation:
  """Build clipping and AdamW; weight decay applies to weights that contract an axis alone.

  independent: every leaf leads with an axis of separate models, each clipped, and its outliers
  skipped, by its own norm.
  """

  def clipped(rate):
    decay = {'weight_decay': cfg.weight_decay, 'mask': decay_mask}
    clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity()
    return optax.chain(clip, optax.adamw(rate, cfg.b1, cfg.b2, cfg.eps, **decay))

  tx = clipped(learning_rate)
  if cfg.skip_above:  # the learning rate stays that of the step, whatever was skipped before it
    rate = optax.scale_by_schedule(learning_rate)
    tx = optax.chain(skip_outliers(clipped(1.0), cfg.skip_above), rate)
  if independent:
    tx = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
  return tx


class SkipState(NamedTuple):
  """The state of `skip_outliers`."""

  norms: jax.Array  # [_WINDOW] of the latest finite gradients, NaN before there are so many
  skipped: jax.Array  # updates so far
  not_finite: jax.Array  # batches in a row, up to the latest, whose gradient was not finite
  inner: Any


def skip_outliers(tx: optax.GradientTransformation, above: float) -> optax.GradientTransformation:
  """Apply no update, and keep the state of `tx`, on a batch whose gradient is an outlier.

  It is one if its norm is not finite or above `above` times the median of the latest ones. Finite
  outliers count among these, so that a lasting change is soon no outlier.

  As the SkipStepOptimizer of OLMo-core (optim/skip_step_optimizer.py) and Levanter, which compare
  with a mean and deviations, and optax.apply_if_finite, which skips what is not finite.
  """

  def init(params):
    zero = jnp.zeros((), jnp.int32)
    return SkipState(jnp.full(_WINDOW, jnp.nan), zero, zero, tx.init(params))

  def update(grads, state, params):
    norm = optax.global_norm(grads).astype(jnp.float32)
    finite = jnp.isfinite(norm)
    compared = (~jnp.isnan(state.norms)).sum() >= _LEAST
    skip = ~finite | compared & (norm > above * jnp.nanmedian(state.norms))
    updates, inner = tx.update(grads, state.inner, params)
    return jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), updates), SkipState(
      jnp.where(finite, jnp.roll(state.norms, -1).at[-1].set(norm), state.norms),
      state.skipped + skip,
      jnp.where(finite, 0, state.not_finite + 1),
      jax.tree.map(lambda new, old: jnp.where(skip, old, new), inner, state.inner),
    )

  return optax.GradientTransformation(init, update)


def skips(opt_state: Any) -> dict[str, jax.Array]:
  """Return what `skip_outliers` counted, over all models and parts; {} if nothing is skipped.

  `skipped` is the number of updates so far, `not_finite` the most batches in a row whose gradient
  was not finite.
  """
  found = lambda x: isinstance(x, SkipState)
  states = [x for x in jax.tree.leaves(opt_state, is_leaf=found) if found(x)]
  if not states:
    return {}
  most = jnp.stack([x.not_finite.max() for x in states]).max()
  return {'skipped': sum(x.skipped.sum() for x in states), 'not_finite': most}


def each(
  tx: optax.GradientTransformation, rates: Mapping[str, float]
) -> optax.GradientTransformation:
  """Apply a transformation, clipping included, to every part of {name: weights} separately.

  `rates` are factors of the learning rate by part; 1 where none is named.
  """

  def update(grads, states, weights):
    updates, new_states = {}, {}
    for name in weights:
      rate = rates.get(name, 1.0)
      change, new_states[name] = tx.update(grads[name], states[name], weights[name])
      updates[name] = jax.tree.map(lambda u, rate=rate: u * rate, change)
    return updates, new_states

  init = lambda weights: {name: tx.init(x) for name, x in weights.items()}
  return optax.GradientTransformation(init, update)


def decay_mask(theta: Params) -> Params:
  """Mark the leaves that decay: all but embeddings, norms, biases, codes and factors."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in INPUTS, theta)
