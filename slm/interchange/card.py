"""Model cards of exported directories, written from their lineage."""

from pathlib import Path
from typing import Any

from slm.base import files
from slm.runs.rundir import LINEAGE

_UNKNOWN = 'not stated'
# Settings of a distillation objective that a card shows.
_DISTILLATION = (
  'kl', 'temperature', 'mixing', 'top_k', 'states', 'on_policy', 'on_policy_from', 'on_policy_kl',
  'correct',
)  # fmt: skip


def write(path: Path, licence: str = '') -> str:
  """Write the README.md of an exported directory and return its path.

  Raises:
    ValueError: if the directory is not an export.
  """
  if not (path / LINEAGE).exists():
    raise ValueError(f'{path}: holds no {LINEAGE}: only an exported directory has a card')
  lineage, hf = files.read_json(path / LINEAGE), files.read_json(path / 'config.json')
  files.write_text(path / 'README.md', text(path.name, lineage, hf, licence))
  return str(path / 'README.md')


def text(name: str, lineage: dict[str, Any], hf: dict[str, Any], licence: str) -> str:
  """Return a card: front matter, architecture, and the runs behind the model with their costs."""
  history = lineage['history']
  lines = ['---', f'license: {licence or "other"}', 'library_name: transformers', '---', '']
  lines += [f'# {name}', '']
  lines += [
    f'- Architecture: {hf["architectures"][0]}, {lineage["total_parameters"]:,} parameters, '
    f'{lineage["dtype"]}.',
    f'- Made from: {", ".join(lineage["made_from"])}.',
    *(f'- Taught by: {entry["teacher"]}.' for entry in history[:1] if entry.get('teacher')),
    f'- Licence of this model: {licence or _UNKNOWN}. Licences of the models and data it was made '
    f'from: {_UNKNOWN}; theirs apply.',
    '',
    '## Lineage, newest first',
    '',
    '| run | phase | objective | tokens | FLOPs | device-seconds | validation loss | text | rows |',
    '| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |',
    *map(row, history),
  ]
  for prune in (entry['prune'] for entry in history if 'prune' in entry):
    lines += ['', f'Pruned: kept indices {prune["sha256"][:16]}, shape {prune["shape"]}.']
  lines += ['', f'Files: tokenizer {", ".join(lineage["tokenizer"]) or "none"}.', '']
  return '\n'.join(lines)


def row(entry: dict[str, Any]) -> str:
  """Return the table row of an entry of the lineage."""
  phases = [phase for phase in entry['cost'] if phase['phase'] != 'evaluate']
  total = lambda key: sum(phase[key] for phase in phases)
  loss = entry.get('result', {}).get('loss')
  return (
    f'| {entry["run"]} | {entry["phase"]} | {_objective(entry)} | '
    f'{total("tokens"):,} | {total("flops"):.3g} | {total("device_seconds"):.0f} | '
    f'{_UNKNOWN if loss is None else f"{loss:.4f}"} | '
    f'{"/".join(filter(None, (entry["data"], entry["set"]))) or "none"} | '
    f'{entry["rows_sha256"][:12] or "none"} |'
  )


def _objective(entry: dict[str, Any]) -> str:
  objective = entry['objective']
  if entry['phase'] in ('prune', 'import', 'select'):
    return 'none'
  settings = ', '.join(f'{key} {objective[key]}' for key in _DISTILLATION if objective.get(key))
  return f'{objective["name"]} ({settings})' if settings else objective['name']
