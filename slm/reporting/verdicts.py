"""What a study says of a claim: the comparisons it stands on, and their sum."""

import dataclasses
from collections.abc import Iterable

from slm.reporting.stats import Difference
from slm.reporting.tables import interval

YES, NO, NOISE, UNTESTED = 'reproduced', 'not reproduced', 'within noise', 'not tested'
ONE_SEED = ', one seed'


@dataclasses.dataclass(frozen=True)
class Evidence:
  """One comparison that a claim stands on: what was compared, whether it agrees, its numbers."""

  what: str
  agrees: bool | None  # None: cannot be told
  numbers: str
  run: bool = True
  single: bool = False  # of one seed, so that training runs are not in its interval

  @property
  def line(self) -> str:
    """Say all of it in a line: (no) disagrees, (?) cannot be told."""
    sign = {True: '', False: ' (no)', None: ' (?)'}[self.agrees] if self.run else ''
    return f'{self.what}: {self.numbers}{sign}'


def not_run(what: str) -> Evidence:
  """Say that a comparison lacks a run."""
  return Evidence(what, None, 'not run', run=False)


def with_seeds(d: Difference) -> str:
  """Format a difference with its interval and how many seeds it is of."""
  seeds = 'one seed' if len(d.seeds) == 1 else f'{len(d.seeds)} seeds'
  return f'{interval(d)}, {seeds}'


def judged(what: str, agrees: bool | None, d: Difference) -> Evidence:
  """Say whether a difference agrees with a claim."""
  return Evidence(what, agrees, with_seeds(d), single=len(d.seeds) == 1)


def lower(what: str, d: Difference | None) -> Evidence:
  """Claim that a difference is below zero."""
  if d is None:
    return not_run(what)
  return judged(what, {'better': True, 'worse': False, 'within noise': None}[d.verdict], d)


def verdict(found: Iterable[Evidence]) -> str:
  """Sum up: a part that clearly disagrees refutes; a claim not run in full is not tested.

  What rests on single training runs says so.
  """
  found = list(found)
  if against := [e for e in found if e.agrees is False]:
    return NO + ONE_SEED * all(e.single for e in against)
  if not found or not all(e.run for e in found):
    return UNTESTED
  return YES + ONE_SEED * any(e.single for e in found) if all(e.agrees for e in found) else NOISE
