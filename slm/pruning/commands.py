"""Calibrating, comparing and cutting runs: resumable steps from directory to directory."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from slm import models
from slm.base import artifact, console, files, stage
from slm.data import loader, tokenizer, vocabulary
from slm.inference import scoring, tasks
from slm.interchange import convert, tokenizer_files
from slm.models.config import DecoderConfig
from slm.pruning import importance, measure, slicing
from slm.pruning.measure import Measure, Stats
from slm.runs import config, load
from slm.runs.config import NextTokenConfig
from slm.runs.ledger import phase_entry
from slm.weights import sharding, tree
from slm.weights.axes import Params
from slm.weights.count import forward_flops, num_params
from slm.weights.tree import flatten, unflatten

_SAVE_EVERY = 60.0  # seconds
BY = ('activations', 'taylor', 'weights', 'random')
DEPTH = ('influence', 'perplexity', 'window')
Record = dict[str, Any]  # of a pass over rows: what was 'asked', how far it is and what it cost


def calibrate(run: str, path: str, out: str, on: str, rows: int, batch_size: int) -> Stats:
  """Sum a run's activation statistics over the rows SET/SPLIT[@INDEX] of a data directory.

  `path` '' is the data that the run was trained on. A second call continues.

  Raises:
    ValueError: if the run is unfinished or holds several models, its tokenizer is not that of the
      data, or the directory `out` holds other sums.
  """
  if min(rows, batch_size) < 1:
    raise ValueError(f'--rows={rows}, --batch_size={batch_size}: expected at least 1')
  loaded = load.load(run, load.mesh_for(run), finished=True)
  path = str(Path(load.data_path(run, path)).resolve())
  load.same_tokenizer(loaded, loader.manifest(path)['tokenizer']['fingerprint'])
  data_set, split, index = loader.parse_on(path, on)
  request = {
    'run': stage.absolute(run), 'step': loaded.step, 'data': path, 'set': data_set,
    'split': split, 'index': index, 'rows': rows, 'batch_size': batch_size,
    'rows_sha256': loader.Split(path, data_set, split, index).sha256,
    'weights': tree.weights_hash(loaded.params()),
  }  # fmt: skip
  activations = measure.activations(loaded.model, loaded.cfg.dtype)
  return _sum(loaded, Path(out), 'stats', request, activations)[1]


def _sum(
  loaded: load.Loaded, folder: Path, name: str, request: Record, measured: Measure
) -> tuple[Record, Stats]:
  """Sum a measure over the requested rows into folder/name.safetensors, or continue the sum."""
  record, stats = _begun(folder, name, request)
  if not record.get('finished'):
    with artifact.hold(folder):
      record, stats = _begun(folder, name, request)  # another process may have gone on
      if not record.get('finished'):
        return _continue(loaded, folder / f'{name}.safetensors', record, stats, measured)
  return record, stats


def _begun(folder: Path, name: str, request: Record) -> tuple[Record, Stats]:
  """Read what a pass has summed so far."""
  record, stats = {'asked': request}, {}
  if (folder / f'{name}.safetensors').exists():
    record, stats = read(folder, name)
  artifact.check_same(folder, record['asked'], request, 'other sums')
  return record, stats


def _continue(
  loaded: load.Loaded, path: Path, record: Record, stats: Stats, measured: Measure
) -> tuple[Record, Stats]:
  """Continue a pass from its last saved batch; if the batch size has changed, start again."""
  request, mesh = record['asked'], sharding.fit_mesh(loaded.model.cfg.embed)
  data, data_set, split, index = (request[key] for key in ('data', 'set', 'split', 'index'))
  if loader.Split(data, data_set, split, index).sha256 != request['rows_sha256']:
    raise ValueError(f'{data}: the rows of {data_set}/{split} are not those that {path} began with')
  devices = sharding.batch_devices(mesh)
  size = -(-request['batch_size'] // devices) * devices
  if record.get('rows_a_batch', size) != size:  # begun on another number of devices
    record, stats = {}, {}
  done, seconds = record.get('batches', 0), record.get('device_seconds', 0.0)
  began = saved = time.monotonic()

  def save(**progress: Any) -> Record:
    """Write the sums and their record as one file: an interruption leaves the last whole one."""
    spent = seconds + (time.monotonic() - began) * jax.device_count()
    totals = {'count': stats['count'], 'tokens': stats['tokens'], 'device_seconds': spent}
    record = {'asked': request, **totals, **progress}
    arrays = {'/'.join(p): np.ascontiguousarray(x) for p, x in flatten(stats['sums'])}
    with files.replacing(path) as temporary:
      safetensors.numpy.save_file(arrays, temporary, {'about': json.dumps(record)})
    return record

  where, params, add = sharding.batch_sharding(mesh), loaded.params(), measure.summing(measured)
  batches = loader.evaluation_batches(
    data, data_set, split, size, index=index, max_rows=request['rows']
  )
  with jax.set_mesh(mesh), console.Progress(path.stem, request['rows'], 'rows') as progress:
    for number, (_, ids, batch) in enumerate(batches, 1):
      rows = int((ids >= 0).sum())
      if number <= done:
        progress.skip(rows)
        continue
      stats = measure.merge(stats, add(params, jax.device_put(batch, where)))
      progress.update(rows)
      if time.monotonic() - saved > _SAVE_EVERY:
        save(batches=number, rows_a_batch=size)
        saved = time.monotonic()
  context = loader.manifest(data)['context']
  flops = measured.passes * stats['tokens'] * forward_flops(loaded.model.cfg, context)
  return save(finished=True, flops=flops), stats


def read(folder: Path, name: str = 'stats', finished: bool = False) -> tuple[Record, Stats]:
  """Read the record and the sums of a pass; `finished` refuses one that was interrupted.

  Raises:
    ValueError: if the file is missing, damaged or unfinished.
  """
  file = folder / f'{name}.safetensors'
  if not file.exists():
    raise ValueError(f'{folder}: holds no {file.name}: make it with slm.prune calibrate')
  try:
    with safetensors.safe_open(file, 'np') as f:
      record, names = json.loads(f.metadata()['about']), f.keys()
      sums = unflatten({tuple(key.split('/')): f.get_tensor(key) for key in names})
  except (safetensors.SafetensorError, OSError) as e:
    raise ValueError(f'{file}: damaged ({e})') from None
  if finished and not record.get('finished'):
    raise ValueError(f'{file}: is unfinished: the command that began it continues it')
  return record, {'sums': sums, 'count': record['count'], 'tokens': record['tokens']}


def compare(
  stats: Sequence[str], wanted: dict[str, int], *, tokens: str = 'mean', sequences: str = 'l2'
) -> dict[str, tuple[float, float]]:
  """Return by axis the share of units that two calibrations both keep, and that expected by chance.

  Raises:
    ValueError: if there are not two calibrations of one checkpoint, or a size does not fit.
  """
  if len(stats) != 2:
    raise ValueError(f'--stats: compare takes two calibrations, found {len(stats)}')
  if not wanted:
    raise ValueError('sizes: name at least one axis')
  if 'kv_heads' in wanted:
    raise ValueError('sizes: kv_heads are not compared: compare heads')
  records, sums = zip(*(read(Path(folder), finished=True) for folder in stats), strict=True)
  first, second = (f'{r["asked"]["run"]} (step {r["asked"]["step"]})' for r in records)
  if first != second:
    raise ValueError(
      f'--stats: the two calibrations come from different checkpoints: {first} and {second}'
    )
  num_kv_heads = config.of(records[0]['asked']['run']).model.num_kv_heads
  scores = [importance.activation_scores(s, tokens, sequences) for s in sums]
  scores = [score | {'vocab': s['sums']['vocab']} for score, s in zip(scores, sums, strict=True)]
  a, b = (importance.keep(score, wanted, num_kv_heads) for score in scores)
  chance = lambda axis: a[axis].shape[-1] / scores[0][axis].shape[-1]
  return {axis: (importance.overlap(a[axis], b[axis]), chance(axis)) for axis in wanted}


@dataclasses.dataclass
class _Calibration:
  """A finished calibration of the run to cut, and the passes that a cut adds over its rows."""

  run: str
  loaded: load.Loaded
  folder: Path
  stats: Stats
  records: list[Record]  # of the calibration itself, then of every pass and task added

  @property
  def request(self) -> Record:
    return self.records[0]['asked']

  def sums(self, name: str, extra: Record, measured: Measure) -> Params:
    record, stats = _sum(self.loaded, self.folder, name, self.request | extra, measured)
    self.records.append(record)
    return stats['sums']

  def scores(self, wanted: dict[str, int], options: Record, depth: str) -> importance.Scores:
    """Score 'layers' by `depth`, 'vocab' by frequency and all other axes by options['by']."""
    loaded, params = self.loaded, self.loaded.params()
    now = {'run': self.run, 'step': loaded.step, 'weights': tree.weights_hash(params)}
    for key, value in now.items():
      if self.request[key] != value:
        raise ValueError(
          f'{self.folder}: expected a calibration of {key} {value}, found {self.request[key]}'
        )
    num_layers = loaded.model.cfg.num_layers
    compute = (loaded.model, loaded.cfg.dtype, loaded.cfg.objective.chunk)
    scores = importance.activation_scores(self.stats, options['tokens'], options['sequences'])
    if options['by'] == 'weights':
      scores |= importance.weight_scores(params)
    elif options['by'] == 'taylor':
      gradients = self.sums('taylor', {}, measure.gradients(*compute))
      scores |= importance.taylor_scores(params, gradients)
    elif options['by'] == 'random':
      drawn = importance.random_scores(scores, options['seed'])
      scores = drawn | {'layers': scores['layers']}
    scores['vocab'] = self.stats['sums']['vocab']
    if depth != 'influence' and wanted.get('layers', num_layers) < num_layers:
      width = 1 if depth == 'perplexity' else num_layers - wanted['layers']
      gates = measure.windows(num_layers, width)
      losses = self.sums(f'depth-{width}', {}, measure.losses(*compute, gates))
      axis = 'layers' if depth == 'perplexity' else 'windows'
      scores[axis] = importance.deletion_scores(losses)
    return scores

  def norm_ratios(self, embed: np.ndarray) -> Params:
    """Return E[rms(kept) / rms(all)] at every norm if the channels `embed` are kept."""
    sha = hashlib.sha256(np.ascontiguousarray(embed, np.int32).tobytes()).hexdigest()
    shrinkage = measure.shrinkage(self.loaded.model, self.loaded.cfg.dtype, embed)
    sums = self.sums(f'gain-{sha[:12]}', {'embed': sha}, shrinkage)
    return jax.tree.map(lambda x: x[..., 0] / np.maximum(x[..., 1], 1), sums)

  def task_score(self, task: str, limit: int) -> Callable[[np.ndarray], float]:
    """Return f(layers [n]) -> the score at a task of the model cut to these layers.

    Scores are kept beside the calibration, so that none is computed twice.
    """
    data, cfg = self.request['data'], self.loaded.model.cfg
    mesh, tok = sharding.fit_mesh(cfg.embed), tokenizer.load(f'{data}/tokenizer')
    context, items = loader.manifest(data)['context'], tasks.read(task)[: limit or None]
    settings = {'context': context, 'batch_size': self.request['batch_size'], 'begin': tok.begin}
    path = self.folder / f'task-{files.sha256(Path(task))[:12]}-{limit}.json'

    known = lambda: files.read_json(path) if path.exists() else {}

    def score(layers: np.ndarray) -> float:
      window = ' '.join(map(str, layers))
      if window not in known():
        params, shape = slicing.cut(self.loaded.params(), cfg, {'layers': layers})
        with artifact.hold(self.folder, path.stem), jax.set_mesh(mesh):
          scorer = scoring.make(models.build(shape), params, tok, mesh, **settings)
          summary = tasks.evaluate(scorer, items)
          result = {key: summary[key] for key in ('score', 'tokens', 'device_seconds')}
          result['flops'] = summary['tokens'] * forward_flops(shape, context)
          files.write_json(path, known() | {window: result})
      self.records.append(known()[window])
      return self.records[-1]['score']

    return score


@artifact.writes('workdir', addresses=True)
def cut(
  run: str, stats: Sequence[str], wanted: dict[str, int], workdir: str, *,
  norm_gain: str = 'none', by: str = 'activations', depth: str = 'influence', mix: float = 0.0,
  tokens: str = 'mean', sequences: str = 'l2', align: int = 0, seed: int = 0,
  task: str = '', limit: int = 0,
) -> tuple[DecoderConfig, tuple[int, int]]:  # fmt: skip
  """Write a run cut to sizes by axis; returns its shape and the parameters before and after.

  Units are scored `by` activations (aggregated over `tokens`, then `sequences`), the first-order
  Taylor expansion of the loss, squared weights, or at random. Layers are chosen by `depth`: block
  influence, the loss without each, or the contiguous window whose deletion raises the loss least;
  or, with a `task`, the window whose deletion leaves the best score on its first `limit` items.
  Scores of two calibrations are normalised and mixed, `mix` being the share of the second. A
  smaller vocabulary keeps the most frequent ids and those any text needs; its tokenizer is in
  workdir/tokenizer.

  Raises:
    ValueError: if a calibration is of another run, a size does not fit the model or `align`, or the
      directory holds another run.
  """
  if len(stats) not in (1, 2) or not 0 <= mix <= 1 or (len(stats) == 1 and mix):
    raise ValueError(
      '--stats, --mix: expected one calibration, or two and a share from 0 to 1; '
      f'found {len(stats)} and {mix}'
    )
  slicing.check_options(wanted, task, norm_gain)
  loaded, folder = load.load(run, load.mesh_for(run), finished=True), Path(workdir)
  whole, run = loaded.model.cfg, stage.absolute(run)
  slicing.check_sizes(whole, wanted, align)
  opened = ((Path(path), *read(Path(path), finished=True)) for path in stats)
  calibrations = [_Calibration(run, loaded, path, sums, [record]) for path, record, sums in opened]
  digest = lambda x: hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()
  options = {
    'by': by, 'depth': depth, 'tokens': tokens, 'sequences': sequences, 'seed': seed,
    'norm_gain': norm_gain, 'mix': mix, 'task': task and Path(task).name, 'limit': limit,
    'shape': wanted, 'stats': [digest(c.request) for c in calibrations],
  }  # fmt: skip
  if task:
    options['task_sha256'] = files.sha256(Path(task))
  new = _finished(folder, run, options)
  if not new:
    kept, tokenizer_parts = _choose(calibrations, wanted, options, task)
    ratios = None
    if norm_gain == 'calibrated':
      each = [c.norm_ratios(kept['embed']) for c in calibrations]
      ratios = jax.tree.map(lambda a, b: (1 - mix) * a + mix * b, each[0], each[-1])
    params, new = slicing.cut(loaded.params(), whole, kept, norm_gain, ratios)
    _write_run(folder, calibrations, params, new, kept, tokenizer_parts, options)
  before, after = (sum(num_params(cfg).values()) for cfg in (whole, new))
  return new, (before, after)


def _finished(folder: Path, run: str, options: Record) -> DecoderConfig | None:
  """Return the shape of the finished cut that a directory holds, None if there is none."""
  finished = (folder / 'result.json').exists()

  def recorded(file: Path) -> Record:
    cfg = config.of(file.parent)
    pruned = {key: value for key, value in (cfg.prune or {}).items() if key != 'sha256'}
    if finished and pruned.get('task') and 'task_sha256' not in pruned:  # by an earlier version
      pruned['task_sha256'] = options.get('task_sha256')
    return {'init': cfg.init, 'prune': pruned}

  request = {'init': run, 'prune': options}
  artifact.check(folder / 'config.json', request, 'another run', recorded)
  return config.of(folder).model if finished else None


def _choose(
  calibrations: Sequence[_Calibration], wanted: dict[str, int], options: Record, task: str
) -> tuple[dict[str, np.ndarray], tokenizer_files.Files]:
  """Choose what is kept of each axis, and make the tokenizer of a smaller vocabulary."""
  first = calibrations[0]
  cfg = first.loaded.model.cfg
  depth = 'influence' if task else options['depth']  # a task chooses the layers by itself
  scores = [c.scores(wanted, options, depth) for c in calibrations]
  mixed = importance.mix(*scores, options['mix']) if len(scores) == 2 else scores[0]
  widths = {axis: size for axis, size in wanted.items() if axis != 'vocab'}
  kept = importance.keep(mixed, widths, cfg.num_kv_heads)
  tokenizer_parts: tokenizer_files.Files = {}
  if 'vocab' in wanted:
    ancestors = convert.ancestry(convert.lineage(first.run))
    _, whole = tokenizer_files.newest(ancestors, first.request['data'])
    tokenizer_parts, kept['vocab'] = vocabulary.reduce(whole, mixed['vocab'], wanted['vocab'])
  if task:
    score = first.task_score(task, options['limit'])
    kept['layers'] = importance.best_window(cfg.num_layers, wanted['layers'], score)
  return kept, tokenizer_parts


def _write_run(
  folder: Path,
  calibrations: Sequence[_Calibration],
  params: Params,
  shape: DecoderConfig,
  kept: dict[str, np.ndarray],
  tokenizer_parts: tokenizer_files.Files,
  options: Record,
) -> None:
  """Write a cut run, the indices it keeps, its own tokenizer if it has one, and the cost."""
  first, parent = calibrations[0], calibrations[0].loaded.cfg
  rows = {'path': first.request['data'], 'set': first.request['set']}
  arrays = {axis: np.ascontiguousarray(index, np.int32) for axis, index in kept.items()}
  digest = hashlib.sha256()
  for axis in sorted(arrays):
    digest.update(axis.encode() + arrays[axis].tobytes())
  changes = {
    'model': shape,
    'objective': NextTokenConfig(chunk=parent.objective.chunk),
    'init': first.run,
    'data': dataclasses.replace(parent.data, index=first.request['index'], **rows),
    'rows': first.request['rows_sha256'],
    'prune': {'sha256': digest.hexdigest(), **options},
  }
  if tokenizer_parts:
    changes['tokenizer'] = tokenizer_files.fingerprint(tokenizer_parts)
  cfg = config.derive(parent, 'prune', **changes)
  config.check_run(folder, cfg)
  config.write_run(folder, cfg)  # first: it marks the directory
  with files.replacing(folder / 'kept.safetensors') as temporary:
    safetensors.numpy.save_file(arrays, temporary)
  if tokenizer_parts:
    tokenizer_files.write(folder / 'tokenizer', tokenizer_parts)
  records = [record for c in calibrations for record in c.records]
  spent = (sum(r[key] for r in records) for key in ('tokens', 'flops', 'device_seconds'))
  load.write_dense(folder, cfg, params, [cfg.init], [phase_entry('calibrate', *spent)])
