"""Optimiser: schedule, clipping, AdamW with weight decay by the axis table."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from slm.runs.config import OptimConfig, ScheduleConfig
from slm.weights.axes import INPUTS, Params

Schedule = Callable[[jax.Array], jax.Array]


def constant(peak: float, warmup: int, steps: int, final: float, decay: float) -> Schedule:
  """Warm up linearly, then hold the peak (the paper's schedule)."""
  del steps, final, decay  # every schedule takes the same keys, so that its name alone selects it
  return optax.schedules.warmup_constant_schedule(peak / (warmup + 1), peak, warmup)


def cosine(peak: float, warmup: int, steps: int, final: float, decay: float) -> Schedule:
  """Warm up linearly, then decay along a cosine to final x peak."""
  del decay
  start = peak / (warmup + 1)  # not 0: the first step should count
  return optax.schedules.warmup_cosine_decay_schedule(start, peak, warmup, steps, final * peak)


def inverse_sqrt(peak: float, warmup: int, steps: int, final: float, decay: float) -> Schedule:
  """Warm up linearly, then decay as 1 / sqrt(step) (Vaswani et al. 2017, §5.3).

  It does not depend on where training ends, so every checkpoint is the end of a shorter run.
  """
  del steps, final, decay
  return lambda step: (
    peak * jnp.minimum((step + 1) / (warmup + 1), ((warmup + 1) / (step + 1)) ** 0.5)
  )


def wsd(peak: float, warmup: int, steps: int, final: float, decay: float) -> Schedule:
  """Warm up, hold, then decay linearly over the last `decay` share of the steps."""
  start = steps - max(int(decay * steps), 1)
  return optax.schedules.join_schedules(
    [
      optax.schedules.warmup_constant_schedule(peak / (warmup + 1), peak, warmup),
      optax.schedules.linear_schedule(peak, final * peak, steps - start),
    ],
    [start],
  )


SCHEDULES = {'constant': constant, 'cosine': cosine, 'inverse_sqrt': inverse_sqrt, 'wsd': wsd}


def schedule(cfg: ScheduleConfig, steps: int) -> Schedule:
  """Build the learning rate as a function of the step.

  Raises:
    ValueError: if the name is unknown or the warm-up does not fit in the steps.
  """
  if cfg.name not in SCHEDULES:
    raise ValueError(f'schedule.name: expected one of {sorted(SCHEDULES)}, found {cfg.name!r}')
  if not 0 <= cfg.warmup < steps:
    raise ValueError(f'schedule.warmup={cfg.warmup}: expected less than steps={steps}')
  return SCHEDULES[cfg.name](cfg.peak, cfg.warmup, steps, cfg.final, cfg.decay)


def build(
  cfg: OptimConfig, learning_rate: Schedule, independent: bool
) -> optax.GradientTransformation:
  """Build clipping + AdamW; weight decay touches only weights that contract an axis.

  independent: every leaf leads with an axis of separate models, each clipped by its own norm.
  """
  tx = optax.chain(
    optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity(),
    optax.adamw(
      learning_rate,
      b1=cfg.b1,
      b2=cfg.b2,
      eps=cfg.eps,
      weight_decay=cfg.weight_decay,
      mask=decay_mask,
    ),
  )
  if independent:
    tx = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
  return tx


def each(
  tx: optax.GradientTransformation, rates: Mapping[str, float]
) -> optax.GradientTransformation:
  """Apply a transformation to every part of {name: weights} alone, its clipping included.

  `rates` are the shares of the learning rate that parts have, 1 where none is named.
  """

  def update(grads, states, weights):
    found = {name: tx.update(grads[name], states[name], weights[name]) for name in weights}
    scaled = lambda name, updates: jax.tree.map(lambda u: u * rates.get(name, 1.0), updates)
    updates = {name: scaled(name, pair[0]) for name, pair in found.items()}
    return updates, {name: pair[1] for name, pair in found.items()}

  init = lambda weights: {name: tx.init(x) for name, x in weights.items()}
  return optax.GradientTransformation(init, update)


def decay_mask(theta: Params) -> Params:
  """Mark the leaves that weight decay shrinks: no embeddings, norms, biases, codes or factors."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in INPUTS, theta)
