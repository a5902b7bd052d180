"""How runs went, read from their directories: speed, MFU, memory, phases, restarts."""

import json
import subprocess
import sys

import numpy as np
import pytest
import studies

from slm.reporting import comparison, course, figures, report
from slm.runs import ledger, rundir
from slm.training import loop
from slm.weights.chips import CHIPS


def make(path, kinds=('cpu',), steps=40, **more):
  """Write a run that sees 100 tokens per step at 50 per second; it changes machine every 20."""
  studies.write_run(path, 'pretrain', 1e14, {})
  starts = [{'step': 20 * i, 'code': '', 'environment': {'device_kind': k}}
            for i, k in enumerate(kinds)]  # fmt: skip
  studies.write(path / 'starts.json', starts)
  lines = [
    {'step': n, 'loss': 3.0, 'lr': 1e-3, 'grad_norm': 1.0 + n, 'tokens': 100 * n, 'seconds': 2 * n,
     'flops': 1e14 * n, 'device_seconds': 4 * n, **more}
    for n in range(10, steps + 1, 10)
  ]  # fmt: skip
  (path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


def test_speed_and_mfu_are_of_training_between_two_lines_and_of_the_chip_then(tmp_path):
  run = course.read(make(tmp_path / 'run', kinds=('TPU v4', 'cpu', 'TPU v5 lite'), steps=60))
  tokens, speed = run.curves['speed']
  np.testing.assert_array_equal(tokens, [1000, 2000, 3000, 4000, 5000, 6000])
  np.testing.assert_allclose(speed, 50)
  # 1e14 FLOPs in 4 device-seconds, per cent of the peak; that of a CPU is not known.
  shares = [100 * 25e12 / CHIPS[name].flops for name in ('tpu-v4', 'tpu-v5e')]
  np.testing.assert_array_equal(run.curves['mfu'][0], [1000, 2000, 5000, 6000])
  np.testing.assert_allclose(run.curves['mfu'][1], np.repeat(shares, 2))
  assert run.restarts == [2000, 4000]
  assert 'device_memory' not in run.curves and 'host_memory' not in run.curves
  assert course.without_mfu([run]) == 'No MFU of cpu: its peak is not known.'


def test_a_long_curve_keeps_its_spikes(tmp_path):
  path = make(tmp_path / 'run', steps=50_000)
  lines = rundir.read_metrics(path)
  lines[1234]['grad_norm'] = 1e9
  (path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  tokens, norms = course.read(path).curves['grad_norm']
  assert len(tokens) == 1000 and tokens[-1] == 5_000_000 and norms.max() == 1e9


def test_a_page_shows_runs_that_were_never_evaluated(tmp_path):
  paths = [make(tmp_path / f'run-{i}', host_peak_bytes=2e9 * (i + 1)) for i in range(20)]
  starts = rundir.read_starts(paths[0])
  studies.write(paths[0] / 'starts.json', [{**starts[0], 'restarts': [0, 25]}])
  (tmp_path / 'new').mkdir()
  for name in ('config.json', 'starts.json'):
    (tmp_path / 'new' / name).write_bytes((paths[1] / name).read_bytes())
  empty = tmp_path / 'new/metrics.jsonl'
  empty.write_text('')
  models = comparison.models([*map(str, paths), str(tmp_path / 'new')])
  answer = report.report(models, comparison.shared_sets(models), tmp_path / 'out')
  assert [line.partition(':')[0] for line in answer] == [
    'No set that all of these runs were evaluated on', str(empty)]  # fmt: skip
  html = (tmp_path / 'out/report.html').read_text()
  assert all(f'id="plot-{x}"' in html for x in ('training', 'optimiser', 'speed', 'phases'))
  assert 'MFU, %' not in html and 'No MFU of cpu: its peak is not known.' in html
  assert 'peak memory of the host, GB' in html and 'A dotted line is a restart' in html
  for plot in ('training', 'optimiser', 'speed', 'phases'):
    svg = (tmp_path / f'out/plots/{plot}.svg').read_text()
    assert all(f'>{path}<' in svg for path in paths), plot
  table = (tmp_path / 'out/table.md').read_text()
  assert f'| {paths[0]} | 40 of 1,000 | 4k | 3.0000 | – | 50 | – | 80 s | 2 |' in table
  assert len({figures.style(i) for i in range(64)}) == 64


def test_damaged_metrics_are_one_line_that_names_the_file(tmp_path):
  path = make(tmp_path / 'run')
  text = (path / 'metrics.jsonl').read_text()
  (path / 'metrics.jsonl').write_text(text[:-30])  # as a crash leaves it
  assert [line['step'] for line in course.read(path).lines] == [10, 20, 30]
  for damage in ('"step": 2\0', '"step" 20', '20'):
    (path / 'metrics.jsonl').write_text(text.replace('"step": 20', damage))
    with pytest.raises(ValueError, match=rf'{path}/metrics.jsonl: line 2 of 4 is damaged$'):
      course.read(path)
  command = [sys.executable, '-m', 'slm.report', str(path), f'--out={tmp_path / "out"}']
  done = subprocess.run(command, capture_output=True, text=True)
  message = f'error: {path}/metrics.jsonl: line 2 of 4 is damaged\n'
  assert done.returncode == 1 and done.stderr.endswith(message)
  assert not (tmp_path / 'out').exists()


def test_training_records_time_by_phase_memory_and_restarts(tiny_config, tmp_path, monkeypatch):
  run, c = tmp_path / 'run', tiny_config
  c.schedule.name, c.checkpoint.every = 'constant', 1
  c.steps = 2
  loop.train(c.to_dict(), run)
  (_, first) = rundir.read_metrics(run)
  assert 1e7 < first['host_peak_bytes'] < 1e12 and 'device_peak_bytes' not in first
  monkeypatch.setattr(ledger, 'jax', Counted)
  c.steps = 4
  loop.train(c.to_dict(), run)
  last = rundir.read_totals(run)
  assert last['compile_device_seconds'] > first['compile_device_seconds'] > 0
  assert last['save_device_seconds'] > rundir.read_metrics(run)[-1]['save_device_seconds'] > 0
  assert rundir.restarts(run) == [2]
  was = course.read(run)
  assert was.restarts == [was.lines[1]['tokens']]
  assert list(was.seconds) == ['pretrain', 'evaluate', 'compile', 'save']
  assert was.seconds['compile'] == last['compile_device_seconds']
  assert was.curves['device_memory'][1].tolist() == [3.0, 3.0]
  (entry, _) = ledger.read_ledger(run)['phases']
  assert entry['peak_memory_bytes'] == 3e9


class Device:
  """A device that counts its memory."""

  device_kind = 'TPU v4'

  def __init__(self, peak=0):
    self.peak = peak

  def memory_stats(self):
    return {'peak_bytes_in_use': self.peak}


class Counted:
  """What the ledger asks of JAX, where devices count their memory."""

  device_count = staticmethod(lambda: 2)
  devices = local_devices = staticmethod(lambda: [Device(2e9), Device(3e9)])
