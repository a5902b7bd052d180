"""Policy gradients with advantages relative to a group of answers: GRPO, Dr. GRPO, DAPO."""

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


def normaliser(weights: jax.Array, kind: str, max_tokens: int) -> tuple[jax.Array, jax.Array]:
  """Return the factors of tokens, and what their sum is divided by; weights [b,t] of 0 and 1.

  'tokens' divides by the number of tokens; 'sequences' each row by its length and then by the
  number of rows; 'constant' by that number times max_tokens. Rows without tokens do not count.
  """
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
  """

  def objective(params: Params, frozen: Params, batch: Batch) -> Sums:
    weights, old = batch['weights'], batch['old']
    logp = losses.target_logprobs(forward['student'], params, batch, cfg.chunk, cfg.temperature)
    loss, clipped = policy_loss(logp, old, batch['advantages'], cfg.clip_low, cfg.clip_high)
    kl = {}
    if cfg.kl:
      ref = jax.lax.stop_gradient(forward['reference'](frozen, batch))
      kl['kl'] = kl_estimate(logp, ref, cfg.kl_kind)
      loss = loss + cfg.kl * kl['kl']
    factors, total = normaliser(weights, cfg.normalise, cfg.max_tokens)
    tokens = weights.sum()
    mean = lambda x: (jnp.sum(x * weights), tokens + _TINY)
    moved = jnp.abs(logp - old)
    noted = {**kl, 'clipped': clipped, 'entropy': -old, 'moved': moved}
    sums = {name: mean(jax.lax.stop_gradient(x)) for name, x in noted.items()}
    return {'loss': (jnp.sum(loss * factors), total), 'tokens': (tokens, tokens + _TINY)} | sums

  return objective
