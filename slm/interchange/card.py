"""A model card from what an exported directory says of itself."""

from pathlib import Path
from typing import Any

from slm.base import files
from slm.runs.rundir import LINEAGE

_UNKNOWN = 'not stated'


def write(path: Path, licence: str = '') -> str:
  """Write README.md beside the weights; returns its path.

  Raises:
    ValueError: if the directory was not exported here.
  """
  if not (path / LINEAGE).exists():
    raise ValueError(f'{path}: holds no {LINEAGE}: only an exported directory has a card')
  about, hf = files.read_json(path / LINEAGE), files.read_json(path / 'config.json')
  files.write_text(path / 'README.md', text(path.name, about, hf, licence))
  return str(path / 'README.md')


def text(name: str, about: dict[str, Any], hf: dict[str, Any], licence: str) -> str:
  """Write the card: front matter, shape, lineage from the newest run to the oldest, cost."""
  history = about['history']
  lines = ['---', f'license: {licence or "other"}', 'library_name: transformers', '---', '']
  lines += [f'# {name}', '']
  lines += [
    f'- Architecture: {hf["architectures"][0]}, {about["total_parameters"]:,} parameters, '
    f'{about["dtype"]}.',
    f'- Made from: {", ".join(about["made_from"])}.',
    *(f'- Taught by: {x["teacher"]}.' for x in history[:1] if x.get('teacher')),
    f'- Licence of this model: {licence or _UNKNOWN}. Licences of the models and data it was made '
    f'from: {_UNKNOWN}; theirs apply.',
    '',
    '## Lineage, newest first',
    '',
    '| run | phase | objective | tokens | FLOPs | device-seconds | validation loss | text | rows |',
    '| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |',
  ]
  lines += map(row, history)
  pruned = [x['prune'] for x in history if 'prune' in x]
  for entry in pruned:
    lines += ['', f'Pruned: kept indices {entry["sha256"][:16]}, shape {entry["shape"]}.']
  lines += ['', f'Files: tokenizer {", ".join(about["tokenizer"]) or "none"}.', '']
  return '\n'.join(lines)


def row(entry: dict[str, Any]) -> str:
  """Write the row of a run of the lineage."""
  spent = [p for p in entry['cost'] if p['phase'] != 'evaluate']
  total = lambda key: sum(p[key] for p in spent)
  loss = entry.get('result', {}).get('loss')
  return (
    f'| {entry["run"]} | {entry["phase"]} | {_objective(entry)} | '
    f'{total("tokens"):,} | {total("flops"):.3g} | {total("device_seconds"):.0f} | '
    f'{_UNKNOWN if loss is None else f"{loss:.4f}"} | '
    f'{"/".join(filter(None, (entry["data"], entry["set"]))) or "none"} | '
    f'{entry["rows_sha256"][:12] or "none"} |'
  )


def _objective(entry: dict[str, Any]) -> str:
  """Say what was minimised, if anything was: a distillation with all that makes it one."""
  found = entry['objective']
  if entry['phase'] in ('prune', 'import', 'select'):
    return 'none'
  how = ', '.join(f'{k} {found[k]}' for k in _HOW if found.get(k))
  return f'{found["name"]} ({how})' if how else found['name']


_HOW = ('kl', 'temperature', 'mixing', 'top_k', 'states', 'on_policy', 'on_policy_from',
        'on_policy_kl', 'correct')  # fmt: skip
