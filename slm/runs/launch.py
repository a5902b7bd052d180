"""What starts a command elsewhere: a batch script, a manifest, a remote command, local processes.

Each target is one template. Queues, restarts and networks are those of Slurm, Kubernetes and Google
Cloud.
"""

import dataclasses
import math
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import config_flags

from slm.base import arguments, stage
from slm.runs import config, foreground, load, rundir
from slm.runs.processes import LOST
from slm.weights import chips, sharding

TRAIN = 'train'  # the command that runs as several processes
# Kinds of TPU, and their names on GKE: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
TPUS = {
  'v4': 'tpu-v4-podslice',
  'v5e': 'tpu-v5-lite-podslice',
  'v5p': 'tpu-v5p-slice',
  'v6e': 'tpu-v6e-slice',
}
# Values of directives and names, which cannot be quoted, and examples of them. The last 18 of the
# 63 characters of a pod's name are the template's and Kubernetes'.
_PLAIN = {
  'name': (r'[a-z]([-a-z0-9]{0,43}[a-z0-9])?', 'slm-1 (lower case, at most 45 characters)'),
  'time': (r'(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})?', '12:00:00'),
  'partition': (r'[\w.,-]*', 'gpu'),
  'image': (r'[\w./:@-]*', 'ghcr.io/me/slm:1'),
  'topology': (rf'({chips.SLICE})?', 'v5e:16x16, or v4 and v5p with three sides'),
}


