"""Figures in one style, reproducible to the byte, for light and dark pages."""

import dataclasses
import io
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import lines
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slm.reporting.tables import count
from slm.runs import rundir

Style = tuple[str, str]  # colour and marker

INK = '#2a2d34'  # replaced by the page's text colour
RC = {
  'svg.fonttype': 'none',
  'svg.hashsalt': 'slm',
  'font.size': 9,
  'axes.edgecolor': INK,
  'axes.labelcolor': INK,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.titlesize': 9,
  'text.color': INK,
  'xtick.color': INK,
  'ytick.color': INK,
  'grid.color': '#8d93a0',
  'grid.alpha': 0.25,
  'grid.linewidth': 0.6,
}

# Okabe and Ito's palette, safe for colour-blind readers; ink for the reference.
_STYLES = (
  (INK, 'o'), ('#d55e00', 's'), ('#0a7ac2', '^'), ('#009e73', 'D'), ('#cc79a7', 'P'),
  ('#56b4e9', 'v'), ('#e69f00', 'h'), ('#8c6bb1', '<'),
)  # fmt: skip


def style(i: int) -> Style:
  """Return the colour and marker of model i; model 0 is the reference.

  Colours come again after 8 models, with another marker.
  """
  n = len(_STYLES)
  return _STYLES[i % n][0], _STYLES[(i + i // n) % n][1]


@dataclasses.dataclass(frozen=True)
class Plot:
  """A figure as SVG text, with a caption that says what to look for."""

  name: str
  title: str
  caption: str
  svg: str

  @property
  def inline(self) -> str:
    """Return the SVG for an HTML page: transparent, with the page's text colour."""
    return re.sub(f'(?i){INK}', 'currentColor', self.svg[self.svg.index('<svg') :])

  @property
  def file(self) -> str:
    """Return the SVG for a file, on white."""
    end = self.svg.index('>', self.svg.index('<svg')) + 1
    return self.svg[:end] + '<rect width="100%" height="100%" fill="#ffffff"/>' + self.svg[end:]


def save(figure: Figure, name: str, title: str, caption: str) -> Plot:
  """Render a figure reproducibly."""
  out = io.StringIO()
  figure.savefig(out, format='svg', transparent=True, metadata={'Date': None})
  svg = re.sub(r'(?s)<metadata>.*?</metadata>', '', out.getvalue())
  svg = re.sub(r'<g id="[^"]*">', '<g>', svg)  # ids would repeat between figures of a page
  svg = svg.replace('<svg ', f'<svg role="img" aria-label="{title}" ', 1)
  return Plot(name, title, caption, svg)


def curves(path: Path) -> dict[str, tuple[list[float], np.ndarray]] | None:
  """Read {'loss', 'eval_loss'} as (tokens, values), the training loss as a running mean."""
  metrics = rundir.read_metrics(path)
  series = {}
  for key in ('loss', 'eval_loss'):
    points = [(line['tokens'], line[key]) for line in metrics if key in line and 'tokens' in line]
    values = np.array([y for _, y in points])
    series[key] = ([x for x, _ in points], _smooth(values) if key == 'loss' else values)
  return series if series['loss'][0] else None


def _smooth(values: np.ndarray) -> np.ndarray:
  width = max(len(values) // 40, 1)
  padded = np.concatenate([np.zeros(1), np.cumsum(values)])
  start = np.maximum(np.arange(len(values)) + 1 - width, 0)
  return (padded[1:] - padded[start]) / (np.arange(len(values)) + 1 - start)


def training(
  drawn: Mapping[str, dict[str, tuple[list[float], np.ndarray]]],
  style: Mapping[str, Style],
  restarts: Mapping[str, Iterable[float]] = types.MappingProxyType({}),
) -> Figure:
  """Draw the `curves` of runs: training and held-out loss side by side.

  `restarts` are the tokens at which a run was started again.
  """
  figure = Figure((8.8, 3.5), layout='constrained')
  axes = figure.subplots(1, 2, sharex=True)
  for ax, key, title in zip(axes, ('loss', 'eval_loss'), ('training', 'held-out'), strict=True):
    for name, curve in drawn.items():
      color, marker = style[name]
      every = None if key == 'eval_loss' else [-1]
      if every and len(drawn) <= len(_STYLES):  # the colour tells
        marker = None
      ax.plot(*curve[key], color=color, lw=1.2, marker=marker, ms=4, markevery=every)
      mark_restarts(ax, restarts.get(name, ()), color)
    ax.set_title(f'{title} loss, nats/token')
    over_tokens(ax)
    late = [y for curve in drawn.values() for y in curve[key][1][len(curve[key][1]) // 8 :]]
    if late:
      margin = 0.05 * (max(late) - min(late)) + 0.01
      ax.set_ylim(min(late) - margin, max(late) + margin)
  return figure


def over_tokens(ax: Axes) -> None:
  """Label an axis that counts tokens."""
  ax.set_xlabel('tokens seen')
  ax.xaxis.set_major_formatter(lambda x, _: count(x))
  ax.grid(axis='y')


def mark_restarts(ax: Axes, restarts: Iterable[float], color: str) -> None:
  """Draw a dotted line at each restart of a run."""
  for x in restarts:
    ax.axvline(x, color=color, lw=0.8, ls=':')


def legend(
  figure: Figure, shown: Mapping[str, Style], marks: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
  """Add a legend below a figure; `marks` has further properties of some labels' markers."""
  handles = [
    lines.Line2D([], [], color=color, marker=marker, ls='', **(marks or {}).get(label, {}))
    for label, (color, marker) in shown.items()
  ]
  columns = min(len(shown), max(int(figure.get_figwidth() / 2.6), 1))
  rows = -(-len(shown) // columns)
  figure.set_figheight(figure.get_figheight() + 0.19 * max(rows - 3, 0))  # inches
  look = {'loc': 'outside lower center', 'frameon': False, 'fontsize': 8.5}
  figure.legend(handles, list(shown), ncols=columns, **look)
