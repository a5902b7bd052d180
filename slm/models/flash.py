"""Attention that never holds its scores: JAX's kernels for TPUs and GPUs, causal and by segments.

They take what the attention of layers.py takes, but for masks: a kernel knows segments, not arrays.
Other machines, windows, caps and caches have layers.py; all are compared in the tests.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm.models.config import DecoderConfig
from slm.weights import sharding

_BLOCKS = (512, 256, 128)  # queries and keys whose scores exist at once
# Bytes of a block of keys of triton; backward it has half. Compiled for an H100 it takes at most
# 82 of the 99 kB of shared memory that any GPU has, and spills no registers; with whole blocks
# backward it would take 107 kB and spill (heads of 128 in bfloat16).
_TILE = 2**14


def kernel(cfg: DecoderConfig, t: int, cached: bool) -> str:
  """Return the kernel for rows of t tokens: one of KERNELS, which take segments, or 'reference'.

  `attention='auto'` takes the kernel of the platform that is being traced for, if it can be had.

  Raises:
    ValueError: if attention names a kernel that cannot be had, saying why.
  """
  platform = sharding.platform()
  home = {entry.platform: name for name, entry in KERNELS.items()}
  name = home.get(platform, 'reference') if cfg.attention == 'auto' else cfg.attention
  if name == 'reference':
    return name
  reasons = {
    'rows with a cache': cached,
    f'rows of {t} tokens, no multiple of {_BLOCKS[-1]}': t % _BLOCKS[-1] != 0,
    'layers with a window': cfg.window > 0,
    'capped scores': cfg.attention_cap > 0,
    f'code for {platform}': platform not in (KERNELS[name].platform, 'cpu'),
  } | KERNELS[name].reasons(cfg)
  reason = next((text for text, holds in reasons.items() if holds), '')
  if cfg.attention == name and reason and not cached:
    raise ValueError(f'model.attention={name}: the kernel cannot do {reason}')
  return 'reference' if reason else name


def attention(
  cfg: DecoderConfig, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> jax.Array:
  """Attend causally within segments [b,t]: q [b,h,t,c], k and v [b,k,t,c] -> [b,h,t,c].

  Rows and heads are split over the mesh; a kernel is a program of one device.
  """
  attend = KERNELS[kernel(cfg, q.shape[2], cached=False)].attend
  heads, kv = ('batch', 'heads', None, None), ('batch', 'kv_heads', None, None)
  run = sharding.map_shards(attend, (heads, kv, kv, ('batch', None)), heads)
  return run(q * (cfg.query_scale or cfg.head_dim) ** -0.5, k, v, segments)


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


def _triton(q, k, v, segments):
  attention = importlib.import_module(_MHA)
  # A block of scores of another segment has weights of 1 until the diagonal, which is the row's
  # own segment, is reached: then they are multiplied by exp(-inf), which is 0.
  groups = q.shape[1] // k.shape[1]
  k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
  block = min(_BLOCKS[-1], _TILE // (q.shape[-1] * q.dtype.itemsize))
  backward = ('block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq')
  sizes = attention.BlockSizes(block, block, **dict.fromkeys(backward, block // 2))
  attend = functools.partial(
    attention.mha, causal=True, block_sizes=sizes, interpret=sharding.platform() == 'cpu'
  )
  return attend(*(x.swapaxes(1, 2) for x in (q, k, v)), segments).swapaxes(1, 2)


_MHA = 'jax.experimental.pallas.ops.gpu.attention'  # deprecated since jax 0.12


def _capability() -> str:
  """Return the compute capability of this machine's GPU; AMD's begin with letters."""
  return str(jax.local_devices(backend='gpu')[0].compute_capability)


def _no_triton(cfg: DecoderConfig) -> dict[str, bool]:
  """Return what Triton and the kernel written in it do not do."""
  capability = _capability() if sharding.platform() == 'gpu' else ''
  return {
    f'code in jax {jax.__version__}, which lacks {_MHA}': importlib.util.find_spec(_MHA) is None,
    f'heads of {cfg.head_dim}, none of 16, 32, 64 and 128': cfg.head_dim not in (16, 32, 64, 128),
    f'code for GPUs of compute capability {capability}, no number of at least 8':
      capability != '' and not (capability[0].isdigit() and float(capability) >= 8),
  }  # fmt: skip


class Kernel(NamedTuple):
  """A kernel for one device.

  Attributes:
    platform: where `auto` takes it; on CPU it is interpreted, for tests.
    attend: maps scaled q [b,h,t,c], k and v [b,k,t,c] and segments [b,t] to [b,h,t,c].
    reasons: returns what it cannot do, by name, and whether a config asks for that.
  """

  platform: str
  attend: Callable[..., jax.Array]
  reasons: Callable[[DecoderConfig], dict[str, bool]]


KERNELS = {
  'splash': Kernel('tpu', _splash, lambda cfg: {}),
  'triton': Kernel('gpu', _triton, _no_triton),
}
