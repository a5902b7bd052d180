"""Several processes of one run: connecting, agreeing and ending together.

The first that ends early leaves its status and the reason with JAX's coordinator, in process 0,
where the others find them: all end with the same line and status, in seconds, even while they wait
for it. A process that is killed leaves nothing: the others end with status LOST.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # the only place of the coordinator's client
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from slm.base import artifact, lease, stage
from slm.weights import sharding

LOST = 75  # exit status of a process that lost another, as EX_TEMPFAIL: the same command continues
_LOSS = 'another process has ended; started again, all of them continue'
_ENDED = 'slm/ended'  # the coordinator's key of what the first process to end says
_EVERY = 0.5  # seconds between looks at it
_LAST = 2.0  # seconds in which all processes read it; process 0, which keeps it, outlives them
# Errors of JAX that are this process's own; all others follow from the loss of another.
_OWN = ('RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT', 'UNIMPLEMENTED')
_one_end = threading.Lock()  # taken for good by the thread that ends this process
_said: list[int] = []  # the status with which it ends, once its line is printed


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
  faulthandler.disable()  # Python's stack does not explain why JAX aborts
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
  ctypes.CDLL(None).signal(signal.SIGABRT, _aborting)  # Python's own handlers come too late


def _time_out(cfg: Mapping[str, Any]) -> None:
  place = f'at distributed.coordinator={cfg["coordinator"]!r} ' if cfg['coordinator'] else ''
  _say(
    LOST,
    f'distributed: after {cfg["timeout"]} s not all {cfg["num_processes"] or ""} processes have '
    f'met {place}(distributed.timeout)',
  )
  os._exit(LOST)


def _say(status: int, message: str) -> None:
  print(f'error: {stage.named(message)}', file=sys.stderr, flush=True)
  _said.append(status)
  artifact.release()


def _end(status: int, message: str) -> NoReturn:
  """End this process with the status and message of the first of all to end.

  At once: JAX would wait for the others, which wait for this one, and abort with a C++ stack.
  """
  _one_end.acquire()
  client, seconds = distributed.global_state.client, _LAST / (1 + bool(jax.process_index()))
  try:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was the first
      client.key_value_set(_ENDED, json.dumps([status, message]))
    status, message = json.loads(client.key_value_try_get(_ENDED))
  except jax.errors.JaxRuntimeError:  # process 0 has gone: JAX aborts, and says more before it
    _one_end.release()
    time.sleep(seconds)
  _say(status, message)
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    client.wait_at_barrier(_ENDED, round(seconds * 1000))
  if not jax.process_index():
    time.sleep(_EVERY)  # the others leave the barrier at the same moment
  os._exit(status)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborting(_: int) -> None:
  """End this process, with one line, where JAX aborts it: on the loss of process 0, for one."""
  if not _said:  # without _one_end, whose holder may wait for the thread that this is
    _say(LOST, f'process {distributed.global_state.process_id}: JAX aborts as {_LOSS}')
  os._exit(_said[0])


def _lost(index: int, why: object) -> NoReturn:
  """End this process because another has been killed, or its machine is lost."""
  text = ' '.join(str(why).split())[:500]
  _end(LOST, f'process {index}: {text}: {_LOSS}')


def _watch(index: int, over: threading.Event) -> None:
  """End this process as soon as another has ended early, until training is over."""
  while not over.wait(_EVERY):
    try:
      _end(*json.loads(distributed.global_state.client.key_value_try_get(_ENDED)))
    except jax.errors.JaxRuntimeError as e:
      if not str(e).startswith('NOT_FOUND') and not over.is_set():
        _lost(index, e)


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


def local_share(mesh: Mesh) -> tuple[int, int]:
  """Return which of how many equal parts of the batch the devices of this process hold."""
  rows = sharding.batch_devices(mesh)
  places = sharding.batch_sharding(mesh).addressable_devices_indices_map((rows,))
  ranges = [s.indices(rows) for (s,) in places.values()]
  start, stop = min(r[0] for r in ranges), max(r[1] for r in ranges)
  return start // (stop - start), rows // (stop - start)


def global_rows(batch: Any, mesh: Mesh, axis: int = 0) -> Any:
  """Make global arrays of this process's part of the rows, which are dimension `axis`."""
  split = sharding.batch_sharding(mesh, axis)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), batch)


def local_rows(tree: Any, axis: int = 0) -> Any:
  """Return this process's part of global arrays whose dimension `axis` is the rows, in numpy."""

  def local(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return np.asarray(x)
    parts = {s.index[axis].start or 0: s.data for s in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis)

  return jax.tree.map(local, tree)


@contextlib.contextmanager
def hold(folder: Path, name: str = 'writer') -> Iterator[None]:
  """Hold a directory, or `name` in it, for all processes; process 0 takes the lock."""
  with contextlib.ExitStack() as stack:
    together(lambda: jax.process_index() or stack.enter_context(artifact.hold(folder, name)))
    share(folder)
    yield


def share(folder: Path) -> None:
  """Let all processes see what process 0 has written to a run at an address, in its stage."""
  if stage.address(folder) and jax.process_count() > 1:
    together(lambda: jax.process_index() or lease.push(folder))
    together(lambda: jax.process_index() and stage.fetch(folder))


@contextlib.contextmanager
def ending() -> Iterator[None]:
  """End all of several processes at once on an error in one of them, with one line."""
  index, over = jax.process_index(), threading.Event()
  if jax.process_count() > 1:
    threading.Thread(target=_watch, args=(index, over), daemon=True).start()
  try:
    yield
  except (ValueError, OSError, FloatingPointError, RuntimeError) as e:
    if jax.process_count() == 1:
      raise
    if isinstance(e, jax.errors.JaxRuntimeError) and not str(e).startswith(_OWN):
      _lost(index, e)
    text = ' '.join(str(e).split())[:2000]
    _end(1, text if re.match(r'process \d+[ :]', text) else f'process {index}: {text}')
  finally:
    over.set()
