"""Batches of packed rows from a prepared data directory.

Everything random is a function of (seed, step), so the loader's state is the next step.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
import safetensors
from grain.experimental import index_shuffle
from grain.sources import ArrayRecordDataSource

from slm.base import files
from slm.data import rows, work
from slm.data.tokenizer import load as load_tokenizer

VERSION = 3
ORDERS = ('proportional', 'every', 'histogram')
_ROUNDS = 4  # of the pseudo-random permutation
_STEPS = 2**40  # batches in the endless stream
_PREFETCH = 4  # batches made ahead by as many threads

Path = pathlib.Path
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to read and how to group it; `batch_size` counts rows per optimiser step."""

  path: str = ''  # made by slm.data.prepare
  set: str = 'generic'
  split: str = 'train'
  index: str = ''  # name of an index in the data directory; '': every row
  level: int = 0  # clusters to group rows by; 0 does not group
  # 'every': one group per cluster in each batch, in order; 'histogram': groups of rows that follow
  # random histograms over at most histogram_clusters clusters, which are their conditions
  order: str = 'proportional'
  histogram_clusters: int = 4
  rows_per_group: int = 1
  batch_size: int = 32  # rows per optimiser step
  accum: int = 1  # microbatches per optimiser step
  mix_share: float = 0.0  # this share of the rows comes from mix_set/train (with level 0)
  mix_set: str = ''
  mix_index: str = ''

  def __post_init__(self) -> None:
    if self.order not in ORDERS:
      raise ValueError(f'data.order={self.order!r}: expected one of {", ".join(ORDERS)}')
    if min(self.rows_per_group, self.batch_size, self.accum) < 1 or self.level < 0:
      raise ValueError('data: rows_per_group, batch_size and accum must be at least 1, level 0')
    unit = self.rows_per_group * self.accum
    if self.batch_size % unit:
      raise ValueError(
        f'data.batch_size={self.batch_size} is not a multiple of rows_per_group * accum = {unit}'
      )
    if not self.level and (self.order != 'proportional' or self.rows_per_group > 1):
      raise ValueError(
        f'data.level=0: order {self.order!r}, rows_per_group={self.rows_per_group} need a level'
      )
    if self.histogram_clusters < 1:
      raise ValueError(f'data.histogram_clusters={self.histogram_clusters}: expected at least 1')
    if not 0 <= self.mix_share < 1 or bool(self.mix_share) != bool(self.mix_set):
      raise ValueError(
        f'data.mix_share={self.mix_share}, mix_set={self.mix_set!r}: '
        'expected a share in (0, 1) of a set, or neither'
      )
    if self.mix_index and not self.mix_set:
      raise ValueError(f'data.mix_index={self.mix_index!r}: of no mix_set')
    if self.mix_share and self.level:
      raise ValueError('data.mix_share: rows of another set are mixed in only with data.level=0')


def manifest(path: str | Path) -> dict[str, Any]:
  """Read and check the manifest of a prepared data directory."""
  path = Path(path) / 'manifest.json'
  if not path.exists():
    raise FileNotFoundError(f'{path}: not found; make it with python -m slm.data.prepare')
  found = files.read_json(path)
  version = found.get('version') if isinstance(found, dict) else None
  if version not in (2, VERSION):
    raise ValueError(f'{path}: expected version {VERSION}, found {version}; prepare it again')
  missing = {'context', 'tokenizer', 'levels', 'sets'} - set(found)
  if missing:
    raise ValueError(f'{path}: lacks {", ".join(sorted(missing))}')
  _check_begins(path.parent, found['tokenizer'])
  return {'columns': rows.columns(found['context'])} | found  # version 2 had these alone


