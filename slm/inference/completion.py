"""Continuations of text prompts."""

import jax
import jax.numpy as jnp
import numpy as np

from slm.data import tokenizer
from slm.models.decode import Sampler, generate
from slm.runs import load
from slm.weights import tree
from slm.weights.axes import Params


def complete(
  loaded: load.Loaded,
  params: Params,
  tok: tokenizer.Tokenizer,
  begin: list[int],
  prompts: list[str],
  max_tokens: int,
  sampler: Sampler,
  seed: int,
) -> list[str]:
  """Continue text prompts after the ids `begin`; returns the continuations without the prompts.

  Raises:
    ValueError: if a prompt is empty for a model that reads no begin token.
  """
  ids = [tok.begun(p, begin) for p in prompts]
  longest = max(map(len, ids))
  if not all(ids):
    raise ValueError('--prompt: expected some text: this model reads no begin token')
  padded = np.array([[0] * (longest - len(i)) + i for i in ids], np.int32)
  mask = np.array([[0] * (longest - len(i)) + [1] * len(i) for i in ids], np.int32)
  params = tree.cast(params, jnp.dtype(loaded.cfg.dtype))
  out = generate(
    loaded.model,
    params,
    padded,
    mask,
    jax.random.key(seed),
    max_tokens=max_tokens,
    sampler=sampler,
    end=tok.ends,
    known=tok.known,
  )
  rows = zip(ids, np.asarray(out.tokens), out.lengths, strict=True)
  return [tok.continued(before, row[:n].tolist()) for before, row, n in rows]
