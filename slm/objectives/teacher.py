"""Set up a distillation: the teacher or its signals, and what is trained with the student."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from slm import models, reparam
from slm.objectives import distill, rollout, signals
from slm.objectives.setup import ROWS, Evaluator, Setup
from slm.runs import checkpoint, load
from slm.runs.config import RunConfig
from slm.weights import sharding
from slm.weights.axes import Params

OWN = 'own'  # the kind of batch with the student's own text


def setup(
  cfg: RunConfig,
  student: models.Model,
  rep: reparam.Reparam,
  mesh: jax.sharding.Mesh,
  evaluators: Mapping[str, Evaluator],
  loaded: load.Loaded | None = None,
) -> Setup:
  """Load the teacher of a run, or open its signals.

  With `loaded`, the outline of a teacher, the set-up holds shapes instead of weights and writes no
  text of the student's own.

  Raises:
    ValueError: if the teacher has not finished, holds several models, has another tokenizer or
      lacks a named layer, or if the signals do not fit the data or the objective.
  """
  if cfg.teacher_cache:
    cache = open_signals(cfg)
    recall = functools.partial(distill.recall, cache.facts['vocab'])
    forward = {'student': reparam.map_groups(rep, student.forward), 'signals': recall}
    objectives = {ROWS: distill.distill(cfg.objective, forward)}
    return Setup(objectives, evaluators, ancestors=(str(cache.path),), look_up=cache)
  if outlined := loaded is not None:
    place = lambda draw: _outline(jax.eval_shape(draw), mesh)
  else:
    loaded = load.source(cfg, 'teacher', mesh)
    place = lambda draw: _place(draw(), mesh)
  objectives, rewrite = _live(cfg, student, rep, mesh, loaded, outlined)
  frozen, beside = _weights(cfg, student, rep, loaded, place)
  return Setup(
    objectives,
    evaluators,
    frozen,
    beside,
    rates={'teacher': cfg.objective.correct},
    flops=distill.flops(cfg.objective, loaded.model.cfg, student.cfg, cfg.context),
    ancestors=(cfg.teacher,),
    rewrite=rewrite,
  )


def _outline(shapes: Params, mesh: jax.sharding.Mesh) -> Params:
  return checkpoint.abstract(shapes, sharding.shardings(shapes, mesh))


def _place(weights: Params, mesh: jax.sharding.Mesh) -> Params:
  return jax.device_put(weights, sharding.shardings(weights, mesh))


def _live(cfg, student, rep, mesh, loaded, outlined) -> tuple[dict[str, Callable], Callable | None]:
  """Return the objectives by kind of batch, and the function that rewrites batches, or None."""
  layers = loaded.model.cfg.num_layers, student.cfg.num_layers
  pairs = distill.places(cfg.objective.states, *layers)
  of_teacher, of_student = (tuple(pair[i] for pair in pairs) for i in (0, 1))
  forward = {
    'student': reparam.map_groups(rep, functools.partial(student.forward, states=of_student)),
    'teacher': functools.partial(loaded.model.forward, states=of_teacher),
  }
  objectives = {ROWS: distill.distill(cfg.objective, forward)}
  if not cfg.objective.own_share:
    return objectives, None
  kl = cfg.objective.on_policy_kl or cfg.objective.kl
  objectives[OWN] = distill.distill(dataclasses.replace(cfg.objective, kl=kl), forward)
  if outlined:
    return objectives, None
  write = rollout.make_rewrite(student, rep, cfg, mesh)

  def rewrite(theta, frozen, batch, step):
    if rollout.is_own(cfg, step):
      return OWN, write(theta, frozen, batch, step), {}
    return ROWS, batch, {}

  return objectives, rewrite


def _weights(cfg, student, rep, loaded, place) -> tuple[Params, Params]:
  """Return the frozen weights, and those that are trained beside the student."""
  frozen, beside = {'teacher': loaded.params()}, {}
  if cfg.objective.correct:
    frozen, beside = beside, frozen
  width, teacher_width = student.cfg.embed, loaded.model.cfg.embed
  if cfg.objective.states and width != teacher_width:
    # From the student's states to the teacher's width, N(0, 1 / width); theta's draw has key 0.
    def draw():
      key = jax.random.fold_in(jax.random.key(cfg.seed), 1)
      drawn = jax.random.normal(key, (width, teacher_width), jnp.float32)
      return {'w_teacher': drawn * width**-0.5}

    beside = beside | {'projection': place(draw)}
  if beside and rep.independent:
    raise ValueError(
      'objective: a teacher or projection is trained with one student, and reparam '
      f'{cfg.reparam.name!r} holds several'
    )
  return frozen, beside


def open_signals(cfg: RunConfig) -> signals.Signals:
  """Open the signals of a run; raise ValueError if they do not fit its data or objective."""
  cache = signals.Signals(cfg.teacher_cache)
  if cache.facts['mode'] == signals.TARGETS:
    raise ValueError(
      f'teacher_cache: {cache.path} has the log-probabilities of targets alone; distillation needs '
      'those of --mode=topk or sampled'
    )
  for key in ('tokenizer', 'context'):
    if cache.facts[key] != getattr(cfg, key):
      raise ValueError(
        f'teacher_cache: {cache.path} has {key} {cache.facts[key]}, the data have '
        f'{getattr(cfg, key)}'
      )
  mode, objective = cache.facts['mode'], cfg.objective
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
