"""Documents from source files: shards without exact duplicates, and their token windows."""

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
from slm.data.settings import PrepareConfig

Path = pathlib.Path
_TASK = 32 << 20  # bytes of source files read by one task
_SHARD = 8 << 20  # characters of text in one document shard
_BUCKET = 4 << 20  # documents whose hashes are compared at once


@dataclasses.dataclass(frozen=True)
class Read:
  """A reading task: some source files of one set."""

  out: Path
  name: str
  paths: tuple[str, ...]
  split: int  # -1: chosen by a hash of the document
  cfg: PrepareConfig


def plan(sizes: dict[str, int]) -> list[tuple[str, ...]]:
  """Group consecutive files, given their sizes in bytes, into groups of about 32 MB."""
  groups, total = [[]], 0
  for path, size in sizes.items():
    if groups[-1] and total + size > _TASK:
      groups.append([])
      total = 0
    groups[-1].append(path)
    total += size
  return [tuple(group) for group in groups]


def read(task: Read, parallel_map: installed.Map = map) -> dict[str, Any]:
  """Write the task's documents as shards: `.array_record` text and `.npy` sorted hashes.

  A row of the hashes is (128-bit hash in two words, split << 48 | position in the shard).
  """
  documents = itertools.chain.from_iterable(
    ((text, '') for text in installed.read(path, parallel_map))
    if path.startswith('python:')
    else sources.read(path, task.cfg.text_field, task.cfg.id_field)
    for path in task.paths
  )
  summary: dict[str, Any] = {'files': [], 'shards': [], 'documents': []}
  documents = ((text, id) for text, id in documents if text.strip())
  for number, first in enumerate(documents):
    name = f'{task.name}-{number:05d}'
    with work.record_writer(task.out / f'{name}.array_record') as writer:
      hashes = list(_write(writer, itertools.chain([first], documents), task))
    hashes = np.array(hashes, np.uint64).reshape(-1, 3)
    files.write_npy(task.out / f'{name}.npy', hashes[np.lexsort(hashes.T[::-1])])
    summary['files'] += [f'{name}.array_record', f'{name}.npy']
    summary['shards'].append(name)
    summary['documents'].append(len(hashes))
  return summary


def _write(writer: Any, documents: Iterator[tuple[str, str]], task: Read) -> Iterator[Sequence]:
  """Write documents until the shard is full; yield their rows of hashes."""
  size = 0
  for position, (text, id) in enumerate(documents):
    data = text.encode()
    writer.write(data)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    high, low = np.frombuffer(digest, '<u8').tolist()
    split = task.split
    if split < 0:
      identity = hashlib.blake2b(id.encode()).digest() if id else digest
      split = hash_split(identity, task.cfg.heldout)
    yield high, low, split << 48 | position
    size += len(text)
    if size >= _SHARD:
      return


def hash_split(digest: bytes, heldout: tuple[float, float]) -> int:
  """Choose the split (0 train, 1 validation, 2 test) of a document by its hash."""
  # The first bytes choose the bucket: with other bytes here, each bucket has every split.
  unit = int.from_bytes(digest[8:14], 'little') / 2**48
  validation, test = heldout
  return 1 if unit < validation else 2 if unit < validation + test else 0


