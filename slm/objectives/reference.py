"""Set up a run on preference pairs: its reference, live or from disk, and its held-out pairs."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from slm import models, reparam
from slm.objectives import heldout, losses, preference, signals
from slm.objectives.setup import ROWS, Setup
from slm.runs import checkpoint, load
from slm.runs.config import DpoConfig, RunConfig
from slm.weights import sharding, tree
from slm.weights.axes import Params
from slm.weights.count import forward_flops


def setup(
  cfg: RunConfig, model: models.Model, rep: reparam.Reparam, mesh: jax.sharding.Mesh
) -> Setup:
  """Load the start of a run, its reference, or open its log-probabilities.

  A reparameterisation that keeps the start's weights beside theta (LoRA) has its reference there.
  The reference is evaluated on the held-out pairs once, now.

  Raises:
    ValueError: if the start has not finished or holds several models, or if the log-probabilities
      on disk are not those of the start on the run's rows.
  """

  def scores(params, beside, batch):
    logprobs = losses.target_logprobs(model.forward, params, batch, cfg.objective.chunk)
    return preference.scores(cfg.objective, logprobs, batch)

  evaluate = Evaluator(cfg, cfg.objective, scores, rep, mesh)
  if not cfg.objective.has_reference:
    return _setup(cfg, model, rep, {'heldout': evaluate})
  params = load.source(cfg, 'init', mesh).params()
  cache = _open(cfg, params) if cfg.teacher_cache else None
  evaluate.reference = evaluate.pairs(lambda condition: params, {})
  return _setup(cfg, model, rep, {'heldout': evaluate}, params, cache)


def outline(
  cfg: RunConfig, model: models.Model, rep: reparam.Reparam, mesh: jax.sharding.Mesh
) -> Setup:
  """Set up as `setup` does, with shapes in place of weights and nothing to evaluate."""
  cache = signals.Signals(cfg.teacher_cache) if cfg.teacher_cache else None
  params = shapes(model, mesh) if cfg.objective.has_reference else None
  return _setup(cfg, model, rep, {}, params, cache)


def logprobs(
  model: models.Model, rep: reparam.Reparam, chunk: int, temperature: float = 1.0
) -> Callable[[Params, losses.Batch], jax.Array]:
  """Return f(frozen, batch) -> the log-probabilities [b,t] that a run's start has of the targets.

  Its weights are frozen['base'] where theta changes them (LoRA), else frozen['reference'].
  """
  kept = 'base' if rep.base == 'params' else 'reference'

  def reference(frozen, batch):
    return losses.target_logprobs(model.forward, frozen[kept], batch, chunk, temperature)

  return reference


def weights(rep: reparam.Reparam, params: Params) -> Params:
  """Return what `logprobs` needs in `frozen` beside the weights that theta changes."""
  return {} if rep.base == 'params' else {'reference': params}


def shapes(model: models.Model, mesh: jax.sharding.Mesh) -> Params:
  """Return the shapes and shardings of a run's start."""
  drawn = jax.eval_shape(model.init, jax.random.key(0))
  return checkpoint.abstract(drawn, sharding.shardings(drawn, mesh))


def _setup(cfg, model, rep, evaluators, params=None, cache=None) -> Setup:
  """Make the set-up of a run: `params` are the reference's, `cache` its log-probabilities."""
  forward = {'student': reparam.map_groups(rep, model.forward)}
  live = params is not None and not cache
  if cache:
    forward['reference'] = lambda frozen, batch: batch['teacher_logprobs']
  elif live:
    forward['reference'] = logprobs(model, rep, cfg.objective.chunk)
  return Setup(
    {ROWS: preference.dpo(cfg.objective, forward)},
    evaluators,
    frozen=weights(rep, params) if live else {},
    flops=forward_flops(model.cfg, cfg.context) if live else 0.0,
    ancestors=(str(cache.path),) if cache else (),
    look_up=cache,
  )


