"""Which method for a budget: the nearest measured cells, what they cost, and which of them fit.

A cell is a method at one budget and set size of a study: a line of measured.csv, which
experiments/specialise makes of its committed results, or of paper.csv. A study of small models
speaks for larger ones by what is counted per served parameter. At r times the parameters a cell
stands for r times the tokens of domain text and r^2 times the FLOPs, which are those of as many
tokens of training per parameter.
"""

import csv
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

from slm.reporting.tables import Table, count, number, times

BASELINE = 'slm'  # the plain SLM, which every method is compared with
# paper.csv: Grangier et al. (arXiv 2402.01093 v2), losses of Tables 4 and 8, one training run each.
# Costs are their A100-hours (Tables 3 and 8), at 6 FLOPs per parameter and token 3.43e17 an hour.
FILES = tuple(Path(__file__).with_name(name) for name in ('measured.csv', 'paper.csv'))
_OVER = 1.05  # how much of a budget a cell that fits may take
_BEYOND = 1.5  # how far outside of what was measured a number still counts as measured
_SIZES = 10  # how many times larger or smaller a model than the measured one is still like it
_MATTERS = 0.02  # nats per token, the smallest effect the paper's table rests on
_WIDE = 0.25  # of the clusters; the paper's Wikipedia and OpenWebText2 have 281 and 455 of 1024


@dataclasses.dataclass(frozen=True)
class Question:
  """What somebody has; the field names are the flags of slm.advise."""

  params: float  # that may be served
  pretrain_flops: float  # once
  specialise_flops: float  # for every domain
  domain_tokens: float
  domains: int = 1
  large_params: float = 0.0  # of a larger model that could be served too


@dataclasses.dataclass(frozen=True)
class Cell:
  """A measured average over domains: a method at one budget and set size."""

  study: str
  method: str
  label: str
  params: float  # served
  domain_tokens: float
  generic_flops: float  # once
  specialise_flops: float  # for every domain
  loss: float  # nats per token
  half: float  # half the 95 % interval of the difference to the plain SLM; 0: not known
  seeds: int
  better: int  # domains on which it clearly beats the plain SLM
  domains: int

  def cost(self, domains: int = 1) -> float:
    """Return the FLOPs for some domains."""
    return self.generic_flops + domains * self.specialise_flops

  def scaled(self, ratio: float) -> 'Cell':
    """Return what the cell stands for at `ratio` times the parameters."""
    flops = {k: getattr(self, k) * ratio**2 for k in ('generic_flops', 'specialise_flops')}
    more = {k: getattr(self, k) * ratio for k in ('params', 'domain_tokens')}
    return dataclasses.replace(self, **flops, **more)


def read(path: Path) -> list[Cell]:
  """Read measured cells.

  Raises:
    ValueError: if there is no such file, or it is not such a table.
  """
  if not path.is_file():
    raise ValueError(f'{path}: no such file; expected a table of measured cells')
  fields = {f.name: f.type for f in dataclasses.fields(Cell)}
  with path.open(newline='') as f:
    reader = csv.DictReader(f)
    if reader.fieldnames != list(fields):
      raise ValueError(
        f'{path}: expected the columns {", ".join(fields)}; '
        'python -m experiments.specialise.measured makes them of a results.csv'
      )
    try:
      cells = [Cell(**{k: fields[k](v) for k, v in line.items()}) for line in reader]
    except (TypeError, ValueError) as e:
      raise ValueError(f'{path}: line {reader.line_num}: {e}') from None
  if not all(any(c.method == BASELINE for c in group) for group in by_study(cells).values()):
    raise ValueError(f'{path}: holds a study without the plain SLM ({BASELINE}) to compare with')
  return cells


