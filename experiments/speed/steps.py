"""What slm computes in a row of the table: training steps, decoding, matrix products."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm import models, objectives, reparam
from slm.inference import latency
from slm.runs.config import section
from slm.training import optim
from slm.training.step import init_state, make_sums, make_train_step
from slm.weights import tree
from slm.weights.count import forward_flops, num_params

HYPER = {'clip': 1.0, 'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1}
CLUSTERS = 16
PROJECT = {
  'name': 'project', 'clusters': CLUSTERS, 'capacity': 16, 'code': 16, 'shared_mix': True,
  'leaves': ('w_gate', 'w_up', 'w_down'),
}  # fmt: skip
DISTILL = {'name': 'distill', 'chunk': 256, 'temperature': 1.0, 'mixing': 1.0, 'kl': 'forward'}

Row = tuple[Callable[[], None], dict[str, Any]]  # what is timed, and facts about it


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


def work(cfg: Mapping[str, Any], rows: int, context: int) -> dict[str, Any]:
  """Return the tokens and FLOPs of a training step: three forward passes."""
  shape = models.build(section('model', cfg)).cfg
  tokens = rows * context
  return {
    'tokens': tokens,
    'flops': 3 * forward_flops(shape, context) * tokens,
    'parameters': sum(num_params(shape).values()),
  }


def train_step(
  cfg: Mapping[str, Any],
  rows: int,
  context: int,
  dtype: str,
  rep: Mapping[str, Any] | None = None,
  teacher: Mapping[str, Any] | None = None,
  batch: Mapping[str, np.ndarray] | None = None,
) -> Row:
  """Return a compiled training step: next-token prediction, or distillation from a teacher.

  It is on random rows, or on `batch`, whose leaves are those of make_batch.
  """
  model = models.build(section('model', cfg))
  rep = reparam.build(section('reparam', rep or {'name': 'full'}), model.init)
  passes = {'student': reparam.map_groups(rep, model.forward)}
  facts, frozen, loss = work(cfg, rows, context), {}, {'name': 'next_token', 'chunk': 512}
  if teacher:
    larger = models.build(section('model', teacher))
    passes['teacher'], loss = larger.forward, DISTILL
    frozen = {'teacher': jax.jit(larger.init)(jax.random.key(1))}
    facts['flops'] += forward_flops(larger.cfg, context) * facts['tokens']
  objective = objectives.build(section('objective', loss), passes)
  tx = optim.build(section('optim', HYPER), lambda step: 1e-3, rep.independent)
  step = make_train_step(make_sums(objective, rep, dtype), tx, rep.independent)
  theta = jax.jit(rep.init)(jax.random.key(0))
  held = [jax.jit(lambda t: init_state(t, tx, {}))(theta)]
  batch = jax.device_put(batch or make_batch(model.cfg.vocab, rows, context))
  began = time.monotonic()
  compiled = jax.jit(step, donate_argnums=0).lower(held[0], frozen, batch).compile()
  facts |= {
    'trained_parameters': sum(x.size for x in jax.tree.leaves(theta)),
    'compile_seconds': time.monotonic() - began,
  }

  def run() -> None:
    held[0], metrics = compiled(held[0], frozen, batch)
    jax.block_until_ready((held[0], metrics))

  return run, facts


def decode(cfg: Mapping[str, Any], rows: int, prompt: int, new_tokens: int, dtype: str) -> Row:
  """Return greedy cached decoding."""
  model = models.build(section('model', cfg))
  params = tree.cast(jax.jit(model.init)(jax.random.key(0)), jnp.dtype(dtype))
  run = latency.decode(model, params, rows, prompt, new_tokens)
  return run, {'tokens': rows * new_tokens}


def gemm(m: int, k: int, n: int, dtype: str, least: float) -> Row:
  """Return the product of [m,k] and [k,n], repeated to about `least` multiply-adds."""
  repeats = max(1, round(least / (m * k * n)))
  a, b = (jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate([(m, k), (k, n)]))
  product = jax.jit(jnp.matmul)

  def run() -> None:
    for _ in range(repeats):
      out = product(a, b)
    out.block_until_ready()

  return run, {'flops': 2.0 * m * k * n * repeats}
