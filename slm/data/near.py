"""Near-duplicates: documents that share most of their word 5-grams (MinHash and LSH).

A training document is dropped if it is near a held-out document of any set, or an earlier training
document of its own set. Only documents that share a band of their signatures with
another are compared: these take 4 kB of memory each, all others about 25 bytes.
"""

import functools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasketch
import numpy as np

from slm.base import console, files
from slm.data import documents, work

Path = pathlib.Path
_PERMUTATIONS = 128
_SCHEME = 'affine32'
_WORDS = 5
_WORD = re.compile(r'\w+')


def signature(text: str) -> np.ndarray:
  """Return the MinHash of a text's word 5-grams (of all its words if it has fewer), [128]."""
  words = _WORD.findall(text.lower())
  count = max(len(words) - _WORDS + 1, 1)
  grams = {' '.join(words[i : i + _WORDS]).encode() for i in range(count)}
  minhash = datasketch.MinHash(_PERMUTATIONS, scheme=_SCHEME)
  minhash.update_batch(sorted(grams))
  return minhash.hashvalues


def sign(shard: Path) -> dict[str, Any]:
  """Write the signatures of a document shard, [documents, 128], beside it."""
  records = work.read_records(shard.with_name(f'{shard.name}.array_record'))
  signatures = np.array([signature(data.decode()) for data in records])
  files.write_npy(shard.with_name(f'{shard.name}.minhash.npy'), signatures)
  return {'files': [f'{shard.name}.minhash.npy']}


def mark(sets: dict[str, dict[Path, int]], keep: dict[str, np.ndarray], threshold: float) -> None:
  """Clear `keep` (by set, bool [documents]) where a training document is a near-duplicate.

  `sets` maps every set to its shards and their numbers of documents. Documents are near if their
  estimated Jaccard similarity is at least `threshold`.
  """
  compared = _compared(sets, keep, threshold)
  total = sum(map(np.count_nonzero, compared.values()))
  with console.Progress('near-duplicates', total, 'documents') as bar:

    def counted(name: str, training: bool) -> Iterator[tuple[int, np.ndarray]]:
      for signed in _signatures(sets[name], compared[name], training):
        yield signed
        bar.update(1)

    heldout = (values for name in sets for _, values in counted(name, training=False))
    training = {name: counted(name, training=True) for name in sets}
    for name, i in repeats(heldout, training, threshold):
      keep[name][i] = False


def _compared(
  sets: dict[str, dict[Path, int]], keep: dict[str, np.ndarray], threshold: float
) -> dict[str, np.ndarray]:
  """Return the kept documents, by set, that share a band with another: all others are near none."""
  shards = [
    (shard.with_name(f'{shard.name}.minhash.npy'), part)
    for name in sets
    for shard, part in zip(
      sets[name], np.split(keep[name], np.cumsum([*sets[name].values()])[:-1]), strict=True
    )
  ]
  shared = np.zeros(sum(np.count_nonzero(kept) for _, kept in shards), bool)
  for low, high in _ranges(threshold):
    hashes = np.concatenate([_hash(files.read_npy(p, 'r')[kept, low:high]) for p, kept in shards])
    order = np.argsort(hashes)
    hashes = hashes[order]
    same = hashes[1:] == hashes[:-1]
    shared[order[1:][same]] = shared[order[:-1][same]] = True
  compared = {name: kept.copy() for name, kept in keep.items()}
  sizes = np.cumsum([np.count_nonzero(kept) for kept in compared.values()])
  for kept, part in zip(compared.values(), np.split(shared, sizes[:-1]), strict=True):
    kept[kept] = part
  return compared


def _hash(band: np.ndarray) -> np.ndarray:
  """Return a 64-bit hash of every row: equal rows have equal ones."""
  total = np.zeros(len(band), np.uint64)
  for column in band.T.astype(np.uint64):
    total = (total ^ column) * np.uint64(0x9E3779B97F4A7C15)
    total ^= total >> np.uint64(29)
  return total


def repeats(
  heldout: Iterable[np.ndarray],
  training: Mapping[str, Iterable[tuple[int, np.ndarray]]],
  threshold: float,
) -> Iterator[tuple[str, int]]:
  """Yield (set, position) of the training documents that are near-duplicates.

  `heldout` are the signatures of the held-out documents of all sets; `training` has the position
  and the signature of each training document by set, in order.
  """
  apart = _Index(threshold)
  for values in heldout:
    apart.insert(values)
  for name, signatures in training.items():
    earlier = _Index(threshold)
    for i, values in signatures:
      if apart.near(values) or earlier.near(values):
        yield name, i
      else:
        earlier.insert(values)


def bands(values: np.ndarray, threshold: float) -> list[bytes]:
  """Return the bands of a signature: documents that share none are not compared by `repeats`."""
  ranges = _ranges(threshold)
  return [bytes([number]) + values[a:b].tobytes() for number, (a, b) in enumerate(ranges)]


@functools.cache
def _ranges(threshold: float) -> list[tuple[int, int]]:
  return datasketch.MinHashLSH(threshold, _PERMUTATIONS).hashranges


class _Index:
  """An LSH index that checks its candidates against their signatures."""

  def __init__(self, threshold: float):
    self._threshold = threshold
    self._lsh = datasketch.MinHashLSH(threshold, _PERMUTATIONS)
    self._signatures: list[np.ndarray] = []

  def insert(self, values: np.ndarray) -> None:
    self._lsh.insert(len(self._signatures), _minhash(values))
    self._signatures.append(values)

  def near(self, values: np.ndarray) -> bool:
    """Return whether a document of the index is near the one with this signature."""
    candidates = (self._signatures[key] for key in self._lsh.query(_minhash(values)))
    return any(np.mean(other == values) >= self._threshold for other in candidates)


def _minhash(values: np.ndarray) -> datasketch.MinHash:
  return datasketch.MinHash(hashvalues=values, scheme=_SCHEME)


def _signatures(
  shards: dict[Path, int], keep: np.ndarray, training: bool
) -> Iterator[tuple[int, np.ndarray]]:
  """Yield (position in the set, signature) of the kept training or held-out documents."""
  start = 0
  for shard, count in shards.items():
    wanted = (documents.document_splits(shard) == 0) == training
    signatures = files.read_npy(shard.with_name(f'{shard.name}.minhash.npy'), mmap='r')
    for i in np.flatnonzero(keep[start : start + count] & wanted).tolist():
      yield start + i, np.array(signatures[i])
    start += count
