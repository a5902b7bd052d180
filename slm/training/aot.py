"""Compile a run's programs for chips that are not here, and work out what they take there.

XLA's own TPU compiler runs on any machine where libtpu is installed (jax.experimental.topologies).
Memory is its assignment of buffers; times are the roofline of what the program computes, moves and
sends, from data sheets, so that no real step is faster.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh

from slm import models
from slm.base import console
from slm.models.config import DecoderConfig
from slm.models.decode import generate
from slm.runs import checkpoint
from slm.runs.config import RunConfig
from slm.training import hlo, program
from slm.weights import chips, sharding, tree
from slm.weights.count import forward_flops

# Without these libtpu asks the machine which TPU it is, and says on stderr that it is none.
_NO_TPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # no chip is held, so that compilations can run side by side
}
# How the compiler says that a program needs more memory than a chip has.
_NO_ROOM = (
  r'Used ([\d.]+\w) of ([\d.]+\w) hbm',
  r'temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)',
)
_REMAT = ('none', 'dots', 'full')  # what a backward pass recomputes, in the order of memory saved


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a program, a training step or the decoding of a batch, takes on one chip.

  Attributes:
    tokens: that all chips together train on, or append.
    memory: bytes by purpose; a key that starts with 'XLA' is the compiler's.
    flops: that are computed, recomputation included.
    model_flops: that the model needs (program.step_flops), of one chip.
    traffic: bytes read from and written to the chip's memory.
    collectives: communication, most bytes first.
    unknown: the number of loops whose length is not known: the two above count them once.
  """

  tokens: int
  memory: Mapping[str, float]
  flops: float
  model_flops: float
  traffic: float
  collectives: Sequence[hlo.Collective]
  unknown: int


class DoesNotFitError(ValueError):
  """A program needs more memory than a chip has."""


def devices(topology: str) -> list[Any]:
  """Return the devices of a slice of TPUs, named as v5e:16x16.

  Raises:
    ValueError: if libtpu is missing or knows no such slice.
  """
  if not re.fullmatch(chips.SLICE, topology):
    raise ValueError(
      f'--topology={topology}: expected KIND:SHAPE, such as v5e:16x16 or v5p:4x4x4: two sides for '
      'v5e and v6e, three for v4 and v5p'
    )
  if not importlib.util.find_spec('libtpu'):
    raise ValueError("--topology: compiling for TPUs needs libtpu: pip install 'slm[tpu]'")
  for name, value in _NO_TPU.items():
    os.environ.setdefault(name, value)
  # Programs for chips that are not here can be written to JAX's cache, but not read from it.
  jax.config.update('jax_enable_compilation_cache', False)
  # A chip of v4 is one device if its cores are joined; libtpu joins those of v5p by itself.
  options = {'chip_config_name': 'megacore'} if topology.startswith('v4') else {}
  try:
    found = topologies.get_topology_desc(topology, 'tpu', **options)
  except (RuntimeError, ValueError) as e:
    raise ValueError(f'--topology={topology}: {str(e).splitlines()[0]}') from None
  return list(found.devices)


def compile_step(
  cfg: RunConfig, slice_devices: list[Any], teacher: DecoderConfig | None = None
) -> Compiled:
  """Compile a run's training step for its mesh over these devices; nothing is computed.

  `teacher` is the shape of a distillation's teacher, which need not exist.

  Raises:
    DoesNotFitError: if the step needs more memory than a chip has, saying how much.
    ValueError: if the config does not fit the mesh.
  """
  mesh = sharding.make_mesh(vars(cfg.mesh), slice_devices)
  step = program.outline(cfg, mesh, teacher)
  return _compile(step.trace, step.kinds, mesh, step.flops, program.step_tokens(cfg))


