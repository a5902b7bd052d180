"""Run the whole study: prepare, teacher, cuts, recoveries, evaluation, report. It continues.

python -m experiments.minitron.run --scale=smoke --out=runs/minitron_smoke
python -m experiments.minitron.run --scale=cpu --corpus=/path/to/corpora --out=runs/minitron
python -m experiments.minitron.run --scale=smollm2 --corpus=/path/to/corpora --out=runs/smollm2
"""

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import common
from experiments.minitron import report, results, smollm2, smollm2_report
from experiments.minitron.results import TEACHER
from experiments.minitron.scales import SCALES, Scale
from experiments.minitron.students import CORRECTED, SEARCHED, SERVED, STUDENTS, Student, cut_run
from slm.base import console
from slm.data import loader
from slm.inference import tasks
from slm.models.config import DecoderConfig
from slm.objectives import heldout
from slm.pruning import commands, search, slicing
from slm.training import loop
from slm.weights import sharding
from slm.weights.count import num_params

BY_NAME = {s.name: s for s in STUDENTS}
_ITEMS = 300  # of a task file, the first


class Study:
  """The study in a directory: what is there is not made again."""

  def __init__(self, scale: Scale, root: Path):
    self.scale, self.root, self.runs = scale, root, root / 'runs'
    self.mesh = sharding.make_mesh({'data': -1})

  def settings(self, seed: int, steps: int, peak: float, on: str) -> dict[str, Any]:
    """Return what every training sets."""
    s = self.scale
    return {
      'seed': seed,
      'steps': steps,
      'data.path': str(self.root / 'data'),
      'data.set': on,
      'data.batch_size': s.batch_size,
      'schedule.peak': peak,
      'schedule.warmup': min(max(steps // 20, 1), steps - 1),
      'eval.every': max(steps // 8, 1),
      'eval.max_rows': s.eval_rows,
      'checkpoint.every': max(steps // 4, 1),
      'tensorboard': False,
      **s.train,
    }

  def train(self, name: str, config_name: str, settings: Mapping[str, Any], on: str) -> Path:
    """Train a run and evaluate it on its set's test split."""
    path = self.runs / name
    loop.train(common.config(config_name, settings), path)
    return self.evaluate(path, on)

  def evaluate(self, path: Path, on: str) -> Path:
    """Evaluate a run on a set's test split, unless that was done."""
    rows = self.scale.test_rows
    heldout.run(path, str(self.root / 'data'), [f'{on}/test'], self.mesh, 32, max_rows=rows)
    return path

  def teachers(self) -> None:
    """Train the teacher, and those that are trained on a little more (arXiv 2408.11796 §3)."""
    s = self.scale
    shape = {f'model.{key}': value for key, value in s.teacher.items()}
    settings = self.settings(0, s.teacher_steps, s.teacher_peak, 'generic')
    path = self.train(TEACHER, 'pretrain', settings | shape, 'generic')
    for name, domain in CORRECTED.items():
      on = s.domain if domain else 'generic'
      settings = self.settings(1, s.steps, s.correct_peak, on) | {'init': str(path)}
      self.train(name, 'pretrain', settings | shape, on)

  def calibrated(self, run: Path, on: str) -> Path:
    """Score a run's units on a set."""
    out = self.root / 'stats' / f'{run.name}-{on}'
    commands.calibrate(
      str(run), '', str(out), f'{on}/train', rows=self.scale.calibration, batch_size=32
    )
    return out

  def on(self, student: Student) -> str:
    """Return the set a student is calibrated, trained and tested on."""
    return self.scale.domain if student.domain else 'generic'

  def cut(self, student: Student, seed: int) -> Path:
    """Cut a student from its parent; those that are cut alike share the run."""
    how, path = dict(student.cut or {}), self.runs / cut_run(student, seed)
    parent = self.runs / student.whole
    if student.parent:
      of = BY_NAME[student.parent]
      parent = self.trained(of, seed) if of.seeds else self.cut(of, seed)
    stats = self.calibrated(parent, self.on(student))
    sizes = self.searched() if student.shape == SEARCHED else self.sizes(student)
    how |= {'seed': seed} if how.get('by') == 'random' else {}
    commands.cut(str(parent), [str(stats)], sizes, str(path), align=self.scale.align, **how)
    return self.evaluate(path, self.on(student))

  def sizes(self, student: Student) -> dict[str, int]:
    """Return what a student keeps of each axis."""
    return slicing.read_sizes(self.scale.shapes[student.shape])

  def searched(self) -> dict[str, int]:
    """Search for the best shape no larger than `width`, by a quarter of a recovery's steps."""
    s, teacher = self.scale, self.runs / TEACHER
    whole = results.shape(teacher)
    most = sum(num_params(slicing.shape(whole, _first(self.sizes(BY_NAME['width'])))).values())
    settings = self.settings(0, max(s.steps // 4, 1), s.peak, 'generic')
    grid = search.read_grid(s.grid, whole)
    found = search.search(
      str(teacher), str(self.calibrated(teacher, 'generic')), self.root / 'search',
      common.config('recover', settings), grid, search.Bounds(params=most),
    )  # fmt: skip
    return found['sizes']

  def trained(self, student: Student, seed: int) -> Path:
    """Train a student."""
    s, on = self.scale, self.on(student)
    steps = max(round(s.steps * student.steps), 1)
    if student.equal:
      steps = results.equal_steps(self.trained(BY_NAME[student.equal], seed), self.runs / TEACHER)
    settings = self.settings(seed, steps, s.peak, on)
    if student.cut is None:
      vocab = loader.manifest(self.root / 'data')['tokenizer']['vocab']
      shape = slicing.shape(DecoderConfig(vocab=vocab, **s.teacher), _first(self.sizes(student)))
      settings |= {f'model.{key}': getattr(shape, key) for key in s.teacher}
      settings['schedule.peak'] = s.scratch_peak
    else:
      settings['init'] = str(self.cut(student, seed))
    if student.guide:
      settings['teacher'] = str(self.runs / student.guide)
    config_name = 'recover' if student.guide else 'pretrain'
    return self.train(f'{student.name}-{seed}', config_name, settings | dict(student.set), on)

  def ask(self, paths: list[str]) -> None:
    """Put task files to the teacher and to what is served, as cut and as trained."""
    wanted = [TEACHER, *(cut_run(BY_NAME[name], 0) for name in SERVED)]
    wanted += [f'{name}-{seed}' for name in SERVED for seed in self.scale.seeds]
    for name in wanted:
      if paths and (self.runs / name / 'result.json').exists():
        tasks.run(self.runs / name, paths, self.mesh, 32, limit=_ITEMS)

  def run(self, students: Iterable[Student]) -> None:
    """Make every student; a seed at a time, so that all are there early."""
    self.teachers()
    jobs = [
      (student, seed)
      for i, seed in enumerate(self.scale.seeds)
      for student in students
      if i < max(student.seeds, 1)
    ]
    for i, (student, seed) in enumerate(jobs, 1):
      print(f'[{i}/{len(jobs)}] {student.name}-{seed}', file=sys.stderr, flush=True)
      if student.seeds:
        self.trained(student, seed)
      else:
        self.cut(student, seed)


def _first(sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
  """Keep the first of each axis, where only the shape matters."""
  return {axis: np.arange(n) for axis, n in sizes.items()}


def main(_: list[str]) -> None:
  """Run the study that the flags name."""
  f, scales = flags.FLAGS, SCALES | smollm2.SCALES
  if f.scale not in scales:
    raise ValueError(f'--scale: expected one of {sorted(scales)}, found {f.scale!r}')
  students = {s.name: s for s in smollm2.STUDENTS} if f.scale in smollm2.SCALES else BY_NAME
  if unknown := [name for name in f.only if name not in students]:
    raise ValueError(f'--only: expected some of {", ".join(students)}, found {unknown}')
  chosen = [students[name] for name in f.only or students]
  common.cache(f.cache)
  scale, root, began = scales[f.scale], Path(f.out), time.monotonic()
  if f.scale in smollm2.SCALES:
    real = smollm2.Study(scale, root, f.teacher, f.corpus)
    real.run(chosen)
    print(f'all runs done in {time.monotonic() - began:.0f} s', file=sys.stderr)
    smollm2_report.write(real, f.rounds)
    return
  common.prepare_data(scale.sources, scale.prepare, (), f.corpus, root / 'data')
  asked = [str(Path(f.corpus) / task) for task in scale.tasks]
  for path in asked:
    tasks.read(path)  # a file that is not there is named now, not after hours
  study = Study(scale, root)
  study.run(chosen)
  study.ask(asked)
  print(f'all runs done in {time.monotonic() - began:.0f} s', file=sys.stderr)
  report.write(scale, root, f.rounds)


if __name__ == '__main__':
  flags.DEFINE_string('scale', 'smoke', f'One of {sorted(SCALES | smollm2.SCALES)}.')
  flags.DEFINE_string(
    'teacher', 'models/smollm2-135m-instruct', 'Run that the smollm2 scales cut; see make model.'
  )
  flags.DEFINE_string('corpus', '', 'Directory of the corpora, for scales that read files.')
  flags.DEFINE_string('out', 'runs/minitron', 'Where data, runs and the report go.')
  flags.DEFINE_string('cache', '~/.cache/slm/xla', "JAX's compilation cache.")
  flags.DEFINE_list('only', [], 'Make these students alone; the report says what was not run.')
  flags.DEFINE_integer('rounds', 9, 'Interleaved repeats of the measurement of speed.')
  console.run(main)
