"""Attention that never holds its scores: JAX's splash kernel on TPUs, by segments and causal.

It takes what the attention of layers.py takes, but for masks: a kernel knows segments, not arrays.
Other machines, windows, caps and caches have layers.py; both are compared in the tests.
"""

import jax

from slm.models.config import DecoderConfig
from slm.weights import sharding

_BLOCKS = (512, 256, 128)  # queries and keys whose scores exist at once


def kernel(cfg: DecoderConfig, t: int, cached: bool) -> str:
  """Return the kernel for rows of t tokens: 'splash', which takes segments, or 'reference', masks.

  `attention='auto'` takes splash where the code being traced is for TPUs and it can be had.

  Raises:
    ValueError: if attention='splash' cannot be had, saying why.
  """
  reasons = {
    'rows with a cache': cached,
    f'rows of {t} tokens, no multiple of {_BLOCKS[-1]}': t % _BLOCKS[-1] != 0,
    'layers with a window': cfg.window > 0,
    'capped scores': cfg.attention_cap > 0,
  }
  reason = next((text for text, holds in reasons.items() if holds), '')
  if cfg.attention == 'splash' and reason and not cached:
    raise ValueError(f'model.attention=splash: the kernel cannot do {reason}')
  wanted = cfg.attention == 'splash' or cfg.attention == 'auto' and sharding.platform() == 'tpu'
  return 'splash' if wanted and not reason else 'reference'


def splash(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, scale: float
) -> jax.Array:
  """Attend causally within segments [b,t]: q [b,h,t,c], k and v [b,k,t,c] -> [b,h,t,c].

  Scores are divided by sqrt(scale). Rows and heads are split over the mesh; a kernel is a program
  of one device.
  """
  heads, kv = ('batch', 'heads', None, None), ('batch', 'kv_heads', None, None)
  run = sharding.map_shards(_splash, (heads, kv, kv, ('batch', None)), heads)
  return run(q * scale**-0.5, k, v, segments)


def _splash(q, k, v, segments):
  # Imported here: it takes most of a second, and most processes never use it.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )

  t = q.shape[2]
  block = next(n for n in _BLOCKS if t % n == 0)
  sizes = ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq')
  mask = splash_attention_mask.CausalMask((t, t))
  attend = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([mask] * q.shape[1]),
    block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(sizes, block)),
    head_shards=1,
    q_seq_shards=1,
    interpret=sharding.platform() == 'cpu',  # for tests
  )
  one = lambda q, k, v, s: attend(q, k, v, splash_attention_kernel.SegmentIds(s, s))
  return jax.vmap(one)(q, k, v, segments).astype(v.dtype)
