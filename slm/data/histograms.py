"""How each domain is distributed over the clusters, before anything is trained."""

import pathlib
from typing import Any

import numpy as np

from slm.base import files
from slm.data import cluster, documents, importance, loader, sources, tokenizer

Path = pathlib.Path
Levels = dict[str, dict[str, dict[str, Any]]]  # level -> set -> its histogram and statistics
FILES = ('histograms.md', 'histograms.png', 'histograms.json')  # below clusters/, as written
_COLUMNS = ('entropy', 'effective_clusters', 'ess_fraction', 'top_cluster')


def write(path: Path) -> None:
  """Write clusters/histograms.{json,md,png} of the training windows."""
  manifest = loader.manifest(path)
  levels: Levels = {}
  for level in manifest['levels']:
    counts = {s: loader.window_counts(str(path), s, 'train', level) for s in manifest['sets']}
    levels[str(level)] = sets = {}
    for name, windows in counts.items():
      values = importance.diagnostics(windows, counts['generic'])
      sets[name] = {key: values[key] for key in _COLUMNS}
      sets[name]['windows'] = windows.astype(int).tolist()
  table, plot, record = (path / 'clusters' / name for name in FILES)
  files.write_text(table, _table(levels))
  _plot(levels, plot)
  files.write_json(record, levels)


def _table(levels: Levels) -> str:
  """Return a Markdown table with a row per level and set."""
  lines = [
    '| clusters | set | windows | entropy (nats) | effective clusters | effective sample | top |',
    '| ---: | --- | ---: | ---: | ---: | ---: | ---: |',
  ]
  for level, sets in levels.items():
    for name, s in sets.items():
      lines.append(
        f'| {level} | {name} | {sum(s["windows"]):,} | {s["entropy"]:.2f} | '
        f'{s["effective_clusters"]:.1f} | {s["ess_fraction"]:.3f} | {s["top_cluster"]:.1%} |'
      )
  return '\n'.join(lines) + '\n'


def spread(data: str, texts: list[Path]) -> tuple[int, float, float]:
  """Measure how a domain's texts are spread over the finest clusters of a data directory.

  Returns the number of their windows, exp(entropy) of their clusters, and its mean over samples of
  as many generic windows: entropy grows with the number of windows, whatever the text.

  Raises:
    ValueError: if a text or the data directory cannot be read.
  """
  if missing := [str(path) for path in texts if not path.is_file()]:
    raise ValueError(f'--domain_text: {", ".join(missing)}: no such file')
  manifest = loader.manifest(data)
  model = cluster.load(Path(data) / 'clusters' / 'model.safetensors')
  tok = tokenizer.load(f'{data}/tokenizer')
  windows = [
    tok.decode(window)
    for path in texts
    for text, _ in sources.read(str(path), 'text', '')
    if text.strip()
    for window in documents.windows(tok.encode(text), manifest['context'], tok)
  ]
  if not windows:
    raise ValueError(f'--domain_text: {", ".join(map(str, texts))}: no text')
  clusters = cluster.assign(model.centroids, cluster.embed(model, windows)[0])
  counts = loader.window_counts(data, 'generic', 'train', len(model.centroids))
  rng = np.random.default_rng(0)
  generic = rng.multinomial(len(windows), counts / counts.sum(), 200)
  effective = lambda counts: importance.diagnostics(counts, counts)['effective_clusters']
  return len(windows), effective(np.bincount(clusters)), float(np.mean([*map(effective, generic)]))


def _plot(levels: Levels, path: Path) -> None:
  from matplotlib.figure import Figure  # imported here: workers do not plot

  sets = len(next(iter(levels.values())))
  figure = Figure(figsize=(5 * len(levels), 1.6 * sets), layout='constrained')
  axes = figure.subplots(sets, len(levels), squeeze=False, sharex='col')
  for column, (level, histograms) in enumerate(levels.items()):
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
