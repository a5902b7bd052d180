"""The preparation of rows as an Apache Beam pipeline, with the functions of the local path.

The elements are document shards of 8 MB of text. Exact copies meet by ranges of hashes, and
near-duplicates by the bands of their signatures; windows are packed in the same blocks of shards as
locally, so the rows are the same bytes. What is made once, of little data (the places of shards,
tokenizer, clusters), is made by one worker and reaches the others as a side input. Sources and
output are paths that every worker sees, or addresses that Beam reads and writes (gs://...).
"""

import collections
import contextlib
import dataclasses
import functools
import io
import logging
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import scipy.sparse.csgraph
from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import AsSingleton

from slm.base import files
from slm.data import cluster, documents, near, remote, rows, tokenizer, work
from slm.data.settings import RUNNERS, PrepareConfig

Path = pathlib.Path
Key = tuple[int, int, int]  # numbers of the set, of its reading task, of the shard in the task
Document = tuple[int, int]  # numbers of the set and of the document in it
Counts = dict[str, list[int]]  # of a shard, by split

COUNTS = 'windows/counts.json'  # below the output: Counts of every shard, by set
_STAGES = ('documents', 'tokenizer', 'windows', 'clusters', 'rows')
_NAMESPACE = 'slm'  # of the counters


class Shard(NamedTuple):
  """Documents of a shard."""

  texts: list[bytes]
  hashes: np.ndarray  # uint64 [documents, 3], as documents.read writes them

  @property
  def training(self) -> list[str]:
    """Return the texts of the training documents."""
    splits, _ = documents.unpack(self.hashes)
    return [text.decode() for text, split in zip(self.texts, splits, strict=True) if split == 0]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the shards of every set lie: [splits] documents of each, before any is dropped."""

  totals: dict[Key, np.ndarray]

  @functools.cached_property
  def keys(self) -> dict[int, list[Key]]:
    """Return the shards of every set in order."""
    return _by_set(self.totals)

  @functools.cached_property
  def places(self) -> dict[Key, int]:
    """Return the number of every shard in its set."""
    return {key: i for keys in self.keys.values() for i, key in enumerate(keys)}

  @functools.cached_property
  def starts(self) -> dict[int, np.ndarray]:
    """Return the number of documents of a set before each of its shards."""
    sizes = {s: [int(self.totals[key].sum()) for key in keys] for s, keys in self.keys.items()}
    return {s: np.cumsum([0, *counts[:-1]]) for s, counts in sizes.items()}

  def start(self, key: Key) -> int:
    """Return the number of documents of its set before a shard."""
    return int(self.starts[key[0]][self.places[key]])

  def within(self, number: int, positions: np.ndarray) -> Iterator[tuple[Key, np.ndarray]]:
    """Yield the shards that hold some documents of a set, and the positions of these there."""
    shards = np.searchsorted(self.starts[number], positions, 'right') - 1
    for i in np.unique(shards).tolist():
      yield self.keys[number][i], positions[shards == i] - self.starts[number][i]


def _by_set(keys: Iterable[Key]) -> dict[int, list[Key]]:
  groups: dict[int, list[Key]] = {}
  for key in sorted(keys):
    groups.setdefault(key[0], []).append(key)
  return groups


def run(
  cfg: PrepareConfig, paths: documents.Sources, runner: str, options: Sequence[str]
) -> tuple[dict[str, list[Counts]], dict[str, dict[str, float]]]:
  """Make a directory but for its manifest; return what every shard holds, and costs by stage.

  `runner` is one of RUNNERS, `options` are Beam's, as on a command line.

  Raises:
    ValueError: if an option is wrong, or a function failed.
  """
  pipeline = beam.Pipeline(options=parse(runner, options))
  build(pipeline, cfg, paths)
  try:
    result = pipeline.run()
    result.wait_until_finish()
  except Exception as e:  # what a function raised, or an error that quotes a worker's traceback
    raise ValueError(_reason(e)) from e
  totals: collections.Counter[str] = collections.Counter()
  counters = result.metrics().query(MetricsFilter().with_namespace(_NAMESPACE))
  for counter in counters['counters']:
    totals[counter.key.metric.name] += counter.result
  cost = {
    stage: {'seconds': totals[f'{stage} us'] / 1e6, 'flops': totals[f'{stage} kflop'] * 1e3}
    for stage in _STAGES
  }
  with remote.local(f'{cfg.out}/{COUNTS}') as path:
    return files.read_json(Path(path)), cost


def run_tasks(
  function: Callable[[Any], dict[str, Any]],
  tasks: Mapping[Path, Any],
  runner: str,
  options: Sequence[str],
) -> None:
  """Run the tasks of `work.run` that are not complete, where every worker sees their folder.

  A task is a dataclass with a `source`, whose path may be an address, and a `copy`: the path where
  the worker has it.

  Raises:
    ValueError: if an option is wrong, or a function failed.
  """
  todo = [(function, path, task) for path, task in tasks.items() if not work.complete(path)]
  pipeline = beam.Pipeline(options=parse(runner, options))
  _ = pipeline | beam.Create(todo) | beam.Reshuffle() | 'task' >> beam.Map(_run_task)
  try:
    pipeline.run().wait_until_finish()
  except Exception as e:
    raise ValueError(_reason(e)) from e


def _run_task(element: tuple[Callable[[Any], dict[str, Any]], Path, Any]) -> None:
  function, path, task = element
  with remote.local(task.source.path) as copy:
    work.timed((function, path, dataclasses.replace(task, copy=copy)))


def parse(runner: str, options: Sequence[str]) -> PipelineOptions:
  """Parse Beam's options; job servers of Flink and Spark know more of them than Beam does here.

  Raises:
    ValueError: if one is unknown, or has a wrong value.
  """
  logging.getLogger('apache_beam.options').setLevel(logging.ERROR)  # unknown ones are refused here
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):  # argparse prints a usage of 200 lines
      made = PipelineOptions([f'--runner={RUNNERS[runner]}', *options])
      known = PipelineOptions([]).get_all_options()
      given = made.get_all_options(retain_unknown_options=True)
  except SystemExit:
    raise ValueError(f'options after --: {said.getvalue().strip().splitlines()[-1]}') from None
  if given['runner'] != RUNNERS[runner]:
    raise ValueError(
      f'--runner={given["runner"]}: stands before --, as one of {", ".join(RUNNERS)}'
    )
  if (unknown := sorted(given.keys() - known.keys())) and runner in ('direct', 'dataflow'):
    raise ValueError(f'--{unknown[0]}: Apache Beam has no such option')
  return made


def _reason(error: BaseException) -> str:
  """Return the line of an error that says why, without the traceback of a worker."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  raised = [line for line in lines if re.match(r'[\w.]+(Error|Exception): ', line)]
  reason = (raised or lines or [f"Beam's runner failed: {type(error).__name__}"])[-1]
  return re.sub(r"^[\w.]+(Error|Exception): |( \[while running '.*'\])+$", '', reason)


