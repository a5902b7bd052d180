"""Documents from source files: shards without exact duplicates, and their token windows."""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from slm.base import files
from slm.data import conversations, installed, sources, tokenizer, work
from slm.data.settings import ALL, PrepareConfig

Path = pathlib.Path
Sources = dict[str, dict[str, dict[str, int]]]  # set -> split -> file -> bytes
SAMPLE = 10 << 20  # characters that a tokenizer is trained on
_TASK = 32 << 20  # bytes of source files read by one task
_SHARD = 8 << 20  # characters of text in one document shard
_BUCKET = 1 << 20  # documents whose hashes are compared at once


@dataclasses.dataclass(frozen=True)
class Read:
  """A reading task: some source files of one set."""

  out: Path
  name: str
  paths: tuple[str, ...]
  split: int  # -1: chosen by a hash of the document
  cfg: PrepareConfig
  spec: str  # the source that the files are of


def plan(sizes: dict[str, int], together: Callable[[str], Any]) -> list[tuple[str, ...]]:
  """Group consecutive files, given their sizes in bytes, into groups of about 32 MB.

  Files of a group have the same value of `together`.
  """
  groups, total = [[]], 0
  for path, size in sizes.items():
    apart = groups[-1] and together(groups[-1][-1]) != together(path)
    if groups[-1] and total + size > _TASK or apart:
      groups.append([])
      total = 0
    groups[-1].append(path)
    total += size
  return [tuple(group) for group in groups]


def tasks(
  cfg: PrepareConfig, name: str, paths: dict[str, dict[str, int]], folder: Path
) -> list[Read]:
  """Return the reading tasks of a set, whose shards go to a folder, in order.

  `paths` has the files of each split with their sizes in bytes.
  """
  made, source = [], conversations.number if cfg.chat else lambda _: 0
  for split, sizes in paths.items():
    number = -1 if split == ALL else cfg.splits(name).index(split)
    for i, group in enumerate(plan(sizes, source)):
      made.append(Read(folder, f'{split}-{i:05d}', group, number, cfg, cfg.sets[name][split]))
  return made


def read(task: Read, parallel_map: installed.Map = map) -> dict[str, Any]:
  """Write the task's documents as shards: `.array_record` text and `.npy` sorted hashes.

  A row of the hashes is (128-bit hash in two words, split << 48 | position in the shard).
  """
  summary: dict[str, Any] = {'files': [], 'shards': [], 'documents': []}
  for number, shard in enumerate(shards(task, parallel_map)):
    name = f'{task.name}-{number:05d}'
    with work.record_writer(task.out / f'{name}.array_record') as writer:
      hashes = hash_table(_written(writer, shard))
    files.write_npy(task.out / f'{name}.npy', hashes[np.lexsort(hashes.T[::-1])])
    summary['files'] += [f'{name}.array_record', f'{name}.npy']
    summary['shards'].append(name)
    summary['documents'].append(len(hashes))
  return summary


def shards(
  task: Read, parallel_map: installed.Map = map
) -> Iterator[Iterator[tuple[bytes, Sequence[int]]]]:
  """Yield iterators of (text, row of hashes), each a shard; one is read to its end first."""
  documents = itertools.chain.from_iterable(_texts(task, p, parallel_map) for p in task.paths)
  documents = ((text, id) for text, id in documents if text.strip())
  for first in documents:
    yield _shard(itertools.chain([first], documents), task)


def _texts(task: Read, path: str, parallel_map: installed.Map) -> Iterator[tuple[str, str]]:
  """Yield (text, id) of the documents of a file; of conversations the text is JSON."""
  cfg = task.cfg
  if cfg.chat:
    return conversations.read(path, task.spec, cfg.chat, cfg.id_field)
  if path.startswith('python:'):
    return ((text, '') for text in installed.read(path, parallel_map))
  return sources.read(path, cfg.text_field, cfg.id_field)


