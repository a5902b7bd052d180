"""Batches that are skipped, and runs that go back to an earlier checkpoint when the loss spikes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.base import console, files
from slm.data import loader
from slm.runs import checkpoint, load, rundir
from slm.runs.config import section
from slm.training import loop, optim, recorder
from slm.training.recorder import Recorder
from slm.weights import sharding

CFG = {'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1, 'clip': 1.0}
FALLING = lambda step: 0.1 / (1 + step)  # noqa: E731


def build(above, rate=FALLING, independent=False):
  return optim.build(section('optim', {**CFG, 'skip_above': above}), rate, independent)


def run_updates(tx, scales, shape=(2, 3)):
  """Apply gradients of these sizes to one leaf; return the weights after each, and the state."""
  weights = {'w_up': jnp.ones(shape)}
  state, update, history = tx.init(weights), jax.jit(tx.update), []
  for i, scale in enumerate(scales):
    noise = np.random.default_rng(i).normal(size=shape)
    grads = {'w_up': jnp.asarray(scale * noise / np.linalg.norm(noise), jnp.float32)}
    updates, state = update(grads, state, weights)
    weights = jax.tree.map(jnp.add, weights, updates)
    history.append(np.asarray(weights['w_up']))
  return history, state


def test_without_outliers_nothing_changes():
  scales = np.random.default_rng(0).uniform(0.5, 1.5, 50)
  off, state = run_updates(build(0.0), scales)
  on, counted = run_updates(build(4.0), scales)
  np.testing.assert_allclose(off, on, rtol=2e-7)  # one program rounds otherwise than the other
  assert not optim.skips(state) and int(optim.skips(counted)['skipped']) == 0


def test_an_outlier_changes_neither_weights_nor_moments():
  calm = [1.0] * 40
  history, state = run_updates(build(4.0), [*calm, 100.0, np.nan, np.inf])
  np.testing.assert_array_equal(history[40:], history[39:40] * 3)
  found = optim.skips(state)
  assert (int(found['skipped']), int(found['not_finite'])) == (3, 2)
  _, before = run_updates(build(4.0), calm)
  same = jax.tree.map(np.array_equal, state[0].inner, before[0].inner)
  assert all(jax.tree.leaves(same))
  assert int(optim.skips(run_updates(build(4.0), [*calm, 3.9])[1])['skipped']) == 0
  _, state = run_updates(build(4.0), [np.nan, 1.0, 100.0])  # too few to compare with
  assert (int(optim.skips(state)['skipped']), int(optim.skips(state)['not_finite'])) == (1, 0)


def test_the_rate_of_a_step_does_not_depend_on_what_was_skipped():
  """Under one gradient for all steps AdamW moves by the learning rate."""
  tx, weights = build(4.0), {'norm': jnp.ones(3)}
  state, moved = tx.init(weights), []
  for bad in (0, 0, 1, 0):
    grads = {'norm': jnp.full(3, np.nan if bad else 1.0)}
    updates, state = tx.update(grads, state, weights)
    moved.append(float(updates['norm'][0]))
  np.testing.assert_allclose(moved, [-0.1, -0.05, 0, -0.025], rtol=1e-4)


def test_a_lasting_change_is_soon_no_outlier():
  _, state = run_updates(build(4.0), [1.0] * 40 + [100.0] * 80)
  assert 30 <= int(optim.skips(state)['skipped']) <= 64


def test_independent_models_skip_by_their_own_gradients():
  together = build(4.0, independent=True)
  weights = {'w_up': jnp.ones((2, 2, 3))}
  state, update = together.init(weights), jax.jit(together.update)
  for step in range(41):
    sizes = jnp.array([1.0, 100.0 if step == 40 else 1.0]).reshape(2, 1, 1)
    updates, state = update({'w_up': sizes * jnp.ones((2, 2, 3))}, state, weights)
  assert float(jnp.abs(updates['w_up'][0]).min()) > 0 and not updates['w_up'][1].any()
  assert state[0].skipped.tolist() == [0, 1] and int(optim.skips(state)['skipped']) == 1


class Poisoned:
  """The batches of a run, of which those of some numbers have NaN weights or other targets."""

  def __init__(self, batches, bad, how, later=None):
    self.batches, self.bad, self.how, self.later = batches, bad, how, later or {}
    self.get_state, self.set_state = batches.get_state, batches.set_state

  def __next__(self):
    number = self.get_state()
    if number in self.later:
      self.set_state(self.later[number])
    batch = next(self.batches)
    if number in self.bad and self.how == 'nan':
      batch['weights'] = np.full_like(batch['weights'], np.nan)
    elif number in self.bad:
      batch['targets'] = np.zeros_like(batch['targets'])  # an id that the text never has
    return batch


@pytest.fixture
def poison(monkeypatch):
  """Return a function that poisons the batches of the runs that follow."""
  build = loader.build

  def set_(bad=(), how='nan', later=None):
    make = lambda *args, **more: Poisoned(build(*args, **more), bad, how, later)
    monkeypatch.setattr(loop.loader, 'build', make)

  return set_


def column(run, name='loss'):
  return [line[name] for line in rundir.read_metrics(run) if name in line]


def theta(run):
  return load.load(run, sharding.make_mesh({'data': 8})).theta


def same(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), theta(a), theta(b))))


def interrupt(monkeypatch, at):
  """Kill the run when a step's metrics are read."""
  finish = Recorder._finish

  def stop(self, step, values):
    if step == at:
      raise console.Interrupted
    finish(self, step, values)

  monkeypatch.setattr(Recorder, '_finish', stop)


