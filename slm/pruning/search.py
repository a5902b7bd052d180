r"""Search for the shape to cut to: list those within bounds, score them as cut, distil, halve.

    python -m slm.prune search --run=RUN --stats=STATS --workdir=DIR --max_params=4.5e9 \
      --config=configs/recover.py --config.data.path=DATA --config.steps=100 \
      --config.schedule.warmup=10

The largest shapes within the bounds are scored by their held-out loss as they are cut. The best of
them are trained a little by the config (`init` and `teacher` are filled in), the better half for
twice as long, and so on until one is left (successive halving): Minitron's rule that candidates
are ranked after a short retraining, not before (arXiv 2407.14679 §4.1, rule 9). Started again it
continues. DIR/search.json holds all of it; DIR/<shape>, the cut as it is, is what to recover from.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from slm import models
from slm.base import artifact, files
from slm.inference import latency
from slm.models.config import DecoderConfig
from slm.objectives import heldout
from slm.pruning import commands, importance, slicing
from slm.runs import config, ledger, load
from slm.runs.config import RunConfig
from slm.training import loop, optim
from slm.weights import sharding
from slm.weights.count import active_params, forward_flops, num_params

Sizes = dict[str, int]  # by axis
_NEW_TOKENS = 32  # decoded to measure a step
_TOGETHER = 4  # shapes whose weights are there at once to be measured
# How far the grid goes if nobody says: at most 40 % off a width, 20 % off the depth.
_SHARES = {'embed': 0.6, 'mlp': 0.6, 'layers': 0.8}


@dataclasses.dataclass(frozen=True)
class Bounds:
  """What a shape may cost at most; 0 is no bound."""

  params: float = 0.0
  active: float = 0.0  # parameters a token passes through
  memory: float = 0.0  # bytes of the weights and of the cache of batch x context tokens
  token_ms: float = 0.0  # milliseconds of a decoding step, measured here
  batch: int = 1
  context: int = 1024
  dtype: str = 'float32'

  def allow(self, cfg: DecoderConfig) -> bool:
    """Say whether a shape is within the bounds that need no measurement."""
    width, count = jnp.dtype(self.dtype).itemsize, sum(num_params(cfg).values())
    cache = latency.predicted(cfg, self.context * self.batch, self.dtype)['cache_bytes']
    active = sum(active_params(cfg).values())
    found = {'params': count, 'active': active, 'memory': width * count + cache}
    return all(not (limit := getattr(self, name)) or x <= limit for name, x in found.items())


def default_grid(cfg: DecoderConfig, multiple: int) -> dict[str, tuple[int, ...]]:
  """Return the sizes of each axis to try: multiples for widths, every depth."""
  found = {}
  for axis, share in _SHARES.items():
    whole, step = getattr(cfg, slicing.SIZES[axis]), 1 if axis == 'layers' else multiple
    first = math.ceil(share * whole / step) * step
    found[axis] = tuple(sorted({*range(first, whole + 1, step), whole}, reverse=True))
  return found


def read_grid(text: str, cfg: DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Read axis=size:size:...,axis=...

  Raises:
    ValueError: if a part is not of that form or a size is larger than the model's.
  """
  found = {}
  for part in filter(None, text.split(',')):
    axis, _, values = part.partition('=')
    axes = [a for a in slicing.SIZES if a != 'vocab']  # candidates are scored on the same tokens
    if axis not in axes or not values.replace(':', '').isdigit():
      raise ValueError(f'--grid: expected axis=size:size of {", ".join(axes)}, found {part!r}')
    found[axis] = tuple(sorted({int(v) for v in values.split(':') if v}, reverse=True))
    if found[axis][0] > (whole := getattr(cfg, slicing.SIZES[axis])):
      raise ValueError(f'--grid: {axis}={found[axis][0]} is more than the {whole} there are')
  return found


def shapes(
  cfg: DecoderConfig, grid: Mapping[str, tuple[int, ...]], bounds: Bounds
) -> list[tuple[Sizes, DecoderConfig]]:
  """List the shapes of a grid within the bounds, the whole model apart, largest first.

  Raises:
    ValueError: if there is none.
  """
  found = []
  for values in itertools.product(*grid.values()):
    sizes = {a: n for a, n in zip(grid, values, strict=True) if n < getattr(cfg, slicing.SIZES[a])}
    new = slicing.shape(cfg, {axis: np.arange(n) for axis, n in sizes.items()})
    if sizes and bounds.allow(new):
      found.append((sizes, new))
  if not found:
    raise ValueError(
      f'no shape of {dict(grid)} is within the bounds: lower --multiple or --grid, or raise a bound'
    )
  return sorted(found, key=lambda pair: (-sum(num_params(pair[1]).values()), name(pair[0])))


