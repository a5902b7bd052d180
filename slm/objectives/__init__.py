"""Objectives: pure functions from (forward passes, weights, batch) to sums and their weights.

An objective returns {name: (sum, weight)}; 'loss' is differentiated. Sums are added over
microbatches, groups and hosts before they are divided: never a mean of means. The train loop sees
its set-up (setup.py) and the keys that every objective's config has (ObjectiveConfig).
"""

from collections.abc import Callable, Mapping

import jax

from slm import models, reparam
from slm.data.loader import DataConfig
from slm.models.config import DecoderConfig
from slm.objectives import (
  answers,
  distill,
  heldout,
  next_token,
  policy,
  preference,
  reference,
  scalar,
  teacher,
)
from slm.objectives.setup import ROWS, Objective, Reward, Setup
from slm.runs import load
from slm.runs.config import (
  DistillConfig,
  DpoConfig,
  NextTokenConfig,
  ObjectiveConfig,
  PolicyConfig,
  RewardConfig,
  RunConfig,
)

OBJECTIVES = {
  NextTokenConfig: next_token.next_token,
  DistillConfig: distill.distill,
  DpoConfig: preference.dpo,
  RewardConfig: scalar.reward,
  PolicyConfig: policy.policy,
}


def build(cfg: ObjectiveConfig, forward: Mapping[str, Callable]) -> Objective:
  """Build objective(params, frozen, batch) -> {name: (sum, weight)} from its config."""
  return OBJECTIVES[type(cfg)](cfg, forward)


def setup(
  cfg: RunConfig,
  model: models.Model,
  rep: reparam.Reparam,
  mesh: jax.sharding.Mesh,
  reward: Reward | None = None,
) -> Setup:
  """Set up a run's objective; `reward` scores answers to prompts.

  Raises:
    ValueError: if what it needs is missing or does not fit.
  """
  if isinstance(cfg.objective, DpoConfig):
    return reference.setup(cfg, model, rep, mesh)
  if isinstance(cfg.objective, PolicyConfig):
    return answers.setup(cfg, model, rep, mesh, reward)
  if isinstance(cfg.objective, RewardConfig):
    return scalar.setup(cfg, model, rep, mesh)
  evaluators = {'heldout': heldout.evaluator(cfg, model, rep, mesh)}
  if isinstance(cfg.objective, DistillConfig):
    return teacher.setup(cfg, model, rep, mesh, evaluators)
  objective = build(cfg.objective, {'student': reparam.map_groups(rep, model.forward)})
  return Setup({ROWS: objective}, evaluators)


def outline(
  cfg: RunConfig,
  model: models.Model,
  rep: reparam.Reparam,
  mesh: jax.sharding.Mesh,
  teacher_model: DecoderConfig | None,
) -> Setup:
  """Set up a run's objective for compilation: shapes stand for weights, nothing is evaluated.

  Raises:
    ValueError: if a distillation has no teacher's shape.
  """
  if isinstance(cfg.objective, PolicyConfig):
    return answers.outline(cfg, model, rep, mesh)
  if isinstance(cfg.objective, DistillConfig):
    if not (teacher_model or cfg.teacher_cache):
      raise ValueError('teacher: a distillation needs the shape of its teacher: name a run')
    loaded = None
    if teacher_model:
      loaded = load.outline(RunConfig(model=teacher_model, data=DataConfig()), mesh)
    return teacher.setup(cfg, model, rep, mesh, {}, loaded)
  if isinstance(cfg.objective, DpoConfig):
    return reference.outline(cfg, model, rep, mesh)
  if isinstance(cfg.objective, RewardConfig):
    return scalar.outline(cfg, model, rep, mesh)
  return Setup(
    {ROWS: build(cfg.objective, {'student': reparam.map_groups(rep, model.forward)})}, {}
  )
