"""A token-routed mixture of experts in place of an MLP (Shazeer et al. 2017; as in Mixtral).

Every token goes to the k experts with the largest router probabilities, and their outputs are
summed with those probabilities, renormalised or (OLMoE) not. No token is dropped. Letters in
shapes: b batch, t position, d embed, f mlp, e experts.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from slm.models import layers, observe
from slm.weights import sharding

Routing = dict[str, jax.Array]


def route(
  x: jax.Array, w_router: jax.Array, k: int, renormalise: bool = True
) -> tuple[jax.Array, jax.Array, Routing]:
  """Choose k experts for every token of x [b,t,d]: weights and ids [b,t,k], and statistics.

  The router computes in float32. The statistics serve the auxiliary losses: probabilities and
  choices [b,t,e], squared log-partition [b,t].
  """
  logits = jnp.einsum('btd,de->bte', x.astype(jnp.float32), w_router.astype(jnp.float32))
  probabilities = jax.nn.softmax(logits, axis=-1)
  weights, ids = jax.lax.top_k(probabilities, k)
  if renormalise:
    weights = weights / weights.sum(-1, keepdims=True)
  chosen = jax.nn.one_hot(ids, logits.shape[-1]).sum(-2)
  z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
  return weights, ids, {'probability': probabilities, 'chosen': chosen, 'z': z}


def sums(routing: Routing, real: jax.Array) -> Routing:
  """Sum the statistics over the real tokens (bool [b,t]) of each row: [b,e] and [b]."""
  real = real.astype(jnp.float32)
  add = lambda x: jnp.einsum('bt...,bt->b...', x, real)
  return {**{name: add(x) for name, x in routing.items()}, 'tokens': real.sum(-1)}


def einsum(x, weights, ids, w_gate, w_up, w_down, activation='silu') -> jax.Array:
  """Compute every expert for every token and weight the outputs: the portable reference."""
  share = jnp.einsum('btk,btke->bte', weights, jax.nn.one_hot(ids, len(w_gate)))
  gate, up = (_saved(jnp.einsum('btd,edf->btef', x, w)) for w in (w_gate, w_up))
  hidden = layers.ACTIVATIONS[activation](gate) * up * share[..., None].astype(x.dtype)
  return jnp.einsum('btef,efd->btd', sharding.constrain(hidden, 'batch', None, None, 'mlp'), w_down)


def ragged(x, weights, ids, w_gate, w_up, w_down, activation='silu') -> jax.Array:
  """Sort tokens by expert and multiply each group by its matrix: compute only chosen experts.

  Each device sorts the tokens of its own rows and gathers the experts' weights.
  """
  fn = functools.partial(_ragged, count=len(w_gate), activation=activation)
  mesh = jax.sharding.get_abstract_mesh()
  shards = sharding.batch_shards()
  if shards == 1 or len(x) % shards:
    return fn(x, weights, ids, w_gate, w_up, w_down)
  rows, whole = sharding.spec(('batch',), mesh), jax.sharding.PartitionSpec()
  mapped = jax.shard_map(
    fn, mesh=mesh, in_specs=(rows,) * 3 + (whole,) * 3, out_specs=rows, check_vma=False
  )
  return mapped(x, weights, ids, w_gate, w_up, w_down)


def _ragged(x, weights, ids, w_gate, w_up, w_down, *, count, activation):
  b, t, d = x.shape
  k = ids.shape[-1]
  ids, weights = ids.reshape(-1), weights.reshape(-1)
  order = jnp.argsort(ids, stable=True)
  sizes = jnp.bincount(ids, length=count).astype(jnp.int32)
  tokens = order // k
  x_sorted = x.reshape(-1, d)[tokens]
  dot = lambda a, w: jax.lax.ragged_dot(a, w, sizes)
  gate, up = _saved(dot(x_sorted, w_gate)), _saved(dot(x_sorted, w_up))
  hidden = layers.ACTIVATIONS[activation](gate) * up
  out = dot(hidden, w_down) * weights[order][:, None].astype(x.dtype)
  return jnp.zeros((b * t, d), x.dtype).at[tokens].add(out).reshape(b, t, d)


DISPATCH = {'einsum': einsum, 'ragged': ragged}


def _saved(product: jax.Array) -> jax.Array:
  """Name a product with weights, so that remat='dots' can save it, as layers.linear does."""
  return checkpoint_name(product, 'linear')


def expert_statistics(
  x: jax.Array,
  weights: jax.Array,
  ids: jax.Array,
  real: jax.Array,
  experts: tuple[jax.Array, ...],
  activation: str,
) -> dict[str, jax.Array]:
  """Return statistics of every expert over the real tokens [b,t] sent to it, in float32.

  'experts' [e,3]: the sum of gate x ||output|| (REAP, arXiv 2510.13999), the number of tokens and
  the number of sequences; 'mlp' [e,3,2,f]: observe.moments of the inputs of its down projection,
  without the gate. Experts are computed one at a time, whatever the dispatch.
  """

  def statistics(expert):
    number, w_gate, w_up, w_down = expert
    chosen = (ids == number) & real[..., None]
    sent = chosen.any(-1)
    hidden = layers.ACTIVATIONS[activation](jnp.dot(x, w_gate)) * jnp.dot(x, w_up)
    norm = jnp.linalg.norm(jnp.dot(hidden, w_down).astype(jnp.float32), axis=-1)
    gate = (weights * chosen).sum(-1)
    sums = jnp.stack([(gate * norm).sum(), sent.sum(), sent.any(1).sum()])
    return {'experts': sums, 'mlp': observe.moments(hidden, sent)}

  return jax.lax.map(statistics, (jnp.arange(len(experts[0])), *experts))


def balance(routing: Routing) -> jax.Array:
  """Return the load-balance loss, e x sum_e f_e P_e (Fedus et al. 2021, eq. 4), mean over layers.

  `routing` holds the `sums` [b,l,e] of a batch; f_e is the share of choices, P_e the mean
  probability. The loss is 1 if tokens and probabilities are spread evenly.
  """
  share, mean = routing['chosen'].sum(0), routing['probability'].sum(0)
  share, mean = (x / jnp.maximum(x.sum(-1, keepdims=True), 1e-9) for x in (share, mean))
  return jnp.mean(routing['chosen'].shape[-1] * jnp.sum(share * mean, axis=-1))
