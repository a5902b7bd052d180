"""Measure training and decoding speed beside torch and `transformers`, interleaved.

python -m experiments.speed.run --scale=cpu --out=experiments/speed/results
"""

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments.speed import reference
from slm import models, objectives, reparam
from slm.base import console, files
from slm.inference import latency
from slm.runs.config import section
from slm.training import optim
from slm.training.step import init_state, make_sums, make_train_step
from slm.weights import tree
from slm.weights.count import forward_flops, num_params

HYPER = {'clip': 1.0, 'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1}
CLUSTERS = 16
COMPILED = 'train: torch.compile'


@dataclasses.dataclass(frozen=True)
class Scale:
  """What is measured: the contestants' shape, a training batch, decoding lengths, GEMMs."""

  model: dict[str, Any]
  rows: int
  context: int
  dtype: str
  prompt: int
  new_tokens: int
  gemms: tuple[tuple[int, int, int], ...]  # m, k, n; the model's rate is a share of each
  large: dict[str, Any] | None = None  # a second decoder, measured alone
  large_rows: int = 0


def decoder(embed: int, num_layers: int, head_dim: int, mlp: int, **rest: Any) -> dict[str, Any]:
  """Return a decoder with as many heads as fill its width."""
  heads = embed // head_dim
  shape = {'vocab': 8192, 'num_heads': heads, 'num_kv_heads': heads, 'head_dim': head_dim}
  shape |= {'embed': embed, 'num_layers': num_layers, 'mlp': mlp}
  return {'name': 'decoder', **shape, **rest}


SCALES = {
  'smoke': Scale(decoder(32, 2, 16, 64), 2, 16, 'float32', 4, 4, ((64, 64, 64),)),
  'cpu': Scale(
    decoder(256, 8, 32, 688),
    8,
    512,
    'float32',
    32,
    128,
    ((4096, 256, 688), (4096, 256, 1024), (2048, 2048, 2048)),
  ),
  'gpu': Scale(
    decoder(1024, 12, 64, 2752),
    32,
    1024,
    'bfloat16',
    32,
    128,
    ((32768, 1024, 4096), (8192, 8192, 8192)),
    large=decoder(2048, 24, 128, 5632, vocab=32768, remat='dots'),
    large_rows=8,
  ),
}


def make_batch(vocab: int, rows: int, context: int) -> dict[str, np.ndarray]:
  """Return random rows [1 microbatch, rows groups, 1 row, context], one document each."""
  tokens = np.random.default_rng(0).integers(0, vocab, (1, rows, 1, context + 1)).astype(np.int32)
  shape = (1, rows, 1, context)
  return {
    'inputs': tokens[..., :-1],
    'targets': tokens[..., 1:],
    'weights': np.ones(shape, np.float32),
    'segments': np.ones(shape, np.int32),
    'positions': np.broadcast_to(np.arange(context, dtype=np.int32), shape),
    'condition': np.arange(rows, dtype=np.int32)[None] % CLUSTERS,
  }


def train_step(
  cfg: dict[str, Any], rep_cfg: dict[str, Any], scale: Scale, rows: int
) -> tuple[Callable[[], None], dict[str, Any]]:
  """Return a compiled training step of slm as a function of nothing, and facts about it."""
  model = models.build(section('model', cfg))
  rep = reparam.build(section('reparam', rep_cfg), model.init)
  forward = {'student': reparam.map_groups(rep, model.forward)}
  objective = objectives.build(section('objective', {'name': 'next_token', 'chunk': 512}), forward)
  tx = optim.build(section('optim', HYPER), lambda step: 1e-3, rep.independent)
  step = make_train_step(make_sums(objective, rep, scale.dtype), tx, rep.independent)
  theta = jax.jit(rep.init)(jax.random.key(0))
  state = jax.jit(lambda t: init_state(t, tx, {}))(theta)
  batch = jax.device_put(make_batch(model.cfg.vocab, rows, scale.context))
  began = time.monotonic()
  compiled = jax.jit(step, donate_argnums=0).lower(state, {}, batch).compile()
  facts = {
    'tokens': rows * scale.context,
    'flops': 3 * forward_flops(model.cfg, scale.context) * rows * scale.context,
    'parameters': sum(num_params(model.cfg).values()),
    'trained_parameters': sum(x.size for x in jax.tree.leaves(theta)),
    'compile_seconds': time.monotonic() - began,
  }
  held = [state]

  def run() -> None:
    held[0], metrics = compiled(held[0], {}, batch)
    jax.block_until_ready((held[0], metrics))

  return run, facts


def specialist_step(cfg: dict[str, Any], scale: Scale) -> tuple[Callable[[], None], dict[str, Any]]:
  """Return the training step of a dense model; a projected network's specialist is one."""
  return train_step(cfg, {'name': 'full'}, scale, scale.rows)


def gemm(m: int, k: int, n: int, dtype: str) -> tuple[Callable[[], None], dict[str, Any]]:
  """Return the product of [m,k] and [k,n], repeated to about the length of a step."""
  repeats = max(1, round(2e10 / (m * k * n)))
  a, b = (jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate([(m, k), (k, n)]))
  product = jax.jit(jnp.matmul)

  def run() -> None:
    for _ in range(repeats):
      out = product(a, b)
    out.block_until_ready()

  return run, {'flops': 2.0 * m * k * n * repeats}


def measure_training(scale: Scale, rounds: int) -> dict[str, dict[str, Any]]:
  """Measure the training contestants and the GEMMs."""
  dense, project = {'name': 'full'}, {'name': 'project', 'clusters': CLUSTERS, 'capacity': 16}
  project |= {'code': 16, 'leaves': ('w_gate', 'w_up', 'w_down'), 'shared_mix': True}
  batch = make_batch(scale.model['vocab'], scale.rows, scale.context)
  entries = {
    'train: slm': train_step(scale.model, dense, scale, scale.rows),
    'train: slm, projected k=16': train_step(scale.model, project, scale, scale.rows),
    "train: slm, projected's specialist": specialist_step(scale.model, scale),
    'train: torch': reference.train_step(scale.model, batch, scale.dtype),
  }
  if not reference.no_compiler():
    entries[COMPILED] = reference.train_step(scale.model, batch, scale.dtype, compiled=True)
  for shape in scale.gemms:
    entries[f'gemm {"x".join(map(str, shape))}'] = gemm(*shape, scale.dtype)
  times = latency.interleave({name: run for name, (run, _) in entries.items()}, rounds)
  return {name: entries[name][1] | {'seconds': s} for name, s in times.items()}


def measure_decoding(scale: Scale, rounds: int) -> dict[str, dict[str, Any]]:
  """Measure greedy cached decoding at one row and at eight."""
  model = models.build(section('model', scale.model))
  params = tree.cast(jax.jit(model.init)(jax.random.key(0)), jnp.dtype(scale.dtype))
  entries = {}
  for rows in (1, 8):
    entries[f'decode {rows}: slm'] = latency.decode(
      model, params, rows, scale.prompt, scale.new_tokens
    )
    entries[f'decode {rows}: transformers'] = reference.decode(
      scale.model, rows, scale.prompt, scale.new_tokens, scale.dtype
    )
  times = latency.interleave(entries, rounds)
  tokens = {name: int(name.split()[1].rstrip(':')) * scale.new_tokens for name in entries}
  return {name: {'tokens': tokens[name], 'seconds': s} for name, s in times.items()}


def measure_large(scale: Scale, rounds: int) -> dict[str, dict[str, Any]]:
  """Measure the large decoder's training step, if the scale has one."""
  if scale.large is None:
    return {}
  run, facts = train_step(scale.large, {'name': 'full'}, scale, scale.large_rows)
  seconds = latency.interleave({'train: slm, large': run}, rounds)
  return {name: facts | {'seconds': s} for name, s in seconds.items()}


def ratios(entries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
  """Return each bar's ratio, of the medians over the rounds and of the fastest rounds."""
  slm, project = 'train: slm', 'train: slm, projected k=16'
  seconds = [
    ('training tokens/s, slm / torch', 'train: torch', slm, '>= 1.3'),
    ('training tokens/s, slm / torch.compile', COMPILED, slm, '>= 1.15'),
    ('projected step / dense step, seconds', project, slm, '<= 1.3'),
    ('specialist step / dense step, seconds', "train: slm, projected's specialist", slm, '1'),
  ]
  for n, bar in ((1, '>= 3'), (8, '>= 2')):
    what = f'decoding tokens/s at {n}, slm / transformers'
    seconds.append((what, f'decode {n}: transformers', f'decode {n}: slm', bar))
  rows = [(what, a, b, 1.0, bar) for what, a, b, bar in seconds if a in entries]
  for name in entries:
    if name.startswith('gemm'):
      for step in (n for n in (slm, 'train: slm, large') if n in entries):
        flops = entries[step]['flops'] / entries[name]['flops']
        rows.append((f'FLOP/s, {step} / {name}', name, step, flops, '>= 0.6'))
  return [
    {
      'ratio': what,
      'bar': bar,
      **{
        key: scale * of(entries[a]['seconds']) / of(entries[b]['seconds'])
        for key, of in (('median', statistics.median), ('fastest', min))
      },
    }
    for what, a, b, scale, bar in rows
  ]


def table(result: dict[str, Any]) -> str:
  """Write the markdown of a result."""
  lines = [f'# Speed, {result["scale"]} scale', '']
  lines += ['| ratio | of medians | of fastest rounds | bar |', '| --- | --- | --- | --- |']
  for r in result['ratios']:
    lines.append(f'| {r["ratio"]} | {r["median"]:.2f} | {r["fastest"]:.2f} | {r["bar"]} |')
  lines += ['', '| contestant | median s | min s | max s | tokens/s | GFLOP/s |']
  lines += ['| --- | --- | --- | --- | --- | --- |']
  for name, e in result['entries'].items():
    s = statistics.median(e['seconds'])
    tokens = f'{e["tokens"] / s:,.0f}' if 'tokens' in e else ''
    rate = f'{e["flops"] / s / 1e9:,.1f}' if 'flops' in e else ''
    low, high = min(e['seconds']), max(e['seconds'])
    lines.append(f'| {name} | {s:.3f} | {low:.3f} | {high:.3f} | {tokens} | {rate} |')
  lines += ['', *(f'- not measured: {reason}' for reason in result['missing'])]
  lines += [*(f'- {name}: {value}' for name, value in result['machine'].items()), '']
  return '\n'.join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
  """Draw every contestant's seconds, a dot per round and a line at the median."""
  names = [n for n in result['entries'] if not n.startswith('gemm')]
  figure = Figure(figsize=(8, 0.5 * len(names) + 1), layout='constrained')
  ax = figure.subplots()
  for y, name in enumerate(names):
    seconds = result['entries'][name]['seconds']
    colour = '#d55e00' if 'torch' in name or 'transformers' in name else '#0072b2'
    ax.plot(seconds, [y] * len(seconds), 'o', color=colour, alpha=0.5)
    ax.plot([statistics.median(seconds)], [y], '|', color=colour, markersize=22)
  ax.set(yticks=range(len(names)), yticklabels=names, xlabel='seconds', xscale='log')
  ax.invert_yaxis()
  figure.savefig(path.with_suffix('.tmp'), format='png', dpi=150)
  path.with_suffix('.tmp').rename(path)


def machine() -> dict[str, str]:
  """Name what was measured on."""
  device = jax.devices()[0]
  return {
    'device': f'{device.platform} {device.device_kind}',
    'processor': f'{platform.machine()}, {os.cpu_count()} cores',
    'load before': f'{os.getloadavg()[0]:.2f}',
    'GLIBC_TUNABLES': os.environ.get('GLIBC_TUNABLES', 'none'),
    **reference.versions(),
  }


def main(_: list[str]) -> None:
  """Measure a scale and write its json, markdown and plot."""
  name = flags.FLAGS.scale
  if name not in SCALES:
    raise ValueError(f'--scale: expected one of {sorted(SCALES)}, found {name!r}')
  scale, rounds = SCALES[name], flags.FLAGS.rounds
  if name == 'gpu' and jax.default_backend() != 'gpu':
    raise ValueError(f'--scale=gpu: expected a GPU, found {jax.default_backend()}')
  out = Path(flags.FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  result: dict[str, Any] = {'scale': name, 'machine': machine(), 'rounds': rounds}
  entries = measure_training(scale, rounds)
  entries |= measure_decoding(scale, rounds) | measure_large(scale, rounds)
  missing = [reason] if (reason := reference.no_compiler()) else []
  result |= {'entries': entries, 'ratios': ratios(entries), 'missing': missing}
  files.write_text(out / f'{name}.json', json.dumps(result, indent=2) + '\n')
  files.write_text(out / f'{name}.md', table(result))
  plot(result, out / f'{name}.png')
  print(table(result))


if __name__ == '__main__':
  flags.DEFINE_string('scale', 'cpu', f'One of {sorted(SCALES)}.')
  flags.DEFINE_string('out', 'experiments/speed/results', 'Directory of the results.')
  flags.DEFINE_integer('rounds', 20, 'Interleaved repeats.')
  console.run(main)