def _shard(
  documents: Iterator[tuple[str, str]], task: Read
) -> Iterator[tuple[bytes, Sequence[int]]]:
  """Yield the text and the row of hashes of documents until the shard is full."""
  size = 0
  for position, (text, id) in enumerate(documents):
    data = text.encode()
    digest = hashlib.blake2b(data, digest_size=16).digest()
    high, low = np.frombuffer(digest, '<u8').tolist()
    split = task.split
    if split < 0:
      identity = hashlib.blake2b(id.encode()).digest() if id else digest
      split = hash_split(identity, task.cfg.heldout)
    yield data, (high, low, split << 48 | position)
    size += len(text)
    if size >= _SHARD:
      return


def _written(writer: Any, shard: Iterator[tuple[bytes, Sequence[int]]]) -> Iterator[Sequence[int]]:
  for data, row in shard:
    writer.write(data)
    yield row


def hash_table(table: Iterable[Sequence[int]]) -> np.ndarray:
  """Return rows of hashes as an array, uint64 [documents, 3]."""
  return np.array(list(table), np.uint64).reshape(-1, 3)


def hash_split(digest: bytes, heldout: tuple[float, float]) -> int:
  """Choose the split (0 train, 1 validation, 2 test) of a document by its hash."""
  # The first bytes choose the bucket: with other bytes here, each bucket has every split.
  unit = int.from_bytes(digest[8:14], 'little') / 2**48
  validation, test = heldout
  return 1 if unit < validation else 2 if unit < validation + test else 0