def _open(cfg: RunConfig, params: Params) -> signals.Signals:
  """Open the log-probabilities of a reference.

  The rows hold the tokens that a template made, so their hash stands for it too.

  Raises:
    ValueError: naming what differs, if they are not those of these weights on the run's rows.
  """
  cache = signals.Signals(cfg.teacher_cache)
  expected = {
    'mode': signals.TARGETS, 'tokenizer': cfg.tokenizer, 'context': cfg.context,
    'rows_sha256': cfg.rows, 'weights': tree.weights_hash(params),
  }  # fmt: skip
  for key, value in expected.items():
    if (found := cache.facts[key]) != value:
      raise ValueError(
        f'teacher_cache: {cache.path} has {key} {str(found)[:12]}, this run {str(value)[:12]}: '
        f'make it again with slm.signals --run={cfg.init} --mode={signals.TARGETS}'
      )
  return cache


class Evaluator:
  """Evaluates held-out pairs, those of the rows that `cfg.eval` names.

  Attributes:
    reference: what `pairs` gives for the reference; None where there is none.
  """

  reference: np.ndarray | None = None

  def __init__(
    self,
    cfg: RunConfig,
    judged: DpoConfig,
    scores: Callable[[Params, Params, losses.Batch], jax.Array],
    rep: reparam.Reparam,
    mesh: jax.sharding.Mesh,
  ):
    """Evaluate by scores(params, beside, batch) -> [b,2,p] of answers, judged as DPO's are."""
    self._judged, dtype = judged, jnp.dtype(cfg.dtype)

    def measure(weights, batch):
      mask = (batch['weights'] > 0).astype(jnp.float32)
      tokens = preference.by_answer(mask, batch['segments']).sum(1)
      of_pairs = jnp.stack([preference.pair_weights(batch), tokens], axis=1)
      both = [scores(*tree.cast(weights, dtype), batch), of_pairs]
      return jnp.concatenate(both, axis=1).reshape(len(tokens), -1)

    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self._measure = jax.jit(measure, out_shardings=everywhere)
    e = cfg.eval
    self._rows = (mesh, cfg.data.path, e.set, e.split, e.batch_size, rep.clusters, e.max_rows)

  def pairs(self, specialist: Callable[[int], Params], beside: Params) -> np.ndarray:
    """Return the scores of both answers, the weight and the tokens of each pair: [pairs,4]."""
    rows = heldout.rows(self._measure, lambda c: (specialist(c), beside), *self._rows)
    table = rows.reshape(len(rows), 4, -1).swapaxes(1, 2).reshape(-1, 4)
    return table[table[:, 2] > 0]

  def __call__(self, specialist: Callable[[int], Params], beside: Params) -> dict[str, float]:
    """Summarise the held-out pairs of a model."""
    return summary(self._judged, self.pairs(specialist, beside), self.reference)


def summary(
  cfg: DpoConfig, pairs: np.ndarray, reference: np.ndarray | None = None
) -> dict[str, float]:
  """Summarise pairs as `Evaluator.pairs` gives them, of a model and of its reference.

  'accuracy' and 'margin' are those of rewards, 'preferred' is the share of pairs whose chosen
  answer has the higher score by the model alone, and 'gain' how much more that is than the
  reference's. Standard errors are of means over independent pairs.

  Raises:
    ValueError: if there are no pairs.
  """
  if not len(pairs):
    raise ValueError('eval: the held-out rows hold no pair')
  scores, weights = pairs[:, :2], pairs[:, 2]
  relative = scores if reference is None else scores - reference[:, :2]
  found = preference.judge(cfg, jnp.asarray(cfg.scale * relative)[..., None])
  values = {name: np.asarray(x, np.float64)[:, 0] for name, x in found.items()}
  if cfg != preference.BRADLEY_TERRY:  # where it is the accuracy
    values['preferred'] = (scores[:, 0] > scores[:, 1]).astype(float)
  if reference is not None:
    values['gain'] = values['preferred'] - (reference[:, 0] > reference[:, 1])
  result = {'tokens': int(pairs[:, 3].sum()), 'pairs': len(pairs)}
  for name, x in values.items():
    mean = float(np.sum(weights * x) / weights.sum())
    result[name] = mean
    if name in ('loss', 'margin', 'accuracy', 'preferred', 'gain'):
      squares = float(np.sum((weights * (x - mean)) ** 2))
      result[f'{name}_stderr'] = math.sqrt(squares * len(x) / max(len(x) - 1, 1)) / weights.sum()
  return result
