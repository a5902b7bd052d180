"""Train any model by any objective: the entry point and the only train loop.

    python -m slm.train --config=configs/pretrain.py --config.data.path=DATA --workdir=RUN

Started again with the same arguments it continues from its last checkpoint.
"""

import json

import jax
from absl import flags
from ml_collections import config_flags

from slm.base import console
from slm.runs import load, processes
from slm.training import plan
from slm.training.loop import resolve, train


def main(_: list[str]) -> None:
  """Train and print the result."""
  if not (flags.FLAGS.workdir or flags.FLAGS.dry_run):
    raise ValueError('--workdir: name the run directory')
  config = flags.FLAGS.config
  if flags.FLAGS.dry_run:
    f, cfg = flags.FLAGS, config.to_dict()
    cfg = resolve(cfg) if config.data.path else load.inherit(cfg)
    print(plan.text(plan.plan(cfg, f.devices, f.chip, f.mfu, f.context)))
    return
  if config.distributed.enable:
    processes.connect(config.distributed.to_dict())
  result = train(config.to_dict(), flags.FLAGS.workdir)
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
