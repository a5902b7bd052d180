"""Whole weights, stacks of them, and adapters and masks on frozen ones."""

import functools

import jax
import jax.numpy as jnp

from slm.reparam.base import Init, Reparam, factors, pick, targets
from slm.weights.axes import AXES
from slm.weights.sharding import constrain
from slm.weights.tree import flatten, unflatten


def full(init: Init) -> Reparam:
  """Train the params themselves."""
  return Reparam(init, lambda theta, frozen, condition: theta, start=lambda params: params)


def mixture(init: Init, clusters: int) -> Reparam:
  """Train one independent model per cluster, stacked (hard mixture, Grangier et al. §2.4).

  A vector condition must be all clusters in order (the loader's order='every'): the stack then is
  the answer, and with the batch split over `expert` alone no device needs another's weights.
  Started from a dense model it is c-BTM (Gururangan et al. 2023); a histogram averages the experts.
  """
  if clusters < 1:
    raise ValueError(f'reparam.clusters: expected at least 1, found {clusters}')

  def materialize(theta, frozen, condition):
    experts = theta['experts']
    if jnp.ndim(condition) == 1 and jnp.issubdtype(condition.dtype, jnp.integer):
      if len(condition) != clusters:
        raise ValueError(
          f'mixture: expected a group per expert ({clusters}), '
          f'found {len(condition)}: set data.order="every"'
        )
      return experts
    return jax.tree.map(lambda w: pick(w, condition), experts)

  stacked = lambda w: jnp.broadcast_to(w, (clusters, *w.shape))
  return Reparam(
    lambda key: {'experts': jax.vmap(init)(jax.random.split(key, clusters))},
    materialize,
    clusters,
    varies=('*',),
    independent=True,
    start=lambda params: {'experts': jax.tree.map(stacked, params)},
  )


def demix(init: Init, clusters: int, leaves: tuple[str, ...]) -> Reparam:
  """Train the named leaves once per cluster and share the rest (DEMix, Gururangan et al. 2021).

  The domains are the clusters. It is a projected network with h = k and E = M = I.
  """

  def split(params):
    flat = dict(flatten(params))
    mine = targets(params['blocks'], leaves)
    return unflatten({p: w for p, w in flat.items() if p[1:] not in mine}), mine

  def new(key):
    shared_key, key = jax.random.split(key)
    draws = jax.vmap(lambda k: unflatten(split(init(k))[1]))(jax.random.split(key, clusters))
    return {'shared': split(init(shared_key))[0], 'experts': {'blocks': draws}}

  def start(params):
    shared, mine = split(params)
    stacked = {p: jnp.broadcast_to(w, (clusters, *w.shape)) for p, w in mine.items()}
    return {'shared': shared, 'experts': {'blocks': unflatten(stacked)}}

  def materialize(theta, frozen, condition):
    blocks = dict(flatten(theta['shared']['blocks']))
    for path, stack in flatten(theta['experts']['blocks']):
      weight = pick(stack, condition)
      if weight.ndim == stack.ndim:
        weight = constrain(weight, 'batch', 'layers', *AXES[path[-1]])
      blocks[path] = weight
    return {**theta['shared'], 'blocks': unflatten(blocks)}

  return Reparam(new, materialize, clusters, varies=tuple(leaves), start=start)


def lora(init: Init, rank: int, alpha: float, leaves: tuple[str, ...]) -> Reparam:
  """Train W + (alpha / rank) A B on frozen weights (Hu et al. 2021): A [in,rank], B [rank,out].

  A ~ N(0, 1/in) and B = 0, so that training starts at the frozen model.
  """
  if rank < 1:
    raise ValueError(f'reparam.rank: expected at least 1, found {rank}')

  def new(key):
    blocks = jax.eval_shape(init, key)['blocks']
    found = {}
    for i, (path, w) in enumerate(sorted(targets(blocks, leaves).items())):
      found |= factors(jax.random.fold_in(key, i), path, w.shape, rank, (w.shape[0],))
    return {'blocks': unflatten(found)}

  def materialize(theta, frozen, condition):
    base = frozen['base']
    blocks = dict(flatten(base['blocks']))
    changes = dict(flatten(theta['blocks']))
    for path in {p[:-1] for p in changes}:
      a, b = changes[*path, 'lora_a'], changes[*path, 'lora_b']
      change = jax.vmap(functools.partial(jnp.tensordot, axes=1))(a, b)
      blocks[path] = blocks[path] + (alpha / rank) * change.astype(blocks[path].dtype)
    return {**base, 'blocks': unflatten(blocks)}

  return Reparam(new, materialize, base='params')


def mask(init: Init, leaves: tuple[str, ...], threshold: float) -> Reparam:
  """Train which of the frozen weights are used: W * [score > threshold] (Mallya et al. 2018).

  One bit per weight makes a specialist. Scores start at twice the threshold, so that training
  starts at the frozen model, and get the gradient of their bit (straight through).
  """
  if threshold <= 0:
    raise ValueError(f'reparam.threshold: expected more than 0, found {threshold}')

  def new(key):
    blocks = jax.eval_shape(init, key)['blocks']
    scores = {p: jnp.full(w.shape, 2 * threshold) for p, w in targets(blocks, leaves).items()}
    return {'blocks': unflatten(scores)}

  def materialize(theta, frozen, condition):
    base = frozen['base']
    blocks = dict(flatten(base['blocks']))
    for path, score in flatten(theta['blocks']):
      bit = (score > threshold).astype(score.dtype)
      bit = score + jax.lax.stop_gradient(bit - score)
      blocks[path] = blocks[path] * bit.astype(blocks[path].dtype)
    return {**base, 'blocks': unflatten(blocks)}

  return Reparam(new, materialize, base='params')
