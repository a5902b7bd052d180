"""Whole weights, stacks of them, and adapters and masks on frozen ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from slm.reparam.base import Init, Reparam, factors, pick, targets
from slm.weights.axes import AXES
from slm.weights.sharding import constrain
from slm.weights.tree import flatten, unflatten

# The matrices of an MLP: what most reparameterisations change.
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

  clusters: int = 16  # k, one model each
  name: str = 'mixture'


def mixture(init: Init, cfg: MixtureConfig) -> Reparam:
  """Train one independent model per cluster, stacked (hard mixture, Grangier et al. §2.4).

  A vector condition must be all clusters in order (the loader's order='every'): the stack then is
  the answer, and with the batch split over `expert` alone no device needs another's weights.
  Started from a dense model it is c-BTM (Gururangan et al. 2023); a histogram averages the experts.
  """
  if cfg.clusters < 1:
    raise ValueError(f'reparam.clusters: expected at least 1, found {cfg.clusters}')

  def materialize(theta, frozen, condition):
    experts = theta['experts']
    if jnp.ndim(condition) == 1 and jnp.issubdtype(condition.dtype, jnp.integer):
      if len(condition) != cfg.clusters:
        raise ValueError(
          f'mixture: expected a group per expert ({cfg.clusters}), '
          f'found {len(condition)}: set data.order="every"'
        )
      return experts
    return jax.tree.map(lambda w: pick(w, condition), experts)

  stacked = lambda w: jnp.broadcast_to(w, (cfg.clusters, *w.shape))
  return Reparam(
    lambda key: {'experts': jax.vmap(init)(jax.random.split(key, cfg.clusters))},
    materialize,
    cfg.clusters,
    varies=('*',),
    independent=True,
    start=lambda params: {'experts': jax.tree.map(stacked, params)},
  )


@dataclasses.dataclass(frozen=True)
class DemixConfig:
  """Some leaves once per cluster."""

  clusters: int = 16  # k
  leaves: tuple[str, ...] = MLP
  name: str = 'demix'


def demix(init: Init, cfg: DemixConfig) -> Reparam:
  """Train the named leaves once per cluster and share the rest (DEMix, Gururangan et al. 2021).

  The domains are the clusters. It is a projected network with h = k and E = M = I.
  """

  def split(params):
    flat = dict(flatten(params))
    mine = targets(params['blocks'], cfg.leaves)
    return unflatten({p: w for p, w in flat.items() if p[1:] not in mine}), mine

  def new(key):
    shared_key, key = jax.random.split(key)
    draws = jax.vmap(lambda k: unflatten(split(init(k))[1]))(jax.random.split(key, cfg.clusters))
    return {'shared': split(init(shared_key))[0], 'experts': {'blocks': draws}}

  def start(params):
    shared, mine = split(params)
    stacked = {p: jnp.broadcast_to(w, (cfg.clusters, *w.shape)) for p, w in mine.items()}
    return {'shared': shared, 'experts': {'blocks': unflatten(stacked)}}

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
  """Low-rank changes of frozen weights."""

  rank: int = 8
  alpha: float = 16.0  # the change is alpha / rank x A B
  leaves: tuple[str, ...] = ('wq', 'wk', 'wv', 'wo', *MLP)
  name: str = 'lora'


def lora(init: Init, cfg: LoraConfig) -> Reparam:
  """Train W + (alpha / rank) A B on frozen weights (Hu et al. 2021): A [in,rank], B [rank,out].

  A ~ N(0, 1/in) and B = 0, so that training starts at the frozen model.
  """
  if cfg.rank < 1:
    raise ValueError(f'reparam.rank: expected at least 1, found {cfg.rank}')

  def new(key):
    blocks = jax.eval_shape(init, key)['blocks']
    found = {}
    for i, (path, w) in enumerate(sorted(targets(blocks, cfg.leaves).items())):
      found |= factors(jax.random.fold_in(key, i), path, w.shape, cfg.rank, (w.shape[0],))
    return {'blocks': unflatten(found)}

  def materialize(theta, frozen, condition):
    base = frozen['base']
    blocks = dict(flatten(base['blocks']))
    changes = dict(flatten(theta['blocks']))
    for path in {p[:-1] for p in changes}:
      a, b = changes[*path, 'lora_a'], changes[*path, 'lora_b']
      change = jax.vmap(functools.partial(jnp.tensordot, axes=1))(a, b)
      blocks[path] = blocks[path] + (cfg.alpha / cfg.rank) * change.astype(blocks[path].dtype)
    return {**base, 'blocks': unflatten(blocks)}

  return Reparam(new, materialize, base='params')


@dataclasses.dataclass(frozen=True)
class MaskConfig:
  """One bit for each frozen weight."""

  leaves: tuple[str, ...] = MLP
  threshold: float = 5e-3
  name: str = 'mask'


def mask(init: Init, cfg: MaskConfig) -> Reparam:
  """Train which of the frozen weights are used: W * [score > threshold] (Mallya et al. 2018).

  One bit per weight makes a specialist. Scores start at twice the threshold, so that training
  starts at the frozen model, and get the gradient of their bit (straight through).
  """
  if cfg.threshold <= 0:
    raise ValueError(f'reparam.threshold: expected more than 0, found {cfg.threshold}')

  def new(key):
    blocks = jax.eval_shape(init, key)['blocks']
    scores = {
      p: jnp.full(w.shape, 2 * cfg.threshold) for p, w in targets(blocks, cfg.leaves).items()
    }
    return {'blocks': unflatten(scores)}

  def materialize(theta, frozen, condition):
    base = frozen['base']
    blocks = dict(flatten(base['blocks']))
    for path, score in flatten(theta['blocks']):
      bit = (score > cfg.threshold).astype(score.dtype)
      bit = score + jax.lax.stop_gradient(bit - score)
      blocks[path] = blocks[path] * bit.astype(blocks[path].dtype)
    return {**base, 'blocks': unflatten(blocks)}

  return Reparam(new, materialize, base='params')
