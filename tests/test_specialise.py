"""Specialists out of trained runs; evaluation on identical rows; the cost ledger."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.data import importance, loader
from slm.inference import specialist
from slm.models.decoder import unembed
from slm.objectives import heldout, next_token
from slm.reparam.dense import FullConfig
from slm.runs import config, ledger, load
from slm.runs.config import NextTokenConfig, resolve
from slm.training import loop
from slm.weights import sharding
from slm.weights.count import forward_flops

MESH = lambda: sharding.make_mesh({'data': 1}, jax.devices()[:1])


@pytest.fixture(scope='module')
def one_device():
  """Run on one device: two clusters do not divide over eight."""
  make = sharding.make_mesh
  sharding.make_mesh = lambda sizes, devices=None: make({'data': 1}, jax.devices()[:1])
  yield
  sharding.make_mesh = make


@pytest.fixture(params=['mixture', 'project', 'soup'])
def trained(request, tiny_config, train_once, tmp_path, one_device):
  c = tiny_config
  c.reparam = {'name': request.param, 'clusters': 2}
  c.data.update(level=2, batch_size=8, rows_per_group=4)
  c.mesh.data = 1
  leaves = ('w_gate', 'w_up', 'w_down')
  if request.param == 'mixture':
    c.data.order = 'every'
  elif request.param == 'soup':
    c.data.order = 'histogram'
    c.reparam.update(experts=2, leaves=leaves, router='linear', hidden=0)
  else:
    c.reparam.update(capacity=2, code=2, leaves=leaves, shared_mix=True)
  train_once(c.to_dict(), tmp_path / 'run')
  return tmp_path / 'run'


def test_specialist_is_an_ordinary_dense_run(trained, tmp_path, tiny_data):
  cluster = specialist.specialise(trained, 'court', tmp_path / 'one', 'frequent', 'court-2000')
  assert cluster == int(np.argmax(loader.histogram(tiny_data, 'court', 'train', 2, 'court-2000')))
  one, many = load.load(tmp_path / 'one', MESH()), load.load(trained, MESH())
  assert one.cfg.reparam == FullConfig()
  for a, b in zip(
    jax.tree.leaves(one.params()), jax.tree.leaves(many.params(cluster)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  # Rows of its own cluster get the specialist when the whole run is evaluated.
  path = tmp_path / 'one'
  found = {}
  for name, run in (('alone', path), ('routed', trained)):
    heldout.run(run, tiny_data, ['generic/test'], MESH(), 8)
    found[name] = np.load(run / 'eval' / 'generic-test.npy')
  mine = loader.Split(tiny_data, 'generic', 'test', level=2).clusters == cluster
  assert 0 < mine.sum() < len(mine)
  np.testing.assert_allclose(found['alone'][mine], found['routed'][mine], rtol=1e-6)
  assert np.abs(found['alone'] - found['routed'])[~mine].max() > 1e-3
  assert ledger.read_ledger(path)['ancestors'] == [str(trained)]


def test_histogram_rule_averages_and_trains_on(trained, tmp_path, tiny_config, tiny_data):
  found = specialist.specialise(trained, 'court', tmp_path / 'one', 'histogram', 'court-2000')
  p = loader.histogram(tiny_data, 'court', 'train', 2, 'court-2000')
  if load.load(trained, MESH()).reparam.histograms:  # trained on shares of rows, not of windows
    split = loader.Split(tiny_data, 'court', 'train', 'court-2000', 2)
    p = np.bincount(split.clusters[split.ids], minlength=2) / len(split.ids)
  np.testing.assert_allclose(found, p, rtol=1e-6)
  one, many = load.load(tmp_path / 'one', MESH()), load.load(trained, MESH())
  want = many.reparam.materialize(many.theta, {}, jnp.asarray(p, jnp.float32))
  for a, b in zip(jax.tree.leaves(one.params()), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match='expected a histogram over 2 clusters'):
    many.params(np.ones(3) / 3)


def test_best_rule_takes_the_lowest_loss_and_counts_its_cost(trained, tmp_path, tiny_data):
  cluster = specialist.specialise(trained, 'court', tmp_path / 'one', 'best', 'court-2000')
  many = load.load(trained, MESH())
  losses = heldout.make_row_losses(many.model.forward, 'float32', 64, MESH())
  found = []
  for c in range(2):
    values = heldout.rows(
      losses, lambda _, c=c: many.params(c), MESH(), tiny_data, 'court', 'train', 8,
      index='court-2000',
    )  # fmt: skip
    nll, tokens = values.sum(0)
    found.append(nll / tokens)
  assert cluster == int(np.argmin(found))
  phase = ledger.read_ledger(tmp_path / 'one')['phases'][0]
  assert phase['phase'] == 'select'
  assert phase['tokens'] == 2 * tokens
  assert phase['flops'] == phase['tokens'] * forward_flops(many.model.cfg, 32)


def test_specialist_can_be_tuned(trained, tmp_path, tiny_config, tiny_data):
  specialist.specialise(trained, 'court', tmp_path / 'one')
  c = tiny_config
  c.reparam = {'name': 'full'}
  c.data = {**c.data.to_dict(), 'level': 0, 'order': 'proportional', 'rows_per_group': 1}
  c.data.set, c.init = 'court', str(tmp_path / 'one')
  loop.train(c.to_dict(), tmp_path / 'tuned')
  after = heldout.run(tmp_path / 'tuned', tiny_data, ['court/test'], MESH(), 8)['court/test']
  before = heldout.run(tmp_path / 'one', tiny_data, ['court/test'], MESH(), 8)['court/test']
  assert after['loss'] < before['loss']


def test_errors(trained, tmp_path, tiny_config):
  with pytest.raises(ValueError, match="expected one of .* found 'guess'"):
    specialist.specialise(trained, 'court', tmp_path / 'one', 'guess')
  with pytest.raises(ValueError, match="has no set 'nowhere'"):
    specialist.specialise(trained, 'nowhere', tmp_path / 'one')
  specialist.specialise(trained, 'court', tmp_path / 'one')
  with pytest.raises(ValueError, match='holds one dense model'):
    specialist.specialise(tmp_path / 'one', 'court', tmp_path / 'two')
  with pytest.raises(ValueError, match=r'expected a cluster in 0\.\.1, found 7'):
    load.load(trained, MESH()).params(7)
  tiny_config.reparam = {'name': 'full'}
  tiny_config.data.update(level=0, order='proportional', rows_per_group=1)
  tiny_config.init = str(trained)
  with pytest.raises(ValueError, match='run holds 2 models: take one out .* slm.specialise --run='):
    loop.train(tiny_config.to_dict(), tmp_path / 'tuned')
  assert not (tmp_path / 'tuned').exists()


def test_evaluation_equals_a_loop_over_tokens(tiny_config, train_once, tmp_path, tiny_data):
  """Loss, perplexity and bits per byte against an explicit softmax over every position."""
  train_once(tiny_config.to_dict(), tmp_path / 'run')
  found = heldout.run(tmp_path / 'run', tiny_data, ['court/test'], MESH(), 5)['court/test']
  loaded = load.load(tmp_path / 'run', MESH())
  logits_of = jax.jit(lambda p, batch: unembed(p, loaded.model.forward(p, batch)))
  nll, tokens = 0.0, 0
  for _, ids, batch in loader.evaluation_batches(tiny_data, 'court', 'test', 3):
    logits = logits_of(loaded.theta, batch)
    p = jax.nn.softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(p, batch['targets'][..., None], -1)[..., 0]
    nll += float(-(jnp.log(picked) * batch['weights']).sum())
    tokens += int(batch['weights'].sum())
    assert (batch['weights'][ids < 0] == 0).all()
  facts = loader.manifest(tiny_data)['sets']['court']['test']
  assert found['tokens'] == tokens == facts['tokens']
  assert found['nll'] == pytest.approx(nll, rel=1e-5)
  assert found['ppl'] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
  assert found['bpb'] == pytest.approx(nll / math.log(2) / facts['bytes'], rel=1e-5)
  rows = np.load(tmp_path / 'run' / 'eval' / 'court-test.npy')
  assert rows.shape == (facts['rows'], 2)


def test_an_index_is_evaluated_as_its_rows(tiny_config, train_once, tmp_path, tiny_data):
  train_once(tiny_config.to_dict(), tmp_path / 'run')
  names = ['court/train', 'court/train@court-2000']
  found = heldout.run(tmp_path / 'run', tiny_data, names, MESH(), 8)
  every, some = (np.load(tmp_path / f'run/eval/{n.replace("/", "-")}.npy') for n in names)
  ids = loader.Split(tiny_data, 'court', 'train', 'court-2000').ids
  np.testing.assert_allclose(some, every[np.sort(ids)], rtol=1e-6)
  assert 'bpb' in found[names[0]] and 'bpb' not in found[names[1]]
  repeats, name = np.array([3, 0, 3, 5, 3]), 'court/train@court-repeats'
  data = loader.Split(tiny_data, 'court', 'train')
  importance.write_index(data, 'court-repeats', repeats, {})
  try:
    found = heldout.run(tmp_path / 'run', tiny_data, [name], MESH(), 2)
    assert not heldout.missing(tmp_path / 'run', tiny_data, [name])
  finally:
    for path in data.path.glob('index/court-repeats.*'):
      path.unlink()
  assert found[name]['nll'] == pytest.approx(every[repeats, 0].sum(), rel=1e-6)
  assert found[name]['rows'] == 5 and found[name]['tokens'] == data.counts[repeats, 1].sum()
  with pytest.raises(FileNotFoundError, match='no such index; there are: court-2000, court-8000'):
    heldout.run(tmp_path / 'run', tiny_data, ['court/train@none'], MESH(), 8)


def test_evaluate_entry_point_prints_a_table(tiny_config, train_once, tmp_path):
  train_once(tiny_config.to_dict(), tmp_path / 'run')
  command = [sys.executable, '-m', 'slm.evaluate', f'--run={tmp_path / "run"}', '--on=court/test']
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert 'court/test' in done.stdout
  bad = subprocess.run([*command[:-2], '--run=/nowhere'], capture_output=True, text=True)
  assert bad.returncode == 1
  assert '/nowhere/config.json: no such file' in bad.stderr


def test_ledger_counts_tokens_and_flops(tiny_config, train_once, tmp_path, tiny_data):
  train_once(tiny_config.to_dict(), tmp_path / 'run')
  phases = {p['phase']: p for p in ledger.read_ledger(tmp_path / 'run')['phases']}
  cfg = resolve(tiny_config.to_dict())
  model, _ = load.build(cfg)
  assert phases['pretrain']['flops'] == 4 * 8 * 32 * 3 * forward_flops(model.cfg, 32)
  batches = loader.build(cfg.data)
  assert phases['pretrain']['tokens'] == sum(int(next(batches)['weights'].sum()) for _ in range(4))
  assert phases['pretrain']['device_seconds'] > 0
  assert phases['pretrain']['peak_memory_bytes'] > 0
  assert phases['evaluate']['tokens'] > 0


def test_projection_flops_are_counted(trained):
  model, rep = load.build(config.of(trained))
  flops = {p['phase']: p for p in ledger.read_ledger(trained)['phases']}['pretrain']['flops']
  dense = 4 * 8 * 32 * 3 * forward_flops(model.cfg, 32)
  mlp = 3 * 16 * 32 * 2  # weights of the MLPs of two layers
  made = 3 * 2 * 2 * 2 * mlp if rep.varies != ('*',) else 0  # 3 passes, 2 FLOPs, 2 groups, h=2
  assert flops == pytest.approx(dense + 4 * made)


def test_objective_is_the_one_evaluated(tiny_config, tmp_path, tiny_data):
  """The training loss at the first step is the held-out measure on that batch."""
  cfg = resolve(tiny_config.to_dict())
  model, rep = load.build(cfg)
  params = jax.jit(rep.init)(jax.random.key(0))
  batch = next(loader.build(cfg.data))
  rows = jax.tree.map(
    lambda x: x[0].reshape(-1, x.shape[-1]), {**batch, 'condition': batch['weights']}
  )
  objective = next_token.next_token(NextTokenConfig(chunk=64), {'student': model.forward})
  value, weight = jax.jit(objective)(params, {}, rows)['loss']
  per_row = heldout.make_row_losses(model.forward, 'float32', 64, MESH())(params, rows)
  np.testing.assert_allclose(per_row.sum(0), [value, weight], rtol=1e-5)


def test_the_standard_error_of_a_loss_is_that_of_resampled_rows():
  rng = np.random.default_rng(0)
  tokens = rng.integers(5, 60, 400).astype(float)
  values = np.stack([tokens * rng.normal(3, 0.4, 400), tokens], axis=1)
  drawn = values[rng.integers(0, 400, (4000, 400))].sum(1)
  found = heldout.summary(values, 1234)
  assert found['loss_stderr'] == pytest.approx(np.std(drawn[:, 0] / drawn[:, 1]), rel=0.05)
  assert found['bpb_stderr'] / found['bpb'] == pytest.approx(found['loss_stderr'] / found['loss'])
