"""Advice for a budget: the nearest measured cells, their costs, and which of them fit.

A cell is the measured average of a method at one training budget and one amount of domain text.
measured.csv holds the committed studies of experiments/specialise. paper.csv holds Tables 4 and 8
of Grangier et al. (arXiv 2402.01093 v2), one training run each; their costs in A100-hours (Tables 3
and 8) are converted at 3.43e17 FLOPs an hour, from 6 FLOPs per parameter and token.

Cells scale with the served parameters: at r times the parameters a cell stands for r times the
domain text and r^2 times the FLOPs, so that tokens per parameter stay the same.
"""

import csv
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

from slm.reporting.tables import Table, count, number, times

BASELINE = 'slm'  # the plain SLM, which every method is compared with
FILES = tuple(Path(__file__).with_name(name) for name in ('measured.csv', 'paper.csv'))
_OVER = 1.05  # a cell fits a budget up to this multiple of it
_BEYOND = 1.5  # a value up to this factor outside the measured range counts as measured
_SIZES = 10  # the same for the number of parameters
_MATTERS = 0.02  # nats per token, the smallest effect the paper's table rests on
_WIDE = 0.25  # share of the clusters; the paper's Wikipedia and OpenWebText2: 281, 455 of 1024


@dataclasses.dataclass(frozen=True)
class Question:
  """A budget; the field names are the flags of slm.advise."""

  params: float  # that may be served
  pretrain_flops: float  # once
  specialise_flops: float  # per domain
  domain_tokens: float
  domains: int = 1
  large_params: float = 0.0  # of a larger model that may be served too


@dataclasses.dataclass(frozen=True)
class Cell:
  """A method at one training budget and amount of domain text, averaged over domains."""

  study: str
  method: str
  label: str
  params: float  # served
  domain_tokens: float
  generic_flops: float  # once
  specialise_flops: float  # per domain
  loss: float  # nats per token
  half: float  # half-width of the 95 % interval of the difference to the plain SLM; 0: unknown
  seeds: int
  better: int  # domains on which it clearly beats the plain SLM
  domains: int

  def cost(self, domains: int = 1) -> float:
    """Return the FLOPs for some domains."""
    return self.generic_flops + domains * self.specialise_flops

  def scaled(self, ratio: float) -> 'Cell':
    """Return the cell at `ratio` times the parameters."""
    return dataclasses.replace(
      self,
      params=self.params * ratio,
      domain_tokens=self.domain_tokens * ratio,
      generic_flops=self.generic_flops * ratio**2,
      specialise_flops=self.specialise_flops * ratio**2,
    )


@dataclasses.dataclass(frozen=True)
class Placed:
  """A method's cell nearest to a question, at the question's size."""

  cell: Cell
  out: str  # why it does not fit; '': it fits


def read(path: Path) -> list[Cell]:
  """Read a table of measured cells; raise ValueError if it is not one with the plain SLM."""
  if not path.is_file():
    raise ValueError(f'{path}: no such file; expected a table of measured cells')
  fields = {f.name: f.type for f in dataclasses.fields(Cell)}
  with path.open(newline='') as f:
    reader = csv.DictReader(f)
    if reader.fieldnames != list(fields):
      raise ValueError(
        f'{path}: expected the columns {", ".join(fields)}; '
        'python -m experiments.specialise.measured makes them from a results.csv'
      )
    try:
      cells = [Cell(**{k: fields[k](v) for k, v in line.items()}) for line in reader]
    except (TypeError, ValueError) as e:
      raise ValueError(f'{path}: line {reader.line_num}: {e}') from None
  for study, group in _grouped(cells, 'study').items():
    if not _baseline(group):
      raise ValueError(f'{path}: study {study!r} has no plain SLM ({BASELINE}) to compare with')
  return cells


def _grouped(cells: Iterable[Cell], field: str) -> dict[str, list[Cell]]:
  groups: dict[str, list[Cell]] = {}
  for cell in cells:
    groups.setdefault(getattr(cell, field), []).append(cell)
  return groups


