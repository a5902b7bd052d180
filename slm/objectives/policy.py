"""Policy gradients, relative to a group of answers (GRPO and its kin) or to values (PPO)."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from slm.objectives import losses
from slm.objectives.losses import Batch, Sums
from slm.runs.config import PolicyConfig
from slm.weights.axes import Params

_FAR = 40.0  # log-ratios are clipped to it: exp(40) and its square are finite in float32
_TINY = 1e-20  # a weight where nothing is trained: 0 / _TINY is 0, and n + _TINY is n


def group_advantage(scores: jax.Array, kind: str) -> jax.Array:
  """Return the advantage of every answer in its group: scores [q,g] -> [q,g].

  'std': (score - mean) / (std + 1e-8), std with g - 1 in the divisor (GRPO, arXiv 2402.03300);
  'center': score - mean (Dr. GRPO, arXiv 2503.20783); 'loo': score - mean of the other g - 1
  (RLOO, arXiv 2402.14740).
  """
  # From the first of the group: the mean of equal scores may be rounded, and 1e-8 is no more than
  # that, so that 'std' would give all of them the same advantage of up to 1.
  relative = scores - scores[..., :1]
  centred = relative - relative.mean(-1, keepdims=True)
  size = scores.shape[-1]
  if kind == 'loo':
    return centred * (size / (size - 1))
  if kind == 'center':
    return centred
  return centred / (jnp.sqrt(jnp.sum(centred**2, -1, keepdims=True) / (size - 1)) + 1e-8)


def kl_estimate(logp: jax.Array, ref: jax.Array, kind: str) -> jax.Array:
  """Estimate KL(policy || reference) at sampled tokens from the log-probabilities of both.

  With d = logp - ref, clipped to +-40: 'k1' is d, 'k2' d^2 / 2, 'k3' exp(-d) - 1 + d, which is
  never negative (Schulman 2020, "Approximating KL divergence").
  """
  d = jnp.clip(logp - ref, -_FAR, _FAR)
  return {'k1': lambda: d, 'k2': lambda: d * d / 2, 'k3': lambda: jnp.expm1(-d) + d}[kind]()


def token_rewards(
  scores: jax.Array, kl: jax.Array, lengths: jax.Array, beta: float, score_at: str
) -> jax.Array:
  """Return the reward of every token of answers: scores [n], kl [n,m], lengths [n] -> [n,m].

  It is -beta kl, and the score is added at the last token, or with score_at='after' at the one
  after it, if there is room for that (Tülu 3's release; others have it at the last).
  """
  m = kl.shape[1]
  index, last = jnp.arange(m)[None], lengths[:, None] - 1
  at = jnp.minimum(last + 1, m - 1) if score_at == 'after' else last
  return jnp.where(index <= last, -beta * kl, 0.0) + jnp.where(index == at, scores[:, None], 0.0)


def gae(rewards: jax.Array, values: jax.Array, gamma: float, lam: float) -> jax.Array:
  """Return generalised advantage estimates (arXiv 1506.02438): [n,m], [n,m] -> [n,m].

  values[:, t] is that of the state before token t; the value after the last is 0. With d_t = r_t +
  gamma V_(t+1) - V_t, A_t = d_t + gamma lam A_(t+1).
  """
  differences = rewards + gamma * jnp.pad(values[:, 1:], ((0, 0), (0, 1))) - values

  def back(later, difference):
    later = difference + gamma * lam * later
    return later, later

  start = jnp.zeros(rewards.shape[0], differences.dtype)
  return jax.lax.scan(back, start, differences.T, reverse=True)[1].T


def whitened(x: jax.Array, mask: jax.Array, rows: int) -> jax.Array:
  """Give each `rows` consecutive rows of x [n,m] the mean 0 and the variance 1 where mask is 1.

  0: all rows together. The variance has the number of elements less 1 in its divisor.
  """
  parts, weights = (y.reshape(len(x) // (rows or len(x)), -1) for y in (x, mask))
  count = weights.sum(1, keepdims=True)
  centred = parts - jnp.sum(parts * weights, 1, keepdims=True) / jnp.maximum(count, 1)
  variance = jnp.sum(centred**2 * weights, 1, keepdims=True) / jnp.maximum(count - 1, 1)
  return (centred * jax.lax.rsqrt(variance + 1e-8) * weights).reshape(x.shape)


def value_loss(values: jax.Array, old: jax.Array, returns: jax.Array, clip: float) -> jax.Array:
  """Return half the squared error of values, or of values clipped to old +- clip if it is larger.

  All arrays have the same shape.
  """
  clipped = old + jnp.clip(values - old, -clip, clip)
  return jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def policy_loss(
  logp: jax.Array, old: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
  """Return the clipped loss of every token, and whether its clip holds (PPO, arXiv 1707.06347).

  With r = exp(logp - old) the loss is max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)). All
  arrays have the same shape.
  """
  ratio = jnp.exp(jnp.clip(logp - old, -_FAR, _FAR))
  free = -advantages * ratio
  clipped = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  return jnp.maximum(free, clipped), clipped > free


def importance(logp: jax.Array, drawn: jax.Array, cap: float) -> jax.Array:
  """Return min(p / p of the draw, cap) from log-probabilities: truncated importance weights.

  As the rho of V-trace (IMPALA, arXiv 1802.01561), for each token. They weigh answers that were
  drawn by other weights; a clip about these would mix the age of answers with the size of an update
  (decoupled PPO, arXiv 2110.00641).
  """
  return jnp.minimum(jnp.exp(jnp.clip(logp - drawn, -_FAR, _FAR)), cap)


def normaliser(weights: jax.Array, kind: str, max_tokens: int) -> tuple[jax.Array, jax.Array]:
  """Return the factors of tokens, and what their sum is divided by; weights [b,t] of 0 and 1.

  'tokens' divides by the number of tokens; 'sequences' each row by its length and then by the
  number of rows; 'constant' by that number times max_tokens. Rows without tokens do not count.
  'microbatches' divides by the number of tokens here and then by that of such batches.
  """
  if kind == 'microbatches':
    count = weights.sum()
    return weights / jnp.maximum(count, 1), (count > 0) + _TINY
  lengths = weights.sum(-1, keepdims=True)
  rows = jnp.sum(lengths > 0)
  if kind == 'sequences':
    return weights / jnp.maximum(lengths, 1), rows + _TINY
  return weights, (weights.sum() if kind == 'tokens' else rows * max_tokens) + _TINY


def policy(cfg: PolicyConfig, forward: Mapping[str, Callable]) -> Callable[..., Sums]:
  """Make the objective of sampled answers: policy loss + kl * KL from a reference.

  forward['reference'](frozen, batch) gives the reference's log-probabilities [b,t] of the targets.
  A batch has, beside the model's inputs, `targets` and `weights` (1 for the tokens of answers),
  `old`, the log-probabilities under which they were drawn, and `advantages`, all [b,t].

  With a value network the loss is policy loss + value_weight * value loss, as the divergence is in
  the rewards. forward['value'](frozen, batch) gives the values [b,t] of the states after each
  position, and a batch has `values`, those at the draw, `returns` and `value_weights` (1 for the
  states whose value is trained). Both losses have the same divisor, or with 'sequences' and
  'microbatches' their own.
  """

  def objective(params: Params, frozen: Params, batch: Batch) -> Sums:
    weights, old = batch['weights'], batch['old']
    logp = losses.target_logprobs(forward['student'], params, batch, cfg.chunk, cfg.temperature)
    loss, clipped = policy_loss(logp, old, batch['advantages'], cfg.clip_low, cfg.clip_high)
    noted, value_noted = {}, {}
    if cfg.kl and not cfg.has_values:
      ref = jax.lax.stop_gradient(forward['reference'](frozen, batch))
      noted['kl'] = kl_estimate(logp, ref, cfg.kl_kind)
      loss = loss + cfg.kl * noted['kl']
    factors, total = normaliser(weights, cfg.normalise, cfg.max_tokens)
    loss = jnp.sum(loss * factors)
    mean = lambda x, weights: (jnp.sum(x * weights), weights.sum() + _TINY)
    if cfg.has_values:
      values, trained = forward['value'](frozen, batch), batch['value_weights']
      errors = value_loss(values, batch['values'], batch['returns'], cfg.value_clip)
      factors, _ = normaliser(trained, cfg.normalise, cfg.max_tokens)
      loss += cfg.value_weight * jnp.sum(errors * factors)
      value_noted['value_loss'] = mean(jax.lax.stop_gradient(errors), trained)
    noted |= {'clipped': clipped, 'entropy': -old, 'moved': jnp.abs(logp - old)}
    sums = {name: mean(jax.lax.stop_gradient(x), weights) for name, x in noted.items()}
    tokens = (weights.sum(), weights.sum() + _TINY)
    return {'loss': (loss, total), 'tokens': tokens} | sums | value_noted

  return objective
