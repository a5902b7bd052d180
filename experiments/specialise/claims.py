"""What the study found about each claim of the paper (arXiv 2402.01093 v2), with its numbers."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from experiments.specialise import budgets, page, plots
from experiments.specialise.cells import Cell, Comparison, between, compare
from experiments.specialise.methods import METHODS
from experiments.specialise.study import Study
from slm.reporting.stats import Difference, Loss, difference
from slm.reporting.tables import count, interval
from slm.reporting.verdicts import Evidence, judged, lower, not_run, verdict, with_seeds


@dataclasses.dataclass(frozen=True)
class Found:
  """Every comparison of a study that a claim may ask for."""

  study: Study
  main: Comparison
  groups: dict[str, Comparison]
  budgets: dict[float, Comparison]

  @property
  def sizes(self) -> tuple[int, ...]:
    """List the sizes of the specialisation set, smallest first."""
    return self.study.sizes

  @functools.cached_property
  def _cells(self):
    return page.cells(self.study)

  def cell(self, method: str, size: int, budget: float = 1):
    """Return a complete cell of the main or a further table; None if it was not run."""
    tables = [self.budgets[budget]] if budget != 1 else [self.main, *self.groups.values()]
    cells = (c.cells.get((method, size)) for c in tables)
    return next((cell for cell in cells if cell is not None and cell.complete), None)

  def trained(self, budget: float) -> float:
    """Return how many tokens per parameter the SLM has seen at a budget, 0 if it was not run."""
    cell = self.cell('slm', self.sizes[0], budget)
    return cell.generic.tokens / self.study.params['slm'] if cell and cell.generic else 0

  def gap(self, a: str, b: str, size: int, budget: float = 1) -> Difference | None:
    """Return the difference in loss of two methods, a minus b; None if one was not run."""
    cells = [self.cell(m, size, budget) for m in (a, b)]
    return None if None in cells else between(*cells)

  def named(self, method: str, on: int | str, budget: float = 1) -> str:
    """Name a method, with a link to its runs if the study has them."""
    label = next(m.label for m in METHODS if m.name == method)
    on = next((x for x in (on, page.ANY) if (method, x, budget) in self._cells), None)
    return label if on is None else page.evidence(label, method, on, budget)

  def pair(self, a: str, b: str, on: int | str, budget: float = 1) -> str:
    """Name a difference, with links to the runs on both sides."""
    return f'{self.named(a, on, budget)} − {self.named(b, on, budget)}'

  def lower(self, a: str, b: str, size: int, budget: float = 1) -> list[Evidence]:
    """Claim that method a has a lower loss than b."""
    d = self.gap(a, b, size, budget)
    at = '' if budget == 1 else f', {budget:.3g} of the pretraining'
    at += self._where(self.cell(a, size, budget), self.cell(b, size, budget))
    return [lower(f'{self.pair(a, b, size, budget)}, {count(size)} tokens{at}', d)]

  def _where(self, *cells: Cell | None) -> str:
    """Say on which domains cells can be compared, if not on all."""
    if None in cells:
      return ''
    shared = set.intersection(*({t.partition('/')[0] for t in cell.tests} for cell in cells))
    fewer = len(shared) < len(self.study.domains)
    return f', on {" and ".join(sorted(shared))} alone' if fewer else ''


def _flipped(found: list[Evidence]) -> list[Evidence]:
  """Claim the opposite."""
  turn = lambda e: dataclasses.replace(e, agrees=None if e.agrees is None else not e.agrees)
  return [turn(e) for e in found]


def _each(parts: Iterable[list[Evidence]]) -> list[Evidence]:
  return [e for part in parts for e in part]


def pretraining_and_tuning(f: Found) -> list[Evidence]:
  """Both are needed at every size."""
  return _each(f.lower('slm', m, s) for m in ('slm_nopt', 'slm_noft') for s in f.sizes)


def large_is_best(f: Found) -> list[Evidence]:
  """The LLM beats every small model at every size, but SLM-is at the smallest beats it."""
  pairs = [(m, s) for s in f.sizes for m in (*_SMALL, 'importance')]
  found = _each(f.lower('llm', m, s) for m, s in pairs if (m, s) != ('importance', f.sizes[0]))
  return found + f.lower('importance', 'llm', f.sizes[0])


_SMALL = ('slm', 'distill', 'mixture', 'project')


def importance_is_best_small(f: Found) -> list[Evidence]:
  """SLM-is beats every other small model at every size."""
  return _each(f.lower('importance', m, s) for s in f.sizes for m in _SMALL)


def importance_pays_per_domain(f: Found) -> list[Evidence]:
  """For many domains at equal total cost SLM-pn beats SLM-is, which then has less for each."""
  size, share = f.sizes[0], min(f.budgets)
  domains = round(1 / share)
  cells = f.cell('project', size), f.cell('importance', size, share)
  what = f'{f.named("project", size)} − {f.named("importance", size, share)}, {count(size)} tokens'
  if domains < 2 or None in cells:
    return [not_run(what)]
  what += f', {share:.3g} of the pretraining for each of {domains} domains'
  costs = [cell.total(domains) for cell in cells]
  if None not in costs:
    what += f', {costs[1].flops / costs[0].flops:.2f}× the FLOPs of SLM-pn'
  return [lower(what, between(*cells))]


# The SLM's tokens per parameter at Table 8's 100 and 400 A100-hours, and what counts as about them.
_SHORT, _LONG, _ABOUT = 360, 1440, 1.25


def _not_trained(f: Found, method: str, tokens: int) -> list[Evidence]:
  """Say that a method beside the SLM lacks a budget."""
  return [not_run(f'{f.pair(method, "slm", f.sizes[0])} at {tokens:,} tokens per parameter')]


def projection_always_helps(f: Found) -> list[Evidence]:
  """SLM-pn beats the SLM at the smallest size for every budget from the paper's smallest on."""
  trained = {b: f.trained(b) for b in f.budgets}
  known = [b for b, n in trained.items() if n >= _SHORT / _ABOUT]
  found = _each(f.lower('project', 'slm', f.sizes[0], b) for b in known)
  ends = [
    n for n in (_SHORT, _LONG) if not any(1 / _ABOUT <= trained[b] / n <= _ABOUT for b in known)
  ]
  return found + _each(_not_trained(f, 'project', n) for n in ends)


