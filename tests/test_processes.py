"""Several processes train as one does, only one of them writes, and they end together."""

import json
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from slm.runs import processes, rundir

SIZES = {'embed': 16, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 2, 'head_dim': 8, 'mlp': 32}


def start(data, run, **more):
  settings = {
    'data.path': data, 'steps': 4, 'schedule.warmup': 1, 'log_every': 1, 'tensorboard': False,
    'eval.every': 2, 'eval.max_rows': 8, 'data.batch_size': 8, **more,
    **{f'model.{k}': v for k, v in SIZES.items()},
  }  # fmt: skip
  command = [sys.executable, '-m', 'slm.train', '--config=configs/base.py', f'--workdir={run}']
  command += [f'--config.{key}={value}' for key, value in settings.items()]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def several(data, run, *changes, count=2):
  """Start one process of `count` for each dict of changes."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  shared = {'distributed.enable': True, 'distributed.coordinator': address}
  shared['distributed.num_processes'] = count
  return [
    start(data, run, **shared, **{'distributed.process_id': i}, **more)
    for i, more in enumerate(changes)
  ]


def ended(process):
  """Wait for a process; return its status and the last line of its errors."""
  _, err = process.communicate(timeout=300)
  return process.returncode, err.strip().splitlines()[-1]


def test_two_processes_equal_one(tiny_data, tmp_path):
  two = several(tiny_data, tmp_path / 'two', {}, {})
  outputs = [process.communicate(timeout=300) for process in two]
  assert [process.returncode for process in two] == [0, 0], outputs
  one = start(tiny_data, tmp_path / 'one')
  out, err = one.communicate(timeout=300)
  assert one.returncode == 0, err
  read = lambda run, key: [line[key] for line in rundir.read_metrics(tmp_path / run) if key in line]
  for key in ('loss', 'eval_loss'):
    np.testing.assert_allclose(read('two', key), read('one', key), rtol=1e-5)
  assert read('two', 'step') == [1, 2, 3, 4]
  assert rundir.read_starts(tmp_path / 'two')[0]['environment']['processes'] == 2
  # Process 0 alone prints the result, and its cost counts both processes' devices.
  results = [[line for line in out.split('\n') if line.startswith('{')] for out, _ in outputs]
  assert [len(r) for r in results] == [1, 0]
  result = json.loads(results[0][0])
  assert result['tokens'] == json.loads(out.strip().split('\n')[-1])['tokens']
  assert np.isclose(result['device_seconds'], 2 * result['seconds'])


def test_processes_that_disagree_end_with_the_first_difference(tiny_data, tmp_path):
  two = several(tiny_data, tmp_path / 'run', {}, {'optim.b2': 0.9, 'log_every': 2})
  message = 'error: process 1 has another config than process 0: log_every was 1, now 2'
  assert [ended(process) for process in two] == [(1, message)] * 2
  assert not (tmp_path / 'run').exists()


def test_a_process_that_is_missing_or_lost_ends_the_others_in_one_line(tiny_data, tmp_path):
  (one,) = several(tiny_data, tmp_path / 'run', {'distributed.timeout': 2})
  status, line = ended(one)
  assert status == 1 and 'after 2 s not all 2 processes have met at distributed.coord' in line
  two = several(tiny_data, tmp_path / 'run', *[{'steps': 100_000, 'eval.every': 0}] * 2)
  while not (tmp_path / 'run/metrics.jsonl').exists() or not rundir.read_metrics(tmp_path / 'run'):
    assert two[1].poll() is None
    time.sleep(0.1)
  two[1].kill()
  two[1].communicate()
  status, line = ended(two[0])
  assert status == 1 and line.startswith('error: process 0: ')
  assert line.endswith('another process has ended; started again, all of them continue')


def test_processes_go_back_together(tiny_data, tmp_path):
  """A learning rate this high lets the loss spike at step 2, whatever the batch."""
  spikes = {'rewind.steps': 1, 'rewind.most': 1, 'checkpoint.every': 1, 'schedule.peak': 30.0}
  two = several(tiny_data, tmp_path / 'run', spikes, spikes)
  status, line = ended(two[0])
  assert status == 1 and 'step 2: loss ' in line and 'has gone back rewind.most=1 times' in line
  assert ended(two[1]) == (1, line.replace('process 0', 'process 1'))
  (entry,) = rundir.read_rewinds(tmp_path / 'run')
  assert (entry['step'], entry['to'], entry['next']) == (2, 1, 2)


def test_what_cannot_be_found_out_is_named_by_its_key(monkeypatch):
  cfg = {'coordinator': '', 'num_processes': 2, 'process_id': 0, 'timeout': 60}
  find_out = jax._src.distributed.State().initialize  # what the public function does first
  monkeypatch.setattr(jax.distributed, 'initialize', find_out)
  with pytest.raises(ValueError, match=r"distributed.coordinator='': "):
    processes.connect(cfg)
  with pytest.raises(ValueError, match=r"distributed.coordinator: .*host:port .*'nonsense'"):
    processes.connect(cfg | {'coordinator': 'nonsense'})
  with pytest.raises(ValueError, match='distributed.num_processes=0: '):
    processes.connect(cfg | {'coordinator': 'localhost:1', 'num_processes': 0})
