"""Directories that commands write: one writer at a time, made from one set of settings.

A command locks its directory while it writes (`writes`, `hold`) and records what the directory is
made from: settings and hashes of inputs. Called with the same again it continues, or finds its work
done; called with others it fails and names the first difference (`check`, `claim`).
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import inspect
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slm.base import console, files, lease, stage

# Errors of file systems without locks.
_LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: list[Path] = []  # locks of this process


class HeldError(ValueError):
  """Another process writes a directory.

  Attributes:
    writer: that process, as far as it is known.
  """

  def __init__(self, folder: object, holder: Mapping[str, Any], hint: str = ''):
    self.writer = 'another process'
    if holder:
      self.writer = f'process {holder["pid"]} on {holder["host"]} since {holder["since"]}'
    self.writer += hint
    super().__init__(
      f'{folder}: is being written by {self.writer}: wait for it, or choose another directory'
    )


def writes(parameter: str, addresses: bool = False) -> Callable[[Callable], Callable]:
  """Make a decorator: the function holds the directory that `parameter` names while it runs.

  With `addresses` that may be one such as gs://bucket/run, for which the function gets its stage.
  """

  def decorate(function: Callable) -> Callable:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def holding(*args: Any, **named: Any) -> Any:
      given = signature.bind(*args, **named)
      folder = given.arguments[parameter]
      if addresses and stage.is_address(folder):
        folder = given.arguments[parameter] = stage.of(folder)
      with hold(Path(folder)):
        return function(*given.args, **given.kwargs)

    return holding

  return decorate


@contextlib.contextmanager
def hold(folder: Path, name: str = 'writer') -> Iterator[None]:
  """Lock a directory, or the part of it called `name`, against other processes.

  The lock of a dead process is taken over. A directory made here that stays empty is removed. A
  stage is locked at its address too.

  Raises:
    HeldError: if another process holds the lock: its number, its machine and since when.
    ValueError: if the directory is an address, not its stage.
    OSError: if the address of a stage cannot be read or written.
  """
  if stage.is_address(folder):
    raise ValueError(f'{folder}: expected a directory: this command writes on this machine alone')
  path = (folder / f'{name}.lock').absolute()
  if path in _held:
    yield
    return
  made = [p for p in (folder, *folder.parents) if not p.exists()]
  folder.mkdir(parents=True, exist_ok=True)
  handle = _take(path)
  _held.append(path)
  try:
    with lease.held(folder, name, _holder(), _alive, HeldError):
      yield
  except BaseException as e:
    if not isinstance(e, Exception):  # a signal
      e.add_note(f'the same command continues {folder}')
    raise
  finally:
    _held.remove(path)
    path.unlink(missing_ok=True)
    os.close(handle)
    with contextlib.suppress(OSError):
      for folder in made:
        folder.rmdir()


def release() -> None:
  """Remove the locks of this process, which ends without leaving `hold`."""
  for path in _held:
    path.unlink(missing_ok=True)
  lease.release()


def _take(path: Path) -> int:
  """Lock a file, write its holder into it, and return its open descriptor."""
  while True:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    holder, refusal = _read(handle), None
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      if e.errno not in _LOCKLESS:
        refusal = HeldError(path.parent, holder)
      elif _alive(holder):  # the holder in the file decides
        refusal = HeldError(path.parent, holder, f' (if that process is gone, delete {path})')
    if refusal:
      os.close(handle)
      raise refusal
    with contextlib.suppress(FileNotFoundError):  # it was released and removed meanwhile
      if os.path.samestat(os.fstat(handle), path.stat()):
        break
    os.close(handle)
  os.ftruncate(handle, 0)
  os.pwrite(handle, json.dumps(_holder()).encode(), 0)
  return handle


def _holder() -> dict[str, Any]:
  """Describe this process; `boot` tells machines of one name apart."""
  boot = Path('/proc/sys/kernel/random/boot_id')
  return {
    'host': socket.gethostname(), 'pid': os.getpid(), 'started': _started(os.getpid()),
    'since': time.strftime('%Y-%m-%d %H:%M:%S'),
    'boot': boot.read_text().strip() if boot.exists() else '',
  }  # fmt: skip


def _read(handle: int) -> dict[str, Any]:
  try:
    return dict(json.loads(os.pread(handle, 4096, 0)))
  except ValueError:
    return {}  # new, or not written yet


def _alive(holder: Mapping[str, Any]) -> bool:
  """Return whether a holder may still run; one on another machine may."""
  if not holder or holder['host'] != socket.gethostname():
    return bool(holder)
  return alive(holder['pid']) and holder['started'] == _started(holder['pid'])


def alive(pid: int) -> bool:
  """Return whether a process of this machine runs."""
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:
    pass  # another user's
  return True


def _started(pid: int) -> str:
  """Return when a process started, in kernel ticks; '' without /proc."""
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
  except OSError:
    return ''


def check(
  record: Path, settings: Any, what: str, read: Callable[[Path], Any] = files.read_json
) -> None:
  """Check that the directory of a record is empty or was made from the same settings.

  Raises:
    ValueError: if the record, which `read` reads, differs (naming the first difference) or is
      missing beside other files. `what` describes what the directory would then hold.
  """
  folder = record.parent
  if record.exists():
    check_same(folder, read(record), plain(settings), what)
  elif occupied(folder):
    raise ValueError(f'{folder} is not empty and holds no {record.name}: choose another directory')


def occupied(folder: Path) -> bool:
  """Return whether a directory holds anything but locks and temporary files."""
  return folder.exists() and any(p.suffix not in ('.tmp', '.lock') for p in folder.iterdir())


def claim(record: Path, settings: Any, what: str) -> None:
  """Write the record of a directory if there is none; raise ValueError as `check` does."""
  check(record, settings, what)
  if not record.exists():
    files.write_json(record, settings)


def contents(paths: Iterable[Path], known: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
  """Return [size, time of change, hash] of input files by name.

  An entry of `known` is kept if the file's size and time are the same, or its size and hash.
  Entries of earlier versions lack the hash, or the time too.
  """
  stats = {path: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
  entries = {path: known.get(str(path)) or [] for path in stats}
  unchanged = lambda path: entries[path] and entries[path][:2] == stats[path][: len(entries[path])]
  stale = {path: stat[0] for path, stat in stats.items() if not unchanged(path)}

  def entry(path: Path) -> list[Any]:
    if path not in stale:
      return entries[path]
    new = [*stats[path], files.sha256(path)]
    return entries[path] if entries[path][::2] == new[::2] else new

  hashed = {}
  with (
    console.Progress('hash of inputs', sum(stale.values()) / 1e6, 'MB') as bar,
    concurrent.futures.ThreadPoolExecutor(4) as pool,
  ):
    for path, value in zip(stats, pool.map(entry, stats), strict=True):
      hashed[str(path)] = value
      bar.update(stale.get(path, 0) / 1e6)
  return hashed


def check_same(folder: Path, was: Any, now: Any, what: str) -> None:
  """Raise ValueError, naming the first difference, if a directory has other settings."""
  if change := difference(was, now):
    raise ValueError(f'{folder} holds {what}: {change}; choose another directory')


def difference(old: Any, new: Any, key: str = '') -> str:
  """Describe the first key in which two records differ, with both values; '' if none."""
  if isinstance(old, dict) and isinstance(new, dict):
    for name in sorted(old.keys() | new.keys()):
      change = difference(old.get(name), new.get(name), f'{key}.{name}' if key else name)
      if change:
        return change
    return ''
  return '' if old == new else f'{key} was {old!r}, now {new!r}'


def plain(value: Any) -> Any:
  """Return a value as JSON reads it back: tuples become lists."""
  return json.loads(json.dumps(value))
