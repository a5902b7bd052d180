"""The optimiser: learning-rate schedules, clipping, AdamW with weight decay by the axis table."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from slm.runs.config import OptimConfig, ScheduleConfig
from slm.weights.axes import INPUTS, Params

Schedule = Callable[[jax.Array], jax.Array]


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


SCHEDULES = {'constant': constant, 'cosine': cosine, 'inverse_sqrt': inverse_sqrt, 'wsd': wsd}


def schedule(cfg: ScheduleConfig, steps: int) -> Schedule:
  """Build the learning rate by step; ValueError: an unknown name, too long a warm-up."""
  if cfg.name not in SCHEDULES:
    raise ValueError(f'schedule.name: expected one of {sorted(SCHEDULES)}, found {cfg.name!r}')
  if not 0 <= cfg.warmup < steps:
    raise ValueError(f'schedule.warmup={cfg.warmup}: expected less than steps={steps}')
  return SCHEDULES[cfg.name](cfg, steps)


def build(
  cfg: OptimConfig, learning_rate: Schedule, independent: bool
) -> optax.GradientTransformation:
  """Build clipping and AdamW; weight decay applies to weights that contract an axis alone.

  independent: every leaf leads with an axis of separate models, each clipped by its own norm.
  """
  adamw = optax.adamw(
    learning_rate, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decay_mask
  )
  clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity()
  tx = optax.chain(clip, adamw)
  if independent:
    tx = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
  return tx


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
