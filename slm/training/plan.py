"""What a training run would take, from shapes alone: no data, weights or accelerator needed.

`python -m slm.train --config=... --dry_run` prints it, also for a mesh larger than the machine.
"""

import dataclasses
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

from slm import models, reparam
from slm.models.config import DecoderConfig
from slm.models.decoder import Decoder
from slm.objectives import distill, losses
from slm.reparam.projection import CodeConfig
from slm.runs import config, load
from slm.runs.config import DistillConfig, RunConfig
from slm.weights import axes, sharding, tree
from slm.weights.count import active_params, forward_flops, num_params


@dataclasses.dataclass(frozen=True)
class Chip:
  """An accelerator: peak dense bfloat16 FLOP/s and memory, by its maker's data sheet."""

  flops: float
  bytes: float


CHIPS = {
  'a100': Chip(312e12, 80e9),
  'h100': Chip(989e12, 80e9),
  'h200': Chip(989e12, 141e9),
  'tpu-v4': Chip(275e12, 32 * 2**30),
  'tpu-v5e': Chip(197e12, 16 * 2**30),
  'tpu-v5p': Chip(459e12, 95e9),
  'tpu-v6e': Chip(918e12, 32 * 2**30),
}
HERE = 'cpu'  # this machine, whose speed is measured
NAMES = (*sorted(CHIPS), HERE)
_MOST_TOKENS = 4096  # of the steps that measure it
_MEASURED_SECONDS = 2.0


def plan(
  cfg: RunConfig, devices: int, chip: str, mfu: float, teacher: DecoderConfig | None = None
) -> dict[str, Any]:  # fmt: skip
  """Count parameters, FLOPs, memory and time of a config on `devices` chips (0: the mesh's).

  A `teacher` that is not there yet may be given by its shape.

  Memory is of one device: what stays there (weights, their gradients and moments in float32, the
  compute copy of the weights), plus what a microbatch's forward pass keeps for the backward pass.
  Temporaries of single operations and the runtime's own memory come on top.

  Raises:
    ValueError: if the chip or the teacher of a distillation is not known, or the mesh does not fit
      the devices or the weights.
  """
  _check(chip, mfu)
  devices = devices or abs(math.prod(vars(cfg.mesh).values()))
  sizes = sharding.mesh_shape(vars(cfg.mesh), devices)
  mesh = AbstractMesh(sizes, sharding.MESH_AXES)
  model, rep = load.build(cfg)
  theta, where = load.theta_shardings(rep, mesh)
  load.check_groups(cfg, rep, sharding.batch_devices(mesh))
  d, context = cfg.data, cfg.context
  local_groups = d.batch_size // d.rows_per_group // d.accum // sharding.batch_devices(mesh)
  memory = _memory(cfg, model.cfg, rep, theta, where, mesh, local_groups)
  if rep.base:
    memory |= _base(cfg, model, rep, theta, mesh)
  if cfg.teacher:
    teacher = config.of(cfg.teacher).model
  if isinstance(cfg.objective, DistillConfig) and not (teacher or cfg.teacher_cache):
    raise ValueError('teacher: --dry_run of a distillation counts its forward passes: name its run')
  if teacher:
    memory['teacher'] = _teacher(cfg, teacher, mesh)
    memory['logits of a chunk'] += 4.0 * cfg.objective.chunk * teacher.vocab
  tokens = d.batch_size * context
  step_flops = _step_flops(cfg, model.cfg, rep, theta, teacher)
  if chip == HERE:
    about, mfu = _measure(model, cfg, devices, sum(memory.values())), 1.0
    idle_flops = 0.0  # a timed step has idle experts already
  else:
    about, idle_flops = CHIPS[chip], _idle(model.cfg) * tokens
  return {
    'served parameters': num_params(model.cfg),
    **({'active parameters': active_params(model.cfg)} if model.cfg.num_experts else {}),
    'trained parameters': _trained(theta),
    'forward FLOPs per token': forward_flops(model.cfg, context),
    'training FLOPs per token': step_flops / tokens,
    'tokens per step': tokens,
    'steps': cfg.steps,
    'tokens': tokens * cfg.steps,
    'tokens per served parameter': tokens * cfg.steps / sum(num_params(model.cfg).values()),
    'FLOPs': step_flops * cfg.steps,
    'mesh': dict(zip(sharding.MESH_AXES, sizes, strict=True)),
    'bytes per device': memory,
    'chip': chip,
    'chip bytes': about.bytes,
    'chip FLOP/s': about.flops,
    'assumed MFU': mfu,
    'hours': (step_flops + idle_flops) * cfg.steps / (devices * about.flops * mfu) / 3600,
  }


def _step_flops(
  cfg: RunConfig, model: DecoderConfig, rep: reparam.Reparam, theta: Any,
  teacher: DecoderConfig | None,
) -> float:  # fmt: skip
  """Count the FLOPs of a training step: the student's, its teacher's, and making the weights."""
  d = cfg.data
  written = cfg.objective.own_share  # the student writes these itself first
  per_token = (3 + written) * forward_flops(model, cfg.context)
  if teacher:
    per_token += distill.flops(cfg.objective, teacher, model, cfg.context)
  groups = d.batch_size // d.rows_per_group
  return d.batch_size * cfg.context * per_token + 3 * reparam.materialize_flops(rep, theta, groups)