def build(pipeline: beam.Pipeline, cfg: PrepareConfig, paths: documents.Sources) -> None:
  """Add to a pipeline all that writes the tokenizer, the clusters and the rows into cfg.out."""
  tasks = [
    ((number, i), task)
    for number, name in enumerate(cfg.sets)
    for i, task in enumerate(documents.tasks(cfg, name, paths[name], Path()))
  ]
  read = pipeline | beam.Create(tasks) | beam.Reshuffle() | 'read' >> beam.FlatMap(_read)
  layout = _gather('layout', read | 'sizes' >> beam.Map(_size, cfg), _layout)
  dropped = (
    read
    | 'hashes' >> beam.FlatMap(_ranges, layout, len(tasks))
    | 'same range' >> beam.GroupByKey()
    | 'copies' >> beam.FlatMap(_copies, layout)
  )
  kept = _without('exact', read, dropped)
  if cfg.near_duplicates:
    kept = _without('near', kept, _near_duplicates(kept, layout, cfg.near_duplicates))
  generic = list(cfg.sets).index('generic')
  tok = _tokenizer(pipeline, kept | 'generic' >> beam.Filter(_is_of, generic), cfg)
  windows = kept | 'encode' >> beam.Map(_encode, cfg, layout, tok)
  tally = _gather('counts', windows | 'count' >> beam.Map(_counts), _tally, cfg)
  fitted = windows | 'generic windows' >> beam.Filter(_is_of, generic)
  texts = fitted | 'sample windows' >> beam.FlatMap(_sample_windows, cfg, tally, tok)
  model = _gather('fit', texts, _fit, cfg)
  _ = (
    windows
    | 'assign' >> beam.Map(_assign, cfg, layout, tok, model)
    | 'blocks' >> beam.GroupByKey()
    | 'pack' >> beam.Map(_pack, cfg, tally)
  )


