"""Turn a study's run directories into tables, plots, advice and one self-contained HTML file.

    python -m slm.report --study=STUDY

reads STUDY/study.json and the run directories it lists; writes report.html, table.md, results.csv
and plots/*.svg.
"""

from absl import flags

from slm.base import console
from slm.reporting.report import report


def main(_: list[str]) -> None:
  """Write the report of --study."""
  if not flags.FLAGS.study:
    raise ValueError('--study: name the directory that holds study.json')
  report(flags.FLAGS.study, flags.FLAGS.out)


if __name__ == '__main__':
  flags.DEFINE_string('study', '', 'Directory that holds study.json.')
  flags.DEFINE_string('out', '', 'Where the report is written; default: the study itself.')
  console.run(main)
