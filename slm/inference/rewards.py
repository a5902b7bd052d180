"""Rewards of answers, for training: the verifiers behind the one function that the loop takes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slm.inference import verifiers
from slm.objectives.setup import Grade


def reward(labels: Sequence[Sequence[Mapping[str, Any]]]) -> Grade:
  """Read the labels of prompts, by row; return grade(rows, texts) -> a reward for each text.

  A reward is the sum of weight * value over the checks of a label, NaN if one was undecided.

  Raises:
    ValueError: if a label is none that a verifier takes, naming its row, or needs a library that
      is not installed.
  """
  checks = [_read(row, label) for row, label in enumerate(labels)]
  verifiers.ready(checks)

  def grade(rows: Sequence[int], texts: Sequence[str]) -> list[float]:
    scores = verifiers.scores(texts, [checks[row] for row in rows])
    undecided = lambda score: any(verdict.undecided for verdict in score.verdicts)
    return [math.nan if undecided(score) else score.reward for score in scores]

  return grade


def _read(row: int, label: Sequence[Mapping[str, Any]]) -> tuple[verifiers.Check, ...]:
  try:
    return verifiers.read(label)
  except ValueError as e:
    raise ValueError(f'the label of prompt {row}: {e}') from None
