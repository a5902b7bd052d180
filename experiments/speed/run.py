"""Measure training and decoding speed beside torch and `transformers`.

python -m experiments.speed.run --scale=cpu --out=experiments/speed/results
"""

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from experiments.speed import report, steps
from slm.base import console, files
from slm.inference import latency


class Training(NamedTuple):
  """A batch of a decoder, who takes a step on it, and the teacher of who distils."""

  model: Mapping[str, Any]
  rows: int
  context: int
  who: tuple[str, ...]
  teacher: Mapping[str, Any] | None = None


class Decoding(NamedTuple):
  """Numbers of prompts that are continued greedily with a cache, and by whom."""

  model: Mapping[str, Any]
  rows: tuple[int, ...]
  prompt: int
  new_tokens: int
  who: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Scale:
  """What is measured.

  Attributes:
    train: batches by the name that their rows of the table have.
    gemms: matrix products (m, k, n), each repeated to about `work` multiply-adds.
    bars: what the ratio of a row should be, see report.ratios.
    alone: rows are measured one by one, those of a library in a process of its own, which has the
      memory of the device; else they are interleaved, so that other work of the machine affects all
      alike.
    limit: seconds after which nothing more is measured; 0: none.
  """

  dtype: str
  train: Mapping[str, Training]
  decode: Decoding
  gemms: tuple[tuple[int, int, int], ...]
  work: float
  rounds: int
  bars: Mapping[str, str] = dataclasses.field(default_factory=dict)
  alone: bool = False
  limit: float = 0.0


def decoder(embed: int, num_layers: int, head_dim: int, mlp: int, **rest: Any) -> dict[str, Any]:
  """Return a decoder with as many heads as fill its width."""
  heads = embed // head_dim
  shape = {'vocab': 8192, 'num_heads': heads, 'num_kv_heads': heads, 'head_dim': head_dim}
  shape |= {'embed': embed, 'num_layers': num_layers, 'mlp': mlp}
  return {'name': 'decoder', **shape, **rest}


OTHERS = ('torch', 'torch.compile', 'transformers')  # all in torch
EVERYBODY = (
  'slm', 'slm, reference attention', 'slm, projected k=16', 'slm, distilled', 'torch',
  'torch.compile',
)  # fmt: skip
DECODERS = ('slm', 'transformers', 'torch.compile')
CPU, TINY = decoder(256, 8, 32, 688), decoder(32, 2, 16, 64)
SMOLLM_135M = decoder(576, 30, 64, 1536, vocab=49_152, num_kv_heads=3)
SMOLLM_360M = decoder(960, 32, 64, 2560, vocab=49_152, num_kv_heads=5)
LARGE = decoder(2048, 24, 128, 5632, vocab=32_768, remat='dots')

SCALES = {
  'smoke': Scale(
    'float32',
    {'train toy': Training(TINY, 2, 16, EVERYBODY, TINY), 'train': Training(TINY, 2, 8, ('slm',))},
    Decoding(TINY, (1, 2), 4, 4, DECODERS),
    gemms=((64, 64, 64),),
    work=1e6,
    rounds=2,
    alone=True,
    limit=300.0,
  ),
  'cpu': Scale(
    'float32',
    {
      'train': Training(
        CPU, 8, 512,
        ('slm', 'slm, projected k=16', "slm, projected's specialist", 'torch', 'torch.compile'),
      ),
    },
    Decoding(CPU, (1, 8), 32, 128, ('slm', 'transformers')),
    gemms=((4096, 256, 688), (4096, 256, 1024), (2048, 2048, 2048)),
    work=2e10,
    rounds=20,
    bars={
      'train: torch': '>= 1.3',
      'train: torch.compile': '>= 1.15',
      'train: slm, projected k=16': '<= 1.3',
      "train: slm, projected's specialist": '1',
      'decode 1: transformers': '>= 3',
      'decode 8: transformers': '>= 2',
      'gemm 4096x256x688': '>= 0.6',
      'gemm 4096x256x1024': '>= 0.6',
      'gemm 2048x2048x2048': '>= 0.6',
    },
  ),
  'gpu': Scale(
    'bfloat16',
    {
      'train 135M': Training(SMOLLM_135M, 8, 2048, EVERYBODY, SMOLLM_360M),
      'train 1.3B': Training(LARGE, 8, 1024, ('slm', 'torch', 'torch.compile')),
    },
    Decoding(SMOLLM_135M, (1, 8, 64), 32, 128, DECODERS),
    gemms=((16_384, 576, 1536), (8192, 2048, 5632), (8192, 8192, 8192)),
    work=2e13,
    rounds=5,
    alone=True,
    limit=450.0,
  ),
}  # fmt: skip


