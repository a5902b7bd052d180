"""The training step of a run on a mesh: its state's shapes and layout, and the compiled program.

Nothing here needs weights or data: shapes are enough to compile, for this machine or for another,
and to count what a step takes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from slm import models, objectives, reparam
from slm.models.config import DecoderConfig
from slm.objectives.losses import Batch
from slm.objectives.setup import ROWS, Setup
from slm.runs import checkpoint, config, load
from slm.runs.config import RunConfig
from slm.training import optim
from slm.training.step import State, in_sequence, init_state, make_sums, make_train_step, trained
from slm.weights import sharding
from slm.weights.axes import Params
from slm.weights.count import forward_flops


class Program:
  """A run's training step on a mesh.

  Attributes:
    shapes: of the state, as a State of ShapeDtypeStruct.
    layout: of the state, as a State of NamedSharding.
  """

  def __init__(
    self,
    cfg: RunConfig,
    model: models.Model,
    rep: reparam.Reparam,
    setup: Setup,
    mesh: jax.sharding.Mesh,
  ):
    """Derive the optimiser and the layout of a run; leaves of `setup` may be shapes.

    Raises:
      ValueError: if the weights do not divide over the mesh, or the schedule is impossible.
    """
    self._cfg, self._reparam, self._setup = cfg, rep, setup
    rate = optim.schedule(cfg.schedule, cfg.steps, cfg.objective.updates)
    self._tx = optim.build(cfg.optim, rate, rep.independent)
    if setup.beside:
      self._tx = optim.each(self._tx, setup.rates)
    theta, shardings = load.theta_shardings(rep, mesh)
    beside = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), setup.beside)
    self.shapes = jax.eval_shape(self._init_state, theta, beside)
    self.layout = self._lay_out(shardings, sharding.shardings(beside, mesh), mesh)

  def _init_state(self, theta: Params, beside: Params) -> State:
    return init_state(theta, self._tx, beside)

  def _lay_out(self, theta: Any, beside: Any, mesh: jax.sharding.Mesh) -> State:
    """Lay optimiser moments out like the weights they belong to, the rest replicated."""
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def like(where, tree):
      structure = jax.tree.structure(where)
      same = lambda x: jax.tree.structure(x) == structure
      return jax.tree.map(lambda x: where if same(x) else replicated, tree, is_leaf=same)

    moments, where = self.shapes.opt_state, trained(theta, beside)
    if beside:
      moments = {name: like(where[name], part) for name, part in moments.items()}
    else:
      moments = like(where, moments)
    return State(replicated, theta, beside, moments)

  def init(self, theta: Params, beside: Params) -> State:
    """Return the state before the first step, laid out on the mesh."""
    return jax.jit(self._init_state, out_shardings=self.layout)(theta, beside)

  def trace(self, kind: str, state: State, frozen: Params, batch: Batch) -> jax.stages.Traced:
    """Trace the step for a kind and shape of batch; arguments are arrays or their shapes."""
    sums = make_sums(self._setup.objectives[kind], self._reparam, self._cfg.dtype)
    reduction = self._cfg.objective.reduction
    step = make_train_step(sums, self._tx, self._reparam.independent, reduction)
    if self._cfg.objective.updates > 1:
      step = in_sequence(step)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.layout, None))
    return jitted.trace(state, frozen, batch)


@dataclasses.dataclass(frozen=True)
class Outline:
  """A run's training step with the shapes and layout of its arguments in place of arrays.

  Attributes:
    teacher: the shape of a distillation's teacher.
    flops: of a step, that the model needs; on all devices.
  """

  model: models.Model
  reparam: reparam.Reparam
  program: Program
  teacher: DecoderConfig | None
  state: State
  frozen: Params
  batch: Batch
  flops: float

  def trace(self) -> jax.stages.Traced:
    """Trace the step for batches of the data."""
    return self.program.trace(ROWS, self.state, self.frozen, self.batch)

  @property
  def kinds(self) -> dict[str, Any]:
    """Return the arguments by what they hold."""
    return {
      'weights': self.state.theta,
      'optimiser moments': self.state.opt_state,
      'frozen weights': self.frozen,
      'weights trained beside': self.state.beside,
      'batch': self.batch,
    }


def outline(cfg: RunConfig, mesh: Any, teacher: DecoderConfig | None = None) -> Outline:
  """Outline a run's training step on a mesh, of devices or abstract.

  `teacher` is the shape of a teacher that cfg.teacher does not name yet.

  Raises:
    ValueError: if the teacher of a distillation is unknown, or rows or weights do not divide over
      the mesh.
  """
  if cfg.teacher:
    teacher = config.of(cfg.teacher).model
  model, rep = load.build(cfg)
  load.check_groups(cfg, rep, sharding.batch_devices(mesh))
  setup = objectives.outline(cfg, model, rep, mesh, teacher)
  program = Program(cfg, model, rep, setup, mesh)
  frozen = dict(setup.frozen)
  if rep.base:
    frozen['base'] = load.base_outline(cfg, rep, mesh)
  state = checkpoint.abstract(program.shapes, program.layout)
  flops = step_flops(cfg, model, rep, program.shapes.theta, setup.flops)
  batch = _batch(cfg, rep, setup, mesh)
  return Outline(model, rep, program, teacher, state, frozen, batch, flops)


def _batch(cfg, rep, setup, mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Return the shapes of a batch as the loader makes it."""
  d = cfg.data
  groups = d.batch_size // d.rows_per_group // d.accum
  row = np.zeros((1, 1, 1, cfg.context), np.int32)
  leaves = dict.fromkeys(('inputs', 'targets', 'positions', 'segments'), row)
  leaves['weights'] = row.astype(np.float32)
  if setup.look_up:
    leaves |= setup.look_up({'tokens': row, 'segments': row})
  if setup.leaves:
    return setup.leaves
  batch = {
    name: jax.ShapeDtypeStruct((d.accum, groups, d.rows_per_group, *x.shape[3:]), x.dtype)
    for name, x in leaves.items()
  }
  histogram = ((d.level,), np.float32) if rep.histograms else ((), np.int32)
  batch['condition'] = jax.ShapeDtypeStruct((d.accum, groups, *histogram[0]), histogram[1])
  split = sharding.batch_sharding(mesh, axis=1)
  return {n: x.update(sharding=split) for n, x in batch.items()}