def mixture_needs_budget(f: Found) -> list[Evidence]:
  """SLM-mix is worse than the SLM up to the paper's smallest budget, better from 400 hours on."""
  trained = {b: f.trained(b) for b in f.budgets}
  gaps = lambda known: _each(f.lower('mixture', 'slm', f.sizes[0], b) for b in known)
  short = gaps(b for b, n in trained.items() if 0 < n <= _SHORT * _ABOUT)
  long = gaps(b for b, n in trained.items() if n >= _LONG / _ABOUT)
  worse = _flipped(short) or _not_trained(f, 'mixture', _SHORT)
  return worse + (long or _not_trained(f, 'mixture', _LONG))


def projection_beats_mixture(f: Found) -> list[Evidence]:
  """SLM-pn beats SLM-mix at the smallest size."""
  return f.lower('project', 'mixture', f.sizes[0])


def gain_shrinks(f: Found) -> list[Evidence]:
  """The gain of SLM-pn and SLM-mix over the SLM is smaller at the largest size."""
  found = []
  for method in ('project', 'mixture'):
    cells = [[f.cell(m, s) for m in (method, 'slm')] for s in (f.sizes[-1], f.sizes[0])]
    what = f'gap of {f.named(method, f.sizes[-1])} at {count(f.sizes[-1])} tokens − that '
    what += f'{f.named(method, f.sizes[0])} has at {count(f.sizes[0])}'
    if None in cells[0] + cells[1]:
      found.append(not_run(what))
      continue
    last, first = (_gap(*(cell.average for cell in pair)) for pair in cells)
    start, d = f.gap(method, 'slm', f.sizes[0]), difference(last, first)
    # Only a gain can shrink; the change itself has an interval.
    agrees = {'worse': True, 'better': False}.get(d.verdict) if start.verdict == 'better' else None
    numbers = f'{with_seeds(d)}; at {count(f.sizes[0])} {interval(start)}'
    if start.verdict == 'worse':
      numbers += ', no gain'
    found.append(
      Evidence(what, agrees, numbers, run=start.verdict != 'worse', single=len(d.seeds) == 1)
    )
  return found


