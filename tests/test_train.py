"""The train loop: golden values, resumption, meshes, early stopping, bad input."""

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import code, distill, finetune, lora, mask
from slm import objectives, reparam
from slm.base import console, files
from slm.data import loader
from slm.objectives import heldout
from slm.reporting import stats
from slm.runs import checkpoint, ledger, load, rundir
from slm.runs.config import resolve, section
from slm.training import loop, optim, step
from slm.training.recorder import Recorder
from slm.training.step import make_sums
from slm.weights import sharding


def metrics(run, name='loss'):
  return [line[name] for line in rundir.read_metrics(run) if name in line]


def theta(run, step=None):
  mesh = sharding.make_mesh({'data': -1})
  loaded = load.load(run, mesh)
  return loaded.theta


def equal(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_golden_first_steps(tiny_config, tmp_path):
  """These values change only with the model's arithmetic, its initialisation or the data order."""
  loop.train(tiny_config.to_dict(), tmp_path / 'run')
  np.testing.assert_allclose(metrics(tmp_path / 'run'), GOLDEN_LOSS, rtol=2e-5)
  np.testing.assert_allclose(metrics(tmp_path / 'run', 'grad_norm'), GOLDEN_NORM, rtol=2e-4)


GOLDEN_LOSS = [6.085904, 5.761684, 5.274619, 4.970392]
GOLDEN_NORM = [2.547712, 2.065904, 1.589898, 1.400241]


class Stop:
  """Asks to stop after a step, as a signal would."""

  def __init__(self, at):
    self.at = at

  def __enter__(self):
    return lambda step: step >= self.at

  def __exit__(self, *_):
    pass


@pytest.mark.parametrize(
  'name',
  ['full', 'moe', 'mixture', 'project', 'demix', 'soup', 'hyper', 'lora', 'mask', 'code'],
)
def test_four_steps_equal_two_restart_two(name, tiny_config, train_once, tmp_path, monkeypatch):
  if name in ('lora', 'mask', 'code'):  # these change the weights of another run
    start = specialists(copy.deepcopy(tiny_config), 'project' if name == 'code' else 'full')
    train_once(start.to_dict(), tmp_path / 'start')
    tiny_config.init = str(tmp_path / 'start')
  c = specialists(tiny_config, name)
  whole, halves = tmp_path / 'whole', tmp_path / 'halves'
  loop.train(c.to_dict(), whole)
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'StopSignal', lambda: Stop(2))
    with pytest.raises(console.Interrupted, match='saved step 2'):
      loop.train(c.to_dict(), halves)
  loop.train(c.to_dict(), halves)
  assert metrics(whole) == metrics(halves)
  assert metrics(whole, 'eval_loss') == metrics(halves, 'eval_loss')
  assert equal(theta(whole), theta(halves))
  counts = lambda run: files.read_json(run / 'result.json')['tokens']
  assert counts(whole) == counts(halves)


def test_a_signal_in_the_last_step_stops_what_comes_after_the_run(
  tiny_config, tmp_path, monkeypatch
):
  monkeypatch.setattr(checkpoint, 'StopSignal', lambda: Stop(tiny_config.steps))
  with pytest.raises(console.Interrupted, match=f'{tmp_path}: finished'):
    loop.train(tiny_config.to_dict(), tmp_path)
  assert files.read_json(tmp_path / 'result.json')['steps'] == tiny_config.steps
  assert loop.train(tiny_config.to_dict(), tmp_path)['steps'] == tiny_config.steps


def specialists(c, name):
  """Make a config train a reparameterisation, over the two clusters of the tiny data if it can."""
  if name == 'moe':
    c.model.update(num_experts=4, dispatch='ragged')
    c.objective = {'name': 'next_token', 'chunk': 64, 'balance': 0.01, 'z': 1e-3}
    return c
  leaves = ('w_gate', 'w_up', 'w_down')
  options = {
    'full': {},
    'lora': {'rank': 2, 'alpha': 4.0, 'leaves': leaves},
    'mask': {'leaves': leaves, 'threshold': 5e-3},
    'code': {},
    'mixture': {'clusters': 2},
    'demix': {'clusters': 2, 'leaves': leaves},
    'project': {'clusters': 2, 'capacity': 3, 'code': 4, 'leaves': leaves, 'shared_mix': True},
    'soup': {'clusters': 2, 'experts': 3, 'leaves': leaves, 'router': 'mlp', 'hidden': 4},
    'hyper': {'clusters': 2, 'code': 4, 'hidden': 3, 'rank': 2, 'leaves': leaves},
  }[name]
  c.reparam = {'name': name, **options}
  if 'clusters' in options:
    c.data.update(level=2, batch_size=16, rows_per_group=8)
    c.mesh.update(data=2)
    c.data.order = {'mixture': 'every', 'soup': 'histogram'}.get(name, 'proportional')
  return c


