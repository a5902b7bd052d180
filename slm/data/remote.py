"""Files at addresses such as gs://bucket/name, through the file systems of Apache Beam.

Every function also takes paths of this machine, and leaves them where they are.
"""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from slm.base import files
from slm.data import sources

Path = pathlib.Path
_CHUNK = 1 << 20  # bytes copied at once


def expand(spec: str) -> dict[str, int]:
  """Return the files of a source with their sizes in bytes, as `sources.expand` does."""
  if not sources.is_address(spec):
    return sources.expand(spec)
  return sources.check(spec, dict(sorted(_match(spec))))


def _match(pattern: str) -> list[tuple[str, int]]:
  """Return the addresses that match a pattern, and the sizes of their files in bytes.

  Raises:
    ValueError: if Beam has no file system for such addresses, or cannot list them.
  """
  try:
    (found,) = FileSystems.match([pattern])
  except (BeamIOError, ValueError) as e:
    raise ValueError(f'{pattern}: cannot be listed ({e})') from None
  return [(entry.path, entry.size_in_bytes) for entry in found.metadata_list]


@contextlib.contextmanager
def local(path: str) -> Iterator[str]:
  """Yield the path of a file, or of a copy that lasts as long as the block."""
  if not sources.is_address(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / path.rpartition('/')[2]
    _copy(path, copy)
    yield str(copy)


@contextlib.contextmanager
def local_folder(folder: str) -> Iterator[Path]:
  """Yield the path of a folder, or of one with copies of its files that lasts as the block does."""
  if not sources.is_address(folder):
    yield Path(folder)
    return
  with tempfile.TemporaryDirectory() as copies:
    fetch(folder, Path(copies), '*')
    yield Path(copies)


def fetch(address: str, folder: Path, *patterns: str) -> None:
  """Copy the files below an address that match a pattern, under the same names, into a folder."""
  for pattern in patterns:
    for path, _ in _match(f'{address}/{pattern}'):
      _copy(path, folder / path.removeprefix(f'{address}/'))


def _copy(address: str, path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  plain = CompressionTypes.UNCOMPRESSED  # by default Beam decompresses by suffix
  with FileSystems.open(address, compression_type=plain) as source, path.open('wb') as copy:
    shutil.copyfileobj(source, copy, _CHUNK)


def publish(folder: Path, target: str, last: str = '') -> None:
  """Copy all files of a folder, with those in its folders, to another; the one named `last` last.

  On this machine a file is replaced as a whole; so it is where Beam's file system writes objects.
  """
  paths = [path for path in sorted(folder.rglob('*')) if path.is_file()]
  for path in sorted(paths, key=lambda path: path.name == last):
    name = path.relative_to(folder)
    if not sources.is_address(target):
      with files.replacing(Path(target) / name) as temporary:
        shutil.copyfile(path, temporary)
      continue
    plain = CompressionTypes.UNCOMPRESSED
    with path.open('rb') as source:
      with FileSystems.create(f'{target}/{name.as_posix()}', compression_type=plain) as copy:
        shutil.copyfileobj(source, copy, _CHUNK)
