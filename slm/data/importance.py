"""Importance sampling: resample generic rows to a domain's histogram over clusters.

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

  p is the domain's window counts plus `smoothing`, normalised; g the generic windows' frequencies.
  Clusters without generic windows get nothing.
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
  """Turn frequencies of windows [k] into the frequencies of rows [k] that hold them.

  `rows` and `windows` [k] are the generic counts: a cluster of short windows has many to a row.
  """
  share = np.divide(p * rows, windows, out=np.zeros(len(p)), where=windows > 0)
  return share / share.sum()


def quotas(p: np.ndarray, rows: np.ndarray, num_rows: int, repeat_cap: float) -> np.ndarray:
  """Share num_rows over clusters in proportion to p: int64 [k].

  No cluster gives more than `repeat_cap` times its rows; what it cannot take goes to the others
  in proportion. 0 is no cap.
  """
  limits = np.floor(repeat_cap * rows) if repeat_cap else np.where(rows > 0, np.inf, 0)
  limits = np.where(p > 0, limits, 0)
  if limits.sum() < num_rows:
    raise ValueError(
      f'importance: {num_rows} rows asked for, and repeat_cap={repeat_cap:g} allows '
      f'{int(limits.sum())}'
    )
  share, capped = p * num_rows, np.zeros(len(p), bool)
  while (over := (share > limits) & ~capped).any():
    capped |= over
    left = np.where(capped, 0, p)
    rest = num_rows - limits[capped].sum()
    share = np.where(capped, limits, rest * left / max(left.sum(), 1e-300))
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

  `target_hist` [k] holds the domain's window counts (or frequencies), `clusters` [rows] and
  `windows` [rows] the cluster and the number of windows of every generic row (default: one each).
  Within a cluster rows come shuffled, and none comes again before all have come. Clusters are
  interleaved at random.
  """
  k = len(target_hist)
  rows = np.bincount(clusters, minlength=k)
  if len(rows) != k:
    raise ValueError(f'importance: rows lie in {len(rows)} clusters, the histogram has {k}')
  held = rows if windows is None else np.bincount(clusters, windows, minlength=k)
  p = target(np.asarray(target_hist, np.float64), held, smoothing, interpolation)
  counts = quotas(row_share(p, rows, held), rows, num_rows, repeat_cap)
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.repeat(np.arange(k), counts))
  ids = np.empty(num_rows, np.int64)
  places, members = np.argsort(labels, kind='stable'), np.argsort(clusters, kind='stable')
  for own, mine in zip(
    np.split(places, np.cumsum(counts)[:-1]), np.split(members, np.cumsum(rows)[:-1]), strict=True
  ):
    passes = -(-len(own) // max(len(mine), 1))
    stream = [rng.permutation(mine) for _ in range(passes)]
    ids[own] = np.concatenate([*stream, np.zeros(0, np.int64)])[: len(own)]
  return ids


def diagnostics(p: np.ndarray, g: np.ndarray) -> dict[str, Any]:
  """Describe how concentrated sampling p [k] from g [k] is, both over windows.

  ess_fraction = 1 / sum_c p_c^2 / g_c; entropy in nats; effective_clusters = exp(entropy).
  """
  p, g = p / p.sum(), g / g.sum()
  seen, held = p > 0, g > 0
  entropy = float((p[seen] * np.log(1 / p[seen])).sum())
  lost = float(p[seen & ~held].sum())
  ess = 0.0 if lost else float(1 / (p[held] ** 2 / g[held]).sum())
  return {
    'entropy': entropy,
    'effective_clusters': float(np.exp(entropy)),
    'ess_fraction': ess,
    'top_cluster': float(p.max()),
    'mass_without_generic_rows': lost,
  }


def nested(tokens: np.ndarray, size: int, seed: int) -> np.ndarray:
  """Choose rows with at least `size` predicted tokens: a prefix of one seeded permutation.

  `tokens` [rows]. Larger sizes contain smaller ones. Raises when the rows hold fewer tokens.
  """
  return prefix(np.random.default_rng(seed).permutation(len(tokens)), tokens, size)


def prefix(order: np.ndarray, tokens: np.ndarray, size: int) -> np.ndarray:
  """Return the first rows of an order that hold at least `size` of `tokens` [rows]."""
  held = np.cumsum(tokens[order])
  if not len(held) or held[-1] < size:
    raise ValueError(f'{size} tokens asked for, and there are {int(held[-1]) if len(held) else 0}')
  return order[: int(np.searchsorted(held, size)) + 1].astype(np.int64)


def write_index(
  data: loader.Split, name: str, ids: np.ndarray, asked: dict[str, Any], **found: Any
) -> dict[str, Any]:
  """Write <data>/index/<name>.npy and .json; the array first, so that the pair is complete.

  The JSON says what was asked for and what was found.

  Raises:
    ValueError: if another index has that name, or another process is writing it.
  """
  path = data.path / 'index' / f'{name}.npy'
  content = io.BytesIO()
  np.save(content, ids.astype(np.int64), allow_pickle=False)
  set, split = data.name.split('/')
  about = {
    'set': set,
    'split': split,
    'rows': len(ids),
    'tokens': int(data.counts[ids, 1].sum()),
    'windows': int(data.counts[ids, 0].sum()),
    'sha256': hashlib.sha256(content.getbuffer()).hexdigest(),
    'rows_sha256': data.facts['sha256'],
    'made': asked | found,
  }
  record = path.with_suffix('.json')
  with artifact.hold(path.parent, name):
    if record.exists() and (old := files.read_json(record))['sha256'] != about['sha256']:
      was = {key: old['made'].get(key) for key in asked}
      changed = artifact.difference(was, artifact.plain(asked)) or 'it is of other rows'
      raise ValueError(f'{record}: another index has this name ({changed}): choose another')
    with files.replacing(path) as temporary:
      temporary.write_bytes(content.getbuffer())
    files.write_json(record, about)
  return about


def check_name(name: str) -> None:
  """Refuse a name of an index that is a path."""
  if not name or pathlib.Path(name).name != name:
    raise ValueError(f'out={name!r}: expected the name of an index, not a path')


@dataclasses.dataclass(frozen=True)
class Request:
  """What to sample: about `tokens` predicted tokens of generic/train for one domain."""

  data: str
  domain: str
  level: int
  tokens: int
  out: str
  seed: int = 0
  smoothing: float = 0.0
  interpolation: float = 0.0
  repeat_cap: float = 0.0
  domain_index: str = ''
  top: bool = False

  def __post_init__(self) -> None:
    if self.tokens < 1 or self.level < 1:
      raise ValueError(f'tokens={self.tokens}, level={self.level}: expected at least 1')
    check_name(self.out)


def whole(tokens: float) -> int:
  """Turn a number such as 16e6 into an int."""
  if not math.isfinite(tokens):
    raise ValueError(f'tokens={tokens}: expected a finite number')
  return int(tokens)


def sample(request: Request) -> dict[str, Any]:
  """Write the index that a request describes and return what its JSON says."""
  r = request
  generic = loader.Split(r.data, 'generic', 'train', level=r.level)
  domain = loader.window_counts(r.data, r.domain, 'train', r.level, r.domain_index)
  if r.top:
    domain = np.where(np.arange(r.level) == np.argmax(domain), domain, 0.0)
  each, clusters = generic.counts[:, 0], generic.clusters
  rows = np.bincount(clusters, minlength=r.level)
  windows, tokens = (np.bincount(clusters, x, minlength=r.level) for x in generic.counts.T)
  share = row_share(target(domain, windows, r.smoothing, r.interpolation), rows, windows)
  mean = float((share * tokens / np.maximum(rows, 1)).sum())  # tokens in a drawn row
  num_rows = max(round(r.tokens / mean), 1)
  ids = resample(
    domain, clusters, num_rows, r.seed, r.smoothing, r.interpolation, r.repeat_cap, each
  )
  found = diagnostics(np.bincount(clusters[ids], each[ids], minlength=r.level), windows)
  drawn = np.bincount(clusters[ids], minlength=r.level)
  found |= {
    'distinct_rows': len(np.unique(ids)),
    'expected_repeats': (drawn / np.maximum(rows, 1)).tolist(),
    'domain_mass_without_generic_rows': diagnostics(domain, windows)['mass_without_generic_rows'],
  }
  asked = dataclasses.asdict(r)
  del asked['data']  # the directory may move
  return write_index(generic, r.out, ids, asked, **found)


def _main(_: list[str]) -> None:
  f = flags.FLAGS
  console.required('data', 'on', 'level', 'tokens', 'out')
  domain, _, index = loader.parse_on(f.data, f.on, split='train')
  names = {field.name for field in dataclasses.fields(Request)} - {'domain', 'domain_index'}
  values = {name: f[name].value for name in names} | {'tokens': whole(f.tokens)}
  about = sample(Request(domain=domain, domain_index=index, **values))
  made = about['made']
  print(
    f'{f.out}: {about["rows"]:,} rows ({made["distinct_rows"]:,} distinct), '
    f'{about["tokens"]:,} tokens, effective sample {made["ess_fraction"]:.3f} of the generic set, '
    f'{made["effective_clusters"]:.1f} effective clusters, '
    f'most repeated cluster {max(made["expected_repeats"]):.2f} times'
  )


if __name__ == '__main__':
  flags.DEFINE_string('data', None, 'Prepared data directory.')
  flags.DEFINE_string(
    'on', None, "SET/train[@INDEX]: the domain's rows, whose histogram is matched."
  )
  flags.DEFINE_integer('level', None, 'Number of clusters.')
  flags.DEFINE_float('tokens', None, 'Predicted tokens to draw, about.')
  flags.DEFINE_string('out', None, 'Name of the index to write.')
  flags.DEFINE_integer('seed', 0, 'Seed of the draw.')
  flags.DEFINE_float('smoothing', 0.0, 'Windows added to every cluster of the domain.')
  flags.DEFINE_float('interpolation', 0.0, 'Weight of the generic histogram, 0 to 1.')
  flags.DEFINE_float('repeat_cap', 0.0, 'Most times a cluster is repeated; 0: no cap.')
  flags.DEFINE_bool('top', False, "Take the domain's most frequent cluster alone.")
  console.run(_main, renamed=dict.fromkeys(('domain', 'domain_index'), '--on=SET/train[@INDEX]'))
