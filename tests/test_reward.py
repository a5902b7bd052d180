"""Reward models: the loss and its gradient, a run, what is read back, what it takes."""

import importlib
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_preference
from test_distill import Stop
from test_preference import LENGTHS, T, flat, row, stack

from slm.base import console, files
from slm.data import loader
from slm.models.decoder import Output
from slm.objectives import scalar
from slm.runs import checkpoint, config, load, rundir
from slm.runs.config import RewardConfig
from slm.training import loop, program
from slm.weights import sharding
from slm.weights.count import forward_flops, hidden_flops

start = test_preference.start
WIDTH = 5
MAKE_MESH = sharding.make_mesh


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Train on one of the simulated devices: programs of one compile faster."""
  on(monkeypatch, {'data': 1})


def on(monkeypatch, axes):
  mesh = MAKE_MESH(axes, jax.devices()[: math.prod(axes.values())])
  monkeypatch.setattr(sharding, 'make_mesh', lambda *_: mesh)


def columns():
  return stack([row(LENGTHS, 0), row(LENGTHS[:2], 1), row(((1, 14), (1, 2)), 2)])


def loss(hidden, head, batch):
  """Return the objective's loss of given states, and its sums."""
  objective = scalar.reward(RewardConfig(), {'student': lambda params, _: Output(params)})
  sums = objective(hidden, {scalar.HEAD: head}, batch)
  return sums['loss'][0] / sums['loss'][1], sums


def by_hand(hidden, head, batch):
  """Return the loss and its gradients for states and weights, pair by pair in float64."""
  d_hidden, d_weight, total, count = np.zeros(hidden.shape), np.zeros(WIDTH), 0.0, 0.0
  for i, segments in enumerate(np.asarray(batch['segments'])):
    for n in range(1, segments.max(), 2):
      # The last token that is some trained position's target.
      ends = [
        np.flatnonzero((segments == s) & (np.asarray(batch['weights'][i]) > 0))[-1] + 1
        for s in (n, n + 1)
      ]
      assert all(segments[e] == s for e, s in zip(ends, (n, n + 1), strict=True))
      weight = float(batch['weights'][i, ends[0] - 1])
      chosen, rejected = (float(hidden[i, e] @ head['w_score'] + head['b_score']) for e in ends)
      miss = 1 / (1 + math.exp(chosen - rejected))
      total -= weight * math.log1p(-miss)
      count += weight
      for e, sign in zip(ends, (-1, 1), strict=True):
        d_hidden[i, e] += sign * weight * miss * head['w_score']
        d_weight += sign * weight * miss * hidden[i, e]
  return total / count, d_hidden / count, d_weight / count


@pytest.mark.parametrize('heavy', [1.0, 2.0])
def test_loss_and_gradient_are_those_by_hand(heavy):
  rng = np.random.default_rng(0)
  weights = np.ones((3, T), np.float32)
  weights[1] = heavy
  batch = flat({**columns(), 'weights': weights})
  hidden = rng.normal(size=(3, T, WIDTH)).astype(np.float32)
  head = {'w_score': rng.normal(size=WIDTH).astype(np.float32), 'b_score': np.float32(0.3)}
  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (found, sums), (d_hidden, d_head) = run(hidden, head, batch)
  want, expected, d_weight = by_hand(hidden, head, batch)
  assert float(found) == pytest.approx(want, rel=1e-5)
  np.testing.assert_allclose(d_hidden, expected, atol=1e-6)
  np.testing.assert_allclose(d_head['w_score'], d_weight, atol=1e-6)
  assert float(d_head['b_score']) == pytest.approx(0, abs=1e-6)  # it cancels in a difference
  assert float(sums['tokens'][0]) == (np.asarray(batch['weights']) > 0).sum()
  parts = [
    loss(hidden[s], head, {n: x[s] for n, x in batch.items()})[1]
    for s in (slice(0, 1), slice(1, 3))
  ]
  total = sum(p['loss'][0] for p in parts) / sum(p['loss'][1] for p in parts)
  assert float(total) == pytest.approx(want, rel=1e-5)  # whatever the split


def test_loss_is_that_of_trl():
  """RewardTrainer's own compute_loss on the rewards of the same states."""
  torch = pytest.importorskip('torch')
  trainer = pytest.importorskip('trl.trainer.reward_trainer').RewardTrainer
  rng = np.random.default_rng(0)
  batch = flat(columns())
  hidden = rng.normal(size=(3, T, WIDTH)).astype(np.float32)
  head = {'w_score': rng.normal(size=WIDTH).astype(np.float32), 'b_score': np.float32(0.0)}
  found, _ = loss(hidden, head, batch)
  scores = np.asarray(scalar.at_ends(scalar.read(head, hidden), batch))
  real = np.asarray(scalar.preference.pair_weights(batch)) > 0
  rewards = torch.tensor(np.concatenate([scores[:, 0][real], scores[:, 1][real]]))
  gather = lambda _, x: x
  accelerator = type('Accelerator', (), {'gather': gather, 'gather_for_metrics': gather})()
  names = ('min_reward', 'mean_reward', 'max_reward', 'accuracy', 'margin')
  stub = types.SimpleNamespace(
    model=types.SimpleNamespace(training=False), accelerator=accelerator, _total_train_tokens=0,
    args=types.SimpleNamespace(center_rewards_coefficient=None),
    _metrics={'eval': {name: [] for name in names}},
  )  # fmt: skip
  model = lambda **_: types.SimpleNamespace(logits=rewards[:, None])
  theirs = trainer.compute_loss(stub, model, {})
  assert float(found) == pytest.approx(theirs.item(), rel=1e-5)


