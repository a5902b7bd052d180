"""Plan a training run from shapes alone: parameters, FLOPs, memory and time.

`python -m slm.train --config=... --dry_run` prints a plan, for any mesh and without data, weights
or an accelerator.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.tree_util import tree_leaves_with_path

from slm import reparam
from slm.base import arguments, console
from slm.models.config import DecoderConfig
from slm.models.decoder import Decoder
from slm.objectives import critic
from slm.runs.config import RunConfig
from slm.training import program
from slm.weights import chips, sharding, tree
from slm.weights.chips import CHIPS, Chip
from slm.weights.count import active_params, forward_flops, num_params

HERE = 'cpu'  # this machine, whose speed is measured
NAMES = (*sorted(CHIPS), HERE)
_MEASURED_TOKENS = 4096  # tokens of a measured step, at most
_MEASURED_SECONDS = 2.0
# Flags that slm.compile does not have.
_OF_THE_PLAN = ('dry_run', 'nodry_run', 'devices', 'chip', 'mfu', 'workdir', 'profile')


def plan(
  cfg: RunConfig, devices: int, chip: str, mfu: float, teacher: DecoderConfig | None = None
) -> dict[str, Any]:
  """Count parameters, FLOPs, memory and time of a config on `devices` chips (0: the mesh's).

  `teacher` is the shape of a teacher that cfg.teacher does not name yet. Memory is per device: the
  step's arguments by kind, as slm.compile counts them, and beside them, for this machine, what XLA
  assigns to the compiled step. For other chips that part is estimated: gradients in float32, the
  compute copy of the weights, and what a microbatch's forward pass keeps for the backward pass.

  Raises:
    ValueError: as program.outline does, or if the mesh does not fit the devices, or the step this
      machine.
  """
  if not 0 < mfu <= 1:
    raise ValueError(f'--mfu: expected a share in (0, 1], found {mfu}')
  devices = devices or abs(math.prod(vars(cfg.mesh).values()))
  axes = (AxisType.Auto,) * len(sharding.MESH_AXES)
  mesh = AbstractMesh(sharding.mesh_shape(vars(cfg.mesh), devices), sharding.MESH_AXES, axes)
  step = program.outline(cfg, mesh, teacher)
  model, flops, tokens = step.model, step.flops, program.step_tokens(cfg)
  served, active = num_params(model.cfg), active_params(model.cfg)
  idle = 0.0  # FLOPs of experts that are computed but not chosen
  if chip == HERE:  # the time of a measured step includes them
    memory, hardware = _here(cfg, devices, teacher)
    estimated, mfu = {}, 1.0
  else:
    memory, estimated = program.memory(step.kinds), _estimated(cfg, step, mesh)
    hardware = CHIPS[chip]
    if model.cfg.dispatch == 'einsum':
      idle = 6.0 * tokens * (sum(served.values()) - sum(active.values()))
  cost = program.run_cost(cfg, (flops + idle) / (devices * hardware.flops * mfu), devices)
  return {
    'served parameters': served,
    **({'active parameters': active} if model.cfg.num_experts else {}),
    'trained parameters': _trained(step.state.theta),
    'forward FLOPs per token': forward_flops(model.cfg, cfg.context),
    'training FLOPs per token': flops / tokens,
    'tokens per step': tokens,
    'steps': cfg.steps,
    'tokens': cost['tokens'],
    'tokens per served parameter': cost['tokens'] / sum(served.values()),
    'FLOPs': flops * cfg.steps,
    'mesh': dict(mesh.shape),
    'bytes per device': memory,
    'estimated bytes per device': estimated,
    'chip': chip,
    'chip bytes': hardware.bytes,
    'chip FLOP/s': hardware.flops,
    'assumed MFU': mfu,
    'hours': cost['hours'],
    'chip-hours': cost['chip-hours'],
  }


def _here(
  cfg: RunConfig, devices: int, teacher: DecoderConfig | None
) -> tuple[dict[str, float], Chip]:
  """Compile a run's step for this machine; return the bytes it takes, and the machine as a chip."""
  room = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  refused = f'--chip={HERE} times a step on this machine, one device of {room / 1e9:.3g} GB; '
  if devices > 1:
    raise ValueError(f'{refused}the run is planned on {devices}: name another --chip')
  whole = _compile(cfg, teacher)
  memory = program.memory(whole[0].kinds, whole[1])
  if (needed := sum(memory.values())) > room:
    raise ValueError(f'{refused}the run needs {needed / 1e9:.3g} GB: name another --chip')
  fewer = _fewer_rows(cfg)
  step, compiled = whole if fewer == cfg else _compile(fewer, teacher)
  return memory, Chip(step.flops / _seconds(step, compiled), room)


def _compile(cfg: RunConfig, teacher: DecoderConfig | None) -> tuple[program.Outline, Any]:
  """Compile a run's step for one CPU of this machine."""
  mesh = sharding.make_mesh(vars(cfg.mesh), jax.devices('cpu')[:1])
  step = program.outline(cfg, mesh, teacher)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return step, step.trace().lower().compile()


def _fewer_rows(cfg: RunConfig) -> RunConfig:
  """Return a config with as few groups of rows in a step as are enough to time it."""
  d = cfg.data
  groups = d.batch_size // d.accum // d.rows_per_group
  if d.order != 'every':  # where each expert has a group in a step
    groups = min(groups, max(_MEASURED_TOKENS // (cfg.context * d.rows_per_group), 1))
  d = dataclasses.replace(d, batch_size=groups * d.rows_per_group, accum=1)
  return dataclasses.replace(cfg, data=d)


def _seconds(step: program.Outline, compiled: Any) -> float:
  """Return the median seconds of a step's calls."""
  # No value of weights, rows or conditions changes what is computed.
  fill = lambda x, where, value: jax.device_put(jnp.full(x.shape, value, x.dtype), where)
  filled = lambda tree, value: jax.tree.map(lambda x: fill(x, x.sharding, value), tree)
  theta = jax.jit(step.reparam.init, out_shardings=step.program.layout.theta)(jax.random.key(0))
  state = step.program.init(theta, filled(step.state.beside, 0.01))
  frozen, batch, seconds = filled(step.frozen, 0.01), filled(step.batch, 1), []
  state, _ = jax.block_until_ready(compiled(state, frozen, batch))  # the first call is slower
  while sum(seconds) < _MEASURED_SECONDS:
    began = time.monotonic()
    state, _ = jax.block_until_ready(compiled(state, frozen, batch))
    seconds.append(time.monotonic() - began)
  return statistics.median(seconds)


def _trained(theta: dict[str, Any]) -> dict[str, int]:
  """Count theta by kind: shared weights, bases of a projection, experts, codes."""
  counts: dict[str, int] = {}
  for path, leaf in tree_leaves_with_path(theta):
    names = [key.key for key in path]
    kind = next((k for k in ('experts', 'bases', 'mix', 'expert_code') if k in names), 'weights')
    counts[kind] = counts.get(kind, 0) + leaf.size
  return counts


def _estimated(cfg: RunConfig, step: program.Outline, mesh: Any) -> dict[str, float]:
  """Estimate the bytes on one device of what a compiler decides, by purpose."""
  decoder, tensor = step.model.cfg, mesh.shape['tensor']
  *_, groups, per_group, width = step.batch['inputs'].shape
  groups //= sharding.batch_devices(mesh)
  rows, recomputed = groups * per_group, 0.0
  kept = _kept(decoder, width, cfg.dtype, tensor)
  if 'value' in step.state.beside:
    kept += _kept(critic.network(cfg, step.model).cfg, width, cfg.dtype, tensor)
  if decoder.remat != 'none':
    whole = _kept(dataclasses.replace(decoder, remat='none'), width, cfg.dtype, tensor)
    recomputed = whole / decoder.num_layers
  logits = 8.0 * decoder.vocab  # and their gradient
  if step.teacher:
    logits += 4.0 * step.teacher.vocab
  trained = program.memory({'': (step.state.theta, step.state.beside)})
  return {
    'gradients': sum(trained.values()),
    **_copies(cfg, step, mesh, groups),
    'logits of a chunk': cfg.objective.chunk * logits,
    'kept for the backward pass': rows * kept,
    'one layer, recomputed': rows * recomputed,
  }


def _copies(cfg, step, mesh, groups) -> dict[str, float]:
  """Estimate the bytes of the weights that a step makes: from others, or in the compute type."""
  rep, theta, width = step.reparam, step.state.theta, jnp.dtype(cfg.dtype).itemsize
  if rep.independent:
    dense, made = theta, set()
  else:  # what is made from theta is no argument of the function that makes it
    make = lambda theta, frozen: rep.materialize(theta, frozen, 0)
    dense = jax.eval_shape(make, theta, step.frozen)
    jaxpr = jax.make_jaxpr(make)(theta, step.frozen).jaxpr
    made = {i for i, x in enumerate(jaxpr.outvars) if x not in jaxpr.invars}
  per_group = reparam.group_axes(rep, dense) if rep.clusters and not rep.independent else {}
  varies = {path for path, _ in tree_leaves_with_path(per_group)}
  shards = jax.tree.map(lambda x, s: s.shard_shape(x.shape), dense, sharding.shardings(dense, mesh))
  is_shape = lambda x: isinstance(x, tuple)
  sizes = [
    math.prod(shape) * (groups if path in varies else 1)
    for path, shape in tree_leaves_with_path(shards, is_leaf=is_shape)
  ]
  new = sum(sizes[i] for i in made)
  copy = new if width == 4 else sum(sizes)
  if width != 4:
    others = step.frozen | step.state.beside
    beside = {name: others.get(name, {}) for name in ('teacher', 'reference', 'value')}
    copy += sum(program.memory(beside).values()) / 4
  fewer = sum(x.size for x in jax.tree.leaves(theta)) < new  # else its gradient takes their place
  return {
    'compute copy of weights': float(width * copy),
    'gradient of that copy': float(width * new) if rep.base and fewer else 0.0,
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
  memory, estimated = plan['bytes per device'], plan['estimated bytes per device']
  chip, guess = plan['chip'], sum(estimated.values())
  total = sum(memory.values()) + guess
  share = total / plan['chip bytes']
  owner = 'this machine' if chip == HERE else f'one {chip}'
  add('memory per device', f'{total / 1e9:.3g} GB, {share:.0%} of {owner}')
  lines += [f'  {name:26} {n / 1e9:.3g} GB' for name, n in memory.items()]
  if estimated:
    lines.append(f'  {"estimated:":26} {guess / 1e9:.3g} GB, which a compiler decides')
    lines += [f'    {name:26} {n / 1e9:.3g} GB' for name, n in estimated.items() if n]
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


def exact(plan: Mapping[str, Any], argv: Sequence[str]) -> str:
  """Return the line that names the command which replaces a plan's estimates; '' if there is none.

  `argv` are the arguments of the command that planned. There is none without libtpu, for GPUs and
  for a number of chips that no slice has.
  """
  topology = chips.slice_of(plan['chip'], math.prod(plan['mesh'].values()))
  if not (topology and importlib.util.find_spec('libtpu')):
    return ''
  command = arguments.instead('slm.compile', argv, _OF_THE_PLAN, f'--topology={topology}')
  return f'\nexact, in place of estimates: {command}'
