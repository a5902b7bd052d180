"""Resample generic rows to a domain's histogram over clusters (importance sampling).

Run as `python -m slm.data.importance --data=DATA --on=law/train --level=64 --tokens=1e6
--out=NAME` to write DATA/index/NAME.npy and .json.
"""

import dataclasses
import hashlib
import io
import math
import pathlib
from typing import Any

import numpy as np
from absl import flags

from slm.base import artifact, console, files
from slm.data import loader


def target(
  domain: np.ndarray, generic: np.ndarray, smoothing: float, interpolation: float
) -> np.ndarray:
  """Return the window frequencies [k] to sample: (1 - interpolation) p + interpolation g.

  p is the domain's window counts plus `smoothing`, normalised; g is the frequencies of the generic
  windows. Clusters without generic windows get 0.
  """
  if smoothing < 0 or not 0 <= interpolation <= 1:
    raise ValueError('importance: expected smoothing >= 0 and 0 <= interpolation <= 1')
  p = (domain + smoothing) / (domain + smoothing).sum()
  p = (1 - interpolation) * p + interpolation * generic / generic.sum()
  p = np.where(generic > 0, p, 0.0)
  if not p.sum():
    raise ValueError('importance: no generic row lies in any cluster of the domain')
  return p / p.sum()


def row_share(p: np.ndarray, rows: np.ndarray, windows: np.ndarray) -> np.ndarray:
  """Return the frequencies of rows [k] that give the frequencies p of windows [k].

  `rows` and `windows` [k] are the generic counts: a row of short windows holds many.
  """
  share = np.divide(p * rows, windows, out=np.zeros(len(p)), where=windows > 0)
  return share / share.sum()


def quotas(p: np.ndarray, rows: np.ndarray, num_rows: int, repeat_cap: float) -> np.ndarray:
  """Divide num_rows over clusters in proportion to p: int64 [k].

  No cluster gives more than `repeat_cap` times its rows (0: no cap); the others give the rest, in
  proportion.
  """
  limits = np.floor(repeat_cap * rows) if repeat_cap else np.where(rows > 0, np.inf, 0)
  limits = np.where(p > 0, limits, 0)
  if limits.sum() < num_rows:
    raise ValueError(
      f'importance: {num_rows} rows requested, repeat_cap={repeat_cap:g} allows {int(limits.sum())}'
    )
  share, capped = p * num_rows, np.zeros(len(p), bool)
  while (over := (share > limits) & ~capped).any():
    capped |= over
    free = np.where(capped, 0, p)
    rest = num_rows - limits[capped].sum()
    share = np.where(capped, limits, rest * free / max(free.sum(), 1e-300))
  # Largest remainders make the counts whole and their sum exact.
  whole = np.floor(share + 1e-9).astype(np.int64)
  order = np.lexsort((np.arange(len(p)), whole - share))
  order = order[whole[order] < limits[order]]
  whole[order[: num_rows - whole.sum()]] += 1
  return whole


