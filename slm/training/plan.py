"""Plan a training run from shapes alone: parameters, FLOPs, memory and time.

`python -m slm.train --config=... --dry_run` prints a plan, for any mesh and without data, weights
or an accelerator.
"""

import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

from slm import models, reparam
from slm.base import console
from slm.models.config import DecoderConfig
from slm.models.decoder import Decoder
from slm.objectives import distill, losses
from slm.reparam.projection import CodeConfig
from slm.runs import config, load
from slm.runs.config import DistillConfig, RunConfig
from slm.weights import axes, sharding, tree
from slm.weights.chips import CHIPS, Chip
from slm.weights.count import active_params, forward_flops, num_params

HERE = 'cpu'  # this machine, whose speed is measured
NAMES = (*sorted(CHIPS), HERE)
_MEASURED_TOKENS = 4096  # tokens of a measured step, at most
_MEASURED_SECONDS = 2.0


def plan(
  cfg: RunConfig, devices: int, chip: str, mfu: float, teacher: DecoderConfig | None = None
) -> dict[str, Any]:
  """Count parameters, FLOPs, memory and time of a config on `devices` chips (0: the mesh's).

  `teacher` is the shape of a teacher that cfg.teacher does not name yet. Memory is per device: what
  is resident (weights, their gradients and moments in float32, the compute copy of the weights) and
  what a microbatch's forward pass keeps for the backward pass. Temporaries of single operations and
  the runtime's own memory come on top.

  Raises:
    ValueError: if the teacher of a distillation is unknown, or the mesh does not fit the devices or
      the weights.
  """
  if not 0 < mfu <= 1:
    raise ValueError(f'--mfu: expected a share in (0, 1], found {mfu}')
  if cfg.teacher:
    teacher = config.of(cfg.teacher).model
  if isinstance(cfg.objective, DistillConfig) and not (teacher or cfg.teacher_cache):
    raise ValueError('teacher: --dry_run of a distillation counts its forward passes; name a run')
  devices = devices or abs(math.prod(vars(cfg.mesh).values()))
  mesh = AbstractMesh(sharding.mesh_shape(vars(cfg.mesh), devices), sharding.MESH_AXES)
  model, rep = load.build(cfg)
  load.check_groups(cfg, rep, sharding.batch_devices(mesh))
  theta, shardings = load.theta_shardings(rep, mesh)
  memory = _memory(cfg, model, rep, theta, shardings, mesh, teacher)
  tokens = cfg.data.batch_size * cfg.context
  added = distill.flops(cfg.objective, teacher, model.cfg, cfg.context) if teacher else 0.0
  flops = step_flops(cfg, model, rep, theta, added)
  served, active = num_params(model.cfg), active_params(model.cfg)
  idle = 0.0  # FLOPs of experts that are computed but not chosen
  if chip == HERE:  # the time of a measured step includes them
    hardware, mfu = _measure(model, cfg, devices, sum(memory.values())), 1.0
  else:
    hardware = CHIPS[chip]
    if model.cfg.dispatch == 'einsum':
      idle = 6.0 * tokens * (sum(served.values()) - sum(active.values()))
  return {
    'served parameters': served,
    **({'active parameters': active} if model.cfg.num_experts else {}),
    'trained parameters': _trained(theta),
    'forward FLOPs per token': forward_flops(model.cfg, cfg.context),
    'training FLOPs per token': flops / tokens,
    'tokens per step': tokens,
    'steps': cfg.steps,
    'tokens': tokens * cfg.steps,
    'tokens per served parameter': tokens * cfg.steps / sum(served.values()),
    'FLOPs': flops * cfg.steps,
    'mesh': dict(mesh.shape),
    'bytes per device': memory,
    'chip': chip,
    'chip bytes': hardware.bytes,
    'chip FLOP/s': hardware.flops,
    'assumed MFU': mfu,
    'hours': (flops + idle) * cfg.steps / (devices * hardware.flops * mfu) / 3600,
  }


def step_flops(
  cfg: RunConfig, model: models.Model, rep: reparam.Reparam, theta: Any, added: float
) -> float:
  """Count a training step's FLOPs: the model's passes, `added` per token, making the weights."""
  per_token = 3 * forward_flops(model.cfg, cfg.context) + added
  groups = cfg.data.batch_size // cfg.data.rows_per_group
  made = reparam.materialize_flops(rep, theta, groups)
  return cfg.data.batch_size * cfg.context * per_token + 3 * made