def by_study(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
  """Group cells by study."""
  groups: dict[str, list[Cell]] = {}
  for cell in cells:
    groups.setdefault(cell.study, []).append(cell)
  return groups


@dataclasses.dataclass(frozen=True)
class Placed:
  """A method's cell nearest to the question, at the question's size, and why it is out."""

  cell: Cell
  out: str  # '': it fits


def place(cells: Iterable[Cell], q: Question) -> list[Placed]:
  """Place one study's methods beside a question: those that fit by loss, then the others by cost.

  The set size is the measured one nearest to the question's. Of a method's budgets the largest
  that can be paid is taken, else the cheapest.
  """
  cells = list(cells)
  ratio = q.params / _baseline(cells)[0].params
  methods: dict[str, list[Cell]] = {}
  for cell in cells:
    methods.setdefault(cell.method, []).append(cell.scaled(ratio))
  apart = lambda tokens: abs(math.log(tokens / q.domain_tokens))
  tokens = min({c.domain_tokens for c in methods[BASELINE]}, key=apart)
  placed = [_placed(group, tokens, q) for group in methods.values()]
  return sorted(placed, key=lambda p: (bool(p.out), p.cell.cost() if p.out else p.cell.loss))


def _placed(group: list[Cell], tokens: float, q: Question) -> Placed:
  at_size = [c for c in group if math.isclose(c.domain_tokens, tokens)]
  affordable = [c for c in at_size if not _over(c, q)]
  cell = max(affordable, key=Cell.cost) if affordable else min(at_size or group, key=Cell.cost)
  reasons = _over(cell, q)
  if cell.params > max(_OVER * q.params, _BEYOND * q.large_params):
    reasons.insert(0, f'serves {count(cell.params)} parameters')
  if not at_size:
    reasons.insert(0, f'not measured with {count(tokens)} tokens of domain text')
  return Placed(cell, '; '.join(reasons))


def _over(cell: Cell, q: Question) -> list[str]:
  """List the budgets of a question that a cell exceeds."""
  return [
    f'takes {number(flops)} FLOPs {when}, {number(limit)} are there'
    for flops, limit, when in (
      (cell.generic_flops, q.pretrain_flops, 'once'),
      (cell.specialise_flops, q.specialise_flops, 'per domain'),
    )
    if flops > _OVER * limit
  ]


def choose(placed: Iterable[Placed], domains: int = 1) -> tuple[Cell | None, str]:
  """Choose among the cells that fit; say how sure that is.

  The plain SLM, unless another clearly has a lower loss; of those that cannot be told from the best
  the cheapest, if that halves the cost.
  """
  fits = [p.cell for p in placed if not p.out]
  base = next((c for c in fits if c.method == BASELINE), None)
  if base is None:
    return (fits[0], 'of what fits the lowest loss') if fits else (None, 'nothing measured fits')
  clear = [c for c in fits if base.loss - c.loss > max(c.half, _MATTERS)]
  if not clear:
    return base, f'nothing that fits is clearly better, by {_MATTERS:g} nats/token or more'
  best = clear[0]
  ties = [c for c in clear[1:] if c.loss - best.loss <= max(c.half, best.half)]
  cheaper = [c for c in ties if c.cost(domains) < best.cost(domains) / 2]
  chosen = min(cheaper, key=lambda c: c.cost(domains), default=best)
  if chosen.seeds >= 3 and chosen.better == chosen.domains:
    how = 'better on every domain and in every seed measured'
  else:
    share = f'clearly better on {chosen.better} of {chosen.domains} domains' * bool(chosen.half)
    how = f'likely: {share or "measured without an interval"}, {_seeds(chosen)}'
  if chosen is not best:
    ratio = times(best.cost(domains) / chosen.cost(domains))
    how += f'; {best.label} may be a little better at {ratio} its cost'
  return chosen, how


def limits(cells: Iterable[Cell], q: Question) -> list[str]:
  """Name what of a question lies outside of what a study measured, in the question's units."""
  cells = _baseline(cells)
  own = cells[0].params
  texts, paid = (
    [getattr(c.scaled(q.params / own), key) for c in cells]
    for key in ('domain_tokens', 'generic_flops')
  )
  most = max(q.pretrain_flops, q.specialise_flops)  # one of both pays for a pretraining
  hit = []
  for flag, reaches, exceeds, low, high, write in (
    ('params', q.params * _SIZES, q.params / _SIZES, own, own, count),
    ('domain_tokens', q.domain_tokens * _BEYOND, q.domain_tokens / _BEYOND, *_ends(texts), count),
    ('pretrain_flops', most * _OVER, q.pretrain_flops / _BEYOND, *_ends(paid), number),
  ):
    if reaches < low or exceeds > high:
      at = f' at {count(q.params)} parameters' * (flag != 'params')
      span = write(low) if low == high else f'{write(low)} to {write(high)}'
      hit.append(f'--{flag}={getattr(q, flag):g}, measured{at}: {span}')
  return hit


def _ends(values: list[float]) -> tuple[float, float]:
  return min(values), max(values)


def nearest(studies: dict[str, list[Cell]], q: Question) -> str:
  """Choose the study with the fewest limits hit, then the one nearest in size and budget."""

  def apart(name: str) -> tuple[int, float]:
    base = _baseline(studies[name])
    ratio = q.params / base[0].params
    reach = max(c.generic_flops for c in base) * ratio**2
    budget = max(q.pretrain_flops, q.specialise_flops, 1.0)
    return len(limits(base, q)), abs(math.log(ratio)) + abs(math.log(budget / reach))

  return min(studies, key=apart)


def _baseline(cells: Iterable[Cell]) -> list[Cell]:
  return [c for c in cells if c.method == BASELINE]


def _seeds(cell: Cell) -> str:
  return f'{cell.seeds} seed{"s" * (cell.seeds > 1)}'


def table(placed: Iterable[Placed], domains: int) -> Table:
  """Build a line per method: its gain and costs at the question's size, and whether it fits."""
  placed = list(placed)
  base = next(p.cell for p in placed if p.cell.method == BASELINE)
  head = ['method', 'nats/token to the SLM', 'served', 'domain text', 'FLOPs once']
  head += ['FLOPs/domain', f'cost, N = {domains}', 'seeds', 'fits?']
  rows = []
  for p in placed:
    c = p.cell
    gap = f'{c.loss - base.loss:+.3f}' + (f' ± {c.half:.3f}' if c.half else '')
    same = math.isclose(c.domain_tokens, base.domain_tokens)
    rows.append([
      c.label, f'loss {c.loss:.3f}' if c is base else gap if same else '–', count(c.params),
      count(c.domain_tokens), number(c.generic_flops), number(c.specialise_flops),
      times(c.cost(domains) / base.cost(domains)), str(c.seeds), p.out or 'yes',
    ])  # fmt: skip
  return head, rows


def advise(cells: Iterable[Cell], q: Question, effective: float = 0.0) -> tuple[str, Table]:
  """Return what to use and how sure that is, in a paragraph, and the table it comes from.

  effective: how widely the domain is spread over clusters, as a share of generic text's spread.
  """
  studies = by_study(cells)
  name = nearest(studies, q)
  hit, placed = limits(studies[name], q), place(studies[name], q)
  own = _baseline(studies[name])[0].params
  chosen, how = choose(placed, q.domains)
  lines = [f'Outside of what was measured: {"; ".join(hit)}. By the nearest cells:'] if hit else []
  lines.append(f'Use {chosen.label} ({how}).' if chosen else f'No advice: {how}.')
  lines.append(
    f'The table holds the nearest cells of the study {name!r}, of {count(own)} parameters, scaled '
    f'to {count(q.params)}: {times(q.params / own)} the text, {times((q.params / own) ** 2)} the '
    'FLOPs. They were measured on other text than yours.'
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
