"""Preferences: a chosen answer is to be likelier than a rejected one (DPO and its kin).

A pair is two consecutive segments of a row: an odd one, the prompt with the chosen answer, and the
even one after it with the rejected answer. A batch's `weights` mark the tokens of answers, ends
included.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from slm.objectives import losses
from slm.objectives.losses import Batch, Sums
from slm.runs.config import DpoConfig
from slm.weights.axes import Params

# Of rewards that are a model's own: -log sigmoid(chosen - rejected).
BRADLEY_TERRY = DpoConfig(kind='plain', beta=1.0)


def dpo(cfg: DpoConfig, forward: Mapping[str, Callable]) -> Callable[..., Sums]:
  """Make the objective of pairs; the logits of `chunk` tokens exist at a time.

  forward['reference'](frozen, batch) gives the log-probabilities [b,t] that a reference has of the
  targets; without it (SimPO) rewards are those of the model alone. All sums are over pairs, whose
  weights are those of their chosen answers' tokens; 'tokens' counts the tokens of answers.
  """
  reference = forward.get('reference')

  def objective(params: Params, frozen: Params, batch: Batch) -> Sums:
    logprobs = losses.target_logprobs(forward['student'], params, batch, cfg.chunk)
    if reference:
      logprobs -= jax.lax.stop_gradient(reference(frozen, batch))
    weights = pair_weights(batch)
    values = judge(cfg, cfg.scale * scores(cfg, logprobs, batch))
    total = weights.sum()
    sums = {name: (jnp.sum(x * weights), total) for name, x in values.items()}
    return {**sums, 'tokens': (jnp.sum(batch['weights'] > 0).astype(jnp.float32), total)}

  return objective


def by_answer(x: jax.Array, segments: jax.Array) -> jax.Array:
  """Sum x [b,t] over the answers of each row's pairs: [b,2,p], chosen and rejected, zero-padded.

  There is room for p = (t + 1) // 2 pairs, more than fit, so no row can lose one.
  """
  pairs = (x.shape[1] + 1) // 2
  sums = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, 2 * pairs + 1))(x, segments)
  return sums[:, 1:].reshape(-1, pairs, 2).swapaxes(1, 2)


def scores(cfg: DpoConfig, logprobs: jax.Array, batch: Batch) -> jax.Array:
  """Return each answer's log-probability from those of targets [b,t]: [b,2,p] float32.

  It is the sum of its tokens' (kind='plain') or their mean. IPO takes the mean as well: a sum would
  make a squared loss grow with the length, and its authors confirmed that theirs is the mean
  (huggingface/trl, dpo_trainer.py).
  """
  mask = (batch['weights'] > 0).astype(jnp.float32)
  total = by_answer(logprobs * mask, batch['segments'])
  if cfg.kind == 'plain':
    return total
  return total / jnp.maximum(by_answer(mask, batch['segments']), 1)


def pair_weights(batch: Batch) -> jax.Array:
  """Return the weight of each pair, the mean over its chosen answer's tokens: [b,p].

  It is 0 where there is no pair, as where an answer has no token to train on.
  """
  mask = (batch['weights'] > 0).astype(jnp.float32)
  tokens = by_answer(mask, batch['segments'])
  mean = by_answer(batch['weights'], batch['segments']) / jnp.maximum(tokens, 1)
  return jnp.where((tokens > 0).all(1), mean[:, 0], 0.0)


def judge(cfg: DpoConfig, rewards: jax.Array) -> dict[str, jax.Array]:
  """Return the loss and the figures of each pair from the rewards of its answers [b,2,p]: [b,p].

  With the margin m = beta (score_chosen - score_rejected), scores next to the reference's:
  norm and plain: -log sigmoid(m) (Rafailov et al. 2023, arXiv 2305.18290; norm as in Tülu 3, arXiv
  2411.15124, 5.1); simpo: -log sigmoid(m - gamma) (arXiv 2405.14734); ipo: (m / beta - 1 / (2
  beta))^2 (arXiv 2310.12036, eq. 17). Smoothing s adds the loss of the pair the other way round:
  (1 - s) -log sigmoid(m) + s -log sigmoid(-m).
  """
  margin = rewards[:, 0] - rewards[:, 1]
  if cfg.kind == 'ipo':
    loss = jnp.square(margin / cfg.scale - 1 / (2 * cfg.scale))
  else:
    asked = margin - cfg.gamma if cfg.kind == 'simpo' else margin
    loss = -(1 - cfg.smoothing) * jax.nn.log_sigmoid(asked)
    if cfg.smoothing:
      loss -= cfg.smoothing * jax.nn.log_sigmoid(-asked)
  accuracy = (margin > 0).astype(jnp.float32)
  chosen, rejected = rewards[:, 0], rewards[:, 1]
  return {
    'loss': loss,
    'margin': margin,
    'accuracy': accuracy,
    'chosen_reward': chosen,
    'rejected_reward': rejected,
  }
