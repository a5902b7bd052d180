"""What the study's run directories say: answers, pairs, losses, costs, and their differences."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import scipy.stats

from experiments.tulu import measure, tasks
from experiments.tulu.runs import RUNS, Run, Scale
from slm.base import files
from slm.inference import verifiers
from slm.reporting.stats import Cost, Difference
from slm.runs import ledger, rundir

Values = Mapping[int, np.ndarray]  # by seed, a value for every item: [items]
HOW: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  'greedy': lambda passed: passed[:, 0],
  'sampled': lambda passed: passed[:, 1:].mean(1),
  'pass@8': lambda passed: measure.pass_at(min(8, passed.shape[1] - 1), passed[:, 1:]),
}


def paired(a: Values | None, b: Values | None) -> Difference | None:
  """Return the mean of a - b over items and the seeds that both have; None if there is none.

  The 95 % interval covers the choice of items and, with several seeds, how trainings vary. Seeds
  share items, so their errors do not average out: that over items is the mean of the seeds'.
  """
  seeds = sorted((a or {}).keys() & (b or {}).keys())
  if not seeds:
    return None
  gaps = [np.asarray(a[s], float) - np.asarray(b[s], float) for s in seeds]
  means = tuple(float(gap.mean()) for gap in gaps)
  error = lambda gap: gap.std(ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else math.inf
  items = 1.96 * float(np.mean([error(gap) for gap in gaps]))
  n, runs = len(seeds), 0.0
  if n > 1:  # Student's 95 % interval of a mean over trainings
    runs = float(scipy.stats.t.ppf(0.975, n - 1) * np.std(means, ddof=1) / n**0.5)
  value, half = float(np.mean(means)), math.hypot(items, runs)
  return Difference(value, value - half, value + half, means)


@dataclasses.dataclass(frozen=True)
class Found:
  """What was run below a directory; a run that is not there gives None."""

  scale: Scale
  root: Path

  @property
  def leaks(self) -> dict[str, int]:
    """Return how many rows were planted, dropped, and both."""
    return files.read_json(self.root / 'leaks.json')

  def scores(self, run: Run) -> dict[str, float]:
    """Return by settings of a grid the share of passing answers, or minus the loss.

    Those of validation data with the first seed; nothing if some are not trained.
    """
    folder, found = self.root / 'runs' / f'{run.name}-{self.scale.seeds[0]}', {}
    for cell in map(measure.label, run.cells(self.scale.grids)):
      kept = folder / cell / 'measured' / f'{run.asked[0]}-validation.npz' if run.asked else None
      decides = kept or folder / cell / 'result.json'
      if not decides.exists():
        return {}
      if kept:
        found[cell] = float(measure.read(kept)['official'][:, 1:].mean())
      else:
        found[cell] = -files.read_json(decides)['loss']
    return found

  def path(self, name: str, seed: int) -> Path:
    """Return the directory of a run; of one with a grid that of the settings chosen."""
    run, path = RUNS[name], self.root / 'runs' / f'{name}-{seed}'
    if not run.grid:
      return path
    scores = self.scores(run)
    return path / max(scores, key=scores.get, default='none')

  def seeds(self, name: str) -> list[int]:
    """List the seeds of a run that are finished."""
    return [s for s in self.scale.seeds if (self.path(name, s) / 'result.json').exists()]

  def _measured(self, name: str, what: Callable[[int], str]) -> dict[int, dict[str, np.ndarray]]:
    paths = {s: self.path(name, s) / 'measured' / f'{what(s)}.npz' for s in self.seeds(name)}
    return {s: measure.read(path) for s, path in paths.items() if path.exists()}

  def passed(
    self, name: str, task: str, how: str, family: str = 'official', only: str = ''
  ) -> Values | None:
    """Return for every test prompt how its answers pass, by HOW.

    only: of the facts, those that `leak` or those that are `clean`.
    """
    split = 'train' if task == 'facts' else 'test'
    found = self._measured(name, lambda s: f'{task}-{split}')
    half = self.scale.heldout_facts // 2
    part = {'leak': slice(0, half), 'clean': slice(half, None)}.get(only, slice(None))
    return {s: HOW[how](kept[family])[part] for s, kept in found.items()} or None

  def at(self, name: str, task: str, k: int) -> Values | None:
    """Return pass@k of every test prompt."""
    found = self._measured(name, lambda s: f'{task}-test')
    return {s: measure.pass_at(k, kept['official'][:, 1:]) for s, kept in found.items()} or None

  def kl(self, name: str, task: str) -> Values | None:
    """Return the KL divergence from the start of every test prompt's answers, in nats."""
    found = self._measured(name, lambda s: f'{task}-test')
    return {s: kept['kl'].mean(1) for s, kept in found.items()} or None

  def preferred(self, name: str, pairs: str, kind: str) -> Values | None:
    """Return whether a run's scores, means or sums, prefer the chosen answers of held-out pairs."""
    found = self._measured(name, lambda s: f'{pairs}-{kind}')
    chosen = lambda scores: (scores[:, 0] > scores[:, 1]).astype(float)
    return {s: chosen(kept['scores']) for s, kept in found.items()} or None

  def loss(self, name: str, *tasks: str) -> Values | None:
    """Return the losses of held-out rows, of all tasks, whose mean is in nats per token."""
    found = {}
    for seed in self.seeds(name):
      folder = rundir.evaluations(self.path(name, seed))
      parts = [folder / f'sft-test_{task}.npy' for task in tasks]
      if all(part.exists() for part in parts):
        rows = np.concatenate([files.read_npy(part) for part in parts])
        found[seed] = rows[:, 0] / rows[:, 1].mean()
    return found or None

  def curves(self, name: str) -> list[list[dict[str, float]]]:
    """Return the metrics of every seed's steps."""
    return [rundir.read_metrics(self.path(name, seed)) for seed in self.seeds(name)]

  def costs(self, name: str) -> dict[str, Cost]:
    """Return what a seed's training took on average, and its drawing of answers apart."""
    found: dict[str, Cost] = {}
    seeds = self.seeds(name)
    for seed in seeds:
      for p in ledger.read_ledger(self.path(name, seed))['phases']:
        if p['phase'] != 'evaluate':
          kind = 'rollout' if p['phase'] == 'rollout' else 'training'
          spent = Cost(p['tokens'], p['flops'], p['device_seconds'])
          found[kind] = found.get(kind, Cost()) + spent
    return {kind: cost * (1 / len(seeds)) for kind, cost in found.items()}

  def verdicts(self, name: str) -> dict[str, np.ndarray]:
    """Count verdicts on all answers to rules of all seeds, by kind of rule, int [4].

    That both families of verifiers pass an answer, the official alone, the released alone, none.
    """
    counts: dict[str, np.ndarray] = {}
    said = {rule.said: rule for rule in tasks.all_rules()}
    asked = [row for _, row in measure.lines(self.root / 'text' / 'rules-test.jsonl')]
    rules = [[said[x] for x in row['prompt'].rstrip(':').split()] for row in asked]
    for seed in self.seeds(name):
      path = self.path(name, seed) / 'measured' / 'rules-test.json'
      for of_prompt, texts in zip(rules, files.read_json(path), strict=True):
        for rule in of_prompt:
          checks = [verifiers.read([x]) for x in (rule.official, rule.released)]
          for text in texts:
            passed = [verifiers.score(text, check).reward >= 1 for check in checks]
            place = {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}
            counts.setdefault(rule.kind, np.zeros(4, int))[place[tuple(passed)]] += 1
    return counts
