"""Verdicts on claims: the comparisons that a claim rests on, and whether they support it."""

import dataclasses
from collections.abc import Iterable

from slm.reporting.stats import Difference
from slm.reporting.tables import interval

YES, NO, NOISE, UNTESTED = 'reproduced', 'not reproduced', 'within noise', 'not tested'
ONE_SEED = ', one seed'


@dataclasses.dataclass(frozen=True)
class Evidence:
  """A comparison that a claim rests on."""

  what: str  # what was compared
  agrees: bool | None  # with the claim; None: within noise
  numbers: str
  run: bool = True
  single: bool = False  # of one seed: its interval leaves out how training runs vary

  @property
  def line(self) -> str:
    """Format as a line; (no) marks disagreement, (?) a difference within noise."""
    sign = {True: '', False: ' (no)', None: ' (?)'}[self.agrees] if self.run else ''
    return f'{self.what}: {self.numbers}{sign}'


def not_run(what: str) -> Evidence:
  """Return the evidence of a comparison whose runs are missing."""
  return Evidence(what, None, 'not run', run=False)


def with_seeds(d: Difference) -> str:
  """Format a difference with its interval and number of seeds."""
  seeds = 'one seed' if len(d.seeds) == 1 else f'{len(d.seeds)} seeds'
  return f'{interval(d)}, {seeds}'


def judged(what: str, agrees: bool | None, d: Difference) -> Evidence:
  """Return a difference as evidence for or against a claim."""
  return Evidence(what, agrees, with_seeds(d), single=len(d.seeds) == 1)


def lower(what: str, d: Difference | None) -> Evidence:
  """Return the evidence for the claim that a difference is below zero."""
  if d is None:
    return not_run(what)
  return judged(what, {'better': True, 'worse': False, 'within noise': None}[d.verdict], d)


def verdict(evidence: Iterable[Evidence]) -> str:
  """Sum up the evidence for a claim.

  Any disagreement refutes it; otherwise a missing run leaves it untested. A verdict that rests on
  single training runs says so.
  """
  evidence = list(evidence)
  if against := [e for e in evidence if e.agrees is False]:
    return NO + ONE_SEED * all(e.single for e in against)
  if not evidence or not all(e.run for e in evidence):
    return UNTESTED
  if not all(e.agrees for e in evidence):
    return NOISE
  return YES + ONE_SEED * any(e.single for e in evidence)
