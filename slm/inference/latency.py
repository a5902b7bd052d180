"""Latency of prefill and decoding on this machine, measured interleaved."""

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

  The order is random in each round, as the contestant that ran before (its threads, its memory) can
  cost the next one up to a second.
  """
  seconds: dict[str, list[float]] = {name: [] for name in contestants}
  rng, names = np.random.default_rng(0), list(contestants)
  with console.Progress('measure', (rounds + 1) * len(contestants), 'runs') as progress:
    for i in range(rounds + 1):
      for name in rng.permutation(names).tolist():
        began = time.perf_counter()
        contestants[name]()
        if i:
          seconds[name].append(time.perf_counter() - began)
        progress.update(1, contestant=name)
  return seconds


def _prompts(model: models.Model, batch: int, prompt: int) -> np.ndarray:
  return np.random.default_rng(1).integers(0, model.cfg.vocab, (batch, prompt)).astype(np.int32)


def prefill(model: models.Model, params: Params, batch: int, prompt: int) -> Callable[[], None]:
  """Return a function that reads `batch` random prompts, up to the logits of the next token."""
  ids = _prompts(model, batch, prompt)
  positions = np.broadcast_to(np.arange(prompt, dtype=np.int32), ids.shape)
  rows = {'inputs': ids, 'positions': positions, 'segments': np.ones_like(ids)}

  @jax.jit
  def read(params, rows):
    out = model.forward(params, rows)
    return unembed(params, out.replace(hidden=out.hidden[:, -1]))

  placed = jax.device_put(rows)
  return lambda: read(params, placed).block_until_ready()


def decode(
  model: models.Model, params: Params, batch: int, prompt: int, new_tokens: int
) -> Callable[[], None]:
  """Return a function that decodes `new_tokens` after `batch` random prompts, prefill included."""
  ids = _prompts(model, batch, prompt)
  args = jax.device_put((ids, np.ones_like(ids))) + (jax.random.key(0),)
  return lambda: generate(model, params, *args, max_tokens=new_tokens).tokens.block_until_ready()


def measure(
  shapes: Mapping[str, DecoderConfig], dtype: str, batch: int, prompt: int, new_tokens: int,
  rounds: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
  """Measure models of these shapes; their weights are random, as speed does not depend on them.

  Returns by name the medians over rounds 'prefill' (seconds per batch) and 'token' (seconds per
  decoding step, without the prefill), and half their interquartile ranges, 'prefill_spread' and
  'token_spread'.

  Raises:
    ValueError: if a length is too small.
  """
  if batch < 1 or prompt < 1 or new_tokens < 2 or rounds < 1:
    raise ValueError(
      'expected batch, prompt and rounds of at least 1 and at least 2 new tokens, '
      f'found {batch}, {prompt}, {rounds} and {new_tokens}'
    )
  contestants = {}
  for name, shape in shapes.items():
    model = models.build(shape)
    params = tree.cast(jax.jit(model.init)(jax.random.key(0)), jnp.dtype(dtype))
    contestants[f'{name} prefill'] = prefill(model, params, batch, prompt)
    contestants[f'{name} decode'] = decode(model, params, batch, prompt, new_tokens)
  times = interleave(contestants, rounds)
  measured: dict[str, dict[str, float]] = {name: {} for name in shapes}
  for name, result in measured.items():
    read = np.array(times[f'{name} prefill'])
    step = (np.array(times[f'{name} decode']) - read) / (new_tokens - 1)
    for quantity, seconds in (('prefill', read), ('token', step)):
      low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
      result |= {quantity: middle, f'{quantity}_spread': (high - low) / 2}
  return measured


def predicted(shape: DecoderConfig, context: int, dtype: str) -> dict[str, float]:
  """Return the bytes moved and FLOPs computed by a decoding step of one row after `context` tokens.

  'weight_bytes' counts the weights that are read: all experts where all are computed ('flops' count
  the chosen ones), and an embedding only if it is the head too. 'cache_bytes' counts the keys and
  values of `context` tokens in every layer, as layers with a window read the whole cache too.
  """
  width = jnp.dtype(dtype).itemsize
  count = (num_params if shape.dispatch == 'einsum' else active_params)(shape)
  weights = sum(count.values()) - (0 if shape.tied else count['embedding'] // 2)
  channels = shape.num_layers * shape.head_dim
  attention = 4 * channels * shape.num_heads * (context - 1)  # past the first key
  return {
    'weight_bytes': float(width * weights),
    'cache_bytes': float(width * 2 * channels * shape.num_kv_heads * context),
    'flops': forward_flops(shape, 1) + attention,
  }