def test_a_batch_of_nan_is_skipped_and_counted(poison, tiny_config_of, tmp_path, monkeypatch):
  poison(bad=(2,))
  with pytest.raises(FloatingPointError, match='step 3: gradient of .* is not finite .*step 2 is '):
    loop.train(tiny_config_of(steps=6), tmp_path / 'off')
  config = tiny_config_of(steps=6, **{'optim.skip_above': 10.0})
  result = loop.train(config, tmp_path / 'whole')
  assert result['skipped'] == 1 and column(tmp_path / 'whole', 'skipped') == [0, 0, 1, 1, 1, 1]
  assert np.isnan(column(tmp_path / 'whole')[2]) and np.isfinite(result['loss'])
  with monkeypatch.context() as m, pytest.raises(console.Interrupted):
    interrupt(m, at=6)
    loop.train(config, tmp_path / 'halves')
  assert loop.train(config, tmp_path / 'halves')['skipped'] == 1
  assert same(tmp_path / 'whole', tmp_path / 'halves')


def test_too_many_such_batches_end_the_run(poison, tiny_config_of, tmp_path, monkeypatch):
  monkeypatch.setattr(optim, 'MOST_NOT_FINITE', 2)
  poison(bad=(2, 3))
  with pytest.raises(FloatingPointError, match='step 4: gradient of .* is not finite'):
    loop.train(tiny_config_of(steps=6, **{'optim.skip_above': 10.0}), tmp_path / 'run')


REWIND = {'rewind.steps': 2, 'rewind.above': 1.1, 'checkpoint.keep': 3}


@pytest.mark.parametrize('how', ['nan', 'spike'])
def test_a_spike_takes_the_run_back_and_on_with_other_batches(
  how, poison, tiny_config_of, tmp_path, monkeypatch, capsys
):
  """Batch 4 fails at step 5, from which step 2 is the newest checkpoint two steps back."""
  config = tiny_config_of(steps=8, **REWIND)
  monkeypatch.setattr(recorder, '_AVERAGE', 0.5)  # in eight steps the loss falls fast
  poison(later={2: 5})  # the batches that are left, without any spike
  expected = loop.train(config, tmp_path / 'without')
  poison(bad=(4,), how=how)
  result = loop.train(config, tmp_path / 'whole')
  assert (expected['rewinds'], result['rewinds']) == (0, 1)
  assert column(tmp_path / 'whole') == column(tmp_path / 'without')
  assert column(tmp_path / 'whole', 'rewinds') == [0, 0, 1, 1, 1, 1, 1, 1]
  assert same(tmp_path / 'whole', tmp_path / 'without')
  (entry,) = rundir.read_rewinds(tmp_path / 'whole')
  assert (entry['step'], entry['to'], entry['next']) == (5, 2, 5) and 'step 5' not in entry['why']
  assert 'step 4 is intact: going back to step 2, and on with batch 5' in capsys.readouterr().err
  assert result['flops'] == pytest.approx(expected['flops'] * 11 / 8)  # steps 3 to 5 twice
  with monkeypatch.context() as m, pytest.raises(console.Interrupted):
    interrupt(m, at=3)  # before any spike, and before any checkpoint is saved after it
    loop.train(config, tmp_path / 'killed')
  with monkeypatch.context() as m:
    rewind = loop._Run._rewind
    m.setattr(loop._Run, '_rewind', lambda *a: [rewind(*a), interrupt(m, at=3)])
    with pytest.raises(console.Interrupted):
      loop.train(config, tmp_path / 'killed')
  assert checkpoint.saved_steps(tmp_path / 'killed/checkpoints') == [2]
  again = loop.train(config, tmp_path / 'killed')
  assert (again['rewinds'], again['flops']) == (1, result['flops'])
  assert same(tmp_path / 'killed', tmp_path / 'without')


def test_rewinds_are_bounded_and_need_a_checkpoint(poison, tiny_config_of, tmp_path):
  poison(bad=range(4, 99))
  config = tiny_config_of(steps=8, **REWIND, **{'rewind.most': 2})
  with pytest.raises(FloatingPointError, match='step 3: .*; the run has gone back rewind.most=2 t'):
    loop.train(config, tmp_path / 'run')
  went = [(r['step'], r['to'], r['next']) for r in rundir.read_rewinds(tmp_path / 'run')]
  assert went == [(5, 2, 5), (3, 2, 6)]
  poison(bad=(2,))
  with pytest.raises(FloatingPointError, match='; no checkpoint is rewind.steps=2 steps back'):
    loop.train(config, tmp_path / 'early')
  assert not (tmp_path / 'early/rewinds.json').exists()
  with pytest.raises(ValueError, match='rewind.steps=9: 3 checkpoints, .* reach 5 steps back'):
    loop.train(tiny_config_of(**REWIND | {'rewind.steps': 9}), tmp_path / 'other')


def test_an_entry_is_of_the_checkpoint_that_was_there_then(tmp_path):
  places = enumerate((40, 60, 20, 30))
  entries = [{'step': n, 'to': to, 'next': 99, 'why': '', 'totals': {}} for n, to in places]
  files.write_json(tmp_path / 'rewinds.json', entries)
  found = [rundir.rewound_to(tmp_path, step) for step in (10, 20, 30, 40, 60)]
  assert [entry and entry['step'] for entry in found] == [None, 2, 3, None, None]