def contestants(scale: Scale) -> dict[str, Callable[[], steps.Row]]:
  """Return by row of the table what makes it ready to be timed."""
  found: dict[str, Callable[[], steps.Row]] = {}
  for shape in scale.gemms:
    name = f'gemm {"x".join(map(str, shape))}'
    found[name] = functools.partial(steps.gemm, *shape, scale.dtype, scale.work)
  for batch, load in scale.train.items():
    for who in load.who:
      found[f'{batch}: {who}'] = functools.partial(_training, load, who, scale.dtype)
  for who in scale.decode.who:
    for rows in scale.decode.rows:
      name = f'decode {rows}: {who}'
      found[name] = functools.partial(_decoding, scale.decode, rows, who, scale.dtype)
  return found


def _training(load: Training, who: str, dtype: str) -> steps.Row:
  batch = (load.rows, load.context, dtype)
  if who in OTHERS:
    from experiments.speed import reference  # torch: ten seconds, and not in slm's processes

    facts = steps.work(load.model, load.rows, load.context)
    inputs = steps.make_batch(load.model['vocab'], load.rows, load.context)
    run = reference.train_step(load.model, inputs, dtype, compiled=who == 'torch.compile')
    return run, facts
  if who == 'slm, reference attention':
    return steps.train_step({**load.model, 'attention': 'reference'}, *batch)
  if who == 'slm, projected k=16':
    return steps.train_step(load.model, *batch, rep=steps.PROJECT)
  if who == 'slm, distilled':
    return steps.train_step(load.model, *batch, teacher=load.teacher)
  return steps.train_step(load.model, *batch)  # a projected network's specialist is dense too


def _decoding(load: Decoding, rows: int, who: str, dtype: str) -> steps.Row:
  lengths = (rows, load.prompt, load.new_tokens, dtype)
  if who not in OTHERS:
    return steps.decode(load.model, *lengths)
  from experiments.speed import reference

  run = reference.decode(load.model, *lengths, compiled=who == 'torch.compile')
  return run, {'tokens': rows * load.new_tokens}


def measure(
  names: list[str], makers: Mapping[str, Callable[[], steps.Row]], rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
  """Measure rows interleaved; return their entries, and why others could not be measured."""
  made, missing = {}, {}
  for name in names:
    try:
      made[name] = makers[name]()
    except (RuntimeError, ImportError) as error:  # no memory, no compiler, no torch
      missing[name] = _line(error)
  try:
    times = latency.interleave({name: run for name, (run, _) in made.items()}, rounds)
  except (RuntimeError, ImportError) as error:
    return {}, missing | dict.fromkeys(made, _line(error))
  return {name: made[name][1] | {'seconds': s} for name, s in times.items()}, missing


def _line(error: Exception) -> str:
  return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'[:300]


def free() -> None:
  """Give back what the last rows held on the device."""
  jax.clear_caches()
  gc.collect()
  if 'torch' in sys.modules:
    sys.modules['torch'].compiler.reset()
    sys.modules['torch'].cuda.empty_cache()


class Table:
  """The result of a scale, in a directory; written whenever something is measured."""

  def __init__(self, name: str, out: Path):
    self.name, self.path = name, out / f'{name}.json'

  def begin(self, rounds: int, busy: int) -> None:
    """Write a table without rows."""
    self.path.parent.mkdir(parents=True, exist_ok=True)
    about = machine() | {'processes that computed meanwhile': str(busy)}
    start = {'scale': self.name, 'machine': about, 'rounds': rounds}
    self._write(start | {'entries': {}, 'ratios': [], 'missing': {}})

  def read(self) -> dict[str, Any]:
    """Return what was measured so far."""
    return files.read_json(self.path)

  def add(self, entries: Mapping[str, Any], missing: Mapping[str, str]) -> None:
    """Add rows, and the reasons of rows that there are not."""
    result = self.read()
    result['entries'] |= entries
    both = result['missing'] | missing
    result['missing'] = {name: why for name, why in both.items() if name not in result['entries']}
    result['ratios'] = report.ratios(result['entries'], SCALES[self.name].bars)
    self._write(result)

  def _write(self, result: Mapping[str, Any]) -> None:
    files.write_text(self.path, json.dumps(result, indent=2) + '\n')
    files.write_text(self.path.with_suffix('.md'), report.table(result))


def groups(scale: Scale, names: list[str]) -> Iterator[list[str]]:
  """Yield rows that are measured together."""
  if scale.alone:
    yield from ([name] for name in names)
    return
  for decoding in (False, True):
    if group := [n for n in names if n.startswith('decode') == decoding]:
      yield group


def here(scale: Scale, names: list[str], rounds: int, table: Table) -> None:
  """Measure rows in this process."""
  makers = contestants(scale)
  if unknown := sorted(set(names) - set(makers)):
    raise ValueError(f'--row: expected some of {list(makers)}, found {unknown[0]!r}')
  for group in groups(scale, names):
    table.add(*measure(group, makers, rounds))
    free()


def in_turn(scale: Scale, rounds: int, limit: float, table: Table) -> None:
  """Measure the rows of slm, and then of torch, each library's in a process of its own.

  A row that its process does not survive is named in the table, and the next ones are measured in
  another process. Rows that the limit, in seconds, leaves no time for are named too.
  """
  end = time.monotonic() + limit
  names = list(contestants(scale))
  torch = [name for name in names if name.rpartition(': ')[2] in OTHERS]
  for left in ([name for name in names if name not in torch], torch):
    # What JAX takes of a GPU's memory at its start, torch would lack.
    env = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': str(left != torch).lower()}
    while left:
      command = [sys.executable, '-m', 'experiments.speed.run', f'--scale={table.name}']
      command += [f'--rounds={rounds}', f'--out={table.path.parent}', *(f'--row={n}' for n in left)]
      try:
        timeout = max(end - time.monotonic(), 0.1) if limit else None
        status = subprocess.run(command, env=env, timeout=timeout).returncode
        reason = f'its process ended with status {status}'
      except subprocess.TimeoutExpired:
        reason = f'--limit={limit:g} seconds were over'
      done = table.read()
      left = [n for n in left if n not in done['entries'] and n not in done['missing']]
      over = bool(limit) and time.monotonic() > end
      table.add({}, dict.fromkeys(left if over else left[:1], reason))
      left = [] if over else left[1:]


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
  """Keep as many processes computing, as other work of a machine would."""
  others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(count)]
  try:
    yield
  finally:
    for other in others:
      other.kill()
      other.wait()


