"""Load the model of a run directory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slm import models, reparam
from slm.base import files
from slm.data import copies, loader, tokenizer
from slm.reparam.dense import FullConfig
from slm.runs import checkpoint, config, ledger, rundir
from slm.runs.config import RunConfig
from slm.weights import sharding
from slm.weights.axes import Params


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A trained run: its config, model, reparameterisation and theta at one step."""

  path: Path
  cfg: RunConfig
  model: models.Model
  reparam: reparam.Reparam
  theta: Params
  frozen: Params  # {'base': ...} where theta changes another run's weights
  step: int

  def params(self, condition: int | np.ndarray | None = None) -> Params:
    """Return dense params: the model itself, or a cluster's or histogram's specialist.

    Raises:
      ValueError: if the run holds specialists and `condition` is no cluster or histogram
        [clusters], or the run holds one dense model and `condition` is given.
    """
    clusters = self.reparam.clusters
    if not clusters and condition is not None:
      raise ValueError(f'{self.path} holds one dense model and no cluster {condition}')
    if clusters and condition is None:
      raise ValueError(
        f'{self.path} holds {clusters} models: take one out first with python -m slm.specialise '
        f'--run={self.path} --on=SET/train --workdir=DIR'
      )
    if clusters and not np.ndim(condition) and not 0 <= condition < clusters:
      raise ValueError(f'{self.path}: expected a cluster in 0..{clusters - 1}, found {condition}')
    if np.ndim(condition) and np.shape(condition) != (clusters,):
      raise ValueError(
        f'{self.path}: expected a histogram over {clusters} clusters, '
        f'found shape {np.shape(condition)}'
      )
    if not (clusters or self.frozen):
      return self.theta
    return jax.jit(self.reparam.materialize)(self.theta, self.frozen, condition)


def build(cfg: RunConfig) -> tuple[models.Model, reparam.Reparam]:
  """Build the model and reparameterisation of a resolved config."""
  model = models.build(cfg.model)
  return model, reparam.build(cfg.reparam, model.init)


def check_groups(cfg: RunConfig, rep: reparam.Reparam, devices: int) -> None:
  """Raise ValueError if groups of rows do not fit the reparameterisation or the devices."""
  d = cfg.data
  if rep.clusters and rep.clusters != d.level:
    raise ValueError(
      f'reparam.clusters={rep.clusters} needs rows grouped by as many clusters: '
      f'expected data.level={rep.clusters}, found {d.level}'
    )
  if rep.histograms != (d.order == 'histogram'):
    need = 'needs' if rep.histograms else 'is not trained with'
    raise ValueError(f'reparam {cfg.reparam.name!r} {need} data.order="histogram"')
  if rep.independent and d.order != 'every':
    raise ValueError(f'data.order={d.order!r}: independent models need "every"')
  groups = d.batch_size // (d.accum * d.rows_per_group)
  if groups % devices:
    raise ValueError(
      f'mesh: {groups} groups of rows per microbatch (data.batch_size / accum / rows_per_group) '
      f'do not divide over {devices} devices of the batch axes; data.batch_size='
      f'{-(-groups // devices) * devices * d.accum * d.rows_per_group} does'
    )


def theta_shardings(rep: reparam.Reparam, mesh: Mesh) -> tuple[Params, Params]:
  """Return theta's shapes and shardings."""
  shapes = jax.eval_shape(rep.init, jax.random.key(0))
  return shapes, sharding.shardings(shapes, mesh)


def load(run: str | Path, mesh: Mesh, finished: bool = False) -> Loaded:
  """Load RUN's best checkpoint, or RUN@STEP, onto the mesh.

  Raises:
    ValueError: if the directory holds no run or no such checkpoint, or `finished` is set, no step
      is named and the run has not finished.
  """
  run, step = rundir.split_ref(run)
  cfg = config.of(run)
  if finished and step is None and not (run / 'result.json').exists():
    raise ValueError(f'{run}: has not finished; the command that started it continues it')
  if not checkpoint.saved_steps(run / 'checkpoints'):
    raise ValueError(f'{run}: holds no checkpoints, the run has not saved yet')
  model, rep = build(cfg)
  with checkpoint.Checkpoints(run / 'checkpoints') as saved:
    if step is None:
      step = saved.best
    elif step not in saved.steps:
      raise ValueError(f'{run}: has no checkpoint of step {step}, found steps {saved.steps}')
    shapes = checkpoint.abstract(*theta_shardings(rep, mesh))
    theta = saved.restore_item(step, checkpoint.THETA, shapes)
  frozen = {'base': base(cfg, rep, mesh)} if rep.base else {}
  return Loaded(run, cfg, model, rep, theta, frozen, step)


def beside(loaded: Loaded, shapes: Params, mesh: Mesh) -> Params:
  """Load weights of these shapes that a run trained beside theta, at the step that was loaded."""
  where = checkpoint.abstract(shapes, sharding.shardings(shapes, mesh))
  with checkpoint.Checkpoints(loaded.path / 'checkpoints') as saved:
    return saved.restore_item(loaded.step, checkpoint.BESIDE, where)


def outline(cfg: RunConfig, mesh: Mesh) -> Loaded:
  """Return a run as `load` does, with the shapes of its weights in place of the weights."""
  model, rep = build(cfg)
  theta = checkpoint.abstract(*theta_shardings(rep, mesh))
  return Loaded(Path(), cfg, model, rep, theta, {}, 0)


def base_outline(cfg: RunConfig, rep: reparam.Reparam, mesh: Mesh) -> Params:
  """Return the shapes and shardings of the frozen weights that theta changes; see `base`."""
  model = models.build(cfg.model)
  of = cfg.reparam.of if rep.base == 'theta' else FullConfig()
  return checkpoint.abstract(*theta_shardings(reparam.build(of, model.init), mesh))


