"""Distillation: hidden states, and a teacher that is trained too."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from slm import models, objectives
from slm.base import console, files
from slm.objectives import distill, next_token
from slm.runs import checkpoint, load, rundir
from slm.runs.config import NextTokenConfig, resolve, section
from slm.training import loop
from slm.weights import count, sharding

VOCAB = 31
KD = {'name': 'distill', 'chunk': 8, 'temperature': 1.0, 'mixing': 1.0, 'kl': 'forward'}


def make(**shape):
  c = base.get_config().model.to_dict()
  sizes = {'vocab': VOCAB, 'embed': 8, 'num_layers': 3, 'head_dim': 4, 'mlp': 12}
  return models.build(section('model', {**c, **sizes, 'num_heads': 2, 'num_kv_heads': 2, **shape}))


STUDENT, TEACHER = make(), make(embed=12, num_layers=4)


def make_batch(rows=2, t=7):
  rng = np.random.default_rng(3)
  ids = lambda: jnp.asarray(rng.integers(0, VOCAB, (rows, t)), jnp.int32)
  weights = jnp.asarray(rng.random((rows, t)) < 0.8, jnp.float32)
  positions = jnp.broadcast_to(jnp.arange(t), (rows, t))
  one = jnp.ones((rows, t), jnp.int32)
  named = {'inputs': ids(), 'targets': ids(), 'weights': weights}
  return named | {'positions': positions, 'segments': one}


@functools.cache
def weights():
  key = jax.random.key
  student, teacher = jax.jit(STUDENT.init)(key(0)), jax.jit(TEACHER.init)(key(1))
  projection = {'w_teacher': jax.random.normal(key(2), (8, 12)) * 8**-0.5}
  return student, {'teacher': teacher, 'projection': projection}


def build(states=(), **more):
  pairs = distill.places(states, 4, 3)
  at = lambda i: tuple(p[i] for p in pairs)
  forward = {
    'student': lambda p, b: STUDENT.forward(p, b, states=at(1)),
    'teacher': lambda p, b: TEACHER.forward(p, b, states=at(0)),
  }
  return objectives.build(section('objective', {**KD, 'states': states, **more}), forward)


def test_states_are_what_shorter_models_end_with():
  (params, _), batch = weights(), make_batch()
  out = jax.jit(lambda p: STUDENT.forward(p, batch, states=(3, 0, 1)))(params)
  norm = lambda x, scale: x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * scale
  last, embedded, first = map(np.asarray, out.states)
  scale = np.asarray(params['final_norm']['scale']).reshape(1, 1, -1)
  np.testing.assert_allclose(norm(last, scale), out.hidden, atol=1e-5)
  np.testing.assert_array_equal(embedded, params['embedding'][batch['inputs']])
  short = make(num_layers=1)
  cut = {**params, 'blocks': jax.tree.map(lambda w: w[:1], params['blocks'])}
  want = jax.jit(short.forward)(cut, batch).hidden
  np.testing.assert_allclose(norm(first, scale), want, atol=1e-5)
  assert jax.eval_shape(STUDENT.forward, params, batch).states == ()


def test_pairs_count_layers_from_either_end():
  assert distill.places(('-3:-3', 'embed'), 32, 16) == [(0, 0), (30, 14)]
  assert distill.places(('29:13',), 32, 16) == [(30, 14)]
  assert distill.places((), 32, 16) == []
  for wrong in ('32:1', '1', 'last:last', '-33:0', '1:16', ''):
    with pytest.raises(ValueError, match='objective.states: expected "embed" or "TEACHER:STUDENT"'):
      distill.places((wrong,), 32, 16)


def apart(student, teacher, projection, weights):
  """Sum the distance of paired states by an explicit loop."""
  total, rms = 0.0, lambda x: x / np.sqrt(np.square(x).mean())
  for s, t in zip(student, teacher, strict=True):
    for i, j in np.ndindex(weights.shape):
      a, b = rms(np.asarray(s[i, j], np.float64)) @ projection, rms(np.float64(t[i, j]))
      cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
      total += (1 - cosine) * weights[i, j] / len(student)
  return total


def test_the_states_term_beside_a_loop_and_as_large_as_the_divergence():
  states, batch = ('-2:-2', 'embed'), make_batch()
  student, frozen = weights()
  sums = jax.jit(build(states))(student, frozen, batch)
  at = lambda model, states: jax.jit(lambda p: model.forward(p, batch, states=states).states)
  ours, theirs = at(STUDENT, (0, 2))(student), at(TEACHER, (0, 3))(frozen['teacher'])
  projection, tokens = np.asarray(frozen['projection']['w_teacher']), np.asarray(batch['weights'])
  want = apart(ours, theirs, projection, tokens)
  assert float(sums['states'][0]) == pytest.approx(want, rel=1e-4)
  assert float(sums['loss'][0]) == pytest.approx(2 * float(sums['kl'][0]), rel=1e-5)


def test_the_states_term_has_a_constant_factor():
  batch, (student, frozen) = make_batch(), weights()
  value = lambda name, states: (
    lambda p, f: build(states)(p, {**frozen, 'projection': f}, batch)[name][0]
  )
  both, states = frozen['projection'], ('-2:-2',)
  gradient = lambda *a: jax.jit(jax.value_and_grad(value(*a), (0, 1)))(student, both)
  (_, combined), (kl, plain) = gradient('loss', states), gradient('loss', ())
  distance, alone = gradient('states', states)
  factor = kl / distance
  want = jax.tree.map(lambda a, b: a + factor * b, plain, alone)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), combined, want)
  assert np.abs(combined[1]['w_teacher']).max() > 0  # the projection learns


def test_a_corrected_teacher_learns_alone():
  """A corrected teacher has next-token gradients; the student's are those under a fixed one."""
  batch, (student, frozen) = make_batch(), weights()
  loss = lambda p, f, correct: build(correct=correct)(p, f, batch)['loss'][0]
  gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  student_grads, teacher_grads = gradient(student, frozen, 1.0)
  fixed, _ = gradient(student, frozen, 0.0)
  alone = next_token.next_token(NextTokenConfig(chunk=8), {'student': TEACHER.forward})
  want = jax.jit(jax.grad(lambda p: alone(p, {}, batch)['loss'][0]))(frozen['teacher'])
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(same, student_grads, fixed)
  jax.tree.map(same, teacher_grads['teacher'], want)


