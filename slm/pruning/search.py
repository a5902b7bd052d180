"""Search for the shape to cut to: successive halving over the shapes within bounds.

The largest shapes within the bounds are scored by their held-out loss as they are cut. The best of
them are trained a little, the better half for twice as long, and so on until one is left:
candidates are ranked after a short retraining, not before (Minitron, arXiv 2407.14679 §4.1, rule
9). WORKDIR/search.json records the search; WORKDIR/<shape> is the cut to start the recovery from.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from slm import models
from slm.base import artifact, files, stage
from slm.inference import latency
from slm.models.config import DecoderConfig
from slm.objectives import heldout
from slm.pruning import commands, importance, slicing
from slm.reporting import tables
from slm.runs import config, ledger, load
from slm.runs.config import RunConfig
from slm.training import loop, optim
from slm.weights import sharding
from slm.weights.count import active_params, forward_flops, num_params

Sizes = dict[str, int]  # by axis
Shape = tuple[Sizes, DecoderConfig]
Grid = Mapping[str, tuple[int, ...]]  # sizes to try, by axis
Record = dict[str, Any]  # of a search, as in search.json
Save = Callable[[], None]  # writes the record
_NEW_TOKENS = 32  # decoded to measure a step
_TOGETHER = 4  # shapes that are measured at once, all of their weights in memory
# The smallest size in the default grid, as a share of the whole.
_SHARES = {'embed': 0.6, 'mlp': 0.6, 'layers': 0.8}


@dataclasses.dataclass(frozen=True)
class Bounds:
  """Upper bounds on a shape; 0 is no bound."""

  params: float = 0.0
  active: float = 0.0  # parameters used by each token
  memory: float = 0.0  # bytes of the weights and of the cache of batch x context tokens
  token_ms: float = 0.0  # milliseconds of a decoding step, measured here
  batch: int = 1
  context: int = 1024
  dtype: str = 'float32'

  def allow(self, cfg: DecoderConfig) -> bool:
    """Return whether a shape is within the bounds that need no measurement."""
    params, active = (sum(count(cfg).values()) for count in (num_params, active_params))
    cache = latency.predicted(cfg, self.context * self.batch, self.dtype)['cache_bytes']
    memory = params * jnp.dtype(self.dtype).itemsize + cache
    limits = ((params, self.params), (active, self.active), (memory, self.memory))
    return all(value <= limit for value, limit in limits if limit)


def default_grid(cfg: DecoderConfig, multiple: int) -> dict[str, tuple[int, ...]]:
  """Return the default grid: widths that are multiples of `multiple`, and every depth."""
  grid = {}
  for axis, share in _SHARES.items():
    whole, step = getattr(cfg, slicing.SIZES[axis]), 1 if axis == 'layers' else multiple
    first = math.ceil(share * whole / step) * step
    grid[axis] = tuple(sorted({*range(first, whole + 1, step), whole}, reverse=True))
  return grid


def read_grid(text: str, cfg: DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Read axis=size:size:...,axis=...

  Raises:
    ValueError: if a part is not of that form or a size is larger than the model's.
  """
  axes = [a for a in slicing.SIZES if a != 'vocab']  # candidates are scored on the same tokens
  grid = {}
  for part in filter(None, text.split(',')):
    axis, _, values = part.partition('=')
    if axis not in axes or not values.replace(':', '').isdigit():
      raise ValueError(f'--grid: expected axis=size:size of {", ".join(axes)}, found {part!r}')
    grid[axis] = tuple(sorted({int(v) for v in values.split(':') if v}, reverse=True))
    if grid[axis][0] > (whole := getattr(cfg, slicing.SIZES[axis])):
      raise ValueError(f'--grid: {axis}={grid[axis][0]}: expected at most {whole}')
  return grid


def shapes(cfg: DecoderConfig, grid: Grid, bounds: Bounds) -> list[Shape]:
  """List the shapes of a grid within the bounds, largest first, without the whole model.

  Raises:
    ValueError: if there is none.
  """
  listed = []
  for values in itertools.product(*grid.values()):
    sizes = {a: n for a, n in zip(grid, values, strict=True) if n < getattr(cfg, slicing.SIZES[a])}
    new = slicing.shape(cfg, {axis: np.arange(n) for axis, n in sizes.items()})
    if sizes and bounds.allow(new):
      listed.append((sizes, new))
  if not listed:
    raise ValueError(
      f'no shape of {dict(grid)} is within the bounds: lower --multiple or --grid, or raise a bound'
    )
  return sorted(listed, key=lambda pair: (-sum(num_params(pair[1]).values()), name(pair[0])))


