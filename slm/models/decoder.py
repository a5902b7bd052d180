"""The dense decoder: every model that `slm` trains or ships is one of these."""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.models import layers, moe
from slm.sharding import AXES, INPUTS, Params, constrain

# What a block keeps for its backward pass: everything, the products with weights, or its input.
REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.save_only_these_names('linear'),
  'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Shape of a decoder; head_dim is free of embed / num_heads."""

  vocab: int
  embed: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  qk_norm: bool = False
  qkv_bias: bool = False
  tied: bool = True
  num_experts: int = 0  # of a token-routed MLP, each `mlp` wide; 0: one MLP for all tokens
  experts_per_token: int = 2
  shared_mlp: int = 0  # width of an expert that every token goes to; 0: none
  dispatch: str = 'einsum'  # see slm/models/moe.py
  remat: str = 'none'
  unroll: int = 1  # layers per scan iteration; num_layers removes the loop

  def __post_init__(self):
    sizes = ('vocab', 'embed', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp')
    for name in sizes:
      if getattr(self, name) < 1:
        raise ValueError(f'model.{name}: expected at least 1, found {getattr(self, name)}')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'model.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'model.head_dim: RoPE needs an even size, found {self.head_dim}')
    if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
      raise ValueError(
        f'model.experts_per_token={self.experts_per_token}: expected 1 to {self.num_experts}'
      )
    if min(self.num_experts, self.shared_mlp) < 0 or self.shared_mlp and not self.num_experts:
      raise ValueError(
        f'model.num_experts={self.num_experts}, shared_mlp={self.shared_mlp}: expected at least 0, '
        'and a shared MLP only beside experts'
      )
    if self.dispatch not in moe.DISPATCH:
      raise ValueError(f'model.dispatch: expected one of {moe.DISPATCH}, found {self.dispatch!r}')
    if self.remat not in REMAT:
      raise ValueError(f'model.remat: expected one of {sorted(REMAT)}, found {self.remat!r}')


class Output(NamedTuple):
  """What a forward pass returns; logits are a separate call so that losses can chunk them."""

  hidden: jax.Array  # [b,t,d], after the final norm
  cache: dict[str, jax.Array] | None
  routing: moe.Routing | None = None  # what token routing did, [b,l,...], see moe.sums


def _init(name: str, gain: float = 1.0):
  """Draw N(0, gain^2 / fan_in), the fan-in read off the axis table."""

  def init(key, shape, dtype=jnp.float32):
    fan_in = math.prod(n for a, n in zip(AXES[name], shape, strict=True) if a in INPUTS[name])
    return gain / math.sqrt(fan_in) * jax.random.normal(key, shape, dtype)

  return init


class Block(nn.Module):
  """One pre-norm transformer layer."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x, tables, mask, cache, index, real):
    """Map x [b,t,d] and this layer's cache to the next x, the cache's new entries and routing."""
    c = self.cfg
    h = layers.rms_norm(x, Scale(c.embed, name='attn_norm')(), c.norm_eps)
    attended, new = Attention(c, name='attn')(h, tables, mask, cache, index)
    x = x + attended
    h = layers.rms_norm(x, Scale(c.embed, name='mlp_norm')(), c.norm_eps)
    if not c.num_experts:
      return x + Mlp(c, c.mlp, name='mlp')(h), (new, None)
    out, routing = Moe(c, name='mlp')(h, real)
    return x + out, (new, routing)


class Scale(nn.Module):
  """The learned scale of a norm."""

  size: int

  @nn.compact
  def __call__(self) -> jax.Array:
    """Return the scale [d]."""
    return self.param('scale', nn.initializers.ones, (self.size,))


class Attention(nn.Module):
  """Grouped-query attention with RoPE."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x, tables, mask, cache, index):
    """Map x [b,t,d] to [b,t,d]; return this call's keys and values, if there is a cache."""
    c = self.cfg
    shape = {
      'embed': c.embed,
      'heads': c.num_heads,
      'kv_heads': c.num_kv_heads,
      'head_dim': c.head_dim,
    }
    size = lambda name: tuple(shape[a] for a in AXES[name])
    param = lambda name, init: self.param(name, init, size(name))

    # Head-major activations: [b,h,t,c] makes both attention products plain batched GEMMs.
    def project(name):
      w = param(name, _init(name))
      y = layers.linear(x, w.reshape(c.embed, -1))
      return y.reshape(x.shape[:2] + w.shape[1:]).swapaxes(1, 2)

    q, k, v = (project(name) for name in ('wq', 'wk', 'wv'))
    if c.qkv_bias:
      zeros = nn.initializers.zeros
      q, k, v = (
        y + param(w, zeros)[None, :, None, :] for y, w in ((q, 'bq'), (k, 'bk'), (v, 'bv'))
      )
    if c.qk_norm:
      ones = nn.initializers.ones
      q = layers.rms_norm(q, param('q_scale', ones), c.norm_eps)
      k = layers.rms_norm(k, param('k_scale', ones), c.norm_eps)
    q, k = layers.rope(q, tables), layers.rope(k, tables)
    q = constrain(q, 'batch', 'heads', None, None)
    k = constrain(k, 'batch', 'kv_heads', None, None)
    v = constrain(v, 'batch', 'kv_heads', None, None)
    new = None
    if cache is not None:
      # Return the new entries alone: the whole cache as an output of the scan over layers would
      # be copied for every token.
      new = {'k': k, 'v': v}
      k, v = (jax.lax.dynamic_update_slice(cache[n], x, (0, 0, index, 0)) for n, x in new.items())
    out = layers.attention(q, k, v, mask)
    wo = param('wo', _init('wo', (2 * c.num_layers) ** -0.5))
    out = out.swapaxes(1, 2).reshape(x.shape[:2] + (-1,))
    return layers.linear(out, wo.reshape(-1, c.embed)), new


class Mlp(nn.Module):
  """The gated MLP."""

  cfg: DecoderConfig
  size: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Map x [b,t,d] to [b,t,d]."""
    return layers.swiglu(x, *_mlp_weights(self, self.cfg, self.size))


def _mlp_weights(module: nn.Module, c: DecoderConfig, size: int, count: int = 0):
  """Make w_gate, w_up [d,f] and w_down [f,d], or `count` of each, stacked."""

  def param(name, shape, gain=1.0):
    one = _init(name, gain)
    if not count:
      return module.param(name, one, shape)
    many = lambda key, shape: jax.vmap(lambda k: one(k, shape[1:]))(jax.random.split(key, count))
    return module.param(name, many, (count, *shape))

  down = (2 * c.num_layers) ** -0.5
  return (
    param('w_gate', (c.embed, size)),
    param('w_up', (c.embed, size)),
    param('w_down', (size, c.embed), down),
  )


class Experts(nn.Module):
  """The stacked weights of the experts."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return w_gate, w_up [e,d,f] and w_down [e,f,d]."""
    return _mlp_weights(self, self.cfg, self.cfg.mlp, self.cfg.num_experts)


class Moe(nn.Module):
  """The token-routed mixture of experts."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, moe.Routing]:
    """Map x [b,t,d] to [b,t,d]; `real` [b,t] marks the tokens that statistics count."""
    c = self.cfg
    router = self.param('w_router', _init('w_router'), (c.embed, c.num_experts))
    weights, ids, routing = moe.route(x, router, c.experts_per_token)
    dispatch = {'einsum': moe.einsum, 'ragged': moe.ragged}[c.dispatch]
    out = dispatch(x, weights, ids, *Experts(c, name='experts')())
    if c.shared_mlp:
      out = out + Mlp(c, c.shared_mlp, name='shared')(x)
    return out, moe.sums(routing, real)


class Decoder(nn.Module):
  """Embedding, scanned blocks, final norm."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, batch: dict[str, jax.Array], cache: dict | None = None) -> Output:
    """Run inputs, positions and segments [b,t]; a cache continues where it stopped.

    A query sees the keys of its own segment at its own or an earlier index; segment 0 is padding.
    """
    c = self.cfg
    shape = (c.vocab, c.embed)
    init = nn.initializers.normal(c.embed**-0.5)
    embedding = self.param('embedding', init, shape)
    if not c.tied:
      self.param('lm_head', init, shape)
    x = jnp.take(embedding, batch['inputs'], axis=0)
    x = constrain(x, 'batch', None, None)
    tables = layers.rope_tables(batch['positions'], c.head_dim, c.rope_theta)

    queries, index = batch['segments'], 0
    keys, kv = queries, None
    if cache is not None:
      index = cache['index']
      keys = jax.lax.dynamic_update_slice(cache['segments'], queries, (0, index))
      kv = {'k': cache['k'], 'v': cache['v']}
    t, s = queries.shape[1], keys.shape[1]
    causal = (index + jnp.arange(t))[:, None] >= jnp.arange(s)[None, :]
    mask = causal[None] & (queries[:, :, None] == keys[:, None, :])

    block = Block
    if REMAT[c.remat]:
      block = nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])
    stack = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast, nn.broadcast),
      out_axes=(0, 1),  # the cache by layer, routing [b,l,...]
      length=c.num_layers,
      unroll=c.unroll,
    )
    x, (new, routing) = stack(c, name='blocks')(x, tables, mask, kv, index, queries > 0)
    hidden = layers.rms_norm(x, Scale(c.embed, name='final_norm')(), c.norm_eps)
    if cache is not None:
      put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, 0, 0, index, 0))
      cache = {**jax.tree.map(put, kv, new), 'segments': keys, 'index': index + t}
    return Output(hidden, cache, routing)


