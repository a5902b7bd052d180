"""Measure what pruning costs beside what it must cost: import, calibration, distillation, decoding.

python -m experiments.speed.minitron --scale=cpu --out=experiments/speed/results
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.speed.run import machine
from experiments.speed.steps import HYPER, make_batch
from slm import models, objectives, reparam
from slm.base import console, files
from slm.data.loader import DataConfig
from slm.inference import latency
from slm.interchange import convert
from slm.models.config import DecoderConfig
from slm.objectives import losses
from slm.pruning import measure
from slm.runs import load
from slm.runs.config import RunConfig, section
from slm.training import optim
from slm.training.step import init_state, make_sums, make_train_step
from slm.weights import sharding

Entry = Callable[[], None]
OBJECTIVES = {
  'next_token': {'name': 'next_token', 'chunk': 512},
  'distill': {
    'name': 'distill', 'chunk': 256, 'temperature': 1.0, 'mixing': 1.0, 'kl': 'forward',
  },
}  # fmt: skip


def _shape(embed: int, mlp: int, num_layers: int, heads: int, kv: int, vocab: int) -> DecoderConfig:
  return DecoderConfig(
    vocab=vocab, embed=embed, mlp=mlp, num_layers=num_layers, num_heads=heads, num_kv_heads=kv,
    head_dim=64,
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
  """What is measured: a teacher, and the student that keeps half its neurons and 3/4 channels."""

  teacher: DecoderConfig
  rows: int
  context: int

  @property
  def student(self) -> DecoderConfig:
    """Return the shape whose speed the bar is about."""
    t = self.teacher
    return dataclasses.replace(t, embed=3 * t.embed // 4, mlp=t.mlp // 2)


SCALES = {
  'smoke': Scale(_shape(64, 128, 2, 2, 1, 256), 2, 32),
  'cpu': Scale(_shape(768, 2048, 12, 12, 4, 32_000), 4, 256),
}


def built(cfg: DecoderConfig) -> tuple[models.Model, Any]:
  """Return a model and random weights."""
  model = models.build(cfg)
  return model, jax.jit(model.init)(jax.random.key(0))


def importing(scale: Scale, folder: Path) -> dict[str, Entry]:
  """Return reading a checkpoint's bytes, and reading it as a model."""
  _, params = built(scale.teacher)
  run, path = folder / 'run', folder / 'hf'
  cfg = RunConfig(steps=0, context=scale.context, model=scale.teacher, data=DataConfig())
  load.write_dense(run, cfg, params, [])
  convert.export_model(run, path)
  weights = [p for p in path.iterdir() if p.suffix == '.safetensors']
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])

  def read() -> None:
    for file in weights:
      np.fromfile(file, np.uint8).sum()  # a mapping would not touch the pages

  def take() -> None:
    jax.block_until_ready(convert.read(path, mesh)[1])

  return {'read the bytes': read, 'import': take}


# The high-water mark of this program's own memory: that of getrusage survives an exec.
_PEAK = """
import sys, jax
from slm.weights import sharding
from slm.interchange import convert
def most():
  lines = open('/proc/self/status').read().split('\\n')
  return 1024 * int(next(x for x in lines if x.startswith('VmHWM')).split()[1])
mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
jax.numpy.zeros(8).block_until_ready()
before = most()
params = convert.read(sys.argv[1], mesh)[1]
jax.block_until_ready(params)
print(most() - before, max(x.nbytes for x in jax.tree.leaves(params)),
      sum(x.nbytes for x in jax.tree.leaves(params)))
"""


def peak(path: Path) -> dict[str, int]:
  """Measure a fresh process's most memory while it imports, above what it had before."""
  command = [sys.executable, '-c', _PEAK, str(path)]
  out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
  return dict(zip(('peak', 'largest leaf', 'model'), map(int, out), strict=True))


def calibrating(scale: Scale) -> dict[str, Entry]:
  """Return a forward pass, and one that sums what calibration wants."""
  model, params = built(scale.teacher)
  batch = make_batch(scale.teacher.vocab, scale.rows, scale.context)
  batch = jax.device_put({name: x[0, :, 0] for name, x in batch.items() if x.ndim == 4})
  forward = jax.jit(lambda p, b: model.forward(p, b).hidden)
  summed = measure.summing(measure.activations(model, 'float32'))
  return {
    'forward': lambda: forward(params, batch).block_until_ready(),
    'calibrate': lambda: summed(params, batch),
  }


