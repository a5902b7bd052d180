"""Compare arbitrary runs: held-out losses, and paired differences to the first."""

import csv
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from slm.objectives import heldout
from slm.reporting import figures, stats
from slm.reporting.stats import Difference, Loss
from slm.reporting.tables import Table, interval, perplexity
from slm.runs import config


@dataclasses.dataclass(frozen=True)
class Model:
  """One run (RUN or RUN@STEP), or several that differ in their seeds."""

  label: str
  refs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Line:
  """A model's loss on one set, and its difference to the first model's (None for the first)."""

  on: str
  model: Model
  loss: Loss
  difference: Difference | None
  documents: int  # number of documents resampled; 0: rows were resampled


def models(named: Sequence[str]) -> list[Model]:
  """Make models of the values of --run; RUN,RUN,RUN are the seeds of one model.

  Raises:
    ValueError: if a run is named twice, or two models have different numbers of runs: runs are
      paired in the order in which they are named.
  """
  groups = [tuple(ref.rstrip('/') for ref in value.split(',') if ref) for value in named]
  refs = [ref for group in groups for ref in group]
  if duplicate := next((ref for ref in refs if refs.count(ref) > 1), ''):
    raise ValueError(f'--run: {duplicate} is named twice')
  for group in groups:
    if len(group) != len(groups[0]):
      raise ValueError(
        f'--run: expected as many runs of {",".join(group)!r} as of the first model, '
        f'{len(groups[0])}, found {len(group)}'
      )
  labels = [g[0] if len(g) == 1 else f'{os.path.commonprefix(g)}*' for g in groups]
  if len(set(labels)) < len(labels):
    labels = [','.join(group) for group in groups]
  return [Model(*pair) for pair in zip(labels, groups, strict=True)]


def check_tokenizers(models: Iterable[Model]) -> None:
  """Raise ValueError if runs have different tokenizers, so that losses per token do not compare."""
  first, *others = (ref for model in models for ref in model.refs)
  tokenizer = config.of(first).tokenizer
  for ref in others:
    if config.of(ref).tokenizer != tokenizer:
      raise ValueError(
        f'{first} and {ref} have different tokenizers, so their tokens differ: compare the bits '
        'per byte that slm.evaluate prints for each on its own data of the same text'
      )


def shared_sets(models: Iterable[Model]) -> list[str]:
  """List the sets that all runs were evaluated on."""
  summaries = [heldout.summaries(ref) for model in models for ref in model.refs]
  return [name for name in summaries[0] if all(name in summary for summary in summaries)]


def compare(models: Sequence[Model], name: str, data: str | Path = '') -> list[Line]:
  """Compare models by their kept evaluations on 'set/split'.

  data: the directory whose documents are resampled; default: the one the first run was trained on.

  Raises:
    ValueError: if a run was not evaluated on it, or two runs were evaluated on different rows.
  """
  first, rows = models[0].refs[0], {}
  kept = {ref: heldout.kept(ref, name) for model in models for ref in model.refs}
  values, summary = kept[first]
  for ref, (other, facts) in kept.items():
    same_rows = facts['rows_sha256'] == summary['rows_sha256']
    if not same_rows or not np.array_equal(other[:, 1], values[:, 1]):
      raise ValueError(
        f'{first} and {ref} were evaluated on different rows of {name} ({len(values)} and '
        f'{len(other)}): slm.compare --data=DATA evaluates both on those of one directory'
      )
  for model in models:
    rows |= {(model.label, i): kept[ref][0] for i, ref in enumerate(model.refs)}
  data = data or config.of(first).data.path
  documents = stats.documents(data, name) if data else ()
  losses = stats.losses(rows, summary.get('bytes', 0), name, documents)
  base, count = losses[models[0].label], len(np.unique(documents))
  gaps = {m.label: stats.difference(losses[m.label], base) for m in models[1:]}
  return [Line(name, m, losses[m.label], gaps.get(m.label), count) for m in models]


def note(lines: Sequence[Line]) -> str:
  """Explain the differences and intervals of a set's lines."""
  first, seeds = lines[0], len(lines[0].loss.seeds)
  resampled = 'its rows (too narrow: no documents are known)'
  if first.documents:
    resampled = f'its {first.documents:,} documents'
  runs = '; with one run each it says nothing about how much training runs vary'
  if seeds > 1:
    runs = f", and Student's over {seeds} runs each, added in squares"
  return (
    f'{first.on}: differences to {first.model.label} in nats per token (negative: lower loss) with '
    f'95 % intervals, a paired bootstrap over {resampled}{runs}.'
  )


def table(lines: Iterable[Line]) -> Table:
  """Build a row per model."""
  head = ['model', 'loss', 'perplexity', 'bits/byte', 'to the first', 'verdict', 'runs']
  rows = []
  for line in lines:
    loss, d = line.loss, line.difference
    bits = '–' if math.isnan(loss.bpb) else f'{loss.bpb:.4f}'
    row = [line.model.label, f'{loss.value:.4f}', perplexity(loss), bits, interval(d)]
    rows.append([*row, d.verdict if d else 'reference', str(len(loss.seeds))])
  return head, rows


def results_csv(lines: Iterable[Line]) -> str:
  """Format every number, unrounded, as CSV."""
  header = ['on', 'model', 'runs', 'loss', 'ppl', 'bpb', 'reference']
  rows = [header + ['difference', 'low', 'high', 'verdict', 'loss_by_run']]
  reference = ''
  for line in lines:
    loss, d = line.loss, line.difference
    compared = [reference, d.value, d.low, d.high, d.verdict] if d else [''] * 5
    row = [line.on, line.model.label, len(loss.seeds), loss.value, math.exp(loss.value), loss.bpb]
    rows.append([*row, *compared, ' '.join(f'{value:.6f}' for value in loss.seeds.values())])
    if d is None:
      reference = line.model.label
  out = io.StringIO()
  csv.writer(out, lineterminator='\n').writerows(rows)
  return out.getvalue()


def plot(by_set: dict[str, list[Line]]) -> figures.Plot:
  """Draw every difference to the first model with its interval, a panel per set."""
  labels = [line.model.label for line in next(iter(by_set.values()))]
  with rc_context(figures.RC):
    size = (2.4 + 3.2 * len(by_set), 1.0 + 0.34 * len(labels))
    figure = Figure(size, layout='constrained')
    axes = figure.subplots(1, len(by_set), sharey=True, squeeze=False)[0]
    for (name, lines), ax in zip(by_set.items(), axes, strict=True):
      ax.axvline(0, color=figures.INK, lw=0.9, ls=(0, (4, 3)))
      for y, line in enumerate(lines):
        color, marker = figures.style(y)
        d = line.difference
        if d is None:  # the first model, which the others are compared with
          ax.plot(0, y, marker='o', mfc='white', color=figures.INK)
        else:
          ends = [[d.value - d.low], [d.high - d.value]]
          ax.errorbar(d.value, y, xerr=ends, color=color, marker=marker, capsize=2)
      ax.set(title=name, xlabel=f'nats/token above {labels[0]}')
      ax.grid(axis='x')
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    caption = (
      'Left of the dashed line is a lower loss. Bars are 95 % intervals: those that stay clear of '
      'the line tell two models apart.'
    )
    return figures.save(figure, 'differences', 'Differences to the first model', caption)
