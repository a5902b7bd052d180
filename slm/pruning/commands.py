"""Calibrating, comparing and cutting as steps from directory to directory."""

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

from slm.base import artifact, console, files
from slm.data import loader, tokenizer, vocabulary
from slm.inference import tasks
from slm.interchange import convert, tokenizer_files
from slm.models.config import DecoderConfig
from slm.pruning import importance, measure, slicing
from slm.pruning.measure import Stats
from slm.runs import config, load
from slm.runs.config import NextTokenConfig, RunConfig
from slm.runs.ledger import phase_entry
from slm.weights import sharding, tree
from slm.weights.axes import Params
from slm.weights.count import forward_flops, num_params
from slm.weights.tree import flatten, unflatten

_SAVE_EVERY = 60.0  # seconds
BY = ('activations', 'taylor', 'weights', 'random')
DEPTH = ('influence', 'perplexity', 'window')
About = dict[str, Any]


def calibrate(run: str, path: str, out: str, on: str, rows: int, batch_size: int) -> Stats:
  """Sum a run's activations over the rows SET/SPLIT[@INDEX]; started again it continues.

  Raises:
    ValueError: if the run is unfinished or holds several models, its tokenizer is another, or the
      directory holds the sums of something else.
  """
  if min(rows, batch_size) < 1:
    raise ValueError(f'--rows={rows}, --batch_size={batch_size}: expected at least 1')
  mesh = load.mesh_for(run)
  loaded = load.load(run, mesh, finished=True)
  if loaded.reparam.clusters:
    raise ValueError(f'{run} holds several models: take one out with slm.specialise first')
  path = str(Path(path or loaded.cfg.data.path).resolve())
  load.same_tokenizer(loaded, loader.manifest(path)['tokenizer']['fingerprint'])
  data_set, split, index = loader.parse_on(path, on)
  asked = {
    'run': str(Path(run).resolve()), 'step': loaded.step, 'data': path, 'set': data_set,
    'split': split, 'index': index, 'rows': rows, 'batch_size': batch_size,
    'rows_sha256': loader.Split(path, data_set, split, index).sha256,
    'weights': tree.weights_hash(loaded.params()),
  }  # fmt: skip
  of = measure.activations(loaded.model, loaded.cfg.dtype)
  return _sum(loaded, Path(out), 'stats', asked, of)[1]


def _sum(
  loaded: load.Loaded, folder: Path, name: str, asked: About, of: measure.Measure,
  passes: float = 1.0,
) -> tuple[About, Stats]:  # fmt: skip
  """Sum a measure over the rows asked for into folder/name.safetensors; continues what is there.

  `passes` is what it takes per token, in forward passes.

  Raises:
    ValueError: if the file holds the sums of something else, or the rows have changed.
  """
  about, stats = _begun(folder, name, asked)
  if about.get('finished'):
    return about, stats
  with artifact.hold(folder):
    about, stats = _begun(folder, name, asked)
    return _add_up(loaded, folder, name, about, stats, of, passes)


def _begun(folder: Path, name: str, asked: About) -> tuple[About, Stats]:
  """Read the sums of the rows asked for so far."""
  about, stats = ({'asked': asked}, {})
  if (folder / f'{name}.safetensors').exists():
    about, stats = read(folder, name)
  artifact.check_same(folder, about['asked'], asked, 'other sums')
  return about, stats


