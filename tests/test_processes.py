"""Real processes on loopback train as one does, whatever their number, and end together.

Four simulated devices in all are shared by 1, 2 or 4 processes. The commands are those that
`slm.launch --on=local` prints for the line of docs/machines.md.
"""

import itertools
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from slm.base import files
from slm.runs import launch, load, processes, rundir
from slm.weights import sharding

ROOT = Path(__file__).parent.parent
DEVICES, ROWS, STEPS = 4, 8, 8
STARTED = []  # ended after each test, however it went
LOSS = 'another process has ended; started again, all of them continue'
SMALL = {
  'data.batch_size': ROWS, 'steps': STEPS, 'schedule.warmup': 1, 'log_every': 1,
  'tensorboard': False, 'eval.every': 0, 'eval.max_rows': 12, 'eval.batch_size': 4,
  'checkpoint.every': 2, 'checkpoint.keep': 9, 'mesh.fsdp': 2, 'model.embed': 16,
  'model.num_layers': 1, 'model.num_heads': 2, 'model.num_kv_heads': 2, 'model.head_dim': 8,
  'model.mlp': 32,
}  # fmt: skip
# A Python that notes how many records a command reads, and the rows of each batch that it takes.
# INDEX:STEP:WHAT names a process that meets an error, or is killed, on taking a batch.
NOTING = """#!{python}
import json, os, runpy, signal, sys, zlib
sys.argv = sys.argv[2:]
index = dict(arg.split('=', 1) for arg in sys.argv[1:]).get('--config.distributed.process_id', '0')
from slm.data import loader
notes = open(f'{notes}/{{index}}', 'a')
def note(**line):
  notes.write(json.dumps(line) + chr(10))
  notes.flush()
read, take = loader.Split.read, loader.Loader.__next__
def reading(self, ids):
  note(split=self.name, records=ids[ids >= 0].tolist())
  return read(self, ids)
def taking(self):
  step = self.get_state()
  if '{fate}'.startswith(f'{{index}}:{{step}}:'):
    if '{fate}'.endswith('killed'):
      os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError('{fate}')
  batch = take(self)
  rows = batch['inputs'].reshape(-1, batch['inputs'].shape[-1])
  note(step=step, rows=[zlib.crc32(row.tobytes()) for row in rows])
  return batch
loader.Split.read, loader.Loader.__next__ = reading, taking
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
"""


def documented(data, run, **changes):
  """Return the words of the page's command of local processes, and those after its --."""
  page = (ROOT / 'docs/machines.md').read_text().replace('\\\n', ' ')
  (line,) = re.findall(r'^python -m slm.launch --on=local.*', page, re.M)
  words = shlex.split(line.replace('DATA', str(data)).replace('runs/slm-2', str(run)))
  words += [f'--config.{key}={value}' for key, value in {**SMALL, **changes}.items()]
  return words, words[words.index('--') + 1 :]


def environment(count):
  return [f'JAX_NUM_CPU_DEVICES={DEVICES // count}']


def noting(notes, fate=''):
  """Write the Python that notes into a new directory; return its path."""
  notes.mkdir()
  python = notes / 'python'
  python.write_text(NOTING.format(python=sys.executable, notes=notes, fate=fate))
  python.chmod(0o755)
  return str(python)


def several(count, data, run, fate='', changes=({},)):
  """Start processes; return them and the directory of their notes."""
  notes = run.with_name(f'{run.name}-{count}')
  given = {'nodes': count, 'python': noting(notes, fate), 'env': environment(count)}
  words = launch.processes(launch.make('local', documented(data, run)[1], given))
  keys = ([f'--config.{key}={value}' for key, value in c.items()] for c in changes)
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'cwd': ROOT}
  started = [
    subprocess.Popen([*command, *more], **pipes)
    for command, more in zip(words, itertools.chain(keys, itertools.repeat([])), strict=False)
  ]
  STARTED.extend(started)
  return started, notes


@pytest.fixture(autouse=True)
def none_is_left():
  yield
  while STARTED:
    process = STARTED.pop()
    process.kill()
    process.communicate()


def ended(process):
  """Wait for a process; return its status and the last line of its errors."""
  _, err = process.communicate(timeout=120)
  return process.returncode, err.strip().splitlines()[-1]


def noted(notes, count):
  """Return what each of some processes has noted."""
  lines = [(notes / str(i)).read_text().splitlines() for i in range(count)]
  return [[json.loads(line) for line in part] for part in lines]


def batches(notes, count):
  """Return {step: its rows}, joined in the order of the processes; those that all took."""
  parts = [
    {line['step']: line['rows'] for line in p if 'step' in line} for p in noted(notes, count)
  ]
  together = set.intersection(*map(set, parts))
  return {step: list(itertools.chain(*(part[step] for part in parts))) for step in together}


def losses(run):
  keys = ('loss', 'eval_loss')
  lines = rundir.read_metrics(run)
  return {line['step']: [line.get(key, 0.0) for key in keys] for line in lines}