@pytest.fixture(autouse=True)
def two_devices_where_asked(monkeypatch):
  """Let a config's mesh take the first devices only, so that few groups divide over it."""
  make = sharding.make_mesh

  def few(sizes, devices=None):
    count = int(np.prod([n for n in sizes.values() if n > 0]))
    whole = -1 in sizes.values()
    return make(sizes, devices or (jax.devices() if whole else jax.devices()[:count]))

  monkeypatch.setattr(sharding, 'make_mesh', few)


def test_restores_bitwise_onto_another_mesh(tiny_config, tmp_path):
  c = tiny_config
  c.model.vocab = 264
  loop.train(c.to_dict(), tmp_path / 'run')
  before = jax.device_get(theta(tmp_path / 'run'))
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2, 'data': 1})
  loaded = load.load(tmp_path / 'run', mesh)
  assert equal(before, jax.device_get(loaded.theta))
  spec = loaded.theta['blocks']['mlp']['w_up'].sharding.spec
  assert spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')


def test_continues_on_another_mesh(tiny_config, tmp_path, monkeypatch):
  """The run goes on with the same data; sums over devices differ in the last bits only."""
  c = tiny_config
  c.model.vocab = 264
  loop.train(c.to_dict(), tmp_path / 'one')
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'StopSignal', lambda: Stop(2))
    with pytest.raises(console.Interrupted):
      loop.train(c.to_dict(), tmp_path / 'two')
  c.mesh.update(data=2, fsdp=2, tensor=2)
  loop.train(c.to_dict(), tmp_path / 'two')
  np.testing.assert_allclose(metrics(tmp_path / 'one'), metrics(tmp_path / 'two'), rtol=1e-5)


@pytest.mark.parametrize('mesh', [{'data': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2}, {'expert': 8}])
def test_every_mesh_trains_alike(mesh, tiny_config, train_once, tmp_path):
  c = tiny_config
  c.model.vocab = 264
  c.mesh.update({'data': 1, **mesh})
  loop.train(c.to_dict(), tmp_path / 'run')
  reference = tiny_config.copy_and_resolve_references()
  reference.mesh.update(data=8, fsdp=1, tensor=1, expert=1)
  train_once(reference.to_dict(), tmp_path / 'reference')
  a, b = metrics(tmp_path / 'run'), metrics(tmp_path / 'reference')
  np.testing.assert_allclose(a, b, rtol=1e-5)


def test_accumulation_equals_one_big_batch(tiny_config, train_once, tmp_path):
  train_once(tiny_config.to_dict(), tmp_path / 'one')
  tiny_config.data.accum = 2
  tiny_config.mesh.data = 4
  loop.train(tiny_config.to_dict(), tmp_path / 'two')
  one, two = metrics(tmp_path / 'one'), metrics(tmp_path / 'two')
  np.testing.assert_allclose(one, two, rtol=1e-5)


@pytest.mark.parametrize('skip_above', [0.0, 10.0])
def test_optimiser_state_is_sharded_like_the_weights(skip_above, tiny_config, tmp_path):
  c = tiny_config
  c.optim.skip_above = skip_above
  c.model.vocab = 264
  c.mesh.update(data=2, fsdp=2, tensor=2)
  mesh = sharding.make_mesh(c.mesh.to_dict())
  with jax.set_mesh(mesh):
    run = loop._Run(resolve(c.to_dict()), tmp_path, mesh, loop.Trace(range(0), tmp_path))
    state = run.initial_state()
  moments = [s for s in jax.tree.leaves(state.opt_state) if s.ndim > 1]
  weights = [w for w in jax.tree.leaves(state.theta) if w.ndim > 1] * 2
  assert [m.sharding.spec for m in moments] == [w.sharding.spec for w in weights]
  assert any(w.sharding.spec != jax.sharding.PartitionSpec() for w in weights)


