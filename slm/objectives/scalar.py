"""Scalars read from a model's states: reward models, trained on preference pairs."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from slm import models, reparam
from slm.objectives import preference, reference
from slm.objectives.losses import Batch, Sums
from slm.objectives.setup import ROWS, Evaluator, Setup
from slm.runs import checkpoint, load
from slm.runs.config import RewardConfig, RunConfig
from slm.weights import sharding
from slm.weights.axes import Params
from slm.weights.count import forward_flops, hidden_flops

HEAD = 'head'  # the scalar's weights, which are trained beside theta
_KEY = 8  # of the head's draw, folded into that of the run


def reward(cfg: RewardConfig, forward: Mapping[str, Callable]) -> Callable[..., Sums]:
  """Make the objective of pairs by Bradley and Terry: -log sigmoid(chosen - rejected).

  The head is frozen['head']. Sums are over pairs and weights are theirs, as those of
  `preference.dpo`.
  """

  def objective(params: Params, frozen: Params, batch: Batch) -> Sums:
    scores = at_ends(read(frozen[HEAD], forward['student'](params, batch).hidden), batch)
    values = preference.judge(preference.BRADLEY_TERRY, scores)
    weights = preference.pair_weights(batch)
    total = weights.sum()
    sums = {name: (jnp.sum(x * weights), total) for name, x in values.items()}
    return {**sums, 'tokens': (jnp.sum(batch['weights'] > 0).astype(jnp.float32), total)}

  return objective


def draw_head(key: jax.Array, embed: int) -> Params:
  """Draw a head: weights [embed] from N(0, 1 / (embed + 1)), as in Tülu 3, and no bias."""
  drawn = jax.random.normal(key, (embed,), jnp.float32)
  return {'w_score': drawn * (embed + 1) ** -0.5, 'b_score': jnp.zeros(())}


def head(cfg: RunConfig, model: models.Model, mesh: jax.sharding.Mesh) -> Params:
  """Draw the head of a run, laid out on the mesh."""
  drawn = draw_head(jax.random.fold_in(jax.random.key(cfg.seed), _KEY), model.cfg.embed)
  return jax.device_put(drawn, sharding.shardings(drawn, mesh))


def read(head: Params, hidden: jax.Array) -> jax.Array:
  """Read a scalar from every state: [b,t,d] -> [b,t] float32."""
  weight = sharding.constrain(head['w_score'], None)  # it is small, and states stay where they are
  scalar = jnp.einsum('btd,d->bt', hidden, weight, preferred_element_type=jnp.float32)
  return scalar + head['b_score'].astype(jnp.float32)


def at_ends(x: jax.Array, batch: Batch) -> jax.Array:
  """Take x [b,t] at the last token of each answer of pairs, its end-of-turn token: [b,2,p].

  Where there is no answer it is that of the row's first token, and the pair's weight is 0.
  """
  t = x.shape[1]
  pairs = (t + 1) // 2
  # The target of the last trained position stands one after it.
  place = jnp.where(batch['weights'] > 0, jnp.arange(1, t + 1)[None], 0)
  last = jax.vmap(lambda x, s: jax.ops.segment_max(x, s, 2 * pairs + 1))(place, batch['segments'])
  found = jnp.take_along_axis(x, jnp.maximum(last[:, 1:], 0), axis=1)
  return found.reshape(-1, pairs, 2).swapaxes(1, 2)


def setup(
  cfg: RunConfig, model: models.Model, rep: reparam.Reparam, mesh: jax.sharding.Mesh
) -> Setup:
  """Draw the head of a run, and set up its held-out pairs.

  Raises:
    ValueError: if the run holds several independent models.
  """

  def scores(params, beside, batch):
    return at_ends(read(beside[HEAD], model.forward(params, batch).hidden), batch)

  evaluate = reference.Evaluator(cfg, preference.BRADLEY_TERRY, scores, rep, mesh)
  return _setup(cfg, model, rep, head(cfg, model, mesh), {'heldout': evaluate})


def outline(
  cfg: RunConfig, model: models.Model, rep: reparam.Reparam, mesh: jax.sharding.Mesh
) -> Setup:
  """Set up as `setup` does, with shapes in place of weights and nothing to evaluate."""
  return _setup(cfg, model, rep, head_shapes(model, mesh), {})


def head_shapes(model: models.Model, mesh: jax.sharding.Mesh) -> Params:
  """Return the shapes and shardings of a model's head."""
  shapes = jax.eval_shape(lambda: draw_head(jax.random.key(0), model.cfg.embed))
  return checkpoint.abstract(shapes, sharding.shardings(shapes, mesh))


def _setup(cfg, model, rep, drawn: Params, evaluators: Mapping[str, Evaluator]) -> Setup:
  if rep.independent:
    raise ValueError(
      f"objective 'reward': expected one model, and reparam {cfg.reparam.name!r} holds several"
    )
  forward = {'student': reparam.map_groups(rep, model.forward)}
  logits = forward_flops(model.cfg, cfg.context) - hidden_flops(model.cfg, cfg.context)
  return Setup(
    {ROWS: reward(cfg.objective, forward)}, evaluators, beside={HEAD: drawn}, flops=-3 * logits
  )


def load_run(loaded: load.Loaded, mesh: jax.sharding.Mesh) -> tuple[Params, Params]:
  """Return the dense weights of a reward model and its head.

  Raises:
    ValueError: if the run is no reward model.
  """
  if not isinstance(loaded.cfg.objective, RewardConfig):
    raise ValueError(
      f'{loaded.path}: expected a reward model, of configs/reward.py, found a run of objective '
      f'{loaded.cfg.objective.name!r}'
    )
  return loaded.params(), load.beside(loaded, {HEAD: head_shapes(loaded.model, mesh)}, mesh)[HEAD]
