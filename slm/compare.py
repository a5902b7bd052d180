"""Compare runs: paired differences of held-out losses, with intervals.

    python -m slm.compare --run=RUN --run=RUN@STEP --on=law/test [--out=DIR]
    python -m slm.compare --run=A0,A1,A2 --run=B0,B1,B2 --on=law/test --on=law/test_ood

All runs are compared with the first, on identical rows; RUN,RUN,RUN are the seeds of one model.
Evaluations that are missing are made first. --out writes results.csv and differences.svg.
"""

from pathlib import Path

from absl import flags

from slm.base import artifact, console, files
from slm.inference import scoring
from slm.objectives import heldout
from slm.reporting import comparison, tables
from slm.runs import load
from slm.weights import sharding


def main(_: list[str]) -> None:
  """Print the differences of --run on every --on."""
  f = flags.FLAGS
  models = comparison.models(f.run)
  if len(models) < 2:
    raise ValueError('--run: name at least two runs')
  if not f.on:
    raise ValueError('--on: name at least one set/split')
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
  flags.DEFINE_string('data', '', 'Data directory; default: that of the first run.')
  flags.DEFINE_string('out', '', 'Directory for results.csv and differences.svg.')
  flags.DEFINE_integer('batch_size', 32, 'Rows per forward pass.')
  console.run(main)
