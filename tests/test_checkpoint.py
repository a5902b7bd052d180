"""Checkpoints that are damaged, cannot be saved or are of an earlier version."""

import errno
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from slm import checkpoint as command
from slm.base import console, files
from slm.objectives import heldout
from slm.runs import checkpoint, load, rundir
from slm.training import loop
from slm.weights import sharding


@pytest.fixture(scope='module')
def whole(tiny_config_of, tmp_path_factory):
  """Train six steps, with checkpoints of 2, 4 and 6."""
  run = tmp_path_factory.mktemp('whole') / 'run'
  loop.train(tiny_config_of(steps=6, **{'checkpoint.keep': 3}), run)
  return run


@pytest.fixture
def run(whole, tmp_path):
  """Copy that run, as if it had not finished."""
  shutil.copytree(whole, tmp_path / 'run')
  (tmp_path / 'run/result.json').unlink()
  return tmp_path / 'run'


def flip(run, item):
  """Flip bits in the middle of the largest file of a checkpoint's item."""
  path = max((run / 'checkpoints' / item).rglob('*'), key=lambda p: p.is_file() * p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0xFF
  path.write_bytes(data)
  return path


def again(run, tiny_config_of):
  return loop.train(tiny_config_of(steps=6, **{'checkpoint.keep': 3}), run)


def losses(run):
  return [line['loss'] for line in rundir.read_metrics(run)]


def test_a_damaged_checkpoint_is_named_and_training_goes_on_from_the_one_before(
  whole, run, tiny_config_of, capsys
):
  path = flip(run, '6/opt')
  again(run, tiny_config_of)
  told = capsys.readouterr().err
  assert f'{path}: is not as it was written: moved to {run}/damaged/6' in told
  assert 'going on from step 4' in told
  assert losses(run) == losses(whole)
  assert not checkpoint.damage(run / 'checkpoints/6')


def test_a_missing_or_emptied_file_is_damage_too(run, tiny_config_of, capsys):
  (run / 'checkpoints/6/opt/manifest.ocdbt').unlink()
  (run / 'checkpoints/4/_CHECKPOINT_METADATA').write_text('')
  (run / 'checkpoints/2/checksums.json').write_text('{"a')
  with pytest.raises(ValueError, match=r'no checkpoint is sound: .*6/opt/manifest.ocdbt: is miss'):
    again(run, tiny_config_of)
  assert sorted(p.name for p in (run / 'checkpoints').iterdir()) == ['2', '4', '6']  # as it was


def test_the_rest_of_an_outdated_checkpoint_is_removed(whole, run, tiny_config_of):
  """A process may be killed while Orbax removes one, file by file."""
  for name in ('_CHECKPOINT_METADATA', 'checksums.json'):
    (run / 'checkpoints/2' / name).unlink()
  again(run, tiny_config_of)
  assert checkpoint.saved_steps(run / 'checkpoints') == [6, 4]
  assert [wrong for _, wrong in checkpoint.verify(run)] == ['', '']
  assert losses(run) == losses(whole)


def test_damaged_weights_are_never_loaded(run, tiny_config_of):
  path, mesh = flip(run, '6/theta'), sharding.make_mesh({'data': 8})
  with pytest.raises(
    ValueError, match=f'{path}: is not as it was written; sound: {run}@2, {run}@4'
  ):
    load.load(run, mesh)
  assert load.load(f'{run}@4', mesh).step == 4
  flip(run, '4/opt')  # not what is served
  assert load.load(f'{run}@4', mesh).step == 4


def test_checkpoints_without_checksums_load_and_what_cannot_be_read_is_one_line(run):
  mesh = sharding.make_mesh({'data': 8})
  (run / 'checkpoints/6/checksums.json').unlink()
  assert load.load(run, mesh).step == 6
  shutil.rmtree(run / 'checkpoints/6/theta/ocdbt.process_0')
  with pytest.raises(OSError, match='checkpoints: step 6 cannot be read ') as e:
    load.load(run, mesh)
  assert '\n' not in str(e.value) and len(str(e.value)) < 600


def verify(capsys, *refs):
  """Return what `slm.checkpoint verify` prints, and its error or ''."""
  try:
    command.main(['slm.checkpoint', 'verify', *map(str, refs)])
  except ValueError as e:
    return capsys.readouterr().out.splitlines(), str(e)
  return capsys.readouterr().out.splitlines(), ''


def state(run):
  return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob('*')}


def test_verify_names_damaged_files_and_changes_nothing(whole, run, capsys):
  intact = [f'{whole}@{step}: as it was written' for step in (2, 4, 6)]
  assert verify(capsys, whole) == (intact, '')
  path, before = flip(run, '4/theta'), state(run)
  (lines, error) = verify(capsys, whole, run)
  assert lines[:3] == intact and lines[4] == f'{run}@4: {path}: is not as it was written'
  assert error == f'1 of 6 checkpoints failed: {path}: is not as it was written'
  assert verify(capsys, f'{run}@6') == ([f'{run}@6: as it was written'], '')
  assert state(run) == before


