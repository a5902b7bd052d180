"""Scores of tasks: averages with standard errors, and paired differences between runs."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from slm.base import files
from slm.reporting.comparison import Model
from slm.reporting.tables import Table
from slm.runs import rundir

# What two runs on one task have in common.
_SAME = (
  'sha256', 'shots', 'seed', 'shots_from', 'kind', 'chat', 'turns', 'template', 'phrase', 'until',
  'max_tokens', 'group', 'main', 'samples', 'temperature', 'ended',
)  # fmt: skip


NOTE = (
  'Differences to the first model on the same items (positive: higher score) with 95 % intervals.'
)


@dataclasses.dataclass(frozen=True)
class Line:
  """A model's score on one task, and its difference to the first model's with a 95 % interval."""

  task: str
  metric: str
  model: Model
  items: int
  of: int  # items that the task has
  value: float
  error: float | None
  difference: tuple[float, float, float] | None  # value, low, high

  @property
  def verdict(self) -> str:
    """Return higher or lower if the interval excludes zero, else within noise."""
    if self.difference is None:
      return 'reference'
    _, low, high = self.difference
    return 'higher' if low > 0 else 'lower' if high < 0 else 'within noise'


def columns(
  records: Sequence[Mapping[str, Any]], name: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
  """Return values [n] of a score, the weights [n] of items, and their groups, empty if none."""
  values = np.array([r['scores'][name] for r in records], float)
  parts = name.endswith('_parts')
  weights = np.array([r['parts'] if parts else 1 for r in records], float)
  return values, weights, [r['group'] for r in records if 'group' in r]


def estimate(
  values: np.ndarray, weights: np.ndarray, groups: Sequence[str] = ()
) -> tuple[float, float | None]:
  """Average values [n] with weights [n]; returns it and its standard error, None if of one item.

  Items are the clusters of their parts: with weights the error is that of a ratio of sums, and
  without sqrt(variance / n), for 0 and 1 sqrt(p (1 - p) / (n - 1)). With groups the result is the
  mean of the groups' means, and groups are the clusters: their spread / sqrt(their number).
  """
  if len(groups):
    names, group = np.unique(groups, return_inverse=True)
    values = np.bincount(group, weights * values) / np.bincount(group, weights)
    weights = np.ones(len(names))
  mean, n = float(weights @ values / weights.sum()), len(values)
  if n < 2:
    return mean, None
  squares = float(np.sum((weights * (values - mean)) ** 2))
  return mean, math.sqrt(n / (n - 1) * squares) / float(weights.sum())


def read(ref: str, task: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
  """Read the summary of a run on a task, and the records of its items by id.

  Raises:
    ValueError: if the run was not evaluated on it, or its records are damaged.
  """
  folder = rundir.evaluations(ref, 'tasks')
  record = folder.with_suffix('.json')
  summaries = files.read_json(record) if record.exists() else {}
  if task not in summaries:
    known = ', '.join(summaries) or 'none'
    raise ValueError(f'{ref}: was not evaluated on the task {task}; evaluated: {known}')
  path = folder / f'{task}.jsonl'
  with files.reading(path, 'valid JSON lines'):
    _, *records = [json.loads(x) for x in path.read_text().split('\n') if x]
  return summaries[task], {r['id']: r for r in records}


def compare(models: Sequence[Model], task: str, metric: str = '') -> list[Line]:
  """Compare models by the items of a task that all their runs have answered.

  `metric` is the score that is compared; '' is the main one of the task.

  The interval is Student's, of differences of the same items (or of groups, where scores are
  averaged over them); with several runs of a model, their spread is added in squares.

  Raises:
    ValueError: if a run was not evaluated on it, or the task was another.
  """
  kept = {ref: read(ref, task) for model in models for ref in model.refs}
  first = models[0].refs[0]
  facts = kept[first][0]
  for ref, (other, _) in kept.items():
    for key in _SAME:
      if other.get(key) != facts.get(key):
        raise ValueError(
          f'{first} and {ref}: {task} was asked in two ways: {key} is {facts.get(key)!r} and '
          f'{other.get(key)!r}; evaluate both again'
        )
  facts = facts | {'main': metric or facts['main']}
  name = facts['main']
  ids = [i for i in kept[first][1] if all(i in records for _, records in kept.values())]
  if not ids:
    raise ValueError(f'{task}: the runs have no item in common: evaluate them with one --limit')
  taken = {ref: columns([records[i] for i in ids], name) for ref, (_, records) in kept.items()}
  return [_line(models[0], model, task, facts, taken) for model in models]


def _line(base: Model, model: Model, task: str, facts: Mapping[str, Any], taken: Any) -> Line:
  estimates = [estimate(*taken[ref]) for ref in model.refs]
  averaged = lambda m: np.mean([taken[ref][0] for ref in m.refs], axis=0)
  _, weights, groups = taken[model.refs[0]]
  value, error = estimate(averaged(model), weights, groups)
  difference = None
  if model is not base:
    gap, gap_error = estimate(averaged(model) - averaged(base), weights, groups)
    n, runs = len(set(groups)) or len(weights), len(model.refs)
    half = math.inf if gap_error is None else scipy.stats.t.ppf(0.975, n - 1) * gap_error
    if runs > 1:
      others = [estimate(*taken[ref])[0] for ref in base.refs]
      gaps = [a - b for (a, _), b in zip(estimates, others, strict=True)]
      half = math.hypot(half, scipy.stats.t.ppf(0.975, runs - 1) * np.std(gaps, ddof=1) / runs**0.5)
    difference = (gap, gap - half, gap + half)
  count, whole = len(weights), facts.get('of', len(weights))
  return Line(task, facts['main'], model, count, whole, value, error, difference)


def table(lines: Sequence[Line]) -> Table:
  """Build a row per model."""
  head = ['model', 'task', 'items', 'score', 'to the first', 'verdict', 'runs']
  rows = []
  for line in lines:
    error = '' if line.error is None else f' ± {line.error:.4f}'
    gap = '–'
    if line.difference:
      value, low, high = line.difference
      gap = f'{value:+.4f} [{low:+.4f}, {high:+.4f}]'.replace('-', '−')
    items = f'{line.items:,} of {line.of:,}' if line.items < line.of else f'{line.items:,}'
    score = f'{line.metric} {line.value:.4f}{error}'
    row = [line.model.label, line.task, items, score, gap, line.verdict]
    rows.append([*row, str(len(line.model.refs))])
  return head, rows
