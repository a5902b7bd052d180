"""The training step of a run on a mesh: its state's shapes and layout, and the compiled program.

Nothing here needs weights or data: shapes are enough to compile, for this machine or for another.
"""

from typing import Any

import jax

from slm import models, reparam
from slm.objectives.losses import Batch
from slm.objectives.setup import Setup
from slm.runs import load
from slm.runs.config import RunConfig
from slm.training import optim
from slm.training.step import State, init_state, make_sums, make_train_step, trained
from slm.weights import sharding
from slm.weights.axes import Params


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
    self._tx = optim.build(cfg.optim, optim.schedule(cfg.schedule, cfg.steps), rep.independent)
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
    step = make_train_step(sums, self._tx, self._reparam.independent)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.layout, None))
    return jitted.trace(state, frozen, batch)
