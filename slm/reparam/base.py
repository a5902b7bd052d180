"""What a reparameterisation is, and the operations on block leaves that several share."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slm.weights.axes import AXES, INPUTS, Params
from slm.weights.tree import Path, flatten

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
    histograms: whether it is trained on histograms over clusters (data.order='histogram').
    base: what frozen['base'] must hold of the run that `init` names: 'params', its dense weights,
      or 'theta', all that it trained; '' is nothing.
    start: dense params -> theta, where training can start from another run's weights.
  """

  init: Init
  materialize: Callable[[Params, Params, jax.Array | int | None], Params]
  clusters: int = 0
  varies: tuple[str, ...] = ()
  group_axis: int = 0
  independent: bool = False
  histograms: bool = False
  base: str = ''
  start: Callable[[Params], Params] | None = None


def pick(stack: jax.Array, condition: jax.Array | int) -> jax.Array:
  """Take entries of a stack [k,...] by cluster id, or average them by histograms [k] or [g,k]."""
  if jnp.issubdtype(jnp.result_type(condition), jnp.integer):
    return stack[condition]
  return jnp.tensordot(condition.astype(stack.dtype), stack, axes=1)


def targets(blocks: Params, leaves: tuple[str, ...]) -> dict[Path, Any]:
  """Return the leaves of the blocks that have one of the names, by path.

  Raises:
    ValueError: if a name is of no leaf that is a matrix, or of token-routed experts.
  """
  flat = {p: w for p, w in flatten(blocks) if p[-1] in INPUTS}
  found = {p: w for p, w in flat.items() if p[-1] in leaves}
  if any('experts' in p for p in found):
    raise ValueError(
      f'reparam.leaves: {sorted(leaves)} are of token-routed experts, which are not '
      'reparameterised; name others'
    )
  if not leaves or {p[-1] for p in found} != set(leaves):
    raise ValueError(
      f'reparam.leaves: {sorted(leaves)} are not all matrices of a block, '
      f'found {sorted({p[-1] for p in flat})}'
    )
  return found


def factors(
  key: jax.Array, path: Path, shape: tuple[int, ...], rank: int, lead: tuple[int, ...]
) -> dict[Path, jax.Array]:
  """Draw the low-rank factors [*lead,in,rank] and [*lead,rank,out] of a block leaf [l,in,out]."""
  size = dict(zip(AXES[path[-1]], shape[1:], strict=True))
  inputs = tuple(size[a] for a in AXES[path[-1]] if a in INPUTS[path[-1]])
  outputs = tuple(size[a] for a in AXES[path[-1]] if a not in INPUTS[path[-1]])
  a = jax.random.normal(key, (*lead, *inputs, rank)) / math.sqrt(math.prod(inputs))
  return {(*path, 'lora_a'): a, (*path, 'lora_b'): jnp.zeros((*lead, rank, *outputs))}
