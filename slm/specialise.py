"""Take one specialist out of a run that holds several, as an ordinary dense run.

    python -m slm.specialise --run=RUN --on=law/train --workdir=SPECIALIST [--rule=best]

The result has the class, size and speed of any dense model; fine-tune it with slm.train
--config.init=SPECIALIST. No pretraining data are read.
"""

from absl import flags

from slm.base import console
from slm.data import loader
from slm.inference.specialist import RULES, specialise
from slm.runs import load


def main(_: list[str]) -> None:
  """Write the specialist and print which cluster it is."""
  f = flags.FLAGS
  console.required('run', 'on', 'workdir')
  domain, _, index = loader.parse_on(load.data_path(f.run), f.on, split='train')
  condition = specialise(f.run, domain, f.workdir, f.rule, index)
  whose = f'cluster {condition}' if isinstance(condition, int) else 'the histogram over clusters'
  print(f'{f.workdir}: specialist of {whose}')


if __name__ == '__main__':
  flags.DEFINE_string('run', '', 'Run (or RUN@STEP) that holds specialists.')
  flags.DEFINE_string('on', '', "SET/train[@INDEX]: the domain's rows in the run's data.")
  flags.DEFINE_enum('rule', 'frequent', sorted(RULES), 'How the specialist is chosen.')
  flags.DEFINE_string('workdir', '', 'Run directory to write.')
  console.run(main, renamed=dict.fromkeys(('domain', 'index'), '--on=SET/train[@INDEX]'))