def weights(run, step):
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  return jax.device_get(load.load(f'{run}@{step}', mesh).params())


def same(run, other, step, **tolerance):
  """Check the losses up to a step, and the weights there, against those of another run."""
  steps = range(1, step + 1)
  check = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
  check([losses(run)[s] for s in steps], [losses(other)[s] for s in steps], **tolerance)
  jax.tree.map(lambda a, b: check(a, b, **tolerance), weights(run, step), weights(other, step))


def test_runs_continue_with_fewer_processes(tiny_data, tmp_path):
  """Four processes, the last of which is killed; two by the page's command; one to the end."""
  alone, run = tmp_path / 'alone', tmp_path / 'run'
  # Connected to itself, one process adds what its devices have found in the order of several.
  with socket.create_server(('127.0.0.1', 0)) as server:
    connected = {'enable': True, 'coordinator': f'127.0.0.1:{server.getsockname()[1]}'}
  connected |= {'num_processes': 1, 'process_id': 0}
  changes = [{f'distributed.{key}': value for key, value in connected.items()}]
  (process,), undisturbed = several(1, tiny_data, alone, '', changes)
  started, notes = several(4, tiny_data, run, '3:5:killed')
  assert ended(started.pop())[0] == -signal.SIGKILL
  began = time.monotonic()
  for other in started:
    status, line = ended(other)
    assert (status, line.endswith(LOSS)) == (processes.LOST, True), line
    assert line.startswith('error: process ')
  assert time.monotonic() - began < 10
  assert process.wait(120) == 0, process.stderr.read()
  expected = batches(undisturbed, 1)
  assert list(expected) == list(range(STEPS))
  taken = batches(notes, 4)
  assert list(taken) == list(range(5)) and taken.items() < expected.items()
  same(run, alone, 2)

  # By the command of the page; process 0 is killed, on which JAX aborts the other.
  notes, (words, _) = tmp_path / 'two', documented(tiny_data, run)
  at = words.index('--')
  words[at:at] = [f'--env={environment(2)[0]}', f'--python={noting(notes, "0:7:killed")}']
  done = subprocess.run(
    [sys.executable, *words[1:]], capture_output=True, text=True, timeout=120, cwd=ROOT
  )
  assert done.returncode in (128 + signal.SIGKILL, processes.LOST), done.stderr
  assert re.search(rf'^\[1\] error: process .*{LOSS}$', done.stderr, re.M), done.stderr
  taken = batches(notes, 2)
  assert max(taken) == 6 and taken.items() < expected.items()
  same(run, alone, 4)
  assert [s['environment']['processes'] for s in rundir.read_starts(run)] == [4, 2]
  for part in noted(notes, 2):  # each reads its half of the rows, some of them ahead
    read = [line['records'] for line in part if line.get('split') == 'generic/train']
    assert {len(ids) for ids in read} == {ROWS // 2} and len(read) <= STEPS + 9

  (last,), notes = several(1, tiny_data, run)
  out, err = last.communicate(timeout=120)
  assert last.returncode == 0, err
  taken = batches(notes, 1)
  assert max(taken) == STEPS - 1 and taken.items() < expected.items()
  same(run, alone, STEPS, rtol=1e-6, atol=1e-7)
  assert json.loads(out) == files.read_json(run / 'result.json')


@pytest.mark.parametrize(
  ('fate', 'changes', 'message'),
  [
    ('', {'optim.b2': 0.9, 'log_every': 2},
     'process 1 has another config than process 0: log_every was 1, now 2'),
    ('1:0:a damaged record', {}, 'process 1: 1:0:a damaged record'),
  ],
)  # fmt: skip
def test_bad_input_of_one_process_ends_all_with_its_line(
  tiny_data, tmp_path, fate, changes, message
):
  started, _ = several(2, tiny_data, tmp_path / 'run', fate, ({}, changes))
  assert [ended(process) for process in started] == [(1, f'error: {message}')] * 2
  assert (tmp_path / 'run').exists() == bool(fate)
  assert not list(tmp_path.glob('run/*.lock'))


def test_a_process_that_is_missing_ends_the_others(tiny_data, tmp_path):
  one, other = several(2, tiny_data, tmp_path / 'run', '', [{'distributed.timeout': 1}] * 2)[0]
  other.kill()
  status, line = ended(one)
  other.communicate()
  assert status == processes.LOST
  assert 'after 1 s not all 2 processes have met at distributed.coord' in line


def test_processes_go_back_together(tiny_data, tmp_path):
  """A learning rate this high lets the loss spike at step 2, whatever the batch."""
  spikes = {'rewind.steps': 1, 'rewind.most': 1, 'checkpoint.every': 1, 'schedule.peak': 30.0}
  started, _ = several(2, tiny_data, tmp_path / 'run', '', [spikes] * 2)
  (status, line), other = map(ended, started)
  assert status == 1 and 'step 2: loss ' in line and 'has gone back rewind.most=1 times' in line
  assert other == (1, line)
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