def machine() -> dict[str, str]:
  """Name what is measured on, and with which versions."""
  device, threads = jax.devices()[0], len(os.sched_getaffinity(0))
  versions = {}
  for package in ('jax', 'torch', 'transformers'):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = "not installed: pip install -e '.[reference]'"
  return {
    'device': f'{device.platform} {device.device_kind}',
    'processor': f'{platform.machine()}, {os.cpu_count()} cores, {threads} threads of torch',
    'load before': f'{os.getloadavg()[0]:.2f}',
    'GLIBC_TUNABLES': os.environ.get('GLIBC_TUNABLES', 'none'),
    'python': platform.python_version(),
    **versions,
  }


def main(_: list[str]) -> None:
  """Measure a scale and write its json, markdown and plot."""
  console.required('out')
  f = flags.FLAGS
  if f.scale not in SCALES:
    raise ValueError(f'--scale: expected one of {sorted(SCALES)}, found {f.scale!r}')
  scale, table = SCALES[f.scale], Table(f.scale, Path(f.out))
  rounds, limit = f.rounds or scale.rounds, scale.limit if f.limit is None else f.limit
  alone = scale.alone and not f.row
  if alone:  # the memory is for the processes that measure
    os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  if f.scale == 'gpu' and jax.default_backend() != 'gpu':
    raise ValueError(f'--scale=gpu: expected a GPU, found {jax.default_backend()}')
  if not f.row or not table.path.exists():
    table.begin(rounds, f.busy)
  with busy(f.busy):
    if alone:
      in_turn(scale, rounds, limit, table)
    else:
      here(scale, f.row or list(contestants(scale)), rounds, table)
  if not f.row:
    result = table.read()
    report.plot(result, table.path.with_suffix('.png'))
    print(report.table(result))


if __name__ == '__main__':
  flags.DEFINE_string('scale', 'cpu', f'One of {sorted(SCALES)}.')
  flags.DEFINE_string('out', 'experiments/speed/results', 'Directory of the results.')
  flags.DEFINE_integer('rounds', 0, "Repeats of every row; 0: the scale's.", 0)
  flags.DEFINE_float(
    'limit', None, "Seconds for all processes of gpu and smoke, 0: none; by default the scale's."
  )
  flags.DEFINE_integer('busy', 0, 'Other processes that compute meanwhile.', 0)
  flags.DEFINE_multi_string('row', [], 'Measure this row alone, and add it to the table.')
  console.run(main)