def test_mixture_equals_separate_runs(tiny_config, tmp_path):
  """Training the experts together is training each alone on its own rows, clipping included."""
  c = specialists(tiny_config, 'mixture')
  c.optim.clip = 0.1
  loop.train(c.to_dict(), tmp_path / 'together')
  mesh = sharding.make_mesh({'data': 1})
  joint = load.load(tmp_path / 'together', mesh)
  cfg = resolve(c.to_dict())
  batches = loader.build(cfg.data, seed=cfg.seed)
  model, rep = load.build(cfg)

  tx = optim.build(
    cfg.optim,
    optim.schedule(cfg.schedule, cfg.steps),
    False,
  )
  sums = make_sums(
    objectives.build(cfg.objective, {'student': model.forward}),
    reparam.build(section('reparam', {'name': 'full'}), model.init),
    'float32',
  )
  one = jax.jit(step.make_train_step(sums, tx))
  start = jax.jit(rep.init)(jax.random.fold_in(jax.random.key(0), 0))['experts']
  begin = jax.jit(lambda e: step.init_state(jax.tree.map(lambda w: w[e], start), tx, {}))
  states = [begin(e) for e in range(2)]
  for _ in range(4):
    batch = next(batches)
    for e in range(2):
      part = jax.tree.map(lambda x, e=e: x[:, e : e + 1], batch)
      states[e], _ = one(states[e], {}, part)
  # Four Adam steps divide by small second moments, so compare the weights' movement loosely
  # in relative and tightly in absolute terms.
  for e in range(2):
    for a, b in zip(
      jax.tree.leaves(joint.params(e)), jax.tree.leaves(states[e].theta), strict=True
    ):
      np.testing.assert_allclose(a, b, atol=1e-5)


def test_not_finite_stops_and_keeps_the_last_checkpoint(tiny_config, tmp_path, monkeypatch):
  c = tiny_config
  c.steps = 8
  finish = Recorder._finish

  def poison(self, step, values):
    if step == 5:
      values = {**values, 'bad_leaf': jax.numpy.asarray(2)}
    finish(self, step, values)

  monkeypatch.setattr(Recorder, '_finish', poison)
  with pytest.raises(FloatingPointError, match=r"gradient of \['blocks'\].*; step 4 is intact$"):
    loop.train(c.to_dict(), tmp_path / 'run')
  with checkpoint.Checkpoints(tmp_path / 'run' / 'checkpoints') as saved:
    assert saved.latest == 4
  assert not (tmp_path / 'run' / 'result.json').exists()


def test_step_names_the_leaf_with_a_nan(tiny_config, tmp_path):
  mesh = sharding.make_mesh({'data': 8})
  with jax.set_mesh(mesh):
    run = loop._Run(resolve(tiny_config.to_dict()), tmp_path, mesh, loop.Trace(range(0), tmp_path))
    state = run.initial_state()
    leaves = jax.tree_util.tree_leaves_with_path(run.shapes.theta)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    state.theta['final_norm']['scale'] = state.theta['final_norm']['scale'].at[0].set(np.nan)
    batch = run.next_batch()
    with run.recorder(0) as record:
      _, values = run.step('rows', state, batch, record)
  assert int(values['bad_leaf']) >= 0
  assert names[int(values['bad_leaf'])]
  assert not np.isfinite(values['loss'])


def test_early_stopping_and_best(tiny_config, tmp_path):
  c = tiny_config
  c.steps, c.eval.every, c.eval.patience = 60, 1, 3
  c.schedule.update(name='constant', peak=3.0, warmup=0)  # diverges, so it stops early
  result = loop.train(c.to_dict(), tmp_path / 'run')
  assert result['steps'] < 60
  assert result['steps'] == result['best_step'] + 3
  assert result['loss'] == result['best_loss']  # what is served
  c.eval.patience, c.steps = 0, 6
  result = loop.train(c.to_dict(), tmp_path / 'last')
  assert result['best_loss'] < result['loss'] < np.inf
  assert load.load(tmp_path / 'run', sharding.make_mesh({'data': 8})).step == result['best_step']


