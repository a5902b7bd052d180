"""Compare runs: paired differences of held-out losses, with intervals.

    python -m slm.compare --run=RUN --run=RUN@STEP --on=law/test [--out=DIR]
    python -m slm.compare --run=A0,A1,A2 --run=B0,B1,B2 --on=law/test --on=law/test_ood
    python -m slm.compare --run=RUN --run=RUN --task=tulu_dev.gsm8k

All runs are compared with the first, on identical rows; RUN,RUN,RUN are the seeds of one model.
Losses that are missing are evaluated first, tasks are not. --out writes results.csv and
differences.svg of the losses.
"""

from pathlib import Path

from absl import flags

from slm.base import artifact, console, files
from slm.inference import scoring
from slm.objectives import heldout
from slm.reporting import comparison, scores, tables
from slm.runs import load
from slm.weights import sharding


def main(_: list[str]) -> None:
  """Print the differences of --run on every --on and --task."""
  f = flags.FLAGS
  models = comparison.models(f.run)
  if len(models) < 2:
    raise ValueError('--run: name at least two runs')
  if not (f.on or f.task):
    raise ValueError('--on: name at least one set/split, or a --task')
  if f.out and not f.on:
    raise ValueError('--out: expected --on beside it: files are written of losses, not of tasks')
  if f.task:
    lines = [line for name in f.task for line in scores.compare(models, name)]
    print(f'{scores.NOTE}\n\n{tables.text(scores.table(lines))}\n')
  if f.on:
    _losses(models)


def _losses(models: list[comparison.Model]) -> None:
  f = flags.FLAGS
  comparison.check_tokenizers(models)
  first = models[0].refs[0]
  data = load.data_path(first, f.data)
  for ref in [ref for model in models for ref in model.refs]:
    mesh = sharding.fit_mesh(scoring.shape(ref).embed)
    heldout.run(ref, data, f.on, mesh, f.batch_size)
  by_set = {name: comparison.compare(models, name, data) for name in f.on}
  for lines in by_set.values():
    print(f'{comparison.note(lines)}\n\n{tables.text(comparison.table(lines))}\n')
  if f.out:
    every = [line for lines in by_set.values() for line in lines]
    with artifact.hold(Path(f.out)):
      files.write_text(Path(f.out) / 'results.csv', comparison.results_csv(every))
      files.write_text(Path(f.out) / 'differences.svg', comparison.plot(by_set).file)


if __name__ == '__main__':
  flags.DEFINE_multi_string('run', [], 'RUN or RUN@STEP, or the seeds of a model: RUN,RUN,RUN.')
  flags.DEFINE_multi_string('on', [], 'SET/SPLIT to compare on; may be repeated.')
  flags.DEFINE_multi_string('task', [], 'Task that slm.evaluate has run; may be repeated.')
  flags.DEFINE_string('data', '', 'Data directory; default: that of the first run.')
  flags.DEFINE_string('out', '', 'Directory for results.csv and differences.svg.')
  flags.DEFINE_integer('batch_size', 32, 'Rows per forward pass.')
  console.run(main)
