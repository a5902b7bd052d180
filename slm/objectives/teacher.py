"""The set-up of a distillation: the teacher or its signals, what is trained with the student."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from slm import models, reparam
from slm.objectives import distill, rollout, signals
from slm.objectives.setup import ROWS, Evaluator, Setup
from slm.runs import load
from slm.runs.config import RunConfig
from slm.weights import sharding
from slm.weights.axes import Params
from slm.weights.count import forward_flops

OWN = 'own'  # the kind of batch that the student wrote itself


def setup(
  cfg: RunConfig,
  student: models.Model,
  rep: reparam.Reparam,
  mesh: jax.sharding.Mesh,
  evaluators: Mapping[str, Evaluator],
) -> Setup:
  """Load the teacher that a run names, or open its signals.

  Raises:
    ValueError: if it has not finished, holds several models, has another tokenizer, or lacks a
      layer that is named; or if signals are of other tokens or lack what the objective needs.
  """
  if cfg.teacher_cache:
    cache = open_signals(cfg)
    recall = functools.partial(distill.recall, cache.about['vocab'])
    forward = {'student': reparam.map_groups(rep, student.forward), 'signals': recall}
    objectives = {ROWS: distill.distill(cfg.objective, forward)}
    return Setup(objectives, evaluators, ancestors=(str(cache.path),), look_up=cache)
  loaded = load.load(cfg.teacher, mesh, finished=True)
  load.same_tokenizer(loaded, cfg.tokenizer)
  objectives, rewrite = _live(cfg, student, rep, mesh, loaded)
  frozen, beside = _weights(cfg, student, rep, mesh, loaded)
  added = distill.flops(cfg.objective, loaded.model.cfg, student.cfg, cfg.context)
  written = cfg.objective.own_share * forward_flops(student.cfg, cfg.context)
  return Setup(
    objectives,
    evaluators,
    frozen,
    beside,
    rates={'teacher': cfg.objective.correct},
    flops=added + written,
    ancestors=(cfg.teacher,),
    rewrite=rewrite,
  )


def _live(cfg, student, rep, mesh, loaded) -> tuple[dict[str, Callable], Callable | None]:
  """Return the objectives by kind of batch, and what makes batches of the student's own text."""
  layers = loaded.model.cfg.num_layers, student.cfg.num_layers
  pairs = distill.places(cfg.objective.states, *layers)
  theirs, own = (tuple(pair[i] for pair in pairs) for i in (0, 1))
  forward = {
    'student': reparam.map_groups(rep, functools.partial(student.forward, states=own)),
    'teacher': functools.partial(loaded.model.forward, states=theirs),
  }
  objectives = {ROWS: distill.distill(cfg.objective, forward)}
  if not cfg.objective.own_share:
    return objectives, None
  kl = cfg.objective.on_policy_kl or cfg.objective.kl
  objectives[OWN] = distill.distill(dataclasses.replace(cfg.objective, kl=kl), forward)
  write = rollout.make_rewrite(student, rep, cfg, mesh)

  def rewrite(theta, frozen, batch, step):
    own = rollout.turn(cfg, step)
    return (OWN, write(theta, frozen, batch, step)) if own else (ROWS, batch)

  return objectives, rewrite


def _weights(cfg, student, rep, mesh, loaded) -> tuple[Params, Params]:
  """Return the weights that stay as they are, and those that are trained with the student."""
  frozen, beside = {'teacher': loaded.params()}, {}
  if cfg.objective.correct:
    frozen, beside = beside, frozen
  widths = student.cfg.embed, loaded.model.cfg.embed
  if cfg.objective.states and widths[0] != widths[1]:
    beside = beside | {'projection': _projection(cfg.seed, *widths, mesh)}
  if beside and rep.independent:
    raise ValueError(
      'objective: a teacher or projection is trained with one student, and reparam '
      f'{cfg.reparam.name!r} holds several'
    )
  return frozen, beside


def open_signals(cfg: RunConfig) -> signals.Signals:
  """Open the signals that a run names.

  Raises:
    ValueError: if they are of other tokens, or the objective needs what they do not hold.
  """
  cache = signals.Signals(cfg.teacher_cache)
  for key in ('tokenizer', 'context'):
    if cache.about[key] != getattr(cfg, key):
      raise ValueError(
        f'teacher_cache: {cache.path} is of {key} {cache.about[key]}, the data of '
        f'{getattr(cfg, key)}'
      )
  mode, objective = cache.about['mode'], cfg.objective
  kinds = ('forward',) if mode == 'sampled' else ('forward', 'reverse', 'jsd', 'cosine')
  fixed = {'temperature': 1.0, 'top_k': 0, 'states': (), 'correct': 0.0, 'on_policy': 0.0}
  for key, value in fixed.items():
    if getattr(objective, key) != value:
      raise ValueError(
        f'objective.{key}={getattr(objective, key)}: with a teacher_cache expected {value}'
      )
  if objective.kl not in kinds:
    raise ValueError(
      f'objective.kl={objective.kl!r}: with a teacher_cache of mode {mode!r} expected one of '
      f'{", ".join(kinds)}'
    )
  return cache


def _projection(seed: int, width: int, teacher: int, mesh: jax.sharding.Mesh) -> Params:
  """Draw the map of the student's states to the teacher's width, N(0, 1 / width)."""
  key = jax.random.fold_in(jax.random.key(seed), 1)  # theta's own draw has 0
  made = {'w_teacher': jax.random.normal(key, (width, teacher), jnp.float32) * width**-0.5}
  return jax.device_put(made, sharding.shardings(made, mesh))
