"""Batches of packed rows from a prepared data directory.

Random choices are functions of (seed, step), so the state of a loader is its next step.
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
from slm.data import rows, sources, work
from slm.data.tokenizer import load as load_tokenizer

VERSION = 3
ORDERS = ('proportional', 'every', 'histogram')
_ROUNDS = 4  # rounds of the pseudo-random permutation
_STEPS = 2**40  # batches in the endless stream
_PREFETCH = 4  # batches made ahead, and threads that make them

Path = pathlib.Path
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Rows to read and how to group them."""

  path: str = ''  # directory made by slm.data.prepare
  set: str = 'generic'
  split: str = 'train'
  index: str = ''  # name of an index in the data directory; '': every row
  level: int = 0  # number of clusters to group rows by; 0: no grouping
  # 'every': one group per cluster in each batch, in order; 'histogram': each group is drawn from a
  # random histogram over at most histogram_clusters clusters, which is its condition
  order: str = 'proportional'
  histogram_clusters: int = 4
  rows_per_group: int = 1
  batch_size: int = 32  # rows per optimiser step
  accum: int = 1  # microbatches per optimiser step
  mix_share: float = 0.0  # share of the rows that come from mix_set/train (with level 0)
  mix_set: str = ''
  mix_index: str = ''

  def __post_init__(self) -> None:
    if self.order not in ORDERS:
      raise ValueError(f'data.order={self.order!r}: expected one of {", ".join(ORDERS)}')
    if min(self.rows_per_group, self.batch_size, self.accum) < 1 or self.level < 0:
      raise ValueError(
        'data: expected rows_per_group, batch_size and accum of at least 1, level of at least 0'
      )
    unit = self.rows_per_group * self.accum
    if self.batch_size % unit:
      raise ValueError(
        f'data.batch_size={self.batch_size} is not a multiple of rows_per_group * accum = {unit}'
      )
    if not self.level and (self.order != 'proportional' or self.rows_per_group > 1):
      raise ValueError(
        f'data.level=0: order={self.order!r}, rows_per_group={self.rows_per_group} need a level'
      )
    if self.histogram_clusters < 1:
      raise ValueError(f'data.histogram_clusters={self.histogram_clusters}: expected at least 1')
    if not 0 <= self.mix_share < 1 or bool(self.mix_share) != bool(self.mix_set):
      raise ValueError(
        f'data.mix_share={self.mix_share}, mix_set={self.mix_set!r}: '
        'expected a share in (0, 1) and a set, or neither'
      )
    if self.mix_index and not self.mix_set:
      raise ValueError(f'data.mix_index={self.mix_index!r} is set but data.mix_set is empty')
    if self.mix_share and self.level:
      raise ValueError(f'data.mix_share is set with data.level={self.level}: expected level 0')


_MANIFEST = {
  'context': int, 'levels': [int], 'tokenizer': {'name': str, 'vocab': int, 'fingerprint': str},
  'sets': {str: {str: {'rows': int, 'sha256': str, 'shards': [str]}}},
}  # fmt: skip
_INDEX = {'set': str, 'split': str, 'rows_sha256': str, 'sha256': str}


def manifest(path: str | Path) -> dict[str, Any]:
  """Read and check the manifest of a prepared data directory."""
  if sources.is_address(str(path)):
    raise ValueError(f'{path}: an address: this command reads data of this machine, copy them')
  path = Path(path) / 'manifest.json'
  if not path.exists():
    raise FileNotFoundError(f'{path}: not found; make it with python -m slm.data.prepare')
  content = files.read_json(path)
  version = content.get('version') if isinstance(content, dict) else None
  if version not in (2, VERSION):
    raise ValueError(f'{path}: expected version {VERSION}, found {version}; prepare it again')
  files.check(path, content, _MANIFEST)
  if 'chat' in content:
    files.check(path, content['chat'], {'kind': str}, 'chat')
  if not content['sets'] or not all(content['sets'].values()):
    raise ValueError(f'{path}: sets: expected a set, and a split in each')
  # Before version 0.2 the rows of every Hugging Face tokenizer began with a begin token.
  old = content['tokenizer']['name'] == 'huggingface' and 'begins' not in content['tokenizer']
  if old and not load_tokenizer(path.parent / 'tokenizer').begins:
    raise ValueError(
      f'{path.parent}: its rows begin with a token that its tokenizer does not put before texts; '
      'prepare it again'
    )
  # Version 2 records no columns: they are always these.
  shape = [content['context']]
  columns = [{'name': name, 'dtype': 'int32', 'shape': shape} for name in ('tokens', 'segments')]
  content = {'columns': columns} | content
  with files.reading(path):
    rows.layout(content['columns'])
  return content