def name(sizes: Sizes) -> str:
  """Name a shape, and its directory."""
  return '-'.join(f'{axis}{n}' for axis, n in sizes.items())


@artifact.writes('workdir')
def search(
  run: str, stats: str, workdir: Path, given: Mapping[str, Any],
  grid: Mapping[str, tuple[int, ...]], bounds: Bounds, *, count: int = 10, survivors: int = 4,
  rounds: int = 5,
) -> dict[str, Any]:  # fmt: skip
  """Run or continue a search; returns what search.json holds.

  By shape: 'parameters', 'token_ms' (if bounded), 'zero_shot', the held-out loss as cut. 'rungs'
  are the rounds of training: 'steps', 'loss' after them, and 'stability', Kendall's tau between the
  ranks in this round and the one before. 'sizes' are those of the 'best' shape, 'flops' is what
  all of it took.

  Raises:
    ValueError: if no shape is within the bounds, or the directory holds another search.
  """
  loaded = load.load(run, load.mesh_for(run), finished=True)
  given = given | {'teacher': str(Path(run).resolve()) * (given['objective']['name'] == 'distill')}
  cfg = config.resolve(given | {'init': run})
  if cfg.distributed.enable:
    raise ValueError('distributed.enable: a search runs on one process')
  optim.schedule(cfg.schedule, cfg.steps)  # before any work: is it possible?
  asked = {
    'run': str(Path(run).resolve()), 'step': loaded.step, 'count': count, 'survivors': survivors,
    'stats_sha256': files.sha256(Path(stats) / 'stats.safetensors'), 'grid': grid,
    'bounds': dataclasses.asdict(bounds),
    'config': {k: v for k, v in given.items() if k not in config.OPERATIONAL},
  }  # fmt: skip
  asked, path = json.loads(json.dumps(asked)), workdir / 'search.json'
  found = files.read_json(path) if path.exists() else {}
  artifact.check_same(workdir, found.get('asked', asked), asked, 'another search')
  found = {'asked': asked, 'token_ms': {}, 'zero_shot': {}, 'rungs': []} | found
  save = lambda: files.write_json(path, found)
  listed = shapes(loaded.model.cfg, grid, bounds)
  chosen = _fast_enough(listed, bounds, count, rounds, found['token_ms'], save)
  found['parameters'] = {name(s): sum(num_params(c).values()) for s, c in chosen}
  _score(loaded, stats, cfg, chosen, found, save)
  del loaded  # training loads what it needs
  sizes = {name(s): s for s, _ in chosen}
  best = _halve(given, cfg, run, stats, workdir, sizes, survivors, found, save)
  ledgers = [
    ledger.read_ledger(workdir / f'{shape}-{i}')
    for i, rung in enumerate(found['rungs'], 1)
    for shape in rung['loss']
  ]
  trained = sum(phase['flops'] for costs in ledgers for phase in costs['phases'])
  calibration = commands.read(Path(stats), finished=True)[0]['flops']
  spent = calibration + found['zero_shot_flops'] + trained
  found |= {'best': best, 'sizes': sizes[best], 'flops': spent}
  save()
  return found


