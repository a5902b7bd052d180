r"""Held-out losses of a sparse ensemble: a few of a run's specialists answer together.

    python -m experiments.specialise.ensemble --run=MIXTURE --on=law/test --workdir=ENSEMBLE --top=2

c-BTM (Gururangan et al. 2023, arXiv 2303.14177, section 2): the next token has probability
sum_j lambda_j p_j, and lambda_j grows with how near the text so far lies to cluster j:
exp(-|e - mu|^2 / T) summed over the cluster's finest centroids mu, then the `top` largest,
normalised. No domain text and no fine-tuning are needed; what is served is every specialist.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy.special import logsumexp, softmax

from slm.base import console, files
from slm.data import cluster, loader
from slm.data.tokenizer import load as load_tokenizer
from slm.objectives import heldout, losses
from slm.runs import config, ledger, load, rundir
from slm.weights import sharding, tree


def weights(
  model: cluster.Model, texts: Sequence[str], level: int, top: int, temperature: float
) -> np.ndarray:
  """Return lambda [texts, level] of specialists for the text that follows each text."""
  points, _ = cluster.embed(model, texts)
  distances = (model.centroids**2).sum(1) - 2 * points @ model.centroids.T  # + |e|^2, the same
  near = softmax(-distances / temperature, axis=1)
  found = np.zeros((len(texts), level))
  np.add.at(found.T, model.parents[level], near.T)
  found[found < np.sort(found, axis=1)[:, -top, None]] = 0
  return found / found.sum(axis=1, keepdims=True)


def blocks(segments: np.ndarray, every: int) -> list[tuple[int, int, int]]:
  """Cut a row's segments [context] into (start of its window, start, end) of `every` tokens."""
  edges = np.flatnonzero(np.diff(segments, prepend=0, append=0))
  return [
    (a, start, min(start + every, b))
    for a, b in zip(edges, edges[1:], strict=False)
    if segments[a]
    for start in range(a, b, every)
  ]


