"""Runs at gs:// addresses, of a fake of Google's API: they train, continue and are read from there.

gcsfs and tensorstore both talk to tests/gcs.py, from this process and from others.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import gcs
import jax
import numpy as np
import pytest
from etils.epath import backend

from slm import checkpoint as command
from slm.base import artifact, console, lease, stage
from slm.inference import specialist
from slm.interchange import convert
from slm.objectives import heldout
from slm.pruning import commands
from slm.reporting import comparison
from slm.reporting.report import report
from slm.runs import checkpoint, launch, load, rundir
from slm.training import loop
from slm.weights import sharding

gcsfs = pytest.importorskip('gcsfs.core', reason="needs gcsfs: pip install 'slm[gcs]'")
ROOT = Path(__file__).parent.parent
CONFIG = """from ml_collections import ConfigDict
def get_config():
  return ConfigDict({})
"""
OTHER = {
  'pid': 7, 'host': 'elsewhere', 'boot': 'other', 'since': '2026-01-01 00:00:00', 'started': '1',
}  # fmt: skip


@pytest.fixture(scope='module')
def served():
  """Serve the bucket; yield its store and the environment of other processes."""
  with gcs.serving() as (store, environment), pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    patch.setitem(fsspec.config.conf, 'gcs', {'endpoint_url': environment['STORAGE_EMULATOR_HOST']})
    backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.register_implementation('gcs', gcsfs.GCSFileSystem, clobber=True)
    yield store, environment
  backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture(scope='module')
def trained(served, tiny_config_of, tmp_path_factory):
  """Train six steps at an address and, for comparison, at a path; return both and the objects."""
  root = tmp_path_factory.mktemp('trained')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('SLM_CACHE', str(root / 'cache'))
    config = tiny_config_of(steps=6, **{'checkpoint.keep': 3})
    results = [loop.train(config, run) for run in ('gs://bucket/runs/x', root / 'run')]
  assert results[0]['loss'] == results[1]['loss']
  return 'gs://bucket/runs/x', root / 'run', dict(served[0].objects)


@pytest.fixture
def store(served, trained, tmp_path, monkeypatch):
  """Return the bucket with that run, seen from a machine with an empty disk."""
  monkeypatch.setenv('SLM_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(stage, '_fetched', set())
  served[0].objects, served[0].refuse = dict(trained[2]), lambda method, name: 0
  return served[0]


def names(store, below='runs/x'):
  return {n.removeprefix(f'{below}/') for n in store.objects if n.startswith(f'{below}/')}


def weights(run):
  return jax.device_get(load.load(run, sharding.make_mesh({'data': 8})).params())


def same(run, other):
  """Check that two runs serve the same weights."""
  jax.tree.map(np.testing.assert_array_equal, weights(run), weights(other))


def losses(run):
  return [line['loss'] for line in rundir.read_metrics(rundir.split_ref(run)[0])]


def unfinished(store):
  """Make the run one that was stopped before its end."""
  del store.objects['runs/x/result.json']


def test_a_run_at_an_address_is_the_run_at_a_path(store, trained, capsys):
  there, here, _ = trained
  assert losses(there) == losses(here)
  for step in (2, 6):
    jax.tree.map(
      np.testing.assert_array_equal, weights(f'{there}@{step}'), weights(f'{here}@{step}')
    )
  small = {n for n in names(store) if not n.startswith('checkpoints/')}
  assert small == {str(p.relative_to(here)) for p in here.iterdir() if p.is_file()}
  command.main(['slm.checkpoint', 'verify', there])
  told = capsys.readouterr().out.splitlines()
  assert told == [f'{there}@{step}: as it was written' for step in (2, 4, 6)]


def test_commands_read_it_and_evaluations_are_put_there(store, trained, tiny_data, tmp_path):
  there, here, _ = trained
  mesh, on = sharding.make_mesh({'data': 8}), ['court/test']
  first = heldout.run(f'{there}@2', tiny_data, on, mesh, 8)
  assert first == heldout.run(f'{here}@2', tiny_data, on, mesh, 8)
  heldout.run(there, tiny_data, on, mesh, 8)
  assert {'eval-2.json', 'eval-2/court-test.npy', 'eval.json'} <= names(store)
  store.asked.clear()
  models = comparison.models([there, f'{there}@2'])
  report(models, on, tmp_path / 'report')
  assert there in (tmp_path / 'report/report.html').read_text()
  assert not [name for method, name in store.asked if method in ('PUT', 'POST', 'DELETE')]
  exported = convert.export_model(there, tmp_path / 'hf')
  assert exported['history'][0]['run'] == 'x'
  convert.import_model(tmp_path / 'hf', 'gs://bucket/imported')
  same('gs://bucket/imported', there)
  assert {'config.json', 'result.json'} <= names(store, 'imported')


def test_a_run_starts_from_and_learns_from_one_at_an_address(
  store, trained, tiny_config_of, tmp_path
):
  there, _, _ = trained
  keys = {'init': f'{there}@4', 'objective.name': 'distill', 'teacher': there}
  loop.train(tiny_config_of(steps=2, **{'data.set': 'court', **keys}), tmp_path / 'tuned')
  known = json.loads((tmp_path / 'tuned/config.json').read_text())
  assert (known['init'], known['teacher']) == (f'{there}@4', there)
  assert known['source_steps'] == {'init': 4, 'teacher': 6}


def test_cuts_and_specialists_are_written_there(store, trained, tiny_config_of, tmp_path):
  there, _, _ = trained
  stats = str(tmp_path / 'stats')
  commands.calibrate(there, '', stats, 'generic/train', 16, 8)
  commands.cut(there, [stats], {'mlp': 16}, 'gs://bucket/cut')
  shapes = [x.shape for x in jax.tree.leaves(weights('gs://bucket/cut'))]
  assert (2, 16, 16) in shapes and not [shape for shape in shapes if 32 in shape]
  keys = {'data.level': 4, 'data.rows_per_group': 1}
  config = tiny_config_of(steps=2, **keys)
  config['reparam'] = {
    'name': 'project',
    'clusters': 4,
    'capacity': 2,
    'code': 2,
    'shared_mix': True,
  }
  config['reparam']['leaves'] = ('w_gate', 'w_up', 'w_down')
  loop.train(config, 'gs://bucket/network')
  specialist.specialise('gs://bucket/network', 'court', 'gs://bucket/one')
  assert {'config.json', 'ledger.json', 'result.json'} <= names(store, 'one')
  assert (
    json.loads(store.objects['one/config.json'][0])['specialist']['of'] == 'gs://bucket/network'
  )
  assert weights('gs://bucket/one')


def several(count, tmp_path, config, environment):
  """Start processes that train at an address, each with a disk of its own."""
  file = tmp_path / 'config.py'
  file.write_text(CONFIG.format(config))
  arguments = ['train', f'--config={file}', '--workdir=gs://bucket/several']
  given = {'nodes': count, 'env': [f'JAX_NUM_CPU_DEVICES={4 // count}']}
  started = []
  for i, words in enumerate(launch.processes(launch.make('local', arguments, given))):
    disk = {'SLM_CACHE': str(tmp_path / f'disk-{count}-{i}')}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'cwd': ROOT}
    started.append(subprocess.Popen(words, env={**os.environ, **environment, **disk}, **pipes))
  return started


def test_killed_while_it_saves_it_continues_elsewhere_with_other_processes(
  served, store, tiny_config_of, tmp_path
):
  keys = {'checkpoint.every': 2, 'mesh.fsdp': 2, 'eval.every': 0, 'schedule.warmup': 1}
  config = tiny_config_of(steps=6, **keys)
  first = several(2, tmp_path, config, served[1])

  def kill(method, name):
    if name == 'several/checkpoints/4/commit_success.txt':
      for process in first:
        process.kill()
      return 503
    return 0

  store.refuse = kill
  ends = [process.communicate(timeout=120) for process in first]
  assert [process.returncode for process in first] == [-signal.SIGKILL] * 2, ends
  store.refuse = lambda method, name: 0
  there = stage.remote('gs://bucket/several/checkpoints')
  assert checkpoint.saved_steps(there) == [2]
  result = loop.train(config, 'gs://bucket/several')
  assert result['steps'] == 6
  assert checkpoint.saved_steps(there)[0] == 6
  assert rundir.restarts(rundir.split_ref('gs://bucket/several')[0]) == [2]
  loop.train(config, tmp_path / 'undisturbed')
  np.testing.assert_allclose(losses('gs://bucket/several'), losses(tmp_path / 'undisturbed'), 1e-5)


@pytest.fixture
def quick(monkeypatch):
  """Make leases short."""
  monkeypatch.setattr(lease, 'RENEW', 0.1)
  monkeypatch.setattr(lease, 'LEASE', 1.2)
  monkeypatch.setattr(lease, '_SETTLE', 0.05)


def lock(store, **more):
  store.put('runs/y/writer.lock', json.dumps(OTHER | more).encode())


def test_a_living_writer_elsewhere_is_named_and_a_dead_one_is_taken_over(store, quick):
  folder = stage.of('gs://bucket/runs/y')
  lock(store)
  renewal = threading.Timer(0.2, lock, [store], {'renewed': 1})
  renewal.start()
  who = 'gs://bucket/runs/y: is being written by process 7 on elsewhere since 2026'
  with pytest.raises(ValueError, match=who), artifact.hold(folder):
    pass
  with artifact.hold(folder):  # it is not renewed any more
    (folder / 'a.json').write_text('1')
    time.sleep(1.5)  # longer than a lease: it is renewed, and the file is put meanwhile
    assert 'a.json' in names(store, 'runs/y')
    mine = json.loads(store.objects['runs/y/writer.lock'][0])
    assert mine['pid'] == os.getpid()
  assert names(store, 'runs/y') == {'a.json'}


def test_a_writer_that_was_taken_over_puts_nothing_more(store, quick):
  folder = stage.of('gs://bucket/runs/y')
  with (
    pytest.raises(OSError, match='gs://bucket/runs/y: was taken over by process 7 on elsewhere'),
    artifact.hold(folder),
  ):
    lock(store)
    time.sleep(0.3)
    (folder / 'a.json').write_text('1')
  assert names(store, 'runs/y') == {'writer.lock'}


def test_a_damaged_lease_is_refused_by_name(store, quick):
  store.put('runs/y/writer.lock', b'{}')
  with (
    pytest.raises(ValueError, match="^gs://bucket/runs/y/writer.lock: lacks 'host'$"),
    artifact.hold(stage.of('gs://bucket/runs/y')),
  ):
    pass


def test_who_waits_until_another_has_fetched_a_stage_says_so(store, capsys):
  folder = stage.of('gs://bucket/runs/x')
  folder.mkdir(parents=True)
  with (folder / 'stage.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # of another open file, as another process's is
    threading.Timer(0.3, fcntl.flock, [lock.fileno(), fcntl.LOCK_UN]).start()
    stage.fetch(folder)
  said = 'gs://bucket/runs/x: waiting for another process here that fetches it\n'
  assert capsys.readouterr().err == said


def test_files_are_put_whole_and_removed_and_other_holders_keep_theirs(store, quick):
  folder = stage.of('gs://bucket/runs/y')
  store.put('runs/y/metrics.jsonl', b'old')
  busy = [503]  # once
  store.refuse = lambda method, name: busy.pop() if busy and name.endswith('eval.json') else 0
  with artifact.hold(folder, 'eval'):
    (folder / 'eval.json').write_text('{}')
    (folder / 'metrics.jsonl').write_text('of another')
  assert names(store, 'runs/y') == {'metrics.jsonl', 'eval.json'}
  assert store.objects['runs/y/metrics.jsonl'][0] == b'old'
  with artifact.hold(folder):
    assert (folder / 'metrics.jsonl').read_text() == 'old'  # what lies there counts
    (folder / 'metrics.jsonl').unlink()
  assert names(store, 'runs/y') == {'eval.json'} and not busy


def test_stopped_by_a_signal_or_a_put_that_fails_it_continues(store, trained, tiny_config_of):
  there, config = 'gs://bucket/runs/y', tiny_config_of(steps=6, **{'checkpoint.keep': 3})

  def stop(method, name):
    if name == 'runs/y/checkpoints/2/commit_success.txt' and method == 'POST':
      os.kill(os.getpid(), signal.SIGTERM)
    return 0

  store.refuse = stop
  with pytest.raises(console.Interrupted, match='saved step'):
    loop.train(config, there)
  lines = store.objects['runs/y/metrics.jsonl'][0].splitlines()
  saved = checkpoint.saved_steps(stage.remote(f'{there}/checkpoints'))[0]
  assert len(lines) == saved < 6 and 'writer.lock' not in names(store, 'runs/y')

  full = lambda method, name: 403 * (method == 'POST' and name == 'runs/y/metrics.jsonl')
  store.refuse = full
  with pytest.raises(OSError, match=f'{there}/metrics.jsonl: cannot be written .*Forbidden') as e:
    loop.train(config, there)
  assert '\n' not in str(e.value)
  assert store.objects['runs/y/metrics.jsonl'][0].splitlines() == lines
  store.refuse = lambda method, name: 0
  loop.train(config, there)
  assert losses(there) == losses(trained[1])


def test_a_damaged_checkpoint_is_refused_and_moved_aside(store, trained, tiny_config_of, capsys):
  there, here, _ = trained
  unfinished(store)
  files = [n for n in store.objects if n.startswith('runs/x/checkpoints/6/theta/')]
  name = max(files, key=lambda n: len(store.objects[n][0]))
  content = bytearray(store.objects[name][0])
  content[len(content) // 2] ^= 0xFF
  store.put(name, content)
  with pytest.raises(ValueError, match=f'gs://bucket/{name}: is not as it was written; sound: '):
    weights(there)
  assert weights(f'{there}@4')
  store.put('runs/x/checkpoints/8/theta/part', b'of a process that was killed')
  assert checkpoint.saved_steps(stage.of(there) / 'checkpoints') == [6, 4, 2]
  loop.train(tiny_config_of(steps=6, **{'checkpoint.keep': 3}), there)
  assert f'moved to {there}/damaged/6, going on from step 4' in capsys.readouterr().err
  assert {n for n in names(store) if n.startswith('damaged/6/theta/')}
  assert losses(there) == losses(here)
  same(there, here)


def test_checkpoints_that_a_run_goes_back_behind_stop_being_some_before_they_are_removed(store):
  folder = stage.of('gs://bucket/runs/x') / 'checkpoints'
  store.asked.clear()
  checkpoint.forget_after(folder, 2)
  assert checkpoint.saved_steps(folder) == [2]
  assert {n.split('/')[1] for n in names(store) if n.startswith('checkpoints/')} == {'2'}
  deleted = [name for method, name in store.asked if method == 'DELETE']
  of_a_step = [next(n for n in deleted if f'checkpoints/{step}/' in n) for step in (6, 4)]
  assert of_a_step == [f'runs/x/checkpoints/{step}/commit_success.txt' for step in (6, 4)]


def test_what_is_wrong_with_an_address_is_one_line(store, tiny_config_of, tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'slm.generate', '--run=gs://bucket/none', '--prompt=a'],
    capture_output=True, text=True, cwd=ROOT,
  )  # fmt: skip
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1] == 'error: gs://bucket/none/config.json: no such file'
  with pytest.raises(ValueError, match='s3://b/run: expected a directory, or an address gs://BUCK'):
    loop.train(tiny_config_of(), 's3://b/run')
  with pytest.raises(ValueError, match='gs:/b/out: expected a directory: this command'):
    report(comparison.models(['x']), [], Path('gs://b/out'))
