"""The decoder: every model that `slm` trains or ships is one of these."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from slm.models import layers, moe
from slm.models.blocks import Block, Norm
from slm.models.config import DecoderConfig
from slm.models.observe import KEPT, STATS
from slm.weights.axes import Params
from slm.weights.sharding import constrain

# What a block keeps for its backward pass: everything, the products with weights, or its input.
REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.save_only_these_names('linear'),
  'full': jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class Output:
  """What a forward pass returns; logits are a separate call so that losses can chunk them.

  hidden [b,t,d] is after the final norm; cap bounds the logits made of it, see `logits`; routing
  [b,l,...] is what token routing did, see moe.sums; states are those asked for, [b,t,d] each.
  """

  hidden: jax.Array
  cache: dict[str, jax.Array] | None = None
  routing: moe.Routing | None = None
  states: tuple[jax.Array, ...] = ()
  cap: float = flax.struct.field(pytree_node=False, default=0.0)


class Decoder(nn.Module):
  """Embedding, scanned blocks, final norm."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(
    self,
    batch: dict[str, jax.Array],
    cache: dict | None = None,
    states: tuple[int, ...] = (),
  ) -> Output:
    """Run inputs, positions and segments [b,t]; a cache continues where it stopped.

    A query sees the keys of its own segment at its own or an earlier index; segment 0 is padding.
    `states` asks for the residual stream at 0, the embedding, or i, what the i-th block gives.
    """
    c = self.cfg
    shape = (c.vocab, c.embed)
    init = nn.initializers.normal(c.embed**-0.5)
    embedding = self.param('embedding', init, shape)
    if not c.tied:
      self.param('lm_head', init, shape)
    x = jnp.take(embedding, batch['inputs'], axis=0)
    if c.embed_scale:
      x = x * jnp.asarray(c.embed**0.5, x.dtype)  # rounded first, as Gemma does
    x = constrain(x, 'batch', None, None)
    tables, kinds = _tables(c, batch['positions'])

    queries, index = batch['segments'], 0
    keys, kv = queries, None
    if cache is not None:
      index = cache['index']
      keys = jax.lax.dynamic_update_slice(cache['segments'], queries, (0, index))
      kv = {'k': cache['k'], 'v': cache['v']}
    t, mask = queries.shape[1], _mask(c, kinds, queries, keys, index)

    block = Block
    if REMAT[c.remat]:
      block = nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])

    def one(block, carry, layer, *rest):
      x, kept = carry
      x, out = block(x, *rest)
      return (x, tuple(jnp.where(layer == s, x, k) for s, k in zip(states, kept, strict=True))), out

    stack = nn.scan(
      one,
      variable_axes={'params': 0, STATS: 0, KEPT: 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast, 0, 0, nn.broadcast, nn.broadcast),
      out_axes=(0, 1),  # the cache by layer, routing [b,l,...]
      length=c.num_layers,
      unroll=c.unroll,
    )
    kind = jnp.array([kinds.index(name) for name in c.layer_types]) if len(kinds) > 1 else None
    # Carried rather than stacked over layers: only the states asked for are ever held.
    carry, layer = (x, (x,) * len(states)), jnp.arange(1, c.num_layers + 1)
    (x, kept), (new, routing) = stack(
      block(c, name='blocks'), carry, layer, tables, mask, kind, kv, index, queries > 0
    )
    hidden = Norm(c, name='final_norm')(x, queries > 0)
    if cache is not None:
      put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, 0, 0, index, 0))
      cache = {**jax.tree.map(put, kv, new), 'segments': keys, 'index': index + t}
    return Output(hidden, cache, routing, kept, c.logit_cap)


def _mask(
  c: DecoderConfig, kinds: list[str], queries: jax.Array, keys: jax.Array, index: Any
) -> jax.Array:
  """Return which keys [b,s] queries [b,t] that begin at `index` see: [b,t,s] bool.

  With windows the mask leads with an axis for the kinds of layers; a block takes its own.
  """
  t, s = queries.shape[1], keys.shape[1]
  distance = (index + jnp.arange(t))[:, None] - jnp.arange(s)[None, :]
  mask = (distance >= 0)[None] & (queries[:, :, None] == keys[:, None, :])
  if not c.window:
    return mask
  near = jnp.array([c.window if kind == 'window' else t + s for kind in kinds])
  return mask[None] & (distance[None, None] < near[:, None, None, None])


def _tables(c: DecoderConfig, positions: jax.Array) -> tuple[Any, list[str]]:
  """Return the RoPE tables of positions [b,t], and the kinds of layers that the model has.

  With several kinds each table leads with an axis for them.
  """
  kinds = sorted(set(c.layer_types)) or ['full']
  scaling = (c.rope, c.rope_factor, c.rope_low, c.rope_high, c.rope_context)
  plain = ('default', 1.0, 1.0, 1.0, 1)
  made = []
  for kind in kinds:
    own = kind == 'window' and c.rope_theta_window  # as Gemma 3: short layers have their own
    theta, how = (c.rope_theta_window, plain) if own else (c.rope_theta, scaling)
    frequency = layers.rope_frequencies(c.head_dim, theta, *how)
    made.append(layers.rope_tables(positions, 0 * frequency if kind == 'nope' else frequency))
  if len(kinds) == 1:
    return made[0], kinds
  return jax.tree.map(lambda *x: jnp.stack(x), *made), kinds


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


def logits(weight: jax.Array, hidden: jax.Array, cap: float = 0.0) -> jax.Array:
  """Map hidden [...,d] by weight [v,d] to float32 logits [...,v], cap * tanh(logits / cap)."""
  found = jnp.einsum('...d,vd->...v', hidden, weight, preferred_element_type=jnp.float32)
  return cap * jnp.tanh(found / cap) if cap else found


def unembed(params: Params, out: Output) -> jax.Array:
  """Return the float32 logits [...,v] of a forward pass."""
  return logits(head(params), out.hidden, out.cap)
