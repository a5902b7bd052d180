"""What an objective needs of a run beyond theta, and brings with it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from slm.objectives.losses import Batch, Sums
from slm.weights.axes import Params

Objective = Callable[[Params, Params, Batch], Sums]  # (params, frozen, batch) -> sums
# (condition -> dense params of its specialist) -> values by name, 'loss' and 'tokens' among them
Evaluator = Callable[[Callable[[int], Params]], dict[str, float]]
ROWS = 'rows'


@dataclasses.dataclass(frozen=True)
class Setup:
  """An objective as the train loop sees it.

  Attributes:
    objectives: what is minimised, by kind of batch: ROWS are those that the data hold, others are
      made by `rewrite`.
    evaluators: what is measured while training, by name; 'heldout' decides which step is best.
    frozen: weights that the forward passes need and nobody trains.
    beside: what is trained beside theta, as it starts; it is among `frozen` to the objective.
    rates: the share of the learning rate that parts of `beside` have; 1 where none is named.
    flops: what a token of a step takes beyond the model's own forward and backward pass.
    ancestors: the runs and directories that it is made of.
    look_up: rows by column -> further leaves of a batch.
    rewrite: (theta, frozen, batch, step) -> the kind of batch and the batch that is trained on.
  """

  objectives: Mapping[str, Objective]
  evaluators: Mapping[str, Evaluator]
  frozen: Params = dataclasses.field(default_factory=dict)
  beside: Params = dataclasses.field(default_factory=dict)
  rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
  flops: float = 0.0
  ancestors: tuple[str, ...] = ()
  look_up: Callable[[dict[str, np.ndarray]], dict[str, Any]] | None = None
  rewrite: Callable[[Params, Params, Batch, int], tuple[str, Batch]] | None = None
