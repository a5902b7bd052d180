"""What a study's numbers mean for someone who must choose, in plain words."""

import math

from experiments.specialise.cells import Cell, Comparison
from experiments.specialise.study import BASELINE
from slm.base import files
from slm.reporting.stats import Difference, difference
from slm.reporting.tables import count, perplexity, times

NUM_DOMAINS = (1, 7, 50)
_MATTERS = 0.02  # nats per token, the smallest effect the paper's table rests on


def advise(c: Comparison) -> list[str]:
  """Write the advice: the conclusion first, then the reasons, one sentence or two each."""
  winners = {size: _winner(c, size) for size in c.study.sizes}
  known = {size: w for size, w in winners.items() if w is not None}
  if not known:
    return ['There is nothing to compare yet: the plain SLM has not been run and evaluated.']
  lines = [_headline(c, known)]
  lines += [_size(c, size, winner) for size, winner in known.items()]
  lines += _large(c, known)
  lines += _domains(c, known)
  lines += _exceptions(c, known)
  lines += _improving(c, known)
  lines += [_seeds(c, known)]
  if c.study.scale == 'quick':
    lines.append(
      'This is the quick scale: it shows how the comparison works; models this small and runs '
      'this short are no ground for a decision.'
    )
  return lines


def _winner(c: Comparison, size: int) -> Cell | None:
  """Return the best small cell if it beats the plain SLM, else the plain SLM; None if not run."""
  base = c.cells.get((BASELINE, size))
  if base is None or not base.complete:
    return None
  better = (x for x, d in _rivals(c, size) if d.verdict == 'better')
  return next(better, base)


def _rivals(c: Comparison, size: int) -> list[tuple[Cell, Difference]]:
  """List the other small cells with their differences to the plain SLM, lowest loss first."""
  pairs = ((cell, c.to_baseline(cell)) for cell in c.ranked(size, 'small'))
  return [(cell, d) for cell, d in pairs if d is not None]


def _headline(c: Comparison, winners: dict[int, Cell]) -> str:
  chosen = {w.method for w in winners.values()}
  if chosen == {BASELINE}:
    rivals = [pair for size in winners for pair in _rivals(c, size)]
    if not rivals and any(len(c.ranked(size, 'small')) > 1 for size in winners):
      return 'No other small model was run with a seed of the plain SLM: nothing to compare it to.'
    if not rivals:
      return 'Only the plain SLM has been run among the small models: nothing to compare it with.'
    start = 'No small model was shown to be better than the plain SLM'
    bases = {size: c.cells[BASELINE, size] for size in winners}
    open_ = [cell for cell, d in rivals if d.verdict != 'worse']
    if any(x.total(1) is None for x in (*open_, *bases.values())):
      return f'{start}; it is the simplest, so ship it.'
    cheaper = {
      n: [x for x in open_ if x.total(n).flops < bases[x.size].total(n).flops] for n in NUM_DOMAINS
    }
    if not any(cheaper.values()):
      which = ' of those not shown to be worse' if len(open_) < len(rivals) else ''
      return f'{start}; it is the cheapest{which}, so ship it.'
    found = {f'{_at(c, x)}, N = {n}': None for n, cells in cheaper.items() for x in cells}
    return (
      f'{start}; it is the simplest, so ship it. Not shown to be worse and cheaper to train for N '
      f'domains: {"; ".join(found)}.'
    )
  if len(chosen) == 1:
    tied = any(_ties(c, w) for w in winners.values())
    what = 'no small model was shown to be better' if tied else (
      'of the small models shown to beat the plain SLM it is the best'
    )  # fmt: skip
    return f'Use {c.study.label(*chosen)}: {what}{_everywhere(winners)}.'
  what = lambda w: 'none' if w.method == BASELINE else _name(c, w)
  parts = [f'with {count(size)} tokens {what(w)}' for size, w in winners.items()]
  return (
    'Which small model is shown to beat the plain SLM, and best, depends on how much domain text '
    f'there is: {"; ".join(parts)}.'
  )


def _everywhere(winners: dict[int, Cell]) -> str:
  if len(winners) == 1:
    return f' with {count(*winners)} tokens of domain text'
  return ' at every set size'


