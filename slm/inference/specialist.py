"""Taking one specialist out of a run that holds several, as an ordinary dense run."""

import time
from pathlib import Path

import jax
import numpy as np

from slm.base import artifact, console, files, stage
from slm.data import loader
from slm.objectives import heldout
from slm.runs import config, load
from slm.runs.ledger import phase_entry
from slm.weights import sharding
from slm.weights.count import forward_flops

# A cluster id or a histogram over clusters, and the tokens of the forward passes it cost.
Choice = tuple[int | np.ndarray, int]


def frequent(loaded: load.Loaded, domain: str, index: str) -> Choice:
  """Choose the domain's most frequent cluster, without any forward pass."""
  shares = loader.histogram(loaded.cfg.data.path, domain, 'train', loaded.reparam.clusters, index)
  return int(np.argmax(shares)), 0


def histogram(loaded: load.Loaded, domain: str, index: str) -> Choice:
  """Choose the domain's histogram, which averages the codes or experts of its clusters."""
  path, clusters = loaded.cfg.data.path, loaded.reparam.clusters
  shares = loader.histogram(path, domain, 'train', clusters, index)
  if loaded.reparam.histograms:  # trained on shares of rows, not of windows
    split = loader.Split(path, domain, 'train', index, clusters)
    shares = np.bincount(split.clusters[split.ids], minlength=len(shares)) / len(split.ids)
  return shares.astype(np.float32), 0


def best(loaded: load.Loaded, domain: str, index: str) -> Choice:
  """Choose the cluster whose specialist has the lowest loss on the domain's training rows."""
  cfg, mesh = loaded.cfg, sharding.make_mesh({'data': -1})
  row_losses = heldout.make_row_losses(loaded.model.forward, cfg.dtype, cfg.objective.chunk, mesh)
  rows = (mesh, cfg.data.path, domain, 'train', cfg.eval.batch_size)
  losses, tokens = [], 0
  with console.Progress('choose specialist', loaded.reparam.clusters, 'models') as progress:
    for cluster in range(loaded.reparam.clusters):
      params = loaded.params(cluster)
      values = heldout.rows(row_losses, lambda _, p=params: p, *rows, index=index)
      nll, count = values.sum(0)
      losses.append(nll / count)
      tokens += int(count)
      progress.update(1, loss=losses[-1])
  return int(np.argmin(losses)), tokens


RULES = {'frequent': frequent, 'best': best, 'histogram': histogram}


@artifact.writes('workdir', addresses=True)
def specialise(
  run: str | Path, domain: str, workdir: str | Path, rule: str = 'frequent', index: str = ''
) -> int | list[float]:
  """Write a specialist as a dense run directory; returns its cluster or histogram.

  `rule` is how it is chosen for the domain's training rows: a name of RULES.

  Raises:
    ValueError: if the run holds no specialists, or the rule or the domain is unknown.
  """
  if rule not in RULES:
    raise ValueError(f'--rule: expected one of {sorted(RULES)}, found {rule!r}')
  run, workdir = stage.absolute(run), Path(workdir)
  mesh = sharding.make_mesh({'data': -1})
  loaded = load.load(run, mesh, finished=True)
  if not loaded.reparam.clusters:
    raise ValueError(f'{run} holds one dense model: there is no specialist to take out')
  cfg, began = loaded.cfg, time.monotonic()
  load.same_clusters(loaded, cfg.data.path)
  if domain not in loader.manifest(cfg.data.path)['sets']:
    raise ValueError(f'{cfg.data.path} has no set {domain!r}')
  chosen = {'of': run, 'domain': domain, 'rule': rule, 'index': index}
  dense = config.derive(cfg, 'select', specialist=chosen)
  config.check_run(workdir, dense)
  if (workdir / 'result.json').exists():
    return files.read_json(workdir / 'result.json')['condition']
  with jax.set_mesh(mesh):
    condition, tokens = RULES[rule](loaded, domain, index)
    params = loaded.params(condition)
  flops = tokens * forward_flops(loaded.model.cfg, cfg.context)
  entry = phase_entry('select', tokens, flops, (time.monotonic() - began) * jax.device_count())
  condition = np.asarray(condition).tolist()
  load.write_dense(workdir, dense, params, [run], [entry], condition=condition, rule=rule)
  return condition
