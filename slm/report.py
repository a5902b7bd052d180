"""A report on runs: losses and differences, how training went, costs and environments.

    python -m slm.report RUN RUN [--on=law/test] --out=DIR

writes report.html (self-contained), table.md, results.csv and plots/*.svg from run directories
alone. All runs are compared with the first, on the sets that all were evaluated on; RUN,RUN,RUN are
the seeds of one model. --run=RUN is the same as RUN.
"""

from pathlib import Path

from absl import flags

from slm.base import console
from slm.reporting import comparison
from slm.reporting.report import report


def main(argv: list[str]) -> None:
  """Write the report of some runs."""
  f = flags.FLAGS
  models = comparison.models([*argv[1:], *f.run])
  if not models or not f.out:
    raise ValueError('expected at least one RUN, and --out')
  comparison.check_tokenizers(models)
  answer = report(models, f.on or comparison.shared_sets(models), Path(f.out))
  print('\n'.join(answer))
  print(f'wrote {Path(f.out) / "report.html"}, table.md, results.csv and plots/')


if __name__ == '__main__':
  flags.DEFINE_multi_string('run', [], 'RUN or RUN@STEP, or the seeds of a model: RUN,RUN,RUN.')
  flags.DEFINE_multi_string('on', [], 'SET/SPLIT; default: all that every run was evaluated on.')
  flags.DEFINE_string('out', '', 'Directory to write the report to.')
  moved = {'study': 'python -m experiments.specialise.report --study=STUDY'}
  console.run(main, positional=True, renamed=moved)
