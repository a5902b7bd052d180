"""Prepared data at addresses such as gs://bucket/data: the copy of them on this machine.

Rows are read in random order, by a reader that opens only files of this machine, and the rows of
any batch lie in all of the files: every machine of a run makes a copy, once.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from slm.base import artifact, console, files, stage
from slm.data import sources

Path = pathlib.Path
_THREADS = 8  # files copied at once
_CHUNK = 1 << 22  # bytes of a file copied at once
_SCHEMES = ('gs', 's3', 'az')  # those that etils reads by fsspec
_WAIT = 1.0  # seconds between looks at a copy that another process makes


def local(path: str) -> str:
  """Return a path of this machine as it is, or that of the copy of an address.

  A copy lies in $SLM_CACHE, by default ~/.cache/slm, under the hash of the manifest, so that other
  data are another copy. It has the rows, clusters, indexes and tokenizer, not what only
  `slm.data.prepare` needs. Of what it has already, only files without a hash in the
  manifest, small ones, are read again.

  Raises:
    ValueError: if such addresses are not read.
    OSError: if there are no prepared data, or a file is not as the manifest says.
  """
  if not sources.is_address(path):
    return path
  scheme = path.partition('://')[0]
  if scheme not in _SCHEMES:
    raise ValueError(f'{path}: expected a path, or an address such as gs://, s3:// or az://')
  source = stage.remote(path)
  with _reading(path):
    manifest = (source / 'manifest.json').read_bytes()
  copy = stage.cache() / hashlib.sha256(manifest).hexdigest()[:16]
  with _hold(copy), _reading(path):
    stamps = _stamps(json.loads(manifest))
    for folder in ('tokenizer', 'clusters', 'index'):
      stamps |= {name: None for name in _names(source, folder)}
    _copy(source, copy, stamps)
    if not (copy / 'manifest.json').exists():  # last: what has one is whole
      files.write_text(copy / 'manifest.json', manifest.decode())
  return str(copy)


def _stamps(manifest: dict[str, Any]) -> dict[str, list[Any] | None]:
  """Return the stamps of the files of all splits, by their names in the directory."""
  return {
    f'{name}/{split}/{file}': stamp
    for name, splits in manifest['sets'].items()
    for split, facts in splits.items()
    for file, stamp in facts['files'].items()
  }


def _names(source: epath.Path, folder: str) -> list[str]:
  """List the files of a folder, `folder` included."""
  there = source / folder
  return [f'{folder}/{p.name}' for p in there.iterdir()] if there.is_dir() else []


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
  """Turn what a library of addresses raises into one line."""
  try:
    with files.reading(path, 'readable'):
      try:
        yield
      except ImportError as e:
        raise ValueError(f"{path}: {e} (pip install 'slm[gcs]'; s3fs, adlfs for others)") from None
  except FileNotFoundError as e:
    raise FileNotFoundError(
      f'{path}: no such file there ({e}); slm.data.prepare makes it'
    ) from None


@contextlib.contextmanager
def _hold(copy: Path) -> Iterator[None]:
  """Hold a copy, once no other process does; the first wait is said on stderr."""
  with contextlib.ExitStack() as stack:
    said = False
    while True:
      try:
        stack.enter_context(artifact.hold(copy))
        break
      except artifact.HeldError as e:
        if not said:
          print(f'{copy}: waiting for {e.writer}, which makes this copy', file=sys.stderr)
        said = True
        time.sleep(_WAIT)
    yield


def _copy(source: epath.Path, copy: Path, stamps: dict[str, Sequence[Any] | None]) -> None:
  """Copy the files that are missing or of another size, and all that have no stamp: small ones."""
  wanted = [
    name
    for name, stamp in stamps.items()
    if stamp is None or files.damage(copy / name, stamp, content=False)
  ]
  with (
    console.Progress(f'copy of {source}', len(wanted), 'files') as bar,
    concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
  ):
    copies = [pool.submit(_copy_one, source / n, copy / n, stamps[n]) for n in wanted]
    for done in concurrent.futures.as_completed(copies):
      done.result()
      bar.update(1)


def _copy_one(source: epath.Path, target: Path, stamp: Sequence[Any] | None) -> None:
  with files.replacing(target) as temporary:
    with source.open('rb') as read, temporary.open('wb') as written:
      shutil.copyfileobj(read, written, _CHUNK)
    problem = files.damage(temporary, stamp) if stamp else ''
    if problem:
      raise OSError(problem.replace(str(temporary), str(source)))
