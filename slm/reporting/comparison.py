"""Arbitrary runs side by side: held-out losses, and paired differences to the first."""

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

from slm.base import files
from slm.objectives import heldout
from slm.reporting import figures, stats
from slm.reporting.stats import Difference, Loss
from slm.reporting.tables import Table, interval, perplexity
from slm.runs import config, rundir

_COLUMNS = (
  'on', 'model', 'runs', 'loss', 'ppl', 'bpb', 'reference', 'difference', 'low', 'high', 'verdict',
  'loss_by_run',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
  """A run (RUN or RUN@STEP), or runs of several seeds that count as one model."""

  label: str
  refs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Line:
  """A model's loss on one set and its difference to the first model's, None for the first."""

  on: str
  model: Model
  loss: Loss
  difference: Difference | None
  documents: int  # that were resampled; 0: rows were


def models(named: Sequence[str]) -> list[Model]:
  """Turn the values of --run into models; RUN,RUN,RUN are the seeds of one.

  Raises:
    ValueError: if a run is named twice, or models have different numbers of runs: the first run of
      one is paired with the first of another, and so on.
  """
  groups = [tuple(ref.rstrip('/') for ref in value.split(',') if ref) for value in named]
  every = [ref for group in groups for ref in group]
  if twice := next((ref for ref in every if every.count(ref) > 1), ''):
    raise ValueError(f'--run: {twice} is named twice')
  for group in groups:
    if len(group) != len(groups[0]):
      raise ValueError(
        f'--run: expected as many runs of {",".join(group)!r} as of the first model, '
        f'{len(groups[0])}, found {len(group)}'
      )
  short = [g[0] if len(g) == 1 else f'{os.path.commonprefix(g)}*' for g in groups]
  unique = len(set(short)) == len(short)
  return [Model(s if unique else ','.join(g), g) for s, g in zip(short, groups, strict=True)]


def check_tokenizers(every: Iterable[Model]) -> None:
  """Refuse models whose losses per token do not compare.

  Raises:
    ValueError: if two runs have different tokenizers, naming them.
  """
  refs = [ref for model in every for ref in model.refs]
  tokenizers = {ref: config.of(ref).tokenizer for ref in refs}
  for ref, tokenizer in tokenizers.items():
    if tokenizer != tokenizers[refs[0]]:
      raise ValueError(
        f'{refs[0]} and {ref} have different tokenizers, so their tokens differ: compare the bits '
        'per byte that slm.evaluate prints for each on its own data of the same text'
      )


def shared_sets(every: Iterable[Model]) -> list[str]:
  """List the sets that all runs were evaluated on.

  Raises:
    ValueError: if there is none.
  """
  summaries = [rundir.evaluations(ref).with_suffix('.json') for m in every for ref in m.refs]
  known = [files.read_json(path) if path.exists() else {} for path in summaries]
  if not (shared := [name for name in known[0] if all(name in x for x in known)]):
    raise ValueError(
      'there is no set that all of these runs were evaluated on: slm.compare --on=set/split '
      'evaluates them'
    )
  return shared


def compare(every: Sequence[Model], name: str, data: str | Path = '') -> list[Line]:
  """Compare models on what their runs kept of 'set/split'.

  data: the directory whose documents are resampled; default: the one the first run was trained on.

  Raises:
    ValueError: if a run was not evaluated on it, or two were on different rows.
  """
  first, rows = every[0].refs[0], {}
  kept = {ref: heldout.kept(ref, name) for model in every for ref in model.refs}
  values, about = kept[first]
  for ref, (other, facts) in kept.items():
    if facts['rows_sha256'] != about['rows_sha256'] or not np.array_equal(
      other[:, 1], values[:, 1]
    ):
      raise ValueError(
        f'{first} and {ref} were evaluated on different rows of {name} ({len(values)} and '
        f'{len(other)}): slm.compare --data=DATA evaluates both on those of one directory'
      )
  for model in every:
    rows |= {(model.label, i): kept[ref][0] for i, ref in enumerate(model.refs)}
  data = data or config.of(first).data.path
  documents = stats.documents(data, name) if data else ()
  by_model = stats.losses(rows, about.get('bytes', 0), name, documents)
  base = by_model[every[0].label]
  apart = {m.label: stats.difference(by_model[m.label], base) for m in every[1:]}
  many = len(np.unique(documents))
  return [Line(name, m, by_model[m.label], apart.get(m.label), many) for m in every]


def note(lines: Sequence[Line]) -> str:
  """Say what the differences and intervals of a set's lines are."""
  first, seeds = lines[0], len(lines[0].loss.seeds)
  drawn = f'its {first.documents:,} documents' if first.documents else (
    'its rows (too narrow: no documents are known)'
  )  # fmt: skip
  runs = f", and Student's over {seeds} runs each, added in squares" if seeds > 1 else (
    '; with one run each it says nothing about how much training runs vary'
  )  # fmt: skip
  return (
    f'{first.on}: differences to {first.model.label} in nats per token (negative: lower loss) with '
    f'95 % intervals, a paired bootstrap over {drawn}{runs}.'
  )


def table(lines: Iterable[Line]) -> Table:
  """Build a line per model."""
  head = ['model', 'loss', 'perplexity', 'bits/byte', 'to the first', 'verdict', 'runs']
  return head, [
    [
      x.model.label, f'{x.loss.value:.4f}', perplexity(x.loss),
      '–' if math.isnan(x.loss.bpb) else f'{x.loss.bpb:.4f}', interval(x.difference),
      x.difference.verdict if x.difference else 'reference', str(len(x.loss.seeds)),
    ]
    for x in lines
  ]  # fmt: skip


def results_csv(lines: Iterable[Line]) -> str:
  """Write every number unrounded."""
  out = io.StringIO()
  writer = csv.DictWriter(out, _COLUMNS, restval='', lineterminator='\n')
  writer.writeheader()
  reference = ''
  for x in lines:
    value = {'on': x.on, 'model': x.model.label, 'runs': len(x.loss.seeds), 'loss': x.loss.value}
    value |= {'ppl': math.exp(x.loss.value), 'bpb': x.loss.bpb}
    value['loss_by_run'] = ' '.join(f'{loss:.6f}' for loss in x.loss.seeds.values())
    if x.difference is None:
      reference = x.model.label
    else:
      d = x.difference
      value |= {'reference': reference, 'difference': d.value, 'low': d.low, 'high': d.high}
      value['verdict'] = d.verdict
    writer.writerow(value)
  return out.getvalue()


def plot(by_set: dict[str, list[Line]]) -> figures.Plot:
  """Draw every difference to the first model with its interval, a panel per set."""
  labels = [x.model.label for x in next(iter(by_set.values()))]
  with rc_context(figures.RC):
    size = (2.4 + 3.2 * len(by_set), 1.0 + 0.34 * len(labels))
    figure = Figure(size, layout='constrained')
    axes = figure.subplots(1, len(by_set), sharey=True, squeeze=False)[0]
    for (name, lines), ax in zip(by_set.items(), axes, strict=True):
      ax.axvline(0, color=figures.INK, lw=0.9, ls=(0, (4, 3)))
      for y, x in enumerate(lines):
        color, marker = figures.style(y)
        d = x.difference
        if d is None:  # the first model, which the others are compared with
          ax.plot(0, y, marker='o', mfc='white', color=figures.INK)
        else:
          ends = [[d.value - d.low], [d.high - d.value]]
          ax.errorbar(d.value, y, xerr=ends, color=color, marker=marker, capsize=2)
      ax.set(title=name, xlabel=f'nats/token above {labels[0]}')
      ax.grid(axis='x')
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    return figures.save(
      figure, 'differences', 'Differences to the first model',
      'Left of the dashed line is a lower loss. Bars are 95 % intervals: those that stay clear of '
      'the line tell two models apart.',
    )  # fmt: skip
