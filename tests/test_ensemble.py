"""Sparse ensembles of specialists: weights that are causal, and losses that a plain loop gives."""

from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.specialise import ensemble
from slm.base import files
from slm.data import cluster, loader
from slm.data import rows as packing
from slm.data.tokenizer import load as load_tokenizer
from slm.models.decoder import unembed
from slm.objectives import heldout
from slm.runs import ledger, load
from slm.weights import sharding

MAKE = sharding.make_mesh
ONE = lambda: MAKE({'data': 1}, jax.devices()[:1])


@pytest.fixture
def trained(tiny_config, train_once, tmp_path, monkeypatch):
  # Two clusters do not divide over eight devices.
  monkeypatch.setattr(sharding, 'make_mesh', lambda sizes: ONE())
  c = tiny_config
  c.reparam = {'name': 'mixture', 'clusters': 2}
  c.data.update(level=2, batch_size=8, rows_per_group=4, order='every')
  c.mesh.data = 1
  train_once(c.to_dict(), tmp_path / 'run')
  return tmp_path / 'run'


def test_weights_sum_over_the_nearest_centroids_of_each_cluster(tiny_data):
  model = cluster.load(Path(tiny_data) / 'clusters' / 'model.safetensors')
  texts = ['contract clause court statute', 'sail harbour anchor tide', '']
  points, _ = cluster.embed(model, texts)
  for level, top in ((4, 3), (2, 2), (2, 1)):
    expected = np.zeros((3, level))
    for i, point in enumerate(points):
      for j, mu in enumerate(model.centroids):
        expected[i, model.parents[level][j]] += np.exp(-np.sum((point - mu) ** 2) / 0.1)
      kept = np.argsort(expected[i])[-top:]
      expected[i] *= np.isin(np.arange(level), kept)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(ensemble.weights(model, texts, level, top, 0.1), expected, rtol=1e-4)
  sharp = ensemble.weights(model, texts[:2], 4, 4, 1e-4)
  np.testing.assert_array_equal(sharp.argmax(axis=1), cluster.assign(model.centroids, points[:2]))
  assert sharp.max(axis=1) == pytest.approx(1.0)


def test_blocks_start_again_with_every_window():
  segments = np.array([1, 1, 1, 1, 1, 2, 2, 2, 0, 0])
  found = ensemble.blocks(segments, 3)
  assert found == [(0, 0, 3), (0, 3, 5), (5, 5, 8)]
  assert ensemble.blocks(np.zeros(4, int), 3) == []
  assert ensemble.blocks(np.array([3, 3]), 8) == [(0, 0, 2)]


def test_ensemble_is_the_mixture_that_a_plain_loop_computes(trained, tiny_data, tmp_path):
  how = {'top': 2, 'temperature': 0.3, 'every': 8}
  found = ensemble.ensemble(trained, ['court/test'], tmp_path / 'both', **how, batch_size=8)
  loaded = load.load(trained, ONE())
  model = cluster.load(Path(tiny_data) / 'clusters' / 'model.safetensors')
  tok = load_tokenizer(f'{tiny_data}/tokenizer')
  split = loader.Split(tiny_data, 'court', 'test')
  total, tokens = 0.0, 0
  forward = jax.jit(lambda p, b: unembed(p, loaded.model.forward(p, b))[0])
  read = split.read(split.ids)
  for i in range(len(split.ids)):
    batch = packing.batch({name: x[i : i + 1] for name, x in read.items()})
    row = [x[i] for x in read.values()]
    logits = [np.asarray(jax.nn.log_softmax(forward(loaded.params(e), batch))) for e in range(2)]
    shares = {}
    for t in np.flatnonzero(batch['weights'][0]):
      start = np.flatnonzero(row[1] == row[1][t])[0]
      seen = start + (t - start) // 8 * 8  # chosen every 8 tokens, by the tokens up to there
      if seen not in shares:
        begun = tok.decode(row[0][start : seen + 1])
        shares[seen] = ensemble.weights(model, [begun], 2, 2, 0.3)[0]
      p = sum(s * np.exp(x[t, row[0][t + 1]]) for s, x in zip(shares[seen], logits, strict=True))
      total, tokens = total - np.log(p), tokens + 1
  assert found['court/test']['tokens'] == tokens
  assert found['court/test']['nll'] == pytest.approx(total, rel=1e-4)


def test_ensemble_is_no_worse_than_its_average_member_and_is_a_run(trained, tiny_data, tmp_path):
  """Far from T = 0 every centroid weighs the same."""
  out = tmp_path / 'flat'
  flat = ensemble.ensemble(trained, ['court/test'], out, top=2, temperature=1e6)['court/test']
  alone = []
  loaded = load.load(trained, ONE())
  losses = heldout.make_row_losses(loaded.model.forward, 'float32', 64, ONE())
  for e in range(2):
    specialist = lambda c, e=e: loaded.params(e)
    values = heldout.rows(losses, specialist, ONE(), tiny_data, 'court', 'test', 8)
    alone.append(heldout.summary(values, 0)['loss'])
  model = cluster.load(Path(tiny_data) / 'clusters' / 'model.safetensors')
  share = np.bincount(model.parents[2], minlength=2) / len(model.centroids)
  assert flat['loss'] <= share @ alone + 1e-6  # log is concave
  assert load.served_step(out) == 0 and files.read_json(out / 'eval.json')['court/test'] == flat
  assert ledger.read_ledger(out) == {'phases': [], 'ancestors': [str(trained)]}
  with pytest.raises(ValueError, match='specialist.temperature was 1000000.0, now 0.1'):
    ensemble.ensemble(trained, ['court/test'], out)
  with pytest.raises(ValueError, match='--top=3.*expected 1 to 2'):
    ensemble.ensemble(trained, ['court/test'], tmp_path / 'x', top=3)
  with pytest.raises(ValueError, match='nowhere/test: expected SET/SPLIT'):
    ensemble.ensemble(trained, ['court/test', 'nowhere/test'], tmp_path / 'x')
  assert not (tmp_path / 'x').exists()
