"""Minitron end to end: from a large model to a small one that transformers loads."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slm import objectives
from slm.base import artifact, files, schema
from slm.data import loader
from slm.inference import latency, scoring
from slm.interchange import card, convert, families, verify
from slm.models.config import DecoderConfig
from slm.objectives import heldout
from slm.pruning import commands, slicing
from slm.reporting import stats, tables
from slm.runs import config, rundir
from slm.runs.config import RunConfig
from slm.training import loop, optim, plan
from slm.weights import sharding
from slm.weights.count import num_params


@dataclasses.dataclass(frozen=True)
class CalibrateConfig:
  """The rows that units are scored on."""

  on: str = 'generic/train'  # SET/SPLIT[@INDEX]
  rows: int = 1024
  batch_size: int = 16


@dataclasses.dataclass(frozen=True)
class CutConfig:
  """Options of slm.prune cut."""

  norm_gain: str = 'none'
  depth: str = 'influence'
  task: str = ''  # file of items that choose the window of layers instead
  limit: int = 0  # items of it that are used, from the first; 0: all
  align: int = 0


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """A short correction of the teacher, which shows whether correcting it pays."""

  steps: int = 0  # 0: no probe, and no correction
  worth: float = 0.01  # nats by which the held-out loss must fall


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """The model that is exported for transformers."""

  dtype: str = ''  # '': as imported
  licence: str = ''
  tolerance: float = 1e-4  # largest difference from the logits of transformers


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
  """A recipe from a teacher to an exported student; `recover` and `correct` are training configs.

  If the probe pays, the teacher is corrected: by `correct` before it is cut, or with
  correct.steps=0 while it teaches.
  """

  teacher: str = ''  # run directory, or a directory of transformers
  data: str = ''  # made by slm.data.prepare with the teacher's tokenizer
  model: dict[str, Any] = dataclasses.field(default_factory=dict)  # teacher's shape, for --dry_run
  context: int = 0  # tokens in a row, for --dry_run
  calibrate: CalibrateConfig = CalibrateConfig()
  sizes: str = ''  # what to keep: axis=size,... of embed, mlp, heads, layers
  cut: CutConfig = CutConfig()
  recover: dict[str, Any] = dataclasses.field(default_factory=dict)
  probe: ProbeConfig = ProbeConfig()
  correct: dict[str, Any] = dataclasses.field(default_factory=dict)
  export: ExportConfig = ExportConfig()

  def training(self, shape: DecoderConfig) -> tuple[RunConfig, RunConfig]:
    """Return `recover` and `correct` as configs of a model of this shape."""
    given = (self.recover, self.correct)
    return tuple(config.read({**c, 'model': config.shaped(c['model'], shape)}) for c in given)


def _read(given: Mapping[str, Any]) -> RecipeConfig:
  return schema.read(RecipeConfig, artifact.plain(dict(given)))


@artifact.writes('workdir')
def minitron(given: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
  """Make the small model below a directory; returns what summary.json holds.

  Writes teacher/ (if imported), probe/ and corrected/ (if asked for, and if it pays), stats/, cut/,
  student/ and export/.

  Raises:
    ValueError: if a part of the config does not fit the teacher or the data.
  """
  cfg, folder = _read(given), Path(workdir)
  for key in ('teacher', 'data', 'sizes'):
    if not getattr(cfg, key):
      raise ValueError(f'{key}: expected a value, found nothing')
  if (folder / 'config.json').exists():
    raise ValueError(f'{folder}: holds a run: choose another directory')
  teacher, sizes = Path(cfg.teacher), slicing.read_sizes(cfg.sizes)
  if (teacher / 'config.json').exists() and rundir.of_transformers(teacher):
    convert.import_model(teacher, folder / 'teacher')
    teacher = folder / 'teacher'
  shape = scoring.shape(teacher)
  recover, correct = cfg.training(shape)
  recover = dataclasses.replace(recover, data=dataclasses.replace(recover.data, path=cfg.data))
  together = _check(cfg, recover, correct, shape)
  runs, summary, pays = {'teacher': teacher}, {}, False
  if cfg.probe.steps:
    runs['probe'] = folder / 'probe'
    summary['probe'] = _probe(cfg, recover, correct, teacher, runs['probe'])
    pays = summary['probe']['pays']
  if pays and correct.steps:
    runs['corrected'] = teacher = folder / 'corrected'
    loop.train(_correction(recover, correct, runs['teacher'], correct.steps), teacher)
  elif pays:
    recover = together
  runs |= {'cut': folder / 'cut', 'student': folder / 'student'}
  calibration = str(folder / 'stats')
  commands.calibrate(str(teacher), cfg.data, calibration, **vars(cfg.calibrate))
  commands.cut(str(teacher), [calibration], sizes, str(runs['cut']), **vars(cfg.cut))
  recover = dataclasses.replace(recover, init=str(runs['cut']), teacher=str(teacher))
  loop.train(schema.plain(recover), runs['student'])
  export = folder / 'export'
  convert.export_model(runs['student'], export, dtype=cfg.export.dtype)
  card.write(export, cfg.export.licence)
  summary |= _summary(runs, cfg, recover)
  if verify.available():
    summary['verified'] = worst = verify.verify([export, runs['student']], cfg.export.tolerance)
    if worst > cfg.export.tolerance:
      raise ValueError(f'{export}: its logits differ from those of transformers by {worst:.3g}')
  files.write_json(folder / 'summary.json', summary)
  return summary


def _check(
  cfg: RecipeConfig, recover: RunConfig, correct: RunConfig, teacher: DecoderConfig
) -> RunConfig:
  """Refuse a recipe of which a part would fail; returns the recovery of `_together`."""
  sizes, student = slicing.read_sizes(cfg.sizes), _student(cfg, teacher)
  # The student must be exportable; its layer types, if any, depend on the layers kept.
  if not ('layers' in sizes and teacher.layer_types):
    families.find(student)
  if recover.distributed.enable:
    raise ValueError(
      'recover.distributed.enable: the recipe runs on one process; on several run slm.prune, '
      'slm.train and slm.hf by themselves'
    )
  if recover.teacher_cache:
    raise ValueError('recover.teacher_cache: the recipe distils from the teacher itself')
  slicing.check_options(sizes, cfg.cut.task, cfg.cut.norm_gain)
  together = _together(cfg, recover, correct)
  objectives.build(together.objective, {})
  optim.schedule(recover.schedule, recover.steps)
  loader.Split(cfg.data, recover.data.set, recover.data.split, recover.data.index)
  return together


def _student(cfg: RecipeConfig, teacher: DecoderConfig) -> DecoderConfig:
  """Return the shape of the student."""
  sizes = slicing.read_sizes(cfg.sizes)
  slicing.check_sizes(teacher, sizes, cfg.cut.align)
  if 'vocab' in sizes:
    raise ValueError(
      'sizes: vocab: teacher and student need the same tokenizer: first cut the teacher to that '
      'vocabulary with slm.prune, and prepare the data with its tokenizer'
    )
  return slicing.shape(teacher, {axis: np.arange(size) for axis, size in sizes.items()})


def _together(cfg: RecipeConfig, recover: RunConfig, correct: RunConfig) -> RunConfig:
  """Return the recovery, in which the teacher is corrected too if the config says so."""
  if correct.steps or not cfg.probe.steps:
    return recover
  share = correct.schedule.peak / recover.schedule.peak
  if share > 1:
    raise ValueError(
      f'correct.schedule.peak={correct.schedule.peak:g}: with correct.steps=0 expected at most '
      f'recover.schedule.peak={recover.schedule.peak:g}, as the teacher learns with the student'
    )
  objective = dataclasses.replace(recover.objective, correct=share)
  return dataclasses.replace(recover, objective=objective)


def _correction(
  recover: RunConfig, correct: RunConfig, teacher: str | Path, steps: int
) -> dict[str, Any]:
  """Return the config that trains a teacher on the text of the recovery."""
  rows, schedule = recover.data, correct.schedule
  data = dataclasses.replace(correct.data, path=rows.path, set=rows.set, index=rows.index)
  schedule = dataclasses.replace(schedule, warmup=min(schedule.warmup, steps // 10))
  changes = {'phase': 'correct', 'init': str(teacher), 'data': data, 'schedule': schedule}
  return schema.plain(dataclasses.replace(correct, steps=steps, **changes))


def _probe(
  cfg: RecipeConfig, recover: RunConfig, correct: RunConfig, teacher: Path, run: Path
) -> dict[str, Any]:
  """Measure by a short run whether correcting a teacher pays (arXiv 2408.11796, section 3.1).

  It does if the held-out loss falls by more than cfg.probe.worth at the lower end of the 95 %
  interval of the paired bootstrap.
  """
  loop.train(_correction(recover, correct, teacher, cfg.probe.steps), run)
  on, rows = f'{recover.data.set}/validation', {}
  for path in (teacher, run):
    mesh = sharding.fit_mesh(scoring.shape(path).embed)
    heldout.run(path, cfg.data, [on], mesh, recover.eval.batch_size)
    rows[path, 0] = heldout.kept(path, on)[0]
  losses = stats.losses(rows, 0, on, stats.documents(cfg.data, on))
  before, after = losses[teacher], losses[run]
  gains = before.replicates[0] - after.replicates[0]
  low, high = np.quantile(gains, (0.025, 0.975)).tolist()
  gain = before.seeds[0] - after.seeds[0]
  return {'gain': gain, 'interval': [low, high], 'pays': low > cfg.probe.worth}


def _summary(runs: Mapping[str, Path], cfg: RecipeConfig, recover: RunConfig) -> dict[str, Any]:
  """Measure the models side by side: size, held-out loss, cost and speed on this machine."""
  on = f'{recover.data.set}/test'
  shapes = {name: scoring.shape(path) for name, path in runs.items()}
  served = {n: shapes[n] for n in ('teacher', 'student')}
  speed = latency.measure(served, recover.dtype, 1, 64, 32, 5)
  rows = {}
  for name, path in runs.items():
    mesh = sharding.fit_mesh(shapes[name].embed)
    loss = heldout.run(path, cfg.data, [on], mesh, recover.eval.batch_size)[on]
    cost = stats.training_cost(path) if name != 'teacher' else stats.Cost()
    rows[name] = {
      'parameters': sum(num_params(shapes[name]).values()),
      'loss': loss['loss'],
      'bits per byte': loss['bpb'],
      'flops': cost.flops,
      'tokens': cost.tokens,
      'ms per token': 1e3 * speed[name]['token'] if name in speed else None,
    }
  return {'on': on, 'models': rows, 'machine': jax.devices()[0].device_kind}


def table(summary: Mapping[str, Any]) -> str:
  """Format a summary for a terminal."""
  head = ['', 'parameters', 'loss', 'bits/byte', 'ms/token', 'tokens', 'FLOPs']
  rows = [
    [
      name,
      f'{m["parameters"]:,}',
      f'{m["loss"]:.4f}',
      f'{m["bits per byte"]:.4f}',
      '' if m['ms per token'] is None else f'{m["ms per token"]:.2f}',
      *((f'{m["tokens"]:,}', f'{m["flops"]:.2e}') if m['flops'] else ('', '')),
    ]
    for name, m in summary['models'].items()
  ]
  lines = [tables.text((head, rows))]
  lines.append(f'loss in nats per token on {summary["on"]}, decoding at one row on this machine')
  if probe := summary.get('probe'):
    low, high = probe['interval']
    lines.append(
      f"a short correction lowers the teacher's held-out loss by {probe['gain']:.4f} "
      f'[{low:.4f}, {high:.4f}]: it was {"corrected" if probe["pays"] else "left as it is"}'
    )
  if 'verified' in summary:
    lines.append(f'transformers computes the same logits, within {summary["verified"]:.1e}')
  else:
    lines.append("not verified: transformers or torch is not installed (pip install 'slm[hf]')")
  return '\n'.join(lines)


class Outline(NamedTuple):
  """A recipe without data or weights: shapes, and the configs of its training."""

  cfg: RecipeConfig
  teacher: DecoderConfig
  student: DecoderConfig
  recover: RunConfig
  correct: RunConfig


def outline(given: Mapping[str, Any]) -> Outline:
  """Read a recipe from the shape of its teacher alone.

  Raises:
    ValueError: if neither a teacher nor its shape is given, or a size does not fit.
  """
  cfg = _read(given)
  if not (cfg.teacher or cfg.model):
    raise ValueError('teacher or model: expected one of them, found neither')
  if cfg.teacher:
    teacher = scoring.shape(Path(cfg.teacher))
  else:
    teacher = schema.read(DecoderConfig, cfg.model, 'model')
  student = _student(cfg, teacher)
  context = cfg.context or (loader.manifest(cfg.data)['context'] if cfg.data else 0)
  if not context:
    raise ValueError('data or context: expected one of them, found neither')
  recover = dataclasses.replace(cfg.training(student)[0], context=context)
  correct = dataclasses.replace(cfg.training(teacher)[1], context=context)
  return Outline(cfg, teacher, student, _together(cfg, recover, correct), correct)


def dry_run(
  given: Mapping[str, Any], devices: int, chip: str, mfu: float, argv: Sequence[str] = ()
) -> tuple[DecoderConfig, DecoderConfig, str]:
  """Plan a recipe: the shapes of teacher and student, and the plan of the recovery as text.

  `argv` are the arguments of the command, of which the last line is made (plan.exact).
  """
  cfg, teacher, student, recover, correct = outline(given)
  text = f'{"teacher parameters":28} {sum(num_params(teacher).values()):,}\n'
  recovery = plan.plan(recover, devices, chip, mfu, teacher)
  text += plan.text(recovery)
  if cfg.probe.steps:
    longest = _correction(recover, correct, '', cfg.probe.steps + correct.steps)
    text += '\n\nthe probe, and the correction of the teacher if it pays\n'
    text += plan.text(plan.plan(config.read(longest), devices, chip, mfu))
  return teacher, student, text + plan.exact(recovery, argv)