def name(sizes: Sizes) -> str:
  """Return the name of a shape and of its directory."""
  return '-'.join(f'{axis}{n}' for axis, n in sizes.items())


@artifact.writes('workdir')
def search(
  run: str, stats: str, workdir: Path, given: Record, grid: Grid, bounds: Bounds, *,
  count: int = 10, survivors: int = 4, rounds: int = 5,
) -> Record:  # fmt: skip
  """Run or continue a search; returns what search.json records.

  By shape: 'parameters', 'token_ms' (if bounded) and 'zero_shot', the held-out loss as cut. 'rungs'
  are the rounds of training: 'steps', the 'loss' after them, and 'stability', Kendall's tau between
  the ranks before and after the round. 'best' is the shape found and 'sizes' its sizes; 'flops' is
  the cost of the search.

  Raises:
    ValueError: if no shape is within the bounds, or the directory holds another search.
  """
  loaded = load.load(run, load.mesh_for(run), finished=True)
  teacher = stage.absolute(run)
  given = given | {'teacher': teacher if given['objective']['name'] == 'distill' else ''}
  cfg = config.resolve(given | {'init': run})
  if cfg.distributed.enable:
    raise ValueError('distributed.enable: a search runs on one process')
  optim.schedule(cfg.schedule, cfg.steps)  # refuses an impossible schedule before any work
  request = artifact.plain({
    'run': teacher, 'step': loaded.step, 'count': count, 'survivors': survivors,
    'stats_sha256': files.sha256(Path(stats) / 'stats.safetensors'), 'grid': grid,
    'bounds': dataclasses.asdict(bounds),
    'config': {k: v for k, v in given.items() if k not in config.OPERATIONAL},
  })  # fmt: skip
  path = workdir / 'search.json'
  record = {'asked': request, 'token_ms': {}, 'zero_shot': {}, 'rungs': [], 'zero_shot_flops': 0.0}
  record |= files.read_json(path) if path.exists() else {}
  artifact.check_same(workdir, record['asked'], request, 'another search')
  save = lambda: files.write_json(path, record)
  listed = shapes(loaded.model.cfg, grid, bounds)
  chosen = _fast_enough(listed, bounds, count, rounds, record['token_ms'], save)
  record['parameters'] = {name(s): sum(num_params(c).values()) for s, c in chosen}
  _score(loaded, stats, cfg, chosen, record, save)
  del loaded  # training loads what it needs
  ranked = sorted((sizes for sizes, _ in chosen), key=lambda s: record['zero_shot'][name(s)])
  trained = {name(sizes): sizes for sizes in ranked[:survivors]}
  for shape, sizes in trained.items():
    commands.cut(run, [stats], sizes, str(workdir / shape), align=1)
  best = _halve(given, cfg, workdir, list(trained), record, save)
  ledgers = [
    ledger.read_ledger(workdir / f'{shape}-{i}')
    for i, rung in enumerate(record['rungs'], 1)
    for shape in rung['loss']
  ]
  spent = sum(phase['flops'] for costs in ledgers for phase in costs['phases'])
  spent += commands.read(Path(stats), finished=True)[0]['flops'] + record['zero_shot_flops']
  record |= {'best': best, 'sizes': trained[best], 'flops': spent}
  save()
  return record


