"""Figures of a study: one colour and marker per method, drawn for light and dark pages."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.specialise.advice import NUM_DOMAINS
from experiments.specialise.cells import Cell, Comparison
from experiments.specialise.study import BASELINE, Study
from slm.base import files
from slm.reporting import figures
from slm.reporting.figures import INK, RC, Plot, curves, save
from slm.reporting.tables import count, perplexity

# Okabe and Ito's palette, safe for colour-blind readers; ink and greys for the reference rows.
_STYLE = {
  'slm': (INK, 'o'),
  'slm_noft': ('#7d838f', 'x'),
  'slm_nopt': ('#a1a7b3', '+'),
  'importance': ('#d55e00', 's'),
  'distill': ('#56b4e9', 'v'),
  'mixture': ('#009e73', 'D'),
  'project': ('#0a7ac2', '^'),
  'llm': ('#cc79a7', 'P'),
}
_FURTHER = (('#e69f00', 'h'), ('#b8a900', '*'), ('#8c6bb1', '<'), ('#8a5a3c', '>'))


def styles(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
  """Give every method its colour and marker; unknown ones take the spare ones in order."""
  spare = itertools.cycle(_FURTHER)
  return {m: _STYLE[m] if m in _STYLE else next(spare) for m in methods}


def plots(c: Comparison) -> list[Plot]:
  """Draw every figure the study has data for."""
  makers = (_perplexity, _loss_by_size, _loss_by_cost, _training, _clusters)
  with matplotlib.rc_context(RC):
    return [p for make in makers for p in [make(c)] if p is not None]


def _complete(c: Comparison) -> dict[str, dict[int, Cell]]:
  found = {
    m: {s: c.cells[m, s] for s in c.study.sizes if c.cells[m, s].complete} for m in c.study.methods
  }
  return {m: cells for m, cells in found.items() if cells}


def window(values: Iterable[float]) -> tuple[float, float]:
  """Choose loss limits that keep outliers (no pretraining, say) from hiding the rest."""
  values = np.sort(list(values))
  middle = np.median(values) - values[0]
  top = max(v for v in values if v - values[0] <= max(3 * middle, 0.05))
  margin = 0.08 * max(top - values[0], 0.02)
  return float(values[0] - margin), float(top + margin)


def _perplexity(c: Comparison) -> Plot | None:
  cells, style = _complete(c), styles(c.study.methods)
  if not cells:
    return None
  names, sizes = list(cells)[::-1], c.study.sizes
  width, height = 2.2 + 2.9 * len(sizes), 0.9 + 0.34 * len(names)
  figure = Figure((width, height), layout='constrained')
  axes = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
  for size, ax in zip(sizes, axes, strict=True):
    low, high = _with_intervals(c, [x[size] for x in cells.values() if size in x])
    base = c.cells.get((BASELINE, size))
    if base is not None and base.complete:
      ax.axvline(math.exp(base.average.value), color=INK, lw=0.9, ls=(0, (4, 3)))
    for y, name in enumerate(names):
      if size in cells[name]:
        _dot(ax, y, c, cells[name][size], style[name], (low, high))
    left, right = math.exp(low), math.exp(high)
    ax.set_xlim(left - 0.25 * (right - left), right + 0.25 * (right - left))  # room for labels
    ax.set_title(f'{count(size)} tokens of domain text')
    ax.set_xlabel('perplexity')
    ax.xaxis.set_major_locator(ticker.MaxNLocator(4))
    ax.grid(axis='x')
    ax.tick_params(axis='y', length=0)
    ax.spines['left'].set_visible(False)
  axes[0].set_yticks(range(len(names)), [c.study.label(n) for n in names])
  axes[0].set_ylim(-0.6, len(names) - 0.4)
  return save(
    figure,
    'perplexity',
    'Perplexity per method',
    'Left is better. Look for dots whose bar stays clear of the dashed line, the plain SLM: the '
    'bar is the paired 95 % interval of the difference to it. An arrow marks a value off the axis.',
  )


def _with_intervals(c: Comparison, cells: list[Cell]) -> tuple[float, float]:
  """Choose loss limits that hold the intervals of the cells inside them."""
  low, high = window(x.average.value for x in cells)
  shown = [x for x in cells if x.average.value <= high]
  ends = [
    x.average.value - d.value + e for x in shown if (d := c.to_baseline(x)) for e in (d.low, d.high)
  ]
  return min([low, *ends]), max([high, *ends])


def _dot(
  ax: Axes, y: int, c: Comparison, cell: Cell, style: tuple[str, str], window: tuple[float, float]
) -> None:
  value, (color, marker) = cell.average.value, style
  ppl, label = math.exp(value), perplexity(cell.average)
  if value > window[1]:
    edge = ax.get_yaxis_transform()
    ax.text(0.985, y, f'{label} →', transform=edge, color=color, ha='right', va='center')
    return
  found, end, side = c.to_baseline(cell), ppl, 1
  if found is not None:
    base = value - found.value
    ends = [math.exp(base + d) for d in (found.low, found.high)]
    ax.plot(ends, [y, y], color=color, lw=2.4, alpha=0.55, solid_capstyle='butt')
    # The label goes beyond the bar, away from the plain SLM's line.
    end, side = (min(*ends, ppl), -1) if found.value < 0 else (max(*ends, ppl), 1)
  ax.plot(ppl, y, marker, color=color, **marks(cell.method))
  ax.annotate(label, (end, y), (7 * side, 0), textcoords='offset points', color=color, va='center',
              ha='left' if side > 0 else 'right', fontsize=8)  # fmt: skip


def marks(method: str) -> dict[str, Any]:
  """Return how a method's marker is drawn."""
  # The reference is a ring, so that a method with the same loss shows inside it.
  return {'ms': 8, 'mew': 1.6, 'mfc': 'none'} if method == BASELINE else {'ms': 5.5, 'mew': 1.6}