def _measure(model: models.Model, cfg: RunConfig, devices: int, need: float) -> Chip:
  """Time forward and backward passes of a model on some rows, and return this machine's rate.

  Raises:
    ValueError: if the mesh is of several devices, or the machine's memory is less than `need`.
  """
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if devices > 1 or need > memory:
    raise ValueError(
      f'--chip={HERE} times a step on this machine, one device of {memory / 1e9:.3g} GB; this '
      f'takes {devices} of {need / 1e9:.3g} GB: name another --chip'
    )
  context = cfg.context
  rows = min(cfg.data.batch_size // cfg.data.accum, max(_MOST_TOKENS // context, 1))
  ids = np.ones((rows, context), np.int32)
  batch = {'inputs': ids, 'targets': ids, 'segments': ids, 'weights': ids.astype(np.float32)}
  batch['positions'] = ids.cumsum(1, dtype=np.int32) - 1

  def loss(params):
    params = tree.cast(params, jnp.dtype(cfg.dtype))
    return losses.token_losses(model.forward, params, batch, cfg.objective.chunk).sum()

  with jax.default_device(jax.devices('cpu')[0]):
    params = jax.jit(model.init)(jax.random.key(0))
    step, times = jax.jit(jax.grad(loss)), []
    jax.block_until_ready(step(params))  # compiles
    while sum(times) < _MEASURED_SECONDS:
      began = time.monotonic()
      jax.block_until_ready(step(params))
      times.append(time.monotonic() - began)
  flops = 3 * rows * context * forward_flops(model.cfg, context)
  return Chip(flops / statistics.median(times), memory)


def _trained(theta: dict[str, Any]) -> dict[str, int]:
  """Count theta by what it is: shared by all specialists, bases of a projection, experts, codes."""
  kinds: dict[str, int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(theta):
    names = [k.key for k in path]
    kind = next((n for n in ('experts', 'bases', 'mix', 'expert_code') if n in names), 'weights')
    kinds[kind] = kinds.get(kind, 0) + leaf.size
  return kinds


def _check(chip: str, mfu: float) -> None:
  if chip not in NAMES:
    raise ValueError(f'--chip: expected one of {", ".join(NAMES)}, found {chip!r}')
  if not 0 < mfu <= 1:
    raise ValueError(f'--mfu: expected a share in (0, 1], found {mfu}')


def _idle(model: DecoderConfig) -> float:
  """Return the FLOPs per token of experts that are computed and not chosen: time, not counted."""
  idle = sum(num_params(model).values()) - sum(active_params(model).values())
  return 6.0 * idle * (model.dispatch == 'einsum')


def _base(cfg, model, rep, theta, mesh) -> dict[str, float]:
  """Return the bytes of another run's frozen weights, and of what is made of them."""
  frozen = sum(num_params(model.cfg).values()) / (mesh.shape['fsdp'] * mesh.shape['tensor'])
  if rep.base == 'theta':
    network = reparam.build(cfg.reparam.of, model.init)
    frozen = _count(*load.theta_shardings(network, mesh))
  return {'frozen weights': 4.0 * frozen} | _changed(cfg, model, theta, mesh)


def _teacher(cfg, teacher, mesh) -> float:
  """Return the bytes of a teacher's weights, and of their gradient and moments if it learns."""
  copies = 4 if cfg.objective.correct else 1
  width = 0 if cfg.dtype == 'float32' else jnp.dtype(cfg.dtype).itemsize  # computed with
  share = sum(num_params(teacher).values()) / (mesh.shape['fsdp'] * mesh.shape['tensor'])
  return (4.0 * copies + width) * share


def _changed(cfg, model, theta, mesh) -> dict[str, float]:
  """Return the bytes of the weights that are made of frozen ones and theta, and of their gradient.

  Where theta has a number for every weight, its gradient takes that one's place.
  """
  names = [[k.key for k in path] for path, _ in jax.tree_util.tree_leaves_with_path(theta)]
  parents = {n[-2] if n[-1] in axes.FACTORS else n[-1] for n in names}
  parents |= set(cfg.reparam.of.leaves) if isinstance(cfg.reparam, CodeConfig) else set()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  mine = jax.tree_util.tree_map_with_path(
    lambda path, x: x if path[-1].key in parents else None, shapes
  )
  count = lambda tree: _count(tree, sharding.shardings(tree, mesh))
  width, whole = jnp.dtype(cfg.dtype).itemsize, count(mine)
  copy = whole if cfg.dtype == 'float32' else count(shapes)
  dense = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
  apart = any(n[-1] not in dense for n in names)
  return {
    'compute copy of weights': float(width * copy),
    'gradient of that copy': float(width * whole * apart),
  }


def _count(shapes, places) -> int:
  """Count the numbers that one device holds of a tree."""
  pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
  return sum(_size(place.shard_shape(shape.shape)) for shape, place in pairs)


def _memory(cfg, model, rep, theta, where, mesh, groups) -> dict[str, float]:
  """Return the bytes one device holds, by what they are for."""
  width = jnp.dtype(cfg.dtype).itemsize
  held = _count(theta, where)
  copy = held
  if rep.clusters and not rep.independent:
    # Every group of the device has its own matrices; they keep the sharding of dense ones.
    dense = jax.eval_shape(lambda t: rep.materialize(t, {}, 0), theta)
    varies = jax.tree.map(
      lambda axis: axis is not None, reparam.group_axes(rep, dense), is_leaf=lambda x: x is None
    )
    places = sharding.shardings(dense, mesh)
    times = jax.tree.map(lambda v: groups if v else 1, varies)
    copy = sum(
      n * _size(place.shard_shape(shape.shape))
      for n, shape, place in zip(*map(jax.tree.leaves, (times, dense, places)), strict=True)
    )
  keeps_copy = rep.clusters and not rep.independent or cfg.dtype != 'float32'
  rows = groups * cfg.data.rows_per_group
  tensor = mesh.shape['tensor']
  recomputed = 0.0
  if model.remat != 'none':
    recomputed = _kept(dataclasses.replace(model, remat='none'), cfg, tensor) / model.num_layers
  return {
    'weights': 4.0 * held,
    'gradients': 4.0 * held,
    'optimiser moments': 8.0 * held,
    'compute copy of weights': float(width * copy) if keeps_copy else 0.0,
    'logits of a chunk': 8.0 * cfg.objective.chunk * model.vocab,  # and their gradient
    'kept for the backward pass': rows * _kept(model, cfg, tensor),
    'one layer, recomputed': rows * recomputed,
  }


def _kept(model: DecoderConfig, cfg: RunConfig, tensor: int) -> float:
  """Return the bytes that one row's forward pass keeps, from the residuals JAX traces."""
  share = {n: getattr(model, n) // tensor for n in ('num_heads', 'num_kv_heads', 'mlp')}
  decoder = Decoder(dataclasses.replace(model, **share))

  def kept(rows: int) -> int:
    tokens = jax.ShapeDtypeStruct((rows, cfg.context), jnp.int32)
    batch = {name: tokens for name in ('inputs', 'positions', 'segments')}
    params = jax.eval_shape(decoder.init, jax.random.key(0), batch)['params']
    params = jax.eval_shape(lambda p: tree.cast(p, jnp.dtype(cfg.dtype)), params)

    def residuals(params, batch):
      return jax.vjp(lambda p: decoder.apply({'params': p}, batch).hidden, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, params, batch))
    return sum(x.size * x.dtype.itemsize for x in leaves)

  # The weights are among the residuals: the difference between two rows and one is not.
  return float(kept(2) - kept(1))


def _size(shape: tuple[int, ...]) -> int:
  return math.prod(shape)


def text(found: Mapping[str, Any]) -> str:
  """Lay out a plan for reading."""
  lines = []
  for title in ('served parameters', 'active parameters', 'trained parameters'):
    if not (parts := found.get(title)):
      continue
    lines.append(f'{title:28} {sum(parts.values()):,}')
    lines += [f'  {name:26} {n:,}' for name, n in parts.items()]
  for title in ('forward FLOPs per token', 'training FLOPs per token'):
    lines.append(f'{title:28} {found[title]:.3g}')
  for title in ('tokens per step', 'steps', 'tokens'):
    lines.append(f'{title:28} {found[title]:,}')
  lines.append(f'{"tokens per served parameter":28} {found["tokens per served parameter"]:.3g}')
  lines.append(f'{"FLOPs":28} {found["FLOPs"]:.3g}')
  mesh = ', '.join(f'{a} {n}' for a, n in found['mesh'].items() if n > 1) or 'one device'
  lines.append(f'{"mesh":28} {mesh}')
  memory = found['bytes per device']
  total, chip = sum(memory.values()), found['chip']
  share = (
    f'{total / found["chip bytes"]:.0%} of {"this machine" if chip == HERE else f"one {chip}"}'
  )
  lines.append(f'{"memory per device":28} {total / 1e9:.3g} GB, {share}')
  lines += [f'  {name:26} {n / 1e9:.3g} GB' for name, n in memory.items() if n]
  if total > found['chip bytes']:
    lines.append('does not fit: raise mesh.fsdp or data.accum, or set model.remat')
  devices, hours = math.prod(found['mesh'].values()), found['hours']
  took = f'{hours:,.3g} hours' if hours >= 1 else f'{hours * 60:.2g} minutes'
  where = f'on {devices} {chip} at an assumed {found["assumed MFU"]:.0%} of peak'
  if chip == HERE:
    took, where = f'about {took}', f'here, at the {found["chip FLOP/s"]:.3g} FLOP/s of a timed step'
  lines.append(f'{"time":28} {took} {where}')
  return '\n'.join(lines)
