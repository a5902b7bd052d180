"""Held-out losses per row, so that models are compared on identical windows."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm import models, reparam
from slm.base import console, files
from slm.data import loader
from slm.objectives import losses
from slm.runs import load, processes, rundir
from slm.runs.config import RunConfig
from slm.weights import sharding, tree
from slm.weights.axes import Params


def make_row_losses(
  forward: Callable, dtype: str, chunk: int, mesh: Mesh
) -> Callable[..., jax.Array]:
  """Make jitted f(params, batch [b,t]) -> [b,2]: each row's summed NLL (nats) and tokens.

  The result is replicated, so that every process can read it.
  """

  def row_losses(params, batch):
    params = tree.cast(params, jnp.dtype(dtype))
    nll = losses.token_losses(forward, params, batch, chunk)
    return jnp.stack([nll.sum(-1), batch['weights'].sum(-1)], axis=-1)

  replicated = NamedSharding(mesh, PartitionSpec())
  return jax.jit(row_losses, out_shardings=replicated)


def rows(
  row_losses: Callable[..., jax.Array],
  specialist: Callable[[int], Params],
  mesh: Mesh,
  path: str,
  data_set: str,
  split: str,
  batch_size: int,
  level: int = 0,
  max_rows: int = 0,
  index: str = '',
  advance: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
  """Evaluate every row of a split with its cluster's specialist: [rows,2] NLL and tokens.

  Rows are in file order, so that arrays of different models align; a row that an index repeats
  counts each time. With level 0, `specialist` is called once, for cluster 0. `advance` is called
  with the number of rows of each batch. A split without rows raises ValueError, a loss that is not
  finite FloatingPointError.
  """
  devices = sharding.batch_devices(mesh)
  batch_size = -(-batch_size // devices) * devices
  evaluated, losses_by_batch = [], []
  cluster, params = None, None
  process_index, process_count = processes.local_share(mesh)
  batches = loader.evaluation_batches(
    path, data_set, split, batch_size, level=level, index=index, max_rows=max_rows,
    process_index=process_index, process_count=process_count,
  )  # fmt: skip
  for condition, ids, batch in batches:
    if condition != cluster:
      cluster, params = condition, specialist(condition)
    batch = processes.global_rows(batch, mesh)
    values = np.asarray(row_losses(params, batch), np.float64)
    real = ids >= 0
    evaluated.append(ids[real])
    losses_by_batch.append(values[real])
    advance(int(real.sum()))
  if not evaluated:
    raise ValueError(f'{path}: {data_set}/{split} has no rows to evaluate on')
  values = np.concatenate(losses_by_batch)[np.argsort(np.concatenate(evaluated), kind='stable')]
  if bad := int((~np.isfinite(values)).any(1).sum()):
    raise FloatingPointError(
      f'the loss on {data_set}/{split} is not finite in {bad} of {len(values)} rows: the weights '
      'are damaged or training diverged'
    )
  return values


def evaluator(
  cfg: RunConfig, model: models.Model, rep: reparam.Reparam, mesh: Mesh
) -> Callable[[Callable[[int], Params], Params], dict[str, float]]:
  """Make the evaluator of a run in training: its loss on the rows that `cfg.eval` names.

  Each row is evaluated with its own cluster's specialist.
  """
  row_losses = make_row_losses(model.forward, cfg.dtype, cfg.objective.chunk, mesh)
  e = cfg.eval
  split = (mesh, cfg.data.path, e.set, e.split, e.batch_size, rep.clusters, e.max_rows)
  return lambda specialist, _: summary(rows(row_losses, specialist, *split), 0)


def summary(values: np.ndarray, num_bytes: int) -> dict[str, float]:
  """Summarise [rows,2]: loss in nats per token, perplexity, bits per byte (num_bytes 0: none).

  Standard errors are of a ratio of two sums over independent rows. Rows of one document are alike,
  so the bootstrap over documents of slm.compare gives larger errors. The difference of two models
  on the same rows varies far less than either loss.
  """
  nll, tokens = values.sum(0)
  residuals = values[:, 0] - nll / tokens * values[:, 1]
  variance = len(values) / max(len(values) - 1, 1) * float(np.sum(residuals**2))
  error = math.sqrt(variance) / float(tokens)
  result = {
    'nll': float(nll),
    'tokens': int(tokens),
    'rows': len(values),
    'loss': float(nll / tokens),
    'loss_stderr': error,
    'ppl': float(np.exp(nll / tokens)),
  }
  if num_bytes:
    bits = 1 / math.log(2) / num_bytes
    result |= {'bytes': num_bytes, 'bpb': float(nll) * bits}
    result['bpb_stderr'] = error * float(tokens) * bits
  return result


def run(
  ref: str | Path, path: str, names: list[str], mesh: Mesh, batch_size: int, max_rows: int = 0
) -> dict[str, dict[str, float]]:
  """Evaluate RUN on 'set/split[@index]' names; write eval.json and eval/<set>-<split>.npy.

  Losses of RUN@STEP go to eval-STEP.json and eval-STEP/. Results for other names stay, and results
  of the same weights and rows are not computed again. With `max_rows` that many evenly spaced rows
  are evaluated, without bits per byte: bytes are known of whole splits only. A run that holds
  specialists evaluates every row with its own cluster's. FloatingPointError is raised if a loss is
  not finite; earlier results stay.
  """
  if not (names := missing(ref, path, names, max_rows)):
    return summaries(ref)
  loaded = load.load(ref, mesh)
  load.same_tokenizer(loaded, loader.manifest(path)['tokenizer']['fingerprint'])
  load.same_clusters(loaded, path)
  cfg, level = loaded.cfg, loaded.reparam.clusters
  row_losses = make_row_losses(loaded.model.forward, cfg.dtype, cfg.objective.chunk, mesh)
  specialist = lambda cluster: loaded.params(cluster if level else None)
  folder = rundir.evaluations(ref)
  with processes.hold(folder.parent, folder.name), jax.set_mesh(mesh):
    results = summaries(ref)
    for name in names:
      data_set, split, index = loader.parse_on(path, name)
      facts = loader.facts(path, name)
      count = min(max_rows or facts['rows'], facts['rows'])
      with console.Progress(f'{Path(ref).name} on {name}', count, 'rows') as progress:
        where = (mesh, path, data_set, split, batch_size, level, max_rows, index)
        try:
          values = rows(row_losses, specialist, *where, advance=progress.update)
        except FloatingPointError as e:
          raise FloatingPointError(f'{ref}: {e}') from e
      num_bytes = facts['bytes'] if len(values) == facts['rows'] else 0
      origin = {'step': loaded.step, 'rows_sha256': facts['sha256']}
      results[name] = summary(values, num_bytes) | origin
      if not jax.process_index():
        files.write_npy(_file(ref, name), values)
        files.write_json(folder.with_suffix('.json'), results)
  return results


def summaries(ref: str | Path) -> dict[str, dict[str, Any]]:
  """Read the summaries of RUN's or RUN@STEP's evaluations by 'set/split[@index]'."""
  path = rundir.evaluations(ref).with_suffix('.json')
  return files.read_json(path) if path.exists() else {}


def _file(ref: str | Path, name: str) -> Path:
  """Return the file of an evaluation's rows."""
  return rundir.evaluations(ref) / f'{name.replace("/", "-")}.npy'


