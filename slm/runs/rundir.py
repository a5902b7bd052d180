"""A run is a directory: resolved config, code version, environment, metrics, cost ledger."""

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
from slm.base import files

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')

LINEAGE = 'slm_lineage.json'  # beside exported weights: what they were made from


def split_ref(ref: str | Path) -> tuple[Path, int | None]:
  """Split RUN or RUN@STEP into the run directory and the step, None where none is named."""
  ref = Path(ref)
  name, at, step = ref.name.rpartition('@')
  return (ref.with_name(name), int(step)) if at and name and step.isdigit() else (ref, None)


def read_config(ref: str | Path) -> dict[str, Any]:
  """Read the resolved config of RUN or RUN@STEP.

  Raises:
    ValueError: if it is damaged, or of a model of transformers.
  """
  path = split_ref(ref)[0]
  if of_transformers(path):
    raise ValueError(
      f'{path}: a model of transformers, not a run: python -m slm.hf import {path} RUN makes it one'
    )
  return files.read_json(path / 'config.json')


def refuse_unfinished(path: Path) -> None:
  """Refuse an export that was cut short.

  Raises:
    ValueError: if the directory is one.
  """
  if (path / LINEAGE).exists() and not (path / 'config.json').exists():
    raise ValueError(f'{path}: an export that was cut short: run `slm.hf export` again')


def of_transformers(path: Path) -> bool:
  """Say whether the config.json of a directory is one that transformers wrote."""
  refuse_unfinished(path)
  config = files.read_json(path / 'config.json')
  return isinstance(config, dict) and 'model_type' in config


def evaluations(ref: str | Path, kind: str = 'eval') -> Path:
  """Return the folder of a run's (or its checkpoint's) losses or `tasks`; .json sums them up."""
  run, step = split_ref(ref)
  return run / (kind if step is None else f'{kind}-{step}')


def write_run(workdir: Path, config: Mapping[str, Any], step: int = 0) -> None:
  """Record what runs and, from which step, with which code and where; process 0 alone writes."""
  if jax.process_index():
    return
  files.write_json(workdir / 'config.json', config)  # first: it marks the directory
  starts = read_starts(workdir)
  now = {'code': _git(), 'environment': environment()}
  if not starts or now != {key: starts[-1][key] for key in now}:
    files.write_json(workdir / 'starts.json', [*starts, {'step': step, **now}])


def read_starts(workdir: Path) -> list[dict[str, Any]]:
  """Read each change of code or environment over a run: {'step', 'code', 'environment'}."""
  path = workdir / 'starts.json'
  return files.read_json(path) if path.exists() else []


def served_step(ref: str | Path) -> int | None:
  """Return the step whose weights RUN@STEP or a finished run serves, None if it is not there."""
  workdir, step = split_ref(ref)
  if step is not None:
    return step if (workdir / 'checkpoints' / str(step)).exists() else None
  if not (workdir / 'result.json').exists():
    return None
  result, config = (files.read_json(workdir / f'{n}.json') for n in ('result', 'config'))
  # Without early stopping the last checkpoint serves, whatever the held-out losses were.
  return result.get('best_step' if config['eval']['patience'] else 'steps', result['steps'])


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


def read_metrics(workdir: Path) -> list[dict[str, float]]:
  """Read metrics.jsonl; a line cut short by a crash ends it."""
  return list(_lines(workdir / 'metrics.jsonl'))


def _lines(path: Path):
  for line in path.read_text().split('\n'):
    try:
      yield json.loads(line)
    except json.JSONDecodeError:
      return
