"""Run directories at addresses, gs://bucket/run: the stage of each on this machine.

A stage is a directory below $SLM_CACHE that holds the small files of a run: all but checkpoints,
which every process reads and writes at the address itself. Only where an address enters (`of`,
`fetch`) and where checkpoints lie (`origin`) is it known of; slm/base/lease.py puts what is
written to a stage at its address.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import sys
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

from slm.base import files

Path = pathlib.Path
COMMIT = 'commit_success.txt'  # by which Orbax marks a checkpoint at an address as complete
_OWN = {'checkpoints', 'damaged'}  # directories that lie at the address alone
_LARGE = {*_OWN, 'profile'}  # directories that are not pulled
_fetched: set[Path] = set()  # stages that this process has fetched


def cache() -> Path:
  """Return the directory of copies and stages: $SLM_CACHE, by default ~/.cache/slm.

  Raises:
    ValueError: if $SLM_CACHE is an address.
  """
  given = os.environ.get('SLM_CACHE', '')
  if is_address(given):
    raise ValueError(f'SLM_CACHE={given}: expected a directory of this machine, found an address')
  return Path(given or Path.home() / '.cache' / 'slm').absolute()


def is_address(path: str | os.PathLike) -> bool:
  """Return whether a path is an address: gs://bucket, or gs:/bucket as Path makes of it."""
  return bool(re.match(r'[a-z0-9]+:/', str(path)))


def of(path: str | os.PathLike) -> Path:
  """Return the stage of an address; other paths as they are.

  Raises:
    ValueError: if there are no runs at such addresses.
  """
  if not is_address(path):
    return Path(path)
  scheme, _, name = str(path).partition(':')
  name = name.strip('/')
  if scheme != 'gs' or not name or '..' in name.split('/'):
    raise ValueError(f'{path}: expected a directory, or an address gs://BUCKET/RUN')
  return cache() / 'gs' / name


def address(path: Path) -> str:
  """Return the address of a stage, or of a path in it; '' of any other path."""
  root = cache() / 'gs'
  return f'gs://{path.relative_to(root)}' if path.is_relative_to(root) else ''


def absolute(path: str | os.PathLike) -> str:
  """Return an address as gs://..., and other paths resolved."""
  return address(of(path)) or str(Path(path).resolve())


def named(text: str) -> str:
  """Return a text with addresses in place of their stages."""
  with contextlib.suppress(ValueError):  # the text may say that $SLM_CACHE is no directory
    text = text.replace(f'{cache() / "gs"}/', 'gs://')
  return text


def origin(path: Any) -> Any:
  """Return where a path of a stage lies, as epath.Path; any other path as it is."""
  where = address(path) if isinstance(path, Path) else ''
  return remote(where) if where else path


def remote(where: str) -> epath.Path:
  """Return the path of an address; what other machines put there is seen at once."""
  if where.startswith('gs:'):
    import fsspec  # a tenth of a second, which only addresses need

    fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  return epath.Path(where)


def bucket(where: str) -> Any:
  """Return the file system of an address."""
  return epath.backend.fsspec_backend.fs(remote(where))


@contextlib.contextmanager
def reaching(where: object, done: str = 'read') -> Iterator[None]:
  """Turn what the libraries of addresses raise into one line; nothing for a path."""
  if isinstance(where, Path):
    yield
    return
  try:
    yield
  except ImportError as e:
    raise ValueError(f"{where}: {e} (pip install 'slm[gcs]')") from None
  except (ValueError, FileNotFoundError, FileExistsError):
    raise
  except Exception as e:  # noqa: BLE001 (each library raises classes of its own)
    cause = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
    raise OSError(f'{where}: cannot be {done} ({cause})') from None