def _gap(a: Loss, b: Loss) -> Loss:
  """Return what is left of a loss when another is taken off it, on the same text."""
  shared = a.seeds.keys() & b.seeds.keys()
  return Loss(
    {s: a.seeds[s] - b.seeds[s] for s in shared},
    {s: a.bits[s] - b.bits[s] for s in shared},
    {s: a.replicates[s] - b.replicates[s] for s in shared},
  )


def generic_order(f: Found) -> list[Evidence]:
  """On generic text: LLM, then SLM-mix, SLM-pn, SLM."""
  order, found = ('llm', 'mixture', 'project', 'slm'), []
  for a, b in zip(order, order[1:], strict=False):
    pair = [f.main.generic.get(m) for m in (a, b)]
    d = None if None in pair else difference(*pair)
    found.append(lower(f'{f.pair(a, b, f.study.generic)} on generic text', d))
  return found


def before_is_not_after(f: Found) -> list[Evidence]:
  """Fine-tuning turns the order of some two methods around, at some size."""
  before = {m: f.cell(f'{m}_noft', f.sizes[0]) for m in _UNTUNED}
  swaps, told, pairs = [], 0, 0
  for size in f.sizes:
    after = {m: f.cell(m, size) for m in before}
    known = [m for m in before if before[m] and after[m]]
    for a, b in itertools.combinations(known, 2):
      both = [between(x[a], x[b]) for x in (before, after)]
      if None in both:
        continue
      pairs += 1
      verdicts = {d.verdict for d in both}
      told += 'within noise' not in verdicts
      if verdicts == {'better', 'worse'}:
        pair = f'{f.pair(f"{a}_noft", f"{b}_noft", size)} before, {f.pair(a, b, size)} after'
        numbers = f'{interval(both[0])} and {interval(both[1])}'
        swaps.append(f'{pair} {count(size)} tokens: {numbers}')
  what = f'pairs that swap, of {told} of {pairs} told both times'
  if not pairs:
    return [not_run(what)]
  # Only if every pair is told can none of them be known to swap.
  agrees = True if swaps else False if told == pairs else None
  return [Evidence(what, agrees, '; '.join(swaps) or 'none')]


_UNTUNED = ('slm', 'importance', 'mixture', 'project', 'llm')


def distillation_does_not_pay(f: Found) -> list[Evidence]:
  """SLM-d at half its budget (its teacher takes the other half) gains less than 0.02 nats."""
  size, found = f.sizes[0], []
  pair = f.cell('distill', size, 0.5) if 0.5 in f.budgets else None, f.cell('slm', size)
  what = f'{f.named("distill", size, 0.5)} at half − {f.named("slm", size)}, {count(size)} tokens'
  d = None if None in pair else between(*pair)
  if d is None:
    return [not_run(what)]
  costs = [x.total(1) for x in pair]
  if None not in costs:
    what += f', {costs[0].flops / costs[1].flops:.2f}× the FLOPs'
  agrees = True if d.low > -0.02 else False if d.high < -0.02 else None
  return [*found, judged(what, agrees, d)]


def more_experts_help(f: Found) -> list[Evidence]:
  """A projected network with 64 clusters beats one with 16."""
  return f.lower('project_64', 'project', f.sizes[0])


def whole_histogram(f: Found) -> list[Evidence]:
  """SLM-is beats training on the most frequent cluster alone, of the same clusters."""
  return f.lower('importance_16', 'importance_top', f.sizes[0])


def frequent_is_enough(f: Found) -> list[Evidence]:
  """Choosing by the most frequent cluster loses at most 0.02 nats to the lowest loss."""
  found = []
  for method in ('mixture', 'project'):
    d = f.gap(method, f'{method}_best', f.sizes[0])
    what = f.pair(method, f'{method}_best', f.sizes[0])
    if d is None:
      found.append(not_run(what))
    else:
      agrees = True if d.high <= 0.02 else False if d.low > 0.02 else None
      found.append(judged(what, agrees, d))
  return found