def parse_on(path: str | Path, on: str, split: str = '') -> tuple[str, str, str]:
  """Parse SET/SPLIT[@INDEX], the name of rows in a data directory; without an index it is ''.

  `split` is the only split that `on` may name; '' allows any.

  Raises:
    ValueError: if `on` is not of that form, or the directory has no such set or split.
  """
  match = re.fullmatch(r'([^/@]+)/([^/@]+)(?:@([^/]+))?', on)
  sets = manifest(path)['sets']
  if not match or match[1] not in sets or match[2] not in sets[match[1]]:
    named = on.partition('/')[0]
    example = named if named in sets else next(iter(sets))
    existing = ', '.join(f'{name}/{part}' for name, parts in sets.items() for part in parts)
    raise ValueError(
      f'{on}: expected SET/SPLIT[@INDEX], such as {example}/{next(iter(sets[example]))}; '
      f'{path} has {existing}'
    )
  if split and match[2] != split:
    raise ValueError(
      f'{on}: expected {match[1]}/{split}: held-out rows may not choose data or models'
    )
  return match[1], match[2], match[3] or ''


class Split:
  """The rows of one split, or of an index into it, with the cluster of each."""

  def __init__(self, path: str, set: str, split: str, index: str = '', level: int = 0):
    self.path, self.manifest, self.name = Path(path), manifest(path), f'{set}/{split}'
    self.facts = facts(path, self.name)
    folder = self.path / set / split
    self.record = rows.layout(self.manifest['columns'])
    _check_files(self.path, self.name, self.facts)
    with _reading_records(folder):
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
      self._choose(self.path / 'index' / f'{index}.json')

  def _choose(self, path: Path) -> None:
    """Take only the rows of an index."""
    if not path.exists():
      known = ', '.join(sorted(p.stem for p in path.parent.glob('*.json'))) or 'none'
      raise FileNotFoundError(f'{path}: no such index; there are: {known}')
    index = files.read_json(path, _INDEX)
    if (name := f'{index["set"]}/{index["split"]}') != self.name:
      raise ValueError(f'{path}: is of {name}, not of {self.name}')
    if index['rows_sha256'] != self.facts['sha256']:
      raise ValueError(f'{path}: was made for other rows of {self.name}; make it again')
    array = path.with_suffix('.npy')
    self.ids = files.read_npy(array)
    if files.sha256(array) != index['sha256']:
      raise ValueError(f'{array}: does not match the hash in {path.name}')
    self.sha256 += f' {index["sha256"]}'

  def read(self, ids: np.ndarray) -> rows.Rows:
    """Read rows [n,...] by column; id -1 gives an empty row."""
    (real,) = np.nonzero(ids >= 0)
    records = []
    if len(real):
      with _reading_records(self.path / self.name):
        records = self.source.__getitems__(ids[real].tolist())
    columns = {}
    with files.reading(self.path / 'manifest.json', 'the manifest of these records'):
      for name, values in rows.decode(records, self.record).items():
        columns[name] = np.zeros((len(ids), *values.shape[1:]), values.dtype.newbyteorder('='))
        columns[name][real] = values
    return columns

  def labels(self) -> list[dict[str, Any]]:
    """Return what checks the answers to the prompts of all rows, by row; [] if these are others.

    An entry is {'row': number, 'verifiers': [{'id': ..., 'args': ...}]}.

    Raises:
      ValueError: if they are not those that were prepared.
    """
    path, stamp = self.path / self.name / rows.LABELS, self.facts.get('files', {}).get(rows.LABELS)
    if not stamp:
      return []
    if problem := files.damage(path, stamp):
      raise ValueError(f'{problem}: slm.data.prepare --verify makes it again')
    return [record for _, record in sources.records(str(path))]


def _check_files(path: Path, name: str, facts: dict[str, Any]) -> None:
  """Raise ValueError if a file of SET/SPLIT is missing or has another size than was recorded."""
  with files.reading(path / 'manifest.json'):
    stamps = facts.get('files', {})
    problems = [problem for _, problem in work.damages(path / name / 'rows', stamps, content=False)]
  if problems:
    raise ValueError(f'{problems[0]}: slm.data.prepare makes it again')


@contextlib.contextmanager
def _reading_records(folder: Path) -> Iterator[None]:
  """Turn what the reader of records raises into a ValueError of one line that names the folder."""
  try:
    yield
  except (RuntimeError, IndexError, ValueError) as e:
    raise ValueError(
      f'{folder}: a record file is missing or damaged ({str(e).partition(chr(10))[0]}): '
      'slm.data.prepare --verify names it and makes it again'
    ) from None


