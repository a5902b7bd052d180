"""Routing by likelihood: balance, likelihoods, and a data directory that everything else takes."""

import jax
import numpy as np
import pytest
import toy

from slm import data, evaluate, load, route, sharding
from slm.data import importance


def test_balanced_gives_each_its_share_and_first_choices_where_it_can():
  rng = np.random.default_rng(0)
  nll = rng.normal(3, 0.5, (101, 4))
  found = route.balanced(nll)
  assert np.bincount(found, minlength=4).max() == 26
  first = int(np.argmin(nll.min(axis=1)))
  assert found[first] == nll[first].argmin()
  easy = np.full((8, 2), 5.0)
  easy[:4, 0] = easy[4:, 1] = 1.0
  np.testing.assert_array_equal(route.balanced(easy), [0] * 4 + [1] * 4)
  crowd = np.array([[1.0, 2.0], [0.5, 9.0], [0.9, 3.0], [0.8, 1.0]])
  np.testing.assert_array_equal(route.balanced(crowd), [1, 0, 1, 0])


def config(steps=30):
  from configs import router

  c = router.get_config()
  c.steps, c.tensorboard, c.log_every = steps, False, 0
  c.model.update(embed=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp=32)
  c.reparam.clusters = c.data.level = 4
  c.data.update(rows_per_group=4, batch_size=16)
  c.mesh.update(data=1)
  c.schedule.update(peak=1e-2, warmup=5)
  c.eval.batch_size = 16
  c.objective.chunk = 256
  return c.to_dict()


@pytest.fixture(scope='module')
def routed(tmp_path_factory):
  make = sharding.make_mesh
  sharding.make_mesh = lambda sizes, devices=None: make({'data': 1}, jax.devices()[:1])
  out = str(tmp_path_factory.mktemp('routed') / 'data')
  yield route.route(toy.prepared(), out, config(), 3, 24), out
  sharding.make_mesh = make


def test_rows_of_a_topic_find_the_same_router(routed):
  clusters, out = routed
  path = toy.prepared()
  topics = data.Split(path, 'generic', 'train', level=8).clusters
  mine = clusters['generic', 'train']
  assert np.bincount(mine, minlength=4).max() == -(-len(mine) // 4)
  table = np.zeros((8, 4))
  np.add.at(table, (topics, mine), 1)
  assert table.max(axis=1).sum() / table.sum() > 0.5  # 0.25 by chance, and they must be balanced


def test_likelihoods_are_those_of_evaluation(routed):
  _, out = routed
  path, mesh = toy.prepared(), sharding.make_mesh({'data': 1})
  run = load.Path(out) / 'rounds' / '2' / 'run'
  nll = route.score(run, path, 'law', 'test', 64, 16)
  loaded = load.load(run, mesh)
  losses = evaluate.make_row_losses(loaded.model.forward, 'float32', 256, mesh)
  with jax.set_mesh(mesh):
    values = evaluate.rows(losses, lambda c: loaded.params(2), mesh, path, 'law', 'test', 16)
  np.testing.assert_allclose(nll[:, 2], values[:, 0] / values[:, 1], rtol=1e-5)


def test_what_comes_out_is_a_data_directory(routed):
  clusters, out = routed
  old, new = data.manifest(toy.prepared()), data.manifest(out)
  assert new['levels'] == [4] and new['cost']['clusters']['flops'] > 0
  for name, splits in old['sets'].items():
    for split in splits:
      a, b = data.Split(toy.prepared(), name, split), data.Split(out, name, split, level=4)
      assert a.sha256 == b.sha256
      np.testing.assert_array_equal(a.read(a.ids[:5]), b.read(b.ids[:5]))
      np.testing.assert_array_equal(b.clusters, clusters[name, split])
  assert data.clustering(out) != data.clustering(toy.prepared())
  request = importance.Request(out, 'law', 4, 5000, 'law-is', domain_index='law-500')
  assert importance.sample(request)['tokens'] > 4000
  assert (load.Path(out) / 'clusters' / 'histograms.md').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'rounds': 0}, '--rounds=0, --prefix=8: expected at least 1'),
    ({'config': {'reparam': {'name': 'full'}}}, 'expected reparam "mixture", found \'full\''),
  ],
)
def test_bad_requests_are_refused(changes, message, tmp_path):
  asked = {'config': config(), 'rounds': 1, 'prefix': 8} | changes
  with pytest.raises(ValueError, match=message):
    route.route(toy.prepared(), str(tmp_path / 'x'), **asked)
