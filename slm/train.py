"""Train any model by any objective: the entry point and the only train loop.

    python -m slm.train --config=configs/pretrain.py --config.data.path=DATA --workdir=RUN

Started again with the same arguments it continues from its last checkpoint.
"""

import json

import jax
from absl import flags

from slm.base import console
from slm.runs import config, processes
from slm.training import plan
from slm.training.loop import train


def main(_: list[str]) -> None:
  """Train and print the result."""
  f = flags.FLAGS
  given = f.config.to_dict()
  if f.dry_run:
    there = given['data']['path']
    cfg = config.resolve(given) if there else config.without_data(given, f.context)
    print(plan.text(plan.plan(cfg, f.devices, f.chip, f.mfu)))
    return
  console.required('workdir')
  if given['distributed']['enable']:
    processes.connect(given['distributed'])
  result = train(given, f.workdir)
  if jax.process_index() == 0:
    print(json.dumps(result))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'Run directory; an unfinished run in it continues.')
  flags.DEFINE_bool('dry_run', False, 'Print parameters, FLOPs, memory and time; train nothing.')
  flags.DEFINE_integer('devices', 0, '--dry_run: how many chips; 0: as many as the mesh names.')
  flags.DEFINE_enum('chip', 'h100', plan.NAMES, '--dry_run: on what; cpu times this machine.')
  flags.DEFINE_float('mfu', 0.4, "--dry_run: the share of the chip's peak that is reached.")
  flags.DEFINE_integer('context', 0, '--dry_run: tokens per row, where there are no data yet.')
  console.run(main, config='base', keys=config.RunConfig)
