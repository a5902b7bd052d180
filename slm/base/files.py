"""Files that appear whole or not at all, and refusals by name of damaged ones."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Give a temporary path beside `path`, renamed to it when the block succeeds."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    yield temporary
    os.umask(umask := os.umask(0))
    temporary.chmod(0o666 & ~umask)  # as any other file: safetensors hides its own from others
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: str | Path, kind: str = '') -> Iterator[None]:
  """Turn what a library raises while it reads `path` into one ValueError that names the file.

  `kind` is what the file should be, such as 'a tokenizer.json'. Errors of the operating system and
  those that name the file already pass unchanged.
  """
  try:
    yield
  except (OSError, MemoryError):
    raise
  except Exception as e:  # noqa: BLE001 (parsers raise KeyError, RecursionError and classes of their own)
    if str(e).startswith(f'{path}:'):
      raise
    cause = _cause(e)
    text = f'not {kind} ({cause})' if kind else f'truncated or damaged ({cause})'
    raise ValueError(f'{path}: {text}') from None


def _cause(error: Exception) -> str:
  """Describe an error in one line; some classes put nothing but a key or a number in their text."""
  if isinstance(error, RecursionError):
    return 'nested too deeply'
  if isinstance(error, KeyError):
    return f'lacks {error}'
  text = ' '.join(str(error).split())
  return text if isinstance(error, ValueError) and text else f'{type(error).__name__}: {text}'


def write_text(path: Path, text: str) -> None:
  """Write text whole or not at all."""
  with replacing(path) as temporary:
    temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
  """Write JSON with sorted keys."""
  write_text(path, json.dumps(value, indent=1, sort_keys=True) + '\n')


def read_json(path: Path) -> Any:
  """Read JSON; a missing or damaged file is refused by name."""
  try:
    with reading(path):
      return json.loads(path.read_text())
  except FileNotFoundError:
    raise FileNotFoundError(f'{path}: no such file') from None


def write_npy(path: Path, array: np.ndarray) -> None:
  """Write one array, never pickled."""
  with replacing(path) as temporary, temporary.open('wb') as f:
    np.save(f, array, allow_pickle=False)


def read_npy(path: Path, mmap: str | None = None) -> np.ndarray:
  """Read one array; a damaged file is refused by name."""
  with reading(path):
    return np.load(path, mmap_mode=mmap, allow_pickle=False)


def sha256(path: Path) -> str:
  """Hash a file's bytes."""
  with path.open('rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
