"""Near-duplicates: documents that share most of their word 5-grams (MinHash and LSH).

A training document is dropped if it is near a held-out document of any set, or an earlier training
document of its own set. Signatures and their index stay in memory: 4 kB per document.
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
  total = sum(sum(shards.values()) for shards in sets.values())
  with console.Progress('near-duplicates', total, 'documents') as bar:

    def counted(name: str, training: bool) -> Iterator[tuple[int, np.ndarray]]:
      for signed in _signatures(sets[name], keep[name], training):
        yield signed
        bar.update(1)

    heldout = (values for name in sets for _, values in counted(name, training=False))
    training = {name: counted(name, training=True) for name in sets}
    for name, i in repeats(heldout, training, threshold):
      keep[name][i] = False


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
