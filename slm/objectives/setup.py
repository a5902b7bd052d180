"""What a run needs of its teacher: weights, forward pass, cost, and what is trained beside theta.

Such parts, the student's own theta among them, make up what the optimiser sees: {'student': theta,
'teacher': params, 'projection': {...}}. They are saved like moments, apart from theta: a checkpoint
serves the student alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slm import models
from slm.objectives import distill, signals
from slm.runs import load
from slm.weights import sharding
from slm.weights.axes import Params


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A teacher as a run uses it.

  Attributes:
    forward: the forward passes of 'teacher' and 'student', with the states that they must return.
    frozen: {'teacher': params}, unless they are trained.
    parts: what is trained beside the student's theta, as it starts.
    flops: what the teacher adds to one token's step.
    ancestors: the runs that it is of, or the directory of its signals.
    look_up: rows -> the batch leaves of its signals.
  """

  forward: dict[str, Callable]
  frozen: Params = dataclasses.field(default_factory=dict)
  parts: Params = dataclasses.field(default_factory=dict)
  flops: float = 0.0
  ancestors: tuple[str, ...] = ()
  look_up: signals.Signals | None = None


def prepare(cfg: Mapping[str, Any], student: models.Model, mesh: jax.sharding.Mesh) -> Teacher:
  """Load the teacher that a resolved config names, if it names one.

  Raises:
    ValueError: if it has not finished, holds several models, has another tokenizer, or lacks a
      layer that is named.
  """
  if cfg['teacher_cache']:
    return _cached(cfg, student)
  if not cfg['teacher']:
    return Teacher({'student': student.forward})
  loaded = load.load(cfg['teacher'], mesh, finished=True)
  load.same_tokenizer(loaded, cfg['tokenizer'])
  objective, of = cfg['objective'], loaded.model.cfg
  pairs = distill.places(objective.get('states', ()), of.num_layers, student.cfg.num_layers)
  theirs, mine = (tuple(p[i] for p in pairs) for i in (0, 1))
  weights, parts = {'teacher': loaded.params()}, {}
  if objective.get('correct'):
    weights, parts = {}, weights
  if pairs and of.embed != student.cfg.embed:
    parts = parts | {'projection': _projection(cfg['seed'], student.cfg.embed, of.embed, mesh)}
  return Teacher(
    {
      'student': functools.partial(student.forward, states=mine),
      'teacher': functools.partial(loaded.model.forward, states=theirs),
    },
    weights,
    parts,
    distill.flops(objective, of, student.cfg, cfg['context']),
    (str(cfg['teacher']),),
  )


def _cached(cfg: Mapping[str, Any], student: models.Model) -> Teacher:
  """Open the signals that a resolved config names.

  Raises:
    ValueError: if they are of other tokens, or the objective needs what they do not hold.
  """
  found = signals.Signals(cfg['teacher_cache'])
  for key in ('tokenizer', 'context'):
    if found.about[key] != cfg[key]:
      raise ValueError(
        f'teacher_cache: {found.path} is of {key} {found.about[key]}, the data of {cfg[key]}'
      )
  mode, objective = found.about['mode'], cfg['objective']
  kinds = ('forward',) if mode == 'sampled' else ('forward', 'reverse', 'jsd', 'cosine')
  fixed = {'temperature': 1.0, 'top_k': 0, 'states': [], 'correct': 0.0, 'on_policy': 0.0}
  for key, value in fixed.items():
    if objective.get(key, value) != value:
      raise ValueError(f'objective.{key}={objective[key]}: with a teacher_cache expected {value}')
  if objective['kl'] not in kinds:
    raise ValueError(
      f'objective.kl={objective["kl"]!r}: with a teacher_cache of mode {mode!r} expected one of '
      f'{", ".join(kinds)}'
    )
  recall = functools.partial(distill.recall, found.about['vocab'])
  forward = {'student': student.forward, 'signals': recall}
  return Teacher(forward, ancestors=(str(found.path),), look_up=found)


def _projection(seed: int, width: int, teacher: int, mesh: jax.sharding.Mesh) -> Params:
  """Draw the map of the student's states to the teacher's width, N(0, 1 / width)."""
  key = jax.random.fold_in(jax.random.key(seed), 1)  # theta's own draw has 0
  made = {'w_teacher': jax.random.normal(key, (width, teacher), jnp.float32) * width**-0.5}
  return jax.device_put(made, sharding.shardings(made, mesh))


def join(theta: Params, parts: Params) -> Params:
  """Return what the optimiser sees: theta, or with parts beside it {'student': theta, **parts}."""
  return {'student': theta, **parts} if parts else theta


def split(trained: Params) -> tuple[Params, Params]:
  """Undo `join`: the student's theta, and the parts beside it."""
  if 'student' not in trained:
    return trained, {}
  return trained['student'], {name: x for name, x in trained.items() if name != 'student'}