def parse_on(path: str | Path, on: str, split: str = '') -> tuple[str, str, str]:
  """Take SET/SPLIT[@INDEX], which names rows of a data directory, apart; no index is ''.

  `split` is the only one that may be named, if only one may.

  Raises:
    ValueError: if `on` is not of that form, or the directory has no such set or split.
  """
  match = re.fullmatch(r'([^/@]+)/([^/@]+)(?:@([^/]+))?', on)
  sets = manifest(path)['sets']
  if not match or match[1] not in sets or match[2] not in sets[match[1]]:
    named = on.partition('/')[0]
    example = named if named in sets else next(iter(sets))
    there = ', '.join(f'{name}/{part}' for name, parts in sets.items() for part in parts)
    raise ValueError(
      f'{on}: expected SET/SPLIT[@INDEX], such as {example}/{next(iter(sets[example]))}; '
      f'{path} has {there}'
    )
  if split and match[2] != split:
    raise ValueError(
      f'{on}: expected {match[1]}/{split}: what is held out chooses no data and no model'
    )
  return match[1], match[2], match[3] or ''


def _check_begins(path: Path, about: dict[str, Any]) -> None:
  """Refuse rows of before version 0.2, in which a begin token was put where texts have none."""
  old = about['name'] == 'huggingface' and 'begins' not in about
  if old and not load_tokenizer(path / 'tokenizer').begins:
    raise ValueError(
      f'{path}: its rows begin with a token that texts of its tokenizer do not begin with; prepare '
      'it again'
    )


class Split:
  """The rows of one split, or of an index into it, with the cluster of each."""

  def __init__(self, path: str, set: str, split: str, index: str = '', level: int = 0):
    self.path, self.manifest, self.name = Path(path), manifest(path), f'{set}/{split}'
    self.facts = facts(path, self.name)
    folder = self.path / set / split
    self.record = rows.layout(self.manifest['columns'])
    for problem in work.damages(folder / 'rows', self.facts.get('files', {}), content=False):
      raise ValueError(f'{problem}: slm.data.prepare makes it again')
    with _damage_named(folder):
      self.source = ArrayRecordDataSource([str(folder / s) for s in self.facts['shards']])
    self.clusters = files.read_npy(folder / 'clusters.npy')
    self.counts = files.read_npy(folder / 'counts.npy')
    self.documents = files.read_npy(folder / 'documents.npy')
    parts = (self.source, self.clusters, self.counts, self.documents)
    if {len(part) for part in parts} != {self.facts['rows']}:
      raise ValueError(f'{folder}: {self.facts["rows"]} rows in the manifest, other files differ')
    if level:
      self.clusters = parents(path, level)[self.clusters]
    self.ids, self.sha256 = np.arange(self.facts['rows']), self.facts['sha256']
    if index:
      self.ids, chosen = self._index(index, set, split)
      self.sha256 += f' {chosen}'

  def _index(self, name: str, set: str, split: str) -> tuple[np.ndarray, str]:
    path = self.path / 'index' / f'{name}.json'
    if not path.exists():
      known = ', '.join(sorted(p.stem for p in path.parent.glob('*.json'))) or 'none'
      raise FileNotFoundError(f'{path}: no such index; there are: {known}')
    about = files.read_json(path)
    if (about['set'], about['split']) != (set, split):
      raise ValueError(f'{path}: is of {about["set"]}/{about["split"]}, not of {self.name}')
    if about['rows_sha256'] != self.facts['sha256']:
      raise ValueError(f'{path}: was made for other rows of {self.name}; make it again')
    ids = files.read_npy(path.with_suffix('.npy'))
    if files.sha256(path.with_suffix('.npy')) != about['sha256']:
      raise ValueError(f'{path.with_suffix(".npy")}: does not match the hash in {path.name}')
    return ids, about['sha256']

  def read(self, ids: np.ndarray) -> rows.Rows:
    """Read rows [n,...] by column; id -1 gives an empty row."""
    (real,) = np.nonzero(ids >= 0)
    records = []
    if len(real):
      with _damage_named(self.path / self.name):
        records = self.source.__getitems__(ids[real].tolist())
    there = rows.decode(records, self.record)
    out = {}
    for name, values in there.items():
      out[name] = np.zeros((len(ids), *values.shape[1:]), values.dtype.newbyteorder('='))
      out[name][real] = values
    return out


