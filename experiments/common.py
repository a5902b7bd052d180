"""What the studies share: configs by name, corpora prepared by a scale, the cache, the page."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from slm.base import files, schema
from slm.data import prepare, settings
from slm.reporting import figures, page
from slm.reporting.tables import Table, markdown


def config(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
  """Load configs/<name>.py and set dotted keys, as the command line would."""
  found = importlib.import_module(f'configs.{name}').get_config()
  found.update_from_flattened_dict(dict(overrides))
  return found.to_dict()


def prepare_data(
  sources: Mapping[str, Any], changes: Mapping[str, Any], sizes: Sequence[int], corpus: str,
  out: Path,
) -> None:  # fmt: skip
  """Prepare a scale's sets; a source is a name, or {split: files below the corpora's directory}.

  `changes` are dotted keys of configs/data.py.

  Raises:
    ValueError: if files are named and the directory is not.
  """
  if not corpus and any(isinstance(s, Mapping) for s in sources.values()):
    raise ValueError('--corpus: this scale needs the directory of the corpora')
  found = importlib.import_module('configs.data').get_config()
  found.sets = {
    name: {split: str(Path(corpus) / glob) for split, glob in source.items()}
    if isinstance(source, Mapping)
    else {settings.ALL: source}
    for name, source in sources.items()
  }
  found.update_from_flattened_dict({**changes, 'sizes': sizes, 'out': str(out)})
  prepare.prepare(schema.read(settings.PrepareConfig, found.to_dict()))


def cache(directory: str) -> None:
  """Keep compiled programs in a directory; a restarted study compiles nothing again."""
  jax.config.update('jax_compilation_cache_dir', str(Path(directory).expanduser()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def publish(
  root: Path, title: str, answer: str, sections: list[tuple[str, str, Table]],
  drawn: list[figures.Plot],
) -> None:  # fmt: skip
  """Write report.html, table.md and plots/ below a directory."""
  files.write_text(root / 'report.html', page.document(title, [answer], sections, drawn))
  lines = [f'# {title}', '', answer, '']
  for heading, note, table in sections:
    lines += [f'## {heading}', '', note, '', markdown(table), '']
  files.write_text(root / 'table.md', '\n'.join(lines))
  for plot in drawn:
    files.write_text(root / 'plots' / f'{plot.name}.svg', plot.file)
  print(f'wrote {root / "report.html"}, table.md and plots/')
