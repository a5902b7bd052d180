"""Figures: one look, the same bytes each time, drawn for light and dark pages."""

import dataclasses
import io
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slm.runs import rundir

INK = '#2a2d34'  # stands for the page's text colour
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


@dataclasses.dataclass(frozen=True)
class Plot:
  """One figure: its name, a caption that says what to look at, and the SVG text."""

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
  """Make a plot of a figure: the same bytes each time."""
  out = io.StringIO()
  figure.savefig(out, format='svg', transparent=True, metadata={'Date': None})
  svg = re.sub(r'(?s)<metadata>.*?</metadata>', '', out.getvalue())
  svg = re.sub(r'<g id="[^"]*">', '<g>', svg)  # ids would repeat between figures of a page
  svg = svg.replace('<svg ', f'<svg role="img" aria-label="{title}" ', 1)
  return Plot(name, title, caption, svg)


def window(values: Iterable[float]) -> tuple[float, float]:
  """Choose loss limits that keep outliers (no pretraining, say) from hiding the rest."""
  values = np.sort(list(values))
  middle = np.median(values) - values[0]
  top = max(v for v in values if v - values[0] <= max(3 * middle, 0.05))
  margin = 0.08 * max(top - values[0], 0.02)
  return float(values[0] - margin), float(top + margin)


def label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
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


def curves(path: Path) -> dict[str, tuple[list[float], np.ndarray]] | None:
  """Read {'loss', 'eval_loss'} as (tokens, values); training loss is a running mean."""
  if not (path / 'metrics.jsonl').exists():
    return None
  metrics = rundir.read_metrics(path)
  found = {}
  for key in ('loss', 'eval_loss'):
    points = [(m['tokens'], m[key]) for m in metrics if key in m and 'tokens' in m]
    values = np.array([y for _, y in points])
    found[key] = ([x for x, _ in points], _smooth(values) if key == 'loss' else values)
  return found if found['loss'][0] else None


def _smooth(values: np.ndarray) -> np.ndarray:
  width = max(len(values) // 40, 1)
  padded = np.concatenate([np.zeros(1), np.cumsum(values)])
  start = np.maximum(np.arange(len(values)) + 1 - width, 0)
  return (padded[1:] - padded[start]) / (np.arange(len(values)) + 1 - start)