def resample(
  target_hist: np.ndarray,
  clusters: np.ndarray,
  num_rows: int,
  seed: int,
  smoothing: float = 0.0,
  interpolation: float = 0.0,
  repeat_cap: float = 0.0,
  windows: np.ndarray | None = None,
) -> np.ndarray:
  """Draw row ids int64 [num_rows] whose windows have the target's cluster histogram.

  `target_hist` [k] holds the domain's window counts (or frequencies); `clusters` and `windows`
  [rows] hold the cluster and the number of windows (default 1) of every generic row. Within a
  cluster rows are shuffled, and none is repeated before all have been drawn. Clusters are
  interleaved at random.
  """
  k = len(target_hist)
  rows = np.bincount(clusters, minlength=k)
  if len(rows) != k:
    raise ValueError(f'importance: rows lie in {len(rows)} clusters, the histogram has {k}')
  available = rows if windows is None else np.bincount(clusters, windows, minlength=k)
  p = target(np.asarray(target_hist, np.float64), available, smoothing, interpolation)
  counts = quotas(row_share(p, rows, available), rows, num_rows, repeat_cap)
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.repeat(np.arange(k), counts))
  ids = np.empty(num_rows, np.int64)
  by_label = np.split(np.argsort(labels, kind='stable'), np.cumsum(counts)[:-1])
  by_cluster = np.split(np.argsort(clusters, kind='stable'), np.cumsum(rows)[:-1])
  for places, members in zip(by_label, by_cluster, strict=True):
    passes = -(-len(places) // max(len(members), 1))
    stream = [rng.permutation(members) for _ in range(passes)]
    ids[places] = np.concatenate([*stream, np.zeros(0, np.int64)])[: len(places)]
  return ids


def diagnostics(p: np.ndarray, g: np.ndarray) -> dict[str, Any]:
  """Measure how concentrated a sample is that gives window counts g [k] the frequencies of p [k].

  ess_fraction = 1 / sum_c p_c^2 / g_c; entropy in nats; effective_clusters = exp(entropy).
  """
  p, g = p / p.sum(), g / g.sum()
  positive, available = p > 0, g > 0
  entropy = float((p[positive] * np.log(1 / p[positive])).sum())
  lost = float(p[~available].sum())
  ess = 0.0 if lost else float(1 / (p[available] ** 2 / g[available]).sum())
  return {
    'entropy': entropy,
    'effective_clusters': float(np.exp(entropy)),
    'ess_fraction': ess,
    'top_cluster': float(p.max()),
    'mass_without_generic_rows': lost,
  }


def nested(tokens: np.ndarray, size: int, seed: int) -> np.ndarray:
  """Choose rows with at least `size` predicted tokens: a prefix of a seeded permutation.

  `tokens` [rows] are the predicted tokens of each row. Larger sizes contain smaller ones.

  Raises:
    ValueError: if the rows hold fewer tokens.
  """
  return prefix(np.random.default_rng(seed).permutation(len(tokens)), tokens, size)


def prefix(order: np.ndarray, tokens: np.ndarray, size: int) -> np.ndarray:
  """Return the first rows of an order that together hold at least `size` of `tokens` [rows]."""
  total = np.cumsum(tokens[order])
  if not len(total) or total[-1] < size:
    raise ValueError(f'{size} tokens requested, the rows hold {int(tokens.sum())}')
  return order[: int(np.searchsorted(total, size)) + 1].astype(np.int64)


def write_index(
  data: loader.Split, name: str, ids: np.ndarray, request: dict[str, Any], **results: Any
) -> dict[str, Any]:
  """Write <data>/index/<name>.npy and .json and return the JSON.

  The JSON, written last, records the request and its results.

  Raises:
    ValueError: if another index has that name, or another process is writing it.
  """
  path = data.path / 'index' / f'{name}.npy'
  content = io.BytesIO()
  np.save(content, ids.astype(np.int64), allow_pickle=False)
  set, split = data.name.split('/')
  index = {
    'set': set,
    'split': split,
    'rows': len(ids),
    'tokens': int(data.counts[ids, 1].sum()),
    'windows': int(data.counts[ids, 0].sum()),
    'sha256': hashlib.sha256(content.getbuffer()).hexdigest(),
    'rows_sha256': data.facts['sha256'],
    'made': request | results,
  }
  record = path.with_suffix('.json')
  with artifact.hold(path.parent, name):
    if record.exists() and (old := files.read_json(record))['sha256'] != index['sha256']:
      old_request = {key: old['made'].get(key) for key in request}
      changed = artifact.difference(old_request, artifact.plain(request)) or 'it has other rows'
      raise ValueError(f'{record}: another index has this name ({changed}): choose another')
    with files.replacing(path) as temporary:
      temporary.write_bytes(content.getbuffer())
    files.write_json(record, index)
  return index


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
  """A request for generic/train rows with about `tokens` predicted tokens, chosen for a domain."""

  data: str
  domain: str
  tokens: int
  out: str  # name of the index
  seed: int = 0
  smoothing: float = 0.0  # added to every count of the domain
  domain_index: str = ''

  def __post_init__(self) -> None:
    if self.tokens < 1 or self.smoothing < 0:
      raise ValueError(
        f'tokens={self.tokens}, smoothing={self.smoothing}: expected at least 1 and at least 0'
      )
    if not self.out or pathlib.Path(self.out).name != self.out:
      raise ValueError(f'out={self.out!r}: expected the name of an index, not a path')

  @classmethod
  def of_flags(cls) -> 'Selection':
    """Read the request from the command line, where --on names the domain and its index."""
    names = {field.name for field in dataclasses.fields(cls)} - {'domain', 'domain_index'}
    console.required('on', *(name for name in sorted(names) if flags.FLAGS[name].default is None))
    values = {name: flags.FLAGS[name].value for name in names}
    if not math.isfinite(values['tokens']):
      raise ValueError(f'tokens={values["tokens"]}: expected a finite number')
    values['tokens'] = int(values['tokens'])  # written like 16e6
    domain, _, index = loader.parse_on(values['data'], flags.FLAGS.on, split='train')
    return cls(domain=domain, domain_index=index, **values)

  def record(self) -> dict[str, Any]:
    """Return the request as it is recorded with the index, without the directory: it may move."""
    return {name: value for name, value in dataclasses.asdict(self).items() if name != 'data'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Selection):
  """A selection by importance sampling over `level` clusters."""

  level: int
  interpolation: float = 0.0
  repeat_cap: float = 0.0
  top: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.level < 1:
      raise ValueError(f'level={self.level}: expected at least 1')


def sample(request: Request) -> dict[str, Any]:
  """Write the index that a request describes and return its JSON."""
  r = request
  generic = loader.Split(r.data, 'generic', 'train', level=r.level)
  domain = loader.window_counts(r.data, r.domain, 'train', r.level, r.domain_index)
  if r.top:
    domain = np.where(np.arange(r.level) == np.argmax(domain), domain, 0.0)
  row_windows, clusters = generic.counts[:, 0], generic.clusters
  rows = np.bincount(clusters, minlength=r.level)
  windows, tokens = (np.bincount(clusters, x, minlength=r.level) for x in generic.counts.T)
  share = row_share(target(domain, windows, r.smoothing, r.interpolation), rows, windows)
  tokens_per_row = float((share * tokens / np.maximum(rows, 1)).sum())
  num_rows = max(round(r.tokens / tokens_per_row), 1)
  ids = resample(
    domain, clusters, num_rows, r.seed, r.smoothing, r.interpolation, r.repeat_cap, row_windows
  )
  drawn = np.bincount(clusters[ids], minlength=r.level)
  drawn_windows = np.bincount(clusters[ids], row_windows[ids], minlength=r.level)
  results = diagnostics(drawn_windows, windows) | {
    'distinct_rows': len(np.unique(ids)),
    'expected_repeats': (drawn / np.maximum(rows, 1)).tolist(),
    'domain_mass_without_generic_rows': diagnostics(domain, windows)['mass_without_generic_rows'],
  }
  return write_index(generic, r.out, ids, r.record(), **results)


def _main(_: list[str]) -> None:
  request = Request.of_flags()
  index = sample(request)
  made = index['made']
  print(
    f'{request.out}: {index["rows"]:,} rows ({made["distinct_rows"]:,} distinct), '
    f'{index["tokens"]:,} tokens, effective sample {made["ess_fraction"]:.3f} of the generic set, '
    f'{made["effective_clusters"]:.1f} effective clusters, '
    f'most repeated cluster {max(made["expected_repeats"]):.2f} times'
  )


if __name__ == '__main__':
  flags.DEFINE_string('data', None, 'Prepared data directory.')
  flags.DEFINE_string('on', None, "SET/train[@INDEX]: the domain's rows, whose histogram to match.")
  flags.DEFINE_integer('level', None, 'Number of clusters.')
  flags.DEFINE_float('tokens', None, 'Predicted tokens to draw, about.')
  flags.DEFINE_string('out', None, 'Name of the index to write.')
  flags.DEFINE_integer('seed', 0, 'Seed of the draw.')
  flags.DEFINE_float('smoothing', 0.0, "Windows added to each cluster of the domain's histogram.")
  flags.DEFINE_float('interpolation', 0.0, 'Weight of the generic histogram, 0 to 1.')
  flags.DEFINE_float('repeat_cap', 0.0, 'Most draws of a cluster per row of it; 0: no cap.')
  flags.DEFINE_bool('top', False, "Take the domain's most frequent cluster alone.")
  console.run(_main, renamed=dict.fromkeys(('domain', 'domain_index'), '--on=SET/train[@INDEX]'))
