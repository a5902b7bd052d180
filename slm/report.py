"""A report on runs: losses and differences, training curves, costs and environments.

    python -m slm.report --run=RUN --run=RUN [--on=law/test] --out=DIR

writes report.html (self-contained), table.md, results.csv and plots/*.svg from run directories
alone. All runs are compared with the first; RUN,RUN,RUN are the seeds of one model.
"""

from pathlib import Path

from absl import flags

from slm.base import console
from slm.reporting import comparison
from slm.reporting.report import report, sentence


def main(_: list[str]) -> None:
  """Write the report of --run."""
  f = flags.FLAGS
  models = comparison.models(f.run)
  if not models or not f.out:
    raise ValueError('expected at least one --run, and --out')
  comparison.check_tokenizers(models)
  by_set = report(models, f.on or comparison.shared_sets(models), Path(f.out))
  print('\n'.join(map(sentence, by_set.values())))
  print(f'wrote {Path(f.out) / "report.html"}, table.md, results.csv and plots/')


if __name__ == '__main__':
  flags.DEFINE_multi_string('run', [], 'RUN or RUN@STEP, or the seeds of a model: RUN,RUN,RUN.')
  flags.DEFINE_multi_string('on', [], 'SET/SPLIT; default: all that every run was evaluated on.')
  flags.DEFINE_string('out', '', 'Directory to write the report to.')
  moved = {'study': 'python -m experiments.specialise.report --study=STUDY'}
  console.run(main, renamed=moved)