@contextlib.contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
  """Turn what the reader of records raises into one line that names their directory."""
  try:
    yield
  except (RuntimeError, IndexError) as e:
    raise ValueError(
      f'{folder}: a record file is missing or damaged ({str(e).partition(chr(10))[0]}): '
      'slm.data.prepare with --verify names it and makes it again'
    ) from None


def facts(path: str | Path, on: str) -> dict[str, Any]:
  """Return what the manifest says of SET/SPLIT, or of an index of it: whose bytes nobody counted.

  Raises:
    ValueError: as `parse_on` does, or if there is no such index.
  """
  data_set, split, index = parse_on(path, on)
  whole = manifest(path)['sets'][data_set][split]
  if not index:
    return whole
  part = Split(path, data_set, split, index)
  return {**whole, 'rows': len(part.ids), 'sha256': part.sha256, 'bytes': 0}


def clustering(path: str | Path) -> str:
  """Return the hash of the fitted clusters of a prepared data directory."""
  return files.sha256(Path(path) / 'clusters' / 'model.safetensors')


def parents(path: str | Path, level: int) -> np.ndarray:
  """Map each finest cluster to its cluster at `level`."""
  levels = manifest(path)['levels']
  if level not in levels:
    raise ValueError(f'{path}: no level {level}; there are: {", ".join(map(str, levels))}')
  file = Path(path) / 'clusters' / 'model.safetensors'
  with files.reading(file), safetensors.safe_open(file, 'np') as f:
    return f.get_tensor(f'parents_{level}')


def window_counts(path: str, set: str, split: str, level: int, index: str = '') -> np.ndarray:
  """Count windows per cluster at a level: float64 [level]."""
  data = Split(path, set, split, index, level)
  weights = data.counts[data.ids, 0]
  return np.bincount(data.clusters[data.ids], weights, minlength=level)


def histogram(path: str, set: str, split: str, level: int, index: str = '') -> np.ndarray:
  """Return the frequencies of a split's clusters, by windows: float64 [level], sum 1."""
  counts = window_counts(path, set, split, level, index)
  return counts / counts.sum()


