"""What the clusters say about each domain, before anything is trained."""

import pathlib
from typing import Any

import numpy as np

from slm.base import files
from slm.data import cluster, documents, importance, loader, sources, tokenizer

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


def spread(data: str, texts: list[Path]) -> tuple[int, float, float]:
  """Say over how many of the finest clusters of DATA a domain's texts lie.

  Returns their windows, exp(entropy) of the clusters these lie in, and what as many windows of
  generic text have on average: entropy grows with the number of windows, whatever the text.

  Raises:
    ValueError: if a text or DATA cannot be read.
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
  found = cluster.assign(model.centroids, cluster.embed(model, windows)[0])
  counts = loader.window_counts(data, 'generic', 'train', len(model.centroids))
  rng = np.random.default_rng(0)
  generic = rng.multinomial(len(windows), counts / counts.sum(), 200)
  effective = lambda counts: importance.diagnostics(counts, counts)['effective_clusters']
  return len(windows), effective(np.bincount(found)), float(np.mean([*map(effective, generic)]))


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
