"""Held-out losses, per row, so that models are compared on identical windows."""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slm.base import artifact, files
from slm.data import loader
from slm.objectives import losses
from slm.runs import load, rundir
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
) -> np.ndarray:
  """Evaluate every row of a split with its cluster's specialist: [rows,2] NLL and tokens.

  Rows are in file order, so that arrays of different models align. With level 0 the specialist is
  asked for once, with cluster 0.
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
  if not found:
    raise ValueError(f'{path}: {data_set}/{split} has no rows to evaluate on')
  values = np.stack([found[i] for i in sorted(found)])
  if bad := int((~np.isfinite(values)).any(1).sum()):
    raise FloatingPointError(
      f'{data_set}/{split}: the loss of {bad} of {len(values)} rows is not finite'
    )
  return values


def summary(values: np.ndarray, num_bytes: int) -> dict[str, float]:
  """Summarise [rows,2]: loss in nats per token, perplexity, bits per byte of the text.

  Standard errors are of the ratio of two sums over rows, as if rows were drawn independently; those
  of one document are alike, so the bootstrap over documents that studies use finds larger ones.
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
  """Evaluate a run on 'set/split' names; write eval.json and eval/<set>-<split>.npy.

  With `max_rows` on that many rows, evenly spaced, whose bytes nobody counted: no bits per byte.
  Those of RUN@STEP are eval-STEP.json and eval-STEP/. What is there for other names stays. A run
  that holds specialists routes every row to its own cluster's.
  """
  folder = rundir.evaluations(workdir)
  loaded = load.load(workdir, mesh)
  manifest = loader.manifest(path)
  load.same_tokenizer(loaded, manifest['tokenizer']['fingerprint'])
  load.same_clusters(loaded, path)
  cfg = loaded.cfg
  row_losses = make_row_losses(loaded.model.forward, cfg['dtype'], cfg['objective']['chunk'], mesh)
  results_path = folder.with_suffix('.json')
  with artifact.hold(folder.parent, folder.name), jax.set_mesh(mesh):
    results = files.read_json(results_path) if results_path.exists() else {}
    for name in sets:
      data_set, _, split = name.partition('/')
      level = loaded.reparam.clusters
      specialist = lambda c, level=level: loaded.params(c if level else None)
      where = (path, data_set, split)
      values = rows(row_losses, specialist, mesh, *where, batch_size, level, max_rows)
      files.write_npy(folder / f'{data_set}-{split}.npy', values)
      facts = manifest['sets'][data_set][split]
      origin = {'step': loaded.step, 'rows_sha256': facts['sha256']}
      whole = len(values) == facts['rows']
      results[name] = summary(values, facts['bytes'] if whole else 0) | origin
      files.write_json(results_path, results)
  return results
