"""Which method for a budget: from measured studies, and beyond them from the paper's own table.

    python -m slm.advise --params=126e6 --pretrain_flops=2e19 --specialise_flops=1e16 \
      --domain_tokens=1e6 --domains=7

Studies of small models speak for larger ones, up to ten times, by what is counted per served
parameter: tokens of domain text, and training FLOPs as the tokens per parameter that the plain SLM
would see for them.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from slm.reporting.points import BASELINE, Budget, Point, Want
from slm.reporting.tables import count, times

_RESULTS = Path(__file__).parents[2] / 'experiments' / 'specialise' / 'results'
# The committed studies that are large enough to go by.
STUDIES = tuple(_RESULTS / name / 'results.csv' for name in ('cpu', 'long'))
_BEYOND = 1.5  # how far outside of what was measured a number still counts as measured
_OVER = 1.05  # how much of a budget a method that fits may take
_SIZES = 10  # how many times larger or smaller a model than the measured one is still like it
_LEAST, _MOST = 100, 1  # tokens per parameter of training and of domain text: the paper's reach
_MATTERS = 0.02  # nats per token, the smallest effect the paper's table rests on
_WIDE = 0.25  # of the clusters; the paper's Wikipedia and OpenWebText2 have 281 and 455 of 1024
WINDOWS = 30  # of domain text, the fewest that say how widely it is spread
_SAME = 0.1  # of the logarithm: nearer than this to a measured value is that value

# Grangier et al., Table 8: nats per token above the plain SLM, by its tokens per parameter and by
# tokens of domain text per parameter (1M, 8M and 64M tokens for 126M parameters). Their 100, 200,
# 400 and 600 A100-hours; the last is beside the SLM of 530, their longest.
_PAPER_PARAMS = 126e6
_PAPER_TEXT = (0.008, 0.063, 0.51)
_TABLE_8 = {
  360: {'SLM-pn': (-0.039, -0.002, 0.013), 'SLM-mix': (0.026, 0.013, 0.020)},
  722: {'SLM-pn': (-0.045, -0.011, 0.003), 'SLM-mix': (-0.005, -0.009, 0.005)},
  1440: {'SLM-pn': (-0.059, -0.022, -0.012), 'SLM-mix': (-0.037, -0.026, -0.013)},
  2160: {'SLM-pn': (-0.071, -0.035, -0.022), 'SLM-mix': (-0.058, -0.041, -0.023)},
}


@dataclasses.dataclass(frozen=True)
class Option:
  """A method at somebody's budget: its interpolated loss, and the measured points used."""

  method: str
  label: str
  loss: float
  half: float  # half the interval of its difference to the SLM, the widest of the points
  seeds: int
  better: float  # the share of domains on which it clearly beats the SLM, the least of the points
  points: tuple[Point, ...]
  cost: float  # for all domains, in tokens per parameter


def options(points: Iterable[Point], want: Want) -> list[Option]:
  """Interpolate every method that fits the budgets, lowest loss first.

  Linear in log cost and log tokens of domain text. A method's own budget is the wanted one of the
  kind it spends; one measured only above it, or beyond the measured set sizes, is left out.
  """
  by_method: dict[str, list[Point]] = {}
  for p in points:
    by_method.setdefault(p.method, []).append(p)
  found = [_option(method, mine, want) for method, mine in by_method.items()]
  return sorted((o for o in found if o is not None), key=lambda o: o.loss)


def _option(method: str, points: list[Point], want: Want) -> Option | None:
  if points[0].params > 1.05 and not 0.5 < want.large / points[0].params < 2:
    return None
  once = points[0].pretrain >= points[0].specialise
  by_text: dict[float, list[Point]] = {}
  for p in sorted(points, key=lambda p: (p.text, p.budget)):
    by_text.setdefault(p.text, []).append(p)
  placed = _between(list(by_text), want.text)
  if placed is None:
    return None
  i, j, share = placed
  curves = list(by_text.values())
  low, high = (_along(curves[k], want, once) for k in (i, j))
  if low is None or high is None:
    return None
  mean = lambda k: (1 - share) * low[k] + share * high[k]
  used = low[1] if i == j else (*low[1], *high[1])
  half = max(((p.high - p.low) / 2 for p in used if not math.isnan(p.low)), default=0.0)
  loss, cost = mean(0), mean(2) + want.domains * mean(3)
  better = min(p.better / max(p.domains, 1) for p in used)
  seeds = min(p.seeds for p in used)
  return Option(method, points[0].label, loss, half, seeds, better, used, cost)


