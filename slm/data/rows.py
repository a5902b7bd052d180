"""Packing windows of one cluster into fixed-length rows, and reading rows back."""

import bisect
import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slm.base import files
from slm.data import documents, work

Path = pathlib.Path
Rows = dict[str, np.ndarray]  # by column
_OPEN = 16  # rows kept open per cluster
_FULL = 4  # a row with fewer free positions than this is closed


def columns(context: int) -> list[dict[str, Any]]:
  """Return the columns of packed text: tokens, and segments that count from 1; 0 is padding."""
  return [{'name': name, 'dtype': 'int32', 'shape': [context]} for name in ('tokens', 'segments')]


def layout(declared: Sequence[Mapping[str, Any]]) -> np.dtype:
  """Return the type of a record, which holds the declared columns one after the other.

  Raises:
    ValueError: if a column's type or shape is none.
  """
  try:
    fields = [
      (c['name'], np.dtype(c['dtype']).newbyteorder('<'), tuple(c['shape'])) for c in declared
    ]
    return np.dtype(fields)
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
      f'columns: expected a name, dtype and shape each, found {declared} ({e})'
    ) from None


def encode(row: Mapping[str, np.ndarray], record: np.dtype) -> bytes:
  """Write a row's columns as a record.

  Raises:
    ValueError: if it lacks a column, has another, or one of another shape.
  """
  if set(row) != set(record.names):
    raise ValueError(f'row: expected the columns {sorted(record.names)}, found {sorted(row)}')
  made = np.zeros((), record)
  for name in record.names:
    if np.shape(row[name]) != record[name].shape:
      raise ValueError(
        f'row: column {name} has shape {np.shape(row[name])}, expected {record[name].shape}'
      )
    made[name] = row[name]
  return made.tobytes()


def decode(records: Sequence[bytes], record: np.dtype) -> Rows:
  """Read records as one array [n,...] a column."""
  table = np.frombuffer(b''.join(records), record)
  return {name: table[name] for name in record.names}


def packed(windows: Sequence[np.ndarray], context: int) -> Rows:
  """Lay windows out in a row: tokens and segments, int32 [context] each."""
  row = {name: np.zeros(context, np.int32) for name in ('tokens', 'segments')}
  start = 0
  for segment, window in enumerate(windows, 1):
    row['tokens'][start : start + len(window)] = window
    row['segments'][start : start + len(window)] = segment
    start += len(window)
  return row


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
  table, digest, of = [], hashlib.sha256(), layout(columns(task.context))
  with work.record_writer(task.out / f'{task.name}.array_record') as writer:
    for cluster, held in pack(_windows(task), task.context):
      windows = [window for _, window in held]
      record = encode(packed(windows, task.context), of)
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


def batch(rows: Rows) -> Rows:
  """Make model inputs from rows by column [...,context]; leaves are [...,context].

  A position has weight 1 when the next one belongs to the same window, so the last token of a
  window predicts nothing and padding predicts nothing. With a column `weights` it has the weight of
  the token that it predicts. Columns that are none of these are leaves as they are.
  """
  tokens, segments = rows['tokens'], rows['segments']
  following = lambda x: np.pad(x[..., 1:], [(0, 0)] * (x.ndim - 1) + [(0, 1)])
  index = np.arange(tokens.shape[-1], dtype=np.int32)
  before = np.pad(segments, [(0, 0)] * (segments.ndim - 1) + [(1, 0)])[..., :-1]
  starts = np.where(segments != before, index, 0)
  positions = index - np.maximum.accumulate(starts, axis=-1)
  predicts = ((segments == following(segments)) & (segments > 0)).astype(np.float32)
  if 'weights' in rows:
    predicts *= following(rows['weights'])
  made = {
    'inputs': np.ascontiguousarray(tokens),
    'targets': following(tokens),
    'weights': predicts,
    'segments': np.ascontiguousarray(segments),
    'positions': np.where(segments > 0, positions, 0).astype(np.int32),
  }
  return {name: x for name, x in rows.items() if name != 'tokens'} | made