@dataclasses.dataclass(frozen=True)
class Job:
  """A command of slm and the machines that it is for; slm.launch documents the fields."""

  command: tuple[str, ...]  # its name and its arguments
  name: str
  python: str
  nodes: int = 1
  gpus: int = 0
  topology: str = ''
  chips: int = 4
  time: str = ''
  partition: str = ''
  zone: str = ''
  image: str = ''
  dir: str = ''
  env: tuple[str, ...] = ()
  grace: int = 300
  restarts: int = 10
  port: int = 8476  # of process 0

  def __post_init__(self):
    for field, (pattern, example) in _PLAIN.items():
      if not re.fullmatch(pattern, value := getattr(self, field)):
        raise ValueError(f'--{field}: expected a value such as {example}, found {value!r}')
    for variable in self.env:
      if not re.match(r'[A-Za-z_]\w*=', variable):
        raise ValueError(f'--env: expected NAME=VALUE, found {variable!r}')
    if self.topology and (self.nodes, self.gpus) != (1, 0):
      raise ValueError(
        f'--topology={self.topology}: --nodes and --gpus are of machines without one'
      )
    if 0 < (limit := seconds(self.time)) <= self.grace:
      raise ValueError(
        f'--time={self.time}: expected more than --grace={self.grace} s, which are left to save; '
        f'found {limit} s'
      )
    if self.slice > self.chips and self.slice % self.chips:
      raise ValueError(f'--chips={self.chips}: does not divide the {self.slice} of --topology')

  @property
  def slice(self) -> int:
    """Return the number of TPU chips, 0 without a topology."""
    _, _, shape = self.topology.partition(':')
    return math.prod(map(int, shape.split('x'))) if shape else 0

  @property
  def devices(self) -> int:
    """Return the number of accelerators, 0 if that is not known here."""
    return self.slice or self.nodes * self.gpus

  @property
  def hosts(self) -> int:
    """Return the number of machines: of a TPU slice, those that hold its chips."""
    return max(1, self.slice // self.chips) if self.slice else self.nodes

  @property
  def tasks(self) -> int:
    """Return the processes of a Slurm node: JAX expects one per GPU there."""
    return max(self.gpus, 1) if self.command[0] == TRAIN else 1

  def process(self, several: bool, **keys: object) -> list[str]:
    """Return the words that start one process; `keys` are those of the section distributed."""
    name, *rest = self.command
    keys = {'enable': True, **keys} if several else {}
    distributed = [f'--config.distributed.{key}={value}' for key, value in keys.items()]
    return [self.python, '-m', f'slm.{name}', *rest, *distributed]

  def line(self, several: bool, **keys: object) -> str:
    """Return the same for a shell, with the environment."""
    environment = ['env', *self.env] if self.env else []
    return shlex.join([*environment, *self.process(several, **keys)])


def seconds(limit: str) -> int:
  """Return the seconds of a time limit in the formats of sbatch; 0, as there, is none.

  They are M, M:S, H:M:S, D-H, D-H:M and D-H:M:S.
  """
  days, dash, rest = limit.rpartition('-')
  parts = [int(part) for part in rest.split(':') if part]
  units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
  return 86_400 * int(days or 0) + sum(n * unit for n, unit in zip(parts, units, strict=False))


def slurm(job: Job) -> str:
  """Return a script for sbatch.

  Its processes get SIGTERM before the time limit and save; the job then queues again.
  """
  options = {
    'job-name': job.name, 'nodes': job.nodes, 'ntasks-per-node': job.tasks,
    'gpus-per-node': job.gpus, 'time': job.time, 'partition': job.partition,
    'signal': f'TERM@{job.grace}', 'open-mode': 'append',
  }  # fmt: skip
  return '\n'.join([
    '#!/usr/bin/env bash',
    *(f'#SBATCH --{name}={value}' for name, value in options.items() if value),
    '#SBATCH --requeue',
    *([f'cd {shlex.quote(job.dir)} || exit'] if job.dir else []),
    f'srun {job.line(job.nodes * job.tasks > 1)}',
    'status=$?',
    '# Ended by a signal (time limit, memory) or a lost process, not by an error: continue.',
    f'if {{ [ "$status" -gt 128 ] || [ "$status" -eq {LOST} ]; }} &&',
    f'  [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ]; then',
    '  scontrol requeue "$SLURM_JOB_ID"',
    'fi',
    'exit "$status"',
    '',
  ])  # fmt: skip


def gke(job: Job) -> str:
  """Return a JobSet manifest: a pod per host, all of which start again if one is lost.

  An error, exit status 1 of any of them, ends the JobSet.
  """
  several, keys = job.hosts > 1, {}
  if not job.topology:  # JAX detects the hosts of TPUs; those of GPUs only with a role to read pods
    keys = {'coordinator': f'{job.name}-slm-0-0.{job.name}:{job.port}', 'num_processes': job.hosts}
  literal = lambda text: text.replace('$', '$$')  # Kubernetes expands $(NAME) and reads $$ as $
  command = [literal(word) for word in job.process(several, **keys)]
  if several and keys:
    command.append('--config.distributed.process_id=$(JOB_COMPLETION_INDEX)')
  container = {
    'name': 'slm',
    'image': job.image,
    'command': command,
    'env': [dict(zip(('name', 'value'), literal(v).split('=', 1), strict=True)) for v in job.env],
    'workingDir': job.dir,
    'resources': {'limits': {}},
  }
  pod = {'restartPolicy': 'Never', 'terminationGracePeriodSeconds': job.grace}
  if job.topology:
    kind, _, shape = job.topology.partition(':')
    label = 'cloud.google.com/gke-tpu-'
    pod['nodeSelector'] = {f'{label}accelerator': TPUS[kind], f'{label}topology': shape}
    container['resources']['limits'] = {'google.com/tpu': str(min(job.chips, job.slice))}
  elif job.gpus:
    container['resources']['limits'] = {'nvidia.com/gpu': str(job.gpus)}
  pod['containers'] = [{key: value for key, value in container.items() if value}]
  work = {'completionMode': 'Indexed', 'completions': job.hosts, 'parallelism': job.hosts}
  bad = {'containerName': 'slm', 'operator': 'In', 'values': [1]}
  work |= {
    'backoffLimit': 0,
    'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': bad}]},
    'template': {'spec': pod},
  }
  ends = {'name': 'error', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
  manifest = {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': {'name': job.name},
    'spec': {
      'failurePolicy': {'maxRestarts': job.restarts, 'rules': [ends]},
      'replicatedJobs': [{'name': 'slm', 'replicas': 1, 'template': {'spec': work}}],
    },
  }
  return yaml.safe_dump(manifest, sort_keys=False, width=1000)


def tpu_vm(job: Job) -> str:
  """Return the gcloud command that runs a process on every host of a TPU."""
  go = f'cd {shlex.quote(job.dir)} && ' if job.dir else ''
  words = ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', job.name, '--worker=all']
  words += [f'--zone={job.zone}'] if job.zone else []
  return shlex.join([*words, f'--command={go}{job.line(True)}']) + '\n'


def local(job: Job) -> str:
  """Return the commands of `nodes` processes of this machine, for a shell."""
  lines = [shlex.join(words) for words in processes(job)]
  return ' &\n'.join([*lines, 'wait\n']) if len(lines) > 1 else f'{lines[0]}\n'


def processes(job: Job) -> list[list[str]]:
  """Return the words of each of `nodes` processes of this machine."""
  place = {'coordinator': f'127.0.0.1:{job.port}', 'num_processes': job.nodes}
  lines = [job.line(job.nodes > 1, **place, process_id=i) for i in range(job.nodes)]
  return [shlex.split(line) for line in lines]


def _free_port() -> int:
  """Return a port of the loopback interface that nothing listens at."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class Target:
  """A kind of place: its template, the fields of a Job that it needs and reads, and its Python."""

  template: Callable[[Job], str]
  python: str
  needs: str  # a field without a default
  reads: tuple[str, ...]
  program: tuple[str, ...] = ()  # takes the text; (): the text is itself a command


TARGETS = {
  'slurm': Target(
    slurm, sys.executable, '', ('nodes', 'gpus', 'time', 'partition', 'dir', 'grace', 'restarts'),
    ('sbatch',),
  ),
  'gke': Target(
    gke, 'python', 'image',
    ('nodes', 'gpus', 'topology', 'chips', 'image', 'dir', 'grace', 'restarts'),
    ('kubectl', 'create', '-f', '-'),
  ),
  'tpu-vm': Target(tpu_vm, 'python3', 'name', ('zone', 'dir')),
  'local': Target(local, sys.executable, '', ('nodes',)),
}  # fmt: skip
FIELDS = tuple(f.name for f in dataclasses.fields(Job) if f.name not in ('command', 'port'))
_COMMON = {'name', 'python', 'env'}


def make(on: str, command: Sequence[str], given: Mapping[str, Any]) -> Job:
  """Check a command line and make its job for a target; `given` are fields without defaults.

  Raises:
    ValueError: if the command, its config or a field is wrong, missing or not of the target.
    absl.flags.Error: as `check` does.
  """
  target = TARGETS[on]
  if unread := given.keys() - {*_COMMON, *target.reads}:
    raise ValueError(f'--{min(unread)}: is not used with --on={on}')
  if target.needs and not given.get(target.needs):
    raise ValueError(f'--on={on}: expected --{target.needs}')
  if not command:
    raise ValueError('expected a command of slm after the flags: -- train --workdir=RUN ...')
  defaults = {'name': 'slm', 'python': target.python}
  port = {'port': _free_port()} if on == 'local' else {}
  job = Job(tuple(command), **defaults | port | given)
  if command[0] not in (known := arguments.commands()):
    near = arguments.suggestion(command[0], known)
    raise ValueError(f'slm has no command {command[0]!r}{near or "; slm --help lists them"}')
  if on == 'gke' and not (job.topology or job.gpus):
    raise ValueError('--on=gke: expected --topology, or --gpus of each of --nodes')
  if command[0] != TRAIN and (job.hosts > 1 or on == 'tpu-vm'):
    raise ValueError(f'slm {command[0]}: expected one process; only slm train runs as several')
  workdir = check(command, job.devices)
  lasts = job.dir or stage.is_address(workdir) or workdir.startswith('/')
  if on == 'gke' and workdir and not lasts:
    raise ValueError(
      f'--workdir={workdir}: lies on the own disk of each pod, which a restart empties: name a '
      'path of a volume that all pods mount, or an address'
    )
  return dataclasses.replace(job, name=given.get('name') or _name(workdir or command[0]))


def submit(on: str, job: Job, text: str) -> int:
  """Hand what a template made to its program, or run it; return the exit status.

  Raises:
    ValueError: if the program is not on this machine.
  """
  if on == 'local':
    return foreground.run(processes(job))
  program = TARGETS[on].program
  words = program or shlex.split(text)
  if not shutil.which(words[0]):
    raise ValueError(f'--submit: {words[0]} is not on this machine; without it the text is printed')
  return subprocess.run(words, input=text if program else None, text=True).returncode


def _name(workdir: str) -> str:
  """Return a name for the job of a run directory, such as slm-8 for runs/slm_8."""
  plain = re.sub('[^a-z0-9]+', '-', Path(workdir).name.lower()).strip('-')
  return (plain if plain[:1].isalpha() else f'slm-{plain}')[:45].strip('-')


def check(command: Sequence[str], devices: int) -> str:
  """Check a command line as far as it can be without the data and runs that it names.

  `devices` are those of the mesh, 0 if they are not known. Returns --workdir of `slm train`,
  whose values are checked too; of other commands only the config and its keys are.

  Raises:
    ValueError: if there is no such config, or a key or value of it is wrong.
    absl.flags.Error: if `slm train` has no such flag.
  """
  name, *rest = command
  if name == TRAIN:
    return _check_train(rest, devices)
  asked = [sys.executable, '-m', f'slm.{name}', *rest, '--help']  # reads the config first
  done = subprocess.run(asked, capture_output=True, text=True)
  if done.returncode:
    raise ValueError(done.stderr.strip().rpartition('\n')[2].removeprefix('error: '))
  return ''


def _check_train(args: Sequence[str], devices: int) -> str:
  argv = arguments.arrange([f'slm.{TRAIN}', *args], 'base', {})
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', '', 'Run directory.', flag_values=values)
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  if len(words := values(argv)) > 1:
    raise ValueError(f'unexpected argument {words[1]!r}; flags are --name=value')
  if not values.workdir:
    raise ValueError('slm train: expected --workdir, the run directory')
  stage.of(values.workdir)  # refuses addresses at which there are no runs
  given = config.complete(values.config.to_dict())
  if not given['data']['path']:
    raise ValueError('slm train: expected --config.data.path, the prepared data')
  # Without the run that it starts from, the model has some shape of the right kind.
  known = given['init'] in ('', '?') or (
    not stage.is_address(given['init']) and rundir.split_ref(given['init'])[0].exists()
  )
  if known:
    config.inherit(given)
  given['model']['vocab'] = given['model']['vocab'] or 1  # the tokenizer's
  cfg = config.read(given)
  config.check(cfg)
  if devices:
    shape = sharding.mesh_shape(vars(cfg.mesh), devices)
    if known:
      split = sharding.batch_devices(AbstractMesh(shape, sharding.MESH_AXES))
      load.check_groups(cfg, load.build(cfg)[1], split)
  return values.workdir