def _baseline(cells: Iterable[Cell]) -> list[Cell]:
  return [cell for cell in cells if cell.method == BASELINE]


def place(cells: Iterable[Cell], q: Question) -> list[Placed]:
  """Place one study's methods beside a question: those that fit by loss, then the others by cost.

  Each method is represented at the measured amount of domain text nearest to the question's, by its
  most expensive budget that fits, or else its cheapest.
  """
  methods = _grouped(cells, 'method')
  ratio = q.params / methods[BASELINE][0].params
  methods = {name: [cell.scaled(ratio) for cell in group] for name, group in methods.items()}
  distance = lambda tokens: abs(math.log(tokens / q.domain_tokens))
  tokens = min({cell.domain_tokens for cell in methods[BASELINE]}, key=distance)
  placed = [_placed(group, tokens, q) for group in methods.values()]
  return sorted(placed, key=lambda p: (bool(p.out), p.cell.cost() if p.out else p.cell.loss))


def _placed(group: list[Cell], tokens: float, q: Question) -> Placed:
  at_size = [cell for cell in group if math.isclose(cell.domain_tokens, tokens)]
  affordable = [cell for cell in at_size if not _exceeded(cell, q)]
  cell = max(affordable, key=Cell.cost) if affordable else min(at_size or group, key=Cell.cost)
  reasons = [] if at_size else [f'not measured with {count(tokens)} tokens of domain text']
  if cell.params > max(_OVER * q.params, _BEYOND * q.large_params):
    reasons.append(f'serves {count(cell.params)} parameters')
  return Placed(cell, '; '.join(reasons + _exceeded(cell, q)))


def _exceeded(cell: Cell, q: Question) -> list[str]:
  """List the budgets of a question that a cell exceeds."""
  budgets = (
    (cell.generic_flops, q.pretrain_flops, 'once'),
    (cell.specialise_flops, q.specialise_flops, 'per domain'),
  )
  return [
    f'needs {number(flops)} FLOPs {when}, the budget is {number(budget)}'
    for flops, budget, when in budgets
    if flops > _OVER * budget
  ]


def choose(placed: Iterable[Placed], domains: int = 1) -> tuple[Cell | None, str]:
  """Choose among the cells that fit; return the cell and how certain the choice is.

  The choice is the plain SLM unless another method's loss is clearly lower. Among methods that
  cannot be told from the best, it is the cheapest if that halves the cost.
  """
  fitting = [p.cell for p in placed if not p.out]
  if not fitting:
    return None, 'no measured cell fits the budget'
  if not (baseline := _baseline(fitting)):
    return fitting[0], 'the lowest loss that fits'
  base = baseline[0]
  clear = [cell for cell in fitting if base.loss - cell.loss > max(cell.half, _MATTERS)]
  if not clear:
    return base, f'nothing that fits is clearly better, by {_MATTERS:g} nats/token or more'
  best = clear[0]
  ties = [cell for cell in clear if cell.loss - best.loss <= max(cell.half, best.half)]
  cheapest = min(ties, key=lambda cell: cell.cost(domains))
  chosen = cheapest if cheapest.cost(domains) < best.cost(domains) / 2 else best
  if chosen.seeds >= 3 and chosen.better == chosen.domains:
    certainty = 'better on every domain and in every seed measured'
  else:
    share = f'clearly better on {chosen.better} of {chosen.domains} domains'
    seeds = f'{chosen.seeds} seed{"s" * (chosen.seeds > 1)}'
    certainty = f'likely: {share if chosen.half else "measured without an interval"}, {seeds}'
  if chosen is not best:
    ratio = times(best.cost(domains) / chosen.cost(domains))
    certainty += f'; {best.label} may be a little better at {ratio} its cost'
  return chosen, certainty


