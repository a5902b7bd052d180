"""How fast models answer on this machine: prefill and decoding, all of them interleaved.

python -m slm.latency --run=RUN --run=OTHER [--batch=8 --prompt=512 --new_tokens=128]
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from slm import cli, generate, models, reparam, rundir
from slm.models.decoder import DecoderConfig, active_params, forward_flops, num_params, unembed

Params = dict[str, Any]


def interleave(
  contestants: Mapping[str, Callable[[], None]], rounds: int
) -> dict[str, list[float]]:
  """Run every contestant once per round, after one warm-up each; returns seconds.

  The order is drawn anew each round: what ran before (its threads, its memory) costs a contestant
  up to a second.
  """
  seconds: dict[str, list[float]] = {name: [] for name in contestants}
  rng, names = np.random.default_rng(0), list(contestants)
  with cli.progress('measure', (rounds + 1) * len(contestants), 'runs') as progress:
    for i in range(rounds + 1):
      for name in rng.permutation(names).tolist():
        began = time.perf_counter()
        contestants[name]()
        if i:
          seconds[name].append(time.perf_counter() - began)
        progress.update(1, contestant=name)
  return seconds


def prefill(model: models.Model, params: Params, batch: int, prompt: int) -> Callable[[], None]:
  """Return the reading of `batch` prompts up to the first new token's logits."""
  ids = np.random.default_rng(1).integers(0, model.cfg.vocab, (batch, prompt)).astype(np.int32)
  rows = {
    'inputs': ids,
    'positions': np.broadcast_to(np.arange(prompt, dtype=np.int32), ids.shape),
    'segments': np.ones_like(ids),
  }

  @jax.jit
  def read(params, rows):
    out = model.forward(params, rows)
    return unembed(params, out.replace(hidden=out.hidden[:, -1]))

  placed = jax.device_put(rows)
  return lambda: read(params, placed).block_until_ready()


def decode(
  model: models.Model, params: Params, batch: int, prompt: int, new_tokens: int
) -> Callable[[], None]:
  """Return greedy cached decoding of `new_tokens` after `batch` prompts, prefill included."""
  ids = np.random.default_rng(1).integers(0, model.cfg.vocab, (batch, prompt)).astype(np.int32)
  args = jax.device_put((ids, np.ones_like(ids))) + (jax.random.key(0),)
  return lambda: generate.generate(
    model, params, *args, max_tokens=new_tokens
  ).tokens.block_until_ready()


def measure(
  shapes: Mapping[str, DecoderConfig], dtype: str, batch: int, prompt: int, new_tokens: int,
  rounds: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
  """Measure models of these shapes with random weights, of which speed does not depend.

  Returns by name 'prefill' (seconds of a batch), 'token' (seconds of one step of decoding, the
  prefill taken off) and their spread over the rounds ('prefill_spread', 'token_spread': half the
  distance of the quartiles).

  Raises:
    ValueError: if a length is impossible.
  """
  if batch < 1 or prompt < 1 or new_tokens < 2 or rounds < 1:
    raise ValueError(
      'expected batch, prompt and rounds of at least 1 and 2 new tokens, '
      f'found {batch}, {prompt}, {rounds} and {new_tokens}'
    )
  contestants = {}
  for name, shape in shapes.items():
    model = models.build({'name': 'decoder', **dataclasses.asdict(shape)})
    params = reparam.cast(jax.jit(model.init)(jax.random.key(0)), jnp.dtype(dtype))
    contestants[f'{name} prefill'] = prefill(model, params, batch, prompt)
    contestants[f'{name} decode'] = decode(model, params, batch, prompt, new_tokens)
  times = interleave(contestants, rounds)
  found = {}
  for name in shapes:
    read = np.array(times[f'{name} prefill'])
    step = (np.array(times[f'{name} decode']) - read) / (new_tokens - 1)
    found[name] = {'prefill': statistics.median(read), 'token': statistics.median(step)}
    for what, seconds in (('prefill', read), ('token', step)):
      low, high = np.quantile(seconds, (0.25, 0.75))
      found[name][f'{what}_spread'] = float(high - low) / 2
  return found


def predicted(shape: DecoderConfig, context: int, dtype: str) -> dict[str, float]:
  """Return what a step of decoding after `context` tokens moves and computes for a row.

  Layers with a window read the whole cache too. Bytes are those of the weights that are read (of
  all experts where all are computed, though FLOPs count those chosen) and of the keys and values of
  `context` tokens; an embedding that is not the head too is looked up, not read.
  """
  read = num_params if shape.dispatch == 'einsum' else active_params
  width, count = jnp.dtype(dtype).itemsize, read(shape)
  weights = sum(count.values()) - (0 if shape.tied else count['embedding'] // 2)
  layers = shape.num_layers
  cache = 2 * layers * shape.num_kv_heads * shape.head_dim * context
  scores = 4 * layers * shape.num_heads * shape.head_dim * (context - 1)  # past the first key
  return {
    'weight_bytes': float(width * weights),
    'cache_bytes': float(width * cache),
    'flops': forward_flops(shape, 1) + scores,
  }


def main(_: list[str]) -> None:
  """Print a table: one line per run."""
  f = flags.FLAGS
  if not f.run:
    raise ValueError('--run: name at least one run directory')
  shapes = {path: models.build(rundir.read_config(path)['model']).cfg for path in f.run}
  found = measure(shapes, f.dtype, f.batch, f.prompt, f.new_tokens, f.rounds)
  print(
    f'{"run":40s} {"parameters":>12s} {"prefill tok/s":>14s} {"decode tok/s":>13s} {"ms/step":>9s}'
  )
  for path, shape in shapes.items():
    params = sum(num_params(shape).values())
    mine = found[path]
    print(
      f'{path[-40:]:40s} {params:12,} {f.batch * f.prompt / mine["prefill"]:14,.0f} '
      f'{f.batch / mine["token"]:13,.0f} {1e3 * mine["token"]:9.2f}'
    )


if __name__ == '__main__':
  flags.DEFINE_multi_string('run', [], 'Run directory; repeat to compare several.')
  flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'Of weights and cache.')
  flags.DEFINE_integer('batch', 1, 'Rows answered together.', lower_bound=1)
  flags.DEFINE_integer('prompt', 128, 'Tokens of a prompt.', lower_bound=1)
  flags.DEFINE_integer('new_tokens', 64, 'Tokens decoded after it.', lower_bound=1)
  flags.DEFINE_integer('rounds', 5, 'Interleaved repeats.', lower_bound=1)
  cli.run(main)
