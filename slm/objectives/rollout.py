"""Batches of the student's own text (GKD, arXiv 2306.13649)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm import models, reparam
from slm.data import loader, tokenizer
from slm.models.decode import generate, sampled
from slm.runs.config import RunConfig
from slm.weights import sharding, tree
from slm.weights.axes import Params

_DRAW = functools.partial(sampled, temperature=1.0, top_k=0, top_p=1.0)


def prompts(tokens: Any, segments: Any, length: int) -> tuple[Any, Any]:
  """Return the first `length` ids of rows [b,t] and a mask [b,length] of their last window.

  The mask is zero in rows where padding has begun.
  """
  last = segments[:, length - 1 : length]
  return tokens[:, :length], (segments[:, :length] == last) & (last > 0)


def rewrite(
  model: models.Model, params: Params, batch: loader.Batch, key: jax.Array, prompt: int,
  tok: tokenizer.Tokenizer,
) -> loader.Batch:  # fmt: skip
  """Keep the first `prompt` tokens of rows [b,t] and sample their continuation at temperature 1.

  Sampled targets up to the end of the text have weight 1, all others 0.
  """
  t = batch['inputs'].shape[1]
  ids, mask = prompts(batch['inputs'], batch['segments'], prompt)
  vocabulary = {'end': tok.ends, 'known': tok.known}
  out = generate(
    model, params, ids, mask, key, max_tokens=t - prompt + 1, sampler=_DRAW, **vocabulary
  )
  tokens = jnp.concatenate([ids, out.tokens], axis=1)
  real = mask[:, -1:]
  nth = (jnp.arange(t) - (prompt - 1))[None]  # sampled token that a position predicts, from 0
  segments = jnp.where(nth > 0, real, jnp.pad(mask, ((0, 0), (0, t - prompt)))).astype(jnp.int32)
  return {
    'inputs': tokens[:, :t],
    'targets': tokens[:, 1:],
    'weights': ((nth >= 0) & (nth < out.lengths[:, None]) & real).astype(jnp.float32),
    'segments': segments,
    'positions': jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0) * segments,
  }


def make_rewrite(
  model: models.Model, rep: reparam.Reparam, cfg: RunConfig, mesh: jax.sharding.Mesh
) -> Callable[..., loader.Batch]:
  """Make jitted f(theta, frozen, batch [accum,groups,rows,t], step) -> batch of the student's text.

  Several models, or a prompt as long as the rows, raise ValueError.
  """
  prompt = cfg.objective.prompt
  if rep.clusters or not 1 <= prompt < cfg.context:
    raise ValueError(
      f'objective.on_policy: expected one dense model and a prompt of 1 to {cfg.context - 1} '
      f'tokens, found {rep.clusters or 1} and objective.prompt={prompt}'
    )
  tok = tokenizer.load(f'{cfg.data.path}/tokenizer')
  key = jax.random.fold_in(jax.random.key(cfg.seed), 2)

  @functools.partial(jax.jit, out_shardings=sharding.batch_sharding(mesh, axis=1))
  def own(theta, frozen, batch, step):
    params = tree.cast(rep.materialize(theta, frozen, None), jnp.dtype(cfg.dtype))
    rows = {n: x.reshape(-1, x.shape[-1]) for n, x in batch.items() if n != 'condition'}
    new = rewrite(model, params, rows, jax.random.fold_in(key, step), prompt, tok)
    return batch | {name: x.reshape(batch[name].shape) for name, x in new.items()}

  return own


def is_own(cfg: RunConfig, step: int) -> bool:
  """Return whether a step trains on the student's own text; depends on (seed, step) alone.

  A share `on_policy` of the steps after the share `on_policy_from` of all do.
  """
  began = step > cfg.objective.on_policy_from * cfg.steps
  drawn = np.random.default_rng([cfg.seed, step, 1]).random()
  return bool(began and drawn < cfg.objective.on_policy)
