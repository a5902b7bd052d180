"""A study's runs side by side: held-out losses, paired bootstrap intervals, and what each cost."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from experiments.specialise.study import TEST, Study
from slm.base import files
from slm.objectives import heldout
from slm.reporting import stats
from slm.reporting.stats import Cost, Difference, Loss, difference, training_cost
from slm.runs import load, rundir


@dataclasses.dataclass(frozen=True)
class Cell:
  """One method at one size of the specialisation set; a test set without a run is absent."""

  method: str
  size: int
  losses: dict[str, Loss]  # by test set: law/test
  tests: tuple[str, ...]  # one per domain: those that are averaged
  generic: Cost | None  # paid once; None: a listed run is missing
  specialise: Cost | None  # paid for every domain

  @functools.cached_property
  def complete(self) -> bool:
    """Say whether some seed was run on every domain, so that averages mean the same."""
    return self.over(self.tests) is not None

  @functools.cached_property
  def average(self) -> Loss:
    """Average a complete cell over its domains: exp(value) is ppl_avg."""
    return self.over(self.tests)

  def over(self, tests: Iterable[str]) -> Loss | None:
    """Average seeds run on all of some test sets, which weigh the same; None if none was."""
    losses = [self.losses.get(t) for t in tests]
    if not losses or None in losses:
      return None
    seeds = sorted(set.intersection(*(set(x.seeds) for x in losses)))
    if not seeds:
      return None
    return Loss(
      {s: float(np.mean([x.seeds[s] for x in losses])) for s in seeds},
      {s: float(np.mean([x.bits[s] for x in losses])) for s in seeds},
      {s: np.mean([x.replicates[s] for x in losses], axis=0) for s in seeds},
    )

  def total(self, num_domains: int) -> Cost | None:
    """Return C_total(N) = C_generic + N C_specialise, arXiv 2402.01093 eq. 1."""
    if self.generic is None or self.specialise is None:
      return None
    return self.generic + self.specialise * num_domains


def between(a: Cell, b: Cell) -> Difference | None:
  """Compare two cells on the test sets that both are averaged over, a minus b."""
  tests = [t for t in a.tests if t in b.tests]
  pair = a.over(tests), b.over(tests)
  return None if None in pair else difference(*pair)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Every method at every size, on the domains that all are planned for and some was run on."""

  study: Study
  tests: tuple[str, ...]  # the averaged test sets, one per domain
  others: tuple[str, ...]  # further sets of the domains, such as law/test_ood
  cells: dict[tuple[str, int], Cell]
  generic: dict[str, Loss]  # by method, on the generic test set, before specialisation
  documents: dict[str, int]  # by set: how many are resampled; 0: its rows are
  generic_costs: dict[str, Cost]  # of the runs that `generic` holds

  def ranked(self, size: int, kind: str) -> list[Cell]:
    """List the complete cells of a size and kind, lowest loss first."""
    cells = [self.cells[m, size] for m in self.study.methods if self.study.kind(m) == kind]
    return sorted((c for c in cells if c.complete), key=lambda c: c.average.value)

  def to_baseline(self, cell: Cell, test: str | None = None) -> Difference | None:
    """Compare a cell with the study's baseline at its size, on average or on one test set."""
    base = self.cells.get((self.study.baseline, cell.size))
    if base is None or cell.method == self.study.baseline:
      return None
    if test is None:
      return between(cell, base)
    both = test in cell.losses and test in base.losses
    return difference(cell.losses[test], base.losses[test]) if both else None


def compare(study: Study) -> Comparison:
  """Read the runs' losses and ledgers.

  A run without a size (no fine-tuning) stands at every size. Runs that are not there are absent.

  Raises:
    ValueError: if a finished run was not evaluated, or two runs were evaluated on different rows.
  """
  found = {name: _losses(study, d, name) for d in study.domains for name in _sets(study, d)}
  found = {name: losses for name, losses in found.items() if losses}
  tests = tuple(f'{d}/{TEST}' for d in study.shared_domains if f'{d}/{TEST}' in found)
  clustering, cells = _clustering(study), {}
  for method in study.methods:
    for size in study.sizes:
      keys = {name: ((method, size), (method, None)) for name in found}
      losses = {n: found[n][k] for n, both in keys.items() for k in both[::-1] if k in found[n]}
      held = {name.partition('/')[0]: x.seeds for name, x in losses.items() if name in tests}
      mine = (r for r in study.runs if r['method'] == method and r['size'] in (size, None))
      runs = [r for r in mine if r['seed'] in held.get(r['domain'], ())]
      generic, specialise = _costs(study, runs)
      if generic is not None and study.clustered(method):
        generic = generic + clustering
      cells[method, size] = Cell(method, size, losses, tests, generic, specialise)
  others = tuple(name for name in found if name not in tests)
  generic = {key[0]: v for key, v in _losses(study, None, f'{study.generic}/{TEST}').items()}
  documents = {n: len(np.unique(stats.documents(study.data_path, n))) for n in found}
  rows = {m: [r for r in study.runs if (r['method'], r['domain']) == (m, None)] for m in generic}
  costs = {m: cost for m, runs in rows.items() if (cost := _costs(study, runs)[0]) is not None}
  return Comparison(study, tests, others, cells, generic, documents, costs)


