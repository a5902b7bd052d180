"""Minitron end to end: from a large model to a small one that transformers loads.

python -m slm.minitron --config=configs/minitron_quick.py --workdir=runs/minitron
python -m slm.minitron --config=configs/minitron_published.py:nemo_8b --dry_run --devices=256

Imports the teacher if it is a directory of transformers, calibrates, cuts, distils, exports,
verifies against transformers where that is installed, and writes a model card. Every step is also a
command of its own. The same command continues an interrupted recipe.
"""

import sys
from pathlib import Path

from absl import flags

from slm.base import console
from slm.pruning.recipe import RecipeConfig, dry_run, minitron, table
from slm.training import plan


def main(_: list[str]) -> None:
  """Run the recipe and print the summary, or plan it."""
  f = flags.FLAGS
  if f.dry_run:
    print(dry_run(f.config.to_dict(), f.devices, f.chip, f.mfu, sys.argv[1:])[-1])
    return
  console.required('workdir')
  print(table(minitron(f.config.to_dict(), Path(f.workdir))))
  print(f'exported for transformers: {f.workdir}/export')


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'Directory to write; unfinished steps continue.')
  flags.DEFINE_bool('dry_run', False, 'Print parameters, FLOPs, memory and time only.')
  flags.DEFINE_integer('devices', 0, '--dry_run: number of chips; 0: that of the mesh.')
  flags.DEFINE_enum('chip', 'h100', plan.NAMES, '--dry_run: kind of chip; cpu measures this one.')
  flags.DEFINE_float('mfu', 0.4, "--dry_run: share of the chip's peak reached.")
  console.run(main, config='minitron_quick', keys=RecipeConfig)
