"""Atomic writes of files, and errors that name a damaged one."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Yield a temporary path beside `path`, which is renamed to it when the block succeeds."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    yield temporary
    os.umask(umask := os.umask(0))
    temporary.chmod(0o666 & ~umask)  # safetensors makes its files unreadable to others
    temporary.replace(path)
  except Exception as e:
    if no_space(e):
      raise OSError(
        errno.ENOSPC, f'no space on {path.parent} while writing {path.name}: free some and retry'
      ) from None
    raise
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: str | Path, kind: str = '') -> Iterator[None]:
  """Turn a library's error while it reads `path` into one ValueError that names the file.

  `kind` is what the file should be, such as 'a tokenizer.json'. OSError, MemoryError and errors
  that name the file already pass unchanged.
  """
  try:
    yield
  except (OSError, MemoryError):
    raise
  except BaseException as e:  # parsers raise KeyError, RecursionError and classes of their own
    panic = type(e).__name__ == 'PanicException'  # of a library in Rust, such as tokenizers
    if not (panic or isinstance(e, Exception)) or str(e).startswith(f'{path}:'):
      raise
    cause = _cause(e)
    text = f'not {kind} ({cause})' if kind else f'truncated or damaged ({cause})'
    raise ValueError(f'{path}: {text}') from None


def _cause(error: BaseException) -> str:
  """Describe an error in one line; the text of some classes is only a key or a number."""
  if isinstance(error, RecursionError):
    return 'nested too deeply'
  if isinstance(error, KeyError):
    return f'lacks {error}'
  text = ' '.join(str(error).split())
  return text if isinstance(error, ValueError) and text else f'{type(error).__name__}: {text}'


def no_space(error: BaseException | None) -> bool:
  """Return whether an error of any class, or a cause of it, is a full disk or quota."""
  # NumPy reports only how much it wrote.
  words = re.compile(r'no space left|quota exceeded|\d+ requested and \d+ written', re.IGNORECASE)
  while error:
    if getattr(error, 'errno', 0) in (errno.ENOSPC, errno.EDQUOT) or words.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


def write_text(path: Path, text: str) -> None:
  """Write text atomically; an object at an address is put whole."""
  if not isinstance(path, Path):
    path.write_text(text)
    return
  with replacing(path) as temporary:
    temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
  """Write JSON with sorted keys."""
  write_text(path, json.dumps(value, indent=1, sort_keys=True) + '\n')


def read_json(path: Path, like: Any = None) -> Any:
  """Read JSON that is `like` something, as `check` says; None: anything.

  FileNotFoundError or, if it is damaged, ValueError names the file.
  """
  try:
    with reading(path):
      value = json.loads(path.read_text())
  except FileNotFoundError:
    raise FileNotFoundError(f'{path}: no such file') from None
  if like is not None:
    check(path, value, like)
  return value


_NAMES = {
  dict: 'an object', list: 'a list', str: 'text', bool: 'true or false', int: 'a whole number',
  float: 'a number',
}  # fmt: skip


def check(path: Path, value: Any, like: Any, key: str = '') -> None:
  """Raise ValueError, naming the file and the key, unless a value read from it is `like` another.

  `like` is a type, [like] of every value in a list, {name: like} of an object that has at least
  these names, or {str: like} of every value in an object.
  """
  kind = like if isinstance(like, type) else type(like)
  at = f'{path}: {key}: ' if key else f'{path}: '
  if not isinstance(value, (int, float) if kind is float else kind) or (
    isinstance(value, bool) and kind is not bool
  ):
    raise ValueError(f'{at}expected {_NAMES[kind]}, found {str(value)[:40]}')
  inside = lambda name: f'{key}.{name}' if key else str(name)
  if isinstance(like, list):
    for i, x in enumerate(value):
      check(path, x, like[0], inside(i))
  elif isinstance(like, dict):
    for name, x in {n: like[str] for n in value}.items() if str in like else like.items():
      if name not in value:
        raise ValueError(f'{at}lacks {name!r}')
      check(path, value[name], x, inside(name))


def write_npy(path: Path, array: np.ndarray) -> None:
  """Write one array, not pickled."""
  with replacing(path) as temporary, temporary.open('wb') as f:
    np.save(f, array, allow_pickle=False)


def write_npy_parts(
  path: Path, shape: Sequence[int], dtype: np.dtype, parts: Iterable[np.ndarray]
) -> None:
  """Write an array as `write_npy` does, from parts along its first axis, one at a time.

  Raises:
    ValueError: if the parts do not add up to the shape.
  """
  with replacing(path) as temporary, temporary.open('wb') as f:
    header = np.lib.format.header_data_from_array_1_0(np.empty((0, *shape[1:]), dtype))
    np.lib.format.write_array_header_1_0(f, header | {'shape': tuple(shape)})
    length = 0
    for part in parts:
      f.write(part.astype(dtype).tobytes())
      length += len(part)
    if length != shape[0]:
      raise ValueError(f'{path}: expected {shape[0]} entries, found {length}')


def read_npy_parts(path: Path, size: int = 1 << 20) -> Iterator[np.ndarray]:
  """Read an array in parts of `size` along its first axis, which are not kept in memory."""
  for start in range(0, len(read_npy(path, 'r')), size):
    yield np.array(read_npy(path, 'r')[start : start + size])


def read_npy(path: Path, mmap: str | None = None) -> np.ndarray:
  """Read one array; ValueError names a damaged file."""
  with reading(path):
    return np.load(path, mmap_mode=mmap, allow_pickle=False)


def stamp(path: Path) -> list[Any]:
  """Return a file's size and hash."""
  return [_size(path), sha256(path)]


def _size(path: Any) -> int:
  stat = path.stat()
  return stat.st_size if isinstance(path, Path) else stat.length


def damage(path: Path, stamp: Sequence[Any], content: bool = True) -> str:
  """Describe how a file differs from its stamp, '' if it does not; `content`: compare the hash."""
  try:
    size = _size(path)
  except FileNotFoundError:
    return f'{path}: is missing'
  if size != stamp[0]:
    return f'{path}: has {size} bytes, expected {stamp[0]}'
  return f'{path}: is not as it was written' if content and sha256(path) != stamp[1] else ''


def sha256(path: Path) -> str:
  """Return the SHA-256 of a file, in hexadecimal."""
  with path.open('rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
