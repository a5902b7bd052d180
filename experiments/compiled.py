"""Compile the training steps of a study for a slice of TPUs that is not here, as slm.compile does.

What a compilation says is kept in a directory and not asked for again, while compiler and code are
the same; steps that are the same program are compiled once.
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from slm.base import artifact, console, files, schema
from slm.models.config import DecoderConfig
from slm.reporting import tables
from slm.runs import load
from slm.runs.config import RunConfig
from slm.training import aot, program
from slm.weights import chips, sharding
from slm.weights.tree import flatten

# The parts of a config that decide which program a step is.
_PROGRAM = ('model', 'reparam', 'objective', 'optim', 'mesh', 'dtype', 'context')
_ROWS = ('batch_size', 'accum', 'rows_per_group', 'level', 'order')
# The packages of slm that a step is made of, and counted by.
_CODE = ('models', 'objectives', 'reparam', 'runs', 'training', 'weights')


@dataclasses.dataclass(frozen=True)
class Run:
  """A training of a study, without data or weights; `teacher` is the shape of its teacher."""

  name: str
  cfg: RunConfig
  teacher: DecoderConfig | None = None


def define_flag() -> None:
  """Define the flag with which a study is compiled instead of run."""
  flags.DEFINE_string(
    'topology', '', 'KIND:SHAPE of a slice, such as v5e:16x16, to compile the runs for; run none.'
  )


def keep(path: Path, topology: str, run: Run, decode: int = 0) -> dict[str, Any]:
  """Return what a step, or the decoding of `decode` rows, takes on a slice; compile it if new.

  `path` keeps it as JSON, and beside it the report as text. It is new too if program, compiler or
  code were others, and if it failed otherwise than for lack of memory.
  """
  asked = {'topology': topology, 'decode': decode, 'program': digest(run)}
  if path.exists():
    found = files.read_json(path)
    if found.get('final') and all(found.get(key) == value for key, value in asked.items()):
      return found
  theta = jax.eval_shape(load.build(run.cfg)[1].init, jax.random.key(0))
  about = {
    'chips': len(aot.devices(topology)), 'trained': sum(x.size for _, x in flatten(theta))
  }  # fmt: skip
  context = multiprocessing.get_context('spawn')
  try:  # a process each: XLA keeps memory, and may end the process
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
      found, text = pool.submit(_compile, topology, run, decode).result()
  except concurrent.futures.process.BrokenProcessPool:
    found, text = {'error': 'the compiler ended its process', 'final': False}, ''
  if text:
    files.write_text(path.with_suffix('.txt'), text + '\n')
  else:
    path.with_suffix('.txt').unlink(missing_ok=True)
  files.write_json(path, asked | about | found)
  return files.read_json(path)


def _compile(topology: str, run: Run, decode: int) -> tuple[dict[str, Any], str]:
  """Compile for a slice; return what is found, and the report, '' of what does not compile."""
  devices, cfg, began = aot.devices(topology), run.cfg, time.monotonic()
  found, text = {'final': True}, ''
  try:
    if decode:
      step = aot.compile_decoding(cfg, devices, decode)
    else:
      step = aot.compile_step(cfg, devices, run.teacher)
  except ValueError as e:
    found |= {'error': str(e), 'final': isinstance(e, aot.DoesNotFitError)}
  else:
    chip = chips.of_slice(topology)
    found |= dataclasses.asdict(step) | {'seconds': aot.seconds(step, chip)}
    found['mesh'] = sharding.mesh_shape(vars(cfg.mesh), len(devices))
    found['memory share'] = sum(step.memory.values()) / chip.bytes
    found['mfu'] = step.model_flops / (max(found['seconds'].values()) * chip.flops)
    text = aot.report(cfg, step, topology, len(devices), decode)
  return found | {'compile seconds': time.monotonic() - began}, text


def study(runs: Sequence[Run], topology: str, out: Path) -> str:
  """Compile the steps of a study's runs; return a table of a row per run, and the sum.

  A run whose rows do not divide over all chips takes the largest smaller slice over which they do.
  OUT/compiled holds a file per program and slice, OUT/compiled-KIND-SHAPE.md the table.
  """
  aot.devices(topology)  # says what is missing before a process is started
  steps = [(run, *_program(run, topology)) for run in runs]
  found: dict[str, dict[str, Any]] = {}
  with artifact.hold(out), console.Progress('compile', len(runs), 'runs') as progress:
    for run, chosen, name in steps:
      progress.say(run.name)
      if name not in found:
        path = out / 'compiled' / f'{name}.json'
        found[name] = keep(path, chosen, run)
      progress.update(1)
    rows = [(run, found[name]) for run, _, name in steps]
    file = out / f'compiled-{topology.replace(":", "-")}.md'
    files.write_text(file, tables.markdown(_table(rows)))
  cost = sum(_cost(run, step) for run, step in rows if 'error' not in step)
  refused = sum('error' in step for _, step in rows)
  failed = f'; {refused} that do not compile or fit are left out' if refused else ''
  return (
    f'{tables.text(_table(rows))}\nin all {len(runs)} runs of {len(found)} programs, at least '
    f'{cost:,.3g} chip-hours{failed}'
  )


def _program(run: Run, topology: str) -> tuple[str, str]:
  """Return the slice that a run is compiled for, and a name of its program there."""
  kind = topology.partition(':')[0]
  d = run.cfg.data
  groups = d.batch_size // d.accum // d.rows_per_group
  count = whole = len(aot.devices(topology))
  while count > 4 and not _divides(run.cfg, groups, count):
    count = 2 ** ((count - 1).bit_length() - 1)  # the next smaller power of two
  if count < whole and _divides(run.cfg, groups, count):
    topology = chips.slice_of(chips.TPUS[kind], count)
  return topology, f'{topology.replace(":", "-")}/{digest(run)}'


def digest(run: Run) -> str:
  """Return a name of the program that a run's step is: of shapes and options, not text or rates.

  It is another one with another compiler or other code.
  """
  given = schema.plain(run.cfg)
  key = {name: given[name] for name in _PROGRAM} | {name: given['data'][name] for name in _ROWS}
  key |= {'teacher': run.teacher and schema.plain(run.teacher), **_made_by()}
  return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def _made_by() -> dict[str, str]:
  """Return the versions of JAX and libtpu, '' without it, and a hash of the code of a step.

  A commit is none: most change something else, and what is compiled takes hours.
  """
  try:
    libtpu = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    libtpu = ''
  root, code = Path(aot.__file__).parents[1], hashlib.sha256()
  for path in sorted(path for part in _CODE for path in (root / part).rglob('*.py')):
    code.update(path.read_bytes())
  return {'jax': jax.__version__, 'libtpu': libtpu, 'code': code.hexdigest()}


def _divides(cfg: RunConfig, groups: int, count: int) -> bool:
  """Return whether groups of rows divide over the devices of a run's mesh that split them."""
  try:
    shape = sharding.mesh_shape(vars(cfg.mesh), count)
  except ValueError:  # a mesh of so many devices and no others
    return False
  sizes = dict(zip(sharding.MESH_AXES, shape, strict=True))
  return groups % math.prod(sizes[axis] for axis in sharding.RULES['batch']) == 0


def _cost(run: Run, step: dict[str, Any]) -> float:
  """Return the least chip-hours of a run."""
  return program.run_cost(run.cfg, max(step['seconds'].values()), step['chips'])['chip-hours']


def _table(rows: Sequence[tuple[Run, dict[str, Any]]]) -> tables.Table:
  head = [
    'run', 'slice', 'fits', 'memory, GB', 'of the chip', 'step at least', 'limit', 'steps',
    'chip-hours at least', 'why not',
  ]  # fmt: skip
  return head, [[run.name, step['topology'], *_row(run, step)] for run, step in rows]


def _row(run: Run, step: dict[str, Any]) -> list[str]:
  if 'error' in step:
    return ['no', *['–'] * 4, f'{run.cfg.steps:,}', '–', step['error']]
  seconds = step['seconds']
  limit = max(seconds, key=seconds.get)
  return [
    'yes',
    f'{sum(step["memory"].values()) / 1e9:.3g}',
    f'{step["memory share"]:.0%}',
    f'{1e3 * seconds[limit]:.3g} ms',
    limit,
    f'{run.cfg.steps:,}',
    f'{_cost(run, step):,.3g}',
    '',
  ]