def test_init_from_another_run_and_distillation(tiny_config, train_once, tmp_path, capsys):
  c = tiny_config
  train_once(c.to_dict(), tmp_path / 'slm')
  c.init, c.phase = str(tmp_path / 'slm'), 'finetune'
  c.model.update(mlp=99, remat='full')  # the weights decide the shape, not how it is computed
  c.data.update(set='court', index='court-2000')
  result = loop.train(c.to_dict(), tmp_path / 'tuned')
  assert result['best_loss'] < 5
  model = files.read_json(tmp_path / 'tuned' / 'config.json')['model']
  assert (model['mlp'], model['remat']) == (32, 'full')
  c.teacher, c.phase = str(tmp_path / 'tuned'), 'distill'
  c.objective = {
    'name': 'distill', 'chunk': 64, 'temperature': 1.0, 'mixing': 0.5, 'kl': 'forward',
  }  # fmt: skip
  capsys.readouterr()
  loop.train(c.to_dict(), tmp_path / 'student')
  assert capsys.readouterr().err.splitlines()[:4] == [
    'distill student: reading data',
    f'distill student: loading teacher {tmp_path / "tuned"}',
    f'distill student: loading init {tmp_path / "slm"}',
    'distill student: compiling',
  ]
  assert metrics(tmp_path / 'student', 'kl')[-1] < metrics(tmp_path / 'student', 'kl')[0]
  spent = ledger.read_ledger(tmp_path / 'student')
  assert spent['ancestors'] == [str(tmp_path / 'slm'), str(tmp_path / 'tuned')]
  phases = {p['phase']: p for p in spent['phases']}
  assert set(phases) == {'distill', 'evaluate'}
  tuned = {p['phase']: p for p in ledger.read_ledger(tmp_path / 'tuned')['phases']}
  # The teacher has the student's size: its forward pass adds a third of training's three.
  assert phases['distill']['flops'] == pytest.approx(tuned['finetune']['flops'] * 4 / 3)


def test_a_milestone_is_the_end_of_a_shorter_run(tiny_config, tmp_path):
  """Under a schedule independent of its end, RUN@STEP equals a run of STEP steps."""
  c, mesh = tiny_config, sharding.make_mesh({'data': 8})
  c.schedule.name, c.steps, c.checkpoint.milestones = 'inverse_sqrt', 6, (2, 3)
  loop.train(c.to_dict(), tmp_path / 'long')
  c.steps, c.checkpoint.milestones = 3, ()
  loop.train(c.to_dict(), tmp_path / 'short')
  at = f'{tmp_path}/long@3'
  assert equal(theta(at), theta(tmp_path / 'short'))
  short = stats.training_cost(tmp_path / 'short')
  assert stats.training_cost(Path(at)).flops == short.flops > 0
  data = tiny_config.data.path
  evaluated = [heldout.run(ref, data, ['court/test'], mesh, 8) for ref in (at, tmp_path / 'short')]
  assert evaluated[0] == evaluated[1]
  assert (tmp_path / 'long' / 'eval-3.json').exists() and not (
    tmp_path / 'long' / 'eval.json'
  ).exists()
  c.init, c.phase = at, 'finetune'
  loop.train(c.to_dict(), tmp_path / 'tuned')
  assert ledger.read_ledger(tmp_path / 'tuned')['ancestors'] == [at]
  with pytest.raises(ValueError, match=r'no checkpoint of step 4, found steps \[2, 3, 6\]'):
    load.load(f'{tmp_path}/long@4', mesh)


def test_finished_run_returns_at_once_and_other_config_is_refused(tiny_config, tmp_path):
  first = loop.train(tiny_config.to_dict(), tmp_path / 'run')
  assert loop.train(tiny_config.to_dict(), tmp_path / 'run') == first
  tiny_config.optim.b2 = 0.9
  with pytest.raises(ValueError, match=r'holds another run: optim.b2 was 0.95, now 0.9'):
    loop.train(tiny_config.to_dict(), tmp_path / 'run')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'precious.txt').write_text('x')
  with pytest.raises(ValueError, match='is not empty and holds no config.json'):
    loop.train(tiny_config.to_dict(), tmp_path / 'other')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'mesh.tensor': 3}, 'needs 6 devices, found 8'),
    ({'data.batch_size': 4}, '4 groups of rows per microbatch'),
    ({'model.num_kv_heads': 3}, 'num_heads=2 is not a multiple of num_kv_heads=3'),
    ({'mesh.data': 4, 'mesh.tensor': 2, 'model.vocab': 261}, 'does not divide'),
    ({'model.vocab': 10}, 'model.vocab=10: the tokenizer has'),
    ({'schedule.warmup': 9}, 'schedule.warmup=9: expected less than steps=4'),
    ({'reparam.name': 'lorra'}, "reparam.name: expected one of .* found 'lorra'"),
    ({'data.set': 'nowhere'}, 'nowhere/validation: expected SET/SPLIT'),
    ({'data.path': ''}, 'data.path: expected the directory'),
    ({'init': '/nowhere'}, '/nowhere/config.json: no such file'),
    ({'eval.split': 'later'}, 'generic/later: expected SET/SPLIT'),
    ({'eval.batch_size': 0}, 'eval.batch_size: expected at least 1, found 0'),
    ({'checkpoint.keep': 0}, 'checkpoint.keep: expected at least 1, found 0'),
    ({'optim.clip': -1.0}, 'optim.clip: expected a norm, or 0 for none, found -1.0'),
  ],
)
def test_bad_input_is_one_clear_line(change, message, tiny_config, tmp_path):
  tiny_config.update_from_flattened_dict(change)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    loop.train(tiny_config.to_dict(), tmp_path / 'run')