def _loss_by_size(c: Comparison) -> Plot | None:
  cells, style = _complete(c), styles(c.study.methods)
  if not cells or len(c.study.sizes) < 2:
    return None
  figure = Figure((6.4, 3.8), layout='constrained')
  ax = figure.subplots()
  low, high = window(x.average.value for by_size in cells.values() for x in by_size.values())
  ends = []
  for name, by_size in cells.items():
    color, marker = style[name]
    values = [x.average.value for x in by_size.values()]
    ax.plot(list(by_size), values, marker=marker, color=color, lw=1.4, **marks(name))
    inside = [(s, v) for s, v in zip(by_size, values, strict=True) if v <= high]
    note = '' if len(inside) == len(values) else f' (first {values[0]:.2f} ↑)'
    if inside:
      ends.append((*inside[-1], c.study.label(name) + note, color))
    else:
      ends.append((list(by_size)[-1], high, f'{c.study.label(name)}: {values[-1]:.2f} ↑', color))
  ax.set_xscale('log')
  ax.set_ylim(low, high)
  _label_ends(ax, ends)
  ax.set_xticks(c.study.sizes, [count(s) for s in c.study.sizes])
  ax.minorticks_off()
  ax.set_xlabel('specialisation set, tokens per domain')
  ax.set_ylabel('loss, nats/token')
  ax.grid(axis='y')
  return save(
    figure,
    'loss-by-size',
    'Loss against set size',
    'Lower is better. Look at how the distance to the plain SLM shrinks or grows to the right, '
    'where there is more domain text.',
  )


def _label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
  """Write labels right of their lines' ends, pushed apart until none overlap."""
  low, high = ax.get_ylim()
  gap = 0.055 * (high - low)
  ends = sorted(ends, key=lambda e: e[1])
  heights = [e[1] for e in ends]
  for i in range(1, len(heights)):
    heights[i] = max(heights[i], heights[i - 1] + gap)
  over = max(heights[-1] - high, 0)
  for i in reversed(range(len(heights))):
    ceiling = heights[i + 1] - gap if i + 1 < len(heights) else high
    heights[i] = min(heights[i], ceiling) if over else heights[i]
  edge = ax.get_yaxis_transform()
  for (_, _, text, color), y in zip(ends, heights, strict=True):
    ax.text(1.015, y, text, transform=edge, color=color, va='center', fontsize=8.5)


