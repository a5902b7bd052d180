"""Evaluate runs: held-out losses, and scores on task files.

python -m slm.evaluate --run=RUN --on=generic/test --on=law/test
python -m slm.evaluate --run=RUN --task=arc_easy.jsonl.gz [--shots=5] [--limit=200]
python -m slm.evaluate --run=RUN --suite=tulu_dev --tasks=DIR [--limit=200]
python -m slm.evaluate --run=RUN --suite=tulu_unseen --tasks=DIR --freeze; then without --freeze
"""

import jax
from absl import flags

from slm.base import console
from slm.inference import scoring, suites, tasks
from slm.objectives.heldout import run
from slm.reporting import tables
from slm.runs import load
from slm.weights import sharding


def main(_: list[str]) -> None:
  """Print tables: losses by run and split, scores by run and task, and suites."""
  f = flags.FLAGS
  console.required('run')
  mesh = {path: sharding.fit_mesh(scoring.shape(path).embed) for path in f.run}
  if f['on'].present or not (f.task or f.suite):
    data = {path: load.data_path(path, f.data) for path in f.run}
    head = f'{"run":40s} {"on":24s} {"loss":>8s}   error {"ppl":>9s} {"bits/byte":>9s}\n'
    for path in f.run:
      losses = run(path, data[path], f.on, mesh[path], f.batch_size)
      for name in f.on:
        r = losses[name]
        bits = f'{r["bpb"]:9.4f}' if 'bpb' in r else ''  # unknown for an index
        print(
          f'{head}{path[-40:]:40s} {name:24s} {r["loss"]:8.4f} ±{r["loss_stderr"]:.4f} '
          f'{r["ppl"]:9.3f} {bits}'
        )
        head = ''
    print(
      '± is the standard error over rows of one loss; the difference of two runs on the same rows '
      'has a smaller one: python -m slm.compare --run=RUN --run=RUN'
    )
  for path in f.run:
    for name in f.suite:
      _suite(path, name, mesh[path])
  if f.task:
    head = f'{"run":40s} {"task":24s} {"items":>6s}  score ± standard error\n'
    options = {'data': f.data, 'shots': f.shots, 'seed': f.seed, 'limit': f.limit}
    for path in f.run:
      scores = tasks.run(path, f.task, mesh[path], f.batch_size, split=f.task_split, **options)
      for name, r in scores.items():
        print(f'{head}{path[-40:]:40s} {name:24s} {r["n"]:6d}  {tasks.line(r)}')
        head = ''


def _suite(path: str, name: str, mesh: jax.sharding.Mesh) -> None:
  """Freeze a sealed suite, or run one and print its table and the mean over evaluations."""
  f = flags.FLAGS
  options = {'data': f.data, 'again': f.again}
  if f.freeze:
    print(f'{path}: {name} frozen: {suites.freeze(path, name, f.tasks, mesh, **options)}')
    return
  options['limit'] = f.limit
  ran, results = suites.run(path, name, f.tasks, mesh, f.batch_size, **options)
  scores = suites.headline(ran, results)
  print(f'{path}\n{tables.text(suites.table(ran, results))}')
  sample = f', of samples of at most {f.limit} items' * bool(f.limit)
  print(f'{name}: {suites.mean(scores):.4f}, the mean over {len(scores)} evaluations{sample}\n')


if __name__ == '__main__':
  flags.DEFINE_multi_string('run', [], 'Run directory (or RUN@STEP); may be repeated.')
  flags.DEFINE_string('data', '', "Data directory; default: the run's own.")
  flags.DEFINE_multi_string('on', ['generic/test'], 'SET/SPLIT[@INDEX] to evaluate; may repeat.')
  flags.DEFINE_integer('batch_size', 32, 'Rows per forward pass.')
  flags.DEFINE_multi_string('task', [], 'Task file, see slm/inference/tasks.py; may repeat.')
  flags.DEFINE_integer('shots', 0, 'Tasks: answered items of the file before each question.')
  flags.DEFINE_integer('seed', 0, 'Tasks: seed that draws those items.')
  flags.DEFINE_integer('limit', 0, 'Tasks: items used of each, from the first; 0: all.')
  flags.DEFINE_string('task_split', '', 'Tasks: use only items of this `split`.')
  flags.DEFINE_multi_string('suite', [], f'One of {", ".join(suites.SUITES)}; may repeat.')
  flags.DEFINE_string('tasks', '', 'Suites: directory of the task files.')
  flags.DEFINE_bool('freeze', False, 'Sealed suites: record the model that will be evaluated.')
  flags.DEFINE_string('again', '', 'Sealed suites: the reason for a second run, which is logged.')
  old = {'split': '--on=SET/SPLIT for rows, --task_split=SPLIT for the items of tasks'}
  console.run(main, renamed=old)
