"""Directories that commands write: one writer at a time, and of one thing that was asked for.

A command holds its directory while it writes (`writes`, `hold`), and keeps a record of what was
asked: settings and the hashes of inputs. Asked the same again it continues, or says that it is
done; asked for something else it refuses, naming the first difference (`check`, `claim`).
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import inspect
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from slm.base import console, files

Path = pathlib.Path
_LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: list[Path] = []  # by this process


def writes(parameter: str) -> Callable[[Callable], Callable]:
  """Decorate a function that writes the directory named by one of its parameters: it holds it."""

  def decorate(function: Callable) -> Callable:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def holding(*args: Any, **named: Any) -> Any:
      with hold(Path(signature.bind(*args, **named).arguments[parameter])):
        return function(*args, **named)

    return holding

  return decorate


@contextlib.contextmanager
def hold(folder: Path, name: str = 'writer') -> Iterator[None]:
  """Keep other processes from writing a directory, or what is called `name` in it.

  What a dead process held is taken over. A directory made here that stays empty is removed.

  Raises:
    ValueError: if another process holds it, naming that process, its machine and since when.
  """
  path = (folder / f'{name}.lock').absolute()
  if path in _held:
    yield
    return
  made = [p for p in (folder, *folder.parents) if not p.exists()]
  folder.mkdir(parents=True, exist_ok=True)
  handle = _take(path)
  _held.append(path)
  try:
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


def _take(path: Path) -> int:
  """Lock a file and write in it who holds it; return its open descriptor."""
  while True:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    holder, refusal = _read(handle), ''
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      refusal = _refusal(path, holder)
      if e.errno in _LOCKLESS:  # what the file says must do
        refusal = _alive(holder) and f'{refusal} (if that process is gone, delete {path})'
    if refusal:
      os.close(handle)
      raise ValueError(refusal)
    with contextlib.suppress(FileNotFoundError):  # released and removed since it was opened
      if os.path.samestat(os.fstat(handle), path.stat()):
        break
    os.close(handle)
  me = {'host': socket.gethostname(), 'pid': os.getpid(), 'started': _started(os.getpid())}
  me['since'] = time.strftime('%Y-%m-%d %H:%M:%S')
  os.ftruncate(handle, 0)
  os.pwrite(handle, json.dumps(me).encode(), 0)
  return handle


def _read(handle: int) -> dict[str, Any]:
  try:
    return dict(json.loads(os.pread(handle, 4096, 0)))
  except ValueError:
    return {}  # new, or not written yet


def _alive(holder: Mapping[str, Any]) -> bool:
  """Say whether a process may still run: one of another machine may."""
  if not holder or holder['host'] != socket.gethostname():
    return bool(holder)
  return alive(holder['pid']) and holder['started'] == _started(holder['pid'])


def alive(pid: int) -> bool:
  """Say whether a process of this machine runs."""
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:
    pass  # somebody else's
  return True


def _started(pid: int) -> str:
  """Return when a process started, in the kernel's ticks; '' where /proc does not say."""
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
  except OSError:
    return ''


def _refusal(path: Path, holder: Mapping[str, Any]) -> str:
  who = 'another process'
  if holder:
    who = f'process {holder["pid"]} on {holder["host"]} since {holder["since"]}'
  return f'{path.parent}: is being written by {who}: wait for it, or choose another directory'


def check(
  record: Path, asked: Any, what: str, read: Callable[[Path], Any] = files.read_json
) -> None:
  """Refuse the directory of a record, which `read` reads, if it holds something else.

  Raises:
    ValueError: if it does: another record, naming the first difference, or files without one.
  """
  folder = record.parent
  if record.exists():
    check_same(folder, read(record), plain(asked), what)
  elif occupied(folder):
    raise ValueError(f'{folder} is not empty and holds no {record.name}: choose another directory')


def occupied(folder: Path) -> bool:
  """Say whether a directory holds anything but the traces of being written."""
  return folder.exists() and any(p.suffix not in ('.tmp', '.lock') for p in folder.iterdir())


def claim(record: Path, asked: Any, what: str) -> None:
  """Record what a directory is to hold, if it holds nothing else.

  Raises:
    ValueError: as `check` does.
  """
  check(record, asked, what)
  if not record.exists():
    files.write_json(record, asked)


def contents(paths: Iterable[Path], known: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
  """Return [size, time of change, hash] by name of files that a directory is made of.

  Those in `known` stand where nothing changed: neither size nor time, or the hash did not. What an
  earlier version knew, without a hash, stands as far as it goes.
  """
  sizes = {path: path.stat() for path in paths}
  stale = {p: s.st_size for p, s in sizes.items() if not _unchanged(s, known.get(str(p)))}

  def entry(path: Path) -> list[Any]:
    before = known.get(str(path))
    if path not in stale:
      return before
    found = [sizes[path].st_size, sizes[path].st_mtime_ns, files.sha256(path)]
    same = before and len(before) == 3 and (before[0], before[2]) == (found[0], found[2])
    return before if same else found

  found = {}
  with (
    console.progress('hash of inputs', sum(stale.values()) / 1e6, 'MB') as bar,
    concurrent.futures.ThreadPoolExecutor(4) as pool,
  ):
    for path, value in zip(sizes, pool.map(entry, sizes), strict=True):
      found[str(path)] = value
      bar.update(stale.get(path, 0) / 1e6)
  return found


def _unchanged(stat: os.stat_result, entry: list[Any] | None) -> bool:
  return bool(entry) and entry[:2] == [stat.st_size, stat.st_mtime_ns][: len(entry)]


def check_same(folder: Path, was: Any, now: Any, what: str) -> None:
  """Refuse to go on in a folder that was made for something else.

  Raises:
    ValueError: if it was, naming the first difference.
  """
  if changed := difference(was, now):
    raise ValueError(f'{folder} holds {what}: {changed}; choose another directory')


def difference(old: Any, new: Any, key: str = '') -> str:
  """Name the first key that two records disagree on, and both values; '' if none."""
  if isinstance(old, dict) and isinstance(new, dict):
    for name in sorted(old.keys() | new.keys()):
      changed = difference(old.get(name), new.get(name), f'{key}.{name}' if key else name)
      if changed:
        return changed
    return ''
  return '' if old == new else f'{key} was {old!r}, now {new!r}'


def plain(value: Any) -> Any:
  """Return what JSON makes of a value: tuples are lists."""
  return json.loads(json.dumps(value))
