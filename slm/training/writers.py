"""Writers: TensorBoard, wandb, MLflow and Trackio show a run's metrics while it trains.

metrics.jsonl is the record of a run; writers get what is written there. Their own environment
variables (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, ...) say where they write. What they know a
run by is kept in its writers.json, so that a run that is started again continues its curves.
"""

import contextlib
import importlib.util
import os
import sys
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from slm.base import files, schema
from slm.runs.config import RunConfig

PROJECT = 'slm'  # where no environment variable names a project or experiment
_BATCH = 100  # parameters that MLflow's servers take at once


class Writer(Protocol):
  """Takes the values of steps; made with a run's directory, config and the step it starts at."""

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Show the values of a step."""

  def finish(self, failed: bool) -> None:
    """Write what is left, and end the run there."""


class TensorBoard:
  """Writes event files to RUN/tb."""

  def __init__(self, workdir: Path, config: Mapping[str, Any], start: int):
    import tensorboardX  # takes a second where torch is installed, which it imports

    self._board = tensorboardX.SummaryWriter(str(workdir / 'tb'), purge_step=start + 1)

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Add a scalar for each value."""
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def finish(self, failed: bool) -> None:
    """Close the file."""
    self._board.close()


class Wandb:
  """Logs to Weights & Biases, as `wandb login`, WANDB_MODE and WANDB_PROJECT say."""

  def __init__(self, workdir: Path, config: Mapping[str, Any], start: int):
    import wandb

    identity = _known(workdir).get('wandb') or uuid.uuid4().hex
    self._run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', PROJECT),
      name=workdir.name,
      id=identity,
      resume='allow',
      config=dict(config),
      dir=str(workdir),
    )
    _remember(workdir, 'wandb', identity)

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Queue the values; wandb ignores steps that it has already."""
    self._run.log(dict(values), step=step)

  def finish(self, failed: bool) -> None:
    """Wait for the queue."""
    self._run.finish(exit_code=int(failed))


class MLflow:
  """Logs to the MLflow store of MLFLOW_TRACKING_URI, under MLFLOW_EXPERIMENT_NAME."""

  def __init__(self, workdir: Path, config: Mapping[str, Any], start: int):
    import mlflow

    self._mlflow = mlflow
    if identity := _known(workdir).get('mlflow'):
      mlflow.start_run(run_id=identity)
      return
    mlflow.set_experiment(os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT))
    run = mlflow.start_run(run_name=workdir.name)
    _remember(workdir, 'mlflow', run.info.run_id)
    params = list(_flat(config).items())  # they cannot be changed later
    for i in range(0, len(params), _BATCH):
      mlflow.log_params(dict(params[i : i + _BATCH]))

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Queue the values: training waits for no server."""
    self._mlflow.log_metrics(dict(values), step=step, synchronous=False)

  def finish(self, failed: bool) -> None:
    """Wait for the queue."""
    self._mlflow.flush_async_logging()
    self._mlflow.end_run('FAILED' if failed else 'FINISHED')


class Trackio:
  """Logs to Trackio, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set."""

  def __init__(self, workdir: Path, config: Mapping[str, Any], start: int):
    import trackio

    # Trackio knows a run by its name alone.
    name = _known(workdir).get('trackio') or f'{workdir.name}-{uuid.uuid4().hex[:8]}'
    project = os.environ.get('TRACKIO_PROJECT', PROJECT)
    trackio.init(project, name=name, resume='allow', config=dict(config))
    self._trackio = trackio
    _remember(workdir, 'trackio', name)

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Queue the values."""
    self._trackio.log(dict(values), step=step)

  def finish(self, failed: bool) -> None:
    """Wait for the queue."""
    self._trackio.finish()


WRITERS = {'tensorboard': TensorBoard, 'wandb': Wandb, 'mlflow': MLflow, 'trackio': Trackio}


def check(names: Collection[str]) -> None:
  """Raise ValueError, naming the extra, if the package of one of `RunConfig.writers` is missing."""
  for name in names:
    if not importlib.util.find_spec(name):
      raise ValueError(f"writers: {name} is not installed: pip install 'slm[{name}]'")


def start(cfg: RunConfig, workdir: Path, step: int) -> list[Writer]:
  """Start the writers of a run that has taken `step` steps.

  Raises:
    ValueError: if a writer cannot start, with what its package says.
  """
  names = dict.fromkeys([*['tensorboard'] * cfg.tensorboard, *cfg.writers])
  started = []
  for name in names:
    try:
      with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result of a command
        started.append(WRITERS[name](workdir, schema.plain(cfg), step))
    except Exception as e:  # noqa: BLE001 (each package raises classes of its own)
      finish(started, failed=True)
      raise ValueError(f'writers: {name} cannot start: {e}') from None
  return started


def finish(writers: Collection[Writer], failed: bool) -> None:
  """Finish writers."""
  with contextlib.redirect_stdout(sys.stderr):
    for writer in writers:
      writer.finish(failed)


def _known(workdir: Path) -> dict[str, str]:
  """Read what writers know a run by: {writer: id}."""
  path = workdir / 'writers.json'
  return files.read_json(path) if path.exists() else {}


def _remember(workdir: Path, name: str, identity: str) -> None:
  files.write_json(workdir / 'writers.json', _known(workdir) | {name: identity})


def _flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Return a nested config with dotted keys."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      flat |= _flat(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat
