"""Tables, plots and page of the study on SmolLM2, from its run directories."""

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import common
from experiments.minitron import report
from experiments.minitron.smollm2 import (
  CONTEXT,
  SMALL_VOCABULARY,
  STUDENTS,
  TASKS,
  TEACHER,
  Study,
  cut_name,
)
from slm.base import files
from slm.data import loader
from slm.models.config import DecoderConfig
from slm.objectives import heldout
from slm.reporting import figures, page, stats
from slm.reporting.stats import Cost, Loss
from slm.reporting.tables import Table, cost, count, interval
from slm.runs import config, rundir
from slm.weights.count import num_params

CHANCE = {'arc_easy': 0.25, 'piqa': 0.5, 'lambada': 0.0}
COLOURS = {s.name: figures.style(i + 1) for i, s in enumerate(STUDENTS)}


class Results:
  """What the study's run directories hold: by student, its losses as cut and recovered."""

  def __init__(self, study: Study):
    """Read every evaluation.

    Raises:
      ValueError: if a run was evaluated on other rows than the rest.
    """
    self.study = study
    self.students = [s for s in STUDENTS if self.runs(s.name)]  # begun ones too
    self.whole = {TEACHER: TEACHER, SMALL_VOCABULARY: SMALL_VOCABULARY}
    self.whole |= {s.name: s.whole for s in self.students}
    self.cut: dict[str, Loss] = {}
    self.loss: dict[str, Loss] = {}  # of students that are recovered and evaluated
    for whole in study.whole:
      self._read(whole)

  def runs(self, name: str) -> list[Path]:
    """List the runs of a student that were evaluated at least once while they trained, by seed."""
    paths = [self.study.runs / f'{name}-{seed}' for seed in self.study.scale.seeds]
    return [p for p in paths if (p / 'metrics.jsonl').exists() and self.curve(p)]

  def recovered(self, name: str) -> list[Path]:
    """List the finished and evaluated runs of a student, by seed."""
    return [p for p in self.runs(name) if (p / 'eval.json').exists()]

  def curve(self, run: Path) -> dict[int, float]:
    """Return validation losses (nats per token) by step."""
    lines = rundir.read_metrics(run)
    return {line['step']: line['eval_loss'] for line in lines if 'eval_loss' in line}

  def bits(self, whole: str, loss: float) -> float:
    """Convert a validation loss to bits per byte."""
    facts = loader.facts(self.study.data(whole), 'generic/validation')
    return loss / math.log(2) / facts['bytes_per_token']

  def common_step(self) -> int:
    """Return the last step at which every student was evaluated."""
    return max(set.intersection(*(set(self.curve(self.runs(s.name)[0])) for s in self.students)))

  def _read(self, whole: str) -> None:
    """Read the losses of the models with one vocabulary, resampled alike."""
    rows = {(('recovered', whole), 0): heldout.kept(self.study.whole[whole], 'generic/test')[0]}
    for student in self.students:
      if student.whole == whole:
        for path in self.recovered(student.name):
          seed = int(path.name.rpartition('-')[2])
          rows[('recovered', student.name), seed] = heldout.kept(path, 'generic/test')[0]
        cut = self.study.runs / cut_name(student)
        if (cut / 'eval.json').exists():
          rows[('cut', student.name), 0] = heldout.kept(cut, 'generic/test')[0]
    data = self.study.data(whole)
    facts = loader.facts(data, 'generic/test')
    tokens = next(iter(rows.values()))[:, 1]
    if not all(np.array_equal(values[:, 1], tokens) for values in rows.values()):
      raise ValueError(f'{self.study.runs}: evaluated on different rows of {data}')
    documents = files.read_npy(data / 'generic' / 'test' / 'documents.npy')
    documents = loader.spaced(documents, self.study.scale.test_rows)
    num_bytes = tokens.sum() * facts['bytes_per_token']
    for (stage, name), loss in stats.losses(rows, num_bytes, whole, documents).items():
      (self.cut if stage == 'cut' else self.loss)[name] = loss

  def shape(self, name: str) -> DecoderConfig:
    """Return the shape of a model."""
    path = self.study.whole.get(name)
    return config.of(path or self.runs(name)[0]).model

  def parameters(self, name: str) -> int:
    """Count a model's parameters."""
    return sum(num_params(self.shape(name)).values())

  def cost(self, name: str) -> Cost:
    """Return what one recovery took so far, its teacher's forward passes included."""
    costs = [stats.training_cost(p) or Cost() for p in self.runs(name)]
    return sum(costs, Cost()) * (1 / len(costs))


