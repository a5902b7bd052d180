"""The files of a run directory: resolved config, code version, environment, metrics."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from slm import __version__
from slm.base import files, stage

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')

LINEAGE = 'slm_lineage.json'  # beside exported weights: what they were made from


def split_ref(ref: str | Path) -> tuple[Path, int | None]:
  """Split RUN or RUN@STEP into the run directory and the step (None for RUN).

  The directory of a run at an address is its stage, fetched once.
  """
  run, number = stage.of(ref), None
  name, at, step = run.name.rpartition('@')
  if at and name and step.isdigit():
    run, number = run.with_name(name), int(step)
  stage.fetch(run, again=False)
  return run, number


def read_config(ref: str | Path) -> dict[str, Any]:
  """Read the config of RUN or RUN@STEP; raise ValueError if it is damaged or of transformers."""
  path = split_ref(ref)[0]
  if of_transformers(path):
    raise ValueError(
      f'{path}: a model of transformers, not a run: import it with python -m slm.hf import {path} '
      'RUN'
    )
  return files.read_json(path / 'config.json')


def refuse_unfinished(path: Path) -> None:
  """Raise ValueError if a directory is an interrupted export."""
  if (path / LINEAGE).exists() and not (path / 'config.json').exists():
    raise ValueError(f'{path}: an export that was cut short: run `slm.hf export` again')


def of_transformers(path: Path) -> bool:
  """Return whether a directory's config.json was written by transformers."""
  refuse_unfinished(path)
  config = files.read_json(path / 'config.json')
  return isinstance(config, dict) and 'model_type' in config


def evaluations(ref: str | Path, kind: str = 'eval') -> Path:
  """Return the directory of an evaluation of RUN or RUN@STEP; its summaries are in DIRECTORY.json.

  `kind` is 'eval' (held-out losses) or 'tasks'.
  """
  run, step = split_ref(ref)
  return run / (kind if step is None else f'{kind}-{step}')


def write_run(workdir: Path, config: Mapping[str, Any], step: int = 0) -> None:
  """Write the config and the step of this start; on process 0 only.

  Code and environment are written if they changed, else the step is one of the `restarts` of those
  that were written last.
  """
  if jax.process_index():
    return
  files.write_json(workdir / 'config.json', config)  # first: it marks the directory
  starts = read_starts(workdir)
  now = {'code': _git(), 'environment': environment()}
  if starts and now == {key: starts[-1][key] for key in now}:
    starts[-1]['restarts'] = [*starts[-1].get('restarts', ()), step]
  else:
    starts.append({'step': step, **now})
  files.write_json(workdir / 'starts.json', starts)


def read_starts(workdir: Path) -> list[dict[str, Any]]:
  """Read the changes of code or environment over a run: {'step', 'code', 'environment'}.

  'restarts', where it is, has the steps of later starts with the same.
  """
  path = workdir / 'starts.json'
  like = [{'step': int, 'code': str, 'environment': dict}]
  return files.read_json(path, like) if path.exists() else []


def restarts(workdir: Path) -> list[int]:
  """List the steps after which a run was started again, in order."""
  starts = read_starts(workdir)
  steps = [start['step'] for start in starts[1:]]
  return sorted(steps + [step for start in starts for step in start.get('restarts', ())])


def environment() -> dict[str, Any]:
  """Describe interpreter, packages and devices."""
  device = jax.devices()[0]
  return {
    'python': sys.version.split()[0],
    'platform': platform.platform(),
    'cpu_count': os.cpu_count(),
    'devices': jax.device_count(),
    'processes': jax.process_count(),
    'device_kind': device.device_kind,
    'backend': device.platform,
    'packages': {name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def _git() -> str:
  root = Path(__file__).resolve().parents[2]

  def git(*args: str) -> str:
    command = ['git', '-C', str(root), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout

  if not (root / '.git').exists() or not shutil.which('git'):
    return f'slm {__version__}, not a git checkout\n'
  return git('rev-parse', 'HEAD') + git('status', '--short') + git('diff', 'HEAD')


def read_rewinds(workdir: Path) -> list[dict[str, Any]]:
  """Read how often a run went back to an earlier checkpoint.

  Returns:
    {'step', 'to', 'next', 'why', 'totals'} of each: the step that failed and the one returned to,
    the number of the batch to go on with, what failed, and the costs up to then.
  """
  path = workdir / 'rewinds.json'
  like = [{'step': int, 'to': int, 'next': int, 'why': str, 'totals': {str: float}}]
  return files.read_json(path, like) if path.exists() else []


def rewound_to(workdir: Path, step: int) -> dict[str, Any] | None:
  """Return the entry by which a run went back to the checkpoint of a step, None if there is none.

  A checkpoint that was saved after the run went back further is another one.
  """
  entry = next((r for r in reversed(read_rewinds(workdir)) if r['to'] <= step), None)
  return entry if entry and entry['to'] == step else None


def read_metrics(workdir: Path) -> list[dict[str, float]]:
  """Read metrics.jsonl, without a last line that a crash cut short; [] without the file.

  Raises:
    ValueError: if another line is damaged, naming the file and the line.
  """
  path, lines = workdir / 'metrics.jsonl', []
  texts = path.read_bytes().splitlines() if path.exists() else []
  for number, text in enumerate(texts, 1):
    try:
      lines.append(dict(json.loads(text)))
    except (ValueError, TypeError, RecursionError):
      if number < len(texts):
        raise ValueError(f'{path}: line {number} of {len(texts)} is damaged') from None
  files.check(path, lines, [{'step': int}])
  return lines


def read_totals(workdir: Path) -> dict[str, float]:
  """Read the totals of a run so far, those of result.json once it is finished."""
  path = workdir / 'result.json'
  return files.read_json(path) if path.exists() else (read_metrics(workdir) or [{}])[-1]