def _size(c: Comparison, size: int, winner: Cell) -> str:
  start = f'With {count(size)} tokens of domain text'
  if winner.method == BASELINE:
    rivals = _rivals(c, size)
    ppl = f'perplexity {perplexity(winner.average)}'
    if not rivals:
      return f'{start}, the plain SLM reaches {ppl}.'
    nearest, gap = rivals[0]
    text = (
      f'{start}, no small model was shown to beat the plain SLM ({ppl}); the nearest is '
      f'{_name(c, nearest)} ({_gap(gap)}).'
    )
    low = min(d.low for _, d in rivals)
    if low < -_MATTERS:
      text += (
        f' A gain of up to {-low:.3f} nats/token is not excluded: more held-out text or more seeds '
        'would settle it.'
      )
    return text
  base, gain = c.cells[BASELINE, size], c.to_baseline(winner)
  text = (
    f'{start}, {_name(c, winner)} has perplexity {perplexity(winner.average)} instead of '
    f'{perplexity(base.average)} for the plain SLM ({_gap(gain)}).'
  )
  one, plain = winner.total(1), base.total(1)
  if one and plain and plain.flops:
    text += (
      f' Training it for one domain takes {_flops(one.flops)}, '
      f'{_times_plain(one.flops / plain.flops)}.'
    )
  ties = _ties(c, winner)
  if ties:
    names = ' and '.join(_name(c, t) for t in ties)
    text += f' {names} cannot be told from it: the difference is within its interval.'
  unsure = [cell for cell, d in _rivals(c, size) if d.verdict == 'within noise']
  if lower := [x for x in unsure if x.average.value < winner.average.value]:
    names = ' and '.join(f'{_name(c, x)} ({perplexity(x.average)})' for x in lower)
    text += f' Lower still, but within noise of the plain SLM: {names}.'
  return text


def _ties(c: Comparison, winner: Cell) -> list[Cell]:
  """List the other small cells that beat the plain SLM and cannot be told from the winner."""
  return [
    cell
    for cell in c.ranked(winner.size, 'small')
    if cell is not winner
    and (apart := difference(cell.average, winner.average)) is not None
    and apart.verdict == 'within noise'
    and (found := c.to_baseline(cell)) is not None
    and found.verdict == 'better'
  ]


def _times_plain(ratio: float) -> str:
  return 'as much as the plain SLM' if 0.95 < ratio < 1.05 else f'{times(ratio)} the plain SLM'


def _large(c: Comparison, winners: dict[int, Cell]) -> list[str]:
  lines = []
  for method in [m for m in c.study.methods if c.study.kind(m) == 'large']:
    cells = {s: c.cells[method, s] for s in winners if c.cells[method, s].complete}
    pairs = {s: difference(cell.average, winners[s].average) for s, cell in cells.items()}
    found = {s: d for s, d in pairs.items() if d is not None}
    if not found:
      continue
    groups = {v: [s for s in found if found[s].verdict == v] for v in _LARGE}
    label = c.study.label(method)
    parts = [
      f'{_LARGE[verdict]} the best small model with '
      + _listed([f'{count(s)} tokens ({_gap(found[s])})' for s in sizes])
      for verdict, sizes in groups.items()
      if sizes
    ]
    serving = _serving(c, [(cells[s], winners[s]) for s in found])
    lines.append(f'{label} {"; it ".join(parts)}.{serving}')
  return lines


_LARGE = {
  'better': 'is better than',
  'within noise': 'cannot be told from',
  'worse': 'is worse than',
}


def _serving(c: Comparison, pairs: list[tuple[Cell, Cell]]) -> str:
  """Say what a large model takes beside the best small one, as a range where sizes differ."""
  params, text = c.study.params, ''
  if all(x.method in params for pair in pairs for x in pair):
    sizes = sorted({params[small.method] for _, small in pairs})
    large = params[pairs[0][0].method]
    text = (
      f' Serving it takes {_range([large / n for n in sizes])} the parameters ({count(large)} '
      f'instead of {" or ".join(map(count, sizes))})'
    )
    costs = [(large.total(1), small.total(1)) for large, small in pairs]
    if all(a and b and b.flops for a, b in costs):
      ratio = _range([a.flops / b.flops for a, b in costs])
      text += f' and training it for one domain {ratio} the FLOPs'
      text += ', depending on the set size' if ' to ' in ratio else ''
    text += '.'
  return text


def _range(ratios: list[float]) -> str:
  """Format ratios as their range: 1.5×, 1.5× to 1.9×."""
  return ' to '.join(dict.fromkeys(times(x) for x in (min(ratios), max(ratios))))


def _domains(c: Comparison, winners: dict[int, Cell]) -> list[str]:
  """Say what N domains change, at the smallest size where something beats the plain SLM."""
  size = next((s for s, w in winners.items() if w.method != BASELINE), next(iter(winners)))
  base = c.cells[BASELINE, size]
  better = [
    cell
    for cell in c.ranked(size, 'small')
    if (found := c.to_baseline(cell)) and found.verdict == 'better' and cell.total(1)
  ]
  if base.total(1) is None:
    return []
  many = _listed([str(n) for n in NUM_DOMAINS])
  if not better:
    costs = _listed([_flops(base.total(n).flops) for n in NUM_DOMAINS])
    return [
      f'For {many} domains ({count(size)} tokens each) the plain SLM costs {costs} to train, '
      'generic training included.'
    ]
  ratios = [
    f'{_name(c, cell)} '
    + ', '.join(times(cell.total(n).flops / base.total(n).flops) for n in NUM_DOMAINS)
    for cell in better
  ]
  text = (
    f'For {many} domains ({count(size)} tokens each), training costs this much of what the plain '
    f'SLM costs: {"; ".join(ratios)}.'
  )
  cheapest = {n: min(better, key=lambda x: x.total(n).flops) for n in NUM_DOMAINS}
  few, last = cheapest[NUM_DOMAINS[0]], cheapest[NUM_DOMAINS[-1]]
  if few is not last:
    text += (
      f' {_name(c, few)} is the cheapest of these for one domain, but {_name(c, last)} is cheaper '
      f'from N = {crossing(few, last)}.'
    )
  elif len(better) > 1:
    text += f' {_name(c, last)} is the cheapest of these whatever the number of domains.'
  if last is not better[0]:
    kept = c.to_baseline(last).value / c.to_baseline(better[0]).value
    text += f' {_name(c, last)} keeps {kept:.0%} of the best gain.'
  return [text]


