"""Schedules, weight decay by axes, clipping of independent models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm import models
from slm.runs.config import section
from slm.training import optim

CFG = {'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1, 'clip': 1.0}


@pytest.mark.parametrize('name', ['constant', 'cosine', 'linear', 'wsd'])
def test_schedules(name):
  rest = {'peak': 2.0, 'warmup': 4, 'decay': 0.25, 'final': 0.1}
  rate = optim.schedule(section('schedule', {'name': name, **rest}), 20)
  values = np.array([rate(i) for i in range(21)])
  assert values[0] == pytest.approx(2.0 / 5)  # the first step already learns
  assert values[4] == pytest.approx(2.0)
  assert (np.diff(values[:5]) > 0).all()
  assert (np.diff(values[4:]) <= 1e-6).all()
  assert values[20] == pytest.approx(2.0 if name == 'constant' else 0.2)
  if name == 'wsd':
    assert values[15] == pytest.approx(2.0)
    assert values[16] < 2.0
  if name == 'linear':
    np.testing.assert_allclose(np.diff(values[4:]), -1.8 / 16, rtol=1e-4)
  updates = optim.schedule(section('schedule', {'name': name, **rest}), 20, updates=4)
  np.testing.assert_allclose([updates(4 * i) for i in range(21)], values, rtol=1e-6)
  np.testing.assert_allclose(updates(6), (values[1] + values[2]) / 2, rtol=1e-6)


@pytest.mark.parametrize('name', ['constant', 'cosine', 'linear', 'wsd'])
def test_no_warmup_starts_at_the_peak(name):
  cfg = {'name': name, 'peak': 1.0, 'warmup': 0, 'decay': 0.5, 'final': 0.0}
  assert optim.schedule(section('schedule', cfg), 10)(0) == 1.0


def test_unknown_schedule():
  with pytest.raises(ValueError, match="found 'triangle'"):
    optim.schedule(section('schedule', {'name': 'triangle', 'peak': 1.0, 'warmup': 0}), 10)


def test_decay_spares_embeddings_norms_and_biases():
  cfg = {
    'name': 'decoder', 'vocab': 11, 'embed': 8, 'num_layers': 2, 'num_heads': 2,
    'num_kv_heads': 2, 'head_dim': 4, 'mlp': 12, 'qkv_bias': True, 'qk_norm': 'head', 'tied': False,
  }  # fmt: skip
  params = models.build(section('model', cfg)).init(jax.random.key(0))
  mask = optim.decay_mask(params)
  flat = jax.tree_util.tree_leaves_with_path(mask)
  decayed = {path[-1].key for path, value in flat if value}
  assert decayed == {'wq', 'wk', 'wv', 'wo', 'w_gate', 'w_up', 'w_down'}


def test_equals_plain_adamw_without_clipping():
  params = {'w_up': jnp.arange(6.0).reshape(2, 3)}
  grads = {'w_up': jnp.full((2, 3), 1e-3)}
  tx = optim.build(section('optim', CFG), lambda _: 0.1, independent=False)
  want = optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
  a, _ = tx.update(grads, tx.init(params), params)
  b, _ = want.update(grads, want.init(params), params)
  np.testing.assert_allclose(a['w_up'], b['w_up'], rtol=1e-6)
  large = {'w_up': jnp.full((2, 3), 1e3)}
  tx = optim.build(
    section('optim', {**CFG, 'clip': 0.0}), lambda _: 0.1, independent=False
  )  # 0 does not clip
  a, _ = tx.update(large, tx.init(params), params)
  b, _ = want.update(large, want.init(params), params)
  np.testing.assert_allclose(a['w_up'], b['w_up'], rtol=1e-6)


def test_independent_models_are_clipped_by_their_own_norm():
  tx = optim.build(section('optim', {**CFG, 'eps': 1.0}), lambda _: 1.0, independent=True)
  alone = optim.build(section('optim', {**CFG, 'eps': 1.0}), lambda _: 1.0, independent=False)
  params = {'w_up': jnp.ones((2, 3, 4))}
  grads = {'w_up': jnp.stack([jnp.full((3, 4), 100.0), jnp.full((3, 4), 0.01)])}
  together, _ = tx.update(grads, tx.init(params), params)
  for i in range(2):
    one = lambda t, i=i: jax.tree.map(lambda x: x[i], t)
    want, _ = alone.update(one(grads), alone.init(one(params)), one(params))
    np.testing.assert_allclose(together['w_up'][i], want['w_up'], rtol=1e-6)


def test_parts_have_their_share_of_the_rate():
  alone = optim.build(section('optim', CFG), lambda _: 0.1, independent=False)
  tx = optim.each(alone, {'teacher': 0.1})
  params = {name: {'w_up': jnp.full((2, 3), 2.0)} for name in ('student', 'teacher')}
  grads = {name: {'w_up': jnp.arange(6.0).reshape(2, 3)} for name in params}
  updates, _ = tx.update(grads, tx.init(params), params)
  want, _ = alone.update(grads['student'], alone.init(params['student']), params['student'])
  np.testing.assert_array_equal(updates['student']['w_up'], want['w_up'])
  np.testing.assert_allclose(updates['teacher']['w_up'], 0.1 * want['w_up'], rtol=1e-6)


def test_inverse_sqrt_does_not_know_where_it_ends():
  make = lambda steps: optim.schedule(
    section(
      'schedule', {'name': 'inverse_sqrt', 'peak': 1.0, 'warmup': 9, 'final': 0.1, 'decay': 0.2}
    ),
    steps,
  )
  short, long = make(20), make(2000)
  for step in (0, 4, 9, 19):
    assert short(step) == long(step)
  np.testing.assert_allclose([long(0), long(9), long(39), long(999)], [0.1, 1.0, 0.5, 0.1], 1e-6)
