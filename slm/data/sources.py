"""Documents from JSON-lines and text files, one at a time."""

import codecs
import contextlib
import glob
import gzip
import io
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import zstandard

from slm.base import files
from slm.data import tfds

# A .txt file is cut into documents at the first blank line after _TEXT_DOCUMENT characters, or else
# at the first line end after _LONGEST; lines are read, and so also cut, in pieces of _PIECE bytes.
_TEXT_DOCUMENT = 1 << 20
_LONGEST = 2 << 20
_PIECE = 1 << 20


def expand(spec: str) -> dict[str, int]:
  """Return the sorted files of a glob, or the shards of a `tfds:` set, with their sizes in bytes.

  A `python:` spec is returned as it is.
  """
  if spec.startswith('python:'):
    return {spec: 0}
  if spec.startswith(tfds.PREFIX):
    return tfds.expand(spec)
  if is_address(spec):
    raise ValueError(f'{spec}: is read through Apache Beam: give a --runner, or a path')
  matches = glob.glob(spec, recursive=True)  # noqa: PTH207 (pathlib cannot match absolute globs)
  paths = sorted(p for p in matches if pathlib.Path(p).is_file())
  return check(spec, {path: pathlib.Path(path).stat().st_size for path in paths})


def is_address(spec: str) -> bool:
  """Return whether a path is an address that Apache Beam reads, such as gs://bucket/name."""
  return bool(re.match(r'[a-z0-9]+://', spec))


def check(spec: str, sizes: dict[str, int]) -> dict[str, int]:
  """Return the sizes of the files that a source matched.

  Raises:
    FileNotFoundError: if there are none.
    ValueError: if one is of a kind that is not read.
  """
  if not sizes:
    raise FileNotFoundError(f'{spec}: no file matches')
  for path in sizes:
    if not re.search(r'\.(jsonl|txt)(\.gz|\.zst)?$', path):
      raise ValueError(f'{path}: expected .jsonl or .txt, plain or with .gz or .zst')
  return sizes


def read(path: str, text_field: str, id_field: str) -> Iterator[tuple[str, str]]:
  """Yield (text, id) of every document in a file; id is '' without `id_field`."""
  if path.startswith(tfds.PREFIX):
    yield from tfds.read(path, text_field, id_field)
  elif re.search(r'\.txt(\.gz|\.zst)?$', path):
    yield from ((text, '') for text in _cut(lines(path, _PIECE)))
  else:
    for number, record in records(path):
      yield _document(f'{path}:{number}', record, text_field, id_field)


def records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yield the number of each line that is not blank, from 1, and its JSON object."""
  for number, line in enumerate(lines(path), 1):
    if line.strip():
      with files.reading(f'{path}:{number}', 'valid JSON'):
        record = json.loads(line)
      if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f'{path}:{number}: expected a JSON object, found {kind}')
      yield number, record


def lines(path: str, limit: int = -1) -> Iterator[str]:
  """Yield the lines of a file, and lines over `limit` bytes in pieces.

  Raises:
    ValueError: if the file is cut short or is not UTF-8; names the line.
  """
  number, at_start = 0, True  # of a line
  # Decodes pieces that end inside a character, and drops a byte order mark.
  decoder = codecs.getincrementaldecoder('utf-8-sig')()
  try:
    for line in raw_lines(path, limit):
      number += at_start
      at_start = line.endswith(b'\n')
      yield decoder.decode(line)
    decoder.decode(b'', final=True)
  except UnicodeDecodeError as e:
    raise ValueError(f'{path}:{number}: not UTF-8 ({e})') from None


def raw_lines(path: str, limit: int = -1) -> Iterator[bytes]:
  """Yield the lines of a file as they are, and lines over `limit` bytes in pieces.

  Raises:
    ValueError: if the file is cut short; names the line.
  """
  number, at_start = 0, True
  try:
    with _open(path) as f:
      # Bytes, because text mode also ends lines at \r; JSON lines end at \n only.
      while line := f.readline(limit):
        number += at_start
        at_start = line.endswith(b'\n')
        yield line
  except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
    raise ValueError(f'{path}: truncated or unreadable after line {number} ({e})') from None


def write_lines(path: pathlib.Path, lines: Iterable[bytes]) -> None:
  """Write lines, compressed as the name says, into a file that appears when it is whole."""
  with files.replacing(path) as temporary, contextlib.ExitStack() as stack:
    f = stack.enter_context(temporary.open('wb'))
    if path.suffix == '.gz':  # without name and time, so that equal lines are equal files
      f = stack.enter_context(gzip.GzipFile('', 'wb', 6, f, mtime=0))
    elif path.suffix == '.zst':
      f = stack.enter_context(zstandard.ZstdCompressor().stream_writer(f))
    for line in lines:  # zstandard's writer has no writelines
      f.write(line)


def _open(path: str) -> BinaryIO:
  if path.endswith('.gz'):
    return gzip.open(path, 'rb')
  if path.endswith('.zst'):
    return io.BufferedReader(_Zstd(path), 1 << 20)
  return pathlib.Path(path).open('rb')


class _Zstd(io.RawIOBase):
  """A zstd file that raises EOFError where it was cut short; zstandard's reader ends silently."""

  def __init__(self, path: str):
    super().__init__()
    self._file = pathlib.Path(path).open('rb')  # noqa: SIM115 (closed in close)
    self._chunks, self._ready = self._decompressed(), b''

  def _decompressed(self) -> Iterator[bytes]:
    data = self._file.read(1 << 17)
    while data:  # one frame after the other
      # The largest window that the format's tools write (`zstd --long=31`).
      frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
      while not frame.eof:
        if not data:
          raise EOFError('compressed frame ended before its end marker')
        yield frame.decompress(data)
        data = self._file.read(1 << 17) if not frame.eof else frame.unused_data
      data = data or self._file.read(1 << 17)

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview) -> int:
    while not self._ready:
      chunk = next(self._chunks, None)
      if chunk is None:
        return 0
      self._ready = chunk
    n = min(len(buffer), len(self._ready))
    buffer[:n], self._ready = self._ready[:n], self._ready[n:]
    return n

  def close(self) -> None:
    self._file.close()
    super().close()


def _document(
  where: str, record: dict[str, Any], text_field: str, id_field: str
) -> tuple[str, str]:
  for field in filter(None, (text_field, id_field)):
    if field not in record:
      raise ValueError(f'{where}: no field {field!r}; the line has {", ".join(sorted(record))}')
  if not isinstance(record[text_field], str):
    kind = type(record[text_field]).__name__
    raise ValueError(f'{where}: field {text_field!r} is {kind}, expected text')
  # JSON can hold lone surrogates, which UTF-8 cannot: they become '?'.
  text = record[text_field].encode('utf-8', 'replace').decode()
  return text, str(record[id_field]) if id_field else ''


def _cut(lines: Iterator[str]) -> Iterator[str]:
  document, size = [], 0
  for line in lines:
    document.append(line)
    size += len(line)
    if size > _TEXT_DOCUMENT and not line.strip() or size > _LONGEST:
      yield ''.join(document)
      document, size = [], 0
  if document:
    yield ''.join(document)