def served_step(ref: str | Path) -> int | None:
  """Return the step whose weights RUN@STEP or a finished RUN serves, None if it does not exist."""
  run, step = rundir.split_ref(ref)
  if step is not None:
    return step if step in checkpoint.saved_steps(run / 'checkpoints') else None
  if not (run / 'result.json').exists():
    return None
  result = files.read_json(run / 'result.json', {'steps': int})
  # Without early stopping the last checkpoint serves, whatever the held-out losses were.
  return result.get('best_step' if config.of(run).eval.patience else 'steps', result['steps'])


def data_path(run: str | Path, data: str = '') -> str:
  """Return `data`, or the data directory of a run, or the copy of what is an address.

  Raises:
    ValueError: if there is neither, or as `copies.local` does.
  """
  path = data or config.of(run).data.path
  if not path:
    raise ValueError(f'{run}: names no data directory of its own: name one with --data')
  return copies.local(path)


def mesh_for(run: str | Path) -> Mesh:
  """Return a mesh over all devices that splits a run's weights as far as they divide."""
  return sharding.fit_mesh(config.of(run).model.embed)


def write_dense(
  workdir: Path, cfg: RunConfig, params: Params, ancestors: list[str],
  phases: list[dict[str, Any]] | None = None, **result: Any,
) -> None:  # fmt: skip
  """Write weights that were not trained here as a finished run.

  The directory must have passed config.check_run. A second call completes an interrupted one.
  """
  config.write_run(workdir, cfg)
  with checkpoint.Checkpoints(workdir / 'checkpoints', keep=1) as saved:
    if saved.latest is None:
      saved.save(0, params)
  ledger.write_ledger(workdir, phases or [], ancestors)
  files.write_json(workdir / 'result.json', {'steps': 0, **result})


def pin(workdir: Path, cfg: RunConfig) -> RunConfig:
  """Record the steps that `sources` serve now, or those of the run in the directory."""
  if (workdir / 'config.json').exists():
    return dataclasses.replace(cfg, source_steps=config.of(workdir).source_steps)
  served = {key: served_step(ref) for key, ref in sources(cfg).items()}
  steps = {key: step for key, step in served.items() if step is not None}
  return dataclasses.replace(cfg, source_steps=steps or None)


def sources(cfg: RunConfig) -> dict[str, str]:
  """Return the runs whose weights a run reads by the key that names them."""
  refs = {'teacher': cfg.teacher, 'init': cfg.init, 'objective.value': cfg.objective.value}
  return {key: ref for key, ref in refs.items() if ref}


def source(cfg: RunConfig, key: str, mesh: Mesh) -> Loaded:
  """Load the run that one of `sources` names, at the step that it served when `cfg`'s run began.

  Runs of earlier versions recorded no step: the one served now is loaded.

  Raises:
    ValueError: if the run has not finished, no longer has that step, or has another tokenizer.
  """
  ref, step = sources(cfg)[key], (cfg.source_steps or {}).get(key)
  if step is not None:
    path, _ = rundir.split_ref(ref)
    ref = f'{path}@{step}'
    if served_step(ref) is None:
      raise ValueError(
        f'{key}: the run began with step {step} of {path}, which now serves '
        f'{served_step(path)}: restore that checkpoint, or train again in another directory'
      )
  loaded = load(ref, mesh, finished=True)
  same_tokenizer(loaded, cfg.tokenizer)
  return loaded


def base(cfg: RunConfig, rep: reparam.Reparam, mesh: Mesh) -> Params:
  """Load the frozen weights that theta changes, those of `init`; raise ValueError if none fits."""
  if not cfg.init:
    raise ValueError(f'init: reparam {cfg.reparam.name!r} needs the run whose weights it changes')
  start = source(cfg, 'init', mesh)
  same_clusters(start, cfg.data.path)  # a code starts from the set's histogram over them
  return start.params() if rep.base == 'params' else start.theta


def same_clusters(loaded: Loaded, path: str | Path) -> None:
  """Raise ValueError if data are clustered otherwise than a run with specialists was trained on."""
  if loaded.reparam.clusters and loaded.cfg.clustering != loader.clustering(path):
    raise ValueError(
      f'{loaded.path} was trained on other clusters than those of {path}, so its specialists do '
      'not apply there'
    )


def reads(loaded: Loaded, path: str | Path = '') -> tuple[tokenizer.Tokenizer, list[int]]:
  """Return a run's tokenizer and the ids that every text begins with: a begin token, or none.

  The tokenizer is that of the data directory `path`, if given, else of the run or its data.

  Raises:
    ValueError: if it is missing, or the weights were trained with another.
  """
  folder = Path(path) / 'tokenizer' if path else tokenizer_of(loaded)
  if (folder.parent / 'manifest.json').exists():
    loader.manifest(folder.parent)
  tok = tokenizer.load(folder)
  same_tokenizer(loaded, tok.fingerprint)
  return tok, [*tok.begin]


def tokenizer_of(loaded: Loaded) -> Path:
  """Return the directory of a run's tokenizer: its own, or that of its data."""
  own = loaded.path / 'tokenizer'
  return own if own.is_dir() else Path(loaded.cfg.data.path) / 'tokenizer'


def same_tokenizer(loaded: Loaded, fingerprint: str) -> None:
  """Raise ValueError if weights were trained with another tokenizer than this fingerprint's."""
  if loaded.cfg.tokenizer != fingerprint:
    raise ValueError(
      f'{loaded.path} was trained with tokenizer {loaded.cfg.tokenizer[:12]}, '
      f'the data were made with {fingerprint[:12]}'
    )
