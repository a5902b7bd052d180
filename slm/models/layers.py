"""Layers of a Llama-style decoder as functions over arrays.

Letters in shapes and einsums: b batch, t query position, s key position, d embed, h query heads,
k kv heads, g queries per kv head, c head_dim, f mlp (or any output), l layers, v vocab.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from slm.weights import sharding
from slm.weights.sharding import constrain

_MASKED = -1e30  # finite: a padding query, with all keys masked, must not give NaN


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: bool = False) -> jax.Array:
  """Divide by the root mean square of the last axis, in float32 (Zhang & Sennrich 2019).

  The result is cast to x's type and multiplied by the scale, as in Llama; with `offset` it is
  multiplied by 1 + scale and cast, as in Gemma.
  """
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
  if offset:
    return (y * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
  return y.astype(x.dtype) * scale.astype(x.dtype)


def rope_frequencies(
  head_dim: int, theta: float, kind: str, factor: float, low: float, high: float, context: int
) -> jax.Array:
  """Return the radians per position of each pair of dimensions, [head_dim/2] in float32.

  `linear` divides all by the factor (Chen et al. 2023); `llama3` divides those with fewer than
  `low` turns over the `context` of the first training, keeps those with more than `high` turns, and
  interpolates between.
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  return ROPES[kind](frequency, factor, low, high, context)


def _llama3(frequency, factor, low, high, context):
  turns = context * frequency / (2 * jnp.pi)
  kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return frequency * (kept + (1 - kept) / factor)


ROPES = {
  'default': lambda frequency, *_: frequency,
  'linear': lambda frequency, factor, *_: frequency / factor,
  'llama3': _llama3,
}


