"""The same command on two processes trains as one process does, and one of them writes."""

import json
import socket
import subprocess
import sys

import numpy as np

from slm.runs import rundir

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


def test_two_processes_equal_one(tiny_data, tmp_path):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  shared = {'distributed.enable': True, 'distributed.coordinator': address}
  shared['distributed.num_processes'] = 2
  two = [
    start(tiny_data, tmp_path / 'two', **shared, **{'distributed.process_id': i}) for i in range(2)
  ]
  found = [process.communicate(timeout=120) for process in two]
  assert [process.returncode for process in two] == [0, 0], found
  one = start(tiny_data, tmp_path / 'one')
  out, err = one.communicate(timeout=120)
  assert one.returncode == 0, err
  read = lambda run, key: [line[key] for line in rundir.read_metrics(tmp_path / run) if key in line]
  for key in ('loss', 'eval_loss'):
    np.testing.assert_allclose(read('two', key), read('one', key), rtol=1e-5)
  assert read('two', 'step') == [1, 2, 3, 4]
  assert rundir.read_starts(tmp_path / 'two')[0]['environment']['processes'] == 2
  # Process 0 alone prints the result, and its cost counts both processes' devices.
  results = [[line for line in out.split('\n') if line.startswith('{')] for out, _ in found]
  assert [len(r) for r in results] == [1, 0]
  result = json.loads(results[0][0])
  assert result['tokens'] == json.loads(out.strip().split('\n')[-1])['tokens']
  assert np.isclose(result['device_seconds'], 2 * result['seconds'])
