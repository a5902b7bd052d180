"""The Flax modules of a decoder; the arithmetic is in layers.py and moe.py."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.models import flash, layers, moe, observe
from slm.models.config import DecoderConfig
from slm.weights.axes import AXES, INPUTS
from slm.weights.sharding import constrain


def _init(name: str, gain: float = 1.0):
  """Return an initialiser that draws N(0, gain^2 / fan_in), fan_in from the axis table."""

  def init(key, shape, dtype=jnp.float32):
    fan_in = math.prod(n for a, n in zip(AXES[name], shape, strict=True) if a in INPUTS[name])
    return gain / math.sqrt(fan_in) * jax.random.normal(key, shape, dtype)

  return init


class Block(nn.Module):
  """A transformer layer, with norms before the attention and the MLP, after them, or both."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x, tables, mask, kind, cache, index, real):
    """Map x [b,t,d] and this layer's cache to the next x, the cache's new entries and routing.

    `kind` is the index of this layer on the leading axis of tables and mask, None without one. A
    mask [b,t] is the segments of the rows, for a kernel of flash.py.
    """
    c = self.cfg
    if kind is not None:
      tables = jax.tree.map(lambda x: x[kind], tables)
    if c.window:
      mask = mask[0 if kind is None else kind]

    def norm(x, place, name):
      return Norm(c, name=name)(x, real) if c.norms in (place, 'sandwich') else x

    start = x
    h = norm(x, 'pre', 'attn_norm')
    observe.note(self, 'attn_in', observe.moments, h, real)
    h, new = Attention(c, name='attn')(h, tables, mask, cache, index, real)
    x = x + norm(h, 'post', 'attn_post_norm')
    h = norm(x, 'pre', 'mlp_norm')
    observe.note(self, 'mlp_in', observe.moments, h, real)
    routing = None
    if c.num_experts:
      h, routing = Moe(c, name='mlp')(h, real)
    else:
      h = Mlp(c, c.mlp, name='mlp')(h, real)
    x = x + norm(h, 'post', 'mlp_post_norm')
    observe.note(self, 'turn', observe.turn, start, x, real)
    return x, (new, routing)


class Norm(nn.Module):
  """RMSNorm with a learned scale."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
    """Map x [b,t,d] to [b,t,d]; observations count the tokens that are `real` [b,t]."""
    c = self.cfg
    if self.has_variable(observe.KEPT, 'scale'):
      kept = self.get_variable(observe.KEPT, 'scale')
      observe.note(self, 'gain', observe.shrinkage, x, kept, c.norm_eps, real)
    scale = self.param('scale', _scale_init(c), (c.embed,))
    return layers.rms_norm(x, scale, c.norm_eps, c.norm_offset)


def _scale_init(c: DecoderConfig):
  """Return the initialiser of a scale that multiplies by 1."""
  return nn.initializers.zeros if c.norm_offset else nn.initializers.ones


class Attention(nn.Module):
  """Grouped-query attention with RoPE."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x, tables, mask, cache, index, real):
    """Map x [b,t,d] to [b,t,d]; also return the new keys and values, None without a cache.

    Observations count the tokens that are `real` [b,t].
    """
    c = self.cfg
    param = lambda name, init: self.param(name, init, tuple(c.sizes[a] for a in AXES[name]))

    # Head-major activations [b,h,t,c] make both attention products plain batched GEMMs.
    def project(name):
      w = param(name, _init(name))
      y = layers.linear(x, w.reshape(c.embed, -1))
      return y.reshape(x.shape[:2] + w.shape[1:]).swapaxes(1, 2)

    q, k, v = (project(name) for name in ('wq', 'wk', 'wv'))
    if c.qkv_bias:
      bias = lambda name: param(name, nn.initializers.zeros)[None, :, None, :]
      q, k, v = q + bias('bq'), k + bias('bk'), v + bias('bv')
    if c.qk_norm:
      q, k = self._norm(q, param, 'q_scale'), self._norm(k, param, 'k_scale')
    q, k = layers.rope(q, tables), layers.rope(k, tables)
    q = constrain(q, 'batch', 'heads', None, None)
    k = constrain(k, 'batch', 'kv_heads', None, None)
    v = constrain(v, 'batch', 'kv_heads', None, None)
    new = None
    if cache is not None:
      # As an output of the scan over layers, the whole cache would be copied for every token.
      new = {'k': k, 'v': v}
      k, v = (jax.lax.dynamic_update_slice(cache[n], x, (0, 0, index, 0)) for n, x in new.items())
    if mask.ndim == 2:
      out = flash.attention(c, q, k, v, mask)
    else:
      out = layers.attention(q, k, v, mask, c.query_scale, c.attention_cap)
    wo = param('wo', _init('wo', (2 * c.num_layers) ** -0.5))
    out = out.swapaxes(1, 2)
    observe.note(self, 'heads', observe.moments, out, real)
    out = out.reshape(x.shape[:2] + (-1,))
    out = layers.linear(out, wo.reshape(-1, c.embed))
    if c.out_bias:
      out = out + param('bo', nn.initializers.zeros).reshape(1, 1, -1)
    return out, new

  def _norm(self, y, param, name):
    """Normalise y [b,h,t,c] over each head, or over all heads together."""
    c = self.cfg
    if c.qk_norm == 'head':
      return layers.rms_norm(y, param(name, _scale_init(c)), c.norm_eps, c.norm_offset)
    scale = param(f'{name}_all', _scale_init(c)).reshape(-1)
    y = y.swapaxes(1, 2)  # [b,t,h,c]
    flat = y.reshape(*y.shape[:2], -1)
    flat = layers.rms_norm(flat, scale, c.norm_eps, c.norm_offset)
    return flat.reshape(y.shape).swapaxes(1, 2)


