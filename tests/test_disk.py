"""Disks that are full, read-only or gone: one line, nothing lost, the same command continues."""

import contextlib
import os
import pathlib
import shutil
import subprocess

import pytest
import toy

from slm.base import files
from slm.data import prepare
from slm.runs import checkpoint, rundir
from slm.training import loop
from slm.training.recorder import Recorder


@pytest.fixture
def disk(tmp_path):
  """Return a function that mounts a file system of some bytes in memory, or changes it."""
  path = tmp_path / 'disk'
  path.mkdir()

  def mount(options):
    remount = ['-o', f'remount,{options}'] if os.path.ismount(path) else ['-o', options]
    done = subprocess.run(
      ['mount', '-t', 'tmpfs', *remount, 'tmpfs', str(path)], capture_output=True, text=True
    )
    if done.returncode:
      pytest.skip(f'needs to mount a tmpfs: {done.stderr.strip()}')
    return path

  yield mount
  if os.path.ismount(path):
    subprocess.run(['umount', '--lazy', str(path)], check=True)


def at_step(monkeypatch, step, act):
  """Call a function once, when the metrics of a step are read."""
  finish, done = Recorder._finish, []

  def hook(self, at, values):
    finish(self, at, values)
    if at == step and not done:
      done.append(act())

  monkeypatch.setattr(Recorder, '_finish', hook)


def losses(run):
  return [line['loss'] for line in rundir.read_metrics(run)]


def fill(folder):
  """Take all space that is left."""
  with contextlib.suppress(OSError), (folder / 'filler').open('wb', buffering=0) as f:
    while True:
      f.write(b'0' * 4096)


def test_a_disk_that_fills_up_while_training(disk, tiny_config_of, tmp_path, monkeypatch):
  config, folder = tiny_config_of(steps=6), disk('size=4m')
  with monkeypatch.context() as m:
    at_step(m, 3, lambda: fill(folder))
    with pytest.raises(OSError, match='no space on .*disk/run') as e:
      loop.train(config, folder / 'run')
  assert '\n' not in str(e.value)
  assert not checkpoint.damage(folder / 'run/checkpoints/2')
  (folder / 'filler').unlink()
  loop.train(config, folder / 'run')
  loop.train(config, tmp_path / 'undisturbed')
  assert losses(folder / 'run') == losses(tmp_path / 'undisturbed')


def test_a_disk_that_fills_up_while_preparing(disk, tmp_path):
  sets, folder = toy.corpus(tmp_path), disk('size=100k')
  cfg = toy.config(tmp_path, sets, out=str(folder / 'out'))
  with pytest.raises(OSError, match='no space on .*disk/out') as e:
    prepare.prepare(cfg)
  assert '\n' not in str(e.value) and not list(folder.rglob('*.tmp'))
  disk('size=16m')
  made = prepare.prepare(cfg)
  whole = files.read_json(pathlib.Path(toy.prepared()) / 'manifest.json')
  hashes = lambda m: {k: s['sha256'] for k, splits in m['sets'].items() for s in splits.values()}
  assert hashes(made) == hashes(whole)


def test_data_may_be_read_only_and_a_run_may_not(disk, tiny_data, tiny_config_of, tmp_path):
  folder = disk('size=16m')
  shutil.copytree(tiny_data, folder / 'data')
  disk('ro')
  config = tiny_config_of(steps=2, **{'data.path': str(folder / 'data')})
  assert loop.train(config, tmp_path / 'run')['steps'] == 2
  with pytest.raises(OSError, match='Read-only file system'):
    loop.train(config, folder / 'run')


@pytest.mark.parametrize('step', [3, 4])
def test_a_run_directory_that_vanishes_ends_the_run(step, tiny_config_of, tmp_path, monkeypatch):
  """Before a step that is only recorded, or one that is saved."""
  run = tmp_path / 'run'
  at_step(monkeypatch, step, lambda: run.rename(tmp_path / 'elsewhere'))
  with pytest.raises(OSError, match=f'{run}.*: was removed while it was written') as e:
    loop.train(tiny_config_of(steps=8), run)
  assert '\n' not in str(e.value)
  # A save that was being written may have made a part of the directory anew, but no run.
  assert not (run / 'config.json').exists() and not (run / 'result.json').exists()