def _along(
  curve: list[Point], want: Want, once: bool
) -> tuple[float, tuple[Point, ...], float, float] | None:
  """Find (loss, points, generic cost, cost per domain) on one set size's curve over budgets."""
  spent = [p.pretrain if once else p.specialise for p in curve]
  limit, other = (want.pretrain, want.specialise) if once else (want.specialise, want.pretrain)
  if spent[0] > _OVER * limit:
    return None
  if limit >= spent[-1]:
    i, j, share = len(curve) - 1, len(curve) - 1, 0.0  # more was not measured
  else:
    i, j, share = _between(spent, max(limit, spent[0]))
  a, b = curve[i], curve[j]
  mean = lambda x, y: (1 - share) * x + share * y
  cost = lambda x, y: x ** (1 - share) * y**share if x and y else mean(x, y)
  costs = cost(a.pretrain, b.pretrain), cost(a.specialise, b.specialise)
  if costs[1 if once else 0] > _OVER * other:
    return None
  return mean(a.loss, b.loss), (a, b) if i != j else (a,), *costs


def _between(values: list[float], x: float) -> tuple[int, int, float] | None:
  """Place x among ascending values: neighbours and the share of the upper one, in logarithms."""
  if x < values[0] / _BEYOND or x > values[-1] * _BEYOND:
    return None
  x = min(max(x, values[0]), values[-1])
  x = next((v for v in values if abs(math.log(v / x)) < _SAME), x)
  j = int(np.searchsorted(values, x))
  if values[j] == x:
    return j, j, 0.0
  low, high = values[j - 1], values[j]
  return j - 1, j, math.log(x / low) / math.log(high / low)


def nearest(studies: dict[str, list[Point]], budget: Budget) -> str | None:
  """Choose the study that measured the plain SLM nearest to what is wanted, if one did."""
  found = {}
  for name, points in studies.items():
    base = [p for p in points if p.method == BASELINE]
    want = budget.want(base[0].per_token)
    reach = max(p.pretrain for p in base)
    size = abs(math.log(budget.params / base[0].slm_params))
    near = size <= math.log(_SIZES) and want.pretrain <= _BEYOND * reach
    if near and _option(BASELINE, base, want) is not None:
      found[name] = size + abs(math.log(want.pretrain / reach))
  return min(found, key=found.get) if found else None


def measured(points: list[Point], want: Want) -> tuple[list[Option], Option | None, str]:
  """Return the options, the advised one, and how sure that is."""
  found = options(points, want)
  base = next((o for o in found if o.method == BASELINE), None)
  shippable = [o for o in found if not o.method.endswith('_noft')]
  if base is None or not shippable:
    return found, None, 'nothing that was measured fits'
  clear = [o for o in shippable if base.loss - o.loss > max(o.half, _MATTERS)]
  if not clear and shippable[0] is not base:
    return found, base, (
      f'no method that fits is expected to gain more than its interval and {_MATTERS:g} nats/token '
      'over the plain SLM, so the simplest'
    )  # fmt: skip
  best = clear[0] if clear else base
  ties = [o for o in clear[1:] if o.loss - best.loss <= max(o.half, best.half)]
  cheaper = [o for o in ties if o.cost < best.cost / 2]
  chosen = min(cheaper, key=lambda o: o.cost, default=best)
  if chosen is base:
    return found, base, 'nothing that fits was measured to be better'
  sure = chosen.seeds >= 3 and chosen.better == 1
  how = 'better on every domain and in every seed measured' if sure else (
    f'likely: clearly better on {chosen.better:.0%} of the domains measured, '
    f'{chosen.seeds} seed{"s" * (chosen.seeds > 1)}'
  )  # fmt: skip
  if chosen is not best:
    how += f'; {best.label} may be a little better at {times(best.cost / chosen.cost)} its cost'
  return found, chosen, how


