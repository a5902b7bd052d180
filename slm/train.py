"""Train any model by any objective.

    python -m slm.train --config=configs/pretrain.py --config.data.path=DATA --workdir=RUN

The same command continues an interrupted run from its last checkpoint.
"""

import json
import sys

import jax
from absl import flags

from slm.base import console
from slm.inference import rewards
from slm.runs import config, processes
from slm.training import plan
from slm.training.loop import train


def main(_: list[str]) -> None:
  """Train and print the result."""
  f = flags.FLAGS
  given = config.complete(f.config.to_dict())
  if f.dry_run:
    data = given['data']['path']
    cfg = config.resolve(given) if data else config.without_data(given, f.context)
    planned = plan.plan(cfg, f.devices, f.chip, f.mfu)
    print(plan.text(planned) + plan.exact(planned, sys.argv[1:]))
    return
  console.required('workdir')
  if given['distributed']['enable']:
    processes.connect(given['distributed'])
  with processes.ending():
    result = train(given, f.workdir, f.profile, rewards.reward)
  if jax.process_index() == 0:
    print(json.dumps(result))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'Run directory; an unfinished run continues.')
  flags.DEFINE_string('profile', '', 'START:STOP: the steps to trace into WORKDIR/profile.')
  flags.DEFINE_bool('dry_run', False, 'Print parameters, FLOPs, memory and time only.')
  flags.DEFINE_integer('devices', 0, '--dry_run: number of chips; 0: that of the mesh.')
  flags.DEFINE_enum('chip', 'h100', plan.NAMES, '--dry_run: kind of chip; cpu measures this one.')
  flags.DEFINE_float('mfu', 0.4, "--dry_run: share of the chip's peak reached.")
  flags.DEFINE_integer('context', 0, '--dry_run: tokens per row, without data.', 0)
  console.run(main, config='base', keys=config.RunConfig)