def test_verify_does_not_pass_what_it_cannot_check(run, capsys):
  (run / 'checkpoints/6/checksums.json').unlink()
  assert verify(capsys, run)[1].endswith('checkpoints/6: has no checksums.json to compare with')
  assert verify(capsys, f'{run}@5') == (
    [],
    f'{run}: has no checkpoint of step 5, found steps [2, 4, 6]',
  )
  shutil.rmtree(run / 'checkpoints')
  assert verify(capsys, run) == ([], f'{run}: holds no checkpoints, the run has not saved yet')


def test_a_restart_seals_what_a_killed_process_had_saved(run, tiny_config_of, capsys):
  (run / 'checkpoints/6/checksums.json').unlink()  # it was killed between the two
  again(run, tiny_config_of)
  assert verify(capsys, run) == ([f'{run}@{step}: as it was written' for step in (2, 4, 6)], '')


@pytest.mark.parametrize('signals', [1, 2])
def test_a_signal_while_a_checkpoint_is_read_is_no_damage(
  signals, whole, run, tiny_config_of, monkeypatch
):
  """The first waits until it is read, the second does not; Orbax makes errors of its own of it."""
  orbax, read = checkpoint.ocp.training.Checkpointer.load_checkpointables, []

  def load_checkpointables(self, step, abstract):
    try:
      for _ in range(signals):
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as e:
      raise ValueError('while reading array index') from e
    read.append(step)
    return orbax(self, step, abstract)

  before = signal.signal(signal.SIGTERM, console._interrupt)
  monkeypatch.setattr(
    checkpoint.ocp.training.Checkpointer, 'load_checkpointables', load_checkpointables
  )
  try:
    with pytest.raises(console.Interrupted):
      again(run, tiny_config_of)
    assert signal.getsignal(signal.SIGTERM) is console._interrupt
  finally:
    signal.signal(signal.SIGTERM, before)
  assert read == [6][: 2 - signals]
  monkeypatch.undo()
  again(run, tiny_config_of)
  assert losses(run) == losses(whole)


def test_multiples_are_kept_and_named_like_other_checkpoints(tiny_config_of, tmp_path):
  config = tiny_config_of(steps=8, **{'checkpoint.every': 4, 'checkpoint.keep_every': 3})
  loop.train(config, tmp_path / 'run')
  assert checkpoint.saved_steps(tmp_path / 'run/checkpoints') == [8, 6, 3]
  assert load.load(f'{tmp_path}/run@3', sharding.make_mesh({'data': 8})).step == 3
  with pytest.raises(ValueError, match='checkpoint.keep_every: expected steps, or 0 for none'):
    loop.train(config | {'checkpoint': {'keep_every': -1}}, tmp_path / 'other')


@pytest.mark.parametrize(
  ('where', 'left'),
  [('saving', 'step 2 is intact'), ('sealing', 'step 4 exists, without checksums')],
)
def test_a_full_disk_is_one_line_that_names_what_is_intact(
  where, left, tiny_config_of, tmp_path, monkeypatch
):
  """In Orbax, which raises its own errors, or in the sealing of the checkpoint."""
  orbax = checkpoint.ocp.training.Checkpointer.save_checkpointables_async
  sha256 = files.sha256

  def save(self, step, *args, **more):
    if step == 4 and where == 'saving':
      raise ValueError('RESOURCE_EXHAUSTED') from OSError(errno.ENOSPC, 'No space left on device')
    return orbax(self, step, *args, **more)

  def digest(path):
    if '/4/' in str(path):
      raise OSError(errno.ENOSPC, 'No space left on device')
    return sha256(path)

  monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, 'save_checkpointables_async', save)
  if where == 'sealing':
    monkeypatch.setattr(files, 'sha256', digest)
  config = tiny_config_of(steps=6)
  message = rf'no space on .*run/checkpoints while saving step 4 \(needs about 1 MB\); {left}'
  with pytest.raises(OSError, match=message):
    loop.train(config, tmp_path / 'run')
  monkeypatch.undo()
  loop.train(config, tmp_path / 'run')
  loop.train(config, tmp_path / 'undisturbed')
  assert losses(tmp_path / 'run') == losses(tmp_path / 'undisturbed')


def test_an_evaluation_that_is_not_finite_is_an_error(whole, tiny_data, monkeypatch):
  theta = load.Loaded.params
  poison = lambda self, *c: jax.tree.map(lambda w: w * np.nan, theta(self, *c))  # noqa: E731
  monkeypatch.setattr(load.Loaded, 'params', poison)
  with pytest.raises(FloatingPointError, match=r'the loss on court/test is not finite'):
    heldout.run(whole, tiny_data, ['court/test'], sharding.make_mesh({'data': 8}), 8)
