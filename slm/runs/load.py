"""From a run directory to a model that can be called."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm import models, reparam
from slm.base import files
from slm.data import loader, tokenizer
from slm.runs import checkpoint, ledger, rundir
from slm.weights import sharding
from slm.weights.axes import Params


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A trained run: its config, model, reparameterisation and theta at its best step."""

  path: Path
  cfg: dict[str, Any]
  model: models.Model
  reparam: reparam.Reparam
  theta: Params
  frozen: Params  # {'base': ...} where theta is a change of another run's weights
  step: int

  def params(self, condition: int | np.ndarray | None = None) -> Params:
    """Return dense params: the model itself, or a cluster's or histogram's specialist.

    Raises:
      ValueError: if the run holds specialists and no valid cluster or histogram [clusters] is
        given, or holds none and one is.
    """
    clusters = self.reparam.clusters
    if not clusters and condition is not None:
      raise ValueError(f'{self.path} holds one dense model: it has no cluster {condition}')
    if clusters and not np.ndim(condition) and (condition is None or not 0 <= condition < clusters):
      raise ValueError(f'{self.path}: expected a cluster in 0..{clusters - 1}, found {condition}')
    if np.ndim(condition) and np.shape(condition) != (clusters,):
      raise ValueError(
        f'{self.path}: expected a histogram over {clusters} clusters, '
        f'found shape {np.shape(condition)}'
      )
    if not (clusters or self.frozen):
      return self.theta
    return jax.jit(self.reparam.materialize)(self.theta, self.frozen, condition)


def build(cfg: dict[str, Any]) -> tuple[models.Model, reparam.Reparam]:
  """Build the model and reparameterisation of a resolved config."""
  model = models.build(cfg['model'])
  return model, reparam.build(cfg['reparam'], model.init)


def check_init(cfg: Mapping[str, Any]) -> None:
  """Refuse a config that leaves open which run to start from.

  Raises:
    ValueError: saying so.
  """
  if cfg['init'] == '?':
    raise ValueError(
      f'init: phase {cfg["phase"]!r} starts from the weights of a run: name it with '
      "--config.init=RUN ('' trains random weights)"
    )


def inherit(cfg: dict[str, Any]) -> dict[str, Any]:
  """Take over from the run that `init` names what its weights decide: the model's shape.

  How it is computed stays the config's. Changes cfg and returns it.

  Raises:
    ValueError: if a tuned code does not start from a projected network.
  """
  check_init(cfg)
  if not cfg['init']:
    return cfg
  how = {name: cfg['model'][name] for name in ('dispatch', 'remat', 'unroll')}
  start = rundir.read_config(cfg['init'])
  cfg['model'] = {**start['model'], **how}
  if cfg['reparam']['name'] == 'code':
    of = start['reparam']
    if of['name'] != 'project':
      raise ValueError(f'init: reparam "code" tunes a projected network, found {of["name"]!r}')
    even = [1 / of['clusters']] * of['clusters']  # where there are no data to say otherwise
    cfg['reparam'] |= {'of': of, 'histogram': even}
  return cfg


def check_groups(cfg: Mapping[str, Any], rep: reparam.Reparam, devices: int) -> None:
  """Refuse groups of rows that do not fit the reparameterisation or the devices.

  Raises:
    ValueError: naming the keys that do not fit together.
  """
  loader.DataConfig(seed=cfg['seed'], **cfg['data'])
  d = cfg['data']
  if rep.clusters != d['level'] and rep.clusters:
    raise ValueError(
      f'reparam.clusters={rep.clusters} needs rows grouped by as many clusters: '
      f'set data.level to it, found {d["level"]}'
    )
  if rep.histograms != (d['order'] == 'histogram'):
    need = 'needs' if rep.histograms else 'is not trained with'
    raise ValueError(f'reparam {cfg["reparam"]["name"]!r} {need} data.order="histogram"')
  if rep.independent and d['order'] != 'every':
    raise ValueError(f'data.order={d["order"]!r}: independent models need "every"')
  groups = d['batch_size'] // (d['accum'] * d['rows_per_group'])
  if groups % devices:
    raise ValueError(
      f'mesh: {groups} groups of rows per microbatch (data.batch_size / accum / rows_per_group) '
      f'do not divide over {devices} devices of the batch axes'
    )


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
  cfg = rundir.read_config(run)
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
  frozen = {'base': base(cfg, rep, mesh)} if rep.base else {}
  return Loaded(run, cfg, model, rep, theta, frozen, step)


def mesh_for(run: str | Path) -> jax.sharding.Mesh:
  """Return the mesh on which no device holds more of a run's weights than it must."""
  return sharding.fit_mesh(rundir.read_config(run)['model']['embed'])


def write_dense(
  workdir: Path, cfg: Mapping[str, Any], params: Params, ancestors: list[str],
  phases: list[dict[str, Any]] | None = None, **result: Any,
) -> None:  # fmt: skip
  """Write weights that no training made here as a finished run, which `load` reads.

  The directory must have passed rundir.check_run; an interruption leaves what a second call ends.
  """
  rundir.write_run(workdir, cfg)
  with checkpoint.Checkpoints(workdir / 'checkpoints', keep=1) as saved:
    if saved.latest is None:
      saved.save(0, params)
  ledger.write_ledger(workdir, phases or [], ancestors)
  files.write_json(workdir / 'result.json', {'steps': 0, **result})


def base(cfg: Mapping[str, Any], rep: reparam.Reparam, mesh: jax.sharding.Mesh) -> Params:
  """Load what a run changes and does not train: the weights of the run that its `init` names.

  Raises:
    ValueError: if there is no such run or it was trained with another tokenizer.
  """
  if not cfg['init']:
    raise ValueError(f'init: reparam {cfg["reparam"]["name"]!r} changes the weights of another run')
  start = load(cfg['init'], mesh, finished=True)
  same_tokenizer(start, cfg['tokenizer'])
  same_clusters(start, cfg['data']['path'])  # a code is tuned from the set's place among them
  return start.params() if rep.base == 'params' else start.theta


def same_clusters(loaded: Loaded, path: str | Path) -> None:
  """Refuse data clustered otherwise than those that a run with specialists was trained on.

  Raises:
    ValueError: naming both.
  """
  if loaded.reparam.clusters and loaded.cfg['clustering'] != loader.clustering(path):
    raise ValueError(
      f'{loaded.path} was trained on other clusters than those of {path}: its specialists mean '
      'nothing there'
    )


def reads(loaded: Loaded, path: str | Path = '') -> tuple[tokenizer.Tokenizer, list[int]]:
  """Return a run's tokenizer, and the ids that every text begins with: a begin token, or none.

  The tokenizer is in the data directory `path`, the run or the run's data. Models trained here read
  a begin token before every text, imported ones if their tokenizer says so.

  Raises:
    ValueError: if there is none, or it is another than the weights were trained with.
  """
  own = loaded.path if (loaded.path / 'tokenizer').is_dir() else loaded.cfg['data']['path']
  tok = tokenizer.load(Path(path or own) / 'tokenizer')
  same_tokenizer(loaded, tok.fingerprint)
  return tok, [tok.ids.bos] if tok.begins or loaded.cfg['phase'] != 'import' else []


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