def compile_decoding(cfg: RunConfig, slice_devices: list[Any], rows: int) -> Compiled:
  """Compile greedy decoding by a run's model, one specialist if it holds several, on its mesh.

  Of the context, the first half is the prompt, the rest is appended to all `rows` of them.

  Raises:
    DoesNotFitError: if the program needs more memory than a chip has, saying how much.
    ValueError: if weights or rows do not divide over the mesh, or nothing can be appended.
  """
  mesh = sharding.make_mesh(vars(cfg.mesh), slice_devices)
  if cfg.context < 2:
    raise ValueError(
      f'--decode: expected a context of a prompt and a token to append, found {cfg.context} tokens'
    )
  if rows % (shards := sharding.batch_devices(mesh)):
    raise ValueError(f'--decode={rows}: expected a multiple of the {shards} chips that split rows')
  model = models.build(cfg.model)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  shapes = jax.eval_shape(lambda x: tree.cast(x, jnp.dtype(cfg.dtype)), shapes)
  params = checkpoint.abstract(shapes, sharding.shardings(shapes, mesh))
  prompt = cfg.context // 2
  where = sharding.batch_sharding(mesh)
  prompts = jax.ShapeDtypeStruct((rows, prompt), jnp.int32, sharding=where)
  key = jax.eval_shape(lambda: jax.random.key(0))
  appended = cfg.context - prompt
  trace = lambda: generate.trace(model, params, prompts, prompts, key, max_tokens=appended)
  needed = rows * cfg.context * forward_flops(cfg.model, cfg.context)
  kinds = {'weights': params, 'batch': prompts}
  return _compile(trace, kinds, mesh, needed, rows * appended)


def _compile(
  trace: Callable[[], jax.stages.Traced],
  kinds: Mapping[str, Any],
  mesh: jax.sharding.Mesh,
  model_flops: float,
  tokens: int,
) -> Compiled:
  """Compile what `trace` gives; `kinds` are its arguments by purpose."""
  # A concrete mesh in the context would run eager operations on the chips, which are not here.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = trace()
    try:
      compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as e:
      raise _explained(e) from None
  text = hlo.Program(compiled.as_text())
  return Compiled(
    tokens,
    program.memory(kinds, compiled),
    flops(traced.jaxpr.jaxpr) / mesh.size,
    model_flops / mesh.size,
    text.traffic(),
    text.collectives(mesh.axis_names, mesh.devices.shape),
    len(text.unknown),
  )


def _explained(error: Exception) -> ValueError:
  """Turn an error of the compiler into one line."""
  text = str(error)
  for pattern in _NO_ROOM:
    if used := re.search(pattern, text):
      return DoesNotFitError(f'needs {used[1]} of {used[2]} bytes of memory on a chip')
  return ValueError(f'XLA: {text.splitlines()[0]}')