def test_a_head_is_drawn_as_in_the_paper():
  head = scalar.draw_head(jax.random.key(0), 4000)
  assert np.std(head['w_score']) == pytest.approx(4001**-0.5, rel=0.05)
  assert float(head['b_score']) == 0


def given(start, **changes):
  c = importlib.import_module('configs.reward').get_config()
  c.init, c.data.path, c.data.batch_size = str(start[0]), start[1], 8
  c.epochs, c.steps, c.schedule.peak, c.log_every, c.tensorboard = 0.0, 6, 1e-2, 1, False
  c.eval.update(every=0, batch_size=8)
  c.checkpoint.every = 3
  for key, value in changes.items():
    if key == 'reparam':
      c.reparam = value
    else:
      c.update_from_flattened_dict({key: value})
  return c.to_dict()


@pytest.fixture(scope='module')
def trained(start, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run') / 'reward'
  with pytest.MonkeyPatch.context() as patch:
    on(patch, {'data': 1})
    loop.train(given(start), workdir)
  return workdir


def test_a_run_learns_which_answer_was_chosen(trained, start):
  first, *_, last = rundir.read_metrics(trained)
  assert abs(first['loss'] - math.log(2)) < 0.3 and last['loss'] < 0.3
  assert last['eval_accuracy'] > 0.9 and 'eval_preferred' not in last
  assert 0 < last['eval_loss_stderr'] < last['eval_loss'] < 0.4
  cfg = config.of(trained)
  assert cfg.objective == RewardConfig()
  flops = 6 * 8 * cfg.context * 3 * hidden_flops(cfg.model, cfg.context)
  assert files.read_json(trained / 'ledger.json')['phases'][0]['flops'] == pytest.approx(flops)


def test_what_is_read_back_is_what_was_evaluated(trained, start):
  loaded = load.load(trained, sharding.make_mesh())
  assert 'w_score' not in loaded.theta  # what is served is the model alone
  params, head = scalar.load_run(loaded, sharding.make_mesh())
  held_out = loader.Split(start[1], 'pairs', 'validation')
  batch = flat(held_out.read(np.arange(len(held_out.ids))))
  hidden = loaded.model.forward(params, batch).hidden
  found, _ = loss(hidden, head, batch)
  assert float(found) == pytest.approx(rundir.read_metrics(trained)[-1]['eval_loss'], rel=1e-4)
  with pytest.raises(ValueError, match='expected a reward model, of configs/reward.py, found'):
    scalar.load_run(load.load(start[0], sharding.make_mesh()), sharding.make_mesh())


def test_a_run_that_was_stopped_continues_bitwise(trained, start, tmp_path, monkeypatch):
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'StopSignal', Stop)
    with pytest.raises(console.Interrupted):
      loop.train(given(start), tmp_path / 'run')
  loop.train(given(start), tmp_path / 'run')
  mesh = sharding.make_mesh()
  one, two = (scalar.load_run(load.load(x, mesh), mesh) for x in (trained, tmp_path / 'run'))
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_adapters_and_devices(start, tmp_path, monkeypatch):
  c = given(start, **{'steps': 2, 'reparam': {'name': 'lora', 'rank': 2}})
  loop.train(c, tmp_path / 'one')
  on(monkeypatch, {'data': 2, 'fsdp': 2})
  loop.train({**c, 'data': {**c['data'], 'accum': 2}}, tmp_path / 'four')
  one, four = (rundir.read_metrics(tmp_path / name) for name in ('one', 'four'))
  for a, b in zip(one, four, strict=True):
    for name in ('loss', 'margin', 'grad_norm'):
      assert a[name] == pytest.approx(b[name], rel=1e-3), name
  assert four[-1]['eval_loss'] == pytest.approx(one[-1]['eval_loss'], rel=1e-3)
  loaded = load.load(tmp_path / 'four', sharding.make_mesh())
  params, head = scalar.load_run(loaded, sharding.make_mesh())
  dense = load.load(start[0], sharding.make_mesh()).theta
  assert jax.tree.structure(params) == jax.tree.structure(dense)
  assert head['w_score'].shape == (loaded.model.cfg.embed,)


def test_a_plan_counts_the_head_and_no_logits(trained):
  cfg = config.of(trained)
  step = program.outline(cfg, sharding.make_mesh())
  assert program.memory(step.kinds)['weights trained beside'] == 4 * (cfg.model.embed + 1)
  logits = forward_flops(cfg.model, cfg.context) - hidden_flops(cfg.model, cfg.context)
  assert logits == 2 * cfg.model.vocab * cfg.model.embed
  step.trace()


def test_weights_beside_are_read_as_earlier_versions_wrote_them(tmp_path):
  """Until 0.2 they were in one item with the state of the optimiser."""
  theta, opt, beside = ({name: jnp.arange(3.0) + i} for i, name in enumerate('abc'))
  for name, weights in (('old', (theta, (opt, beside))), ('new', (theta, opt, beside))):
    with checkpoint.Checkpoints(tmp_path / name / 'checkpoints', keep=1) as saved:
      saved.save(4, *weights, batch=5)
    with checkpoint.Checkpoints(tmp_path / name / 'checkpoints') as saved:
      found = saved.restore(4, theta, beside, opt)
    assert found[3] == 5
    jax.tree.map(np.testing.assert_array_equal, found[:3], (theta, beside, opt))