def limits(cells: Iterable[Cell], q: Question) -> list[str]:
  """Describe what of a question lies outside a study's measured range, in the question's units."""
  cells = _baseline(cells)
  params = cells[0].params
  scaled = [cell.scaled(q.params / params) for cell in cells]
  tokens = [cell.domain_tokens for cell in scaled]
  flops = [cell.generic_flops for cell in scaled]
  larger = max(q.pretrain_flops, q.specialise_flops)  # either may pay for a pretraining
  at = f'measured at {count(q.params)} parameters'
  outside = []
  if not params / _SIZES <= q.params <= params * _SIZES:
    outside.append(f'--params={q.params:g} (measured: {count(params)})')
  if not min(tokens) / _BEYOND <= q.domain_tokens <= max(tokens) * _BEYOND:
    measured = f'{at}: {count(min(tokens))} to {count(max(tokens))}'
    outside.append(f'--domain_tokens={q.domain_tokens:g} ({measured})')
  if larger * _OVER < min(flops) or q.pretrain_flops > max(flops) * _BEYOND:
    measured = f'{at}: {number(min(flops))} to {number(max(flops))}'
    outside.append(f'--pretrain_flops={q.pretrain_flops:g} ({measured})')
  return outside


def nearest(studies: dict[str, list[Cell]], q: Question) -> str:
  """Choose the study with the fewest limits exceeded, then the nearest in size and budget."""

  def distance(name: str) -> tuple[int, float]:
    base = _baseline(studies[name])
    ratio = q.params / base[0].params
    largest = max(cell.generic_flops for cell in base) * ratio**2
    budget = max(q.pretrain_flops, q.specialise_flops, 1.0)
    return len(limits(base, q)), abs(math.log(ratio)) + abs(math.log(budget / largest))

  return min(studies, key=distance)


def table(placed: Iterable[Placed], domains: int) -> Table:
  """Build a row per method: its gain and costs at the question's size, and whether it fits."""
  placed = list(placed)
  base = next(p.cell for p in placed if p.cell.method == BASELINE)
  head = ['method', 'nats/token to the SLM', 'served', 'domain text', 'FLOPs once']
  head += ['FLOPs/domain', f'cost, N = {domains}', 'seeds', 'fits?']
  rows = []
  for p in placed:
    cell = p.cell
    if cell is base:
      gain = f'loss {cell.loss:.3f}'
    elif math.isclose(cell.domain_tokens, base.domain_tokens):
      gain = f'{cell.loss - base.loss:+.3f}' + (f' ± {cell.half:.3f}' if cell.half else '')
    else:
      gain = '–'
    row = [cell.label, gain, count(cell.params), count(cell.domain_tokens)]
    row += [number(cell.generic_flops), number(cell.specialise_flops)]
    row += [times(cell.cost(domains) / base.cost(domains)), str(cell.seeds), p.out or 'yes']
    rows.append(row)
  return head, rows


def advise(cells: Iterable[Cell], q: Question, effective: float = 0.0) -> tuple[str, Table]:
  """Return a paragraph that says what to use and how certain that is, and the table behind it.

  effective: how widely the domain is spread over clusters, as a share of generic text's spread.
  """
  studies = _grouped(cells, 'study')
  name = nearest(studies, q)
  outside, placed = limits(studies[name], q), place(studies[name], q)
  params = _baseline(studies[name])[0].params
  ratio = q.params / params
  chosen, certainty = choose(placed, q.domains)
  lines = [f'Outside the measured range: {"; ".join(outside)}.'] if outside else []
  lines.append(f'Use {chosen.label} ({certainty}).' if chosen else f'No advice: {certainty}.')
  lines.append(
    f'The table holds the nearest cells of the study {name!r}, of {count(params)} parameters, '
    f'scaled to {count(q.params)}: {times(ratio)} the text, {times(ratio**2)} the FLOPs. They were '
    'measured on other text than yours.'
  )
  if chosen and effective > _WIDE and chosen.method in ('project', 'mixture'):
    lines.append(
      f'The domain is spread {effective:.0%} as widely as generic text, where one cluster says '
      'little: compare with the plain SLM before relying on it.'
    )
  if name == 'paper':
    lines.append(
      'The paper has no table of SLM-is (importance sampling); it reports it as the best small '
      'model for a single domain at every set size, paid once per domain.'
    )
  return ' '.join(lines), table(placed, q.domains)
