"""Rows of fixed length: packing, records and model inputs."""

import bisect
import collections
import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slm.base import files
from slm.data import documents, work
from slm.data.settings import ChatConfig

Path = pathlib.Path
Rows = dict[str, np.ndarray]  # by column
BLOCK = 16  # document shards (8 MB of text each) whose windows share a row shard
TEXT = ChatConfig()  # no conversations
LABELS = 'labels.jsonl'  # of prompts: {"row": ..., "verifiers": [{"id": ..., "args": ...}]}
_OPEN = 16  # unfinished rows per cluster
_FULL = 4  # a row with fewer free positions than this is finished


def columns(context: int, chat: ChatConfig = TEXT) -> list[dict[str, Any]]:
  """Return the columns of packed text: tokens, and segments counted from 1 (0 is padding).

  Conversations and pairs also have `trained`, the tokens of answers, and those with a weight
  `weights`, the weight of the example at each of its tokens. A prompt has its `length` instead.
  """
  column = lambda name, kind, size: {'name': name, 'dtype': kind, 'shape': [size]}
  made = [column(name, 'int32', context) for name in ('tokens', 'segments')]
  if chat.kind == 'prompts':
    return [*made, column('length', 'int32', 1)]
  made += [column('trained', 'uint8', context)] if chat else []
  return made + ([column('weights', 'float32', context)] if chat and chat.weight else [])


def layout(declared: Sequence[Mapping[str, Any]]) -> np.dtype:
  """Return the dtype of a record, which holds the declared columns one after the other.

  Raises:
    ValueError: if a column has no valid name, dtype and shape.
  """
  fields = lambda c: (c['name'], np.dtype(c['dtype']).newbyteorder('<'), tuple(c['shape']))
  try:
    return np.dtype([fields(column) for column in declared])
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
      f'columns: expected a name, dtype and shape each, found {declared} ({e})'
    ) from None


def encode(row: Mapping[str, np.ndarray], record: np.dtype) -> bytes:
  """Return a row's columns as the bytes of a record.

  Raises:
    ValueError: if the columns are not those of the record, or one has another shape.
  """
  if set(row) != set(record.names):
    raise ValueError(f'row: expected the columns {sorted(record.names)}, found {sorted(row)}')
  content = np.zeros((), record)
  for name in record.names:
    if np.shape(row[name]) != record[name].shape:
      raise ValueError(
        f'row: column {name} has shape {np.shape(row[name])}, expected {record[name].shape}'
      )
    content[name] = row[name]
  return content.tobytes()


def decode(records: Sequence[bytes], record: np.dtype) -> Rows:
  """Return the columns of records, one array [n,...] each."""
  table = np.frombuffer(b''.join(records), record)
  return {name: table[name] for name in record.names}


def packed(windows: Sequence[np.ndarray], context: int) -> Rows:
  """Put windows one after the other in a row: tokens and segments, int32 [context] each.

  The fields of windows that have some are further columns; `segments` are counted within a window.
  """
  row = {name: np.zeros(context, np.int32) for name in ('tokens', 'segments')}
  names = [name for name in windows[0].dtype.names or () if name not in row]
  row |= {name: np.zeros(context, windows[0].dtype[name]) for name in names}
  start = segment = 0
  for window in windows:
    place, fields = slice(start, start + len(window)), window.dtype.names or ()
    row['tokens'][place] = window['tokens'] if fields else window
    row['segments'][place] = segment + (window['segments'] if 'segments' in fields else 1)
    for name in names:
      row[name][place] = window[name]
    start, segment = place.stop, int(row['segments'][place.stop - 1])
  return row


