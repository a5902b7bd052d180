"""Several processes of one run: they start together, agree, and end together."""

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

_LAST = 3.0  # seconds: without process 0, JAX aborts the others before they have said why they end


def connect(cfg: Mapping[str, Any]) -> None:
  """Meet the other processes of a run, as `distributed` says.

  What is left at its default is found out from Slurm, Kubernetes, MPI or the TPU's metadata. Ends
  this process if the others are not there within `distributed.timeout` seconds.

  Raises:
    ValueError: if it cannot be found out.
  """
  place, count, index = cfg['coordinator'], cfg['num_processes'], cfg['process_id']
  if place and not re.fullmatch(r'.+:\d+', place):
    raise ValueError(f'distributed.coordinator: expected host:port of process 0, found {place!r}')
  faulthandler.disable()  # JAX aborts if process 0 is lost: where Python then was says nothing
  # JAX's own timeout ends in a stack of C++ frames: this one comes first.
  alarm = threading.Timer(cfg['timeout'], _alone, [cfg])
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(
      place or None,
      count if count > 0 else None,
      index if index >= 0 else None,
      initialization_timeout=cfg['timeout'] + 60,
    )
  except ValueError as e:
    missing = {'coordinator': 'coordinator', 'Number': 'num_processes'}
    key = next((key for word, key in missing.items() if word in str(e)), 'process_id')
    raise ValueError(f'distributed.{key}={cfg[key]!r}: {e}') from None
  finally:
    alarm.cancel()


def _alone(cfg: Mapping[str, Any]) -> None:
  where = f'at distributed.coordinator={cfg["coordinator"]!r} '
  print(
    f'error: distributed: after {cfg["timeout"]} s not all {cfg["num_processes"] or ""} processes '
    f'have met {where if cfg["coordinator"] else ""}(distributed.timeout)',
    file=sys.stderr, flush=True,
  )  # fmt: skip
  os._exit(1)


def exchange(text: str) -> list[str]:
  """Return what every process says, in their order."""
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(data)])).ravel()
  padded = np.pad(data, (0, int(sizes.max()) - len(data)))
  rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
  return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def together(function: Callable[[], Any]) -> Any:
  """Call a function in every process: if bad input stops one of them, it stops all.

  Raises:
    ValueError: what it raised here, or elsewhere first.
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
  """Refuse to go on if the processes were started with different configs.

  Raises:
    ValueError: naming the first process and the first key that differ from process 0.
  """
  kept = {key: value for key, value in cfg.items() if key != 'distributed'}
  first, *others = (json.loads(text) for text in exchange(json.dumps(kept)))
  for index, other in enumerate(others, 1):
    if found := artifact.difference(first, other):
      raise ValueError(f'process {index} has another config than process 0: {found}')


@contextlib.contextmanager
def hold(folder: Path, name: str = 'writer') -> Iterator[None]:
  """Hold a directory, or `name` in it, that all processes write: process 0 does, for all."""
  with contextlib.ExitStack() as stack:
    together(lambda: jax.process_index() or stack.enter_context(artifact.hold(folder, name)))
    yield


@contextlib.contextmanager
def ending() -> Iterator[None]:
  """Where there are several processes, end this one at once on an error, in one line.

  JAX would wait for the others, which wait for this one, and in the end abort with a stack.
  """
  try:
    yield
  except (ValueError, OSError, FloatingPointError, RuntimeError) as e:
    if jax.process_count() == 1:
      raise
    text = ' '.join(str(e).split())[:500]
    if isinstance(e, jax.errors.JaxRuntimeError):
      text += ': another process has ended; started again, all of them continue'
    print(f'error: process {jax.process_index()}: {text}', file=sys.stderr, flush=True)
    if jax.process_index() == 0:
      time.sleep(_LAST)
    os._exit(1)