def flops(jaxpr: Any) -> float:
  """Count the FLOPs of the matrix products of a traced program, as often as its loops run.

  Kernels are flash.py's for TPUs: causal, with blocks of as many queries as keys.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    name, times = eqn.primitive.name, 1
    if name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      left = eqn.invars[0].aval.shape
      total += 2.0 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted)
    elif name.startswith('ragged_dot'):
      total += 2.0 * eqn.invars[0].aval.size * eqn.outvars[0].aval.shape[-1]
    if name == 'scan':
      times = eqn.params['length']
    elif name == 'pallas_call':  # splash: the blocks on and below the diagonal
      *outer, rows, columns = eqn.params['grid_mapping'].grid
      times = math.prod(outer) * rows * (columns + 1) / 2
    elif name == 'shard_map':
      mesh = eqn.params['mesh']
      (axes,) = (value for key, value in eqn.params.items() if key.endswith('manual_axes'))
      times = math.prod(mesh.shape[axis] for axis in axes)
    inner = [flops(sub) for sub in jaxprs_in_params(eqn.params)]
    total += times * (max(inner, default=0.0) if name == 'cond' else sum(inner))
  return total


def seconds(step: Compiled, chip: chips.Chip) -> dict[str, float]:
  """Return the least seconds of a step by what they are spent on."""
  return {
    'compute': step.flops / chip.flops,
    'memory': step.traffic / chip.bandwidth,
    'network': sum(c.bytes for c in step.collectives) / chip.network,
  }


def smaller(cfg: RunConfig, count: int) -> list[tuple[list[str], RunConfig]]:
  """Return what to set, KEY=VALUE, for the same computation in less memory, and its configs.

  Those that should add least time come first: ordered by what is computed again, then by the number
  of microbatches, each of which sends weights that are split again, then as `_meshes` orders them.
  """
  d, found = cfg.data, []
  groups = d.batch_size // d.accum // d.rows_per_group
  for i, mesh in enumerate(_meshes(cfg.mesh, count)):
    shape = sharding.mesh_shape(vars(mesh), count)
    split = sharding.batch_devices(AbstractMesh(shape, sharding.MESH_AXES))
    for factor in (n for n in range(1, groups // split + 1) if groups % (n * split) == 0):
      data = dataclasses.replace(d, accum=d.accum * factor)
      for j, remat in enumerate(_REMAT[_REMAT.index(cfg.model.remat) :]):
        model = dataclasses.replace(cfg.model, remat=remat)
        changed = dataclasses.replace(cfg, mesh=mesh, model=model, data=data)
        now = {f'mesh.{axis}': n for axis, n in vars(mesh).items() if n != vars(cfg.mesh)[axis]}
        now |= {'model.remat': remat} if j else {}
        now |= {'data.accum': data.accum} if factor > 1 else {}
        found.append(((j, factor, i), [f'{key}={x}' for key, x in now.items()], changed))
  found.sort(key=lambda option: option[0])
  return [(settings, changed) for _, settings, changed in found if settings]


def _meshes(mesh: sharding.MeshConfig, count: int) -> list[sharding.MeshConfig]:
  """Return a mesh and those that split weights over more chips, the one most like it first."""
  shape = sharding.mesh_shape(vars(mesh), count)
  _, _, tensor, expert = shape
  found = {shape: mesh}
  for other in (sharding.MeshConfig(1, -1, tensor, expert), sharding.MeshConfig(1, -1)):
    found.setdefault(sharding.mesh_shape(vars(other), count), other)
  return list(found.values())


def report(cfg: RunConfig, step: Compiled, topology: str, count: int, decode: int = 0) -> str:
  """Format what a step and the run take on a slice, or the decoding of `decode` rows."""
  chip = chips.of_slice(topology)
  lines: list[str] = []
  add = lambda title, value: lines.append(f'{title:28} {value}')
  mesh = sharding.mesh_shape(vars(cfg.mesh), count)
  shape = ', '.join(f'{a} {n}' for a, n in zip(sharding.MESH_AXES, mesh, strict=True) if n > 1)
  add('compiled for', f'{topology}, {count} chips; mesh {shape or "of one"}')
  total = sum(step.memory.values())
  add(
    'memory per chip', f'{total / 1e9:.3g} GB, {total / chip.bytes:.0%} of {chip.bytes / 1e9:.3g}'
  )
  lines += [f'  {name:26} {n / 1e9:.3g} GB' for name, n in step.memory.items()]
  add('collectives', 'bytes that each chip sends')
  merged: dict[tuple, list[float]] = {}
  for c in step.collectives:
    entry = merged.setdefault((c.kind, c.axes), [0, 0.0])
    entry[0], entry[1] = entry[0] + c.count, entry[1] + c.bytes
  for (kind, axes), (times, moved) in sorted(merged.items(), key=lambda x: -x[1][1]):
    over = ', '.join(axes) or 'one chip'
    lines.append(f'  {kind:18} {over:14} {times:6,} times {moved / 1e6:12,.1f} MB')
  bounds = seconds(step, chip)
  add('FLOPs per chip', f'{step.flops:.3g}, {step.model_flops / step.flops:.0%} of them the model')
  add('memory traffic per chip', f'{step.traffic / 1e9:.3g} GB')
  if step.unknown:
    add('counted once', f'{step.unknown} loops whose length is not known')
  least = max(bounds.values())
  parts = ', '.join(f'{name} {1e3 * t:.3g} ms' for name, t in bounds.items())
  what = 'decoding' if decode else 'step'
  add(what, f'at least {1e3 * least:.3g} ms ({parts})')
  mfu = step.model_flops / (least * chip.flops)
  add('tokens/s', f'at most {step.tokens / least:,.0f}, an MFU of {mfu:.0%}')
  if not decode:
    cost = program.run_cost(cfg, least, count)
    whole = f'{cost["tokens"]:.3g} tokens in {console.duration(3600 * cost["hours"])}'
    add('run', f'{cfg.steps:,} steps, {whole} or more, {cost["chip-hours"]:,.3g} chip-hours')
  return '\n'.join(lines)