def test_other_rows_under_the_same_names_are_another_run(tiny_config, tmp_path):
  path = tmp_path / 'data'
  shutil.copytree(tiny_config.data.path, path)
  tiny_config.data.path = str(path)
  loop.train(tiny_config.to_dict(), tmp_path / 'run')
  manifest = files.read_json(path / 'manifest.json')
  manifest['sets']['generic']['train']['sha256'] = 'f' * 64
  files.write_json(path / 'manifest.json', manifest)
  with pytest.raises(ValueError, match='holds another run: rows was .*, now .ffff'):
    loop.train(tiny_config.to_dict(), tmp_path / 'run')


def test_a_teacher_may_be_padded_otherwise(tiny_config, train_once, tmp_path):
  """With the same tokenizer and another model.vocab, the common ids are compared."""
  train_once(tiny_config.to_dict(), tmp_path / 'teacher')
  c = tiny_config
  c.model.vocab, c.teacher = 264, str(tmp_path / 'teacher')
  c.objective = {
    'name': 'distill', 'chunk': 64, 'temperature': 1.0, 'mixing': 0.5, 'kl': 'forward',
  }  # fmt: skip
  loop.train(c.to_dict(), tmp_path / 'run')
  lines = rundir.read_metrics(tmp_path / 'run')
  assert all(np.isfinite(line['kl']) for line in lines if 'kl' in line)
  assert any('kl' in line for line in lines)


def test_a_run_records_every_change_of_code_or_machine(tiny_config, tmp_path, monkeypatch):
  tiny_config.log_every = 0
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'StopSignal', lambda: Stop(2))
    with pytest.raises(console.Interrupted):
      loop.train(tiny_config.to_dict(), tmp_path / 'run')
  monkeypatch.setattr(rundir, '_git', lambda: 'another commit')
  loop.train(tiny_config.to_dict(), tmp_path / 'run')
  starts = rundir.read_starts(tmp_path / 'run')
  assert [start['step'] for start in starts] == [0, 2]
  assert starts[1]['code'] == 'another commit' != starts[0]['code']
  assert starts[1]['environment'] == starts[0]['environment']


def test_tokenizer_mismatch_is_refused(tiny_config, train_once, tmp_path):
  train_once(tiny_config.to_dict(), tmp_path / 'slm')
  path = tmp_path / 'slm' / 'config.json'
  path.write_text(json.dumps({**files.read_json(path), 'tokenizer': 'f' * 64}))
  tiny_config.init = str(tmp_path / 'slm')
  with pytest.raises(ValueError, match='was trained with tokenizer ffffffffffff'):
    loop.train(tiny_config.to_dict(), tmp_path / 'run')


def test_sigterm_saves_and_the_same_command_continues(tiny_data, tmp_path):
  """The whole entry point, in its own process, as a scheduler would treat it."""
  run = tmp_path / 'run'
  sizes = {'embed': 16, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 2, 'head_dim': 8}
  command = [
    sys.executable, '-m', 'slm.train', '--config=configs/base.py', f'--workdir={run}',
    f'--config.data.path={tiny_data}', '--config.steps=200', '--config.schedule.warmup=1',
    '--config.log_every=1', '--config.eval.max_rows=8', '--config.tensorboard=False',
    '--config.checkpoint.every=1000', *(f'--config.model.{k}={v}' for k, v in sizes.items()),
  ]  # fmt: skip
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  while not (run / 'metrics.jsonl').exists() or len(rundir.read_metrics(run)) < 3:
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM
  assert 'the same command continues' in err
  stopped = rundir.read_metrics(run)[-1]['step']
  assert 3 <= stopped < 200
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert json.loads(done.stdout)['steps'] == 200
  steps = [line['step'] for line in rundir.read_metrics(run)]
  assert sorted(set(steps)) == list(range(1, 201))