def memory(kinds: Mapping[str, Any], compiled: Any = None) -> dict[str, float]:
  """Return the bytes on one device of arguments by kind, and of what XLA adds once compiled."""
  held = {name: _bytes(arguments) for name, arguments in kinds.items()}
  if compiled:
    analysis = compiled.memory_analysis()
    padding = analysis.argument_size_in_bytes - sum(held.values())
    held['XLA padding of arguments'] = max(padding, 0.0)  # less if an argument is not used
    held['XLA temporaries'] = float(analysis.temp_size_in_bytes)
    held['XLA results'] = float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    held['XLA program'] = float(analysis.generated_code_size_in_bytes)
  return {name: n for name, n in held.items() if n}


def _bytes(tree: Any) -> float:
  """Return the bytes of a tree's shapes on one device."""
  one = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return float(sum(map(one, jax.tree.leaves(tree))))


def step_flops(
  cfg: RunConfig, model: models.Model, rep: reparam.Reparam, theta: Any, added: float
) -> float:
  """Count a training step's FLOPs: the model's passes, `added` per token, making the weights."""
  per_token = 3 * forward_flops(model.cfg, cfg.context) + added
  groups = cfg.data.batch_size // cfg.data.rows_per_group
  made = reparam.materialize_flops(rep, theta, groups)
  return step_tokens(cfg) * per_token + 3 * made


def step_tokens(cfg: RunConfig) -> int:
  """Count the tokens of a training step."""
  return cfg.data.batch_size * cfg.context


def run_cost(cfg: RunConfig, step_seconds: float, devices: int) -> dict[str, float]:
  """Return the tokens, hours and chip-hours of all steps of a run."""
  hours = step_seconds * cfg.steps / 3600
  return {'tokens': step_tokens(cfg) * cfg.steps, 'hours': hours, 'chip-hours': hours * devices}
