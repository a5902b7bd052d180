"""Tülu 3 end to end: data, SFT, DPO, rewards that are verified, evaluation and a report.

python -m slm.tulu --config=configs/tulu_quick.py --workdir=runs/tulu
python -m slm.tulu --config=configs/tulu3.py:8b --dry_run --devices=64 --chip=tpu-v5p

Every stage is a run directory and a command of its own. The same command continues an interrupted
recipe.
"""

from pathlib import Path

from absl import flags

from slm.base import console
from slm.posttraining import planning, recipe
from slm.posttraining.settings import TuluConfig
from slm.training import plan


def main(_: list[str]) -> None:
  """Run the recipe and print its report, or plan it."""
  f = flags.FLAGS
  if f.dry_run:
    print(planning.dry_run(f.config.to_dict(), f.devices, f.chip, f.mfu))
    return
  console.required('workdir')
  print(recipe.tulu(f.config.to_dict(), Path(f.workdir)))
  print(f'wrote {f.workdir}/report.html, report.md and plots/')


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'Directory to write; unfinished stages continue.')
  flags.DEFINE_bool('dry_run', False, 'Print parameters, FLOPs, memory and time only.')
  flags.DEFINE_integer('devices', 0, '--dry_run: number of chips; 0: that of the mesh.')
  flags.DEFINE_enum('chip', 'h100', plan.NAMES, '--dry_run: kind of chip; cpu measures this one.')
  flags.DEFINE_float('mfu', 0.4, "--dry_run: share of the chip's peak reached.")
  console.run(main, config='tulu_quick', keys=TuluConfig)
