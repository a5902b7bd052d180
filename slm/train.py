"""Train any model by any objective: the entry point and the only train loop.

    python -m slm.train --config=configs/pretrain.py --config.data.path=DATA --workdir=RUN

Started again with the same arguments it continues from its last checkpoint.
"""

import json

import jax
from absl import flags
from ml_collections import config_flags

from slm.base import console
from slm.runs import config
from slm.training import plan
from slm.training.loop import train


def main(_: list[str]) -> None:
  """Train and print the result."""
  if not (flags.FLAGS.workdir or flags.FLAGS.dry_run):
    raise ValueError('--workdir: name the run directory')
  if flags.FLAGS.dry_run:
    f, given = flags.FLAGS, flags.FLAGS.config.to_dict()
    there = given['data']['path']
    cfg = config.resolve(given) if there else config.without_data(given, f.context)
    print(plan.text(plan.plan(cfg, f.devices, f.chip, f.mfu)))
    return
  d = flags.FLAGS.config.distributed
  if d.enable:
    # What is left at its default is found out from Slurm, Kubernetes, MPI or the TPU's metadata.
    jax.distributed.initialize(
      d.coordinator or None,
      d.num_processes if d.num_processes > 0 else None,
      d.process_id if d.process_id >= 0 else None,
    )
  result = train(flags.FLAGS.config.to_dict(), flags.FLAGS.workdir)
  if jax.process_index() == 0:
    print(json.dumps(result))


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', 'configs/base.py', 'What to train.')
  flags.DEFINE_string('workdir', '', 'Run directory; an unfinished run in it continues.')
  flags.DEFINE_bool('dry_run', False, 'Print parameters, FLOPs, memory and time; train nothing.')
  flags.DEFINE_integer('devices', 0, '--dry_run: how many chips; 0: as many as the mesh names.')
  flags.DEFINE_enum('chip', 'h100', sorted(plan.CHIPS), '--dry_run: on what.')
  flags.DEFINE_float('mfu', 0.4, "--dry_run: the share of the chip's peak that is reached.")
  flags.DEFINE_integer('context', 0, '--dry_run: tokens per row, where there are no data yet.')
  console.run(main)