class Stop:
  """Asks to stop after the second step, as a signal would."""

  def __enter__(self):
    return lambda step: step >= 2

  def __exit__(self, *_):
    pass


def test_a_run_trains_its_teacher_and_serves_its_student(
  tiny_config, train_once, tmp_path, monkeypatch
):
  c, mesh = tiny_config, sharding.make_mesh({'data': -1})
  c.data.batch_size = 8
  train_once(c.to_dict(), tmp_path / 'teacher')
  c.phase, c.teacher = 'distill', str(tmp_path / 'teacher')
  c.model.update(embed=8, num_heads=1, num_kv_heads=1)
  c.objective = {**KD, 'chunk': 64, 'states': ('-2:-2', 'embed'), 'correct': 1.0}
  loop.train(c.to_dict(), tmp_path / 'whole')
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'StopSignal', Stop)
    with pytest.raises(console.Interrupted):
      loop.train(c.to_dict(), tmp_path / 'halves')
  loop.train(c.to_dict(), tmp_path / 'halves')
  lines = [rundir.read_metrics(tmp_path / name) for name in ('whole', 'halves')]
  for name in ('loss', 'kl', 'states', 'teacher_nll', 'grad_norm'):
    assert [x[name] for x in lines[0]] == [x[name] for x in lines[1]]
  assert lines[0][-1]['teacher_nll'] < lines[0][0]['teacher_nll']
  student, teacher = (load.load(tmp_path / name, mesh) for name in ('whole', 'teacher'))
  assert set(student.theta) == {'blocks', 'embedding', 'final_norm'}  # nothing else is served
  assert student.theta['embedding'].shape[1] == 8
  cost = files.read_json(tmp_path / 'whole' / 'ledger.json')['phases'][0]['flops']
  context = student.cfg.context
  flops = lambda run: count.forward_flops(run.model.cfg, context)
  a_token = 3 * flops(student) + 3 * flops(teacher) + 2 * 6 * 8 * 16
  assert cost == pytest.approx(4 * 8 * context * a_token)

  path = tmp_path / 'teacher' / 'config.json'
  path.write_text(json.dumps({**files.read_json(path), 'tokenizer': 'f' * 64}))
  with pytest.raises(ValueError, match='teacher was trained with tokenizer ffffffffffff, the data'):
    loop.train(c.to_dict(), tmp_path / 'other')  # the sizes of the vocabularies are the same
  path.write_text(json.dumps({**files.read_json(path), 'tokenizer': student.cfg.tokenizer}))
  two = sharding.make_mesh({'data': 2}, jax.devices()[:2])
  c.objective, c.reparam = {**KD, 'correct': 1.0}, {'name': 'mixture', 'clusters': 2}
  c.data.update(level=2, batch_size=8, rows_per_group=4, order='every')
  with jax.set_mesh(two), pytest.raises(ValueError, match="reparam 'mixture' holds several"):
    loop._Run(resolve(c.to_dict()), tmp_path, two, loop.Trace(range(0), tmp_path))
