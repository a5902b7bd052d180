"""Packing windows of one cluster into fixed-length rows, and reading rows back."""

import bisect
import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from slm.base import files
from slm.data import documents, work

Path = pathlib.Path
_OPEN = 16  # rows kept open per cluster
_FULL = 4  # a row with fewer free positions than this is closed


def encode_row(windows: Sequence[np.ndarray], context: int) -> bytes:
  """Pack windows into a record: int32 tokens [context], then segments [context] from 1, 0 = pad."""
  row = np.zeros((2, context), '<i4')
  start = 0
  for segment, window in enumerate(windows, 1):
    row[0, start : start + len(window)] = window
    row[1, start : start + len(window)] = segment
    start += len(window)
  return row.tobytes()


def decode_row(record: bytes) -> np.ndarray:
  """Read a record as int32 [2, context]: tokens and segments."""
  return np.frombuffer(record, '<i4').reshape(2, -1)


def pack(
  windows: Iterator[tuple[int, int, np.ndarray]], context: int
) -> Iterator[tuple[int, list[tuple[int, np.ndarray]]]]:
  """Turn (cluster, document, window) into (cluster, (document, window)s of one row).

  Best fit over a few open rows.
  """
  # Per cluster, (free positions, order of opening, windows), sorted: best fit is a bisection.
  opened: dict[int, list[tuple[int, int, list]]] = collections.defaultdict(list)
  serial = 0
  for cluster, document, window in windows:
    rows, n = opened[cluster], len(window)
    fit = bisect.bisect_left(rows, (n,))
    if fit < len(rows):
      free, order, held = rows.pop(fit)
    else:
      serial += 1
      free, order, held = context, serial, []
    held.append((document, window))
    if free - n < _FULL:
      yield cluster, held
    else:
      bisect.insort(rows, (free - n, order, held))
    if len(rows) > _OPEN:
      yield cluster, rows.pop(0)[2]
  for cluster in sorted(opened):
    for _, _, held in opened[cluster]:
      yield cluster, held


def main_document(held: Sequence[tuple[int, np.ndarray]]) -> int:
  """Find the document with most predicted tokens among (document, window)s; ties: the first."""
  tokens: collections.Counter[int] = collections.Counter()
  for document, window in held:
    tokens[document] += len(window) - 1
  return max(tokens, key=tokens.__getitem__)


@dataclasses.dataclass(frozen=True)
class Pack:
  """One packing task: some shards' windows of one split become one row shard."""

  out: Path
  name: str  # rows-00000-of-00004
  windows: tuple[Path, ...]
  starts: tuple[int, ...]  # of each shard's documents among the split's
  split: int
  context: int


def write(task: Pack) -> dict[str, Any]:
  """Write a row shard (`.array_record`) and a table of its rows (`.npy`), int32 [rows, 4].

  The columns are cluster, windows, predicted tokens and main document.
  """
  table, digest = [], hashlib.sha256()
  with work.record_writer(task.out / f'{task.name}.array_record') as writer:
    for cluster, held in pack(_windows(task), task.context):
      windows = [window for _, window in held]
      record = encode_row(windows, task.context)
      writer.write(record)
      digest.update(record)
      predicted = sum(map(len, windows)) - len(windows)
      table.append((cluster, len(windows), predicted, main_document(held)))
  files.write_npy(task.out / f'{task.name}.npy', np.array(table, np.int32).reshape(-1, 4))
  return {
    'files': [f'{task.name}.array_record', f'{task.name}.npy'],
    'rows': len(table),
    'sha256': digest.hexdigest(),
  }


def _windows(task: Pack) -> Iterator[tuple[int, int, np.ndarray]]:
  for path, first in zip(task.windows, task.starts, strict=True):
    tokens, offsets, splits, owners = documents.load_windows(path)
    clusters = files.read_npy(path.with_suffix('.npy'))
    for i in np.flatnonzero(splits == task.split).tolist():
      yield int(clusters[i]), first + int(owners[i]), tokens[offsets[i] : offsets[i + 1]]


def join(parts: Sequence[tuple[Pack, dict[str, Any]]]) -> dict[str, Any]:
  """Write a split's clusters.npy, documents.npy [rows], counts.npy [rows, 2] (windows, tokens).

  Returns what the manifest says of its rows.
  """
  folder = parts[0][0].out
  table = np.concatenate([files.read_npy(folder / f'{task.name}.npy') for task, _ in parts])
  stamps = {}
  for name, column in {'clusters.npy': 0, 'counts.npy': slice(1, 3), 'documents.npy': 3}.items():
    files.write_npy(folder / name, np.ascontiguousarray(table[:, column]))
    stamps[name] = files.stamp(folder / name)
  used = [(task, summary) for task, summary in parts if summary['rows']]
  for task, summary in used:
    shard = f'{task.name}.array_record'
    stamps[shard] = summary['files'][shard]
  return {
    'rows': len(table),
    'sha256': hashlib.sha256(''.join(s['sha256'] for _, s in used).encode()).hexdigest(),
    'shards': [f'{task.name}.array_record' for task, _ in used],
    'files': stamps,
  }


def batch(rows: np.ndarray) -> dict[str, np.ndarray]:
  """Make model inputs from rows [..., 2, context]; leaves are [..., context].

  A position has weight 1 when the next one belongs to the same window, so the last token of a
  window predicts nothing and padding predicts nothing.
  """
  tokens, segments = rows[..., 0, :], rows[..., 1, :]
  last = [(0, 0)] * (tokens.ndim - 1) + [(0, 1)]
  targets, following = (np.pad(x[..., 1:], last) for x in (tokens, segments))
  index = np.arange(tokens.shape[-1], dtype=np.int32)
  starts = np.where(segments != np.pad(segments, [*last[:-1], (1, 0)])[..., :-1], index, 0)
  positions = index - np.maximum.accumulate(starts, axis=-1)
  return {
    'inputs': np.ascontiguousarray(tokens),
    'targets': targets,
    'weights': ((segments == following) & (segments > 0)).astype(np.float32),
    'segments': np.ascontiguousarray(segments),
    'positions': np.where(segments > 0, positions, 0).astype(np.int32),
  }
