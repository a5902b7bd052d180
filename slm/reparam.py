"""`params = materialize(theta, frozen, condition)`: what is trained against what the model sees.

The optimiser sees theta, the model sees params. A condition picks a specialist: an int cluster id
gives ordinary dense params; a vector of ids, one per group of rows, gives params whose varying
leaves have a group axis. Leaves that do not depend on the condition are shared, not copied.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slm import factory
from slm.models.decoder import Output
from slm.sharding import AXES, Params, constrain, leaf_axes, vmap_groups

Init = Callable[[jax.Array], Params]


@dataclasses.dataclass(frozen=True)
class Reparam:
  """A reparameterisation as pure functions.

  Attributes:
    init: key -> theta.
    materialize: (theta, frozen, condition) -> params.
    clusters: how many specialists theta holds; 0 means one model, the condition is ignored.
    varies: names of the leaves that depend on the condition; '*' means every leaf.
    group_axis: where a varying leaf made for a vector of conditions has its group axis.
    independent: whether groups share nothing, so that each is normalised and clipped alone.
  """

  init: Init
  materialize: Callable[[Params, Params, jax.Array | int | None], Params]
  clusters: int = 0
  varies: tuple[str, ...] = ()
  group_axis: int = 0
  independent: bool = False


def full(init: Init) -> Reparam:
  """Train the params themselves."""
  return Reparam(init, lambda theta, frozen, condition: theta)


def mixture(init: Init, clusters: int) -> Reparam:
  """Train one independent model per cluster, stacked (hard mixture, Grangier et al. §2.4).

  A vector condition must be all clusters in order (the loader's order='every'): the stack then is
  the answer, and with the batch split over `expert` alone no device needs another's weights.
  """

  def materialize(theta, frozen, condition):
    experts = theta['experts']
    if jnp.ndim(condition):
      if len(condition) != clusters:
        raise ValueError(
          f'mixture: expected a group per expert ({clusters}), '
          f'found {len(condition)}: set data.order="every"'
        )
      return experts
    return jax.tree.map(lambda w: w[condition], experts)

  return Reparam(
    lambda key: {'experts': jax.vmap(init)(jax.random.split(key, clusters))},
    materialize,
    clusters,
    varies=('*',),
    independent=True,
  )


def project(
  init: Init,
  clusters: int,
  capacity: int,
  code: int,
  leaves: tuple[str, ...],
  shared_mix: bool,
  last_layers: int = 0,
) -> Reparam:
  """Train a projected network (Grangier et al. §2.5): k clusters, h capacity, m code size.

  For layer l, cluster i and each leaf named in `leaves`,

    W^(l,i) = sum_q sum_r  E[i,q] M^(l)[q,r] T^(l)[r]

  theta holds E as expert_code [k,m], M as mix [l,m,h] (one per layer, or per layer and leaf when
  shared_mix is false) and T as `bases` [l,h,...]; every other leaf is shared by all clusters.
  The paper projects the MLP only. With `last_layers` the layers before those have one matrix for
  all clusters. E ~ N(0,1/m) and M ~ N(0,1/h) keep W at T's initial variance.
  """

  def new(key):
    shared_key, base_key, code_key, mix_key = jax.random.split(key, 4)
    params = init(shared_key)
    flat = dict(_flatten(params['blocks']))
    targets = sorted(p for p in flat if p[-1] in leaves)
    if {p[-1] for p in targets} != set(leaves):
      raise ValueError(
        f'reparam.leaves: {sorted(leaves)} are not all leaves of a block, '
        f'found {sorted(p[-1] for p in flat)}'
      )
    depth = flat[targets[0]].shape[0]
    layers = last_layers or depth
    if not 0 < layers <= depth:
      raise ValueError(f'reparam.last_layers: expected 0 to {depth}, found {last_layers}')
    draws = jax.vmap(init, out_axes=1)(jax.random.split(base_key, capacity))
    bases = dict(_flatten(draws['blocks']))
    # vmap's out_axes=1 lays a block leaf out as [layers, basis, ...], the order of its path.
    blocks = {p[:-1] + ('bases', p[-1]): bases[p][depth - layers :] for p in targets}
    keep = {p: w for p, w in flat.items() if p not in targets}
    if layers < depth:
      keep |= {p: flat[p][: depth - layers] for p in targets}
    names = ('',) if shared_mix else tuple(sorted(leaves))
    mixes = {
      ((n,) if n else ()) + ('mix',): jax.random.normal(k, (layers, code, capacity))
      / math.sqrt(capacity)
      for n, k in zip(names, jax.random.split(mix_key, len(names)), strict=True)
    }
    return {
      'shared': {**params, 'blocks': _unflatten(keep)},
      'blocks': _unflatten({**blocks, **mixes}),
      'expert_code': jax.random.normal(code_key, (clusters, code)) / math.sqrt(code),
    }

  def materialize(theta, frozen, condition):
    codes = theta['expert_code'][condition]  # [m] or [g,m]
    grouped = codes.ndim == 2
    codes = jnp.atleast_2d(codes)
    bases = dict(_flatten(theta['blocks']))
    blocks = dict(_flatten(theta['shared']['blocks']))
    for path, basis in bases.items():
      if path[-1] == 'mix':
        continue
      mix = bases[('mix',) if shared_mix else (path[-1], 'mix')]
      # Form each cluster's matrix before the matmul: h products with x would cost h forwards.
      weight = _combine(jnp.einsum('gm,lmr->lgr', codes, mix), basis)
      path = tuple(n for n in path if n != 'bases')
      if path in blocks:
        first = blocks[path][:, None]
        first = jnp.broadcast_to(first, first.shape[:1] + weight.shape[1:2] + first.shape[2:])
        weight = jnp.concatenate([first, weight])
      weight = constrain(weight, 'layers', 'batch', *AXES[path[-1]]) if grouped else weight[:, 0]
      blocks[path] = weight
    return {**theta['shared'], 'blocks': _unflatten(blocks)}

  return Reparam(new, materialize, clusters, varies=tuple(leaves), group_axis=1)


@jax.custom_vjp
def _combine(coefficients: jax.Array, basis: jax.Array) -> jax.Array:
  """Sum basis [l,r,...] with coefficients [l,g,r] -> [l,g,...]."""
  return jax.lax.dot_general(coefficients, basis, (((2,), (1,)), ((0,), (0,))))


def _combine_bwd(residuals, g):
  # The coefficients come first in every product that allows it: XLA on CPU transposes the first
  # operand of a product over its leading axis, and autodiff would put the h times larger one there.
  coefficients, basis = residuals
  free = tuple(range(2, g.ndim))
  return (
    jax.lax.dot_general(basis, g, ((free, free), ((0,), (0,)))).swapaxes(1, 2),
    jax.lax.dot_general(coefficients, g, (((1,), (1,)), ((0,), (0,)))),
  )


_combine.defvjp(lambda c, b: (_combine(c, b), (c, b)), _combine_bwd)


REPARAMS = {'full': full, 'mixture': mixture, 'project': project}


def build(cfg: Mapping[str, Any], init: Init) -> Reparam:
  """Build the reparameterisation that `cfg['name']` selects over a model's init(key)."""
  return factory.build('reparam', REPARAMS, cfg, init)


def group_axes(reparam: Reparam, params: Params) -> Params:
  """Return, for each leaf of params, its group axis, or None if all groups share it."""

  def axis(path, leaf):
    varies = '*' in reparam.varies or path[-1].key in reparam.varies
    return reparam.group_axis if varies else None

  return jax.tree_util.tree_map_with_path(axis, params)


def map_groups(reparam: Reparam, forward: Callable[..., Output]) -> Callable[..., Output]:
  """Let forward(params, batch [rows,t]) take params with group axes: rows come group by group.

  Only the forward pass is mapped, not the loss: with a shared head, a mapped loss would hold the
  logits and the head's gradient once per group.
  """

  def mapped(params, batch):
    axes = group_axes(reparam, params)
    found = jax.tree_util.tree_leaves_with_path(params)
    sizes = {
      leaf.shape[reparam.group_axis]
      for (path, leaf), axis in zip(found, _leaves(axes), strict=True)
      if axis is not None and leaf.ndim > len(leaf_axes(path))
    }
    if not sizes:
      return forward(params, batch)
    (groups,) = sizes
    rows = jax.tree.map(lambda x: x.reshape((groups, -1) + x.shape[1:]), batch)
    out = vmap_groups(forward, (axes, 0))(params, rows)
    return jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), out)

  return mapped


def _leaves(axes: Params) -> list[int | None]:
  return jax.tree.leaves(axes, is_leaf=lambda x: x is None)


def cast(params: Params, dtype: Any) -> Params:
  """Convert every floating leaf to the compute dtype."""
  return jax.tree.map(
    lambda w: w.astype(dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w, params
  )


def materialize_flops(reparam: Reparam, theta: Params, groups: int) -> float:
  """Count the FLOPs of forming the weights of `groups` clusters once (a projection's sums)."""
  if not reparam.clusters or reparam.independent:
    return 0.0
  leaves = jax.tree_util.tree_leaves_with_path(theta)
  bases = sum(w.size for path, w in leaves if 'bases' in (k.key for k in path))
  return 2.0 * groups * bases


def _flatten(tree: Params, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flatten(value, prefix + (key,))
    else:
      yield prefix + (key,), value


def _unflatten(flat: Mapping[tuple[str, ...], Any]) -> Params:
  tree: Params = {}
  for path, value in flat.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return tree