def students_table(r: Results) -> Table:
  """Build a line per model: its size, losses and cost."""
  head = ['model', 'parameters', 'of the teacher', 'loss as cut', 'loss', 'to depth, 95 %']
  head += ['bits per byte as cut', 'bits per byte', 'seeds', 'tokens', 'FLOPs', 'device time']
  rows, whole, step = [], r.parameters(TEACHER), r.common_step()
  tokens = step * r.study.scale.batch_size * CONTEXT
  head.insert(8, f'validation, {count(tokens)} tokens')
  for name in r.whole:
    cut, loss, trained = r.cut.get(name), r.loss.get(name), name not in r.study.whole
    missing = 'not run' if trained else '–'
    paired = loss and trained and name != 'depth' and 'depth' in r.loss
    paired = paired and r.whole[name] == TEACHER
    rows.append([
      name,
      f'{r.parameters(name):,}',
      f'{r.parameters(name) / whole:.1%}',
      f'{cut.value:.3f}' if cut else missing,
      f'{loss.value:.3f}' if loss else missing,
      interval(stats.difference(loss, r.loss['depth'])) if paired else '–',
      f'{cut.bpb:.3f}' if cut else missing,
      f'{loss.bpb:.3f}' if loss else missing,
      f'{r.bits(r.whole[name], r.curve(r.runs(name)[0])[step]):.3f}' if trained else '–',
      f'{len(r.recovered(name))}' if trained else '–',
      *(cost(r.cost(name)) if trained else ['–'] * 3),
    ])  # fmt: skip
  return head, rows


def served_table(r: Results, speed: Mapping[str, dict]) -> Table:
  """Build the table of decoding speed on this machine."""
  head = ['model', 'MB in float32']
  head += [
    f'{what}, {b} row{"s" * (b > 1)}' for b in report.BATCHES for what in ('prefill', 'decode')
  ]
  rows, teacher = [], speed[TEACHER]['1']
  moved = lambda m: m['weight_bytes'] + m['cache_bytes']
  for name, measured in speed.items():
    one, cells = measured['1'], []
    for batch in report.BATCHES:
      m = measured[str(batch)]
      cells += [f'{batch * report.PROMPT / m["prefill"]:,.0f}', f'{batch / m["token"]:,.1f}']
    rows.append([
      name,
      f'{one["weight_bytes"] / 1e6:.0f}',
      *cells,
      f'{teacher["token"] / one["token"]:.2f}',
      f'{moved(teacher) / moved(one):.2f}',
      f'{teacher["flops"] / one["flops"]:.2f}',
    ])  # fmt: skip
  return [*head, 'speed-up', 'by bytes', 'by FLOPs'], rows


def exports_table(r: Results) -> Table:
  """Build the table of exports: how far transformers' logits differ, relative to the largest."""
  rows = []
  for student in r.students:
    for path in r.recovered(student.name):
      file = r.study.root / 'exports' / f'{path.name}.json'
      difference = f'{files.read_json(file)["difference"]:.1e}' if file.exists() else 'not run'
      rows.append([path.name, difference])
  return ['export', "transformers' logits, relative difference"], rows


def answering(r: Results) -> dict[str, list[Path]]:
  """Return the runs of the models that tasks were put to: as cut and as recovered."""
  runs = {name: [path] for name, path in r.study.whole.items()}
  for student in r.students:
    runs[f'{student.name}, as cut'] = [r.study.runs / cut_name(student)]
    runs[student.name] = r.recovered(student.name)
  return runs


def _recovery(r: Results) -> figures.Plot:
  """Draw held-out bits per byte against tokens of recovery."""
  figure = Figure(figsize=(7.6, 4.2), layout='constrained')
  ax = figure.subplots()
  for student in r.students:
    curve = r.curve(r.runs(student.name)[0])
    tokens = [step * r.study.scale.batch_size * CONTEXT for step in curve]
    values = [r.bits(student.whole, loss) for loss in curve.values()]
    colour, marker = COLOURS[student.name]
    ax.plot(tokens, values, color=colour, marker=marker, ms=4, label=student.name)
  ax.set(xlabel='tokens of recovery', ylabel='held-out bits per byte')
  ax.xaxis.set_major_formatter(lambda x, _: count(x))
  ax.legend(frameon=False)
  caption = 'Held-out bits per byte on validation rows while the students recover (first seed).'
  return figures.save(figure, 'recovery', 'Recovery', caption)


def _tasks(r: Results) -> figures.Plot:
  """Draw accuracies as cut and as recovered, beside the teacher's and chance."""
  figure = Figure(figsize=(8.8, 3.4), layout='constrained')
  answers = lambda path: files.read_json(rundir.evaluations(path, 'tasks').with_suffix('.json'))
  teacher = answers(r.study.whole[TEACHER])
  for ax, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
    students = [s for s in r.students if s.name in r.loss]
    for i, student in enumerate(students):
      colour, marker = COLOURS[student.name]
      cut = answers(r.study.runs / cut_name(student))[task]
      after = answers(r.recovered(student.name)[0])[task]
      ax.plot([i, i], [cut['acc'], after['acc']], color=colour, alpha=0.4)
      ax.plot(i, cut['acc'], marker=marker, color=colour, mfc='none')
      ax.errorbar(i, after['acc'], yerr=1.96 * after['acc_stderr'], color=colour, fmt=marker)
    ax.axhline(teacher[task]['acc'], color=figures.INK, linewidth=0.8, linestyle='--')
    ax.axhline(CHANCE[task], color=figures.INK, linewidth=0.8, linestyle=':')
    ax.set_xticks(range(len(students)), [s.name for s in students], rotation=30, ha='right')
    ax.set_title(f'{task}, accuracy')
    ax.margins(x=0.3)
    ax.set_ylim(0)
  caption = (
    'Share of questions answered right, without examples: hollow as cut, filled as recovered with '
    '95 % intervals over questions; the dashed line is the teacher, the dotted one chance.'
  )
  return figures.save(figure, 'tasks', 'What is answered', caption)