def unpack(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return the splits and the positions in their shard of some rows of hashes."""
  packed = hashes[:, 2].astype(np.int64)
  return packed >> 48, packed & (2**48 - 1)


def document_splits(shard: Path) -> np.ndarray:
  """Return the split of each document of a shard, int64 [documents]."""
  split, position = unpack(files.read_npy(shard.with_name(f'{shard.name}.npy'), mmap='r'))
  return split[np.argsort(position)]


def duplicates(shards: dict[Path, int], others: dict[Path, int], out: Path) -> None:
  """Write for each document of a set whether it is kept, bool [documents].

  `shards` maps the set's shards to their numbers of documents, `others` those of the other sets. Of
  exact copies in the set one is kept: a held-out one (split > 0) if there is one, else the first. A
  training document that another set holds out is dropped. Shards are sorted by hash and compared
  one range of hashes at a time, which bounds the memory.
  """
  starts = np.cumsum([0, *shards.values()]).tolist()
  with files.replacing(out) as temporary:
    keep = np.lib.format.open_memmap(temporary, 'w+', np.bool_, (starts[-1],))
    keep[:] = True
    num_buckets = (starts[-1] + sum(others.values())) // _BUCKET + 1
    edges = [b * 2**64 // num_buckets for b in range(num_buckets + 1)]
    for low, high in itertools.pairwise(edges):
      parts = [_between(shard, low, high) for shard in shards]
      keep[copies(parts, starts[:-1], [_between(shard, low, high) for shard in others])] = False
    keep.flush()


def _between(shard: Path, low: int, high: int) -> np.ndarray:
  """Return the rows of a shard whose hashes begin with a word in [low, high)."""
  hashes = files.read_npy(shard.with_name(f'{shard.name}.npy'), mmap='r')
  first = np.searchsorted(hashes[:, 0], np.uint64(low), 'left')
  last = np.searchsorted(hashes[:, 0], np.uint64(high - 1), 'right')
  return hashes[first:last]


def copies(
  parts: Sequence[np.ndarray], starts: Sequence[int], others: Sequence[np.ndarray]
) -> np.ndarray:
  """Return which documents of a set `duplicates` drops, as positions in the set.

  `parts` are rows of hashes of its shards, `starts` the number of its documents before each;
  `others` are rows of other sets. All rows of a hash must be among them.
  """
  heldout = [part[unpack(part)[0] > 0] for part in others]
  # Position -1: a held-out document of another set.
  positions = [unpack(part)[1] + start for part, start in zip(parts, starts, strict=True)]
  positions += [np.full(len(part), -1) for part in heldout]
  hashes, position = np.concatenate([*parts, *heldout]), np.concatenate(positions)
  train = unpack(hashes)[0] == 0
  # Among copies: other sets' held-out documents, this set's, its training documents.
  order = np.lexsort((position, train, position >= 0, hashes[:, 1], hashes[:, 0]))
  hashes, position, train = hashes[order], position[order], train[order]
  same = (hashes[1:, :2] == hashes[:-1, :2]).all(axis=1)
  return position[1:][same & (position[1:] >= 0) & ((position[:-1] >= 0) | train[1:])]


@dataclasses.dataclass(frozen=True)
class Cut:
  """A tokenising task: one document shard becomes windows."""

  out: Path  # .npz
  shard: Path  # without a suffix
  start: int  # documents of the set before this shard
  num_splits: int
  cfg: PrepareConfig
  source: int = 0  # number of the source of the conversations in their mix

  @property
  def kept(self) -> np.ndarray:
    """Return whether each document of the shard is kept, bool [documents]."""
    return self._of_set('keep.npy')

  @property
  def copies(self) -> np.ndarray:
    """Return how often each document of the shard is taken, int [documents]."""
    return self._of_set('copies.npy') if self.cfg.chat else self.kept.astype(int)

  def _of_set(self, name: str) -> np.ndarray:
    """Return the shard's part of an array of all documents of its set."""
    array = files.read_npy(self.shard.with_name(name), mmap='r')
    return array[self.start :][: len(document_splits(self.shard))]

  @property
  def tokenizer(self) -> tokenizer.Tokenizer:
    """Return the tokenizer of the directory, loaded once per process."""
    return load_tokenizer(Path(self.cfg.out) / 'tokenizer')


load_tokenizer = functools.cache(tokenizer.load)


def kept(task: Cut) -> Iterator[tuple[str, int]]:
  """Yield (text, split) of the shard's documents that are not duplicates.

  Those that a mix repeats come again once all have come.
  """
  splits = document_splits(task.shard).tolist()
  path = task.shard.with_name(f'{task.shard.name}.array_record')
  repeated = task.copies.tolist()
  for done in range(max(repeated, default=0)):
    for data, split, count in zip(work.read_records(path), splits, repeated, strict=True):
      if count > done:
        yield data.decode(), split


def cut(task: Cut) -> dict[str, Any]:
  """Encode a shard's documents, write their windows (npz) and return what `encode` counts.

  `duplicates` are the documents of each split that are not kept.
  """
  made, counts = encode(kept(task), task.tokenizer, task.cfg.context, task.num_splits)
  save_windows(task.out, made)
  return {'files': [task.out.name], 'duplicates': duplicates_by_split(task)} | counts


def duplicates_by_split(task: Cut) -> list[int]:
  """Return how many documents of a shard are not kept."""
  dropped = document_splits(task.shard)[~task.kept]
  return np.bincount(dropped, minlength=task.num_splits).tolist()


class Windows(NamedTuple):
  """The windows of a document shard; the document of one is its number in its split and shard."""

  tokens: np.ndarray  # of all windows one after the other: int32, or with the fields of a row
  offsets: np.ndarray  # int64 [windows + 1], where each begins
  splits: np.ndarray  # int32 [windows]
  documents: np.ndarray  # int32 [windows]


def encode(
  kept: Iterable[tuple[str, int]], tok: tokenizer.Tokenizer, context: int, num_splits: int
) -> tuple[Windows, dict[str, list[int]]]:
  """Encode (text, split) of a shard's documents; return the windows and counts by split.

  The end token follows a document's last token. `bytes` counts the predicted text only.
  """
  tokens, lengths, splits, owners = [np.zeros(0, np.int32)], [], [], []
  documents, size, targets = (np.zeros(num_splits, np.int64) for _ in range(3))
  for text, split in kept:
    ids = tok.encode(text)
    for window in windows(ids, context, tok):
      tokens.append(window)
      lengths.append(len(window))
      splits.append(split)
      owners.append(documents[split])
      targets[split] += len(window) - 1
    documents[split] += 1
    size[split] += len(text.encode()) - (0 if tok.begins else len(tok.decode(ids[:1]).encode()))
  made = Windows(
    np.concatenate(tokens),
    np.cumsum([0, *lengths], dtype=np.int64),
    np.array(splits, np.int32),
    np.array(owners, np.int32),
  )
  return made, {
    'documents': documents.tolist(),
    'bytes': size.tolist(),
    'tokens': targets.tolist(),
    'windows': [splits.count(split) for split in range(num_splits)],
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


def save_windows(path: Path, made: Windows) -> None:
  """Write windows as npz."""
  with files.replacing(path) as temporary, temporary.open('wb') as f:
    np.savez(
      f,
      tokens=made.tokens,
      lengths=np.diff(made.offsets).astype(np.int32),
      splits=made.splits,
      documents=made.documents,
    )


def load_windows(path: Path) -> Windows:
  """Read the windows that `cut` wrote."""
  with np.load(path, allow_pickle=False) as data:
    offsets = np.concatenate([[0], np.cumsum(data['lengths'], dtype=np.int64)])
    return Windows(data['tokens'], offsets, data['splits'], data['documents'])


def sample(tasks: Sequence[Cut], limit: int, seed: int) -> Iterator[str]:
  """Yield random training documents, about `limit` characters in all.

  Up to 256 shards give equal shares: a sample of whole shards would depend on a few sources.
  """
  counts = [np.count_nonzero(document_splits(t.shard)[t.kept] == 0) for t in tasks]
  chosen = choose_documents(counts, seed)
  for i, order in chosen.items():
    texts = [text for text, split in kept(tasks[i]) if split == 0]
    yield from take(texts, order, limit, len(chosen))


def choose_documents(counts: Sequence[int], seed: int) -> dict[int, np.ndarray]:
  """Choose shards to sample from and an order of the training documents of each.

  `counts` [shards] are the training documents that are kept.
  """
  rng = np.random.default_rng(seed)
  return {i: rng.permutation(counts[i]) for i in rng.permutation(len(counts))[:256].tolist()}


def take(texts: Sequence[str], order: np.ndarray, limit: int, num_shards: int) -> Iterator[str]:
  """Yield a shard's training documents in an order until it gave its share of `limit`."""
  used = 0
  for i in order:
    if used >= max(limit // num_shards, 1):
      return
    used += len(texts[i])
    yield texts[i]


def sample_windows(tasks: Sequence[Cut], counts: Sequence[int], limit: int, seed: int) -> list[str]:
  """Decode `limit` random training windows (or all), in order.

  `counts` [shards] are the training windows of each shard.
  """
  texts = []
  for task, chosen in zip(tasks, choose_windows(counts, limit, seed), strict=True):
    if len(chosen):
      texts += decode_training(load_windows(task.out), chosen, task.tokenizer)
  return texts


def choose_windows(counts: Sequence[int], limit: int, seed: int) -> list[np.ndarray]:
  """Choose `limit` training windows (or all): their numbers in each shard, ascending."""
  # What is permuted grows with the text: 4 bytes per window, and the same numbers as in 8.
  numbers = np.arange(sum(counts), dtype=np.int32 if sum(counts) < 2**31 else np.int64)
  chosen = np.sort(np.random.default_rng(seed).permutation(numbers)[:limit].astype(np.int64))
  edges = np.cumsum([0, *counts])
  return [
    chosen[(chosen >= low) & (chosen < high)] - low for low, high in itertools.pairwise(edges)
  ]


def decode_training(made: Windows, chosen: np.ndarray, tok: tokenizer.Tokenizer) -> list[str]:
  """Decode some of a shard's training windows."""
  places = np.flatnonzero(made.splits == 0)[chosen]
  return [tok.decode(made.tokens[made.offsets[i] : made.offsets[i + 1]]) for i in places]
