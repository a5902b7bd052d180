"""Near-duplicates: documents that share most of their word 5-grams (MinHash and LSH, datasketch).

Training documents go that are near a held-out document of any set, or near an earlier training
document of their own set. Signatures and their index are held in memory: four kB per document.
"""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import datasketch
import numpy as np

from slm.base import console, files
from slm.data import work

Path = pathlib.Path
_PERMUTATIONS = 128
_SCHEME = 'affine32'
_WORDS = 5
_WORD = re.compile(r'\w+')


def signature(text: str) -> np.ndarray:
  """Return the MinHash of a text's word 5-grams (its words, if there are fewer)."""
  words = _WORD.findall(text.lower())
  count = max(len(words) - _WORDS + 1, 1)
  grams = {' '.join(words[i : i + _WORDS]).encode() for i in range(count)}
  found = datasketch.MinHash(_PERMUTATIONS, scheme=_SCHEME)
  found.update_batch(sorted(grams))
  return found.hashvalues


def sign(shard: Path) -> dict[str, Any]:
  """Write the signatures [documents, 128] of a document shard beside it."""
  records = work.read_records(shard.with_name(f'{shard.name}.array_record'))
  found = np.array([signature(data.decode()) for data in records])
  files.write_npy(shard.with_name(f'{shard.name}.minhash.npy'), found)
  return {'files': [f'{shard.name}.minhash.npy']}


def mark(sets: dict[str, dict[Path, int]], keep: dict[str, np.ndarray], threshold: float) -> None:
  """Clear `keep` [documents of a set] where a training document is a near-duplicate.

  `sets` maps every set to its shards and their numbers of documents. A document is near if its
  estimated Jaccard similarity is at least `threshold`.
  """
  total = sum(sum(shards.values()) for shards in sets.values())
  with console.progress('near-duplicates', total, 'documents') as bar:
    held = _Index(threshold)
    for name, shards in sets.items():
      for i, found in _documents(shards, keep[name], training=False):
        held.insert(f'{name} {i}', found)
        bar.update(1)
    for name, shards in sets.items():
      seen = _Index(threshold)
      for i, found in _documents(shards, keep[name], training=True):
        bar.update(1)
        if held.near(found) or seen.near(found):
          keep[name][i] = False
        else:
          seen.insert(str(i), found)


class _Index:
  """An LSH index that also holds the signatures, to check its candidates."""

  def __init__(self, threshold: float):
    self._threshold = threshold
    self._lsh = datasketch.MinHashLSH(threshold, _PERMUTATIONS)
    self._signatures: dict[str, np.ndarray] = {}

  def insert(self, key: str, values: np.ndarray) -> None:
    self._lsh.insert(key, _minhash(values))
    self._signatures[key] = values

  def near(self, values: np.ndarray) -> bool:
    """Say whether a document of the index is near this one."""
    found = (self._signatures[key] for key in self._lsh.query(_minhash(values)))
    return any(np.mean(other == values) >= self._threshold for other in found)


def _minhash(values: np.ndarray) -> datasketch.MinHash:
  return datasketch.MinHash(hashvalues=values, scheme=_SCHEME)


def _documents(
  shards: dict[Path, int], keep: np.ndarray, training: bool
) -> Iterator[tuple[int, np.ndarray]]:
  """Yield (position in the set, signature) of the documents that are kept."""
  start = 0
  for shard, count in shards.items():
    hashes = files.read_npy(shard.with_name(f'{shard.name}.npy'))
    split = np.empty(count, np.int64)
    split[(hashes[:, 2] & np.uint64(2**48 - 1)).astype(np.int64)] = hashes[:, 2] >> np.uint64(48)
    signatures = files.read_npy(shard.with_name(f'{shard.name}.minhash.npy'), mmap='r')
    for i in np.flatnonzero(keep[start : start + count] & ((split == 0) == training)).tolist():
      yield start + i, np.array(signatures[i])
    start += count
