"""The study's scales on a model that people know: SmolLM2-135M-Instruct cut to 60 % in four ways.

Each student is cut from the model (or from the model with a smaller vocabulary), distilled back on
general text, measured before and after, exported, and read by transformers.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import common, compiled
from experiments.minitron.students import shape
from slm.base import files
from slm.inference import tasks
from slm.interchange import card, convert, verify
from slm.objectives import heldout
from slm.pruning import commands, slicing
from slm.runs import config
from slm.training import loop
from slm.weights import sharding

TEACHER, SMALL_VOCABULARY = 'teacher', 'small-vocabulary'
TASKS = ('arc_easy', 'piqa', 'lambada')
CONTEXT = 512


@dataclasses.dataclass(frozen=True)
class Scale:
  """How much computation the study takes; `test_rows` and `items` of 0 take all."""

  title: str
  steps: int  # of a recovery
  batch_size: int  # rows of CONTEXT tokens
  accum: int
  calibration: int  # rows
  test_rows: int  # of the test split, evenly spaced
  items: int  # of every task file, the first
  peak: float = 5e-4  # learning rate of every recovery
  dtype: str = 'float32'
  chunk: int = 256  # tokens whose logits are held at once
  seeds: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class Student:
  """One way to 60 % of the parameters.

  Attributes:
    name: of its runs.
    sizes: what is kept of each axis, as slm.prune --sizes.
    whole: the model that is cut, and that teaches.
    config: configs/recover.py (forward KL) or configs/pretrain.py (next-token loss).
  """

  name: str
  sizes: str
  whole: str = TEACHER
  config: str = 'recover'


# 0.13M tokens a student: about five core-hours on two cores.
CPU = Scale(
  title='SmolLM2-135M-Instruct cut to 60 %',
  steps=128, batch_size=2, accum=1, calibration=64, test_rows=96, items=200,
)  # fmt: skip
# 8.3M tokens a student, half the corpus, for one accelerator; its peak rate is of short runs of
# `both`, see the README.
GPU = dataclasses.replace(
  CPU, steps=256, batch_size=64, accum=4, calibration=1024, test_rows=0, items=0,
  peak=1e-3, dtype='bfloat16', chunk=2048,
)  # fmt: skip
# To see that all of it works, on any teacher.
SMOKE = dataclasses.replace(CPU, steps=4, calibration=8, test_rows=8, items=8)
SCALES = {'smollm2': CPU, 'smollm2_gpu': GPU, 'smollm2_smoke': SMOKE}

VOCABULARY = 16_384
STUDENTS = (
  Student('depth', 'layers=15'),
  Student('width', 'embed=448,mlp=960'),
  Student('both', 'layers=22,embed=512,mlp=1152'),
  Student('vocabulary', 'layers=20', whole=SMALL_VOCABULARY),
  Student('depth_lm', 'layers=15', config='pretrain'),
)


class Study:
  """The study in a directory; what is there is not made again."""

  def __init__(self, scale: Scale, root: Path, teacher: str, corpus: str):
    """Open a study of a teacher, a run directory, on corpora below a directory.

    Raises:
      ValueError: if a task file is damaged, or transformers, which reads the exports, is missing.
      FileNotFoundError: if a task file is missing.
    """
    if not verify.available():
      raise ValueError("exports are read by transformers and torch: pip install 'slm[hf]'")
    self.scale, self.root, self.corpus = scale, root, Path(corpus)
    self.runs = root / 'runs'
    self.whole = {TEACHER: Path(teacher), SMALL_VOCABULARY: self.runs / SMALL_VOCABULARY}
    self.mesh = sharding.make_mesh({'data': -1})
    self.tasks = [str(self.corpus / 'eval' / f'{name}.jsonl.gz') for name in TASKS]
    for path in self.tasks:
      tasks.read(path)

  def data(self, whole: str) -> Path:
    """Return the directory of rows made with a whole model's tokenizer."""
    return self.root / ('data' if whole == TEACHER else f'data-{whole}')

  def prepare(self, whole: str) -> None:
    """Make rows of general text with a whole model's tokenizer."""
    splits = {s: f'general/{s}.jsonl.gz' for s in ('train', 'validation', 'test')}
    changes = {
      'tokenizer.name': 'huggingface',
      'tokenizer.path': str(self.whole[whole] / 'tokenizer'),
      'context': CONTEXT,
      'levels': (4,),
      'fit_windows': 2000,
      'dims': 16,
    }
    common.prepare_data({'generic': splits}, changes, (), str(self.corpus), self.data(whole))

  def calibrate(self, whole: str) -> Path:
    """Score a whole model's units."""
    out, rows = self.root / 'stats' / whole, self.scale.calibration
    data = str(self.data(whole))
    commands.calibrate(str(self.whole[whole]), data, str(out), 'generic/train', rows, 8)
    return out

  def cut(self, name: str, whole: str, sizes: str) -> Path:
    """Cut a whole model; widths are scored by activations, layers by block influence."""
    out, wanted = self.runs / name, slicing.read_sizes(sizes)
    commands.cut(str(self.whole[whole]), [str(self.calibrate(whole))], wanted, str(out), align=64)
    return out

  def wholes(self) -> None:
    """Prepare the text and cut the vocabulary, then prepare the text with its tokenizer."""
    self.prepare(TEACHER)
    self.cut(SMALL_VOCABULARY, TEACHER, f'vocab={VOCABULARY}')
    self.prepare(SMALL_VOCABULARY)
    for name, path in self.whole.items():
      self.measure(path, name)

  def recover(self, student: Student, seed: int) -> Path:
    """Train a cut student on general text under the model it was cut from."""
    s, out = self.scale, self.runs / f'{student.name}-{seed}'
    settings = training(s, seed) | {
      'init': str(self.cut(cut_name(student), student.whole, student.sizes)),
      'data.path': str(self.data(student.whole)),
    }
    if student.config == 'recover':
      settings['teacher'] = str(self.whole[student.whole])
    loop.train(common.config(student.config, settings), out)
    return out

  def measure(self, run: Path, whole: str) -> None:
    """Evaluate a run on the test split and put the tasks to it."""
    data, rows = str(self.data(whole)), self.scale.test_rows
    heldout.run(run, data, ['generic/test'], self.mesh, 8, max_rows=rows)
    tasks.run(run, self.tasks, self.mesh, 32, data=data, limit=self.scale.items)

  def export(self, run: Path) -> None:
    """Export a run and compare its logits and token ids with those that transformers computes."""
    out = self.root / 'exports' / run.name
    report = out.with_suffix('.json')
    if report.exists():
      return
    convert.export_model(run, out)
    card.write(out, 'apache-2.0')
    files.write_json(report, {'difference': verify.verify([out, run], 1e-3)})

  def run(self, students: Sequence[Student]) -> None:
    """Make, measure and export every student."""
    self.wholes()
    for seed in self.scale.seeds:
      for student in students:
        print(f'[{student.name}-{seed}]', file=sys.stderr, flush=True)
        recovered = self.recover(student, seed)
        self.measure(self.runs / cut_name(student), student.whole)
        self.measure(recovered, student.whole)
        self.export(recovered)