def rope_tables(positions: jax.Array, frequency: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return cosines and sines [b,1,t,head_dim/2] in float32 for positions [b,t]."""
  angle = positions[:, None, :, None].astype(jnp.float32) * frequency[None, None, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotate the two halves of x [b,h,t,c] against each other (Su et al. 2021, Llama layout)."""
  cos, sin = tables
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float = 0.0, cap: float = 0.0
) -> jax.Array:
  """Attend with grouped queries: q [b,h,t,c], k and v [b,k,s,c], mask [b,t,s] -> [b,h,t,c].

  Scores are divided by sqrt(scale), or sqrt(c) if it is 0, and with a cap become
  cap * tanh(scores / cap). The mask must be causal: if t == s, blocks of scores above the diagonal
  are not computed.
  """
  b, heads, t, c = q.shape
  kv_heads = k.shape[1]
  q = q.reshape(b, kv_heads, heads // kv_heads, t, c) * ((scale or c) ** -0.5)
  bias = jnp.where(mask, 0.0, _MASKED)[:, None, None]
  out = _attend_capped(q, k, v, bias, cap) if cap else _attend(q, k, v, bias)
  return out.reshape(b, heads, t, c)


@functools.partial(jax.checkpoint, static_argnums=4)
def _attend_capped(q, k, v, bias, cap):
  """Attend as `_attend`, with capped scores and the gradient of autodiff."""
  scores = cap * jnp.tanh(_scores(q, k, 0.0) / cap) + bias
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('bkgts,bksc->bkgtc', weights, v)


def mean_keys(t: int) -> float:
  """Return the mean number of scores that `attention` computes per query of a text of t tokens."""
  return sum((end - start) * keys for start, end, keys in _blocks(t, t)) / t


def _blocks(t: int, s: int) -> list[tuple[int, int, int]]:
  """Return blocks (start, end, keys): queries [start, end) attend to the first `keys` of s."""
  if s != t:
    return [(0, t, s)]
  # Four blocks compute 62 % of the square; more would lengthen compilation.
  count = min(4, max(t // 128, 1))
  ends = [-(-t * i // count) for i in range(count + 1)]
  return [(start, end, end) for start, end in zip(ends, ends[1:], strict=False)]


def _by_row(attend: Callable, q: jax.Array, *rest: jax.Array) -> Any:
  """Map over the rows on one CPU device: a core's cache holds the scores of a row, not of a batch.

  On several devices a loop over rows would gather them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  devices = jax.device_count() if mesh.empty else mesh.size
  if sharding.platform() != 'cpu' or devices > 1 or q.shape[0] == 1:
    return attend(q, *rest)
  one = lambda row: jax.tree.map(lambda x: x[0], attend(*jax.tree.map(lambda x: x[None], row)))
  return jax.lax.map(one, (q, *rest))


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
  """Attend: q [b,k,g,t,c], k and v [b,k,s,c], bias [b,1,1,t,s] -> [b,k,g,t,c]."""
  return _attend_fwd(q, k, v, bias)[0]


def _scores(q, k, bias):
  return jnp.einsum('bkgtc,bksc->bkgts', q, k, preferred_element_type=jnp.float32) + bias


def _attend_fwd(q, k, v, bias):
  b, kv_heads, groups, t, _ = q.shape
  # Smaller batches gain nothing by it forward, as measured on two cores with 2 MB each.
  large = t == k.shape[2] and 4 * b * kv_heads * groups * t * t >= 2**26
  out, norms = _by_row(_forward, q, k, v, bias) if large else _forward(q, k, v, bias)
  return out, (q, k, v, bias, out, norms)


def _forward(q, k, v, bias):
  """Return what `_attend` does, and the logarithms of the weights' sums [b,k,g,t,1]."""
  outs, norms = [], []
  for start, end, keys in _blocks(q.shape[3], k.shape[2]):
    rows = slice(start, end)
    scores = _scores(q[:, :, :, rows], k[:, :, :keys], bias[:, :, :, rows, :keys])
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights, values = weights.astype(v.dtype), v[:, :, :keys]
    out = jnp.einsum('bkgts,bksc->bkgtc', weights, values, preferred_element_type=jnp.float32)
    outs.append((out / total).astype(v.dtype))
    norms.append(top + jnp.log(total))
  return jnp.concatenate(outs, axis=3), jnp.concatenate(norms, axis=3)


def _attend_bwd(residuals, d_out):
  return *_by_row(_backward, d_out, *residuals), None


def _backward(d_out, q, k, v, bias, out, norms):
  """Return the gradients of q, k and v [b,k,g,t,c], from that of `out`."""
  # Recomputing the weights costs less than storing [t,s] residuals. The row sums of the weights
  # times their gradient equal those of `out` times its gradient (Dao et al. 2022, §B): autodiff
  # would reduce over the [t,s] products instead, which took 40 % of a step on CPU.
  product = d_out.astype(jnp.float32) * out.astype(jnp.float32)
  row_sums = jnp.sum(product, axis=-1, keepdims=True)
  # Gradients of k and v are formed as [c,s], which avoids a transpose of [t,s] operands.
  d_q, d_k, d_v = [], *(jnp.zeros(x.swapaxes(2, 3).shape, jnp.float32) for x in (k, v))
  by_key = functools.partial(jnp.einsum, 'bkgtc,bkgts->bkcs', preferred_element_type=jnp.float32)
  for start, end, keys in _blocks(q.shape[3], k.shape[2]):
    qi, gi, norm, row = (x[:, :, :, start:end] for x in (q, d_out, norms, row_sums))
    ki, vi = k[:, :, :keys], v[:, :, :keys]
    weights = jnp.exp(_scores(qi, ki, bias[:, :, :, start:end, :keys]) - norm)
    to_weights = jnp.einsum('bkgtc,bksc->bkgts', gi, vi, preferred_element_type=jnp.float32)
    to_scores = (weights * (to_weights - row)).astype(q.dtype)
    d_q.append(jnp.einsum('bkgts,bksc->bkgtc', to_scores, ki))
    d_k = d_k.at[..., :keys].add(by_key(qi, to_scores))
    d_v = d_v.at[..., :keys].add(by_key(gi, weights.astype(v.dtype)))
  # The barrier stops XLA from forming them as [s,c] after all: 6 % of a step on CPU.
  d_k, d_v = jax.lax.optimization_barrier((d_k.astype(k.dtype), d_v.astype(v.dtype)))
  return jnp.concatenate(d_q, axis=3), d_k.swapaxes(2, 3), d_v.swapaxes(2, 3)


_attend.defvjp(_attend_fwd, _attend_bwd)


def linear(x: jax.Array, w: jax.Array) -> jax.Array:
  """Multiply x [b,t,d] by w [d,f] -> [b,t,f]; named, so that remat='dots' can save it."""
  return checkpoint_name(_linear(x, w), 'linear')


@jax.custom_vjp
def _linear(x, w):
  return jnp.einsum('btd,df->btf', x, w)


def _linear_bwd(residuals, g):
  # Autodiff would form the weight's gradient as g^T x, and XLA on CPU would transpose g inside the
  # element-wise loop that makes it; x^T g transposes x, which is in memory.
  x, w = residuals
  return jnp.einsum('btf,df->btd', g, w), jnp.einsum('btd,btf->df', x, g)


_linear.defvjp(lambda x, w: (_linear(x, w), (x, w)), _linear_bwd)


ACTIVATIONS = {'silu': jax.nn.silu, 'gelu': functools.partial(jax.nn.gelu, approximate=True)}


def glu(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  w_down: jax.Array,
  activation: str = 'silu',
  biases: Sequence[jax.Array] | None = None,
  note: Callable[[jax.Array], None] | None = None,
) -> jax.Array:
  """Apply the gated MLP of Shazeer 2020: x [b,t,d] -> [b,t,d]; biases are [f], [f] and [d].

  `note` is called with the hidden activations [b,t,f].
  """
  act = ACTIVATIONS[activation]
  # Rematerialised: only the gate and up projections are saved for the backward pass.
  gated = jax.checkpoint(lambda gate, up: act(gate) * up, prevent_cse=False)
  gate, up = linear(x, w_gate), linear(x, w_up)
  if biases is not None:
    gate, up = gate + biases[0].reshape(1, 1, -1), up + biases[1].reshape(1, 1, -1)
  hidden = constrain(gated(gate, up), 'batch', None, 'mlp')
  if note is not None:
    note(hidden)
  out = linear(hidden, w_down)
  return out if biases is None else out + biases[2].reshape(1, 1, -1)