def test_a_code_is_refused_on_other_clusters(tiny_config, tiny_data, tmp_path):
  """The histogram of a code is over the network's own clusters, not another directory's."""
  other = tmp_path / 'data'
  shutil.copytree(tiny_data, other)
  model = other / 'clusters' / 'model.safetensors'
  arrays = safetensors.numpy.load_file(model)
  turned = {'parents_2': np.ascontiguousarray(1 - arrays['parents_2'])}
  safetensors.numpy.save_file({**arrays, **turned}, model)
  loop.train(specialists(copy.deepcopy(tiny_config), 'project').to_dict(), tmp_path / 'run')
  c = specialists(copy.deepcopy(tiny_config), 'code')
  c.init, c.data.path = str(tmp_path / 'run'), str(other)
  with pytest.raises(ValueError, match='was trained on other clusters'):
    loop.train(c.to_dict(), tmp_path / 'code')


def test_an_objective_brings_batches_evaluators_and_weights_of_its_own(
  tiny_config, tmp_path, monkeypatch
):
  """The loop uses a set-up's rewritten batches, evaluators and trained parts."""
  c, plain = tiny_config, objectives.setup

  def setup(cfg, model, rep, mesh, reward):
    base = plain(cfg, model, rep, mesh, reward)

    def scaled(params, frozen, batch):
      sums = base.objectives['rows'](params, frozen, batch)
      bonus = batch.get('bonus', jax.numpy.zeros(())).sum()
      value, weight = sums['loss']
      return {'loss': (value * frozen['gain']['scale'].sum() + bonus, weight)}

    def rewrite(theta, frozen, batch, step):
      if step % 2:
        return 'rows', batch, {}
      short = {k: x[..., :16] if x.ndim == 4 else x for k, x in batch.items()}
      return 'short', short | {'bonus': jax.numpy.ones_like(short['weights'])}, {}

    beside = {'gain': {'scale': jax.numpy.ones(4)}}
    where = sharding.shardings(beside, mesh)
    return dataclasses.replace(
      base,
      objectives={'rows': scaled, 'short': scaled},
      evaluators={
        **base.evaluators,
        'extra': lambda of, _: {'loss': 1.0, 'tokens': 3, 'hits': 2.0},
      },
      beside=jax.device_put(beside, where),
      rates={'gain': 0.5},
      rewrite=rewrite,
    )

  monkeypatch.setattr(objectives, 'setup', setup)
  loop.train(c.to_dict(), tmp_path / 'whole')
  lines = rundir.read_metrics(tmp_path / 'whole')
  tokens = np.diff([0, *(x['tokens'] for x in lines)])
  assert (tokens[1::2] < 0.6 * tokens[::2]).all()
  assert [x['eval_extra_hits'] for x in lines if 'eval_loss' in x] == [2.0, 2.0]
  with checkpoint.Checkpoints(tmp_path / 'whole' / 'checkpoints') as saved:
    assert saved.latest == 4
  assert 'gain' not in theta(tmp_path / 'whole')  # a checkpoint serves theta alone
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'StopSignal', lambda: Stop(2))
    with pytest.raises(console.Interrupted):
      loop.train(c.to_dict(), tmp_path / 'halves')
  loop.train(c.to_dict(), tmp_path / 'halves')
  assert metrics(tmp_path / 'halves') == metrics(tmp_path / 'whole')