def missing(ref: str | Path, path: str | Path, names: list[str], max_rows: int = 0) -> list[str]:
  """List the 'set/split[@index]' names without a current evaluation of RUN or RUN@STEP.

  A name that the data lack raises ValueError.
  """
  known, step = summaries(ref), load.served_step(ref)

  def current(name: str) -> bool:
    facts = loader.facts(path, name)
    rows = min(max_rows or facts['rows'], facts['rows'])
    expected = {'step': step, 'rows_sha256': facts['sha256'], 'rows': rows}
    return _file(ref, name).exists() and expected.items() <= known.get(name, {}).items()

  return [name for name in names if not current(name)]


def kept(ref: str | Path, name: str) -> tuple[np.ndarray, dict[str, Any]]:
  """Read RUN's or RUN@STEP's evaluation on 'set/split': rows [rows,2] and their summary.

  Raises:
    ValueError: if it was not evaluated, or with other weights than it serves, or damaged.
  """
  command = f'python -m slm.evaluate --run={ref} --on={name}'
  step, file = load.served_step(ref), _file(ref, name)
  summary = summaries(ref).get(name)
  if summary is None:
    raise ValueError(f'{ref}: not evaluated on {name}; {command}')
  if summary['step'] != step:
    raise ValueError(
      f'{ref}: evaluated on {name} at step {summary["step"]} and serves {step}; {command}'
    )
  if not file.exists():
    raise ValueError(f'{file}: missing; {command}')
  values = files.read_npy(file)
  if values.ndim != 2 or values.shape[1] != 2 or not len(values) or values[:, 1].sum() <= 0:
    raise ValueError(f'{file}: expected [rows,2] of NLL and tokens, found {values.shape}')
  return values, summary