def init_cache(cfg: DecoderConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
  """Return an empty cache for `batch` rows of at most `length` tokens."""
  shape = (cfg.num_layers, batch, cfg.num_kv_heads, length, cfg.head_dim)
  return {
    'k': jnp.zeros(shape, dtype),
    'v': jnp.zeros(shape, dtype),
    'segments': jnp.zeros((batch, length), jnp.int32),
    'index': jnp.zeros((), jnp.int32),
  }


def head(params: Params) -> jax.Array:
  """Return the output matrix [v,d]: lm_head, or the embedding when they are tied."""
  return params['lm_head'] if 'lm_head' in params else params['embedding']


def unembed(params: Params, hidden: jax.Array) -> jax.Array:
  """Map hidden [...,d] to float32 logits [...,v]."""
  return jnp.einsum('...d,vd->...v', hidden, head(params), preferred_element_type=jnp.float32)


def num_params(cfg: DecoderConfig) -> dict[str, int]:
  """Count parameters by component."""
  attn = 2 * cfg.embed * cfg.head_dim * (cfg.num_heads + cfg.num_kv_heads)
  attn += cfg.qkv_bias * cfg.head_dim * (cfg.num_heads + 2 * cfg.num_kv_heads)
  attn += cfg.qk_norm * 2 * cfg.head_dim
  mlp = 3 * cfg.embed * cfg.mlp * max(cfg.num_experts, 1) + 3 * cfg.embed * cfg.shared_mlp
  return {
    'embedding': cfg.vocab * cfg.embed * (1 if cfg.tied else 2),
    'attention': cfg.num_layers * attn,
    'mlp': cfg.num_layers * (mlp + cfg.embed * cfg.num_experts),
    'norm': (2 * cfg.num_layers + 1) * cfg.embed,
  }


def active_params(cfg: DecoderConfig) -> dict[str, int]:
  """Count the parameters that one token passes through: its experts alone."""
  idle = max(cfg.num_experts - cfg.experts_per_token, 0)
  count = num_params(cfg)
  return count | {'mlp': count['mlp'] - cfg.num_layers * 3 * cfg.embed * cfg.mlp * idle}


def forward_flops(cfg: DecoderConfig, context: int) -> float:
  """Count the multiply-adds (as 2 FLOPs) of one token's forward pass, head included.

  Attention is counted over the blocks of scores that are computed, see layers.attention. Of
  experts those chosen count, also where dispatch='einsum' computes all.
  """
  count = active_params(cfg)
  head_flops = 2 * cfg.vocab * cfg.embed
  attention = 4 * layers.mean_keys(context) * cfg.num_heads * cfg.head_dim * cfg.num_layers
  return 2.0 * (count['attention'] + count['mlp']) + head_flops + attention