def _speed(r: Results, speed: Mapping[str, dict]) -> figures.Plot:
  """Draw held-out bits per byte against the measured time of a decoding step."""
  figure = Figure(figsize=(7.6, 4.2), layout='constrained')
  ax = figure.subplots()
  for name in speed.keys() & r.loss.keys():
    one = speed[name]['1']
    colour, marker = COLOURS.get(name, (figures.INK, 'o'))
    x, dx = 1e3 * one['token'], 1e3 * one['token_spread']
    ax.errorbar(x, r.loss[name].bpb, xerr=dx, fmt=marker, color=colour)
    ax.annotate(f' {name}', (x, r.loss[name].bpb), va='bottom', color=colour)
  ax.margins(x=0.15)
  ax.set(xlabel='milliseconds per token, one row', ylabel='held-out bits per byte')
  caption = 'Held-out bits per byte against the measured time of a decoding step on this machine.'
  return figures.save(figure, 'speed', 'Quality against speed', caption)


def answer(r: Results, speed: Mapping[str, dict]) -> str:
  """State the study's result in a sentence."""
  best = min(r.loss.keys() - r.study.whole.keys(), key=lambda name: r.loss[name].bpb)
  share = r.parameters(best) / r.parameters(TEACHER)
  times = speed[TEACHER]['1']['token'] / speed[best]['1']['token']
  return (
    f'Of the evaluated students with about 60 % of the parameters, {best} ({share:.1%}) is '
    f'best: {r.cut[best].bpb:.3f} bits per byte as cut, {r.loss[best].bpb:.3f} after '
    f'{count(r.cost(best).tokens)} tokens of recovery; the teacher has {r.loss[TEACHER].bpb:.3f}. '
    f'It decodes {times:.2f} times as fast.'
  )


def write(study: Study, rounds: int) -> None:
  """Write report.html, table.md and plots/ of what has been run."""
  r = Results(study)
  if not r.loss.keys() - study.whole.keys():
    raise ValueError(f'{study.root}: no student is recovered and evaluated')
  shapes = {name: r.shape(name) for name in r.whole if name not in (SMALL_VOCABULARY, 'depth_lm')}
  measured = report.speeds(study.root / 'speed.json', shapes, rounds)
  speed, machine = measured['models'], measured['asked']['machine']
  served = f'{report.DEPLOYMENT} That machine: {machine["device_kind"]}, {machine["platform"]}.'
  with matplotlib.rc_context(figures.RC):
    drawn = [_recovery(r), _tasks(r), _speed(r, speed)]
  runs = [path for s in r.students for path in r.recovered(s.name)]
  sections = [
    ('Four ways to 60 %', STUDENTS_NOTE, students_table(r)),
    ('What is answered', TASKS_NOTE, report.tasks_table(answering(r), TASKS)),
    ('What is served', served, served_table(r, speed)),
    ('What transformers reads', EXPORTS_NOTE, exports_table(r)),
    ('Where it was trained', 'The environment of the runs.', page.environment(runs)),
  ]
  common.publish(study.root, study.scale.title, answer(r, speed), sections, drawn)


STUDENTS_NOTE = (
  'Held-out losses on the test split of the general corpus in nats per token, and in bits per '
  'byte, which compare across vocabularies; the column of validation bits per byte compares all at '
  'equal tokens while they train. Differences to `depth` have paired bootstrap 95 % intervals over '
  'documents (negative: lower loss). Cost is of one recovery, its teacher included; widths were '
  'scored by activations, layers by block influence, ids by frequency. '
  f'`{SMALL_VOCABULARY}` is the teacher with 16,384 ids, not trained; `vocabulary` is cut from it '
  'and learns from it. `depth_lm` is `depth` trained on the next-token loss for as many tokens.'
)
TASKS_NOTE = (
  'Public tasks without examples: the share answered right and the bits per byte of the right '
  'answer (of the last word, for LAMBADA); ± is the standard error over questions.'
)
EXPORTS_NOTE = (
  'Each recovered model is exported and loaded by transformers, which computes the same token ids '
  'and, up to this, the same logits.'
)
