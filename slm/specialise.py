"""Take one specialist out of a run that holds several, as an ordinary dense run.

    python -m slm.specialise --run=RUN --domain=law --workdir=SPECIALIST [--rule=best]

The result has the class, size and speed of any dense model; fine-tune it with `slm.train` and
`--config.init=SPECIALIST`. No pretraining data are read.
"""

import jax
from absl import flags

from slm.base import console
from slm.inference.specialist import RULES, specialise


def main(_: list[str]) -> None:
  """Write the specialist and say which cluster it is."""
  if not (flags.FLAGS.run and flags.FLAGS.domain and flags.FLAGS.workdir):
    raise ValueError('expected --run, --domain and --workdir')
  found = specialise(
    flags.FLAGS.run, flags.FLAGS.domain, flags.FLAGS.workdir, flags.FLAGS.rule, flags.FLAGS.index
  )
  what = f'cluster {found}' if isinstance(found, int) else 'the histogram over clusters'
  print(f'{flags.FLAGS.workdir}: specialist of {what} ({jax.device_count()} devices)')


if __name__ == '__main__':
  flags.DEFINE_string('run', '', 'Run (or RUN@STEP) that holds specialists.')
  flags.DEFINE_string('domain', '', 'Set of the data directory to specialise to.')
  flags.DEFINE_enum('rule', 'frequent', sorted(RULES), 'How it is chosen.')
  flags.DEFINE_string('index', '', 'Specialisation set (an index of the data directory).')
  flags.DEFINE_string('workdir', '', 'Run directory to write.')
  console.run(main)
