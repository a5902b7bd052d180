"""Parameters and FLOPs of a model, counted from the axis table before any weight exists."""

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from slm.weights.axes import AXES, STACKS


class Leaf(NamedTuple):
  """A weight of a model: its name in AXES, what it is part of, and the stacks it lies in.

  `sizes` are those of its axes that differ from the model's.
  """

  name: str
  part: str  # embedding | attention | mlp | norm
  stacks: tuple[str, ...] = ()
  sizes: Mapping[str, int] = {}


class Counted(Protocol):
  """The config of a model that can be counted."""

  sizes: Mapping[str, int]  # of every axis
  leaves: tuple[Leaf, ...]

  def score_flops(self, context: int) -> float:
    """Count the FLOPs of attention scores and their products with values, per token."""


def num_params(cfg: Counted) -> dict[str, int]:
  """Count parameters by the part of the model they are in."""
  return _count(cfg, cfg.sizes)


def active_params(cfg: Counted) -> dict[str, int]:
  """Count the parameters that one token passes through: its experts alone."""
  chosen = cfg.sizes.get('experts_per_token', 0)
  return _count(cfg, {**cfg.sizes, 'chosen': chosen} if chosen else cfg.sizes)


def _count(cfg: Counted, sizes: Mapping[str, int]) -> dict[str, int]:
  parts = dict.fromkeys(leaf.part for leaf in cfg.leaves)
  counts = dict.fromkeys(parts, 0)
  for leaf in cfg.leaves:
    own = {**sizes, **leaf.sizes}
    lead = [own['chosen' if s == 'experts' and 'chosen' in own else STACKS[s]] for s in leaf.stacks]
    counts[leaf.part] += math.prod(lead) * math.prod(own[axis] for axis in AXES[leaf.name])
  return counts


def forward_flops(cfg: Counted, context: int) -> float:
  """Count the multiply-adds (as 2 FLOPs) of one token's forward pass, head included.

  Of experts those chosen count, also where all are computed.
  """
  count = active_params(cfg)
  head = 2 * cfg.sizes['vocab'] * cfg.sizes['embed']
  return 2.0 * (count['attention'] + count['mlp']) + head + cfg.score_flops(context)