def _sets(study: Study, domain: str) -> list[str]:
  """List the test set of a domain and whatever else of the domain its runs were evaluated on."""
  runs = (study.path / r['run'] for r in study.runs if r['domain'] == domain)
  found = {rundir.evaluations(run).with_suffix('.json') for run in runs}
  names = {name for f in found if f.exists() for name in files.read_json(f)}
  mine = {n for n in names if n.startswith(f'{domain}/')} - {f'{domain}/{TEST}'}
  return [f'{domain}/{TEST}', *sorted(mine)]


def _losses(study: Study, domain: str | None, name: str) -> dict[tuple[str, int | None], Loss]:
  """Load every run on one test set, by method and size; all are resampled alike."""
  groups: dict[tuple, dict[int, np.ndarray]] = {}
  first: tuple[str, np.ndarray, dict[str, Any]] | None = None
  for run in study.runs:
    loaded = _rows(study, run, name) if run['domain'] == domain else None
    if loaded is None:
      continue
    rows, about = loaded
    first = first or (run['run'], *loaded)
    same = rows.shape == first[1].shape and about['rows_sha256'] == first[2]['rows_sha256']
    if not same or (rows[:, 1] != first[1][:, 1]).any():
      raise ValueError(
        f'{study.path / run["run"]}: {name} was evaluated on other rows than in {first[0]} '
        f'({len(rows)} and {len(first[1])}); evaluate both on the same data'
      )
    groups.setdefault((run['method'], run['size']), {})[run['seed']] = rows
  if first is None:
    return {}
  rows = {(key, seed): x for key, group in groups.items() for seed, x in sorted(group.items())}
  documents = stats.documents(study.data_path, name)
  return stats.losses(rows, first[2].get('bytes', 0), name, documents)


def _rows(
  study: Study, run: Mapping[str, Any], name: str
) -> tuple[np.ndarray, dict[str, Any]] | None:
  """Load a run's rows [rows,2] of a test set and their summary; None if it was not run."""
  path = study.path / run['run']
  if load.served_step(path) is None:
    return None
  # A run is over with its test set; other sets and checkpoints may be there.
  needed = name.endswith(f'/{TEST}') and rundir.split_ref(path)[1] is None
  summary = rundir.evaluations(path).with_suffix('.json')
  if not needed and name not in (files.read_json(summary) if summary.exists() else {}):
    return None
  return heldout.kept(path, name)


def _costs(study: Study, runs: list[dict[str, Any]]) -> tuple[Cost | None, Cost | None]:
  """Return the generic cost (shared by domains, mean over seeds) and the mean cost of a domain."""
  if not runs:
    return None, None
  seeds = sorted({r['seed'] for r in runs})
  shared = [{p for r in runs if r['seed'] == s for p in r['generic_runs']} for s in seeds]
  own = [set(r['specialise_runs']) for r in runs]
  sums = [[_sum(study, paths) for paths in groups] for groups in (shared, own)]
  return tuple(None if None in x else sum(x, Cost()) * (1 / len(x)) for x in sums)


def _sum(study: Study, paths: Iterable[str]) -> Cost | None:
  costs = [training_cost(study.path / p) for p in sorted(paths)]
  return None if None in costs else sum(costs, Cost())


def _clustering(study: Study) -> Cost:
  """Read what clustering the generic set took; zero where the data directory is gone."""
  path = study.data_path / 'manifest.json'
  if not path.exists():
    return Cost()
  stage = files.read_json(path)['cost']['clusters']
  return Cost(0, stage['flops'], stage['seconds'])
