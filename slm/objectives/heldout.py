"""Held-out losses, per row, so that models are compared on identical windows."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm import models, reparam
from slm.base import artifact, console, files
from slm.data import loader
from slm.objectives import losses
from slm.runs import load, rundir
from slm.runs.config import RunConfig
from slm.weights import sharding, tree
from slm.weights.axes import Params


def make_row_losses(
  forward: Callable, dtype: str, chunk: int, mesh: jax.sharding.Mesh
) -> Callable[..., jax.Array]:
  """Make jitted f(params, batch [b,t]) -> [b,2]: each row's summed NLL (nats) and tokens.

  The result lies whole on every device, so that every process can read it.
  """

  def row_losses(params, batch):
    params = tree.cast(params, jnp.dtype(dtype))
    nll = losses.token_losses(forward, params, batch, chunk)
    return jnp.stack([nll.sum(-1), batch['weights'].sum(-1)], axis=-1)

  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.jit(row_losses, out_shardings=everywhere)


def rows(
  row_losses: Callable[..., jax.Array],
  specialist: Callable[[int], Params],
  mesh: jax.sharding.Mesh,
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

  Rows are in file order, so that arrays of different models align. With level 0 the specialist is
  asked for once, with cluster 0. `advance` is told how many rows were done.
  """
  devices = sharding.batch_devices(mesh)
  batch_size = -(-batch_size // devices) * devices
  found: dict[int, np.ndarray] = {}
  where = sharding.batch_sharding(mesh)
  cluster, params = None, None
  batches = loader.evaluation_batches(
    path, data_set, split, batch_size, level=level, index=index, max_rows=max_rows
  )
  for condition, ids, batch in batches:
    if condition != cluster:
      cluster, params = condition, specialist(condition)
    values = np.asarray(row_losses(params, jax.device_put(batch, where)), np.float64)
    found.update((i, v) for i, v in zip(ids.tolist(), values, strict=True) if i >= 0)
    advance(int((ids >= 0).sum()))
  if not found:
    raise ValueError(f'{path}: {data_set}/{split} has no rows to evaluate on')
  values = np.stack([found[i] for i in sorted(found)])
  if bad := int((~np.isfinite(values)).any(1).sum()):
    raise FloatingPointError(
      f'the loss on {data_set}/{split} is not finite in {bad} of {len(values)} rows: the weights '
      'are damaged or training diverged'
    )
  return values


def evaluator(
  cfg: RunConfig, model: models.Model, rep: reparam.Reparam, mesh: jax.sharding.Mesh
) -> Callable[[Callable[[int], Params]], dict[str, float]]:
  """Return what measures a run while it trains: its loss on the rows that `eval` names.

  Each row is evaluated under its own cluster's specialist.
  """
  row_losses = make_row_losses(model.forward, cfg.dtype, cfg.objective.chunk, mesh)
  e = cfg.eval
  where = (mesh, cfg.data.path, e.set, e.split, e.batch_size, rep.clusters, e.max_rows)
  return lambda specialist: summary(rows(row_losses, specialist, *where), 0)


def summary(values: np.ndarray, num_bytes: int) -> dict[str, float]:
  """Summarise [rows,2]: loss in nats per token, perplexity, bits per byte of the text.

  Standard errors are of the ratio of two sums over rows, as if rows were drawn independently; those
  of one document are alike, so the bootstrap over documents that slm.compare uses finds larger
  ones. They are of one model: what two differ by on the same rows varies far less.
  """
  nll, tokens = values.sum(0)
  apart = values[:, 0] - nll / tokens * values[:, 1]
  error = math.sqrt(len(values) / max(len(values) - 1, 1) * float(np.sum(apart**2))) / float(tokens)
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
    more = {'bpb': float(nll) * bits, 'bpb_stderr': error * float(tokens) * bits}
    result |= {'bytes': num_bytes, **more}
  return result


def run(
  workdir: str | Path, path: str, sets: list[str], mesh: jax.sharding.Mesh, batch_size: int,
  max_rows: int = 0,
) -> dict[str, dict[str, float]]:  # fmt: skip
  """Evaluate a run on 'set/split[@index]' names; write eval.json and eval/<set>-<split>.npy.

  With `max_rows` on that many rows, evenly spaced, whose bytes nobody counted: no bits per byte.
  Those of RUN@STEP are eval-STEP.json and eval-STEP/. What is there for other names stays, as does
  what is there of the same weights and rows. A run that holds specialists routes every row to its
  own cluster's.

  Raises:
    FloatingPointError: if a loss is not finite; what was there stays.
  """
  folder = rundir.evaluations(workdir)
  summaries = folder.with_suffix('.json')
  read = lambda: files.read_json(summaries) if summaries.exists() else {}
  todo = missing(workdir, path, sets, max_rows)
  if not todo:
    return read()
  loaded = load.load(workdir, mesh)
  load.same_tokenizer(loaded, loader.manifest(path)['tokenizer']['fingerprint'])
  load.same_clusters(loaded, path)
  cfg, level = loaded.cfg, loaded.reparam.clusters
  row_losses = make_row_losses(loaded.model.forward, cfg.dtype, cfg.objective.chunk, mesh)
  specialist = lambda c: loaded.params(c if level else None)
  with artifact.hold(folder.parent, folder.name), jax.set_mesh(mesh):
    results = read()
    for name in todo:
      data_set, split, index = loader.parse_on(path, name)
      facts = loader.facts(path, name)
      size = min(max_rows or facts['rows'], facts['rows'])
      with console.progress(f'{Path(workdir).name} on {name}', size, 'rows') as progress:
        try:
          values = rows(
            row_losses, specialist, mesh, path, data_set, split, batch_size, level, max_rows,
            index, advance=progress.update,
          )  # fmt: skip
        except FloatingPointError as e:
          raise FloatingPointError(f'{workdir}: {e}') from e
      files.write_npy(folder / f'{name.replace("/", "-")}.npy', values)
      origin = {'step': loaded.step, 'rows_sha256': facts['sha256']}
      whole = len(values) == facts['rows']
      results[name] = summary(values, facts['bytes'] if whole else 0) | origin
      files.write_json(summaries, results)
  return results


def missing(ref: str | Path, path: str | Path, sets: Iterable[str], max_rows: int = 0) -> list[str]:
  """List the 'set/split' names that RUN or RUN@STEP was not evaluated on with these rows.

  Raises:
    ValueError: if the data have no such set or split.
  """
  folder = rundir.evaluations(ref)
  summaries = folder.with_suffix('.json')
  kept = files.read_json(summaries) if summaries.exists() else {}
  step = rundir.served_step(ref)

  def current(name: str) -> bool:
    facts = loader.facts(path, name)
    rows = min(max_rows or facts['rows'], facts['rows'])
    now = {'step': step, 'rows_sha256': facts['sha256'], 'rows': rows}
    file = folder / f'{name.replace("/", "-")}.npy'
    return file.exists() and now == {key: kept.get(name, {}).get(key) for key in now}

  return [name for name in sets if not current(name)]


def kept(ref: str | Path, name: str) -> tuple[np.ndarray, dict[str, Any]]:
  """Read what RUN or RUN@STEP was evaluated on 'set/split': rows [rows,2] and their summary.

  Raises:
    ValueError: if it was not evaluated, or with other weights than it serves, or damaged.
  """
  again = f'python -m slm.evaluate --run={ref} --on={name}'
  folder, step = rundir.evaluations(ref), rundir.served_step(ref)
  summaries = folder.with_suffix('.json')
  summary = (files.read_json(summaries) if summaries.exists() else {}).get(name)
  if summary is None:
    raise ValueError(f'{ref}: not evaluated on {name}; {again}')
  if summary['step'] != step:
    raise ValueError(
      f'{ref}: evaluated on {name} at step {summary["step"]} and serves {step}; {again}'
    )
  file = folder / f'{name.replace("/", "-")}.npy'
  if not file.exists():
    raise ValueError(f'{file}: missing; {again}')
  values = files.read_npy(file)
  if values.ndim != 2 or values.shape[1] != 2 or not len(values) or values[:, 1].sum() <= 0:
    raise ValueError(f'{file}: expected [rows,2] of NLL and tokens, found {values.shape}')
  return values, summary
