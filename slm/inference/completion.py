"""Continuations of text prompts."""

import jax
import jax.numpy as jnp
import numpy as np

from slm.data import tokenizer
from slm.inference import scoring
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
    ValueError: if a prompt is empty and the model reads no begin token.
  """
  ids = [tok.begun(p, begin) for p in prompts]
  if not all(ids):
    raise ValueError('--prompt: expected some text: this model reads no begin token')
  padded = scoring.left_padded(ids, len(ids), max(map(len, ids)))
  params = tree.cast(params, jnp.dtype(loaded.cfg.dtype))
  options = {'max_tokens': max_tokens, 'sampler': sampler, 'end': tok.ends, 'known': tok.known}
  out = generate(loaded.model, params, *padded, jax.random.key(seed), **options)
  rows = zip(ids, np.asarray(out.tokens), out.lengths, strict=True)
  return [tok.continued(prompt, row[:n].tolist()) for prompt, row, n in rows]