def facts(path: str | Path, on: str) -> dict[str, Any]:
  """Return the manifest's entry for SET/SPLIT[@INDEX]; the bytes of an index are 0, not counted.

  Raises:
    ValueError: as `parse_on` does, or if there is no such index.
  """
  data_set, split, index = parse_on(path, on)
  entry = manifest(path)['sets'][data_set][split]
  if not index:
    return entry
  part = Split(path, data_set, split, index)
  return {**entry, 'rows': len(part.ids), 'sha256': part.sha256, 'bytes': 0}


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
  if index:
    data = Split(path, set, split, index, level)
    return np.bincount(data.clusters[data.ids], data.counts[data.ids, 0], minlength=level)
  folder, above, total = Path(path) / set / split, parents(path, level), np.zeros(level)
  _check_files(Path(path), f'{set}/{split}', facts(path, f'{set}/{split}'))
  parts = [files.read_npy_parts(folder / name) for name in ('clusters.npy', 'counts.npy')]
  for clusters, counts in zip(*parts, strict=True):
    total += np.bincount(above[clusters], counts[:, 0], minlength=level)
  return total


def histogram(path: str, set: str, split: str, level: int, index: str = '') -> np.ndarray:
  """Return the frequencies of a split's clusters, by windows: float64 [level], sum 1."""
  counts = window_counts(path, set, split, level, index)
  return counts / counts.sum()