def _loss_by_cost(c: Comparison) -> Plot | None:
  cells, style = _complete(c), styles(c.study.methods)
  points = {
    s: {m: x[s] for m, x in cells.items() if s in x and x[s].total(1)} for s in c.study.sizes
  }
  points = {s: x for s, x in points.items() if x}
  if not points:
    return None
  figure = Figure((2.9 * len(NUM_DOMAINS) + 0.4, 2.3 * len(points) + 0.7), layout='constrained')
  axes = figure.subplots(len(points), len(NUM_DOMAINS), sharey='row', sharex=True, squeeze=False)
  for row, (size, by_method) in zip(axes, points.items(), strict=True):
    low, high = window(x.average.value for x in by_method.values())
    for n, ax in zip(NUM_DOMAINS, row, strict=True):
      for name, cell in by_method.items():
        color, marker = style[name]
        y, cost = cell.average.value, cell.total(n).flops
        if y > high and cost > 0:
          above = {'transform': ax.get_xaxis_transform(), 'ls': ''}
          ax.plot([cost], [0.96], marker=r'$\uparrow$', color=color, ms=9, **above)
        elif cost > 0:
          ax.plot(cost, y, marker, color=color, **marks(name))
      ax.set_xscale('log')
      ax.set_ylim(low, high)
      ax.grid()
    row[0].set_ylabel(f'{count(size)} tokens\nloss, nats/token')
  for n, ax in zip(NUM_DOMAINS, axes[0], strict=True):
    ax.set_title(f'N = {n} domain{"s" * (n > 1)}')
  axes[-1, len(NUM_DOMAINS) // 2].set_xlabel('training cost C_total(N), FLOPs')
  legend(figure, c.study, [m for m in c.study.methods if any(m in x for x in points.values())])
  return save(
    figure,
    'loss-by-cost',
    'Loss against total training cost',
    'Down and left is better. Look at which points move right as domains are added: what is paid '
    'per domain is multiplied by N, what is paid once is not. An arrow marks a loss off the axis.',
  )


def legend(figure: Figure, study: Study, names: list[str]) -> None:
  """Write the methods' colours and markers below a figure."""
  style = styles(study.methods)
  shown = {study.label(n): style[n] for n in names}
  figures.legend(figure, shown, {study.label(n): marks(n) for n in names})


def _pretraining(c: Comparison) -> dict[str, str]:
  """Map every pretraining run to the first method that lists it."""
  found: dict[str, str] = {}
  for run in c.study.runs:
    for name in (*run['generic_runs'], *run['specialise_runs']):
      path = c.study.path / name / 'config.json'
      if name not in found and path.exists() and files.read_json(path)['phase'] == 'pretrain':
        found[name] = run['method']
  order = list(c.study.methods)
  return dict(sorted(found.items(), key=lambda item: order.index(item[1])))


def _training(c: Comparison) -> Plot | None:
  style, runs = styles(c.study.methods), _pretraining(c)
  drawn = {n: curves(c.study.path / n) for n in runs}
  drawn = {n: x for n, x in drawn.items() if x}
  if not drawn:
    return None
  figure = figures.training(drawn, {n: style[runs[n]] for n in drawn})
  legend(figure, c.study, [m for m in c.study.methods if m in {runs[n] for n in drawn}])
  return save(
    figure,
    'training',
    'Training curves of the pretraining runs',
    'Look for curves that are still falling at their end: those runs would gain from more tokens. '
    'The training loss of importance sampling is of the text it selects, so its height does not '
    "compare; its held-out loss is of generic validation text, like the others'.",
  )


def histograms(c: Comparison) -> dict[str, dict[str, dict[str, Any]]]:
  """Read {clusters: {set: facts}} of the data directory, for the study's sets; {} if absent."""
  path = c.study.data_path / 'clusters' / 'histograms.json'
  wanted = (c.study.generic, *c.study.domains)
  levels = files.read_json(path) if path.exists() else {}
  return {
    level: {s: sets[s] for s in wanted if s in sets}
    for level, sets in sorted(levels.items(), key=lambda item: int(item[0]))
  }


def _clusters(c: Comparison) -> Plot | None:
  levels = histograms(c)
  if not levels:
    return None
  *_, (level, sets) = levels.items()  # the finest: importance sampling's, unless it says otherwise
  share: Callable[[str], np.ndarray] = lambda s: _normalised(sets[s]['windows'])
  domains = [s for s in sets if s != c.study.generic]
  if not domains or c.study.generic not in sets:
    return None
  columns = min(len(domains), 3)
  rows = math.ceil(len(domains) / columns)
  figure = Figure((1.4 + 3.0 * columns, 0.8 + 2.0 * rows), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for ax, domain in zip(axes, domains, strict=False):
    order = np.argsort(-share(domain), kind='stable')
    x = np.arange(len(order))
    ax.bar(x, share(domain)[order], width=0.9, color='#8d93a0')
    generic = share(c.study.generic)[order]
    ax.step(np.append(x, len(x)) - 0.5, np.append(generic, generic[-1]), color=INK, where='post')
    ax.set_title(f'{domain}: like {sets[domain]["effective_clusters"]:.1f} of {level} clusters')
    ax.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
    ax.set_xticks([])
    ax.set_xlim(-1, len(x))
  for ax in axes[len(domains) :]:
    ax.set_axis_off()
  axes[0].set_ylabel('share of the windows')
  return save(
    figure,
    'clusters',
    'Where each domain lies among the clusters of generic text',
    "Bars are the domain's share of each cluster, the most frequent first; the line is generic "
    'text. Look for tall bars over a low line: that text is what importance sampling repeats.',
  )


def _normalised(counts: list[float]) -> np.ndarray:
  return np.asarray(counts, float) / max(sum(counts), 1)
