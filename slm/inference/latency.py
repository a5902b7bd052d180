"""How fast models answer on this machine: prefill and decoding, interleaved."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from slm import models
from slm.base import console
from slm.models.config import DecoderConfig
from slm.models.decode import generate
from slm.models.decoder import unembed
from slm.weights import tree
from slm.weights.axes import Params
from slm.weights.count import active_params, forward_flops, num_params


def interleave(
  contestants: Mapping[str, Callable[[], None]], rounds: int
) -> dict[str, list[float]]:
  """Run every contestant once per round, after one warm-up each; returns seconds.

  The order is drawn anew each round: what ran before (its threads, its memory) costs a contestant
  up to a second.
  """
  seconds: dict[str, list[float]] = {name: [] for name in contestants}
  rng, names = np.random.default_rng(0), list(contestants)
  with console.progress('measure', (rounds + 1) * len(contestants), 'runs') as progress:
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
  return lambda: generate(model, params, *args, max_tokens=new_tokens).tokens.block_until_ready()


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
    model = models.build(shape)
    params = tree.cast(jax.jit(model.init)(jax.random.key(0)), jnp.dtype(dtype))
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
