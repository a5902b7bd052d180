"""How runs went: learning rate, gradient norm, speed, memory and time by phase of any runs."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from slm.reporting import figures
from slm.reporting.tables import Table, count, duration
from slm.runs import ledger, rundir
from slm.weights import chips

Lines = Sequence[Mapping[str, float]]
Curve = tuple[np.ndarray, np.ndarray]

_GB = 1e9
_POINTS = 1000  # of a drawn curve, at most
_UNITS = ((3600, 'hours'), (60, 'minutes'), (1, 'seconds'))
# In the order in which they are drawn; others follow.
_PHASES = ('pretrain', 'finetune', 'distill', 'rollout', 'evaluate', 'compile', 'save')
_PANELS = {
  'lr': 'learning rate',
  'grad_norm': 'gradient norm, before clipping',
  'speed': 'tokens per second',
  'mfu': "MFU, % of the chip's bfloat16 peak",
  'device_memory': 'peak memory of a device, GB',
  'host_memory': 'peak memory of the host, GB',
}


@dataclasses.dataclass(frozen=True)
class Course:
  """What a run directory records of how its training went.

  Attributes:
    lines: of metrics.jsonl.
    curves: (tokens seen, values) by the keys of `_PANELS`, as far as they are recorded or known.
    restarts: tokens seen at each restart.
    seconds: device-seconds by phase.
    kinds: of the devices, as JAX names them.
  """

  lines: Lines
  curves: dict[str, Curve]
  restarts: list[float]
  seconds: dict[str, float]
  kinds: list[str]


def read(path: Path) -> Course:
  """Read the course of a run; raise ValueError, naming the file, if its metrics are damaged."""
  lines = [line for line in rundir.read_metrics(path) if 'tokens' in line]
  kinds = {s['step']: s['environment'].get('device_kind', '') for s in rundir.read_starts(path)}
  percent = {step: (chips.peak(kind) or 0.0) / 100 for step, kind in kinds.items()}
  curves = {
    'lr': _column(lines, 'lr'),
    'grad_norm': _thin(*_column(lines, 'grad_norm'), np.max),
    'speed': _rate(lines, 'tokens', 'seconds', {0: 1.0}),
    'mfu': _rate(lines, 'flops', 'device_seconds', percent),
    'device_memory': _column(lines, 'device_peak_bytes', _GB),
    'host_memory': _column(lines, 'host_peak_bytes', _GB),
  }
  curves = {name: _thin(*curve, np.mean) for name, curve in curves.items() if len(curve[0])}
  steps, tokens = ([0, *(line[key] for line in lines)] for key in ('step', 'tokens'))
  restarts = [float(np.interp(step, steps, tokens)) for step in rundir.restarts(path)]
  return Course(lines, curves, restarts, _seconds(path), list(dict.fromkeys(kinds.values())))


def _column(lines: Lines, key: str, unit: float = 1.0) -> Curve:
  points = [(line['tokens'], line[key] / unit) for line in lines if key in line]
  return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _rate(lines: Lines, what: str, time: str, units: Mapping[int, float]) -> Curve:
  """Return `what` per `time` since the line before; `units` are by the step they begin after.

  Points whose unit is 0, unknown, are left out.
  """
  points, before = [], {what: 0, time: 0.0}
  for line in lines:
    if what not in line or time not in line:
      continue
    unit = next((units[step] for step in sorted(units, reverse=True) if step < line['step']), 0)
    seconds = line[time] - before[time]
    if unit and seconds > 0:
      points.append((line['tokens'], (line[what] - before[what]) / seconds / unit))
    before = line
  return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _thin(x: np.ndarray, y: np.ndarray, join: np.ufunc) -> Curve:
  """Join neighbouring points until a page can hold them."""
  width = -(-len(x) // _POINTS)
  if width < 2:
    return x, y
  ends = range(width, len(x) + width, width)
  return x[[min(end, len(x)) - 1 for end in ends]], np.array([join(y[e - width : e]) for e in ends])


def _seconds(path: Path) -> dict[str, float]:
  """Return device-seconds by phase: those of the ledger, compiling and saving."""
  seconds = {p['phase']: p['device_seconds'] for p in ledger.read_ledger(path)['phases']}
  totals = rundir.read_totals(path)
  seconds |= {name: totals.get(f'{name}_device_seconds', 0.0) for name in ('compile', 'save')}
  place = lambda name: _PHASES.index(name) if name in _PHASES else len(_PHASES)
  return {name: seconds[name] for name in sorted(seconds, key=place) if seconds[name] > 0}


def plots(
  courses: Mapping[str, Course],
  style: Mapping[str, figures.Style],
  labels: Mapping[str, figures.Style],
) -> list[figures.Plot]:
  """Draw the courses of runs in their style; a quantity that no run has is left out.

  `labels` are of the legend.
  """
  known = {key for course in courses.values() for key in course.curves}
  memory = 'device_memory' if 'device_memory' in known else 'host_memory'
  groups = {
    'optimiser': ('Learning rate and gradient norm', ('lr', 'grad_norm'),
                  'A gradient norm that grows, or jumps and stays, comes before divergence.'),
    'speed': ('Speed and memory', ('speed', 'mfu', memory),
              'Speeds are means since the point before, of training alone: compiling, evaluating '
              'and saving are left out. ' + without_mfu(courses.values())),
  }  # fmt: skip
  made = []
  for name, (title, keys, caption) in groups.items():
    if shown := [key for key in keys if key in known]:
      figure = _curves(courses, style, shown)
      figures.legend(figure, labels)
      if any(course.restarts for course in courses.values()):
        caption = f'{caption.strip()} A dotted line is a restart of the run of its colour.'
      made.append(figures.save(figure, name, title, caption.strip()))
  if any(course.seconds for course in courses.values()):
    made.append(_time_by_phase(courses))
  return made


def without_mfu(courses: Iterable[Course]) -> str:
  """Say of which devices the peak is not known, '' if of none."""
  kinds = {kind for c in courses for kind in c.kinds if chips.peak(kind) is None}
  return f'No MFU of {", ".join(sorted(kinds))}: its peak is not known.' if kinds else ''


def _curves(
  courses: Mapping[str, Course], style: Mapping[str, figures.Style], keys: Sequence[str]
) -> Figure:
  """Draw a panel for each of `keys` over the tokens seen."""
  figure = Figure((1.2 + 3.8 * len(keys), 3.2), layout='constrained')
  for ax, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
    for name, course in courses.items():
      color, marker = style[name]
      if key in course.curves:
        ax.plot(*course.curves[key], color=color, lw=1, marker=marker, ms=4, markevery=[-1])
        figures.mark_restarts(ax, course.restarts, color)
    ax.set_title(_PANELS[key])
    if key == 'grad_norm':
      ax.set_yscale('log')
    else:
      ax.set_ylim(bottom=0)
      ax.yaxis.set_major_formatter(lambda y, _: count(y) if y >= 1000 else f'{y:g}')
    figures.over_tokens(ax)
  return figure


def _time_by_phase(courses: Mapping[str, Course]) -> figures.Plot:
  """Draw a bar per run, made of its phases."""
  names = [name for name, course in courses.items() if course.seconds]
  phases = list(dict.fromkeys(phase for name in names for phase in courses[name].seconds))
  style = {phase: (figures.style(i + 1)[0], 's') for i, phase in enumerate(phases)}
  longest = max(sum(courses[name].seconds.values()) for name in names)
  unit, title = next((s, t) for s, t in _UNITS if longest >= 2 * s or s == 1)
  figure = Figure((8.8, 1.2 + 0.28 * len(names)), layout='constrained')
  ax = figure.subplots()
  for y, name in enumerate(names):
    left = 0.0
    for phase, seconds in courses[name].seconds.items():
      ax.barh(y, seconds / unit, left=left, color=style[phase][0], height=0.7)
      left += seconds / unit
  ax.set_yticks(range(len(names)), names)
  ax.set_ylim(len(names) - 0.4, -0.6)
  ax.set_xlabel(f'devices × time, {title}')
  ax.grid(axis='x')
  ax.set_axisbelow(True)
  figures.legend(figure, style)
  caption = (
    'Compiling and saving are of the step and of the part of a save that training waits for. Not '
    'in it: starting, the last save before a restart, and what a killed process did after it.'
  )
  return figures.save(figure, 'phases', 'Time by phase', caption)


def table(courses: Mapping[str, Course], steps: Mapping[str, int]) -> Table:
  """Build a row per run; `steps` are those that its config asks for."""
  head = ['run', 'steps', 'tokens', 'loss', 'held-out', 'tokens/s', 'MFU', 'time', 'restarts']
  rows = []
  for name, course in courses.items():
    if not course.lines:
      continue
    last, mfu = course.lines[-1], _mean_mfu(course)
    held_out = [line['eval_loss'] for line in course.lines if 'eval_loss' in line]
    speed = last['tokens'] / last['seconds'] if last.get('seconds') else None
    rows.append([
      name,
      f'{last["step"]:,} of {steps[name]:,}',
      count(last['tokens']),
      f'{last["loss"]:.4f}',
      f'{held_out[-1]:.4f}' if held_out else '–',
      count(speed) if speed else '–',
      f'{mfu:.1%}' if mfu else '–',
      duration(last['seconds']) if speed else '–',
      str(len(course.restarts)),
    ])  # fmt: skip
  return head, rows


def _mean_mfu(course: Course) -> float | None:
  """Return the MFU over all steps, None if devices of several kinds took them."""
  last = course.lines[-1]
  peak = chips.peak(course.kinds[0]) if len(course.kinds) == 1 else None
  return last['flops'] / last['device_seconds'] / peak if peak else None