def crossing(few: Cell, many: Cell) -> int:
  """Find the number of domains from which `many` costs less than `few`, which is cheaper at 1."""
  fixed = many.generic.flops - few.generic.flops
  each = few.specialise.flops - many.specialise.flops
  return math.floor(fixed / each) + 1


def _exceptions(c: Comparison, winners: dict[int, Cell]) -> list[str]:
  """Name the domains where the advised model is worse than the plain SLM."""
  found = [
    f'{test.partition("/")[0]} ({count(size)} tokens)'
    for size, winner in winners.items()
    for test in c.tests
    if (d := c.to_baseline(winner, test)) and d.verdict == 'worse'
  ]
  if not found:
    return []
  return [f'The average hides an exception: the plain SLM is better on {_listed(found)}.']


def unfinished(c: Comparison) -> list[tuple[str, int]]:
  """List methods and sizes with a tuned run whose held-out loss was lowest at its last step."""
  found: dict[tuple[str, int], None] = {}
  for run in c.study.runs:
    path = c.study.path / run['run']
    if not run['domain'] or not (path / 'result.json').exists():
      continue
    config, result = files.read_json(path / 'config.json'), files.read_json(path / 'result.json')
    last = result['steps'] if config['phase'] in _TUNED else None
    if last and result.get('best_step') == last == config.get('steps', last):
      sizes = c.study.sizes if run['size'] is None else [run['size']]
      found |= dict.fromkeys((run['method'], size) for size in sizes)
  return list(found)


_TUNED = ('finetune', 'distill')


def listed_cells(c: Comparison, cells: list[tuple[str, int]]) -> str:
  """List methods with the set sizes at which they are: SLM (20k and 80k tokens)."""
  sizes = {m: [count(s) for n, s in sorted(cells) if n == m] for m in c.study.methods}
  return '; '.join(f'{c.study.label(m)} ({_listed(x)} tokens)' for m, x in sizes.items() if x)


def _improving(c: Comparison, winners: dict[int, Cell]) -> list[str]:
  """Name the runs that the advice draws on and that training longer might still have helped."""
  found = [k for k in unfinished(c) if k[1] in winners and c.cells[k].complete]
  if not found:
    return []
  return [
    'Some tuned models were still improving when they ended, so that training longer may change '
    f'how they compare: {listed_cells(c, found)}.'
  ]


def _seeds(c: Comparison, winners: dict[int, Cell]) -> str:
  cells = [cell for cell in c.cells.values() if cell.complete]
  single = [(cell.method, cell.size) for cell in cells if len(cell.average.seeds) == 1]
  most = max(len(_rivals(c, s)) for s in winners)
  text = 'Intervals cover the choice of held-out text'
  if len(single) < len(cells):
    text += ' and, over several seeds, how much training runs vary'
  if single:
    which = '' if len(single) == len(cells) else f' ({listed_cells(c, single)})'
    text += (
      f'; with one seed{which} how much a training run varies is not in them, so a difference near '
      'the edge of its interval may not repeat'
    )
  text += '.'
  if most > 1:
    text += (
      f' The best of {most + 1} small models is picked after looking at the same text, which '
      'flatters it; intervals do not allow for that.'
    )
  return text


def _at(c: Comparison, cell: Cell) -> str:
  return f'{_name(c, cell)} ({count(cell.size)} tokens)'


def _name(c: Comparison, cell: Cell) -> str:
  return 'the plain SLM' if cell.method == BASELINE else c.study.label(cell.method)


def _gap(d: Difference) -> str:
  """Say a difference with its interval: without a sign where it is clear."""
  if d.verdict == 'within noise':
    text = f'{d.value:+.3f} nats/token, 95 % interval {d.low:+.3f} to {d.high:+.3f}'
    return text.replace('-', '−')
  ends = sorted((abs(d.low), abs(d.high)))
  side = 'lower' if d.value < 0 else 'higher'
  return f'{abs(d.value):.3f} nats/token {side}, 95 % interval {ends[0]:.3f} to {ends[1]:.3f}'


def _listed(parts: list[str]) -> str:
  return parts[0] if len(parts) == 1 else f'{", ".join(parts[:-1])} and {parts[-1]}'


def _flops(n: float) -> str:
  """Format floating-point operations: 3.1e15 FLOPs."""
  return f'{n:.1e} FLOPs'.replace('e+', 'e')