def pack(
  windows: Iterator[tuple[int, int, np.ndarray]], context: int
) -> Iterator[tuple[int, list[tuple[int, np.ndarray]]]]:
  """Pack (cluster, document, window)s; yield the cluster and (document, window)s of each row.

  A window goes to the unfinished row of its cluster that it fits best.
  """
  # Per cluster, (free positions, order of opening, windows), sorted: best fit is a bisection.
  unfinished: dict[int, list[tuple[int, int, list]]] = collections.defaultdict(list)
  serial = 0
  for cluster, document, window in windows:
    rows, n = unfinished[cluster], len(window)
    fit = bisect.bisect_left(rows, (n,))
    if fit < len(rows):
      free, order, row = rows.pop(fit)
    else:
      serial += 1
      free, order, row = context, serial, []
    row.append((document, window))
    if free - n < _FULL:
      yield cluster, row
    else:
      bisect.insort(rows, (free - n, order, row))
    if len(rows) > _OPEN:
      yield cluster, rows.pop(0)[2]
  for cluster in sorted(unfinished):
    for _, _, row in unfinished[cluster]:
      yield cluster, row


def main_document(row: Sequence[tuple[int, np.ndarray]]) -> int:
  """Return the document with most predicted tokens among (document, window)s; ties: the first."""
  tokens: collections.Counter[int] = collections.Counter()
  for document, window in row:
    tokens[document] += len(window) - 1
  return max(tokens, key=tokens.__getitem__)


@dataclasses.dataclass(frozen=True)
class Pack:
  """A packing task: the windows of one split in some shards become one row shard."""

  out: Path
  name: str  # rows-00000-of-00004
  windows: tuple[Path, ...]
  starts: tuple[int, ...]  # number of the split's documents before each shard
  split: int
  context: int
  chat: ChatConfig = TEXT


def write(task: Pack) -> dict[str, Any]:
  """Pack the windows of a task and write its row shard, as `write_shard` does.

  The labels of prompts are written beside it, a line for each row, and hashed with the rows: a run
  does not go on with other rewards.
  """
  summary = write_shard(task.out, task.name, _windows(task), task.context, task.chat)
  if task.chat.kind == 'prompts':
    path, labels = task.out / f'{task.name}.labels.jsonl', ''.join(_labels(task))
    files.write_text(path, labels)
    summary['files'].append(path.name)
    summary['sha256'] = hashlib.sha256((summary['sha256'] + labels).encode()).hexdigest()
  return summary


def write_shard(
  out: Path,
  name: str,
  windows: Iterator[tuple[int, int, np.ndarray]],
  context: int,
  chat: ChatConfig = TEXT,
) -> dict[str, Any]:
  """Write a row shard (`.array_record`) and a table of its rows (`.npy`), int32 [rows, 4].

  `windows` are (cluster, document, window)s; every prompt is a row. The columns of the table are
  cluster, windows, predicted (of conversations: trained) tokens and main document.
  """
  table, digest, dtype = [], hashlib.sha256(), layout(columns(context, chat))
  alone = ((cluster, [(document, window)]) for cluster, document, window in windows)
  with work.record_writer(out / f'{name}.array_record') as writer:
    for cluster, row in alone if chat.kind == 'prompts' else pack(windows, context):
      parts = [window for _, window in row]
      content = packed(parts, context)
      if chat.kind == 'prompts':
        content['length'] = np.array([len(parts[0])], np.int32)
      record = encode(content, dtype)
      writer.write(record)
      digest.update(record)
      predicted = sum(map(len, parts)) - len(parts)
      if 'trained' in content:
        predicted = int(np.count_nonzero(content['trained']))
      table.append((cluster, len(parts), predicted, main_document(row)))
  files.write_npy(out / f'{name}.npy', np.array(table, np.int32).reshape(-1, 4))
  return {
    'files': [f'{name}.array_record', f'{name}.npy'],
    'rows': len(table),
    'sha256': digest.hexdigest(),
  }


def _windows(task: Pack) -> Iterator[tuple[int, int, np.ndarray]]:
  for path, first in zip(task.windows, task.starts, strict=True):
    made = documents.load_windows(path)
    if task.chat:  # not clustered
      clusters = np.zeros(len(made.splits), np.int32)
    else:
      clusters = files.read_npy(path.with_suffix('.npy'))
    yield from of_split(made, clusters, task.split, first)


