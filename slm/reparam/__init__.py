"""Reparameterisations: `params = materialize(theta, frozen, condition)`.

The optimiser sees theta, the model sees params. The condition selects a specialist: a cluster id
(int) or a histogram over clusters (float [k]) gives ordinary dense params; a vector of ids or a
matrix of histograms, one per group of rows, gives params whose varying leaves have a group axis.
Leaves that do not depend on the condition are shared, not copied.
"""

import functools
import operator
from collections.abc import Callable

import jax

from slm.models.decoder import Output
from slm.reparam import dense, projection
from slm.reparam.base import Init, Reparam
from slm.weights.axes import Params, leaf_axes
from slm.weights.sharding import vmap_groups
from slm.weights.tree import flatten

REPARAMS = {
  dense.FullConfig: dense.full,
  dense.MixtureConfig: dense.mixture,
  dense.DemixConfig: dense.demix,
  dense.LoraConfig: dense.lora,
  dense.MaskConfig: dense.mask,
  projection.ProjectConfig: projection.project,
  projection.CodeConfig: projection.code,
  projection.SoupConfig: projection.soup,
  projection.HyperConfig: projection.hyper,
}
# The union of all configs; their `name` tells them apart.
Config = functools.reduce(operator.or_, REPARAMS)


def build(cfg: Config, init: Init) -> Reparam:
  """Build the reparameterisation that a config describes over a model's init(key)."""
  return REPARAMS[type(cfg)](init, cfg)


def group_axes(reparam: Reparam, params: Params) -> Params:
  """Return the group axis of each leaf of params, None for a leaf that all groups share."""

  def axis(path, leaf):
    varies = '*' in reparam.varies or path[-1].key in reparam.varies
    return reparam.group_axis if varies else None

  return jax.tree_util.tree_map_with_path(axis, params)


def map_groups(reparam: Reparam, forward: Callable[..., Output]) -> Callable[..., Output]:
  """Let forward(params, batch [rows,t]) take params with group axes; rows are ordered by group.

  Only the forward pass is mapped, not the loss: with a shared head, a mapped loss would hold the
  logits and the head's gradient once per group.
  """

  def mapped(params, batch):
    sizes = {
      leaf.shape[reparam.group_axis]
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
      if leaf.ndim > len(leaf_axes(path))
    }
    if not sizes:
      return forward(params, batch)
    (groups,) = sizes
    rows = jax.tree.map(lambda x: x.reshape((groups, -1) + x.shape[1:]), batch)
    out = vmap_groups(forward, (group_axes(reparam, params), 0))(params, rows)
    return jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), out)

  return mapped


def materialize_flops(reparam: Reparam, theta: Params, groups: int) -> float:
  """Count the FLOPs of forming the weights of `groups` clusters: sums of bases and products."""
  groups, total = groups if reparam.clusters else 1, 0.0
  flat = dict(flatten(theta))
  for path, w in flat.items():
    in_sum = 'bases' in path
    total += 2.0 * groups * w.size * in_sum
    if path[-1] == 'lora_a':
      a, b = (x.size / (x.shape[1] if in_sum else 1) for x in (w, flat[*path[:-1], 'lora_b']))
      total += 2.0 * groups * a * b / (w.shape[0] * w.shape[-1])  # per layer in x rank x out
  return total
