"""Signals: unbiased, independent of order, mesh and padding, resumable, verified."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from slm import models, objectives
from slm.base import files
from slm.data import loader
from slm.models.decoder import unembed
from slm.objectives import distill, losses, signals
from slm.runs import ledger, load, rundir
from slm.runs.config import of as config_of
from slm.runs.config import section
from slm.training import loop
from slm.weights import sharding
from slm.weights.count import forward_flops

KD = {'name': 'distill', 'chunk': 64, 'temperature': 1.0, 'mixing': 1.0, 'kl': 'forward'}


def config(path):
  c = base.get_config()
  c.steps, c.log_every, c.tensorboard = 3, 1, False
  c.model.update(embed=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp=32)
  c.data.update(path=path, batch_size=8)
  c.schedule.update(peak=1e-2, warmup=1)
  c.eval.update(every=0, max_rows=8, batch_size=8)
  c.objective.chunk = 64
  return c


@pytest.fixture(scope='module')
def made(tiny_data, tmp_path_factory):
  """Return a folder with a teacher and its signals of both modes."""
  root = tmp_path_factory.mktemp('signals')
  loop.train(config(tiny_data).to_dict(), root / 'teacher')
  for mode, k in (('topk', 16), ('sampled', 64)):
    write(root, root / mode, mode=mode, k=k)
  return root


def write(root, out, on='generic/train', **more):
  return signals.write(str(root / 'teacher'), '', on, str(out), shard_rows=256, **more)


def batches(tiny_data, look_up=None, step=0):
  cfg = loader.DataConfig(path=tiny_data, batch_size=8)
  stream = loader.build(cfg, look_up=look_up)
  stream.set_state(step)
  batch = {n: x for n, x in next(stream).items() if n != 'condition'}
  return {n: jnp.asarray(x.reshape((8,) + x.shape[3:])) for n, x in batch.items()}


def student(root, vocab=0):
  """Build a student, its vocabulary padded to a size, and draw its weights."""
  cfg = config_of(root / 'teacher').model
  build = lambda **more: models.build(dataclasses.replace(cfg, **more))
  params = jax.jit(build().init)(jax.random.key(7))
  pad = max(vocab - cfg.vocab, 0)
  params['embedding'] = jnp.pad(params['embedding'], ((0, pad), (0, 0)), constant_values=0.3)
  return build(vocab=cfg.vocab + pad), params


def cached(root, tiny_data, mode, vocab=0, kl='forward'):
  """Return the loss and gradient of a student under signals, and the batch."""
  cache = signals.Signals(root / mode)
  model, params = student(root, vocab)
  recall = lambda *a: distill.recall(cache.facts['vocab'], *a)
  objective = objectives.build(
    section('objective', {**KD, 'kl': kl}), {'student': model.forward, 'signals': recall}
  )
  batch = batches(tiny_data, cache)
  loss = lambda p, batch: objective(p, {}, batch)['loss'][0]
  return jax.jit(jax.value_and_grad(loss)), params, batch


def live(root, tiny_data, **more):
  loaded = load.load(root / 'teacher', sharding.make_mesh({'data': -1}))
  model, params = student(root)
  forward = {'student': model.forward, 'teacher': loaded.model.forward}
  objective = objectives.build(section('objective', {**KD, **more}), forward)
  loss = lambda p, batch: objective(p, {'teacher': loaded.params()}, batch)['loss'][0]
  return jax.jit(jax.value_and_grad(loss))(params, batches(tiny_data))


@pytest.mark.parametrize('kl', ['forward', 'jsd'])
def test_the_best_ids_from_disk_are_those_of_the_live_teacher(kl, made, tiny_data):
  fn, params, batch = cached(made, tiny_data, 'topk', kl=kl)
  recalled, want = fn(params, batch), live(made, tiny_data, top_k=16, kl=kl)
  assert float(recalled[0]) == pytest.approx(float(want[0]), rel=1e-3)  # float16 probabilities
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), recalled[1], want[1])


@pytest.mark.parametrize('mode', ['topk', 'sampled'])
def test_order_and_padding_of_the_vocabulary_do_not_matter(mode, made, tiny_data):
  fn, params, batch = cached(made, tiny_data, mode)
  turned = {name: x[::-1] for name, x in batch.items()}
  value, _ = fn(params, batch)
  assert float(fn(params, turned)[0]) == pytest.approx(float(value), rel=1e-5)
  # A wider student pays for what it gives to ids that no tokenizer has, and for nothing else.
  padded, wide, _ = cached(made, tiny_data, mode, vocab=272)
  model, _ = student(made, 272)
  scores = jax.jit(lambda p: unembed(p, model.forward(p, batch)))(wide)
  beyond = jax.nn.logsumexp(scores, axis=-1) - jax.nn.logsumexp(scores[..., :259], axis=-1)
  want = float(value) + float((beyond * batch['weights']).sum())
  assert float(padded(wide, batch)[0]) == pytest.approx(want, rel=1e-5)


def test_rows_are_found_in_any_order_and_empty_ones_are_nothing(made, tiny_data):
  cache = signals.Signals(made / 'topk')
  rows = loader.Split(tiny_data, 'generic', 'train').read(np.array([5, 300, -1, 0]))
  ahead, back = cache(rows), cache({name: x[::-1] for name, x in rows.items()})
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[::-1]), ahead, back)
  assert (ahead['teacher_probs'][2] == 0).all() and ahead['teacher_probs'][1, 0, 0] > 0
  rows['tokens'][0, 0] += 1
  with pytest.raises(ValueError, match='holds no signals of a training row'):
    cache(rows)


def test_drawn_ids_give_the_gradient_of_the_whole_divergence_on_average():
  """The mean over 4,000 draws of eight ids lies within four standard errors of the exact value."""
  rng, n, k, v = np.random.default_rng(0), 4000, 8, 13
  teacher, logits = (jnp.asarray(rng.normal(0, 2, (1, 1, v)), jnp.float32) for _ in range(2))
  exact = jax.value_and_grad(lambda q: losses.forward_kl(teacher, q).sum())(logits)

  def once(uniform):
    drawn = signals.drawn(teacher, uniform)
    rows = {f'teacher_{name}': x for name, x in drawn.items()}
    loss = lambda q: distill.recall(v, losses.forward_kl, q, rows).sum()
    return jax.value_and_grad(loss)(logits)

  draws = jax.jit(jax.vmap(once))(jax.random.uniform(jax.random.key(1), (n, 1, 1, k)))
  for many, want in zip(draws, exact, strict=True):
    error = np.std(many, axis=0, ddof=1) / n**0.5
    assert (np.abs(np.mean(many, axis=0) - want) < 4 * error + 1e-6).all()
    assert (error < 0.1 * np.abs(exact[0])).all()  # it would see a bias of that size


def test_draws_depend_on_the_row_and_the_seed_alone(made, tmp_path):
  write(made, tmp_path / 'other', on='generic/test', mode='sampled', k=8, batch_size=8)
  write(made, tmp_path / 'again', on='generic/test', mode='sampled', k=8, batch_size=24)
  write(made, tmp_path / 'seed', on='generic/test', mode='sampled', k=8, seed=1)
  ids = [np.load(next((tmp_path / n).glob('*.npy')))['ids'] for n in ('other', 'again', 'seed')]
  assert (ids[0] == ids[1]).mean() > 0.999  # sums in another order, at the edge between two ids
  assert (ids[0] == ids[2]).mean() < 0.5


def test_writing_continues_and_refuses_another_command(made, tmp_path):
  about = write(made, tmp_path, mode='topk', k=4)
  paths = signals.shards(tmp_path, about)
  assert len(paths) > 2 and sorted(tmp_path.glob('*.npy')) == paths
  before = [p.stat().st_mtime_ns for p in paths]
  spent = ledger.read_ledger(tmp_path)
  loaded = load.load(made / 'teacher', sharding.make_mesh({'data': -1}))
  entry = spent['phases'][0]
  assert spent['ancestors'] == [str(made / 'teacher')] and entry['phase'] == 'signals'
  flops = about['rows'] * 32 * forward_flops(loaded.model.cfg, 32)
  assert entry['flops'] == pytest.approx(flops)
  whole = np.load(paths[1])
  paths[1].unlink()
  with pytest.raises(ValueError, match='lacks shard-00001.*the command that started it continues'):
    signals.Signals(tmp_path)
  write(made, tmp_path, mode='topk', k=4)
  np.testing.assert_array_equal(np.load(paths[1]), whole)
  after = [p.stat().st_mtime_ns for p in paths]
  assert [a == b for a, b in zip(before, after, strict=True)] == [i != 1 for i in range(len(paths))]
  with pytest.raises(ValueError, match='other signals: k was 4, now 5'):
    write(made, tmp_path, mode='topk', k=5)
  for size in (0, -3):
    with pytest.raises(ValueError, match=f'batch_size={size}, shard_rows=.*: expected at least 1'):
      write(made, tmp_path / 'none', batch_size=size)
  assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('mode', ['topk', 'sampled'])
def test_verifying_sees_other_signals(mode, made, tmp_path):
  assert 'rows computed again' in signals.verify(str(made / mode))
  about = files.read_json(made / mode / 'signals.json')
  for path in signals.shards(made / mode, about):
    shard = np.load(path)
    field = 'probs' if mode == 'topk' else 'ids'
    shard[field] = shard[field][:, ::-1]
    files.write_npy(tmp_path / path.name, shard)
  files.write_json(tmp_path / 'signals.json', about)
  with pytest.raises(ValueError, match='its signals are not those of'):
    signals.verify(str(tmp_path))
  files.write_json(tmp_path / 'signals.json', {**about, 'weights': 'f' * 64})
  with pytest.raises(ValueError, match='has other weights'):
    signals.verify(str(tmp_path))


def test_training_reads_them_on_any_mesh_and_pays_no_teacher(made, tiny_data, tmp_path):
  c = config(tiny_data)
  c.phase, c.objective, c.teacher_cache = 'distill', KD, str(made / 'sampled')
  c.model.vocab = 264
  loop.train(c.to_dict(), tmp_path / 'one')
  c.mesh.update(data=2, fsdp=2, tensor=2)
  loop.train(c.to_dict(), tmp_path / 'two')
  one, two = (rundir.read_metrics(tmp_path / name) for name in ('one', 'two'))
  np.testing.assert_allclose([x['kl'] for x in one], [x['kl'] for x in two], rtol=1e-4)
  assert one[-1]['kl'] < one[0]['kl']
  spent = ledger.read_ledger(tmp_path / 'one')
  assert spent['ancestors'] == [str(made / 'sampled')]
  loaded = load.load(tmp_path / 'one', sharding.make_mesh({'data': -1}))
  flops = 3 * 8 * 32 * 3 * forward_flops(loaded.model.cfg, 32)
  assert spent['phases'][0]['flops'] == pytest.approx(flops)


def test_what_the_signals_cannot_give_is_refused(made, tiny_data, tmp_path):
  c = config(tiny_data)
  c.teacher_cache = str(made / 'sampled')
  run = lambda c: loop.train(c.to_dict(), tmp_path / 'run')
  for change, message in (
    ({'temperature': 2.0}, 'objective.temperature=2.0: with a teacher_cache expected 1.0'),
    ({'correct': 1.0}, 'objective.correct=1.0: with a teacher_cache expected 0.0'),
    ({'kl': 'reverse'}, "objective.kl='reverse': with a teacher_cache of mode 'sampled'"),
  ):
    c.objective = {**KD, **change}
    with pytest.raises(ValueError, match=message):
      run(c)
  c.objective = KD
  both = copy.deepcopy(c)
  both.teacher = str(made / 'teacher')
  with pytest.raises(ValueError, match="objective 'distill' takes one of them"):
    run(both)
  c.data.set = 'court'
  with pytest.raises(ValueError, match='holds no signals of a training row'):
    run(c)
