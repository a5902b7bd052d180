"""From source files to shards of documents without exact duplicates, and to token windows."""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from slm.base import files
from slm.data import installed, sources, tokenizer, work

Path = pathlib.Path
_TASK = 32 << 20  # bytes of source files read by one task
_SHARD = 8 << 20  # characters of text in one document shard
_BUCKET = 4 << 20  # documents compared at once when duplicates are looked for
PLAIN = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class Read:
  """One reading task: some source files of one set."""

  out: Path
  name: str
  paths: tuple[str, ...]
  split: int  # -1: by a hash of the document
  heldout: tuple[float, float]
  text_field: str
  id_field: str


def plan(paths: dict[str, int]) -> list[tuple[str, ...]]:
  """Group consecutive files so that each group holds about 32 MB."""
  groups, size = [[]], 0
  for path, n in paths.items():
    if groups[-1] and size + n > _TASK:
      groups.append([])
      size = 0
    groups[-1].append(path)
    size += n
  return [tuple(group) for group in groups]


def read(task: Read, parallel_map: installed.Map = map) -> dict[str, Any]:
  """Write the task's documents as shards: `.array_record` text and `.npy` sorted hashes.

  A row of the hashes is (128-bit hash in two words, split << 48 | position in the shard).
  """
  documents = itertools.chain.from_iterable(
    ((text, '') for text in installed.read(path, parallel_map))
    if path.startswith('python:')
    else sources.read(path, task.text_field, task.id_field)
    for path in task.paths
  )
  summary: dict[str, Any] = {'files': [], 'shards': [], 'documents': []}
  documents = ((text, id) for text, id in documents if text.strip())
  for number, first in enumerate(documents):
    name = f'{task.name}-{number:05d}'
    with work.record_writer(task.out / f'{name}.array_record') as writer:
      keys = list(_write(writer, itertools.chain([first], documents), task))
    keys = np.array(keys, np.uint64).reshape(-1, 3)
    files.write_npy(task.out / f'{name}.npy', keys[np.lexsort(keys.T[::-1])])
    summary['files'] += [f'{name}.array_record', f'{name}.npy']
    summary['shards'].append(name)
    summary['documents'].append(len(keys))
  return summary


def _write(writer: Any, documents: Iterator[tuple[str, str]], task: Read) -> Iterator[Sequence]:
  size = 0
  for position, (text, id) in enumerate(documents):
    data = text.encode()
    writer.write(data)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    high, low = np.frombuffer(digest, '<u8').tolist()
    split = task.split
    if split < 0:
      split = hash_split(hashlib.blake2b(id.encode()).digest() if id else digest, task.heldout)
    yield high, low, split << 48 | position
    size += len(text)
    if size >= _SHARD:
      return


def hash_split(digest: bytes, heldout: tuple[float, float]) -> int:
  """Choose the split (index into PLAIN) of a document by its hash."""
  # Other bytes than those that order the buckets, so that each bucket holds every split.
  unit = int.from_bytes(digest[8:14], 'little') / 2**48
  validation, test = heldout
  return 1 if unit < validation else 2 if unit < validation + test else 0


