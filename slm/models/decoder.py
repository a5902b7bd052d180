"""The decoder that all models are: forward pass, cache and logits."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from slm.models import flash, layers, moe
from slm.models.blocks import Block, Norm
from slm.models.config import DecoderConfig
from slm.models.observe import KEPT, STATS
from slm.weights import sharding
from slm.weights.axes import Params
from slm.weights.sharding import constrain

# What a block saves for its backward pass: everything, the products with weights, or its input.
REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.save_only_these_names('linear'),
  'full': jax.checkpoint_policies.nothing_saveable,
}
RING = 'ring'  # in a cache whose index goes round


@flax.struct.dataclass
class Output:
  """The result of a forward pass; losses compute logits themselves, in chunks.

  Attributes:
    hidden: activations [b,t,d] after the final norm.
    cache: the updated cache, if one was given.
    routing: statistics [b,l,...] of token routing, see moe.sums.
    states: the requested states of the residual stream, [b,t,d] each.
    cap: the cap of the logits, see `logits`.
  """

  hidden: jax.Array
  cache: dict[str, jax.Array] | None = None
  routing: moe.Routing | None = None
  states: tuple[jax.Array, ...] = ()
  cap: float = flax.struct.field(pytree_node=False, default=0.0)


class Decoder(nn.Module):
  """An embedding, a scan over blocks, and a final norm."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(
    self, batch: dict[str, jax.Array], cache: dict | None = None, states: tuple[int, ...] = ()
  ) -> Output:
    """Run inputs, positions and segments [b,t], after the content of a cache if one is given.

    Queries attend to keys of their segment up to their own index; segment 0 is padding. `states`
    requests the residual stream after the embedding (0) or the i-th block (i, from 1).
    """
    c = self.cfg
    x = constrain(self._embed(batch['inputs']), 'batch', None, None)
    tables, kinds = _tables(c, batch['positions'])

    queries, index, ring = batch['segments'], 0, cache is not None and RING in cache
    keys, kv = queries, None
    if cache is not None:
      index = cache['index']
      keys = jax.lax.dynamic_update_slice(cache['segments'], queries, (0, index))
      kv = {'k': cache['k'], 'v': cache['v']}
    t = queries.shape[1]
    kernel = 'reference' if self.is_initializing() else flash.kernel(c, t, cache is not None)
    mask = _mask(c, kinds, queries, keys, index, ring) if kernel == 'reference' else queries

    block = Block
    if REMAT[c.remat]:
      block = nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])

    def layer(block, carry, number, *inputs):
      x, kept = carry
      x, out = block(x, *inputs)
      kept = tuple(jnp.where(number == s, x, k) for s, k in zip(states, kept, strict=True))
      return (x, kept), out

    stack = nn.scan(
      layer,
      variable_axes={'params': 0, STATS: 0, KEPT: 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast, 0, 0, nn.broadcast, nn.broadcast),
      out_axes=(0, 1),  # the cache by layer, routing [b,l,...]
      length=c.num_layers,
      unroll=c.unroll,
    )
    kind = jnp.array([kinds.index(name) for name in c.layer_types]) if len(kinds) > 1 else None
    # States are carried rather than stacked over layers: only the requested ones are held.
    carry, numbers = (x, (x,) * len(states)), jnp.arange(1, c.num_layers + 1)
    inputs = tables, mask, kind, kv, index, queries > 0
    weights = None if self.is_initializing() else self.get_variable('params', 'blocks')
    if isinstance(weights, list):  # as `by_layer` splits them
      run = functools.partial(_unrolled, layer, block(c, parent=None), weights, carry)
    else:
      run = functools.partial(stack, block(c, name='blocks'), carry, numbers)
    (x, kept), (new, routing) = run(*inputs)
    hidden = Norm(c, name='final_norm')(x, queries > 0)
    if cache is not None:
      after = (index + t) % keys.shape[1] if ring else index + t
      cache = {**cache, **_appended(kv, new, index), 'segments': keys, 'index': after}
    return Output(hidden, cache, routing, kept, c.logit_cap)

  def _embed(self, ids: jax.Array) -> jax.Array:
    """Create the embedding, and the head if it is another matrix; map ids [b,t] to [b,t,d]."""
    c = self.cfg
    shape = (c.vocab, c.embed)
    init = nn.initializers.normal(c.embed**-0.5)
    embedding = self.param('embedding', init, shape)
    if not c.tied:
      self.param('lm_head', init, shape)
    x = jnp.take(embedding, ids, axis=0)
    # Gemma rounds the factor too.
    return x * jnp.asarray(c.embed**0.5, x.dtype) if c.embed_scale else x


