"""Commands for other machines: the printed text, its quoting, and what is checked before it."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from absl import flags

from slm.runs import foreground, launch

ROOT = Path(__file__).parent.parent
# What a shell, sbatch, YAML and Kubernetes could each misread.
AWKWARD = [
  '--workdir=/runs/it\'s "mine" $HOME',
  '--config.eval.set=$(date) `x` \\ {a: b} # -- é\n$$',
]
TRAIN = ['train', '--config=configs/pretrain.py', '--config.data.path=DATA', *AWKWARD]
ENV = ["A=a 'b' $(C)", 'B=']


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
  monkeypatch.chdir(ROOT)


def text(on, command=TRAIN, **given):
  job = launch.make(on, command, given)
  return launch.TARGETS[on].template(job)


def words(line):
  """Return what bash makes of a line, by bash itself."""
  done = subprocess.run(
    ['bash', '-c', f'show() {{ printf "%s\\0" "$@"; }}\nshow {line}'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split('\0')[:-1]


def python(on, *more, command=TRAIN):
  return [launch.TARGETS[on].python, '-m', f'slm.{command[0]}', *command[1:], *more]


def test_slurm_script():
  script = text(
    'slurm', nodes=4, gpus=8, time='1-00:00:00', partition='a100', env=ENV, dir='/my $x'
  )
  assert subprocess.run(['bash', '-n'], input=script, text=True).returncode == 0
  head, rest = script.split("cd '/my $x' || exit\n")
  assert head == (
    '#!/usr/bin/env bash\n#SBATCH --job-name=it-s-mine-home\n#SBATCH --nodes=4\n'
    '#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n#SBATCH --time=1-00:00:00\n'
    '#SBATCH --partition=a100\n#SBATCH --signal=TERM@300\n#SBATCH --open-mode=append\n'
    '#SBATCH --requeue\n'
  )
  command, after = rest.split('\nstatus=$?\n')
  expected = ['srun', 'env', *ENV, *python('slurm', '--config.distributed.enable=True')]
  assert words(command) == shlex.split(command) == expected
  assert after == (
    '# Ended by a signal (time limit, memory) or a lost process, not by an error: continue.\n'
    'if { [ "$status" -gt 128 ] || [ "$status" -eq 75 ]; } &&\n'
    '  [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then\n'
    '  scontrol requeue "$SLURM_JOB_ID"\nfi\nexit "$status"\n'
  )


@pytest.mark.parametrize(
  ('status', 'count', 'requeues'),
  [(0, 0, 0), (1, 0, 0), (143, 1, 1), (137, 2, 0), (75, 0, 1), (75, 2, 0)],
)
def test_slurm_script_queues_again_only_after_a_signal_or_a_loss(tmp_path, status, count, requeues):
  for name, body in {
    'srun': f'exit {status}',
    'scontrol': f'echo "$*" >> {tmp_path}/asked',
  }.items():
    (tmp_path / name).write_text(f'#!/bin/sh\n{body}\n')
    (tmp_path / name).chmod(0o755)
  path = f'{tmp_path}:{os.environ["PATH"]}'
  environment = {'PATH': path, 'SLURM_JOB_ID': '7', 'SLURM_RESTART_COUNT': str(count)}
  script = text('slurm', restarts=2)
  assert subprocess.run(['bash'], input=script, text=True, env=environment).returncode == status
  asked = tmp_path / 'asked'
  assert (asked.read_text() if asked.exists() else '') == 'requeue 7\n' * requeues


def expand(word):
  """Expand a word as Kubernetes does: $$ is $, $(NAME) a variable, any other $ itself."""
  known = {'JOB_COMPLETION_INDEX': '3', 'HOME': 'wrong', 'C': 'wrong', 'date': 'wrong'}
  name = lambda m: '$' if m[0] == '$$' else known.get(m[1], m[0])
  return re.sub(r'\$\$|\$\(([^)]*)\)', name, word)


def test_jobset_of_a_tpu_slice():
  given = {'topology': 'v5e:16x16', 'image': 'eu.gcr.io/p/slm:1', 'env': ENV}
  manifest = yaml.safe_load(text('gke', [*TRAIN, '--config.data.batch_size=256'], **given))
  (job,) = manifest['spec']['replicatedJobs']
  work = job['template']['spec']
  pod = work['template']['spec']
  (container,) = pod['containers']
  assert work['completions'] == work['parallelism'] == 64
  # An error, with exit status 1, ends the JobSet; all else starts it again.
  (error,) = work['podFailurePolicy']['rules']
  exit_codes = {'containerName': container['name'], 'operator': 'In', 'values': [1]}
  assert error == {'action': 'FailJob', 'onExitCodes': exit_codes}
  policy = manifest['spec']['failurePolicy']
  (rule,) = policy['rules']
  assert policy['maxRestarts'] == 10 and rule['action'] == 'FailJobSet'
  assert rule['onJobFailureReasons'] == ['PodFailurePolicy'] and work['backoffLimit'] == 0
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '16x16',
  }
  assert container['resources'] == {'limits': {'google.com/tpu': '4'}}
  asked = ['--config.data.batch_size=256', '--config.distributed.enable=True']
  assert [expand(word) for word in container['command']] == python('gke', *asked)
  assert [f'{e["name"]}={expand(e["value"])}' for e in container['env']] == ENV


def test_jobset_of_gpus_names_its_first_pod():
  manifest = yaml.safe_load(text('gke', nodes=4, gpus=8, image='i', name='run', dir='/$x'))
  (container,) = manifest['spec']['replicatedJobs'][0]['template']['spec']['template']['spec'][
    'containers'
  ]
  assert container['resources'] == {'limits': {'nvidia.com/gpu': '8'}}
  assert container['workingDir'] == '/$x'
  keys = dict(enable=True, coordinator='run-slm-0-0.run:8476', num_processes=4, process_id=3)
  asked = [f'--config.distributed.{key}={value}' for key, value in keys.items()]
  assert [expand(word) for word in container['command']] == python('gke', *asked)


@pytest.mark.parametrize(
  'given',
  [
    {'topology': 'v6e:2x4', 'env': ENV},
    {'topology': 'v5p:2x2x1'},
    {'nodes': 2, 'gpus': 8, 'dir': '/d'},
  ],
)
def test_jobset_is_valid_by_the_published_models(given):
  """Those that Kubeflow generates from the schemas of JobSet and Kubernetes."""
  models = pytest.importorskip('kubeflow_trainer_api.models', reason='needs kubeflow-trainer-api')
  kind = models.JobsetV1alpha2JobSet
  manifest = yaml.safe_load(text('gke', image='i', **given))
  assert kind.from_dict(manifest).to_dict() == manifest  # a field that is unknown would be left out
  pod = manifest['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
  pod['restart'] = pod.pop('restartPolicy')
  assert kind.from_dict(manifest).to_dict() != manifest
  manifest['spec']['failurePolicy']['maxRestarts'] = 'ten'
  with pytest.raises(ValueError, match='maxRestarts'):
    kind.from_dict(manifest)


def test_gcloud_command():
  line = text('tpu-vm', name='pod', zone='us-central2-b', dir="it's", env=ENV)
  assert line.endswith('\n') and words(line) == shlex.split(line)
  *head, command = words(line)
  assert ' '.join(head) == ('gcloud compute tpus tpu-vm ssh pod --worker=all --zone=us-central2-b')
  flag, remote = command.split('=', 1)
  go, there = remote.split(' && ', 1)
  assert flag == '--command' and words(go) == ['cd', "it's"]
  assert words(there) == ['env', *ENV, *python('tpu-vm', '--config.distributed.enable=True')]


def test_local_processes():
  lines = text('local', nodes=2, env=ENV)
  assert subprocess.run(['bash', '-n'], input=lines, text=True).returncode == 0
  first, second, end = lines.split(' &\n')
  assert end == 'wait\n'
  port = re.search(r'coordinator=127.0.0.1:(\d+) ', first)[1]
  for index, line in enumerate((first, second)):
    keys = dict(enable=True, coordinator=f'127.0.0.1:{port}', num_processes=2, process_id=index)
    asked = [f'--config.distributed.{key}={value}' for key, value in keys.items()]
    assert words(line) == ['env', *ENV, *python('local', *asked)]
  assert words(text('local')) == python('local')


RUN = ['train', '--config.data.path=DATA', '--workdir=RUN']


@pytest.mark.parametrize(
  ('on', 'command', 'given', 'message'),
  [
    ('local', [], {}, 'expected a command of slm after the flags: -- train'),
    ('local', ['trian'], {}, "slm has no command 'trian'; did you mean train?"),
    ('local', ['train', '--config.data.path=DATA'], {}, 'expected --workdir'),
    ('local', ['train', '--workdir=RUN'], {}, 'expected --config.data.path'),
    ('local', [*RUN, '--wrkdir=x'], {}, "flag 'wrkdir'. Did you mean: workdir"),
    ('local', [*RUN, '--config=nope'], {}, '--config=nope: no such file'),
    ('local', [*RUN, '--config.stepz=1'], {}, '--config.stepz: .* did you mean steps?'),
    ('local', [*RUN, '--config.steps=many'], {}, 'config.steps=many'),
    ('local', [*RUN, '--config.steps=0'], {}, 'steps: expected at least 1, found 0'),
    ('local', [*RUN, '--config=finetune'], {}, 'name it with --config.init=RUN'),
    ('local', [*RUN, 'False'], {}, "unexpected argument 'False'"),
    ('local', ['generate', '--run=x'], {'nodes': 2}, 'only slm train runs as several'),
    ('local', RUN, {'gpus': 2}, '--gpus: is not used with --on=local'),
    ('slurm', ['minitron', '--config.nope=1'], {}, '--config.nope: .* has no such key'),
    ('slurm', RUN, {'gpus': 3}, r'32 groups of rows .* over 3 .*; data.batch_size=33 does'),
    ('slurm', [*RUN, '--config.mesh.data=4'], {'gpus': 8}, 'needs 4 devices, found 8'),
    ('slurm', RUN, {'time': '1h'}, "--time: expected a value such as 12:00:00, found '1h'"),
    ('slurm', RUN, {'time': '00:05:00'}, '--time=00:05:00: expected more than --grace=300 s'),
    ('slurm', RUN, {'time': '1-00', 'grace': 86_400}, '--time=1-00: .* --grace=86400 s.* 86400 s'),
    ('slurm', RUN, {'time': '1-'}, '--time: expected a value such as 12:00:00'),
    ('slurm', RUN, {'name': 'a b'}, '--name: expected a value such as'),
    ('slurm', RUN, {'env': ['A']}, "--env: expected NAME=VALUE, found 'A'"),
    ('slurm', ['trian', '--workdir=r'], {'nodes': 2}, "slm has no command 'trian'"),
    ('slurm', [*RUN, '--workdir=s3://b/r'], {}, 'expected a directory, or an address gs://'),
    ('slurm', [*RUN, '--config.steps=40'], {}, 'schedule.warmup=100: expected less than steps=40'),
    ('slurm', [*RUN, '--config.mesh.fsdp=-1'], {'gpus': 8}, 'mesh.data, mesh.fsdp are all -1'),
    ('gke', RUN, {}, '--on=gke: expected --image'),
    ('gke', RUN, {'image': 'a b', 'gpus': 8}, '--image: expected a value such as'),
    ('gke', RUN, {'image': 'i', 'nodes': 2}, 'expected --topology, or --gpus of each'),
    ('gke', RUN, {'image': 'i', 'gpus': 8}, 'lies on the own disk of each pod'),
    ('gke', RUN, {'image': 'i', 'topology': 'v9:2x2'}, '--topology: expected a value such as v5e'),
    ('gke', RUN, {'image': 'i', 'topology': 'v5e:2x2x2'}, 'or v4 and v5p with three sides'),
    ('gke', RUN, {'image': 'i', 'topology': 'v5e:4x4', 'nodes': 2}, '--nodes and --gpus'),
    ('gke', RUN, {'image': 'i', 'topology': 'v5e:4x4', 'chips': 3}, '--chips=3'),
    ('tpu-vm', RUN, {}, '--on=tpu-vm: expected --name'),
    ('tpu-vm', ['generate', '--run=x'], {'name': 'pod'}, 'only slm train runs as several'),
  ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_anything_is_printed(on, command, given, message):
  with pytest.raises((ValueError, flags.Error), match=message):
    launch.make(on, command, given)


@pytest.mark.parametrize(
  ('limit', 'expected'),
  [('', 0), ('0', 0), ('90', 5400), ('1:30', 90), ('2:00:05', 7205), ('1-2', 93_600),
   ('1-2:03', 93_780), ('1-2:03:04', 93_784)],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(limit, expected):
  assert launch.seconds(limit) == expected


def test_runs_that_are_elsewhere_need_not_be_here(tmp_path):
  for config in ('finetune', 'code', 'distill', 'lora'):
    refs = ['--config.init=/there/RUN', *['--config.teacher=/there/LLM'][: config == 'distill']]
    asked = [*RUN, f'--config={config}', *refs]
    assert launch.make('slurm', asked, {'gpus': 8}).name == 'run'
    with pytest.raises(ValueError, match='checkpoint.keep: expected at least 1, found 0'):
      launch.make('slurm', [*asked, '--config.checkpoint.keep=0'], {'gpus': 8})


def test_what_is_not_here_cannot_be_submitted_from_here(monkeypatch):
  monkeypatch.setenv('PATH', '')
  for on, given in (
    ('slurm', {}),
    ('gke', {'image': 'i', 'gpus': 1, 'dir': '/d'}),
    ('tpu-vm', {'name': 'pod'}),
  ):
    job = launch.make(on, RUN, given)
    with pytest.raises(
      ValueError, match='--submit: (sbatch|kubectl|gcloud) is not on this machine'
    ):
      launch.submit(on, job, launch.TARGETS[on].template(job))


def test_one_that_dies_ends_the_others(monkeypatch, capfd):
  monkeypatch.setattr(foreground, 'GRACE', 0.5)
  began = time.monotonic()
  sleeper = [sys.executable, '-c', 'print("here", flush=True); import time; time.sleep(60)']
  killed = ['sh', '-c', 'sleep 1; kill -9 $$']
  assert foreground.run([sleeper, killed, ['true']]) == 128 + signal.SIGKILL
  assert foreground.run([['true'], ['true']]) == 0
  assert foreground.run([['true'], ['sh', '-c', 'echo no >&2; exit 3']]) == 3
  assert time.monotonic() - began < 30
  out, err = capfd.readouterr()
  assert out == '[0] here\n' and err == '[1] no\n'


def test_a_signal_stops_all_processes_and_waits_until_they_have_saved(tmp_path):
  saver = 'trap "sleep 1; echo saved; exit 143" TERM; echo up; while :; do sleep 0.1; done'
  script = f"""
from slm.base import console
from slm.runs import foreground
console.run(lambda _: foreground.run([['sh', '-c', {saver!r}]] * 2))
"""
  process = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True)
  assert {process.stdout.readline() for _ in range(2)} == {'[0] up\n', '[1] up\n'}
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 143 and sorted(out.splitlines()) == ['[0] saved', '[1] saved']


@pytest.mark.skipif(sys.platform != 'linux', reason='asks the kernel of Linux')
def test_processes_end_with_a_launcher_that_is_killed():
  waiting = ['sh', '-c', 'echo $$; exec sleep 60']
  script = f'from slm.runs import foreground\nforeground.run([{waiting!r}] * 2)'
  process = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True)
  numbers = [int(process.stdout.readline().split()[1]) for _ in range(2)]
  process.kill()
  process.wait()
  state = lambda pid: Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
  deadline = time.monotonic() + 20
  while any(Path(f'/proc/{pid}').exists() and state(pid) != 'Z' for pid in numbers):
    assert time.monotonic() < deadline
    time.sleep(0.05)