def _halve(given, cfg, run, stats, workdir, sizes, survivors, found, save) -> str:
  """Train the best shapes as cut, the better half for twice as long, until one is left."""
  before = found['zero_shot']
  left = sorted(sizes, key=before.get)[:survivors]
  for shape in left:
    commands.cut(run, [stats], sizes[shape], str(workdir / shape), align=1)
  i = 0
  while True:
    i += 1
    steps, losses = cfg.steps * 2 ** (i - 1), {}
    for shape in left:
      init = workdir / (shape if i == 1 else f'{shape}-{i - 1}')
      changes = {'init': str(init), 'steps': steps, 'seed': cfg.seed + i}
      losses[shape] = loop.train(given | changes, workdir / f'{shape}-{i}')['loss']
    ranks = [[of[s] for s in left] for of in (before, losses)]
    tau = float(scipy.stats.kendalltau(*ranks)[0]) if len(left) > 1 else None
    found['rungs'] = found['rungs'][: i - 1] + [{'steps': steps, 'loss': losses, 'stability': tau}]
    save()
    before, left = losses, sorted(left, key=losses.get)[: -(-len(left) // 2)]
    if len(losses) <= 2:
      return left[0]


def _fast_enough(
  listed: list[tuple[Sizes, DecoderConfig]], bounds: Bounds, count: int, rounds: int,
  known: dict[str, float], save: Callable[[], None],
) -> list[tuple[Sizes, DecoderConfig]]:  # fmt: skip
  """Take the first `count` shapes whose decoding step, measured here, is within the bound."""
  if not bounds.token_ms:
    return listed[:count]
  chosen: list[tuple[Sizes, DecoderConfig]] = []
  for i in range(0, len(listed), _TOGETHER):
    some = listed[i : i + _TOGETHER]
    if unknown := {name(s): cfg for s, cfg in some if name(s) not in known}:
      prompt = max(bounds.context - _NEW_TOKENS, 1)
      times = latency.measure(unknown, bounds.dtype, bounds.batch, prompt, _NEW_TOKENS, rounds)
      known.update({shape: 1e3 * t['token'] for shape, t in times.items()})
      save()
    chosen += [pair for pair in some if known[name(pair[0])] <= bounds.token_ms]
    if len(chosen) >= count:
      break
  if not chosen:
    raise ValueError(
      f'--max_token_ms={bounds.token_ms:g}: of {len(known)} shapes the fastest takes '
      f'{min(known.values()):.3g} ms'
    )
  return chosen[:count]


def _score(
  loaded: load.Loaded, stats: str, cfg: RunConfig,
  chosen: list[tuple[Sizes, DecoderConfig]], found: dict[str, Any], save: Callable[[], None],
) -> None:  # fmt: skip
  """Measure the held-out loss of every shape as it is cut, on the config's evaluation rows."""
  e, mesh = cfg.eval, sharding.make_mesh({'data': -1})
  scores = importance.activation_scores(commands.read(Path(stats), finished=True)[1])
  found.setdefault('zero_shot_flops', 0.0)
  params, old = loaded.params(), loaded.model.cfg
  for sizes, _ in chosen:
    if name(sizes) in found['zero_shot']:
      continue
    cut, new = slicing.cut(params, old, importance.keep(scores, sizes, old.num_kv_heads))
    model = models.build(new)
    with jax.set_mesh(mesh):
      row_losses = heldout.make_row_losses(model.forward, cfg.dtype, cfg.objective.chunk, mesh)
      where = mesh, cfg.data.path, e.set, e.split, e.batch_size
      values = heldout.rows(row_losses, lambda c, cut=cut: cut, *where, max_rows=e.max_rows)
    loss = heldout.summary(values, 0)
    found['zero_shot'][name(sizes)] = loss['loss']
    found['zero_shot_flops'] += loss['tokens'] * forward_flops(new, cfg.context)
    save()


def table(found: Mapping[str, Any]) -> str:
  """Lay out a search for reading: a line per shape, best first."""
  rounds = [rung['loss'] for rung in found['rungs']]
  reached = lambda shape: -sum(shape in losses for losses in rounds)
  last = lambda shape: next(x[shape] for x in (*rounds[::-1], found['zero_shot']) if shape in x)
  steps = [f'{rung["steps"]} steps' for rung in found['rungs']]
  lines = [
    f'{"shape":32s} {"parameters":>13s} {"ms/token":>9s} {"as cut":>8s} '
    + ' '.join(f'{s:>12s}' for s in steps)
  ]
  for shape in sorted(found['zero_shot'], key=lambda s: (reached(s), last(s))):
    ms = found['token_ms'].get(shape)
    lines.append(
      f'{shape:32s} {found["parameters"][shape]:13,} {f"{ms:.2f}" if ms else "":>9s} '
      f'{found["zero_shot"][shape]:8.4f} '
      + ' '.join(f'{f"{x[shape]:.4f}" if shape in x else "":>12s}' for x in rounds)
    )
  agreement = ', '.join(
    f'{rung["stability"]:.2f} after {s}'
    for rung, s in zip(found['rungs'], steps, strict=True)
    if rung['stability'] is not None
  )
  if agreement:
    lines.append(f"rank stability (Kendall's tau with the ranks before): {agreement}")
  return '\n'.join(lines)
