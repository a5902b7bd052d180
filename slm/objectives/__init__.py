"""Objectives: pure functions from (forward passes, weights, batch) to sums and their weights.

An objective returns {name: (sum, weight)}; 'loss' is what is differentiated. Sums are added over
microbatches, groups and hosts before they are divided: never a mean of means.
"""

from collections.abc import Callable, Mapping
from typing import Any

from slm.base import factory
from slm.objectives import distill, next_token
from slm.objectives.losses import Sums

OBJECTIVES = {'next_token': next_token.next_token, 'distill': distill.distill}


def build(cfg: Mapping[str, Any], forward: Mapping[str, Callable]) -> Callable[..., Sums]:
  """Build objective(params, frozen, batch) -> {name: (sum, weight)} from its config."""
  return factory.build('objective', OBJECTIVES, cfg, forward)
