"""Record files, and a pool of workers that resumes by file."""

import concurrent.futures.process
import contextlib
import multiprocessing.connection
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from slm.base import artifact, console
from slm.base.files import damage, read_json, replacing, stamp, write_json

Path = pathlib.Path


@contextlib.contextmanager
def record_writer(path: Path) -> Iterator[ArrayRecordWriter]:
  """Open an ArrayRecord file for writing; groups of one record allow random access."""
  with replacing(path) as temporary:
    writer = ArrayRecordWriter(str(temporary), 'group_size:1')
    try:
      yield writer
    finally:
      writer.close()


def read_records(path: Path, chunk: int = 256) -> Iterator[bytes]:
  """Read an ArrayRecord file in order, a chunk of records in memory at a time."""
  reader = ArrayRecordReader(str(path))
  for start in range(0, reader.num_records(), chunk):
    yield from reader.read(start, min(start + chunk, reader.num_records()))
  reader.close()


def sweep(folder: Path) -> None:
  """Delete the temporary files of dead processes, and of this one, which is only starting."""
  for path in folder.rglob('*.tmp'):
    pid = path.suffixes[-2][1:] if len(path.suffixes) > 1 else ''
    if pid.isdecimal() and (int(pid) == os.getpid() or not artifact.alive(int(pid))):
      path.unlink(missing_ok=True)


def _usable_cores() -> int:
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _start(initializer: Callable[..., None] | None, *args: Any) -> None:
  """Start a worker; it is to end with its parent, even if that is killed, and only then."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too: the parent decides
  threading.Thread(target=_end_with_parent, daemon=True).start()
  if initializer:
    initializer(*args)


def _end_with_parent() -> None:
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


class Pool:
  """Runs tasks in spawned processes (in this process when `workers` is 1).

  Every process, this one too, first calls initializer(*args).
  """

  def __init__(self, workers: int, initializer: Callable[..., None] | None = None, *args: Any):
    self._workers = workers or _usable_cores()
    self._initializer, self._args = initializer, args
    self._executor: concurrent.futures.ProcessPoolExecutor | None = None
    if initializer:
      initializer(*args)

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    if self._executor:
      if kind:  # what they are doing is of no more use
        for process in multiprocessing.active_children():
          process.kill()
      self._executor.shutdown(cancel_futures=True)

  def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Apply a module-level function; results in the order of `items`."""
    if self._workers == 1 or len(items) < 2:
      return map(function, items)
    if not self._executor:
      # Spawn: a forked child would inherit the locks of threads it does not have.
      spawn = multiprocessing.get_context('spawn')
      self._executor = concurrent.futures.ProcessPoolExecutor(
        self._workers, spawn, _start, (self._initializer, *self._args)
      )
    return self._parallel(function, items)

  def _parallel(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    try:
      yield from self._executor.map(function, items)
    except concurrent.futures.process.BrokenProcessPool:
      raise OSError(
        f'a worker process was killed, perhaps for memory: run the same command again, with fewer '
        f'workers than {self._workers} if need be; what is complete is kept'
      ) from None


def run(
  pool: Pool, description: str, function: Callable[[Any], dict], tasks: dict[Path, Any]
) -> list[dict]:
  """Run every task whose summary is not there yet; return all summaries in order.

  `tasks` maps the path of a task's summary (JSON) to the argument of `function`, which returns
  the summary: a dict with `files`, names beside the summary, whose sizes and hashes are added. It
  is written last, so a task that was killed, or whose files were deleted or cut short, runs again.
  """
  todo = [path for path in tasks if not complete(path)]
  with console.progress(description, len(tasks), 'task') as bar:
    bar.skip(len(tasks) - len(todo))
    for _ in pool.map(_timed, [(function, path, tasks[path]) for path in todo]):
      bar.update(1)
  return [read_json(path) for path in tasks]


def _timed(item: tuple[Callable[[Any], dict], Path, Any]) -> Path:
  function, path, argument = item
  start = time.monotonic()
  summary = function(argument)
  written = {name: stamp(path.parent / name) for name in summary['files']}
  write_json(path, summary | {'files': written, 'seconds': time.monotonic() - start})
  return path


def complete(path: Path) -> bool:
  """Say whether a task's summary and all its files are there, as long as they were."""
  return path.exists() and not any(damages(path, read_json(path)['files'], content=False))


def damages(beside: Path, stamps: dict[str, Any], content: bool = True) -> Iterator[str]:
  """Yield what is wrong with each of the files beside a path, as `files.damage` does."""
  for name, known in stamps.items():
    # Earlier versions kept the size alone.
    size, *hashed = known if isinstance(known, list) else [known]
    if problem := damage(beside.parent / name, [size, *hashed], content and bool(hashed)):
      yield problem