class Mlp(nn.Module):
  """A gated MLP."""

  cfg: DecoderConfig
  size: int

  @nn.compact
  def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
    """Map x [b,t,d] to [b,t,d]; observations count the tokens that are `real` [b,t]."""
    c, biases = self.cfg, None
    if c.mlp_bias:
      sizes = {'b_gate': self.size, 'b_up': self.size, 'b_down': c.embed}
      biases = [self.param(name, nn.initializers.zeros, (n,)) for name, n in sizes.items()]
    note = lambda hidden: observe.note(self, 'mlp', observe.moments, hidden, real)
    return layers.glu(x, *_mlp_weights(self, c, self.size), c.activation, biases, note)


def _mlp_weights(module: nn.Module, c: DecoderConfig, size: int, count: int = 0):
  """Create w_gate, w_up [d,f] and w_down [f,d], or stacks of `count` of each."""

  def param(name, shape, gain=1.0):
    init = _init(name, gain)
    if not count:
      return module.param(name, init, shape)
    stack = lambda key, shape: jax.vmap(lambda k: init(k, shape[1:]))(jax.random.split(key, count))
    return module.param(name, stack, (count, *shape))

  return (
    param('w_gate', (c.embed, size)),
    param('w_up', (c.embed, size)),
    param('w_down', (size, c.embed), (2 * c.num_layers) ** -0.5),
  )


class Experts(nn.Module):
  """The stacked weights of all experts."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return w_gate, w_up [e,d,f] and w_down [e,f,d]."""
    return _mlp_weights(self, self.cfg, self.cfg.mlp, self.cfg.num_experts)


class Moe(nn.Module):
  """A token-routed mixture of experts."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, moe.Routing]:
    """Map x [b,t,d] to [b,t,d]; return the statistics of routing over the `real` [b,t] tokens."""
    c = self.cfg
    router = self.param('w_router', _init('w_router'), (c.embed, c.num_experts))
    weights, ids, routing = moe.route(x, router, c.experts_per_token, c.renormalise)
    experts = Experts(c, name='experts')()
    out = moe.DISPATCH[c.dispatch](x, weights, ids, *experts, c.activation)
    observe.note(
      self, 'routed', moe.expert_statistics, x, weights, ids, real, experts, c.activation
    )
    if c.shared_mlp:
      out = out + Mlp(c, c.shared_mlp, name='shared')(x, real)
    return out, moe.sums(routing, real)