def many_clusters(f: Found) -> list[Evidence]:
  """Importance sampling is best with the most clusters."""
  size = f.sizes[0]
  return f.lower('importance', 'importance_64', size) + f.lower('importance', 'importance_16', size)


_WIDE = 0.25  # of the clusters; the paper's Wikipedia and OpenWebText2 have 281 and 455 of 1024


def wide_domains(f: Found) -> list[Evidence]:
  """On domains spread over many clusters, SLM-pn and SLM-mix do not beat the SLM."""
  if len(f.study.domains) < 2:
    return [not_run('domains that differ in entropy: there is one domain')]
  *_, (level, sets) = plots.histograms(f.main).items() or [('0', {})]
  share = {d: sets[d]['effective_clusters'] / int(level) for d in f.study.domains if d in sets}
  what = 'domains in more than {:.0%} of {} clusters: none ({})'
  listed = ', '.join(f'{d} {x:.0%}' for d, x in share.items())
  found, size = [], f.sizes[0]
  for domain in (d for d, x in share.items() if x > _WIDE):
    for method in ('project', 'mixture'):
      cell = f.cell(method, size)
      d = f.main.to_baseline(cell, f'{domain}/test') if cell else None
      about = f'{f.pair(method, "slm", size)} on {domain}, in {share[domain]:.0%} of the clusters'
      found += [not_run(about)] if d is None else [
        judged(about, d.verdict != 'better', d)
      ]  # fmt: skip
  return found or [not_run(what.format(_WIDE, level, listed))]


CLAIMS: tuple[tuple[str, Callable[[Found], list[Evidence]]], ...] = (
  ('Pretraining and fine-tuning are both necessary', pretraining_and_tuning),
  ('The LLM is best where it may be served, except that SLM-is beats it on the smallest set',
   large_is_best),
  ('SLM-is is the best small model for a single domain, at every set size',
   importance_is_best_small),
  ('SLM-is loses to SLM-pn as a choice when domains are many', importance_pays_per_domain),
  ('SLM-pn beats the SLM on the smallest set at every budget', projection_always_helps),
  ('SLM-mix needs budget: worse than the SLM at the smallest, better at the largest',
   mixture_needs_budget),
  ('SLM-pn beats SLM-mix on the smallest set', projection_beats_mixture),
  ('What SLM-pn and SLM-mix gain over the SLM shrinks as the set grows', gain_shrinks),
  ('On generic text at equal cost: LLM, then SLM-mix, SLM-pn, SLM', generic_order),
  ('The order of methods before fine-tuning is not their order after', before_is_not_after),
  ('Distillation does not pay once its teacher is counted', distillation_does_not_pay),
  ('More experts in SLM-pn are better per step', more_experts_help),
  ('Importance sampling beats training on the top cluster alone', whole_histogram),
  ('Choosing the expert by the most frequent cluster loses little', frequent_is_enough),
  ('SLM-pn and SLM-mix do not beat the SLM on the domains of highest entropy',
   wide_domains),
  ('The largest number of clusters is best for importance sampling', many_clusters),
)  # fmt: skip


def table(study: Study) -> dict[str, Any]:
  """Judge every claim: a section of the report."""
  groups = {g: compare(study.only(g)) for g in study.groups}
  found = Found(study, compare(study.only()), groups, budgets.by_budget(study))
  rows = []
  for number, (claim, judge) in enumerate(CLAIMS, 1):
    evidence = judge(found)
    numbers = '<br>'.join(e.line for e in evidence)
    rows.append([str(number), claim, verdict(evidence), numbers])
  return {
    'title': 'The claims of the paper',
    'note': NOTE,
    'head': ['#', 'claim', 'here', 'numbers'],
    'rows': rows,
  }


NOTE = (
  'Differences in nats per token, averaged over domains, with 95 % intervals over text and runs '
  '(negative: the first has the lower loss). A claim is reproduced if every comparison it stands '
  'on agrees beyond its interval, not reproduced if one clearly does not (no), not tested if a '
  'part was not run or cannot show it, within noise otherwise (?). That a model does not win holds '
  'unless it clearly wins. Single training runs vary by more than their intervals say: what rests '
  'on one seed is marked so.'
)