def _gather(label: str, parts: beam.PCollection, function: Any, *arguments: Any) -> AsSingleton:
  """Return what a function makes of the list of all elements, as a side input."""
  listed = parts | f'{label}: list' >> beam.combiners.ToList()
  return AsSingleton(listed | label >> beam.Map(function, *arguments))


def _is_of(element: tuple[Key, Any], number: int) -> bool:
  return element[0][0] == number


def _read(element: tuple[tuple[int, int], documents.Read]) -> Iterator[tuple[Key, Shard]]:
  (number, i), task = element
  with contextlib.ExitStack() as stack:
    paths = tuple(stack.enter_context(remote.local(path)) for path in task.paths)
    for j, shard in enumerate(documents.shards(dataclasses.replace(task, paths=paths))):
      with _timed('documents'):
        texts, table = zip(*shard, strict=True)
      yield (number, i, j), Shard(list(texts), documents.hash_table(table))


def _size(element: tuple[Key, Shard], cfg: PrepareConfig) -> tuple[Key, np.ndarray]:
  key, shard = element
  splits, _ = documents.unpack(shard.hashes)
  return key, np.bincount(splits, minlength=_num_splits(cfg, key))


def _num_splits(cfg: PrepareConfig, key: Key) -> int:
  return len(cfg.splits(list(cfg.sets)[key[0]]))


def _layout(totals: Iterable[tuple[Key, np.ndarray]]) -> Layout:
  return Layout(dict(totals))


def _ranges(
  element: tuple[Key, Shard], layout: Layout, count: int
) -> Iterator[tuple[int, tuple[int, int, np.ndarray]]]:
  """Yield the ranges of a shard's hashes with (set, documents before the shard, rows of hashes)."""
  key, shard = element
  ranges = (shard.hashes[:, 0] >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)
  for i in np.unique(ranges).tolist():
    yield i, (key[0], layout.start(key), shard.hashes[ranges == i])


def _copies(
  element: tuple[int, Iterable[tuple[int, int, np.ndarray]]], layout: Layout
) -> Iterator[tuple[Key, np.ndarray]]:
  """Yield the positions of exact copies to drop, by shard."""
  parts = list(element[1])
  for number in {number for number, _, _ in parts}:
    own = [(part, start) for of, start, part in parts if of == number]
    others = [part for of, _, part in parts if of != number]
    dropped = documents.copies(*zip(*own, strict=True), others)
    yield from layout.within(number, dropped)


def _without(label: str, shards: beam.PCollection, dropped: beam.PCollection) -> beam.PCollection:
  """Drop documents, positions by shard, from shards."""
  both = {'shards': shards, 'dropped': dropped} | f'{label}: join' >> beam.CoGroupByKey()
  return both | f'{label}: drop' >> beam.Map(_drop)


def _drop(element: tuple[Key, Mapping[str, Iterable[Any]]]) -> tuple[Key, Shard]:
  key, groups = element
  (shard,) = groups['shards']
  _, positions = documents.unpack(shard.hashes)
  keep = ~np.isin(positions, np.concatenate([np.zeros(0, int), *groups['dropped']]))
  return key, Shard([shard.texts[i] for i in np.flatnonzero(keep)], shard.hashes[keep])


