"""Writers of metrics: what wandb, MLflow and Trackio are told, and the real packages."""

import importlib.machinery
import types
import typing

import pytest

from slm.base import files
from slm.runs import config, rundir
from slm.training import loop, writers


@pytest.fixture
def calls(monkeypatch):
  """Put packages in the place of the real ones; return what is called, in order."""
  made = []

  def note(package, name, result=None):
    def called(*args, **named):
      made.append((package, name, args, named))
      return result

    return called

  def install(package, **functions):
    module = types.ModuleType(package)
    module.__spec__ = importlib.machinery.ModuleSpec(package, None)
    vars(module).update(functions)
    monkeypatch.setitem(writers.sys.modules, package, module)

  run = types.SimpleNamespace(log=note('wandb', 'log'), finish=note('wandb', 'finish'))
  install('wandb', init=note('wandb', 'init', run))
  started = types.SimpleNamespace(info=types.SimpleNamespace(run_id='id-of-mlflow'))
  quiet = ('set_experiment', 'log_params', 'log_metrics', 'flush_async_logging', 'end_run')
  install('mlflow', start_run=note('mlflow', 'start_run', started),
          **{name: note('mlflow', name) for name in quiet})  # fmt: skip
  install('trackio', **{name: note('trackio', name) for name in ('init', 'log', 'finish')})
  for name in ('WANDB_PROJECT', 'MLFLOW_EXPERIMENT_NAME', 'TRACKIO_PROJECT'):
    monkeypatch.delenv(name, raising=False)
  return made


def test_a_run_that_is_started_again_continues_its_curves(calls, tiny_config, tmp_path):
  run, c, starts = tmp_path / 'run', tiny_config, []
  c.schedule.name, c.tensorboard = 'constant', True
  for c.steps, c.writers in (
    (2, ('wandb', 'mlflow', 'trackio')),
    (4, ('trackio', 'mlflow', 'wandb')),
  ):
    calls.clear()
    loop.train(c.to_dict(), run)
    starts.append(list(calls))
    of = lambda package: [(name, args, named) for p, name, args, named in calls if p == package]
    lines = [x for x in rundir.read_metrics(run) if x['step'] > c.steps - 2]
    values = [(x.pop('step'), x) for x in lines]
    settings = files.read_json(run / 'config.json')
    identity = files.read_json(run / 'writers.json')

    (init, *logs, finish) = of('wandb')
    named = {'project': 'slm', 'name': 'run', 'id': identity['wandb'], 'resume': 'allow'}
    assert init == ('init', (), {**named, 'config': settings, 'dir': str(run)})
    assert logs == [('log', (x,), {'step': step}) for step, x in values]
    assert finish == ('finish', (), {'exit_code': 0})

    (init, *logs, finish) = of('trackio')
    named = {'name': identity['trackio'], 'resume': 'allow', 'config': settings}
    assert init == ('init', ('slm',), named) and identity['trackio'].startswith('run-')
    assert logs == [('log', (x,), {'step': step}) for step, x in values]
    assert finish == ('finish', (), {})

    *begin, one, two, flush, end = of('mlflow')
    asynchronous = [('log_metrics', (x,), {'step': n, 'synchronous': False}) for n, x in values]
    assert [one, two] == asynchronous
    assert [flush, end] == [('flush_async_logging', (), {}), ('end_run', ('FINISHED',), {})]
    if c.steps == 2:
      experiment, start, *params = begin
      assert experiment == ('set_experiment', ('slm',), {})
      assert start == ('start_run', (), {'run_name': 'run'})
      parts = [args[0] for name, args, _ in params if name == 'log_params']
      assert len(parts) == len(params) and all(len(part) <= 100 for part in parts)
      flat = {key: value for part in parts for key, value in part.items()}
      assert flat['model.embed'] == 16 and flat['seed'] == 0
    else:
      assert begin == [('start_run', (), {'run_id': 'id-of-mlflow'})]
  assert {x[3]['id'] for start in starts for x in start if x[:2] == ('wandb', 'init')} == {
    files.read_json(run / 'writers.json')['wandb']
  }
  assert len(list((run / 'tb').iterdir())) == 2


def test_a_writer_that_cannot_start_is_one_line_and_the_others_end(calls, tmp_path, monkeypatch):
  def refuse(*_, **__):
    raise RuntimeError('no such server')

  monkeypatch.setattr(writers.sys.modules['trackio'], 'init', refuse)
  cfg = minimal(writers=['wandb', 'trackio'], tensorboard=False)
  with pytest.raises(ValueError, match='^writers: trackio cannot start: no such server$'):
    writers.start(cfg, tmp_path, 0)
  assert calls[-1] == ('wandb', 'finish', (), {'exit_code': 1})


def test_none_is_imported_unless_asked_and_a_missing_package_is_one_line(
  tiny_config, tmp_path, monkeypatch
):
  assert config.defaults()['writers'] == ()
  assert writers.start(minimal(tensorboard=False), tmp_path, 0) == []
  monkeypatch.setattr(writers.importlib.util, 'find_spec', lambda name: None)
  for name in ('wandb', 'mlflow', 'trackio'):
    tiny_config.writers = (name,)
    with pytest.raises(
      ValueError, match=rf"^writers: {name} is not .*: pip install 'slm\[{name}\]'"
    ):
      loop.train(tiny_config.to_dict(), tmp_path / 'run')
  tiny_config.writers = ('wandb', 'neptune')
  with pytest.raises(ValueError, match="^writers: expected one of wandb.*, found 'neptune'"):
    loop.train(tiny_config.to_dict(), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  (names,) = {typing.get_args(typing.get_type_hints(config.RunConfig)['writers'])[0]}
  assert {*typing.get_args(names), 'tensorboard'} == set(writers.WRITERS)


def minimal(**keys):
  """Return a config of no data."""
  return config.read({'model': {'name': 'decoder', 'vocab': 8}, 'data': {}, **keys})


@pytest.mark.parametrize('name', ['wandb', 'mlflow', 'trackio'])
def test_the_real_package_keeps_one_run_of_two_starts(name, tmp_path, monkeypatch):
  pytest.importorskip(name)
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path}/mlflow.db')
  if name == 'trackio':  # it has read TRACKIO_DIR when it was imported
    storage = importlib.import_module('trackio.sqlite_storage')
    for module in ('trackio.utils', 'trackio.sqlite_storage'):
      monkeypatch.setattr(f'{module}.TRACKIO_DIR', tmp_path / 'trackio')
  run = tmp_path / 'run'
  run.mkdir()
  cfg = minimal(writers=[name], tensorboard=False)
  for first in (0, 2):
    started = writers.start(cfg, run, first)
    for step in (first + 1, first + 2):
      started[0].log(step, {'loss': 1 / step, 'tokens': 100 * step})
    writers.finish(started, failed=False)
  identity = files.read_json(run / 'writers.json')[name]
  if name == 'wandb':
    assert len(list(run.glob(f'wandb/offline-run-*-{identity}/run-{identity}.wandb'))) == 2
    return
  if name == 'mlflow':
    mlflow = importlib.import_module('mlflow')
    seen = [(m.step, m.value) for m in mlflow.MlflowClient().get_metric_history(identity, 'loss')]
    found = mlflow.get_run(identity)
    assert found.info.run_name == 'run' and found.info.status == 'FINISHED'
    assert found.data.params['model.vocab'] == '8'
  else:
    seen = [(x['step'], x['loss']) for x in storage.SQLiteStorage.get_logs('slm', identity)]
  assert seen == [(step, 1 / step) for step in (1, 2, 3, 4)]