def test_two_commands_do_not_write_one_run(tiny_config, tmp_path, monkeypatch):
  """The second fails before it changes anything, and the first ends as if alone."""
  loop.train(tiny_config.to_dict(), tmp_path / 'alone')
  script = 'import pathlib, sys; from slm.base import artifact\n'
  script += 'with artifact.hold(pathlib.Path(sys.argv[1])): print("held", flush=True); input()'
  other = subprocess.Popen(
    [sys.executable, '-c', script, tmp_path / 'run'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    text=True, cwd=Path(__file__).parent.parent,
  )  # fmt: skip
  assert other.stdout.readline() == 'held\n'
  with pytest.raises(ValueError, match=f'run: is being written by process {other.pid} on '):
    loop.train(tiny_config.to_dict(), tmp_path / 'run')
  assert [p.name for p in (tmp_path / 'run').iterdir()] == ['writer.lock']
  other.communicate('\n')
  loop.train(tiny_config.to_dict(), tmp_path / 'run')
  assert metrics(tmp_path / 'run') == metrics(tmp_path / 'alone')


@pytest.mark.parametrize('name', ['constant', 'inverse_sqrt', 'cosine', 'wsd'])
def test_a_finished_run_goes_on_where_its_schedule_does_not_depend_on_its_end(
  name, tiny_config, tmp_path
):
  c = tiny_config
  c.schedule.name, c.schedule.decay, c.eval.every = name, 0.6, 0
  loop.train(c.to_dict(), tmp_path / 'run')
  c.steps = 6
  if name in ('cosine', 'wsd'):
    with pytest.raises(ValueError, match='run: steps was 4, now 6, on which the 4 completed steps'):
      loop.train(c.to_dict(), tmp_path / 'run')
    assert files.read_json(tmp_path / 'run/result.json')['steps'] == 4
    return
  assert loop.train(c.to_dict(), tmp_path / 'run')['steps'] == 6
  loop.train(c.to_dict(), tmp_path / 'at-once')
  assert metrics(tmp_path / 'run') == metrics(tmp_path / 'at-once')
  assert equal(theta(tmp_path / 'run'), theta(tmp_path / 'at-once'))
  c.steps = 4
  with pytest.raises(ValueError, match='holds another run: steps was 6, now 4'):
    loop.train(c.to_dict(), tmp_path / 'run')


def test_a_run_keeps_the_weights_it_began_with_when_their_run_is_extended(tiny_config, tmp_path):
  c, start = copy.deepcopy(tiny_config), tiny_config
  start.schedule.name, start.eval.every, start.checkpoint.milestones = 'constant', 0, (4,)
  loop.train(start.to_dict(), tmp_path / 'start')
  c.init, c.steps = str(tmp_path / 'start'), 2
  loop.train(specialists(c, 'lora').to_dict(), tmp_path / 'tuned')
  served = lambda run: load.load(tmp_path / run, sharding.make_mesh({'data': -1})).params()
  before = served('tuned')
  older = shutil.copytree(tmp_path / 'tuned', tmp_path / 'older')
  values = files.read_json(older / 'config.json')
  assert values.pop('source_steps') == {'init': 4}
  files.write_json(older / 'config.json', values)  # as earlier versions wrote it
  start.steps = 6
  loop.train(start.to_dict(), tmp_path / 'start')
  assert equal(served('tuned'), before) and not equal(served('older'), before)
  c.steps = 3
  shutil.rmtree(tmp_path / 'start/checkpoints/4')
  message = 'init: the run began with step 4 of .*start, which now serves 6: restore that'
  for resumed in (lambda: served('tuned'), lambda: loop.train(c.to_dict(), tmp_path / 'tuned')):
    with pytest.raises(ValueError, match=message):
      resumed()
  student = dataclasses.replace(load.config.of(older), teacher=c.init, source_steps={'teacher': 4})
  with pytest.raises(ValueError, match='teacher: the run began with step 4 of .*start'):
    load.source(student, 'teacher', sharding.make_mesh({'data': -1}))


def test_wsd_is_extended_before_it_decays(tiny_config, tmp_path, monkeypatch):
  c = tiny_config
  c.schedule.name, c.schedule.decay, c.steps = 'wsd', 0.5, 4
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'StopSignal', lambda: Stop(2))
    with pytest.raises(console.Interrupted):
      loop.train(c.to_dict(), tmp_path / 'run')
  c.steps = 6
  loop.train(c.to_dict(), tmp_path / 'run')
  loop.train(c.to_dict(), tmp_path / 'at-once')
  assert metrics(tmp_path / 'run') == metrics(tmp_path / 'at-once')


@pytest.mark.parametrize('config', [finetune, distill, lora, mask, code])
def test_a_config_that_starts_from_a_run_is_refused_without_one(config, tiny_config, tmp_path):
  tiny_config.init, tiny_config.phase = config.get_config().init, 'finetune'
  with pytest.raises(ValueError, match="init: phase 'finetune' starts from the weights of a run"):
    loop.train(tiny_config.to_dict(), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