def training(scale: Scale) -> dict[str, Entry]:
  """Return the student's training step, the teacher's forward pass, and the distillation step."""
  batch = jax.device_put(make_batch(scale.teacher.vocab, scale.rows, scale.context))
  teacher, weights = built(scale.teacher)
  flat = {name: x[0, :, 0] for name, x in batch.items() if x.ndim == 4}
  forward = jax.jit(lambda p, b: losses.token_losses(teacher.forward, p, b, 512))
  found = {'teacher forward': lambda: forward(weights, flat).block_until_ready()}
  for name, cfg in OBJECTIVES.items():
    model = models.build(scale.student)
    rep = reparam.build(section('reparam', {'name': 'full'}), model.init)
    passes = {'student': reparam.map_groups(rep, model.forward), 'teacher': teacher.forward}
    tx = optim.build(section('optim', HYPER), lambda step: 1e-3, rep.independent)
    sums = make_sums(objectives.build(section('objective', cfg), passes), rep, 'float32')
    state = jax.jit(lambda t, tx=tx: init_state(t, tx, {}))(jax.jit(rep.init)(jax.random.key(0)))
    frozen = {'teacher': weights} if name == 'distill' else {}
    step = jax.jit(make_train_step(sums, tx), donate_argnums=0)
    held = [state]

    def one(held=held, step=step, frozen=frozen) -> None:
      held[0], metrics = step(held[0], frozen, batch)
      jax.block_until_ready((held[0], metrics))

    found[f'{name} step'] = one
  return found


def bars(entries: dict[str, list[float]], memory: dict[str, int], scale: Scale, speed) -> list:
  """Return each bar's value by medians: (what, value, bar)."""
  s = {name: statistics.median(seconds) for name, seconds in entries.items()}
  moved = {n: latency.predicted(getattr(scale, n), 160, 'float32') for n in ('teacher', 'student')}
  volume = lambda n: moved[n]['weight_bytes'] + moved[n]['cache_bytes']
  by_bytes, by_flops = (
    volume('teacher') / volume('student'), moved['teacher']['flops'] / moved['student']['flops']
  )  # fmt: skip
  faster = speed['teacher']['token'] / speed['student']['token']
  parts = s['next_token step'] + s['teacher forward']
  allowed = memory['model'] + memory['largest leaf']
  return [
    ('import / reading the bytes, seconds', s['import'] / s['read the bytes'], '<= 2'),
    ('peak memory of an import / (model + one stacked tensor)', memory['peak'] / allowed, '<= 1'),
    ('calibration / forward pass, seconds', s['calibrate'] / s['forward'], '<= 1.15'),
    ('distillation step / (step + forward of the teacher)', s['distill step'] / parts, '<= 1.1'),
    ('decode speed-up / predicted by bytes', faster / by_bytes, '0.85 to 1.15'),
    ('decode speed-up / predicted by FLOPs', faster / by_flops, '0.85 to 1.15'),
  ]


def measured(scale: Scale, rounds: int) -> dict[str, Any]:
  """Measure everything of a scale."""
  with tempfile.TemporaryDirectory() as folder:
    entries = importing(scale, Path(folder))
    memory = peak(Path(folder) / 'hf')
    times = latency.interleave(entries, rounds)
  for make in (calibrating, training):
    times |= latency.interleave(make(scale), rounds)
  shapes = {n: getattr(scale, n) for n in ('teacher', 'student')}
  speed = latency.measure(shapes, 'float32', 1, 128, 64, rounds)
  found = bars(times, memory, scale, speed)
  return {
    'machine': machine(), 'rounds': rounds, 'seconds': times, 'memory': memory, 'speed': speed,
    'bars': [dict(zip(('what', 'value', 'bar'), bar, strict=True)) for bar in found],
  }  # fmt: skip


def table(result: dict[str, Any]) -> str:
  """Write the markdown of a result."""
  lines = ['# What pruning costs', '', '| ratio of medians | value | bar |', '| --- | --- | --- |']
  lines += [f'| {b["what"]} | {b["value"]:.2f} | {b["bar"]} |' for b in result['bars']]
  lines += ['', '| contestant | median s | min s | max s |', '| --- | --- | --- | --- |']
  for name, s in result['seconds'].items():
    lines.append(f'| {name} | {statistics.median(s):.3f} | {min(s):.3f} | {max(s):.3f} |')
  lines += ['', *(f'- {name}: {value / 1e6:,.0f} MB' for name, value in result['memory'].items())]
  lines += [f'- {name}: {value}' for name, value in result['machine'].items()]
  return '\n'.join([*lines, ''])


def main(_: list[str]) -> None:
  """Measure a scale and write its json and markdown."""
  console.required('out')
  f = flags.FLAGS
  if f.scale not in SCALES:
    raise ValueError(f'--scale: expected one of {sorted(SCALES)}, found {f.scale!r}')
  result, out = measured(SCALES[f.scale], f.rounds), Path(f.out)
  files.write_text(out / f'minitron-{f.scale}.json', json.dumps(result, indent=2) + '\n')
  files.write_text(out / f'minitron-{f.scale}.md', table(result))
  print(table(result))


if __name__ == '__main__':
  flags.DEFINE_string('scale', 'cpu', f'One of {sorted(SCALES)}.')
  flags.DEFINE_string('out', 'experiments/speed/results', 'Directory of the results.')
  flags.DEFINE_integer('rounds', 15, 'Interleaved repeats.', 1)
  console.run(main)
