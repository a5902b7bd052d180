"""Parameters and FLOPs of a model, counted from the axis table before any weight exists."""

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from slm.weights.axes import AXES, STACKS


class Leaf(NamedTuple):
  """A weight of a model."""

  name: str  # in AXES
  part: str  # embedding | attention | mlp | norm
  stacks: tuple[str, ...] = ()  # keys of STACKS
  sizes: Mapping[str, int] = {}  # of axes whose size differs from the model's


class Counted(Protocol):
  """The config of a model whose parameters can be counted."""

  sizes: Mapping[str, int]  # of every axis
  leaves: tuple[Leaf, ...]

  def score_flops(self, context: int) -> float:
    """Count the FLOPs of scores and their products with values, per token of a context."""


def num_params(cfg: Counted) -> dict[str, int]:
  """Count parameters by part of the model."""
  return _count(cfg, cfg.sizes.get('experts', 0))


def active_params(cfg: Counted) -> dict[str, int]:
  """Count the parameters used by one token, by part: of the experts only those chosen."""
  return _count(cfg, cfg.sizes.get('experts_per_token', 0))


def _count(cfg: Counted, experts: int) -> dict[str, int]:
  counts = dict.fromkeys((leaf.part for leaf in cfg.leaves), 0)
  for leaf in cfg.leaves:
    sizes = {**cfg.sizes, **leaf.sizes}
    stacks = [experts if name == 'experts' else sizes[STACKS[name]] for name in leaf.stacks]
    counts[leaf.part] += math.prod(stacks) * math.prod(sizes[axis] for axis in AXES[leaf.name])
  return counts


def forward_flops(cfg: Counted, context: int) -> float:
  """Count the FLOPs of one token's forward pass, 2 per multiply-add, head included.

  Of the experts only those chosen count, even if all are computed.
  """
  return hidden_flops(cfg, context) + 2.0 * cfg.sizes['vocab'] * cfg.sizes['embed']


def hidden_flops(cfg: Counted, context: int) -> float:
  """Count the FLOPs of one token's forward pass up to its last hidden state."""
  counts = active_params(cfg)
  return 2.0 * (counts['attention'] + counts['mlp']) + cfg.score_flops(context)
