"""The interface of reparameterisations, and operations on block leaves that several share."""

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
    clusters: the number of specialists in theta; 0: one model, which ignores the condition.
    varies: names of the leaves that depend on the condition; '*': all.
    group_axis: the position of the group axis in varying leaves, for a vector of conditions.
    independent: whether groups share no weights, so that each is normalised and clipped alone.
    histograms: whether conditions in training are histograms (data.order='histogram').
    base: the content of frozen['base'], from the run that `init` names: 'params' (its dense
      weights), 'theta' (all its trained weights) or '' (none).
    start: dense params -> theta, if training can start from the weights of another run.
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
  """Select entries of a stack [k,...] by cluster id, or average them by histogram [k] or [g,k]."""
  if jnp.issubdtype(jnp.result_type(condition), jnp.integer):
    return stack[condition]
  return jnp.tensordot(condition.astype(stack.dtype), stack, axes=1)


def targets(blocks: Params, leaves: tuple[str, ...]) -> dict[Path, Any]:
  """Return the matrices of the blocks with the given names, by path.

  Raises:
    ValueError: if a name is not that of a matrix, or is that of token-routed experts.
  """
  matrices = {path: w for path, w in flatten(blocks) if path[-1] in INPUTS}
  selected = {path: w for path, w in matrices.items() if path[-1] in leaves}
  if any('experts' in path for path in selected):
    raise ValueError(
      f'reparam.leaves: {sorted(leaves)} are of token-routed experts, which are not reparameterised'
    )
  names = sorted({path[-1] for path in matrices})
  if not leaves or not set(leaves) <= set(names):
    raise ValueError(f'reparam.leaves: expected some of {names}, found {sorted(leaves)}')
  return selected


def factors(
  key: jax.Array, path: Path, shape: tuple[int, ...], rank: int, lead: tuple[int, ...]
) -> dict[Path, jax.Array]:
  """Draw the low-rank factors [*lead,in,rank] and [*lead,rank,out] of a block leaf [l,in,out]."""
  sizes = list(zip(AXES[path[-1]], shape[1:], strict=True))
  inputs = tuple(size for axis, size in sizes if axis in INPUTS[path[-1]])
  outputs = tuple(size for axis, size in sizes if axis not in INPUTS[path[-1]])
  a = jax.random.normal(key, (*lead, *inputs, rank)) / math.sqrt(math.prod(inputs))
  return {(*path, 'lora_a'): a, (*path, 'lora_b'): jnp.zeros((*lead, rank, *outputs))}
