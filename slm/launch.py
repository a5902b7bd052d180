r"""Start a command on Slurm, GKE, a TPU VM or as several processes here: print what would run.

    python -m slm.launch --on=slurm --nodes=4 --gpus=8 --time=24:00:00 -- \
      train --config=configs/pretrain.py --config.data.path=DATA --workdir=RUN
    python -m slm.launch --on=gke --topology=v5e:16x16 --image=IMAGE -- train ...
    python -m slm.launch --on=tpu-vm --name=TPU --zone=ZONE --submit -- train ...
    python -m slm.launch --on=local --nodes=2 --submit -- train ...

After -- stands any command of slm; only train runs as several processes. It is checked before
anything is printed. What is printed is a script for sbatch, a JobSet manifest, a gcloud command, or
the commands of the local processes; --submit hands it over, or runs it.
"""

from absl import flags

from slm.base import console
from slm.runs import launch


def main(argv: list[str]) -> int:
  """Print what would run, and submit it; return the status."""
  console.required('on')
  f = flags.FLAGS
  given = {name: f[name].value for name in launch.FIELDS if f[name].present}
  job = launch.make(f.on, argv[1:], given)
  text = launch.TARGETS[f.on].template(job)
  print(text, end='', flush=True)
  return launch.submit(f.on, job, text) if f.submit else 0


if __name__ == '__main__':
  default = launch.Job
  flags.DEFINE_enum('on', None, list(launch.TARGETS), 'Where to run.')
  flags.DEFINE_bool('submit', False, 'Submit what is printed; local: run it here.')
  flags.DEFINE_string('name', '', "Name of the job, by default the run's; tpu-vm: of the TPU.")
  flags.DEFINE_string('python', '', 'Python there; slurm, local: that of this command.')
  flags.DEFINE_string('dir', default.dir, 'Directory there to start in.')
  flags.DEFINE_multi_string('env', [], 'NAME=VALUE of its environment; may be repeated.')
  flags.DEFINE_integer('nodes', default.nodes, 'slurm, gke: machines; local: processes.', 1)
  flags.DEFINE_integer('gpus', default.gpus, 'slurm, gke: GPUs per machine.', 0)
  flags.DEFINE_string('topology', default.topology, 'gke: TPU slice, such as v5e:16x16.')
  flags.DEFINE_integer('chips', default.chips, 'gke: TPU chips per machine.', 1)
  flags.DEFINE_string('image', default.image, 'gke: container image with slm.')
  flags.DEFINE_string('zone', default.zone, 'tpu-vm: zone of the TPU; default: that of gcloud.')
  flags.DEFINE_string('time', default.time, "slurm: time limit; default: the partition's.")
  flags.DEFINE_string('partition', default.partition, "slurm: default: the cluster's.")
  flags.DEFINE_integer('grace', default.grace, 'slurm, gke: seconds to save before the end.', 1)
  flags.DEFINE_integer('restarts', default.restarts, 'slurm, gke: at most so many.', 0)
  console.run(main, positional=True)
