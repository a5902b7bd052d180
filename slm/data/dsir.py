"""Data selection by importance resampling of single rows, by hashed n-grams (DSIR).

Run as `python -m slm.data.dsir --data=DATA --on=law/train --tokens=1e6 --out=NAME` to write
DATA/index/NAME.npy and .json: the generic rows whose words look most like the domain's.
"""

import dataclasses
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
_FLOOR = 1e-8  # added to every probability, as the published package does
_WORDS = re.compile(r'\w+|[^\w\s]+')
_CHUNK = 1024  # rows decoded at once


@functools.lru_cache(1 << 20)
def _bucket(ngram: str) -> int:
  return int.from_bytes(hashlib.sha256(ngram.encode()).digest()) % BUCKETS


def count(texts: Sequence[str]) -> scipy.sparse.csr_matrix:
  """Count hashed words and pairs of words of each text: int32 [texts, BUCKETS].

  The features of Xie et al. 2023 (arXiv 2302.03169, §3), hashed as their package does.
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

  `target` and `raw` [BUCKETS] are counts; `smoothing` is added to the target's (for small sets).
  """
  share = lambda counts: counts / counts.sum()
  p, q = share(target + smoothing), share(np.asarray(raw, np.float64))
  return rows @ (np.log(p + _FLOOR) - np.log(q + _FLOOR))


def choose(weights: np.ndarray, tokens: np.ndarray, size: int, seed: int) -> np.ndarray:
  """Draw rows without replacement until they hold `size` tokens: the top of log w + Gumbel noise.

  Returned in that order, so that a smaller size is a prefix.
  """
  noise = np.random.default_rng(seed).gumbel(size=len(weights))
  return importance.prefix(np.argsort(-(weights + noise), kind='stable'), tokens, size)


def features(split: loader.Split) -> scipy.sparse.csr_matrix:
  """Count the n-grams of every row of a split: computed once, kept beside the rows."""
  path = split.path / split.name / 'ngrams.npz'
  if path.exists():
    found = scipy.sparse.load_npz(path)
    if found.shape[0] == split.facts['rows']:
      return found
  tok = tokenizer.load(str(split.path / 'tokenizer'))
  parts, total = [], split.facts['rows']
  with console.progress(f'n-grams of {split.name}', total, 'rows') as progress:
    for start in range(0, total, _CHUNK):
      ids = np.arange(start, min(start + _CHUNK, total))
      read = split.read(ids)
      pairs = zip(read['tokens'], read['segments'], strict=True)
      parts.append(count([_text(tok, *pair) for pair in pairs]))
      progress.update(len(ids))
  found = scipy.sparse.vstack(parts, format='csr')
  with files.replacing(path) as temporary, temporary.open('wb') as f:
    scipy.sparse.save_npz(f, found)
  return found


def _text(tok: tokenizer.Tokenizer, tokens: np.ndarray, segments: np.ndarray) -> str:
  """Decode a row's tokens [context], its windows apart."""
  return '\n'.join(tok.decode(tokens[segments == i]) for i in range(1, segments.max() + 1))


@dataclasses.dataclass(frozen=True)
class Request:
  """What to select: rows of generic/train with about `tokens` predicted tokens for one domain."""

  data: str
  domain: str
  tokens: int
  out: str
  seed: int = 0
  smoothing: float = 0.0
  domain_index: str = ''

  def __post_init__(self) -> None:
    if self.tokens < 1:
      raise ValueError(f'tokens={self.tokens}: expected at least 1')
    if self.smoothing < 0:
      raise ValueError(f'smoothing={self.smoothing}: expected at least 0')
    importance.check_name(self.out)


def sample(request: Request) -> dict[str, Any]:
  """Write the index that a request describes and return what its JSON says.

  Raises:
    ValueError: if the generic set holds fewer tokens than asked for.
  """
  r = request
  generic = loader.Split(r.data, 'generic', 'train')
  domain = loader.Split(r.data, r.domain, 'train', r.domain_index)
  rows = features(generic)
  total = lambda matrix: np.asarray(matrix.sum(axis=0), np.float64).ravel()
  target, raw = total(features(domain)[domain.ids]), total(rows)
  weights = log_weights(rows, target, raw, r.smoothing)
  ids = choose(weights, generic.counts[:, 1], r.tokens, r.seed)
  p, q = target / target.sum(), raw / raw.sum()
  chosen = total(rows[ids])
  kl = lambda a: float((p[p > 0] * np.log(p[p > 0] / (a / a.sum() + _FLOOR)[p > 0])).sum())
  asked = dataclasses.asdict(r) | {'how': 'dsir'}
  del asked['data']  # the directory may move
  found = {'kl_before': kl(q), 'kl_after': kl(chosen)}
  return importance.write_index(generic, r.out, ids, asked, **found)


def _main(_: list[str]) -> None:
  f = flags.FLAGS
  console.required('data', 'on', 'tokens', 'out')
  domain, _, index = loader.parse_on(f.data, f.on, split='train')
  names = {field.name for field in dataclasses.fields(Request)} - {'domain', 'domain_index'}
  values = {name: f[name].value for name in names} | {'tokens': importance.whole(f.tokens)}
  about = sample(Request(domain=domain, domain_index=index, **values))
  made = about['made']
  print(
    f'{f.out}: {about["rows"]:,} rows, {about["tokens"]:,} tokens; KL of the domain from '
    f'the generic n-grams {made["kl_before"]:.3f} nats, from the selected {made["kl_after"]:.3f}'
  )


if __name__ == '__main__':
  flags.DEFINE_string('data', None, 'Prepared data directory.')
  flags.DEFINE_string('on', None, 'SET/train[@INDEX]: rows that the selected ones should resemble.')
  flags.DEFINE_float('tokens', None, 'Predicted tokens to select, about.')
  flags.DEFINE_string('out', None, 'Name of the index to write.')
  flags.DEFINE_integer('seed', 0, 'Seed of the draw.')
  flags.DEFINE_float('smoothing', 0.0, 'Added to each count of the domain; for small sets.')
  console.run(_main, renamed=dict.fromkeys(('domain', 'domain_index'), '--on=SET/train[@INDEX]'))
