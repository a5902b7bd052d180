"""Whole weights, one set per cluster, and adapters and masks on frozen weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from slm.reparam.base import Init, Reparam, factors, pick, targets
from slm.weights.axes import AXES, Params
from slm.weights.sharding import constrain
from slm.weights.tree import flatten, unflatten

# The matrices of an MLP, the default `leaves` of most reparameterisations.
MLP = ('w_gate', 'w_up', 'w_down')


@dataclasses.dataclass(frozen=True)
class FullConfig:
  """Whole weights."""

  name: str = 'full'


def full(init: Init, cfg: FullConfig) -> Reparam:
  """Train the params themselves."""
  return Reparam(init, lambda theta, frozen, condition: theta, start=lambda params: params)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
  """A hard mixture."""

  clusters: int = 16  # k
  name: str = 'mixture'


def mixture(init: Init, cfg: MixtureConfig) -> Reparam:
  """Train one independent model per cluster (hard mixture, Grangier et al. §2.4).

  A vector condition must list all clusters in order (data.order='every'): params are then theta's
  stack, and with the batch split over `expert` alone no device needs the weights of another. A
  histogram averages the models. Started from a dense model this is c-BTM (Gururangan et al. 2023).
  """
  if cfg.clusters < 1:
    raise ValueError(f'reparam.clusters: expected at least 1, found {cfg.clusters}')

  def materialize(theta, frozen, condition):
    experts = theta['experts']
    if jnp.ndim(condition) == 1 and jnp.issubdtype(condition.dtype, jnp.integer):
      if len(condition) != cfg.clusters:
        raise ValueError(
          f'mixture: expected a group per expert ({cfg.clusters}), found {len(condition)}: '
          'set data.order="every"'
        )
      return experts
    return jax.tree.map(lambda w: pick(w, condition), experts)

  return Reparam(
    lambda key: {'experts': jax.vmap(init)(jax.random.split(key, cfg.clusters))},
    materialize,
    cfg.clusters,
    varies=('*',),
    independent=True,
    start=lambda params: {'experts': _repeat(params, cfg.clusters)},
  )


def _repeat(params: Params, count: int) -> Params:
  return jax.tree.map(lambda w: jnp.broadcast_to(w, (count, *w.shape)), params)


@dataclasses.dataclass(frozen=True)
class DemixConfig:
  """Some leaves separate for each cluster."""

  clusters: int = 16  # k
  leaves: tuple[str, ...] = MLP
  name: str = 'demix'


def demix(init: Init, cfg: DemixConfig) -> Reparam:
  """Train the named leaves separately per cluster, share the rest (DEMix, Gururangan et al. 2021).

  The clusters are the domains. This is a projected network with h = k and E = M = I.
  """

  def split(params):
    own = targets(params['blocks'], cfg.leaves)
    shared = {path: w for path, w in flatten(params) if path[1:] not in own}
    return unflatten(shared), {'blocks': unflatten(own)}

  def new(key):
    shared_key, key = jax.random.split(key)
    draws = jax.vmap(lambda k: split(init(k))[1])(jax.random.split(key, cfg.clusters))
    return {'shared': split(init(shared_key))[0], 'experts': draws}

  def start(params):
    shared, own = split(params)
    return {'shared': shared, 'experts': _repeat(own, cfg.clusters)}

  def materialize(theta, frozen, condition):
    blocks = dict(flatten(theta['shared']['blocks']))
    for path, stack in flatten(theta['experts']['blocks']):
      weight = pick(stack, condition)
      if weight.ndim == stack.ndim:
        weight = constrain(weight, 'batch', 'layers', *AXES[path[-1]])
      blocks[path] = weight
    return {**theta['shared'], 'blocks': unflatten(blocks)}

  return Reparam(new, materialize, cfg.clusters, varies=tuple(cfg.leaves), start=start)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank changes to frozen weights."""

  rank: int = 8
  alpha: float = 16.0  # the change is (alpha / rank) A B
  leaves: tuple[str, ...] = ('wq', 'wk', 'wv', 'wo', *MLP)
  name: str = 'lora'


def lora(init: Init, cfg: LoraConfig) -> Reparam:
  """Train W + (alpha / rank) A B with W frozen (Hu et al. 2021): A [in,rank], B [rank,out].

  A ~ N(0, 1/in) and B = 0: training starts at the frozen model.
  """
  if cfg.rank < 1:
    raise ValueError(f'reparam.rank: expected at least 1, found {cfg.rank}')

  def new(key):
    blocks = jax.eval_shape(init, key)['blocks']
    theta = {}
    for i, (path, w) in enumerate(sorted(targets(blocks, cfg.leaves).items())):
      theta |= factors(jax.random.fold_in(key, i), path, w.shape, cfg.rank, (w.shape[0],))
    return {'blocks': unflatten(theta)}

  def materialize(theta, frozen, condition):
    base = frozen['base']
    blocks = dict(flatten(base['blocks']))
    ab = dict(flatten(theta['blocks']))
    product = jax.vmap(functools.partial(jnp.tensordot, axes=1))
    for path in {path[:-1] for path in ab}:
      change = product(ab[*path, 'lora_a'], ab[*path, 'lora_b'])
      blocks[path] = blocks[path] + (cfg.alpha / cfg.rank) * change.astype(blocks[path].dtype)
    return {**base, 'blocks': unflatten(blocks)}

  return Reparam(new, materialize, base='params')


@dataclasses.dataclass(frozen=True)
class MaskConfig:
  """A bit per frozen weight."""

  leaves: tuple[str, ...] = MLP
  threshold: float = 5e-3
  name: str = 'mask'


def mask(init: Init, cfg: MaskConfig) -> Reparam:
  """Train a binary mask of frozen weights: W * [score > threshold] (Mallya et al. 2018).

  Scores start at twice the threshold: training starts at the frozen model. The gradient of a score
  is that of its bit (straight-through estimator).
  """
  if cfg.threshold <= 0:
    raise ValueError(f'reparam.threshold: expected more than 0, found {cfg.threshold}')

  def new(key):
    blocks = jax.eval_shape(init, key)['blocks']
    scores = lambda w: jnp.full(w.shape, 2 * cfg.threshold)
    return {'blocks': jax.tree.map(scores, unflatten(targets(blocks, cfg.leaves)))}

  def materialize(theta, frozen, condition):
    base = frozen['base']
    blocks = dict(flatten(base['blocks']))
    for path, score in flatten(theta['blocks']):
      bit = (score > cfg.threshold).astype(score.dtype)
      bit = score + jax.lax.stop_gradient(bit - score)
      blocks[path] = blocks[path] * bit.astype(blocks[path].dtype)
    return {**base, 'blocks': unflatten(blocks)}

  return Reparam(new, materialize, base='params')