def _near_duplicates(
  kept: beam.PCollection, layout: AsSingleton, threshold: float
) -> beam.PCollection:
  """Return the positions of near-duplicates to drop, by shard.

  Documents that share bands, directly or through others, meet in one place, in the order in which
  `near.repeats` takes them locally: it finds the same.
  """
  signed = kept | 'sign' >> beam.FlatMap(_sign, layout)
  groups = (
    signed
    | 'bands' >> beam.FlatMap(_bands, threshold)
    | 'same band' >> beam.GroupByKey()
    | 'links' >> beam.FlatMap(_links)
    | 'links: list' >> beam.combiners.ToList()
    | 'groups' >> beam.FlatMap(_groups)
  )
  return (
    {'signed': signed, 'group': groups}
    | 'groups: join' >> beam.CoGroupByKey()
    | 'grouped' >> beam.FlatMap(_grouped)
    | 'same group' >> beam.GroupByKey()
    | 'near copies' >> beam.FlatMap(_repeats, layout, threshold)
  )


def _sign(
  element: tuple[Key, Shard], layout: Layout
) -> Iterator[tuple[Document, tuple[bool, np.ndarray]]]:
  """Yield each document's number with whether it is held out, and its signature."""
  key, shard = element
  splits, positions = documents.unpack(shard.hashes)
  numbers = positions + layout.start(key)
  for text, split, i in zip(shard.texts, splits.tolist(), numbers.tolist(), strict=True):
    yield (key[0], i), (split > 0, near.signature(text.decode()))


def _bands(
  element: tuple[Document, tuple[bool, np.ndarray]], threshold: float
) -> Iterator[tuple[bytes, Document]]:
  document, (_, signature) = element
  for band in near.bands(signature, threshold):
    yield band, document


def _links(element: tuple[bytes, Iterable[Document]]) -> Iterator[tuple[Document, Document]]:
  """Link the documents of a band to one of them."""
  first, *others = element[1]
  for other in others:
    yield first, other


def _groups(links: Sequence[tuple[Document, Document]]) -> Iterator[tuple[Document, int]]:
  """Yield the linked documents with the number of their connected component."""
  linked = sorted({document for link in links for document in link})
  number = {document: i for i, document in enumerate(linked)}
  ends = np.array([(number[a], number[b]) for a, b in links], int).reshape(-1, 2).T
  graph = scipy.sparse.coo_matrix((np.ones(len(links)), ends), (len(linked), len(linked)))
  _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
  yield from zip(linked, labels.tolist(), strict=True)


def _grouped(
  element: tuple[Document, Mapping[str, Iterable[Any]]],
) -> Iterator[tuple[int, tuple[Document, bool, np.ndarray]]]:
  document, groups = element
  (signed,) = groups['signed']
  for group in groups['group']:
    yield group, (document, *signed)


def _repeats(
  element: tuple[int, Iterable[tuple[Document, bool, np.ndarray]]],
  layout: Layout,
  threshold: float,
) -> Iterator[tuple[Key, np.ndarray]]:
  """Yield the positions of near-duplicates among the documents of a group, by shard."""
  heldout, training = [], {}
  for (number, i), out, signature in sorted(element[1], key=lambda x: x[0]):
    if out:
      heldout.append(signature)
    else:
      training.setdefault(number, []).append((i, signature))
  for number, i in near.repeats(heldout, training, threshold):
    yield from layout.within(number, np.array([i]))


def _tokenizer(
  pipeline: beam.Pipeline, generic: beam.PCollection, cfg: PrepareConfig
) -> AsSingleton:
  """Make the tokenizer, here if it needs no text; return its fingerprint as a side input."""
  if cfg.tokenizer.path or cfg.tokenizer.name == 'bytes':
    return AsSingleton(pipeline | 'tokenizer' >> beam.Create([_build_tokenizer([], cfg)]))
  sizes = generic | 'training sizes' >> beam.Map(_training_size)
  chosen = _gather('choose', sizes, _choose, cfg.seed)
  return _gather(
    'tokenizer', generic | 'sample' >> beam.FlatMap(_sample, chosen), _build_tokenizer, cfg
  )


