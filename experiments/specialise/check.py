"""How good would the advice have been? Each domain in turn is left out and then advised on."""

import csv
import dataclasses
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.specialise import budgets, measured, report
from experiments.specialise.cells import Comparison
from experiments.specialise.study import BASELINE, Study
from slm.reporting import advise
from slm.reporting.advise import Cell, Question


@dataclasses.dataclass(frozen=True)
class Case:
  """One question about one left-out domain: what was advised, and what fits the budget there."""

  domain: str
  question: Question
  chosen: str
  options: dict[str, Cell]  # what the left-out domain itself measured for the same money

  def regret(self, method: str) -> float:
    """Return how much higher a method's loss is than the best that fits, nats per token."""
    return self.options[method].loss - min(o.loss for o in self.options.values())

  def close(self, method: str) -> bool:
    """Say whether a method is the best that fits, or as near as both intervals."""
    best = min(self.options.values(), key=lambda o: o.loss)
    return self.regret(method) <= max(best.half, self.options[method].half)


def cases(study: Study) -> list[Case]:
  """Ask for advice on every left-out domain: each budget and size, with little or much after."""
  found = []
  for domain in study.domains:
    others = tuple(d for d in study.domains if d != domain)
    if not others:
      return []
    by_budget = budgets.by_budget(_on(study, others))
    known = _cells(by_budget)
    left_out = _cells(budgets.by_budget(_on(study, (domain,))))
    if not (known and left_out):
      continue
    for question in _questions(by_budget, known):
      chosen, _ = advise.choose(advise.place(known, question))
      there = [p.cell for p in advise.place(left_out, question) if not p.out]
      options = {c.method: c for c in there if not c.method.endswith('_noft')}
      if chosen is not None and chosen.method in options and len(options) > 1:
        found.append(Case(domain, question, chosen.method, options))
  return found


def _on(study: Study, domains: tuple[str, ...]) -> Study:
  planned = tuple(r for r in study.planned if r['domain'] in (None, *domains))
  return dataclasses.replace(study, domains=domains, planned=planned)


def _cells(by_budget: dict[float, Comparison]) -> list[Cell]:
  """Return what was measured, nothing where the plain SLM was not."""
  cells = (pair for c in by_budget.values() for pair in c.cells.items())
  if not any(cell.complete for (method, _), cell in cells if method == BASELINE):
    return []
  lines = list(csv.DictReader(io.StringIO(report.results_csv(list(by_budget.values())))))
  return measured.cells(lines, Path('left-out') / 'results.csv')


def _questions(by_budget: dict[float, Comparison], known: list[Cell]) -> Iterator[Question]:
  """List the budgets that the SLM was measured with, at every set size.

  What may be spent per domain is either enough for any fine-tuning, or a pretraining more.
  """
  plain = [c for c in known if c.method == BASELINE]
  sizes = sorted({c.domain_tokens for c in known})
  for comparison, size, much in itertools.product(by_budget.values(), sizes, (False, True)):
    cell = comparison.cells[BASELINE, int(size)]
    if not cell.complete or cell.generic is None:
      continue
    pretrain = cell.generic.flops
    tuning = 2 * max(c.specialise_flops for c in plain if c.domain_tokens == size)
    yield Question(plain[0].params, pretrain, tuning + 1.01 * pretrain * much, size)


def table(study: Study) -> dict[str, Any]:
  """Compare the advice with always choosing one method: a section of the report."""
  found, rows = cases(study.only()), []
  if found:
    rows.append(_row('as advised', [(case, case.chosen) for case in found]))
  for method in (BASELINE, 'importance', 'project', 'mixture') if found else ():
    if method not in study.methods:
      continue
    fallback = [(case, method if method in case.options else BASELINE) for case in found]
    missing = sum(used != method for _, used in fallback)
    name = f'always {study.label(method)}' + f' (not affordable in {missing})' * bool(missing)
    rows.append(_row(name, fallback))
  return {
    'title': 'The advice, checked',
    'note': NOTE,
    'head': ['strategy', 'best or within noise', 'mean regret, nats/token', 'largest'],
    'rows': rows,
  }


def _row(name: str, chosen: list[tuple[Case, str]]) -> list[str]:
  close = np.mean([case.close(method) for case, method in chosen])
  regret = [case.regret(method) for case, method in chosen]
  share = f'{close:.0%} of {len(chosen)}'
  return [name, share, f'{np.mean(regret):.3f}', f'{max(regret):.3f}']


NOTE = (
  'Each domain is left out, slm.advise is asked with what the other domains measured, for every '
  'budget and set size, with money for fine-tuning alone or for a pretraining per domain. Then the '
  'left-out domain says which of the affordable methods was best; larger models are not among '
  'them. A method that is not affordable falls back to the plain SLM. All questions are at budgets '
  'and set sizes that were measured: what is checked is the choice of a method, not interpolation.'
)