def training(scale: Scale, seed: int) -> dict[str, Any]:
  """Return what every training sets."""
  s = scale
  return {
    'seed': seed,
    'steps': s.steps,
    'dtype': s.dtype,
    'data.batch_size': s.batch_size,
    'data.accum': s.accum,
    'objective.chunk': s.chunk,
    'schedule.peak': s.peak,
    'schedule.warmup': s.steps // 16,
    'eval.every': max(s.steps // 8, 1),
    'eval.max_rows': min(s.test_rows or 256, 256),
    'eval.batch_size': 8,
    'checkpoint.every': max(s.steps // 4, 1),
    'tensorboard': False,
  }


def outline(scale: Scale, teacher: str, students: Sequence[Student]) -> list[compiled.Run]:
  """List what a scale trains from the config of its teacher, a run directory."""
  whole = {TEACHER: config.of(teacher).model}
  whole[SMALL_VOCABULARY] = dataclasses.replace(whole[TEACHER], vocab=VOCABULARY)
  runs = []
  for seed in scale.seeds:
    for student in students:
      model, given = whole[student.whole], common.config(student.config, training(scale, seed))
      small = shape(model, slicing.read_sizes(student.sizes))
      given['model'] = config.shaped(given['model'], small)
      cfg = config.without_data(config.complete(given), CONTEXT)
      guide = model if student.config == 'recover' else None
      runs.append(compiled.Run(f'{student.name}-{seed}', cfg, guide))
  return runs


def cut_name(student: Student) -> str:
  """Name the run of a student's cut, shared by those that are cut alike."""
  alike = next(s for s in STUDENTS if (s.sizes, s.whole) == (student.sizes, student.whole))
  return f'cut-{alike.name}'