def _add_up(
  loaded: load.Loaded, folder: Path, name: str, about: About, stats: Stats, of: measure.Measure,
  passes: float,
) -> tuple[About, Stats]:  # fmt: skip
  """Go on with a sum from where it was left."""
  a, mesh = about['asked'], sharding.fit_mesh(loaded.model.cfg.embed)
  devices = sharding.batch_devices(mesh)
  size = -(-a['batch_size'] // devices) * devices
  if about.get('rows_a_batch', size) != size:  # begun on more devices, or fewer
    about, stats = {'asked': a}, {}
  if loader.Split(a['data'], a['set'], a['split'], a['index']).sha256 != a['rows_sha256']:
    raise ValueError(f'{a["data"]}: {a["set"]}/{a["split"]} has other rows than {folder} is of')
  began = saved = time.monotonic()
  done, seconds = about.get('batches', 0), about.get('device_seconds', 0.0)
  took = lambda: seconds + (time.monotonic() - began) * jax.device_count()
  where, params, add = sharding.batch_sharding(mesh), loaded.params(), measure.summing(of)
  batches = loader.evaluation_batches(
    a['data'], a['set'], a['split'], size, index=a['index'], max_rows=a['rows']
  )
  with jax.set_mesh(mesh), console.progress(name, a['rows'], 'rows') as progress:
    for i, (_, ids, batch) in enumerate(batches):
      if i < done:
        progress.skip(int((ids >= 0).sum()))
        continue
      stats = measure.merge(stats, add(params, jax.device_put(batch, where)))
      progress.update(int((ids >= 0).sum()))
      if time.monotonic() - saved > _SAVE_EVERY:
        about = {'asked': a, 'batches': i + 1, 'rows_a_batch': size}
        about['device_seconds'] = took()
        _write(folder, name, about, stats)
        saved = time.monotonic()
  context = loader.manifest(a['data'])['context']
  flops = passes * stats['tokens'] * forward_flops(loaded.model.cfg, context)
  about = {'asked': a, 'finished': True, 'device_seconds': took(), 'flops': flops}
  return _write(folder, name, about, stats), stats


def _write(folder: Path, name: str, about: About, stats: Stats) -> About:
  """Write the sums and what they are of, in one file: an interruption leaves the last whole one."""
  arrays = {'/'.join(p): np.ascontiguousarray(x) for p, x in flatten(stats['sums'])}
  about = {**about, 'count': stats['count'], 'tokens': stats['tokens']}
  with files.replacing(folder / f'{name}.safetensors') as temporary:
    safetensors.numpy.save_file(arrays, temporary, {'about': json.dumps(about)})
  return about


def read(folder: Path, name: str = 'stats', finished: bool = False) -> tuple[About, Stats]:
  """Read what a pass wrote: what it is of, and the sums; `finished` refuses half of them.

  Raises:
    ValueError: if the directory holds none, or a damaged or unfinished one.
  """
  file = folder / f'{name}.safetensors'
  if not file.exists():
    raise ValueError(f'{folder}: holds no {file.name}: make it with slm.prune calibrate')
  try:
    with safetensors.safe_open(file, 'np') as f:
      about = json.loads(f.metadata()['about'])
      names = f.keys()
      sums = unflatten({tuple(name.split('/')): f.get_tensor(name) for name in names})
  except (safetensors.SafetensorError, OSError) as e:
    raise ValueError(f'{file}: damaged ({e})') from None
  if finished and not about.get('finished'):
    raise ValueError(f'{file}: is unfinished: the command that began it continues it')
  return about, {'sums': sums, 'count': about['count'], 'tokens': about['tokens']}


def compare(
  stats: Sequence[str], wanted: dict[str, int], *, tokens: str = 'mean', sequences: str = 'l2'
) -> dict[str, tuple[float, float]]:
  """Return, by axis, the share that two calibrations would both keep, and that of chance.

  Raises:
    ValueError: if there are not two, of one run, or a size does not fit.
  """
  if len(stats) != 2:
    raise ValueError(f'--stats: compare takes two, found {len(stats)}')
  if not wanted:
    raise ValueError('sizes: name at least one axis')
  both = [read(Path(s), finished=True) for s in stats]
  first, second = ({k: about['asked'][k] for k in ('run', 'step')} for about, _ in both)
  if first != second:
    raise ValueError(f'--stats: are of {first} and of {second}: not of one model')
  heads = config.of(first['run']).model.num_kv_heads
  if 'kv_heads' in wanted:
    raise ValueError('sizes: kv_heads: not compared; its heads are')
  how = (tokens, sequences)
  scores = [importance.activation_scores(s, *how) | {'vocab': s['sums']['vocab']} for _, s in both]
  a, b = (importance.keep(s, wanted, heads) for s in scores)
  chance = lambda axis: a[axis].shape[-1] / scores[0][axis].shape[-1]
  return {axis: (importance.overlap(a[axis], b[axis]), chance(axis)) for axis in wanted}


@dataclasses.dataclass
class _Calibration:
  """The passes over one calibration's rows that a cut asks for, and what they cost."""

  run: str
  loaded: load.Loaded
  folder: Path
  costs: list[About]

  def sums(self, name: str, asked: About, of: measure.Measure, passes: float = 1.0) -> Stats:
    about, stats = _sum(self.loaded, self.folder, name, self.costs[0]['asked'] | asked, of, passes)
    self.costs.append(about)
    return stats

  def scores(
    self, wanted: dict[str, int], by: str, depth: str, tokens: str, sequences: str, seed: int
  ) -> importance.Scores:
    """Score every axis; 'layers' by how they are chosen, 'vocab' by counts, others by `by`."""
    about, stats = read(self.folder, finished=True)
    weights = tree.weights_hash(self.loaded.params())
    mine = {'run': self.run, 'step': self.loaded.step, 'weights': weights}
    for key, value in mine.items():
      if about['asked'][key] != value:
        raise ValueError(f'{self.folder}: is of {key} {about["asked"][key]}, not of {value}')
    self.costs.append(about)
    cfg, layers = self.loaded.cfg, self.loaded.model.cfg.num_layers
    how = cfg.dtype, cfg.objective.chunk
    found = importance.activation_scores(stats, tokens, sequences)
    if by == 'weights':
      found |= importance.weight_scores(self.loaded.params())
    elif by == 'taylor':
      gradients = self.sums('taylor', {}, measure.gradients(self.loaded.model, *how), 3.0)['sums']
      found |= importance.taylor_scores(self.loaded.params(), gradients)
    elif by == 'random':
      drawn = importance.random_scores(found, seed)
      found |= {axis: score for axis, score in drawn.items() if axis != 'layers'}
    found['vocab'] = stats['sums']['vocab']
    if depth != 'influence' and wanted.get('layers', layers) < layers:
      width = 1 if depth == 'perplexity' else layers - wanted['layers']
      gates = measure.windows(layers, width)
      of = measure.losses(self.loaded.model, *how, gates)
      rise = importance.deletion_scores(self.sums(f'depth-{width}', {}, of, len(gates))['sums'])
      found['layers' if depth == 'perplexity' else 'windows'] = rise
    return found

  def ratios(self, embed: np.ndarray) -> Params:
    """Return E[rms(kept) / rms(all)] of every norm."""
    sha = hashlib.sha256(np.ascontiguousarray(embed, np.int32).tobytes()).hexdigest()
    of = measure.shrinkage(self.loaded.model, self.loaded.cfg.dtype, embed)
    sums = self.sums(f'gain-{sha[:12]}', {'embed': sha}, of)['sums']
    return jax.tree.map(lambda x: x[..., 0] / np.maximum(x[..., 1], 1), sums)


@artifact.writes('workdir')
def cut(
  run: str, stats: Sequence[str], wanted: dict[str, int], workdir: str, *,
  norm_gain: str = 'none', by: str = 'activations', depth: str = 'influence', mix: float = 0.0,
  tokens: str = 'mean', sequences: str = 'l2', align: int = 0, seed: int = 0,
  task: str = '', limit: int = 0,
) -> tuple[DecoderConfig, tuple[int, int]]:  # fmt: skip
  """Write a run cut to sizes by axis; returns its shape and the parameters before and after.

  What is kept scores highest `by` its activations (aggregated over tokens, then sequences), the
  Taylor expansion of the loss, its weights' squares, or at random. Layers are chosen by block
  influence, by the loss without each, or as the contiguous window whose deletion costs least loss,
  or whose deletion leaves most right of the first `limit` items of a `task` file. Scores of two
  calibrations are normalised by axis and layer and mixed, `mix` being the share of the second. The
  vocabulary keeps the ids that are most frequent and those any text needs; its tokenizer is in
  workdir/tokenizer.

  Raises:
    ValueError: if the sums are of another run, a size does not fit or is no multiple.
  """
  _check_mix(stats, mix)
  slicing.check_options(wanted, task, norm_gain)
  loaded = load.load(run, load.mesh_for(run), finished=True)
  old, params = loaded.model.cfg, loaded.params()
  slicing.check_sizes(old, wanted, align)
  run = str(Path(run).resolve())
  passes = [_Calibration(run, loaded, Path(s), []) for s in stats]
  how = {'by': by, 'depth': depth, 'tokens': tokens, 'sequences': sequences, 'seed': seed}
  # A task chooses the window by itself.
  scored = how | ({'depth': 'influence'} if task else {})
  how |= {'norm_gain': norm_gain, 'mix': mix, 'task': task and Path(task).name, 'limit': limit}
  of = [read(Path(s), finished=True)[0]['asked'] for s in stats]
  digest = lambda x: hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()
  how |= {'shape': wanted, 'stats': [digest(asked) for asked in of]}
  counts = lambda new: tuple(sum(num_params(c).values()) for c in (old, new))
  if done := _finished(Path(workdir), run, how):
    return done, counts(done)
  kept, smaller = _choose(passes, wanted, scored, mix, task, limit)
  ratios = None
  if norm_gain == 'calibrated' and 'embed' in kept:
    each = [p.ratios(kept['embed']) for p in passes]
    ratios = jax.tree.map(lambda a, b: (1 - mix) * a + mix * b, each[0], each[-1])
  params, new = slicing.cut(params, old, kept, norm_gain, ratios)
  read_from = {'path': of[0]['data'], 'set': of[0]['set'], 'index': of[0]['index']}
  changes = {
    'model': new,
    'objective': NextTokenConfig(chunk=loaded.cfg.objective.chunk),
    'init': run,
    'data': dataclasses.replace(loaded.cfg.data, **read_from),
    'rows': of[0]['rows_sha256'],
    'prune': {'sha256': _hash(kept), **how},
  }
  if smaller:
    changes['tokenizer'] = tokenizer_files.fingerprint(smaller)
  small = config.derive(loaded.cfg, 'prune', **changes)
  config.check_run(Path(workdir), small)
  costs = [about for p in passes for about in p.costs]
  _write_run(Path(workdir), small, params, kept, smaller, costs)
  return new, counts(new)


def _check_mix(stats: Sequence[str], mix: float) -> None:
  if len(stats) not in (1, 2) or not 0 <= mix <= 1 or (len(stats) == 1 and mix):
    raise ValueError(
      f'--stats, --mix: expected one, or two and 0 to 1, found {len(stats)} and {mix}'
    )


def _choose(
  passes: Sequence[_Calibration], wanted: dict[str, int], scored: dict[str, Any], mix: float,
  task: str, limit: int,
) -> tuple[dict[str, np.ndarray], dict[str, bytes]]:  # fmt: skip
  """Choose what is kept of each axis; with it the files of a smaller tokenizer, if it is one."""
  loaded = passes[0].loaded
  scores = [p.scores(wanted, **scored) for p in passes]
  mixed = importance.mix(*scores, mix) if len(scores) == 2 else scores[0]
  widths = {axis: size for axis, size in wanted.items() if axis != 'vocab'}
  kept = importance.keep(mixed, widths, loaded.model.cfg.num_kv_heads)
  smaller: dict[str, bytes] = {}
  if 'vocab' in wanted:
    line = convert.line(convert.lineage(passes[0].run))
    _, whole = tokenizer_files.of_line(line, passes[0].costs[0]['asked']['data'])
    smaller, kept['vocab'] = vocabulary.reduce(whole, mixed['vocab'], wanted['vocab'])
  if task and 'layers' in wanted:
    ask = _asking(passes[0], loaded.params(), task, limit)
    kept['layers'] = importance.best_window(loaded.model.cfg.num_layers, wanted['layers'], ask)
  return kept, smaller


def _hash(kept: dict[str, np.ndarray]) -> str:
  """Hash what is kept of each axis."""
  digest = hashlib.sha256()
  for axis in sorted(kept):
    digest.update(axis.encode() + np.ascontiguousarray(kept[axis], np.int32).tobytes())
  return digest.hexdigest()


def _finished(folder: Path, run: str, how: dict[str, Any]) -> DecoderConfig | None:
  """Return the shape of the finished cut that a directory holds, None if it is not begun.

  Raises:
    ValueError: if it holds another run.
  """
  if not (folder / 'config.json').exists():
    return None
  there = config.of(folder)
  pruned = {key: value for key, value in (there.prune or {}).items() if key != 'sha256'}
  held, asked = {'init': there.init, 'prune': pruned}, artifact.plain({'init': run, 'prune': how})
  artifact.check_same(folder, held, asked, 'another run')
  return there.model if (folder / 'result.json').exists() else None


def _asking(
  of: _Calibration, params: Params, task: str, limit: int
) -> Callable[[np.ndarray], float]:
  """Return the score at a task of what is left with layers [n]; what asking costs joins the others.

  Scores are kept beside the calibration: a window is asked about once.
  """
  asked, cfg = of.costs[0]['asked'], of.loaded.model.cfg
  mesh = sharding.fit_mesh(cfg.embed)
  tok = tokenizer.load(f'{asked["data"]}/tokenizer')
  context = loader.manifest(asked['data'])['context']
  ask = tasks.asking(task, tok, mesh, context, asked['batch_size'], limit)
  path = of.folder / f'task-{files.sha256(Path(task))[:12]}-{limit}.json'

  def score(layers: np.ndarray) -> float:
    known, window = files.read_json(path) if path.exists() else {}, ' '.join(map(str, layers))
    if window not in known:
      smaller, shape = slicing.cut(params, cfg, {'layers': layers})
      with jax.set_mesh(mesh):
        found = ask(smaller, shape)
      known[window] = {key: found[key] for key in ('score', 'tokens', 'device_seconds')}
      known[window]['flops'] = found['tokens'] * forward_flops(shape, context)
      files.write_json(path, known)
    of.costs.append(known[window])
    return known[window]['score']

  return score


def _write_run(
  folder: Path, cfg: RunConfig, params: Params, kept: dict[str, np.ndarray],
  smaller: dict[str, bytes], costs: list[About],
) -> None:  # fmt: skip
  """Write a cut run, what it keeps, the files of its own tokenizer, and the cost."""
  config.write_run(folder, cfg)  # first: it marks the directory
  arrays = {axis: np.ascontiguousarray(index, np.int32) for axis, index in kept.items()}
  with files.replacing(folder / 'kept.safetensors') as temporary:
    safetensors.numpy.save_file(arrays, temporary)
  if smaller:
    tokenizer_files.write(folder / 'tokenizer', smaller)
  spent = (sum(c[key] for c in costs) for key in ('tokens', 'flops', 'device_seconds'))
  load.write_dense(folder, cfg, params, [cfg.init], [phase_entry('calibrate', *spent)])
