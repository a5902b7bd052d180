"""The value network of a policy, and what it makes of the scores of answers (PPO)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm import models
from slm.objectives import policy, reference, scalar
from slm.objectives.losses import Batch
from slm.runs import config, load
from slm.runs.config import PolicyConfig, RunConfig
from slm.weights.axes import Params

VALUE = 'value'  # the network in what is trained beside theta: {'model': ..., 'head': ...}


def network(cfg: RunConfig, model: models.Model) -> models.Model:
  """Build the model of a run's value network: the reward model's, or the policy's own."""
  if not cfg.objective.value:
    return model
  shape = config.of(cfg.objective.value).model
  computed = {key: getattr(model.cfg, key) for key in config.COMPUTED}
  return models.build(dataclasses.replace(shape, **computed))


def start(cfg: RunConfig, model: models.Model, mesh: jax.sharding.Mesh) -> Params:
  """Return the weights that a run's value network starts from, those of another run.

  Raises:
    ValueError: if the run that objective.value names is no reward model, or it and `init` are ''.
  """
  if cfg.objective.value:
    params, head = scalar.load_run(load.source(cfg, 'objective.value', mesh), mesh)
  elif cfg.init:
    params, head = load.source(cfg, 'init', mesh).params(), scalar.head(cfg, model, mesh)
  else:
    raise ValueError(
      "objective.value: with advantage='gae' expected the reward model that the value network "
      'starts from, or init, found neither'
    )
  return {VALUE: {'model': params, scalar.HEAD: head}}


def shapes(model: models.Model, mesh: jax.sharding.Mesh) -> Params:
  """Return the shapes and shardings of a value network of this model, as `start` does weights."""
  parts = {'model': reference.shapes(model, mesh), scalar.HEAD: scalar.head_shapes(model, mesh)}
  return {VALUE: parts}


def values(model: models.Model) -> Callable[[Params, Batch], jax.Array]:
  """Make f(frozen, batch) -> the values [b,t] of the states after each position."""

  def read(frozen, batch):
    network = frozen[VALUE]
    return scalar.read(network[scalar.HEAD], model.forward(network['model'], batch).hidden)

  return read


def credit(
  cfg: PolicyConfig, out: Batch, scores: jax.Array, ref: jax.Array | None, values: jax.Array
) -> tuple[Batch, dict[str, jax.Array]]:
  """Give each token of answers its advantage, and each state its return.

  `out` has `logprobs` [n,m] of the tokens that were drawn and `lengths` [n], scores are [n], ref
  [n,m] the log-probabilities that a reference has of the tokens, and values [n,m] those of the
  states before them; what lies after an answer's end is not read, but with score_at='after' the
  value of the state at the end.

  Returns `advantages`, `returns`, `values` and `value_weights` [n,m], 0 outside the answers, and
  metrics.
  """
  index, lengths = jnp.arange(values.shape[1])[None], out['lengths'][:, None]
  tokens = (index < lengths).astype(jnp.float32)
  states = (index < lengths + (cfg.score_at == 'after')).astype(jnp.float32)
  told, kl = {}, jnp.zeros_like(values)
  if ref is not None:
    kl = policy.kl_estimate(out['logprobs'], ref, cfg.kl_kind) * tokens
    told['kl'] = kl.sum() / tokens.sum()
  values = values * states
  rewards = policy.token_rewards(scores, kl, out['lengths'], cfg.kl, cfg.score_at)
  advantages = policy.gae(rewards, values, cfg.gamma, cfg.lam)
  returns = (advantages + values) * states
  mean = lambda x: jnp.sum(x * states) / states.sum()
  variance = lambda x: mean(jnp.square(x - mean(x)))
  told |= {
    'returns': mean(returns),
    'explained_variance': 1 - variance(returns - values) / jnp.maximum(variance(returns), 1e-8),
  }
  advantages = policy.whitened(advantages, tokens, cfg.whiten)
  made = {'advantages': advantages, 'returns': returns, 'values': values, 'value_weights': states}
  return made, told
