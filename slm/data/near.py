"""Near-duplicates: documents that share most of their word 5-grams (MinHash and LSH).

A training document is dropped if it is near a held-out document of any set, or an earlier training
document of its own set. Signatures and their index stay in memory: 4 kB per document.
"""

import pathlib
import re
from collections.abc import Iterator
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
    heldout = _Index(threshold)
    for name, shards in sets.items():
      for i, values in _signatures(shards, keep[name], training=False):
        heldout.insert(f'{name} {i}', values)
        bar.update(1)
    for name, shards in sets.items():
      earlier = _Index(threshold)
      for i, values in _signatures(shards, keep[name], training=True):
        bar.update(1)
        if heldout.near(values) or earlier.near(values):
          keep[name][i] = False
        else:
          earlier.insert(str(i), values)


class _Index:
  """An LSH index that checks its candidates against their signatures."""

  def __init__(self, threshold: float):
    self._threshold = threshold
    self._lsh = datasketch.MinHashLSH(threshold, _PERMUTATIONS)
    self._signatures: dict[str, np.ndarray] = {}

  def insert(self, key: str, values: np.ndarray) -> None:
    self._lsh.insert(key, _minhash(values))
    self._signatures[key] = values

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
