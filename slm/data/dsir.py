"""Select single rows by importance resampling with hashed n-grams (DSIR).

Run as `python -m slm.data.dsir --data=DATA --on=law/train --tokens=1e6 --out=NAME` to write
DATA/index/NAME.npy and .json: the generic rows whose words are most like the domain's.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
from absl import flags

from slm.base import console, files
from slm.data import importance, loader, tokenizer

BUCKETS = 10_000
_FLOOR = 1e-8  # added to every probability, as in the published package
_WORDS = re.compile(r'\w+|[^\w\s]+')
_CHUNK = 1024  # rows decoded at once


@functools.lru_cache(1 << 20)
def _bucket(ngram: str) -> int:
  return int.from_bytes(hashlib.sha256(ngram.encode()).digest()) % BUCKETS


def count(texts: Sequence[str]) -> scipy.sparse.csr_matrix:
  """Count hashed words and pairs of words of each text: int32 [texts, BUCKETS].

  The features are those of Xie et al. 2023 (arXiv 2302.03169, §3), hashed as in their package.
  """
  columns, ends = [], [0]
  for text in texts:
    words = _WORDS.findall(text.lower())
    columns += map(_bucket, words)
    columns += (_bucket(f'{a} {b}') for a, b in zip(words, words[1:], strict=False))
    ends.append(len(columns))
  ones = np.ones(len(columns), np.int32)
  matrix = scipy.sparse.csr_matrix((ones, columns, ends), (len(texts), BUCKETS))
  matrix.sum_duplicates()
  return matrix


def log_weights(
  rows: scipy.sparse.csr_matrix, target: np.ndarray, raw: np.ndarray, smoothing: float = 0.0
) -> np.ndarray:
  """Return log p(x | target) / p(x | raw) of each row under bags of n-grams.

  `target` and `raw` [BUCKETS] are counts; `smoothing` is added to each count of a small target.
  """
  share = lambda counts: counts / counts.sum()
  p, q = share(target + smoothing), share(np.asarray(raw, np.float64))
  return rows @ (np.log(p + _FLOOR) - np.log(q + _FLOOR))


def choose(weights: np.ndarray, tokens: np.ndarray, size: int, seed: int) -> np.ndarray:
  """Draw rows without replacement until they hold `size` tokens: the top of log w + Gumbel noise.

  They are in that order, so a smaller size is a prefix.
  """
  noise = np.random.default_rng(seed).gumbel(size=len(weights))
  return importance.prefix(np.argsort(-(weights + noise), kind='stable'), tokens, size)


def features(split: loader.Split) -> scipy.sparse.csr_matrix:
  """Count the n-grams of every row of a split; kept in a file named by the hash of the rows.

  Raises:
    ValueError: if that file is damaged.
  """
  path = split.path / split.name / f'ngrams-{split.facts["sha256"][:16]}.npz'
  if path.exists():
    with files.reading(path):
      return scipy.sparse.load_npz(path)
  total = split.facts['rows']
  tok, parts = tokenizer.load(split.path / 'tokenizer'), []
  with console.Progress(f'n-grams of {split.name}', total, 'rows') as progress:
    for start in range(0, total, _CHUNK):
      columns = split.read(np.arange(start, min(start + _CHUNK, total)))
      rows = zip(columns['tokens'], columns['segments'], strict=True)
      parts.append(count([_text(tok, *row) for row in rows]))
      progress.update(len(columns['tokens']))
  matrix = scipy.sparse.vstack(parts, format='csr')
  with files.replacing(path) as temporary, temporary.open('wb') as f:
    scipy.sparse.save_npz(f, matrix)
  return matrix


def _text(tok: tokenizer.Tokenizer, tokens: np.ndarray, segments: np.ndarray) -> str:
  """Decode a row's windows, one per line, from its columns [context]."""
  return '\n'.join(tok.decode(tokens[segments == i]) for i in range(1, segments.max() + 1))


def sample(request: importance.Selection) -> dict[str, Any]:
  """Write the index that a request describes and return its JSON.

  Raises:
    ValueError: if the generic set holds fewer tokens than requested.
  """
  r = request
  generic = loader.Split(r.data, 'generic', 'train')
  domain = loader.Split(r.data, r.domain, 'train', r.domain_index)
  rows = features(generic)
  total = lambda matrix: np.asarray(matrix.sum(axis=0), np.float64).ravel()
  target, raw = total(features(domain)[domain.ids]), total(rows)
  weights = log_weights(rows, target, raw, r.smoothing)
  ids = choose(weights, generic.counts[:, 1], r.tokens, r.seed)
  p, present = target / target.sum(), target > 0
  log_ratio = lambda counts: np.log(p[present] / (counts / counts.sum() + _FLOOR)[present])
  kl = lambda counts: float((p[present] * log_ratio(counts)).sum())
  results = {'kl_before': kl(raw / raw.sum()), 'kl_after': kl(total(rows[ids]))}
  return importance.write_index(generic, r.out, ids, r.record() | {'how': 'dsir'}, **results)


def _main(_: list[str]) -> None:
  request = importance.Selection.of_flags()
  index = sample(request)
  made = index['made']
  print(
    f'{request.out}: {index["rows"]:,} rows, {index["tokens"]:,} tokens\n'
    f"KL divergence of the domain's n-grams from those of generic rows: {made['kl_before']:.3f} "
    f'nats before, {made["kl_after"]:.3f} after the selection; lower is nearer the domain'
  )


if __name__ == '__main__':
  flags.DEFINE_string('data', None, 'Prepared data directory.')
  flags.DEFINE_string('on', None, 'SET/train[@INDEX]: rows that the selected ones should resemble.')
  flags.DEFINE_float('tokens', None, 'Predicted tokens to select, about.')
  flags.DEFINE_string('out', None, 'Name of the index to write.')
  flags.DEFINE_integer('seed', 0, 'Seed of the draw.')
  flags.DEFINE_float('smoothing', 0.0, 'Added to each count of the domain; for small sets.')
  console.run(_main, renamed=dict.fromkeys(('domain', 'domain_index'), '--on=SET/train[@INDEX]'))
