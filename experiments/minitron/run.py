"""Run the whole study: prepare, teacher, cuts, recoveries, evaluation, report. It continues.

python -m experiments.minitron.run --scale=smoke --out=runs/minitron_smoke
python -m experiments.minitron.run --scale=cpu --corpus=/path/to/corpora --out=runs/minitron
python -m experiments.minitron.run --scale=smollm2 --corpus=/path/to/corpora --out=runs/smollm2
python -m experiments.minitron.run --scale=gpu --topology=v5e:4x4 --out=runs/minitron_gpu
"""

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from experiments import common, compiled
from experiments.minitron import report, results, smollm2, smollm2_report
from experiments.minitron.results import TEACHER
from experiments.minitron.scales import SCALES, Scale
from experiments.minitron.students import (
  CORRECTED,
  SEARCHED,
  SERVED,
  STUDENTS,
  Student,
  cut_run,
  shape,
)
from slm.base import console
from slm.data import loader
from slm.inference import tasks
from slm.models.config import DecoderConfig
from slm.objectives import heldout
from slm.pruning import commands, search, slicing
from slm.runs import config
from slm.training import loop
from slm.weights import sharding
from slm.weights.count import num_params

BY_NAME = {s.name: s for s in STUDENTS}
_ITEMS = 300  # of a task file, the first
_BYTES = 3 + 256  # ids of the tokenizer of bytes


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
    most = sum(num_params(shape(whole, self.sizes(BY_NAME['width']))).values())
    settings = self.settings(0, max(s.steps // 4, 1), s.peak, 'generic')
    grid = search.read_grid(s.grid, whole)
    found = search.search(
      str(teacher), str(self.calibrated(teacher, 'generic')), self.root / 'search',
      common.config('recover', settings), grid, search.Bounds(params=most),
    )  # fmt: skip
    return found['sizes']

  def trained(self, student: Student, seed: int) -> Path:
    """Train a student."""
    s, teacher = self.scale, self.runs / TEACHER
    steps = max(round(s.steps * student.steps), 1)
    if student.equal:
      equal = config.of(self.trained(BY_NAME[student.equal], seed))
      steps = results.equal_steps(equal.steps, equal.model, results.shape(teacher), equal.context)
    config_name, settings = self.training(student, seed, steps)
    if student.cut is None:
      vocab = loader.manifest(self.root / 'data')['tokenizer']['vocab']
      model = shape(DecoderConfig(vocab=vocab, **s.teacher), self.sizes(student))
      settings |= {f'model.{key}': getattr(model, key) for key in s.teacher}
    else:
      settings['init'] = str(self.cut(student, seed))
    if student.guide:
      settings['teacher'] = str(self.runs / student.guide)
    return self.train(f'{student.name}-{seed}', config_name, settings, self.on(student))

  def training(self, student: Student, seed: int, steps: int) -> tuple[str, dict[str, Any]]:
    """Return the config of a student's training and its settings, but for other runs' names."""
    peak = self.scale.scratch_peak if student.cut is None else self.scale.peak
    settings = self.settings(seed, steps, peak, self.on(student)) | dict(student.set)
    return 'recover' if student.guide else 'pretrain', settings

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
    jobs = _jobs(self.scale, students)
    for i, (seed, student) in enumerate(jobs, 1):
      print(f'[{i}/{len(jobs)}] {student.name}-{seed}', file=sys.stderr, flush=True)
      if student.seeds:
        self.trained(student, seed)
      else:
        self.cut(student, seed)


def outline(scale: Scale, chosen: Iterable[Student]) -> list[compiled.Run]:
  """List what a scale trains for some students, without data or weights, as `Study.run` does.

  The shape that a search would find is taken to be the largest that it may; the short trainings of
  its candidates are not listed.
  """
  vocab, context = scale.prepare.get('tokenizer.vocab', _BYTES), scale.prepare['context']
  study, whole = Study(scale, Path()), DecoderConfig(vocab=vocab, **scale.teacher)

  def run(name, config_name, settings, model, teacher=None):
    given = common.config(config_name, {**settings, 'data.path': '', 'init': ''})
    given['model'] = config.shaped(given['model'], model)
    return compiled.Run(name, config.without_data(config.complete(given), context), teacher)

  runs = [
    run(TEACHER, 'pretrain', study.settings(0, scale.teacher_steps, scale.teacher_peak, ''), whole)
  ]
  correction = study.settings(1, scale.steps, scale.correct_peak, '')
  runs += [run(name, 'pretrain', correction, whole) for name in CORRECTED]
  for seed, student in _jobs(scale, _needed(chosen)):
    if student.seeds:
      sizes = study.sizes(BY_NAME['width'] if student.shape == SEARCHED else student)
      model, steps = shape(whole, sizes), max(round(scale.steps * student.steps), 1)
      if student.equal:
        steps = results.equal_steps(steps, model, whole, context)
      config_name, settings = study.training(student, seed, steps)
      teacher = whole if student.guide else None
      runs.append(run(f'{student.name}-{seed}', config_name, settings, model, teacher))
  return runs


def _needed(chosen: Iterable[Student]) -> list[Student]:
  """Return students with those that they are cut from or compared with, which are trained too."""
  found = list(chosen)
  for student in found:  # grows
    others = (BY_NAME[name] for name in (student.parent, student.equal) if name)
    found += [other for other in others if other not in found]
  return found


def _jobs(scale: Scale, students: Iterable[Student]) -> list[tuple[int, Student]]:
  """Order students by seed, so that all are there early."""
  return [
    (seed, student)
    for i, seed in enumerate(scale.seeds)
    for student in students
    if i < max(student.seeds, 1)
  ]


def main(_: list[str]) -> None:
  """Run the study that the flags name."""
  f, scales = flags.FLAGS, SCALES | smollm2.SCALES
  console.required('out')
  if f.scale not in scales:
    raise ValueError(f'--scale: expected one of {sorted(scales)}, found {f.scale!r}')
  students = {s.name: s for s in smollm2.STUDENTS} if f.scale in smollm2.SCALES else BY_NAME
  if unknown := [name for name in f.only if name not in students]:
    raise ValueError(f'--only: expected some of {", ".join(students)}, found {unknown}')
  chosen = [students[name] for name in f.only or students]
  if f.topology:
    if f.scale in smollm2.SCALES:
      listed = smollm2.outline(scales[f.scale], f.teacher, chosen)
    else:
      listed = outline(scales[f.scale], chosen)
    print(compiled.study(listed, f.topology, Path(f.out)))
    return
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
  flags.DEFINE_integer('rounds', 9, 'Interleaved repeats of the measurement of speed.', 1)
  compiled.define_flag()
  console.run(main)
