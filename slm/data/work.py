"""Record files, and a pool of workers whose tasks resume by file."""

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
_CHUNK = 256  # records in memory at a time


@contextlib.contextmanager
def record_writer(path: Path) -> Iterator[ArrayRecordWriter]:
  """Open an ArrayRecord file for writing; groups of one record allow random access."""
  with replacing(path) as temporary:
    writer = ArrayRecordWriter(str(temporary), 'group_size:1')
    try:
      yield writer
    finally:
      writer.close()


def read_records(path: Path) -> Iterator[bytes]:
  """Read an ArrayRecord file in order."""
  reader = ArrayRecordReader(str(path))
  for start in range(0, reader.num_records(), _CHUNK):
    yield from reader.read(start, min(start + _CHUNK, reader.num_records()))
  reader.close()


def sweep(folder: Path) -> None:
  """Delete temporary files of dead processes, and of this process's id: it has written none yet."""
  for path in folder.rglob('*.tmp'):
    pid = path.suffixes[-2][1:] if len(path.suffixes) > 1 else ''
    if pid.isdecimal() and (int(pid) == os.getpid() or not artifact.alive(int(pid))):
      path.unlink(missing_ok=True)


def _start_worker() -> None:
  """Make this process end with its parent, even if the parent is killed, and not before."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too: the parent decides
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


class Pool:
  """Runs tasks in spawned processes, or in this one with one worker; 0 is one per usable core."""

  def __init__(self, workers: int):
    affinity = getattr(os, 'sched_getaffinity', None)  # macOS has none
    self._workers = workers or (len(affinity(0)) if affinity else os.cpu_count()) or 1
    self._executor: concurrent.futures.ProcessPoolExecutor | None = None

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    if self._executor:
      if kind:  # after an error the results are not needed
        for process in list(self._executor._processes.values()):  # Python 3.14: kill_workers()
          process.kill()
      self._executor.shutdown(cancel_futures=True)

  def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Apply a module-level function; yield the results in the order of `items`.

    Raises:
      OSError: if a worker was killed.
    """
    if self._workers == 1 or len(items) < 2:
      yield from map(function, items)
      return
    if not self._executor:
      # Spawn: a forked child would inherit the locks of threads it does not have.
      spawn = multiprocessing.get_context('spawn')
      self._executor = concurrent.futures.ProcessPoolExecutor(self._workers, spawn, _start_worker)
    try:
      yield from self._executor.map(function, items)
    except concurrent.futures.process.BrokenProcessPool:
      raise OSError(
        'a worker process was killed, perhaps for lack of memory: run the same command again, with '
        f'fewer workers than {self._workers} if it recurs; complete files are kept'
      ) from None


def run(
  pool: Pool, description: str, function: Callable[[Any], dict], tasks: dict[Path, Any]
) -> list[dict]:
  """Run every task that is not complete; return the summaries of all tasks in order.

  `tasks` maps the path of a task's summary (JSON) to the argument of `function`, which returns the
  summary: a dict with `files`, names in the summary's folder, whose sizes and hashes are added. The
  summary is written last, so a task that was killed, or whose files were deleted or cut short, runs
  again.
  """
  todo = [path for path in tasks if not complete(path)]
  with console.Progress(description, len(tasks), 'task') as bar:
    bar.skip(len(tasks) - len(todo))
    for _ in pool.map(timed, [(function, path, tasks[path]) for path in todo]):
      bar.update(1)
  return [read_json(path) for path in tasks]


def timed(item: tuple[Callable[[Any], dict], Path, Any]) -> Path:
  """Run (function, path of the summary, argument) and write the summary; return its path."""
  function, path, argument = item
  start = time.monotonic()
  summary = function(argument)
  written = {name: stamp(path.parent / name) for name in summary['files']}
  write_json(path, summary | {'files': written, 'seconds': time.monotonic() - start})
  return path


def complete(path: Path) -> bool:
  """Return whether a task's summary is readable and all its files have their recorded sizes."""
  try:
    summary = read_json(path, {'files': dict})
  except (FileNotFoundError, ValueError):
    return False
  return not any(damages(path, summary['files'], content=False))


def damages(
  sibling: Path, stamps: dict[str, Any], content: bool = True
) -> Iterator[tuple[Path, str]]:
  """Yield each damaged file in the folder of `sibling` and its damage, as `files.damage` does."""
  for name, recorded in stamps.items():
    if not isinstance(recorded, list):  # earlier versions recorded the size alone
      recorded = [recorded]
    path = sibling.parent / name
    if problem := damage(path, recorded, content and len(recorded) > 1):
      yield path, problem