def _measure(model: models.Model, cfg: RunConfig, devices: int, needed: float) -> Chip:
  """Time forward and backward passes on some rows; return this machine as a chip."""
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if devices > 1 or needed > memory:
    raise ValueError(
      f'--chip={HERE} times a step on this machine, one device of {memory / 1e9:.3g} GB; the run '
      f'needs {devices} of {needed / 1e9:.3g} GB: name another --chip'
    )
  context = cfg.context
  rows = min(cfg.data.batch_size // cfg.data.accum, max(_MEASURED_TOKENS // context, 1))
  ids = np.ones((rows, context), np.int32)
  batch = {'inputs': ids, 'targets': ids, 'segments': ids, 'weights': ids.astype(np.float32)}
  batch['positions'] = ids.cumsum(1, dtype=np.int32) - 1

  def loss(params):
    params = tree.cast(params, jnp.dtype(cfg.dtype))
    return losses.token_losses(model.forward, params, batch, cfg.objective.chunk).sum()

  with jax.default_device(jax.devices('cpu')[0]):
    params = jax.jit(model.init)(jax.random.key(0))
    step, seconds = jax.jit(jax.grad(loss)), []
    jax.block_until_ready(step(params))  # compiles
    while sum(seconds) < _MEASURED_SECONDS:
      began = time.monotonic()
      jax.block_until_ready(step(params))
      seconds.append(time.monotonic() - began)
  flops = 3 * rows * context * forward_flops(model.cfg, context)
  return Chip(flops / statistics.median(seconds), memory)


def _trained(theta: dict[str, Any]) -> dict[str, int]:
  """Count theta by kind: shared weights, bases of a projection, experts, codes."""
  counts: dict[str, int] = {}
  for path, leaf in tree_leaves_with_path(theta):
    names = [key.key for key in path]
    kind = next((k for k in ('experts', 'bases', 'mix', 'expert_code') if k in names), 'weights')
    counts[kind] = counts.get(kind, 0) + leaf.size
  return counts


def _count(shapes: Any, shardings: Any, times: Any = None) -> int:
  """Count a tree's numbers on one device; `times` repeats leaves."""
  leaves = map(jax.tree.leaves, (shapes, shardings, times or jax.tree.map(lambda _: 1, shapes)))
  shards = ((where.shard_shape(x.shape), n) for x, where, n in zip(*leaves, strict=True))
  return sum(n * math.prod(shape) for shape, n in shards)


def _memory(cfg, model, rep, theta, shardings, mesh, teacher) -> dict[str, float]:
  """Return the bytes on one device by purpose."""
  d, decoder, tensor = cfg.data, model.cfg, mesh.shape['tensor']
  groups = d.batch_size // d.rows_per_group // d.accum // sharding.batch_devices(mesh)
  rows = groups * d.rows_per_group
  trained = copy = _count(theta, shardings)
  shared_groups = rep.clusters and not rep.independent
  if shared_groups:  # every group of the device has its own matrices, sharded like dense ones
    dense = jax.eval_shape(lambda t: rep.materialize(t, {}, 0), theta)
    times = jax.tree.map(
      lambda axis: 1 if axis is None else groups,
      reparam.group_axes(rep, dense),
      is_leaf=lambda axis: axis is None,
    )
    copy = _count(dense, sharding.shardings(dense, mesh), times)
  recomputed = 0.0
  if decoder.remat != 'none':
    whole = _kept(dataclasses.replace(decoder, remat='none'), cfg.context, cfg.dtype, tensor)
    recomputed = whole / decoder.num_layers
  memory = {
    'weights': 4.0 * trained,
    'gradients': 4.0 * trained,
    'optimiser moments': 8.0 * trained,
    'compute copy of weights': 0.0,
    'logits of a chunk': 8.0 * cfg.objective.chunk * decoder.vocab,  # and their gradient
    'kept for the backward pass': rows * _kept(decoder, cfg.context, cfg.dtype, tensor),
    'one layer, recomputed': rows * recomputed,
  }
  width = jnp.dtype(cfg.dtype).itemsize
  if shared_groups or cfg.dtype != 'float32':
    memory['compute copy of weights'] = float(width * copy)
  if rep.base:
    memory |= _frozen(cfg, model, rep, theta, mesh)
  if teacher:  # its weights, their compute copy, and their gradient and moments if it learns
    number = (16.0 if cfg.objective.correct else 4.0) + (0 if cfg.dtype == 'float32' else width)
    memory['teacher'] = number * _share(teacher, mesh)
    memory['logits of a chunk'] += 4.0 * cfg.objective.chunk * teacher.vocab
  return memory


def _share(model: DecoderConfig, mesh: Any) -> int:
  """Return how many of a dense model's parameters are on one device."""
  shapes = jax.eval_shape(models.build(model).init, jax.random.key(0))
  return _count(shapes, sharding.shardings(shapes, mesh))


def _frozen(cfg, model, rep, theta, mesh) -> dict[str, float]:
  """Return the bytes of another run's frozen weights, and of the weights made from them.

  Where theta has a number for every weight, its gradient takes the place of theirs.
  """
  base = load.base_outline(cfg, rep, mesh)
  frozen = _count(base, jax.tree.map(lambda x: x.sharding, base))
  names = [[key.key for key in path] for path, _ in tree_leaves_with_path(theta)]
  changed = {n[-2] if n[-1] in axes.FACTORS else n[-1] for n in names}
  if isinstance(cfg.reparam, CodeConfig):
    changed |= set(cfg.reparam.of.leaves)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  keep = lambda path, x: x if path[-1].key in changed else None
  count = lambda tree: _count(tree, sharding.shardings(tree, mesh))
  made = count(tree_map_with_path(keep, shapes))
  dense = {path[-1].key for path, _ in tree_leaves_with_path(shapes)}
  separate = any(n[-1] not in dense for n in names)
  width = jnp.dtype(cfg.dtype).itemsize
  return {
    'frozen weights': 4.0 * frozen,
    'compute copy of weights': float(width * (made if width == 4 else count(shapes))),
    'gradient of that copy': float(width * made * separate),
  }


@functools.cache
def _kept(model: DecoderConfig, context: int, dtype: str, tensor: int) -> float:
  """Return the bytes that one row's forward pass keeps, from the residuals that JAX traces."""
  share = {n: getattr(model, n) // tensor for n in ('num_heads', 'num_kv_heads', 'mlp')}
  decoder = Decoder(dataclasses.replace(model, **share))

  def kept(rows: int) -> int:
    tokens = jax.ShapeDtypeStruct((rows, context), jnp.int32)
    batch = {name: tokens for name in ('inputs', 'positions', 'segments')}
    params = jax.eval_shape(decoder.init, jax.random.key(0), batch)['params']
    params = jax.eval_shape(lambda p: tree.cast(p, jnp.dtype(dtype)), params)

    def residuals(params, batch):
      return jax.vjp(lambda p: decoder.apply({'params': p}, batch).hidden, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, params, batch))
    return sum(x.size * x.dtype.itemsize for x in leaves)

  # The residuals include the weights; the difference between two rows and one does not.
  return float(kept(2) - kept(1))


def text(plan: Mapping[str, Any]) -> str:
  """Format a plan for a terminal."""
  lines = []
  add = lambda title, value: lines.append(f'{title:28} {value}')
  for title, value in plan.items():
    if title == 'mesh':  # what follows is formatted below
      break
    if isinstance(value, Mapping):
      add(title, f'{sum(value.values()):,}')
      lines += [f'  {name:26} {n:,}' for name, n in value.items()]
    else:
      add(title, f'{value:,}' if isinstance(value, int) else f'{value:.3g}')
  add('mesh', ', '.join(f'{a} {n}' for a, n in plan['mesh'].items() if n > 1) or 'one device')
  memory, chip = plan['bytes per device'], plan['chip']
  total, share = sum(memory.values()), sum(memory.values()) / plan['chip bytes']
  owner = 'this machine' if chip == HERE else f'one {chip}'
  add('memory per device', f'{total / 1e9:.3g} GB, {share:.0%} of {owner}')
  lines += [f'  {name:26} {n / 1e9:.3g} GB' for name, n in memory.items() if n]
  if share > 1:
    lines.append('does not fit: raise mesh.fsdp or data.accum, or set model.remat')
  duration = console.duration(3600 * plan['hours'])
  if chip == HERE:
    rate = f'{plan["chip FLOP/s"]:.3g} FLOP/s of a timed step'
    add('time', f'about {duration} here, at the {rate}')
  else:
    devices = math.prod(plan['mesh'].values())
    mfu = f'at an assumed {plan["assumed MFU"]:.0%} of peak'
    add('time', f'{duration} on {devices} {chip} {mfu}')
  return '\n'.join(lines)