def rows(
  loaded: load.Loaded, path: str, data_set: str, split: str, mesh: jax.sharding.Mesh,
  batch_size: int, top: int, temperature: float, every: int,
) -> np.ndarray:  # fmt: skip
  """Evaluate every row of a split: [rows,2] NLL and tokens.

  Specialists are chosen again every `every` tokens of a window, by the tokens up to there.
  """
  cfg, level = loaded.cfg, loaded.reparam.clusters
  model = cluster.load(Path(path) / 'clusters' / 'model.safetensors')
  tokenizer = load_tokenizer(Path(path) / 'tokenizer')

  @jax.jit
  def token_losses(theta, e, batch):
    # Taken out inside: no second copy of every specialist is held.
    params = loaded.reparam.materialize(theta, loaded.frozen, e)
    params = tree.cast(params, jnp.dtype(cfg.dtype))
    return losses.token_losses(loaded.model.forward, params, batch, cfg.objective.chunk)

  devices = sharding.batch_devices(mesh)
  batch_size = -(-batch_size // devices) * devices
  size = loader.manifest(path)['sets'][data_set][split]['rows']
  found = np.zeros((size, 2))
  with console.Progress(f'{data_set}/{split}', size, 'rows') as progress:
    for _, ids, batch in loader.evaluation_batches(path, data_set, split, batch_size):
      cut = [(i, *b) for i, row in enumerate(batch['segments']) for b in blocks(row, every)]
      texts = [tokenizer.decode(batch['inputs'][i, a : start + 1]) for i, a, start, _ in cut]
      share = np.zeros((*batch['inputs'].shape, level))
      for (i, _, start, end), w in zip(
        cut, weights(model, texts, level, top, temperature), strict=True
      ):
        share[i, start:end] = w
      there = jax.device_put(batch, sharding.batch_sharding(mesh))
      nll = np.zeros(share.shape)
      for e in np.flatnonzero(share.any(axis=(0, 1))):  # the others weigh nothing
        nll[..., e] = token_losses(loaded.theta, e, there)
      with np.errstate(divide='ignore'):
        value = -logsumexp(np.log(share) - nll, axis=-1)
      predicted = batch['weights'] > 0
      sums = np.where(predicted, value, 0).sum(-1), predicted.sum(-1)
      found[ids[ids >= 0]] = np.stack(sums, axis=-1)[ids >= 0]
      progress.update(int((ids >= 0).sum()))
  return found


def ensemble(
  run: str | Path, sets: list[str], workdir: str | Path, *, top: int = 2, temperature: float = 0.1,
  every: int = 32, batch_size: int = 32,
) -> dict[str, dict[str, float]]:  # fmt: skip
  """Evaluate the ensemble on set/split names; write a run directory without weights of its own.

  Raises:
    ValueError: if the run holds no specialists, its data have no centroids, or an option is out of
      range.
  """
  workdir, mesh = Path(workdir), sharding.make_mesh({'data': -1})
  loaded = load.load(run, mesh, finished=True)
  path, level = loaded.cfg.data.path, loaded.reparam.clusters
  if not level:
    raise ValueError(f'{run} holds one dense model: there is nothing to ensemble')
  if not 1 <= top <= level or temperature <= 0 or every < 1:
    raise ValueError(
      f'--top={top}, --temperature={temperature}, --every={every}: expected 1 to {level}, more '
      'than 0 and at least 1'
    )
  manifest = loader.manifest(path)
  load.same_tokenizer(loaded, manifest['tokenizer']['fingerprint'])
  load.same_clusters(loaded, path)
  for name in sets:
    loader.Split(path, *name.partition('/')[::2])  # before anything is written: is it there?
  how = {'top': top, 'temperature': temperature, 'every': every}
  made = {'of': str(Path(run).resolve()), 'step': loaded.step, 'rule': 'ensemble', **how}
  changes = {'init': '', 'teacher': '', 'specialist': made}
  cfg = dataclasses.replace(loaded.cfg, phase='select', **changes)
  config.check_run(workdir, cfg)
  config.write_run(workdir, cfg)
  ledger.write_ledger(workdir, [], [str(Path(run).resolve())])
  folder = rundir.evaluations(workdir)
  there = folder.with_suffix('.json')
  results = files.read_json(there) if there.exists() else {}
  with jax.set_mesh(mesh):
    for name in sets:
      data_set, _, split = name.partition('/')
      facts = manifest['sets'][data_set][split]
      values = rows(loaded, path, data_set, split, mesh, batch_size, **how)
      files.write_npy(folder / f'{data_set}-{split}.npy', values)
      origin = {'step': 0, 'rows_sha256': facts['sha256']}
      results[name] = heldout.summary(values, facts['bytes']) | origin
      files.write_json(there, results)
  files.write_json(workdir / 'result.json', {'steps': 0, 'rule': 'ensemble'})
  return results


def main(_: list[str]) -> None:
  """Print the losses, one line per split."""
  f = flags.FLAGS
  if not (f.run and f.workdir):
    raise ValueError('expected --run and --workdir')
  how = {'top': f.top, 'temperature': f.temperature, 'every': f.every}
  found = ensemble(f.run, f.on, f.workdir, **how, batch_size=f.batch_size)
  for name in f.on:
    r = found[name]
    print(f'{name:24s} loss {r["loss"]:.4f}  ppl {r["ppl"]:.3f}  bits/byte {r.get("bpb", 0):.4f}')


if __name__ == '__main__':
  flags.DEFINE_string('run', '', 'Run (or RUN@STEP) that holds specialists.')
  flags.DEFINE_multi_string('on', ['generic/test'], 'set/split to evaluate; may be repeated.')
  flags.DEFINE_string('workdir', '', 'Run directory to write.')
  flags.DEFINE_integer('top', 2, 'Specialists that answer at a time.')
  flags.DEFINE_float('temperature', 0.1, 'T: how fast a specialist counts less with distance.')
  flags.DEFINE_integer('every', 32, 'Tokens after which specialists are chosen again.')
  flags.DEFINE_integer('batch_size', 32, 'Rows per forward pass.')
  console.run(main)