class Order:
  """Which rows make step n: a pure function of (seed, n)."""

  def __init__(self, cfg: DataConfig, data: Split, seed: int = 0):
    if not 0 <= seed < 2**32:
      raise ValueError(f'seed={seed}: expected 0 <= seed < 2**32')
    self._cfg, self._seed = cfg, seed
    if cfg.level:
      clusters = data.clusters[data.ids]
      order = np.argsort(clusters, kind='stable')
      sizes = np.bincount(clusters, minlength=cfg.level)
    else:
      order, sizes = np.arange(len(data.ids)), np.array([len(data.ids)])
    self._ids, self._sizes = data.ids[order], sizes
    self._starts = np.cumsum(sizes) - sizes  # of each cluster in _ids
    self.groups = cfg.batch_size // cfg.rows_per_group // cfg.accum
    # The last group of a cluster may be short: it is padded, so an epoch has every row once.
    self._chunk_ends = np.cumsum(-(-sizes // cfg.rows_per_group))
    if not len(data.ids):
      raise ValueError(f'{cfg.path}: {data.name} has no rows')
    if cfg.order == 'every':
      self._check_every(data.name)

  def _check_every(self, name: str) -> None:
    if self.groups != self._cfg.level:
      raise ValueError(
        f"data.order='every' needs batch_size = accum * level * rows_per_group = "
        f'{self._cfg.accum * self._cfg.level * self._cfg.rows_per_group}, '
        f'found {self._cfg.batch_size}'
      )
    if empty := np.flatnonzero(self._sizes == 0).tolist():
      raise ValueError(f"data.order='every': clusters {empty} have no rows in {name}")

  def step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return conditions [accum * groups] and row ids [accum * groups, rows_per_group].

    A condition is a cluster id, or with order='histogram' a histogram float32 [level].
    """
    n = self._cfg.accum * self.groups
    return self.slots(range(step * n, (step + 1) * n))

  def slots(self, slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the conditions and row ids of some groups of the endless stream."""
    group = {
      'proportional': self._proportional, 'every': self._every, 'histogram': self._histogram
    }[self._cfg.order]  # fmt: skip
    conditions, ids = zip(*map(group, slots), strict=True)
    kind = np.float32 if self._cfg.order == 'histogram' else np.int32
    return np.array(conditions, kind), np.array(ids, np.int64)

  def _histogram(self, slot: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng([self._seed, slot])
    held = np.flatnonzero(self._sizes)
    n = int(rng.integers(1, min(self._cfg.histogram_clusters, len(held)) + 1))
    chosen = rng.choice(held, n, replace=False, p=self._sizes[held] / self._sizes.sum())
    weights = rng.dirichlet(np.ones(n))
    clusters = rng.choice(chosen, self._cfg.rows_per_group, p=weights)
    places = self._starts[clusters] + rng.integers(self._sizes[clusters])
    histogram = np.zeros(self._cfg.level)
    histogram[chosen] = weights
    return histogram, self._ids[places].tolist()

  def _proportional(self, slot: int) -> tuple[int, list[int]]:
    epoch, i = divmod(slot, int(self._chunk_ends[-1]))
    chunk = _shuffle(i, int(self._chunk_ends[-1]), self._seed, epoch)
    cluster = int(np.searchsorted(self._chunk_ends, chunk, 'right'))
    before = int(self._chunk_ends[cluster - 1]) if cluster else 0
    first, size = (chunk - before) * self._cfg.rows_per_group, int(self._sizes[cluster])
    places = range(first, first + self._cfg.rows_per_group)
    return cluster, [self._row(cluster, epoch, p) if p < size else -1 for p in places]

  def _every(self, slot: int) -> tuple[int, list[int]]:
    turn, cluster = divmod(slot, self._cfg.level)
    first = turn * self._cfg.rows_per_group
    places = (divmod(first + i, int(self._sizes[cluster])) for i in range(self._cfg.rows_per_group))
    return cluster, [self._row(cluster, epoch, p) for epoch, p in places]

  def _row(self, cluster: int, epoch: int, place: int) -> int:
    place = _shuffle(place, int(self._sizes[cluster]), self._seed, epoch, cluster + 1)
    return int(self._ids[self._starts[cluster] + place])


def _shuffle(index: int, size: int, *key: int) -> int:
  """Find the place of `index` in the permutation of range(size) that `key` names."""
  return index_shuffle(index, size - 1, _seed(key), _ROUNDS)


@functools.lru_cache(1 << 16)
def _seed(key: tuple[int, ...]) -> int:
  return int(np.random.SeedSequence(key).generate_state(1)[0])


class Loader:
  """An endless iterator of batches whose state is the next step."""

  def __init__(self, dataset: grain.MapDataset):
    options = grain.ReadOptions(num_threads=_PREFETCH, prefetch_buffer_size=_PREFETCH)
    self._iterator = iter(dataset.to_iter_dataset(options))

  def __iter__(self) -> 'Loader':
    return self

  def __next__(self) -> Batch:
    return next(self._iterator)

  def get_state(self) -> int:
    """Return the step that the next call gives."""
    return int(self._iterator.get_state()['next_index'])

  def set_state(self, step: int) -> None:
    """Continue at a step."""
    self._iterator.set_state({'next_index': int(step)})


def build(
  cfg: DataConfig, *, seed: int = 0, tokenizer: str = '',
  look_up: Callable[[rows.Rows], Batch] | None = None,
  process_index: int = 0, process_count: int = 1,
) -> Loader:  # fmt: skip
  """Open the endless stream of batches; leaves are [accum, groups, rows_per_group, context].

  `condition` is int32 [accum, groups], or float32 [accum, groups, level] of histograms. Each
  process gets its slice of the groups of the same global batch. `tokenizer` is the fingerprint
  that the rows must have been made with. `look_up` gives more leaves, of rows by column.
  """
  data = Split(cfg.path, cfg.set, cfg.split, cfg.index, cfg.level)
  check_tokenizer(cfg.path, tokenizer)
  order = Order(cfg, data, seed)
  if order.groups % process_count:
    raise ValueError(
      f'data: {order.groups} groups per batch cannot be shared by {process_count} processes'
    )
  local = order.groups // process_count
  here = slice(process_index * local, (process_index + 1) * local)
  add = _Mixing(cfg, seed, order.groups * cfg.accum) if cfg.mix_share else None

  def make(step: int) -> Batch:
    condition, ids = order.step(step) if add is None else add.main(order, step)
    share = lambda x: x.reshape(cfg.accum, order.groups, *x.shape[1:])[:, here]
    ids = share(ids)
    read = data.read(ids.ravel())
    if add is not None:  # where one set has a row the other has none: zeros
      other = add.read(share(add.ids(step)).ravel())
      read = {name: x + other[name] for name, x in read.items()}
    read = {name: x.reshape(*ids.shape, *x.shape[1:]) for name, x in read.items()}
    more = look_up(read) if look_up else {}
    return rows.batch(read) | more | {'condition': share(condition)}

  return Loader(grain.MapDataset.range(_STEPS).map(make))


class _Mixing:
  """Rows of another set in fixed places of the stream: slot s is one if s x share passes a whole.

  Both sets keep their own endless order, so every row of each comes once before any comes again.
  """

  def __init__(self, cfg: DataConfig, seed: int, per_step: int):
    self._share, self._n = cfg.mix_share, per_step
    own = dataclasses.replace(
      cfg, set=cfg.mix_set, split='train', index=cfg.mix_index,
      mix_share=0.0, mix_set='', mix_index='',
    )  # fmt: skip
    self._data = Split(own.path, own.set, own.split, own.index)
    self._order, self.read = Order(own, self._data, seed), self._data.read

  def _slots(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    slots = np.arange(step * self._n, (step + 1) * self._n)
    before = np.floor(slots * self._share).astype(np.int64)
    return np.floor((slots + 1) * self._share) > before, before

  def main(self, order: Order, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the main set's conditions and row ids of a step; the other set's places have -1."""
    mixed, before = self._slots(step)
    slots = np.arange(step * self._n, (step + 1) * self._n) - before
    conditions, ids = order.slots(slots.tolist())
    return conditions, np.where(mixed[:, None], -1, ids)

  def ids(self, step: int) -> np.ndarray:
    """Return the other set's row ids of a step; the main set's places have -1."""
    mixed, before = self._slots(step)
    return np.where(mixed[:, None], self._order.slots(before.tolist())[1], -1)


def check_tokenizer(path: str, fingerprint: str) -> None:
  """Refuse rows made with another tokenizer."""
  about = manifest(path)['tokenizer']
  if fingerprint and fingerprint != about['fingerprint']:
    raise ValueError(
      f'{path}: rows were made with the {about["name"]} tokenizer {about["fingerprint"]}, '
      f'and the model expects {fingerprint}'
    )


def spaced(values: np.ndarray, most: int) -> np.ndarray:
  """Take at most so many values, evenly spaced; 0 takes all."""
  return values[np.arange(most) * len(values) // most] if 0 < most < len(values) else values


def evaluation_batches(
  path: str,
  set: str,
  split: str,
  batch_size: int,
  *,
  level: int = 0,
  index: str = '',
  max_rows: int = 0,
) -> Iterator[tuple[int, np.ndarray, Batch]]:
  """Yield (condition, row ids int64 [batch_size], batch) once over a split, in a fixed order.

  Leaves are [batch_size, context]. With a level, every batch has one cluster. Padding rows have
  id -1 and weight 0. `max_rows` takes that many rows, evenly spaced.
  """
  data = Split(path, set, split, index, level)
  ids = spaced(data.ids, max_rows)
  clusters = data.clusters[ids] if level else np.zeros(len(ids), np.int32)
  for cluster in np.unique(clusters).tolist():
    chosen = ids[clusters == cluster]
    for start in range(0, len(chosen), batch_size):
      part = chosen[start : start + batch_size]
      part = np.pad(part, (0, batch_size - len(part)), constant_values=-1).astype(np.int64)
      yield cluster, part, rows.batch(data.read(part))