def _unrolled(layer, block, weights, carry, tables, mask, kinds, kv, index, real):
  """Run the layers one by one, with their weights and caches apart; return what their scan does."""
  outs = []
  for i, params in enumerate(weights):
    cache = None if kv is None else {name: held[i] for name, held in kv.items()}
    kind = None if kinds is None else kinds[i]
    run = functools.partial(block.apply, {'params': params})
    carry, out = layer(run, carry, i + 1, tables, mask, kind, cache, index, real)
    outs.append(out)
  entries, routing = zip(*outs, strict=True)
  new = None if kv is None else {name: [entry[name] for entry in entries] for name in kv}
  return carry, (new, jax.tree.map(lambda *x: jnp.stack(x, axis=1), *routing))


def _appended(kv: Any, new: Any, index: jax.Array) -> Any:
  """Write the new keys and values of all layers into their caches [...,s,c], from `index` on."""
  start = lambda old: (*(0,) * (old.ndim - 2), index, 0)
  return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new, start(old)), kv, new)


def by_layer(held: dict[str, Any]) -> dict[str, Any]:
  """Split the layers of weights, or of a cache, into lists, if the code being traced is for CPU.

  The forward pass then runs them one by one. A scan over layers in a loop over tokens copies the
  weights and the cache of each layer for each token on CPU.
  """
  if sharding.platform() != 'cpu':
    return held

  def split(stacked):
    count = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]

  return {name: split(x) if name in ('blocks', 'k', 'v') else x for name, x in held.items()}


def _mask(
  c: DecoderConfig, kinds: list[str], queries: jax.Array, keys: jax.Array, index: Any,
  ring: bool = False,
) -> jax.Array:  # fmt: skip
  """Return the mask [b,t,s] of queries [b,t], the first at `index`, and keys [b,s].

  In a `ring` of keys those after the index are the oldest ones; t is 1.
  With windows the mask has a leading axis for the kinds of layers, and each block takes its own.
  """
  t, s = queries.shape[1], keys.shape[1]
  distance = (index + jnp.arange(t))[:, None] - jnp.arange(s)[None, :]
  distance = distance % s if ring else distance
  mask = (distance >= 0)[None] & (queries[:, :, None] == keys[:, None, :])
  if not c.window:
    return mask
  near = jnp.array([c.window if kind == 'window' else t + s for kind in kinds])
  return mask[None] & (distance[None, None] < near[:, None, None, None])


def _tables(c: DecoderConfig, positions: jax.Array) -> tuple[Any, list[str]]:
  """Return the RoPE tables of positions [b,t], and the kinds of layers of the model.

  With several kinds each table has a leading axis for them.
  """
  kinds = sorted(set(c.layer_types)) or ['full']
  tables = []
  for kind in kinds:
    if kind == 'window' and c.rope_theta_window:  # Gemma 3
      theta, scaling = c.rope_theta_window, ('default', 1.0, 1.0, 1.0, 1)
    else:
      theta = c.rope_theta
      scaling = (c.rope, c.rope_factor, c.rope_low, c.rope_high, c.rope_context)
    frequency = layers.rope_frequencies(c.head_dim, theta, *scaling)
    tables.append(layers.rope_tables(positions, 0 * frequency if kind == 'nope' else frequency))
  if len(kinds) == 1:
    return tables[0], kinds
  return jax.tree.map(lambda *x: jnp.stack(x), *tables), kinds


def init_cache(
  cfg: DecoderConfig, batch: int, length: int, dtype: Any, ring: bool = False
) -> dict[str, Any]:
  """Allocate a cache for `batch` rows of at most `length` tokens.

  In a ring the latest `length` tokens are kept, which are read one at a time. A row may then hold
  one text after the other, if each has at most `length` tokens and a segment of its own.
  """
  shape = (cfg.num_layers, batch, cfg.num_kv_heads, length, cfg.head_dim)
  return {
    'k': jnp.zeros(shape, dtype),
    'v': jnp.zeros(shape, dtype),
    'segments': jnp.zeros((batch, length), jnp.int32),
    'index': jnp.zeros((), jnp.int32),
    **({RING: ()} if ring else {}),
  }


def head(params: Params) -> jax.Array:
  """Return the output matrix [v,d]: lm_head, or the embedding if tied."""
  return params['lm_head'] if 'lm_head' in params else params['embedding']


def logits(weight: jax.Array, hidden: jax.Array, cap: float = 0.0) -> jax.Array:
  """Map hidden [...,d] by weight [v,d] to float32 logits [...,v], or cap * tanh(logits / cap)."""
  logits = jnp.einsum('...d,vd->...v', hidden, weight, preferred_element_type=jnp.float32)
  return cap * jnp.tanh(logits / cap) if cap else logits


def unembed(params: Params, out: Output) -> jax.Array:
  """Return the float32 logits [...,v] of a forward pass."""
  return logits(head(params), out.hidden, out.cap)