def _training_size(element: tuple[Key, Shard]) -> tuple[Key, int]:
  return element[0], len(element[1].training)


def _choose(sizes: Iterable[tuple[Key, int]], seed: int) -> dict[Key, tuple[int, np.ndarray]]:
  """Choose the shards to sample from: the rank of each and an order of its documents."""
  keys, counts = zip(*sorted(sizes), strict=True)
  chosen = documents.choose_documents(counts, seed)
  return {keys[i]: (rank, order) for rank, (i, order) in enumerate(chosen.items())}


def _sample(
  element: tuple[Key, Shard], chosen: dict[Key, tuple[int, np.ndarray]]
) -> Iterator[tuple[int, list[str]]]:
  key, shard = element
  if key in chosen:
    rank, order = chosen[key]
    yield rank, list(documents.take(shard.training, order, documents.SAMPLE, len(chosen)))


def _build_tokenizer(sample: Iterable[tuple[int, list[str]]], cfg: PrepareConfig) -> str:
  texts = (text for _, part in sorted(sample) for text in part)

  def write(folder: Path) -> dict[str, Any]:
    tok = tokenizer.build(
      cfg.tokenizer.name, cfg.tokenizer.vocab, cfg.tokenizer.path, texts, folder
    )
    return {'files': sorted(p.name for p in folder.iterdir()), 'fingerprint': tok.fingerprint}

  return _stage('tokenizer', f'{cfg.out}/tokenizer', write)['fingerprint']


@functools.lru_cache(1)
def _load_tokenizer(folder: str, fingerprint: str) -> tokenizer.Tokenizer:
  del fingerprint  # another tokenizer may have been there before
  with remote.local_folder(folder) as path:
    return tokenizer.load(path)


def _encode(
  element: tuple[Key, Shard], cfg: PrepareConfig, layout: Layout, tok: str
) -> tuple[Key, tuple[documents.Windows, Counts]]:
  key, shard = element
  with _timed('windows'):
    splits, _ = documents.unpack(shard.hashes)
    kept = zip((text.decode() for text in shard.texts), splits.tolist(), strict=True)
    tok = _load_tokenizer(f'{cfg.out}/tokenizer', tok)
    made, counts = documents.encode(kept, tok, cfg.context, _num_splits(cfg, key))
  duplicates = (layout.totals[key] - counts['documents']).tolist()
  return key, (made, counts | {'duplicates': duplicates})


def _counts(element: tuple[Key, tuple[documents.Windows, Counts]]) -> tuple[Key, Counts]:
  return element[0], element[1][1]


class Tally(NamedTuple):
  """What all shards hold, and the windows of generic shards that clusters are fitted on."""

  counts: dict[Key, Counts]
  chosen: dict[Key, np.ndarray]  # numbers of training windows, ascending


def _tally(counts: Iterable[tuple[Key, Counts]], cfg: PrepareConfig) -> Tally:
  """Write the counts of all shards, by set and in order; choose the windows to fit."""
  counts = dict(counts)
  keys = _by_set(counts)
  sets = {
    name: [counts[key] for key in keys.get(number, [])] for number, name in enumerate(cfg.sets)
  }
  target = Path(COUNTS)
  with tempfile.TemporaryDirectory() as folder:
    files.write_json(Path(folder) / target.name, sets)
    remote.publish(Path(folder), f'{cfg.out}/{target.parent}')
  sizes = [shard['windows'][0] for shard in sets['generic']]
  chosen = documents.choose_windows(sizes, cfg.fit_windows, cfg.seed)
  generic = keys.get(list(cfg.sets).index('generic'), [])
  return Tally(counts, dict(zip(generic, chosen, strict=True)))