def _labels(task: Pack) -> Iterator[str]:
  """Yield the lines with the labels of the windows of a task."""
  for path in task.windows:
    lines = path.with_suffix('.labels.jsonl').read_text().split('\n')
    for i in np.flatnonzero(documents.load_windows(path).splits == task.split).tolist():
      yield f'{lines[i]}\n'


def of_split(
  made: documents.Windows, clusters: np.ndarray, split: int, first: int
) -> Iterator[tuple[int, int, np.ndarray]]:
  """Yield (cluster, document, window) of a shard's windows in a split.

  `first` is the number of the split's documents before the shard.
  """
  for i in np.flatnonzero(made.splits == split).tolist():
    window = made.tokens[made.offsets[i] : made.offsets[i + 1]]
    yield int(clusters[i]), first + int(made.documents[i]), window


def names(num_shards: int) -> list[str]:
  """Return the names, without suffixes, of the row shards of a split in some document shards."""
  count = -(-num_shards // BLOCK)
  return [f'rows-{i:05d}-of-{count:05d}' for i in range(count)]


def join(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Write a split's clusters.npy, documents.npy [rows], counts.npy [rows, 2] (windows, tokens).

  `parts` are the summaries of its row shards by name. Returns the manifest's entries about its
  rows.
  """
  total, stamps = sum(part['rows'] for part in parts.values()), {}
  for name, column in {'clusters.npy': 0, 'counts.npy': slice(1, 3), 'documents.npy': 3}.items():
    tables = (files.read_npy(folder / f'{part}.npy')[:, column] for part in parts)
    shape = (total, 2) if name == 'counts.npy' else (total,)
    files.write_npy_parts(folder / name, shape, np.dtype(np.int32), tables)
    stamps[name] = files.stamp(folder / name)
  shards = {f'{name}.array_record': part for name, part in parts.items() if part['rows']}
  hashes = ''.join(part['sha256'] for part in shards.values())
  if all((folder / f'{part}.labels.jsonl').exists() for part in parts):
    _join_labels(folder, parts)
    stamps[LABELS] = files.stamp(folder / LABELS)
  return {
    'rows': total,
    'sha256': hashlib.sha256(hashes.encode()).hexdigest(),
    'shards': list(shards),
    'files': stamps | {shard: part['files'][shard] for shard, part in shards.items()},
  }


def _join_labels(folder: Path, parts: Iterable[str]) -> None:
  """Write the labels of a split: a line of JSON for each row, with its number."""
  row = itertools.count()
  with files.replacing(folder / LABELS) as temporary, temporary.open('w') as f:
    for part in parts:
      for line in (folder / f'{part}.labels.jsonl').read_text().split('\n')[:-1]:
        f.write(f'{{"row": {next(row)}, "verifiers": {line}}}\n')


def batch(rows: Rows) -> Rows:
  """Return model inputs, leaves [...,context], made from the columns of rows [...,context].

  A position has weight 1 where the next position is in the same window, so the last token of a
  window and padding predict nothing. A column `trained` keeps only those whose predicted token is
  trained, and a column `weights` scales it by the weight of the predicted token. Other columns
  become leaves unchanged.
  """
  tokens, segments = rows['tokens'], rows['segments']
  following = lambda x: np.pad(x[..., 1:], [(0, 0)] * (x.ndim - 1) + [(0, 1)])
  index = np.arange(tokens.shape[-1], dtype=np.int32)
  previous = np.pad(segments, [(0, 0)] * (segments.ndim - 1) + [(1, 0)])[..., :-1]
  starts = np.where(segments != previous, index, 0)
  positions = index - np.maximum.accumulate(starts, axis=-1)
  predicts = ((segments == following(segments)) & (segments > 0)).astype(np.float32)
  if 'trained' in rows:
    predicts *= following(rows['trained'])
  if 'weights' in rows:
    predicts *= following(rows['weights'])
  inputs = {
    'inputs': np.ascontiguousarray(tokens),
    'targets': following(tokens),
    'weights': predicts,
    'segments': np.ascontiguousarray(segments),
    'positions': np.where(segments > 0, positions, 0).astype(np.int32),
  }
  return {name: x for name, x in rows.items() if name != 'tokens'} | inputs
