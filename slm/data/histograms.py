"""What the clusters say about each domain, before anything is trained."""

import pathlib
from typing import Any

import numpy as np

from slm import data as loader
from slm import files
from slm.data import importance

Path = pathlib.Path
_COLUMNS = ('entropy', 'effective_clusters', 'ess_fraction', 'top_cluster')


def write(path: Path) -> str:
  """Write clusters/histograms.{json,md,png}, from the training windows; return the table."""
  facts = loader.manifest(path)
  found: dict[str, dict[str, Any]] = {}
  for level in facts['levels']:
    counts = {s: loader.window_counts(str(path), s, 'train', level) for s in facts['sets']}
    found[str(level)] = {
      name: {key: about[key] for key in _COLUMNS} | {'windows': c.astype(int).tolist()}
      for name, c in counts.items()
      for about in [importance.diagnostics(c, counts['generic'])]
    }
  out = path / 'clusters'
  text = table(found)
  with files.replacing(out / 'histograms.md') as temporary:
    temporary.write_text(text)
  _plot(found, out / 'histograms.png')
  files.write_json(out / 'histograms.json', found)
  return text


def table(found: dict[str, dict[str, Any]]) -> str:
  """Format one Markdown row per set and level."""
  lines = [
    '| clusters | set | windows | entropy (nats) | effective clusters | effective sample | top |',
    '| ---: | --- | ---: | ---: | ---: | ---: | ---: |',
  ]
  for level, sets in found.items():
    for name, s in sets.items():
      lines.append(
        f'| {level} | {name} | {sum(s["windows"]):,} | {s["entropy"]:.2f} | '
        f'{s["effective_clusters"]:.1f} | {s["ess_fraction"]:.3f} | {s["top_cluster"]:.1%} |'
      )
  return '\n'.join(lines) + '\n'


def _plot(found: dict[str, dict[str, Any]], path: Path) -> None:
  # Imported here: workers import the entry point too, and need no plots.
  from matplotlib.figure import Figure

  sets = len(next(iter(found.values())))
  figure = Figure(figsize=(5 * len(found), 1.6 * sets), layout='constrained')
  axes = figure.subplots(sets, len(found), squeeze=False, sharex='col')
  for column, (level, histograms) in enumerate(found.items()):
    generic = np.argsort(histograms['generic']['windows'])[::-1]
    for row, (name, s) in enumerate(histograms.items()):
      counts = np.array(s['windows'])[generic]
      axis = axes[row, column]
      axis.bar(np.arange(len(counts)), counts / counts.sum(), width=1.0)
      axis.set_title(f'{name}: exp(H) = {s["effective_clusters"]:.1f} of {level}', fontsize=9)
      axis.set_ylabel('share', fontsize=8)
    axes[-1, column].set_xlabel('cluster, by size in the generic set', fontsize=8)
  with files.replacing(path) as temporary:
    figure.savefig(temporary, format='png', dpi=120)