def duplicates(shards: dict[Path, int], others: dict[Path, int], out: Path) -> None:
  """Write a bool per document of a set: whether it is the one kept of its copies.

  `shards` maps the set's shards to their numbers of documents, `others` those of the other sets.
  Held-out splits (index > 0) win over training, those of other sets too; then the first in source
  order does. Hashes are compared one range of values at a time, so memory stays bounded: the
  shards are sorted.
  """
  starts = np.cumsum([0, *shards.values()]).tolist()
  own = list(zip(shards, starts, strict=False))
  with files.replacing(out) as temporary:
    keep = np.lib.format.open_memmap(temporary, 'w+', np.bool_, (starts[-1],))
    keep[:] = True
    num_buckets = (starts[-1] + sum(others.values())) // _BUCKET + 1
    edges = [b * 2**64 // num_buckets for b in range(num_buckets + 1)]
    for low, high in itertools.pairwise(edges):
      parts, positions = [], []  # position -1: a held-out document of another set
      for shard, start in [*own, *((shard, -1) for shard in others)]:
        h = files.read_npy(shard.with_name(f'{shard.name}.npy'), mmap='r')
        first = np.searchsorted(h[:, 0], np.uint64(low), 'left')
        last = np.searchsorted(h[:, 0], np.uint64(high - 1), 'right')
        part = h[first:last]
        if start < 0:
          part = part[part[:, 2] >> np.uint64(48) > 0]
          positions.append(np.full(len(part), -1, np.int64))
        else:
          positions.append(start + (part[:, 2] & np.uint64(2**48 - 1)).astype(np.int64))
        parts.append(part)
      found, position = np.concatenate(parts), np.concatenate(positions)
      train = found[:, 2] >> np.uint64(48) == 0
      # Among copies: other sets' held-out documents, this set's, its training documents.
      order = np.lexsort((position, train, position >= 0, found[:, 1], found[:, 0]))
      found, position, train = found[order], position[order], train[order]
      same = (found[1:, :2] == found[:-1, :2]).all(axis=1)
      lost = same & (position[1:] >= 0) & ((position[:-1] >= 0) | train[1:])
      keep[position[1:][lost]] = False
    keep.flush()


@dataclasses.dataclass(frozen=True)
class Cut:
  """One tokenising task: one document shard."""

  out: Path
  folder: Path
  shard: str
  start: int  # of this shard's documents in `keep`
  keep: Path
  num_splits: int
  context: int


_tokenizer_path: Path


def use_tokenizer(path: Path) -> None:
  """Say which tokenizer this process is to use, once it is there."""
  global _tokenizer_path
  _tokenizer_path = path
  get_tokenizer.cache_clear()


@functools.cache
def get_tokenizer() -> tokenizer.Tokenizer:
  """Load this process's tokenizer once; a SentencePiece model cannot be sent to a worker."""
  return tokenizer.load(_tokenizer_path)


def kept(task: Cut) -> Iterator[tuple[str, int]]:
  """Yield (text, split) of the shard's documents that are not duplicates."""
  hashes = files.read_npy(task.folder / f'{task.shard}.npy')
  n = len(hashes)
  split = np.empty(n, np.int64)
  split[(hashes[:, 2] & np.uint64(2**48 - 1)).astype(np.int64)] = hashes[:, 2] >> np.uint64(48)
  keep = files.read_npy(task.keep, mmap='r')[task.start : task.start + n]
  records = work.read_records(task.folder / f'{task.shard}.array_record')
  for data, s, k in zip(records, split, keep, strict=True):
    if k:
      yield data.decode(), int(s)


def cut(task: Cut) -> dict[str, Any]:
  """Encode a shard's documents and write its windows: tokens, lengths, splits, documents (npz).

  A window's document is counted within its split from the start of the shard.

  EOS follows the last token of a document. `bytes` are those of the text that is predicted.
  """
  tok, columns = get_tokenizer(), task.num_splits
  tokens, lengths, splits, owners = [], [], [], []
  documents, size, targets = (np.zeros(columns, np.int64) for _ in range(3))
  total = np.zeros(columns, np.int64)
  hashes = files.read_npy(task.folder / f'{task.shard}.npy', mmap='r')
  np.add.at(total, (hashes[:, 2] >> np.uint64(48)).astype(np.int64), 1)
  for text, split in kept(task):
    ids = tok.encode(text)
    for window in windows(ids, task.context, tok):
      tokens.append(window)
      lengths.append(len(window))
      splits.append(split)
      owners.append(documents[split])
      targets[split] += len(window) - 1
    documents[split] += 1
    size[split] += len(text.encode()) - (0 if tok.begins else len(tok.decode(ids[:1]).encode()))
  with files.replacing(task.out / f'{task.shard}.npz') as temporary, temporary.open('wb') as f:
    np.savez(
      f,
      tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
      lengths=np.array(lengths, np.int32),
      splits=np.array(splits, np.int32),
      documents=np.array(owners, np.int32),
    )
  return {
    'files': [f'{task.shard}.npz'],
    'documents': documents.tolist(),
    'duplicates': (total - documents).tolist(),
    'bytes': size.tolist(),
    'tokens': targets.tolist(),
    'windows': np.bincount(splits, minlength=columns).tolist() if splits else [0] * columns,
  }


def windows(ids: Sequence[int], context: int, tok: tokenizer.Tokenizer) -> Iterator[np.ndarray]:
  """Cut one document's tokens, and EOS, into int32 windows of at most `context`.

  A window begins as texts of the tokenizer do: with its begin token, so that every token is
  predicted exactly once. Without one, every token but the document's first is: a window then begins
  with the last token of the one before.
  """
  stream, first = np.array([*ids, tok.ids.eos], np.int32), np.array(tok.begin, np.int32)
  for start in range(0, len(stream) - 1 + len(first), context - 1):
    yield np.concatenate([first, stream[start : start + context - len(first)]])


def load_windows(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Read a shard's windows: flat tokens, offsets [windows + 1], splits, documents [windows]."""
  with np.load(path, allow_pickle=False) as data:
    offsets = np.concatenate([[0], np.cumsum(data['lengths'], dtype=np.int64)])
    return data['tokens'], offsets, data['splits'], data['documents']


def sample(tasks: Sequence[Cut], limit: int, seed: int) -> Iterator[str]:
  """Yield training documents from shards in a seeded order, about `limit` characters in all.

  Whole shards would make the sample depend on a few sources, so each gives an equal share.
  """
  rng = np.random.default_rng(seed)
  chosen = [tasks[i] for i in rng.permutation(len(tasks))[:256]]
  share = max(limit // max(len(chosen), 1), 1)
  for task in chosen:
    texts = [text for text, split in kept(task) if split == 0]
    used = 0
    for i in rng.permutation(len(texts)):
      if used >= share:
        break
      used += len(texts[i])
      yield texts[i]


def sample_windows(tasks: Sequence[Cut], counts: Sequence[int], limit: int, seed: int) -> list[str]:
  """Decode `limit` training windows (or all) drawn from the shards, in order.

  `counts` [shards] are the training windows of each.
  """
  total = sum(counts)
  chosen = np.random.default_rng(seed).permutation(total)[:limit]
  chosen.sort()
  edges, texts = np.cumsum([0, *counts]), []
  for task, low, high in zip(tasks, edges, edges[1:], strict=False):
    mine = chosen[(chosen >= low) & (chosen < high)] - low
    if len(mine):
      tokens, offsets, splits, _ = load_windows(task.out / f'{task.shard}.npz')
      for i in np.flatnonzero(splits == 0)[mine]:
        texts.append(get_tokenizer().decode(tokens[offsets[i] : offsets[i + 1]]))
  return texts