def _sample_windows(
  element: tuple[Key, tuple[documents.Windows, Counts]],
  cfg: PrepareConfig,
  tally: Tally,
  tok: str,
) -> Iterator[tuple[Key, list[str]]]:
  """Yield the text of the windows of a generic shard that clusters are fitted on."""
  key, (made, _) = element
  if len(tally.chosen[key]):
    tok = _load_tokenizer(f'{cfg.out}/tokenizer', tok)
    yield key, documents.decode_training(made, tally.chosen[key], tok)


def _fit(sample: Iterable[tuple[Key, list[str]]], cfg: PrepareConfig) -> str:
  texts = [text for _, part in sorted(sample) for text in part]

  def write(folder: Path) -> dict[str, Any]:
    model, flops = cluster.fit(texts, cfg.levels, cfg.dims, cfg.seed, cfg.sbert)
    cluster.save(model, folder / cluster.FILE)
    return {'files': [cluster.FILE], 'flops': flops}

  return _stage('clusters', f'{cfg.out}/clusters', write)['files'][cluster.FILE][1]


@functools.lru_cache(1)
def _load_model(path: str, sha256: str) -> cluster.Model:
  del sha256  # another model may have been there before
  with remote.local(path) as copy:
    return cluster.load(Path(copy))


def _assign(
  element: tuple[Key, tuple[documents.Windows, Counts]],
  cfg: PrepareConfig,
  layout: Layout,
  tok: str,
  model: str,
) -> tuple[tuple[int, int], tuple[int, documents.Windows, np.ndarray]]:
  """Return the block of a shard, and its place in the set with its windows and their clusters."""
  key, (made, _) = element
  with _timed('clusters'):
    tok = _load_tokenizer(f'{cfg.out}/tokenizer', tok)
    model = _load_model(f'{cfg.out}/clusters/{cluster.FILE}', model)
    clusters, flops = cluster.assign_windows(model, made, tok)
  _add('clusters', flops=flops)
  place = layout.places[key]
  return (key[0], place // rows.BLOCK), (place, made, clusters)


def _pack(
  element: tuple[tuple[int, int], Iterable[tuple[int, documents.Windows, np.ndarray]]],
  cfg: PrepareConfig,
  tally: Tally,
) -> None:
  """Write the row shards of a block, one for each split."""
  (number, block), parts = element
  parts = sorted(parts, key=lambda part: part[0])
  name, keys = list(cfg.sets)[number], _by_set(tally.counts)[number]
  shard = rows.names(len(keys))[block]
  for split, split_name in cfg.made(name):
    starts = np.cumsum([0, *(tally.counts[key]['documents'][split] for key in keys)]).tolist()

    def write(folder: Path, split: int = split, starts: Sequence[int] = starts) -> dict[str, Any]:
      windows = (
        window
        for place, made, clusters in parts
        for window in rows.of_split(made, clusters, split, starts[place])
      )
      return rows.write_shard(folder, shard, windows, cfg.context)

    _stage('rows', f'{cfg.out}/{name}/{split_name}', write, f'{shard}.json')


def _stage(
  stage: str, target: str, write: Callable[[Path], dict[str, Any]], record: str = 'stage.json'
) -> dict[str, Any]:
  """Publish what a function writes into a folder, and its summary; return that."""
  with tempfile.TemporaryDirectory() as folder:
    path = work.timed((write, Path(folder) / record, Path(folder)))
    summary = files.read_json(path)
    remote.publish(Path(folder), target, last=record)
  _add(stage, summary['seconds'], summary.get('flops', 0.0))
  return summary


def _add(stage: str, seconds: float = 0.0, flops: float = 0.0) -> None:
  """Count what a stage took, in counters that Beam adds up over workers."""
  Metrics.counter(_NAMESPACE, f'{stage} us').inc(round(seconds * 1e6))
  Metrics.counter(_NAMESPACE, f'{stage} kflop').inc(round(flops / 1e3))


@contextlib.contextmanager
def _timed(stage: str) -> Iterator[None]:
  start = time.monotonic()
  yield
  _add(stage, time.monotonic() - start)
