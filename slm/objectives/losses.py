"""Losses of logits, summed over chunks of tokens so that full logits never exist."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from slm.models import moe
from slm.models.decoder import head, logits
from slm.weights.axes import Params
from slm.weights.sharding import (
  axes_in_use,
  batch_axes,
  batch_shards,
  constrain,
  map_rows,
  platform,
  using,
)

Batch = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]  # {name: (sum, weight)}


def cross_entropy(scores: jax.Array, targets: jax.Array) -> jax.Array:
  """Return -log softmax(scores)[targets] in float32: [...,v], [...] -> [...]."""
  scores = scores.astype(jnp.float32)
  picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(scores, axis=-1) - picked


def over_tokens(
  fn: Callable, weight: jax.Array, hidden: jax.Array, targets: jax.Array, cap: float, chunk: int
) -> Any:
  """Apply fn(logits [b,c,v], targets [b,c]) -> arrays [b,c] to every position: arrays [b,t].

  The logits of weight [v,d] and hidden [b,t,d] exist for about `chunk` tokens per device at a time.
  For gradients, see `token_logprobs`.
  """

  def local(weight, hidden, targets):
    cut = functools.partial(split, chunk)
    one = lambda x: fn(logits(weight, x[0], cap), x[1])
    values = jax.lax.map(one, (cut(hidden), cut(targets)))
    return jax.tree.map(lambda x: join(x, hidden.shape[1]), values)

  if mapped := _mapped_axes(weight, hidden):
    rows = PartitionSpec(mapped)
    local = map_rows(local, (PartitionSpec(), rows, rows), rows)
  return local(weight, hidden, targets)


def token_logprobs(
  weight: jax.Array, hidden: jax.Array, targets: jax.Array, cap: float = 0.0, chunk: int = 512,
  temperature: float = 1.0,
) -> jax.Array:  # fmt: skip
  """Return log softmax of each position's logits at its target: [v,d], [b,t,d], [b,t] -> [b,t].

  The logits are divided by `temperature`. Differentiable with respect to weight and hidden, for
  losses of whole sequences (DPO, policy gradients). For a sum over tokens, `chunked` needs one
  product with the head less.
  """
  return -_token_losses(cap, chunk, temperature, axes_in_use(), weight, hidden, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _token_losses(cap, chunk, temperature, axes, weight, hidden, targets):
  loss = lambda scores, targets: cross_entropy(scores / temperature, targets)
  return over_tokens(loss, weight, hidden, targets, cap, chunk)


def _token_forward(cap, chunk, temperature, axes, *args):
  return _token_losses(cap, chunk, temperature, axes, *args), args


def _token_backward(cap, chunk, temperature, axes, args, g):
  weight, hidden, targets = args
  weighed = functools.partial(next_token, cap, temperature=temperature)
  with using(axes):  # the backward pass is traced when an enclosing map has been left
    rows = {'targets': targets, 'weights': g}
    _, gradient = _forward(weighed, chunk, weight, hidden, (), rows)
  return *gradient, None


_token_losses.defvjp(_token_forward, _token_backward)


def next_token(
  cap: float, weight: jax.Array, hidden: jax.Array, _, rows: Batch, temperature: float = 1.0
) -> dict[str, jax.Array]:
  """Sum the weighted next-token loss over tokens [b,c], for `chunked`."""
  nll = cross_entropy(logits(weight, hidden, cap) / temperature, rows['targets'])
  return {'loss': jnp.sum(nll * rows['weights'])}


@jax.custom_vjp
def forward_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """Return KL(teacher || student) over the last axis of two logit arrays [...,v]."""
  return _forward_kl(teacher, student)[0]


def _forward_kl(teacher, student):
  # By hand: automatic differentiation makes more passes over the vocabulary.
  shifted = tuple(x - x.max(axis=-1, keepdims=True) for x in (teacher, student))
  exps = tuple(map(jnp.exp, shifted))
  sums = tuple(x.sum(axis=-1, keepdims=True) for x in exps)
  log_p, log_q = (x - jnp.log(z) for x, z in zip(shifted, sums, strict=True))
  kl = jnp.sum(exps[0] * (log_p - log_q), axis=-1) / sums[0][..., 0]
  return kl, (exps, sums, log_p - log_q, kl)


def _backward_kl(residuals, g):
  exps, sums, log_ratio, kl = residuals
  (p, q), g = (x / z for x, z in zip(exps, sums, strict=True)), g[..., None]
  return p * (log_ratio - kl[..., None]) * g, (q - p) * g


forward_kl.defvjp(_forward_kl, _backward_kl)


def reverse_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """Return KL(student || teacher) over the last axis of two logit arrays [...,v]."""
  return forward_kl(student, teacher)


def jensen_shannon(teacher: jax.Array, student: jax.Array, beta: float = 0.5) -> jax.Array:
  """Return beta KL(teacher || m) + (1-beta) KL(student || m) over the last axis of logits [...,v].

  m = beta teacher + (1-beta) student (generalised JSD, Agarwal et al. 2023, arXiv 2306.13649).
  """
  p, q = jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(student, axis=-1)
  m = jnp.logaddexp(p + jnp.log(beta), q + jnp.log1p(-beta))
  kl_to_m = lambda x: jnp.sum(jnp.exp(x) * (x - m), axis=-1)
  return beta * kl_to_m(p) + (1 - beta) * kl_to_m(q)


def cosine(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """Return 1 - cosine of the two distributions over the last axis of logits [...,v]."""
  p, q = jax.nn.softmax(teacher, axis=-1), jax.nn.softmax(student, axis=-1)
  norms = jnp.linalg.norm(p, axis=-1) * jnp.linalg.norm(q, axis=-1)
  return 1 - jnp.sum(p * q, axis=-1) / norms


def squared(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """Return the mean squared difference of logits [...,v] over their last axis."""
  return jnp.mean(jnp.square(teacher - student), axis=-1)


def with_tail(teacher: jax.Array, student: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Reduce logits [...,v] to log-probabilities [...,k+1]: the teacher's k best, all others merged.

  Unlike renormalising over the k, this matches the mass outside of them too.
  """
  p, q = jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(student, axis=-1)
  best, ids = jax.lax.top_k(p, k)
  return tailed(best), tailed(jnp.take_along_axis(q, ids, axis=-1))


