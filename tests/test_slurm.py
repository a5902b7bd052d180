"""A real Slurm on loopback runs the printed script: a killed and a stopped job continue."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm.base import files
from slm.runs import rundir

ROOT = Path(__file__).parent.parent
DAEMONS = ('munged', 'slurmctld', 'slurmd')
MISSING = [name for name in DAEMONS if not shutil.which(name)]
pytestmark = [
  pytest.mark.skipif(
    bool(MISSING), reason=f'needs {", ".join(MISSING)} (Debian: slurm-wlm, munge)'
  ),
  pytest.mark.skipif(os.geteuid() != 0, reason='slurmd starts jobs as root'),
]
# Nothing of the host but its loopback interface is used. Two empty files stand for GPUs, of
# which JAX makes two processes; cred_expire is how long a requeued job waits.
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0
KillWait=5
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def until(condition, seconds, what):
  """Wait until a function returns something true, and return it."""
  end = time.monotonic() + seconds
  while not (found := condition()):
    assert time.monotonic() < end, f'after {seconds} s: {what()}'
    time.sleep(0.1)
  return found


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
  """Start munged, slurmctld and slurmd; return call(*words) -> the output of a Slurm command."""
  root = tmp_path_factory.mktemp('slurm')
  sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(2)]
  ports = [s.getsockname()[1] for s in sockets]
  for s in sockets:
    s.close()
  for name in ('state', 'spool'):
    (root / name).mkdir()
  (root / 'slurm.conf').write_text(CONFIG.format(root=root, ports=ports))
  for i in range(2):
    (root / f'gpu{i}').touch()
  (root / 'gres.conf').write_text(f'Name=gpu File={root}/gpu[0-1]\n')
  (root / 'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\n')
  (root / 'key').write_bytes(os.urandom(128))
  (root / 'key').chmod(0o600)
  environment = {**os.environ, 'SLURM_CONF': str(root / 'slurm.conf')}
  environment |= {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}

  def call(*words, **more):
    done = subprocess.run(words, capture_output=True, text=True, env=environment, **more)
    assert done.returncode == 0, f'{shlex.join(words)}: {done.stdout}{done.stderr}'
    return done.stdout

  commands = [
    ['munged', '--foreground', '--force', f'--key-file={root}/key', f'--log-file={root}/munged.log',
     f'--pid-file={root}/munged.pid', f'--seed-file={root}/seed', f'--socket={root}/munge.socket'],
    ['slurmctld', '-D', '-f', f'{root}/slurm.conf'],
    ['slurmd', '-D', '-f', f'{root}/slurm.conf', '-N', 'localhost'],
  ]  # fmt: skip
  daemons = []
  try:
    for command in commands:
      with (root / f'{command[0]}.out').open('w') as out:
        daemons.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
      if command[0] == 'munged':
        until((root / 'munge.socket').exists, 20, (root / 'munged.out').read_text)
    idle = lambda: (
      'idle'
      in subprocess.run(
        ['sinfo', '-h', '-o', '%T'], capture_output=True, text=True, env=environment
      ).stdout
    )
    logs = lambda: '\n'.join(p.read_text()[-1500:] for p in sorted(root.glob('*.[lo][ou][gt]')))
    until(idle, 30, logs)
    yield call
    call('scancel', '--me')  # what a test that failed left running outlives its daemons
    until(lambda: not call('squeue', '-h', '-t', 'all', '-o', '%T').count('ING'), 30, logs)
  finally:
    for daemon in reversed(daemons):
      daemon.terminate()
    for daemon in daemons:
      daemon.wait(30)


def test_a_job_that_is_killed_and_stopped_continues_to_its_end(slurm, tiny_data, tmp_path):
  run, last = tmp_path / "it's a $RUN", 300
  settings = {
    'data.path': tiny_data, 'data.batch_size': 4, 'steps': last, 'schedule.warmup': 1,
    'log_every': 1, 'tensorboard': False, 'eval.every': 0, 'eval.max_rows': 8,
    'checkpoint.every': 20, 'model.embed': 16, 'model.num_layers': 1, 'model.num_heads': 2,
    'model.num_kv_heads': 2, 'model.head_dim': 8, 'model.mlp': 32,
  }  # fmt: skip
  keys = [f'--config.{key}={value}' for key, value in settings.items()]
  command = [
    sys.executable,
    '-m',
    'slm.launch',
    '--on=slurm',
    '--gpus=2',
    '--time=10',
    '--grace=60',
  ]
  command += ['--submit', '--', 'train', f'--workdir={run}', *keys]
  slurm_job = re.search(r'Submitted batch job (\d+)', slurm(*command, cwd=tmp_path))[1]
  log = tmp_path / f'slurm-{slurm_job}.out'
  about = lambda: slurm('scontrol', 'show', 'job', slurm_job)
  seen = lambda: f'{about()}\n{log.read_text() if log.exists() else ""}'
  starts = lambda n: f'Restarts={n} ' in about() and 'JobState=RUNNING' in about()
  steps = lambda: len(rundir.read_metrics(run))

  until(lambda: steps() > 25, 120, seen)  # a checkpoint is saved every 20
  listed = slurm('scontrol', 'listpids', slurm_job, 'localhost')
  (one,) = re.findall(rf'^ *(\d+) +{slurm_job} +0 +1 +1 *$', listed, re.M) or [listed]
  os.kill(int(one), signal.SIGKILL)  # the second of two processes
  until(lambda: starts(1), 60, seen)
  before = rundir.read_metrics(run)
  until(lambda: steps() > len(before) + 5, 120, seen)
  slurm('scancel', '--signal=TERM', slurm_job)  # what Slurm sends before the time limit
  until(lambda: starts(2), 60, seen)
  until(lambda: 'JobState=COMPLETED' in about(), 120, seen)

  output = log.read_text()
  assert re.search(r'another process has ended; started again, all of them continue', output)
  (saved,) = set(re.findall(r'saved step (\d+), the same command continues', output))
  assert len(before) < int(saved) < last
  lines = rundir.read_metrics(run)
  assert [line['step'] for line in lines] == [*range(1, last + 1)]
  assert lines[:20] == before[:20]  # with their times: not trained again
  after_kill, after_stop = rundir.restarts(run)
  assert 20 <= after_kill <= len(before) and after_stop == int(saved)
  assert {start['environment']['processes'] for start in rundir.read_starts(run)} == {2}
  assert files.read_json(run / 'result.json')['steps'] == last


def test_a_job_that_is_cancelled_is_not_queued_again(slurm, tmp_path):
  stops = tmp_path / 'python'
  stops.write_text("#!/bin/sh\ntrap 'exit 143' TERM\ntouch started\nwhile :; do sleep 0.1; done\n")
  stops.chmod(0o755)
  command = [
    sys.executable,
    '-m',
    'slm.launch',
    '--on=slurm',
    f'--python={stops}',
    '--submit',
    '--',
  ]
  printed = slurm(*command, 'train', '--config.data.path=DATA', '--workdir=RUN', cwd=tmp_path)
  slurm_job = re.search(r'Submitted batch job (\d+)', printed)[1]
  about = lambda: slurm('scontrol', 'show', 'job', slurm_job)
  until((tmp_path / 'started').exists, 60, about)
  slurm('scancel', slurm_job)
  until(lambda: 'EndTime=20' in about() and 'COMPLETING' not in about(), 60, about)
  time.sleep(3)
  assert 'JobState=CANCELLED' in about() and 'Restarts=0 ' in about()