def _unpack(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return the splits and the positions in their shard of some rows of hashes."""
  packed = hashes[:, 2].astype(np.int64)
  return packed >> 48, packed & (2**48 - 1)


def document_splits(shard: Path) -> np.ndarray:
  """Return the split of each document of a shard, int64 [documents]."""
  split, position = _unpack(files.read_npy(shard.with_name(f'{shard.name}.npy'), mmap='r'))
  return split[np.argsort(position)]


def duplicates(shards: dict[Path, int], others: dict[Path, int], out: Path) -> None:
  """Write for each document of a set whether it is kept, bool [documents].

  `shards` maps the set's shards to their numbers of documents, `others` those of the other sets. Of
  exact copies in the set one is kept: a held-out one (split > 0) if there is one, else the first. A
  training document that another set holds out is dropped. Shards are sorted by hash and compared
  one range of hashes at a time, which bounds the memory.
  """
  starts = np.cumsum([0, *shards.values()]).tolist()
  all_shards = [*zip(shards, starts, strict=False), *((shard, -1) for shard in others)]
  with files.replacing(out) as temporary:
    keep = np.lib.format.open_memmap(temporary, 'w+', np.bool_, (starts[-1],))
    keep[:] = True
    num_buckets = (starts[-1] + sum(others.values())) // _BUCKET + 1
    edges = [b * 2**64 // num_buckets for b in range(num_buckets + 1)]
    for low, high in itertools.pairwise(edges):
      parts, positions = [], []  # position -1: a held-out document of another set
      for shard, start in all_shards:
        hashes = files.read_npy(shard.with_name(f'{shard.name}.npy'), mmap='r')
        first = np.searchsorted(hashes[:, 0], np.uint64(low), 'left')
        last = np.searchsorted(hashes[:, 0], np.uint64(high - 1), 'right')
        part = hashes[first:last]
        split, position = _unpack(part)
        if start < 0:
          part = part[split > 0]
          position = np.full(len(part), -1)
        parts.append(part)
        positions.append(position + max(start, 0))
      hashes, position = np.concatenate(parts), np.concatenate(positions)
      train = _unpack(hashes)[0] == 0
      # Among copies: other sets' held-out documents, this set's, its training documents.
      order = np.lexsort((position, train, position >= 0, hashes[:, 1], hashes[:, 0]))
      hashes, position, train = hashes[order], position[order], train[order]
      same = (hashes[1:, :2] == hashes[:-1, :2]).all(axis=1)
      dropped = same & (position[1:] >= 0) & ((position[:-1] >= 0) | train[1:])
      keep[position[1:][dropped]] = False
    keep.flush()


@dataclasses.dataclass(frozen=True)
class Cut:
  """A tokenising task: one document shard becomes windows."""

  out: Path  # .npz
  shard: Path  # without a suffix
  start: int  # documents of the set before this shard
  num_splits: int
  cfg: PrepareConfig

  @property
  def tokenizer(self) -> tokenizer.Tokenizer:
    """Return the tokenizer of the directory, loaded once per process."""
    return load_tokenizer(Path(self.cfg.out) / 'tokenizer')


load_tokenizer = functools.cache(tokenizer.load)


def _kept(task: Cut) -> Iterator[tuple[str, int]]:
  """Yield (text, split) of the shard's documents that are not duplicates."""
  splits = document_splits(task.shard)
  keep = files.read_npy(task.shard.with_name('keep.npy'), mmap='r')[task.start :][: len(splits)]
  records = work.read_records(task.shard.with_name(f'{task.shard.name}.array_record'))
  for data, split, kept in zip(records, splits.tolist(), keep, strict=True):
    if kept:
      yield data.decode(), split


def cut(task: Cut) -> dict[str, Any]:
  """Encode a shard's documents and write their windows: tokens, lengths, splits, documents (npz).

  The document of a window is its number within its split from the start of the shard. The end token
  follows a document's last token. `bytes` counts the predicted text only.
  """
  tok, tokens, lengths, splits, owners = task.tokenizer, [], [], [], []
  documents, size, targets = (np.zeros(task.num_splits, np.int64) for _ in range(3))
  total = np.bincount(document_splits(task.shard), minlength=task.num_splits)
  for text, split in _kept(task):
    ids = tok.encode(text)
    for window in windows(ids, task.cfg.context, tok):
      tokens.append(window)
      lengths.append(len(window))
      splits.append(split)
      owners.append(documents[split])
      targets[split] += len(window) - 1
    documents[split] += 1
    size[split] += len(text.encode()) - (0 if tok.begins else len(tok.decode(ids[:1]).encode()))
  with files.replacing(task.out) as temporary, temporary.open('wb') as f:
    np.savez(
      f,
      tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
      lengths=np.array(lengths, np.int32),
      splits=np.array(splits, np.int32),
      documents=np.array(owners, np.int32),
    )
  return {
    'files': [task.out.name],
    'documents': documents.tolist(),
    'duplicates': (total - documents).tolist(),
    'bytes': size.tolist(),
    'tokens': targets.tolist(),
    'windows': [splits.count(split) for split in range(task.num_splits)],
  }


def windows(ids: Sequence[int], context: int, tok: tokenizer.Tokenizer) -> Iterator[np.ndarray]:
  """Cut a document's tokens and its end token into int32 windows of at most `context`.

  If texts begin with a begin token, so does every window, and every token is predicted exactly
  once. Otherwise a window begins with the last token of the one before, and the document's first
  token alone is not predicted.
  """
  stream, begin = np.array([*ids, tok.ids.eos], np.int32), np.array(tok.begin, np.int32)
  for start in range(0, len(stream) - 1 + len(begin), context - 1):
    yield np.concatenate([begin, stream[start : start + context - len(begin)]])


def load_windows(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Read a shard's windows: flat tokens, offsets [windows + 1], splits, documents [windows]."""
  with np.load(path, allow_pickle=False) as data:
    offsets = np.concatenate([[0], np.cumsum(data['lengths'], dtype=np.int64)])
    return data['tokens'], offsets, data['splits'], data['documents']


def sample(tasks: Sequence[Cut], limit: int, seed: int) -> Iterator[str]:
  """Yield random training documents, about `limit` characters in all.

  Up to 256 shards give equal shares: a sample of whole shards would depend on a few sources.
  """
  rng = np.random.default_rng(seed)
  chosen = [tasks[i] for i in rng.permutation(len(tasks))[:256]]
  share = max(limit // max(len(chosen), 1), 1)
  for task in chosen:
    texts = [text for text, split in _kept(task) if split == 0]
    used = 0
    for i in rng.permutation(len(texts)):
      if used >= share:
        break
      used += len(texts[i])
      yield texts[i]


def sample_windows(tasks: Sequence[Cut], counts: Sequence[int], limit: int, seed: int) -> list[str]:
  """Decode `limit` random training windows (or all), in order.

  `counts` [shards] are the training windows of each shard.
  """
  chosen = np.sort(np.random.default_rng(seed).permutation(sum(counts))[:limit])
  edges, texts = np.cumsum([0, *counts]), []
  for task, low, high in zip(tasks, edges, edges[1:], strict=False):
    inside = chosen[(chosen >= low) & (chosen < high)] - low
    if len(inside):
      tokens, offsets, splits, _ = load_windows(task.out)
      for i in np.flatnonzero(splits == 0)[inside]:
        texts.append(task.tokenizer.decode(tokens[offsets[i] : offsets[i + 1]]))
  return texts
