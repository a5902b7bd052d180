"""What an objective brings beside its loss: frozen weights, evaluators, rewritten batches."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from slm.objectives.losses import Batch, Sums
from slm.weights.axes import Params

Objective = Callable[[Params, Params, Batch], Sums]  # (params, frozen, batch) -> sums
# (condition -> dense params of its specialist, what is trained beside theta) -> values by name,
# including 'loss' and 'tokens'
Evaluator = Callable[[Callable[[int], Params], Params], dict[str, float]]
# Labels of prompts, by row -> ((rows, texts) -> a reward each, NaN where none could be decided).
Grade = Callable[[Sequence[int], Sequence[str]], Sequence[float]]
Reward = Callable[[Sequence[Sequence[Mapping[str, Any]]]], Grade]
ROWS = 'rows'


@dataclasses.dataclass(frozen=True)
class Setup:
  """An objective as the train loop sees it.

  Attributes:
    objectives: by kind of batch: ROWS for batches of the data, others for those of `rewrite`.
    evaluators: by name; 'heldout' decides which step is best.
    frozen: weights that the forward passes need and that are not trained.
    beside: initial weights that are trained beside theta; the objective gets them in `frozen`.
    rates: factors of the learning rate for parts of `beside`; 1 where none is named.
    flops: FLOPs per token of a step beyond the model's own forward and backward pass.
    ancestors: the runs and directories that it is made from.
    look_up: rows by column -> further leaves of a batch.
    rewrite: (theta, frozen, batch, step) -> the kind of batch, the batch to train on, and metrics;
      `frozen` includes what is trained beside theta.
    draw: (theta, frozen, batch, step, the weights' own step) -> what `rewrite` takes as the batch;
      it does not wait for the device.
    ahead: the shapes and layout of what `draw` gives, where that is drawn a step ahead.
    leaves: the shapes and layout of a batch, where it is always another than the data's.
  """

  objectives: Mapping[str, Objective]
  evaluators: Mapping[str, Evaluator]
  frozen: Params = dataclasses.field(default_factory=dict)
  beside: Params = dataclasses.field(default_factory=dict)
  rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
  flops: float = 0.0
  ancestors: tuple[str, ...] = ()
  look_up: Callable[[dict[str, np.ndarray]], dict[str, Any]] | None = None
  rewrite: Callable[[Params, Params, Batch, int], tuple[str, Batch, dict[str, Any]]] | None = None
  draw: Callable[[Params, Params, Batch, int, int], Any] | None = None
  ahead: Any = None
  leaves: dict[str, jax.ShapeDtypeStruct] | None = None
