"""What a study is: its methods and the runs that belong to each cell of its tables."""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slm.base import files

BASELINE = 'slm'
TEST = 'test'  # the split that is averaged
_METHOD_KEYS = ('name', 'label', 'describe')
_STUDY_KEYS = (
  'title', 'scale', 'data', 'domains', 'generic', 'sizes', 'methods', 'runs', 'params', 'notes'
)  # fmt: skip
_RUN_KEYS = (
  'method', 'domain', 'size', 'seed', 'run', 'kind', 'generic_runs', 'specialise_runs'
)  # fmt: skip
# Methods that need the clusters of the generic set; a method's own 'clusters' key overrides.
_CLUSTERED = ('importance', 'mixture', 'project')


@dataclasses.dataclass(frozen=True)
class Study:
  """study.json, checked. Run directories are relative to `path`.

  `planned` is every row; `runs` those of one budget, a share of the pretraining.
  """

  path: Path
  title: str
  scale: str
  data: str
  domains: tuple[str, ...]
  generic: str
  sizes: tuple[int, ...]
  methods: dict[str, dict[str, Any]]
  planned: tuple[dict[str, Any], ...]
  params: dict[str, int]
  notes: tuple[str, ...]
  budget: float = 1
  baseline: str = BASELINE  # what every method is compared with

  @functools.cached_property
  def runs(self) -> tuple[dict[str, Any], ...]:
    """List the rows of this budget."""
    return tuple(r for r in self.planned if r.get('budget', 1) == self.budget)

  @functools.cached_property
  def budgets(self) -> tuple[float, ...]:
    """List the budgets that some row has, smallest first."""
    return tuple(sorted({r.get('budget', 1) for r in self.planned}))

  @functools.cached_property
  def groups(self) -> tuple[str, ...]:
    """List the further tables that methods stand in, beside the main one ('')."""
    return tuple(dict.fromkeys(g for m in self.methods.values() if (g := m.get('group', ''))))

  def only(self, group: str = '', budget: float = 1) -> 'Study':
    """Return the study of one group's methods at one budget, and of what they are compared with.

    That is the plain SLM, unless the group's methods name another by their key 'reference'.
    """
    mine = {n: m for n, m in self.methods.items() if m.get('group', '') == group}
    baseline = next((m['reference'] for m in mine.values() if m.get('reference')), BASELINE)
    chosen = {n: m for n, m in self.methods.items() if n == baseline or n in mine}
    planned = tuple(r for r in self.planned if r['method'] in chosen)
    return dataclasses.replace(
      self, methods=chosen, planned=planned, budget=budget, baseline=baseline
    )

  @functools.cached_property
  def shared_domains(self) -> tuple[str, ...]:
    """List the domains that all methods which this budget has runs of are planned for."""
    planned: dict[str, set[str]] = {}
    for r in self.runs:
      if r['domain']:
        planned.setdefault(r['method'], set()).add(r['domain'])
    return tuple(d for d in self.domains if all(d in x for x in planned.values()))

  def label(self, method: str) -> str:
    """Return the name shown to people."""
    return self.methods[method]['label']

  def kind(self, method: str) -> str | None:
    """Say whether a method serves a small or a large model; None without runs."""
    return next((r['kind'] for r in self.runs if r['method'] == method), None)

  def clustered(self, method: str) -> bool:
    """Say whether a method needs the clusters, so that their cost is part of its own."""
    return self.methods[method].get('clusters', method in _CLUSTERED)

  @functools.cached_property
  def data_path(self) -> Path:
    """Return the data directory: as given, or relative to the study."""
    beside = self.path / self.data
    return beside if beside.exists() else Path(self.data)


def load_study(path: Path) -> Study:
  """Read and check STUDY/study.json.

  Raises:
    ValueError: one line naming the file and what is wrong with it.
  """
  file = path / 'study.json'
  if not file.exists():
    raise ValueError(f'{file}: no such file; --study expects the directory an experiment wrote')
  raw = files.read_json(file)
  _require(raw, _STUDY_KEYS, str(file))
  for key in ('methods', 'sizes', 'domains'):
    if not raw[key] or not isinstance(raw[key], list):
      raise ValueError(f'{file}: {key} is {raw[key]!r}, expected a list of at least one')
  for key, kind in (('runs', list), ('notes', list), ('params', dict)):
    if not isinstance(raw[key], kind):
      raise ValueError(f'{file}: {key} is {raw[key]!r}, expected a {kind.__name__}')
  for i, method in enumerate(raw['methods']):
    _require(method, _METHOD_KEYS, f'{file}: methods[{i}]')
  methods = {m['name']: m for m in raw['methods']}
  for i, run in enumerate(raw['runs']):
    where = f'{file}: runs[{i}]'
    _require(run, _RUN_KEYS, where)
    for key, allowed in (
      ('method', list(methods)),
      ('domain', [*raw['domains'], None]),
      ('size', [*raw['sizes'], None]),
      ('kind', ['small', 'large']),
    ):
      if run[key] not in allowed:
        raise ValueError(f'{where}: {key} is {run[key]!r}, expected one of {allowed}')
    for key in ('generic_runs', 'specialise_runs'):
      if not isinstance(run[key], list):
        raise ValueError(f'{where}: {key} is {run[key]!r}, expected a list of runs')
    if not isinstance(run.get('budget', 1), int | float):
      raise ValueError(f'{where}: budget is {run["budget"]!r}, expected a share of the pretraining')
  return Study(
    path, raw['title'], raw['scale'], raw['data'], tuple(raw['domains']), raw['generic'],
    tuple(sorted(raw['sizes'])), methods, tuple(raw['runs']), raw['params'], tuple(raw['notes']),
  )  # fmt: skip


def _require(value: Any, keys: Iterable[str], where: str) -> None:
  if not isinstance(value, dict):
    raise ValueError(f'{where}: expected an object, found {type(value).__name__}')
  for key in keys:
    if key not in value:
      raise ValueError(f'{where}: no key {key!r}; it has {", ".join(sorted(value)) or "none"}')
