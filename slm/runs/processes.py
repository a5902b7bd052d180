"""Several processes of one run: connecting, agreeing and ending together."""

import contextlib
import faulthandler
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from slm.base import artifact

_LAST = 3.0  # seconds that process 0 outlives the others, which JAX aborts without it


def connect(cfg: Mapping[str, Any]) -> None:
  """Connect the processes of a run, as the section `distributed` says.

  Keys left at their defaults are detected on Slurm, Kubernetes, MPI and TPUs. Exits if the others
  have not connected within `distributed.timeout` seconds.

  Raises:
    ValueError: if a key cannot be detected.
  """
  coordinator, count, index = cfg['coordinator'], cfg['num_processes'], cfg['process_id']
  if coordinator and not re.fullmatch(r'.+:\d+', coordinator):
    raise ValueError(
      f'distributed.coordinator: expected host:port of process 0, found {coordinator!r}'
    )
  faulthandler.disable()  # JAX aborts if process 0 is lost; Python's stack explains nothing then
  # JAX's own timeout ends in a stack of C++ frames: this one comes first.
  alarm = threading.Timer(cfg['timeout'], _time_out, [cfg])
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(
      coordinator or None,
      count if count > 0 else None,
      index if index >= 0 else None,
      initialization_timeout=cfg['timeout'] + 60,
    )
  except ValueError as e:
    keys = {'coordinator': 'coordinator', 'Number': 'num_processes'}
    key = next((key for word, key in keys.items() if word in str(e)), 'process_id')
    raise ValueError(f'distributed.{key}={cfg[key]!r}: {e}') from None
  finally:
    alarm.cancel()


def _time_out(cfg: Mapping[str, Any]) -> None:
  place = f'at distributed.coordinator={cfg["coordinator"]!r} ' if cfg['coordinator'] else ''
  _exit(
    f'distributed: after {cfg["timeout"]} s not all {cfg["num_processes"] or ""} processes have '
    f'met {place}(distributed.timeout)'
  )


def _exit(message: str, delay: float = 0.0) -> None:
  """End this process without waiting for the others, as JAX would."""
  print(f'error: {message}', file=sys.stderr, flush=True)
  time.sleep(delay)
  os._exit(1)


def exchange(text: str) -> list[str]:
  """Return the text of every process, in their order."""
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(data)])).ravel()
  padded = np.pad(data, (0, int(sizes.max()) - len(data)))
  rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
  return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def together(function: Callable[[], Any]) -> Any:
  """Call a function in every process; bad input in one of them stops all.

  Raises:
    ValueError: the error here, or else the first in another process.
    OSError: the error here.
  """
  result, problem = None, None
  try:
    result = function()
  except (ValueError, OSError) as e:
    problem = e
  texts = exchange(str(problem or ''))
  if problem:
    raise problem
  for index, text in enumerate(texts):
    if text:
      raise ValueError(f'process {index}: {text}')
  return result


def agree(cfg: Mapping[str, Any]) -> None:
  """Raise ValueError, naming process and key, if processes were started with different configs."""
  shared = {key: value for key, value in cfg.items() if key != 'distributed'}
  first, *others = (json.loads(text) for text in exchange(json.dumps(shared)))
  for index, other in enumerate(others, 1):
    if difference := artifact.difference(first, other):
      raise ValueError(f'process {index} has another config than process 0: {difference}')


@contextlib.contextmanager
def hold(folder: Path, name: str = 'writer') -> Iterator[None]:
  """Hold a directory, or `name` in it, for all processes; process 0 takes the lock."""
  with contextlib.ExitStack() as stack:
    together(lambda: jax.process_index() or stack.enter_context(artifact.hold(folder, name)))
    yield


@contextlib.contextmanager
def ending() -> Iterator[None]:
  """End one of several processes at once on an error, with one line.

  JAX would wait for the others, which wait for this one, and abort with a C++ stack.
  """
  try:
    yield
  except (ValueError, OSError, FloatingPointError, RuntimeError) as e:
    if jax.process_count() == 1:
      raise
    text = ' '.join(str(e).split())[:500]
    if isinstance(e, jax.errors.JaxRuntimeError):
      text += ': another process has ended; started again, all of them continue'
    _exit(f'process {jax.process_index()}: {text}', 0.0 if jax.process_index() else _LAST)