class Order:
  """The rows of each step: a pure function of (seed, step)."""

  def __init__(self, cfg: DataConfig, data: Split, seed: int = 0):
    if not 0 <= seed < 2**32:
      raise ValueError(f'seed={seed}: expected 0 <= seed < 2**32')
    if not len(data.ids):
      raise ValueError(f'{cfg.path}: {data.name} has no rows')
    self._cfg, self._seed = cfg, seed
    clusters = data.clusters[data.ids] if cfg.level else np.zeros_like(data.ids)
    self._ids = data.ids[np.argsort(clusters, kind='stable')]
    self._sizes = np.bincount(clusters, minlength=cfg.level)
    self._starts = np.cumsum(self._sizes) - self._sizes  # of each cluster in _ids
    self.groups = cfg.batch_size // cfg.rows_per_group // cfg.accum
    # The last group of a cluster may be short: it is padded, so an epoch has every row once.
    self._chunk_ends = np.cumsum(-(-self._sizes // cfg.rows_per_group))
    self._group = getattr(self, f'_{cfg.order}')  # one method for each of ORDERS
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
    """Return the conditions and row ids of the groups in some places of the endless stream."""
    conditions, ids = zip(*map(self._group, slots), strict=True)
    dtype = np.float32 if self._cfg.order == 'histogram' else np.int32
    return np.array(conditions, dtype), np.array(ids, np.int64)

  def _histogram(self, slot: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng([self._seed, slot])
    filled = np.flatnonzero(self._sizes)
    n = int(rng.integers(1, min(self._cfg.histogram_clusters, len(filled)) + 1))
    chosen = rng.choice(filled, n, replace=False, p=self._sizes[filled] / self._sizes.sum())
    weights = rng.dirichlet(np.ones(n))
    clusters = rng.choice(chosen, self._cfg.rows_per_group, p=weights)
    places = self._starts[clusters] + rng.integers(self._sizes[clusters])
    histogram = np.zeros(self._cfg.level)
    histogram[chosen] = weights
    return histogram, self._ids[places].tolist()

  def _proportional(self, slot: int) -> tuple[int, list[int]]:
    chunks = int(self._chunk_ends[-1])
    epoch, i = divmod(slot, chunks)
    chunk = _shuffle(i, chunks, self._seed, epoch)
    cluster = int(np.searchsorted(self._chunk_ends, chunk, 'right'))
    before = int(self._chunk_ends[cluster - 1]) if cluster else 0
    first, size = (chunk - before) * self._cfg.rows_per_group, int(self._sizes[cluster])
    places = range(first, first + self._cfg.rows_per_group)
    return cluster, [self._row(cluster, epoch, p) if p < size else -1 for p in places]

  def _every(self, slot: int) -> tuple[int, list[int]]:
    cycle, cluster = divmod(slot, self._cfg.level)
    first = cycle * self._cfg.rows_per_group
    places = (divmod(first + i, int(self._sizes[cluster])) for i in range(self._cfg.rows_per_group))
    return cluster, [self._row(cluster, epoch, p) for epoch, p in places]

  def _row(self, cluster: int, epoch: int, place: int) -> int:
    place = _shuffle(place, int(self._sizes[cluster]), self._seed, epoch, cluster + 1)
    return int(self._ids[self._starts[cluster] + place])


def _shuffle(index: int, size: int, *key: int) -> int:
  """Return the place of `index` in the permutation of range(size) seeded by `key`."""
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
    """Return the step of the next batch."""
    return int(self._iterator.get_state()['next_index'])

  def set_state(self, step: int) -> None:
    """Continue with the batch of a step."""
    self._iterator.set_state({'next_index': int(step)})


def build(
  cfg: DataConfig,
  *,
  seed: int = 0,
  tokenizer: str = '',
  look_up: Callable[[rows.Rows], Batch] | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Loader:
  """Open the endless stream of batches; leaves are [accum, groups, rows_per_group, context].

  `condition` is int32 [accum, groups], or float32 [accum, groups, level] with order='histogram'.
  Of prompts, `length` is int32 [accum, groups, rows_per_group, 1] and `row` the number of the row,
  by which `Split.labels` names its verifiers, int32 [accum, groups, rows_per_group].
  Each process gets its slice of the groups of the same global batch. `tokenizer` is the fingerprint
  of the tokenizer that the rows must be made with; '' skips the check. `look_up` makes further
  leaves from rows by column.

  Raises:
    ValueError: if the rows are of another tokenizer, or the groups cannot be shared evenly.
  """
  data = Split(cfg.path, cfg.set, cfg.split, cfg.index, cfg.level)
  made_with = data.manifest['tokenizer']
  if tokenizer and tokenizer != made_with['fingerprint']:
    raise ValueError(
      f'{cfg.path}: rows were made with the {made_with["name"]} tokenizer '
      f'{made_with["fingerprint"]}, and the model expects {tokenizer}'
    )
  order = Order(cfg, data, seed)
  if order.groups % process_count:
    raise ValueError(
      f'data: {order.groups} groups per batch cannot be shared by {process_count} processes'
    )
  local = order.groups // process_count
  here = slice(process_index * local, (process_index + 1) * local)
  mixing = _Mixing(cfg, seed, order) if cfg.mix_share else None
  prompts = data.manifest.get('chat', {}).get('kind') == 'prompts'

  def make(step: int) -> Batch:
    condition, ids, mixed_ids = mixing.step(step) if mixing else (*order.step(step), None)
    share = lambda x: x.reshape(cfg.accum, order.groups, *x.shape[1:])[:, here]
    ids = share(ids)
    columns = data.read(ids.ravel())
    if mixing:  # a place filled by one set is empty in the other: zeros
      mixed = mixing.data.read(share(mixed_ids).ravel())
      columns = {name: x + mixed[name] for name, x in columns.items()}
    columns = {name: x.reshape(*ids.shape, *x.shape[1:]) for name, x in columns.items()}
    further = look_up(columns) if look_up else {}
    if prompts:
      further |= {'row': ids.astype(np.int32)}
    return rows.batch(columns) | further | {'condition': share(condition)}

  return Loader(grain.MapDataset.range(_STEPS).map(make))


class _Mixing:
  """Rows of another set in fixed places of the stream.

  Place n is filled by the other set where n * mix_share passes a whole number. Each set keeps its
  own endless order, so all of its rows come once before any comes again.
  """

  def __init__(self, cfg: DataConfig, seed: int, order: Order):
    self._share, self._order = cfg.mix_share, order
    self._per_step = order.groups * cfg.accum
    self.data = Split(cfg.path, cfg.mix_set, 'train', cfg.mix_index)
    self._mixed_order = Order(cfg, self.data, seed)

  def step(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the main set's conditions, its row ids and the other set's row ids of a step.

    Either set has row id -1 in the places of the other.
    """
    places = np.arange(step * self._per_step, (step + 1) * self._per_step)
    before = np.floor(places * self._share).astype(np.int64)  # places of the other set before each
    mixed = (np.floor((places + 1) * self._share) > before)[:, None]
    conditions, ids = self._order.slots((places - before).tolist())
    _, mixed_ids = self._mixed_order.slots(before.tolist())
    return conditions, np.where(mixed, -1, ids), np.where(mixed, mixed_ids, -1)


def spaced(values: np.ndarray, most: int) -> np.ndarray:
  """Return at most `most` of the values, evenly spaced; 0 returns all."""
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
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[tuple[int, np.ndarray, Batch]]:
  """Yield (condition, row ids int64 [batch_size], batch) once over a split, in a fixed order.

  Leaves are [batch_size / process_count, context]: each process reads its slice of the rows. With a
  level, every batch has one cluster. Padding rows have id -1 and weight 0. `max_rows` limits the
  rows to that many, evenly spaced.
  """
  data = Split(path, set, split, index, level)
  ids = spaced(data.ids, max_rows)
  clusters = data.clusters[ids] if level else np.zeros(len(ids), np.int32)
  local = batch_size // process_count
  here = slice(process_index * local, (process_index + 1) * local)
  for cluster in np.unique(clusters).tolist():
    chosen = ids[clusters == cluster]
    for start in range(0, len(chosen), batch_size):
      part = chosen[start : start + batch_size]
      part = np.pad(part, (0, batch_size - len(part)), constant_values=-1).astype(np.int64)
      yield cluster, part, rows.batch(data.read(part[here]))