def tailed(log_probs: jax.Array) -> jax.Array:
  """Append to log-probabilities [...,k] that of everything else: [...,k+1]."""
  rest = jnp.log(jnp.maximum(1 - jnp.exp(log_probs).sum(-1, keepdims=True), 1e-7))
  return jnp.concatenate([log_probs, rest], axis=-1)


def weighted(
  sums: dict[str, jax.Array], routing: dict[str, jax.Array] | None, weight: jax.Array, cfg: Any
) -> Sums:
  """Return {name: (sum, weight)}; a router adds its terms, weighed by cfg.balance and cfg.z.

  These are means over the microbatch's tokens times its weight, so that microbatches add up; 'nll'
  is then the loss without them.
  """
  if routing is not None:
    balance = moe.balance(routing) * weight
    z = routing['z'].sum() / jnp.maximum(routing['tokens'].sum(), 1.0) * weight
    sums = {'nll': sums['loss'], **sums, 'balance': balance, 'router_z': z}
    sums['loss'] += cfg.balance * balance + cfg.z * z
  return {name: (value, weight) for name, value in sums.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked(fn, chunk, weight, hidden, constants, rows):
  """Sum fn(weight, hidden[chunk], constants, rows[chunk]) -> {name: sum} over chunks of tokens.

  weight [v,d], hidden [b,t,d], rows: arrays [b,t,...]. Full logits [b,t,v] never exist. Only 'loss'
  is differentiable, with respect to weight and hidden.
  """
  cut = functools.partial(split, chunk)
  one = lambda x: fn(weight, x[0], constants, x[1])
  sums = jax.lax.map(one, (cut(hidden), jax.tree.map(cut, rows)))
  return jax.tree.map(lambda x: x.sum(0), sums)


def _mapped_axes(weight, hidden) -> tuple[str, ...]:
  """Return the mesh axes over which devices walk over rows of their own; () if they cannot."""
  # XLA on CPU aborts on an all-reduce in bfloat16 that meets a shard_map (AllReducePromotion).
  aborts = platform() == 'cpu' and weight.dtype == jnp.bfloat16
  return () if aborts or hidden.shape[0] % batch_shards() else batch_axes()


def _forward(fn, chunk, weight, hidden, constants, rows):
  if not (axes := _mapped_axes(weight, hidden)):
    return _gradient(fn, chunk, weight, hidden, constants, rows)

  # Each device walks over its own rows and adds up a gradient of the head of its own, so that
  # heads are gathered and the gradient is reduced once a step, not once a chunk.
  scattered = 'fsdp' if 'fsdp' in axes else None

  def local(*args):
    sums, (d_weight, d_hidden) = _gradient(fn, chunk, *args)
    if scattered:
      d_weight = jax.lax.psum_scatter(d_weight, scattered, scatter_dimension=1, tiled=True)
    d_weight = jax.lax.psum(d_weight, tuple(a for a in axes if a != scattered))
    return jax.lax.psum(sums, axes), (d_weight, d_hidden)

  whole, split_rows = PartitionSpec(), PartitionSpec(axes)
  out_specs = (whole, (PartitionSpec(None, scattered), split_rows))
  run = map_rows(local, (whole, split_rows, whole, split_rows), out_specs)
  return run(weight, hidden, constants, rows)


def _gradient(fn, chunk, weight, hidden, constants, rows):
  # The gradient of a sum can be taken chunk by chunk while the logits exist: three products with
  # the head instead of the four of a rematerialised backward pass.
  cut = functools.partial(split, chunk)

  def one(d_weight, x):
    def loss(w, h):
      sums = fn(w, h, constants, x[1])
      return sums['loss'], sums

    (_, sums), (dw, dh) = jax.value_and_grad(loss, (0, 1), has_aux=True)(weight, x[0])
    return d_weight + dw.astype(jnp.float32), (sums, dh)

  start = jnp.zeros(weight.shape, jnp.float32)
  d_weight, (sums, d_hidden) = jax.lax.scan(one, start, (cut(hidden), jax.tree.map(cut, rows)))
  d_hidden = join(d_hidden, hidden.shape[1])
  sums = jax.tree.map(lambda x: x.sum(0), sums)
  return sums, (d_weight.astype(weight.dtype), d_hidden)


def _backward(fn, chunk, residuals, cotangents):
  d_weight, d_hidden = residuals
  g = cotangents['loss']
  scale = lambda x: (x * g).astype(x.dtype)
  return scale(d_weight), scale(d_hidden), None, None


chunked.defvjp(_forward, _backward)


def split(chunk: int, x: jax.Array) -> jax.Array:
  """Cut x [b,t,...] along t into pieces [n,b,c,...] of about `chunk` tokens a device, zero-padded.

  The axis b is not cut: it is split over the mesh, and a scan over it would gather all rows.
  """
  b, t = x.shape[:2]
  size = min(max(chunk * batch_shards() // b, 1), t)
  x = jnp.pad(x, ((0, 0), (0, -t % size)) + ((0, 0),) * (x.ndim - 2))
  x = x.reshape((b, -1, size) + x.shape[2:]).swapaxes(0, 1)
  return constrain(x, None, 'batch', *(None,) * (x.ndim - 2))


def join(x: jax.Array, t: int) -> jax.Array:
  """Undo `split`: [n,b,c,...] -> [b,t,...]."""
  x = x.swapaxes(0, 1)
  return x.reshape((x.shape[0], -1) + x.shape[3:])[:, :t]


def target_logprobs(
  forward: Callable, params: Params, batch: Batch, chunk: int, temperature: float = 1.0
) -> jax.Array:
  """Return the log-probability of every position's target, [b,t] float32."""
  out = forward(params, batch)
  return token_logprobs(head(params), out.hidden, batch['targets'], out.cap, chunk, temperature)


def token_losses(forward: Callable, params: Params, batch: Batch, chunk: int) -> jax.Array:
  """Return the weighted next-token loss of every position, [b,t] float32."""
  return -target_logprobs(forward, params, batch, chunk) * batch['weights']