def table_of_the_paper(want: Want, effective: float) -> str:
  """Give the advice of Grangier et al. (Figure 1 and Table 8), in tokens per served parameter.

  Their 100 A100-hours of the 126M model are 360 tokens per parameter; thresholds between their rows
  are our reading.
  """
  alone = want.specialise >= _LEAST and (want.domains <= 10 or want.pretrain < _LEAST)
  spent = max(want.pretrain, want.specialise)
  if want.text > _MOST or not _LEAST <= spent <= 10 * max(_TABLE_8):
    return (
      'I do not know: the paper has no model with more than half a token of domain text per '
      'parameter, nor one trained on less than 360 or more than about 2,000 tokens per parameter '
      f'(its advice is stretched to {_MOST:g} token of text, and from {_LEAST:g} to '
      f'{10 * max(_TABLE_8):,} of training).'
    )
  if want.large and not (alone and want.text < 0.02):
    return 'The LLM, pretrained and fine-tuned: best wherever it may be served (Table 4).'
  if alone:
    return 'SLM-is: the best small model for a single domain, paid once per domain (Fig. 4, 6).'
  if effective > _WIDE:
    return (
      f'The plain SLM: the domain is spread {effective:.0%} as widely as generic text, and on the '
      'two that spread so far neither SLM-pn nor SLM-mix beat it (Appendix E).'
    )
  if want.pretrain < 300:
    return 'The plain SLM: the paper tries no shared method below 360 tokens per parameter.'
  row = min(_TABLE_8, key=lambda n: abs(math.log(want.pretrain / n)))
  column = min(range(3), key=lambda i: abs(math.log(want.text / _PAPER_TEXT[i])))
  gaps = {method: values[column] for method, values in _TABLE_8[row].items()}
  best = min(gaps, key=gaps.get)
  numbers = ', '.join(f'{method} {gap:+.3f}' for method, gap in gaps.items())
  where = (
    f'beside the SLM at {row} tokens per parameter and {_PAPER_TEXT[column]:g} of domain text '
    f'(Table 8: {numbers} nats/token)'
  )
  if gaps[best] > -_MATTERS:
    return f'The plain SLM: nothing shared gains {_MATTERS:g} nats/token {where}.'
  return f'{best}, most frequent cluster: the best shared method {where}.'


def advise(studies: dict[str, list[Point]], budget: Budget, effective: float = 0.0) -> list[str]:
  """Write the advice: what to use and how sure that is, then the numbers it comes from.

  effective: how widely the domain is spread over clusters, as a share of generic text's spread.
  """
  name = nearest(studies, budget)
  if name is None:
    start = 'Outside of what was measured; by the paper, not by measurement here:'
    if not 1 / _SIZES <= budget.params / _PAPER_PARAMS <= _SIZES:
      start = (
        f'I do not know: this was measured neither here nor, with models near '
        f"{count(budget.params)} parameters, in the paper. Stretched from the paper's "
        f'{count(_PAPER_PARAMS)}:'
      )
    return [start, table_of_the_paper(budget.want(), effective), _ranges(studies)]
  points = studies[name]
  want = budget.want(points[0].per_token)
  found, chosen, how = measured(points, want)
  if chosen is None:
    return [f'I do not know: {how}.', _ranges(studies)]
  base = next(o for o in found if o.method == BASELINE)
  lines = [f'Use {chosen.label} ({how}).']
  lines.append(
    f'From the study {name!r} of {count(points[0].slm_params)} parameters, interpolated in log '
    f'FLOPs and log tokens; asked about are {want.pretrain:.3g} tokens per parameter of '
    f'pretraining and {want.text:.3g} of domain text:'
  )
  for o in found:
    gap = f'{o.loss - base.loss:+.3f} ± {o.half:.3f}' if o is not base else f'loss {o.loss:.3f}'
    near = '; '.join(f'{count(p.size)} tokens at {p.budget:.3g} tokens/parameter' for p in o.points)
    lines.append(
      f'  {o.label:32} {gap:18} cost {times(o.cost / base.cost):>6} of the SLM, '
      f'{o.seeds} seed{"s" * (o.seeds > 1)}, from {near}'
    )
  reach = max(p.pretrain for p in points if p.method == BASELINE)
  if want.pretrain > _OVER * reach:
    lines.append(f'No more than {reach:.3g} was measured: what the rest would give is not known.')
  if effective > _WIDE and chosen.method in ('project', 'mixture'):
    lines.append(
      f'But the domain is spread {effective:.0%} as widely as generic text, where one cluster says '
      'little: compare with the plain SLM before relying on it.'
    )
  lines.append(
    'Measured on models of other sizes and other text: what carries over is counted per parameter.'
  )
  return lines


def _ranges(studies: dict[str, list[Point]]) -> str:
  parts = []
  for name, points in studies.items():
    base = [p for p in points if p.method == BASELINE]
    reach = lambda values: f'{min(values):.3g} to {max(values):.3g}'
    parts.append(
      f'{name}: {count(base[0].slm_params)} parameters, {reach([p.pretrain for p in base])} tokens '
      f'per parameter of pretraining and {reach([p.text for p in base])} of domain text'
    )
  return f'Measured: {"; ".join(parts) or "nothing"}.'