def _halve(
  given: Record, cfg: RunConfig, workdir: Path, left: list[str], record: Record, save: Save
) -> str:
  """Train the shapes, then the better half for twice as long, until one is left."""
  before, i = record['zero_shot'], 0
  while True:
    steps, losses = cfg.steps * 2**i, {}
    what = f'round {i + 1}: {len(left)} shapes, {steps:,} steps each'
    print(f'search {workdir.name}: {what}', file=sys.stderr, flush=True)
    for shape in left:
      init = workdir / (f'{shape}-{i}' if i else shape)
      changes = {'init': str(init), 'steps': steps, 'seed': cfg.seed + i + 1}
      losses[shape] = loop.train(given | changes, workdir / f'{shape}-{i + 1}')['loss']
    ranks = [[values[shape] for shape in left] for values in (before, losses)]
    tau = float(scipy.stats.kendalltau(*ranks)[0]) if len(left) > 1 else None
    record['rungs'][i:] = [{'steps': steps, 'loss': losses, 'stability': tau}]
    save()
    before, left, i = losses, sorted(left, key=losses.get)[: -(-len(left) // 2)], i + 1
    if len(losses) <= 2:
      return left[0]


def _fast_enough(
  listed: list[Shape], bounds: Bounds, count: int, rounds: int, known: dict[str, float], save: Save
) -> list[Shape]:
  """Return the first `count` shapes whose decoding step, measured here, is within the bound."""
  if not bounds.token_ms:
    return listed[:count]
  chosen: list[Shape] = []
  for start in range(0, len(listed), _TOGETHER):
    group = listed[start : start + _TOGETHER]
    if unknown := {name(s): cfg for s, cfg in group if name(s) not in known}:
      prompt = max(bounds.context - _NEW_TOKENS, 1)
      times = latency.measure(unknown, bounds.dtype, bounds.batch, prompt, _NEW_TOKENS, rounds)
      known.update({shape: 1e3 * t['token'] for shape, t in times.items()})
      save()
    chosen += [pair for pair in group if known[name(pair[0])] <= bounds.token_ms]
    if len(chosen) >= count:
      break
  if not chosen:
    raise ValueError(
      f'--max_token_ms={bounds.token_ms:g}: of {len(known)} shapes the fastest takes '
      f'{min(known.values()):.3g} ms'
    )
  return chosen[:count]


def _score(
  loaded: load.Loaded, stats: str, cfg: RunConfig, chosen: list[Shape], record: Record, save: Save
) -> None:
  """Measure the held-out loss of every shape as cut, on the config's evaluation rows."""
  e, mesh = cfg.eval, sharding.make_mesh({'data': -1})
  scores = importance.activation_scores(commands.read(Path(stats), finished=True)[1])
  whole = loaded.model.cfg
  for sizes, _ in chosen:
    if name(sizes) in record['zero_shot']:
      continue
    kept = importance.keep(scores, sizes, whole.num_kv_heads)
    params, new = slicing.cut(loaded.params(), whole, kept)
    model = models.build(new)
    with jax.set_mesh(mesh):
      row_losses = heldout.make_row_losses(model.forward, cfg.dtype, cfg.objective.chunk, mesh)
      rows = mesh, cfg.data.path, e.set, e.split, e.batch_size
      values = heldout.rows(row_losses, lambda _, p=params: p, *rows, max_rows=e.max_rows)
    loss = heldout.summary(values, 0)
    record['zero_shot'][name(sizes)] = loss['loss']
    record['zero_shot_flops'] += loss['tokens'] * forward_flops(new, cfg.context)
    save()


def table(record: Record) -> str:
  """Format a search for a terminal: a row per shape, best first."""
  rungs, zero_shot = record['rungs'], record['zero_shot']
  losses = [zero_shot, *(rung['loss'] for rung in rungs)]
  last = lambda shape: [values[shape] for values in losses if shape in values]
  ranked = sorted(zero_shot, key=lambda shape: (-len(last(shape)), last(shape)[-1]))
  number = lambda values, shape, digits: f'{values[shape]:.{digits}f}' if shape in values else ''
  head = ['shape', 'parameters', 'ms/token', 'as cut', *(f'{r["steps"]} steps' for r in rungs)]
  rows = [
    [
      shape,
      f'{record["parameters"][shape]:,}',
      number(record['token_ms'], shape, 2),
      *(number(values, shape, 4) for values in losses),
    ]
    for shape in ranked
  ]
  text = tables.text((head, rows))
  known = [r for r in rungs if r['stability'] is not None]
  if known:
    agreement = ', '.join(f'{r["stability"]:.2f} after {r["steps"]} steps' for r in known)
    text += f"\nrank stability (Kendall's tau with the ranks before): {agreement}"
  return text
