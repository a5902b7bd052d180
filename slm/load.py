"""From a run directory to a model that can be called."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from slm import checkpoint, data, files, models, reparam, rundir, sharding

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A trained run: its config, model, reparameterisation and theta at its best step."""

  path: Path
  cfg: dict[str, Any]
  model: models.Model
  reparam: reparam.Reparam
  theta: Params
  step: int

  def params(self, cluster: int | None = None) -> Params:
    """Return ordinary dense params: the model itself, or the specialist of a cluster.

    Raises:
      ValueError: if the run holds specialists and no valid cluster is named, or holds none and
        one is.
    """
    clusters = self.reparam.clusters
    if not clusters:
      if cluster is not None:
        raise ValueError(f'{self.path} holds one dense model: it has no cluster {cluster}')
      return self.theta
    if cluster is None or not 0 <= cluster < clusters:
      raise ValueError(f'{self.path}: expected a cluster in 0..{clusters - 1}, found {cluster}')
    return jax.jit(self.reparam.materialize)(self.theta, {}, cluster)


def build(cfg: dict[str, Any]) -> tuple[models.Model, reparam.Reparam]:
  """Build the model and reparameterisation of a resolved config."""
  model = models.build(cfg['model'])
  return model, reparam.build(cfg['reparam'], model.init)


def theta_shardings(rep: reparam.Reparam, mesh: jax.sharding.Mesh) -> tuple[Params, Params]:
  """Return theta's shapes and where each leaf lies on the mesh."""
  shapes = jax.eval_shape(rep.init, jax.random.key(0))
  return shapes, sharding.shardings(shapes, mesh)


def load(run: str | Path, mesh: jax.sharding.Mesh, finished: bool = False) -> Loaded:
  """Load RUN's best checkpoint, or RUN@STEP, onto the mesh; `finished` refuses unfinished runs.

  Raises:
    ValueError: if the directory holds no run or no such checkpoint, or the run must be finished
      and is not (a named step need not be the last).
  """
  run, step = rundir.split_ref(run)
  cfg = files.read_json(run / 'config.json')
  if finished and step is None and not (run / 'result.json').exists():
    raise ValueError(f'{run}: has not finished; the command that started it continues it')
  model, rep = build(cfg)
  shapes, where = theta_shardings(rep, mesh)
  directory = run / 'checkpoints'
  if not directory.is_dir():
    raise ValueError(f'{run}: holds no checkpoints, the run has not saved yet')
  with checkpoint.Checkpoints(directory) as saved:
    if step is not None and step not in saved.steps:
      raise ValueError(f'{run}: has no checkpoint of step {step}, there are: {saved.steps}')
    step = saved.best if step is None else step
    if step is None:
      raise ValueError(f'{run}: holds no checkpoints, the run has not saved yet')
    theta = saved.restore_theta(step, checkpoint.abstract(shapes, where))
  return Loaded(run, cfg, model, rep, theta, step)


def same_clusters(loaded: Loaded, path: str | Path) -> None:
  """Refuse data clustered otherwise than those that a run with specialists was trained on.

  Raises:
    ValueError: naming both.
  """
  if loaded.reparam.clusters and loaded.cfg['clustering'] != data.clustering(path):
    raise ValueError(
      f'{loaded.path} was trained on other clusters than those of {path}: its specialists mean '
      'nothing there'
    )


def same_tokenizer(loaded: Loaded, fingerprint: str) -> None:
  """Refuse weights trained with another tokenizer.

  Raises:
    ValueError: naming both fingerprints.
  """
  if loaded.cfg['tokenizer'] != fingerprint:
    raise ValueError(
      f'{loaded.path} was trained with tokenizer {loaded.cfg["tokenizer"][:12]}, '
      f'the data were made with {fingerprint[:12]}'
    )