def below(folder: Any, apart: Collection[str] = ()) -> list[str]:
  """List the files below a directory of any kind, without the directories `apart` at its top."""
  if isinstance(folder, Path):
    paths = (p for p in folder.rglob('*') if p.is_file())
    names = (p.relative_to(folder) for p in paths)
    return [str(name) for name in names if name.parts[0] not in apart]
  fs, top = bucket(str(folder)), str(folder).removeprefix('gs://')
  try:
    entries = fs.ls(top, detail=True)
  except FileNotFoundError:
    return []
  found = []
  for entry in entries:
    if entry['type'] != 'directory':
      found.append(entry['name'])
    elif Path(entry['name']).name not in apart:
      found += fs.find(entry['name'])
  names = (name.removeprefix(f'{top}/') for name in found if not name.endswith('/'))
  return sorted(name for name in names if name and name != top)


def move(folder: Any, target: Any) -> None:
  """Rename a checkpoint; at an address it is no checkpoint any more once a part is gone."""
  target.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(folder, Path):
    folder.rename(target)
    return
  bucket(str(folder)).copy(str(folder), str(target), recursive=True)
  discard(folder)


def discard(folder: epath.Path) -> None:
  """Remove a checkpoint at an address, first what marks it as complete."""
  (folder / COMMIT).unlink(missing_ok=True)
  with contextlib.suppress(FileNotFoundError):
    bucket(str(folder)).rm(str(folder), recursive=True)


def fetch(folder: Path, again: bool = True) -> None:
  """Make a stage what lies at its address, unless a process of this machine writes it.

  Nothing happens to other directories or, without `again`, if this process has fetched it.
  """
  if address(folder) and (again or folder not in _fetched):
    with fetched(folder):
      pass


@contextlib.contextmanager
def fetched(folder: Path) -> Iterator[dict[str, Any]]:
  """Fetch a stage, as `fetch` does, and keep other processes of this machine from doing so.

  Yields the `states` of what was fetched, {} if others write there: the stage is newer then.
  """
  folder.mkdir(parents=True, exist_ok=True)
  handle = os.open(folder / 'stage.lock', os.O_RDWR | os.O_CREAT, 0o666)
  known = {}
  try:
    with contextlib.suppress(BlockingIOError):
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      known = _pull(folder)
    _share(handle, folder)
    _fetched.add(folder)
    yield known
  finally:
    os.close(handle)


def _share(handle: int, folder: Path) -> None:
  """Share the lock of a stage; this waits for another's pull, not for those that write."""
  try:
    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    print(f'{address(folder)}: waiting for another process here that fetches it', file=sys.stderr)
    fcntl.flock(handle, fcntl.LOCK_SH)


def _pull(folder: Path) -> dict[str, Any]:
  """Make the small files of a stage those at its address; return their states."""
  where = remote(address(folder))
  with reaching(where):
    names = [name for name in below(where, _LARGE) if not name.endswith('.lock')]
    found = _contents(where, names)
  for name, content in found.items():
    if not (folder / name).is_file() or (folder / name).read_bytes() != content:
      with files.replacing(folder / name) as temporary:
        temporary.write_bytes(content)
  for name in below(folder, _LARGE):
    if name not in found and not name.endswith('.lock'):
      (folder / name).unlink()
  return states(folder, _LARGE)


def _contents(where: epath.Path, names: list[str]) -> dict[str, bytes]:
  """Read objects below an address at once, those that still exist."""
  if not names:
    return {}
  fs, top = bucket(str(where)), str(where).removeprefix('gs://')
  found = fs.cat([f'{top}/{name}' for name in names], on_error='return')
  for content in found.values():
    if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
      raise content
  return {n.removeprefix(f'{top}/'): c for n, c in found.items() if isinstance(c, bytes)}


def states(folder: Path, apart: Collection[str] = _OWN) -> dict[str, Any]:
  """Return size and time of the files of a stage that are put at its address, by name."""
  found = {}
  for name in below(folder, apart):
    if not name.endswith(('.tmp', '.lock')):
      with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
        stat = (folder / name).stat()
        found[name] = (stat.st_size, stat.st_mtime_ns)
  return found
