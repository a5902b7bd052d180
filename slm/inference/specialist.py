"""One specialist of a run that holds several, as an ordinary dense run."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm.base import artifact, console, files
from slm.data import loader
from slm.objectives import heldout
from slm.runs import config, load
from slm.runs.ledger import phase_entry
from slm.weights import sharding
from slm.weights.count import forward_flops

# A cluster id or a histogram over clusters, and the tokens of the forward passes it cost.
Choice = tuple[int | np.ndarray, int]


def frequent(loaded: load.Loaded, path: str, domain: str, index: str, mesh: Any) -> Choice:
  """Choose the domain's most frequent cluster; needs no model evaluation."""
  histogram = loader.histogram(path, domain, 'train', loaded.reparam.clusters, index)
  return int(np.argmax(histogram)), 0


def histogram(loaded: load.Loaded, path: str, domain: str, index: str, mesh: Any) -> Choice:
  """Take the domain's whole histogram: average the clusters' codes, or a mixture's experts."""
  found = loader.histogram(path, domain, 'train', loaded.reparam.clusters, index)
  if loaded.reparam.histograms:  # it was trained on shares of rows
    split = loader.Split(path, domain, 'train', index, loaded.reparam.clusters)
    found = np.bincount(split.clusters[split.ids], minlength=len(found)) / len(split.ids)
  return found.astype(np.float32), 0


def best(loaded: load.Loaded, path: str, domain: str, index: str, mesh: Any) -> Choice:
  """Choose the specialist with the lowest loss on the domain's set before any fine-tuning."""
  cfg = loaded.cfg
  losses = heldout.make_row_losses(loaded.model.forward, cfg.dtype, cfg.objective.chunk, mesh)
  found, tokens = [], 0
  with console.progress('choose specialist', loaded.reparam.clusters, 'models') as progress:
    for cluster in range(loaded.reparam.clusters):
      params = loaded.params(cluster)
      values = heldout.rows(
        losses,
        lambda c, p=params: p,
        mesh,
        path,
        domain,
        'train',
        cfg.eval.batch_size,
        index=index,
      )
      nll, count = values.sum(0)
      found.append(nll / count)
      tokens += int(count)
      progress.update(1, loss=found[-1])
  return int(np.argmin(found)), tokens


RULES = {'frequent': frequent, 'best': best, 'histogram': histogram}


@artifact.writes('workdir')
def specialise(
  run: str | Path, domain: str, workdir: str | Path, rule: str = 'frequent', index: str = ''
) -> int | list[float]:
  """Write the chosen specialist as a dense run directory; returns its cluster or histogram.

  Raises:
    ValueError: if the run holds no specialists, or the rule or the domain is unknown.
  """
  if rule not in RULES:
    raise ValueError(f'--rule: expected one of {sorted(RULES)}, found {rule!r}')
  run, workdir = Path(run).resolve(), Path(workdir)
  mesh = sharding.make_mesh({'data': -1})
  loaded = load.load(run, mesh, finished=True)
  if not loaded.reparam.clusters:
    raise ValueError(f'{run} holds one dense model: there is no specialist to take out')
  cfg, began = loaded.cfg, time.monotonic()
  path = cfg.data.path
  load.same_clusters(loaded, path)
  if domain not in loader.manifest(path)['sets']:
    raise ValueError(f'{path} has no set {domain!r}')
  chosen = {'of': str(run), 'domain': domain, 'rule': rule, 'index': index}
  dense = config.derive(cfg, 'select', specialist=chosen)
  config.check_run(workdir, dense)
  if (workdir / 'result.json').exists():
    return files.read_json(workdir / 'result.json')['condition']
  with jax.set_mesh(mesh):
    condition, tokens = RULES[rule](loaded, path, domain, index, mesh)
    params = loaded.params(condition)
  flops = tokens * forward_flops(loaded.model.cfg, cfg.context)
  entry = phase_entry('select', tokens, flops, (time.monotonic() - began) * jax.device_count())
  condition = np.asarray(condition).tolist()
  load.write_dense(workdir, dense, params, [str(run)], [entry], condition=condition, rule=rule)
  return condition
