"""From a big model to a small one that transformers loads: Minitron end to end."""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from slm.reporting import stats
from slm.runs import config, ledger, rundir
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
  """How a teacher is cut, see slm.prune cut; with a task its items choose the window of layers."""

  norm_gain: str = 'none'
  depth: str = 'influence'
  task: str = ''
  limit: int = 0
  align: int = 0


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """A short correction of the teacher, to find out whether it pays."""

  steps: int = 0  # 0: it is left as it is
  worth: float = 0.01  # nats that its held-out loss must fall by


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """What is written at the end."""

  dtype: str = ''  # '': as imported
  licence: str = ''
  tolerance: float = 1e-4  # of logits computed by transformers


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
  """A recipe from a teacher to an exported student; `recover` and `correct` are training configs.

  If `probe` pays, the teacher is corrected: by `correct` before it is cut, or with correct.steps=0
  while it teaches.
  """

  teacher: str = ''  # run directory, or a directory of transformers
  data: str = ''  # made by slm.data.prepare with the teacher's tokenizer
  model: dict[str, Any] = dataclasses.field(default_factory=dict)  # its shape, for --dry_run alone
  context: int = 0  # tokens in a row, for --dry_run
  calibrate: CalibrateConfig = CalibrateConfig()
  sizes: str = ''  # what to keep: axis=size,... of embed, mlp, heads, layers
  cut: CutConfig = CutConfig()
  recover: dict[str, Any] = dataclasses.field(default_factory=dict)
  probe: ProbeConfig = ProbeConfig()
  correct: dict[str, Any] = dataclasses.field(default_factory=dict)
  export: ExportConfig = ExportConfig()

  def training(self, shape: DecoderConfig) -> tuple[RunConfig, RunConfig]:
    """Return `recover` and `correct` as they stand, of a model of this shape."""
    given = (self.recover, self.correct)
    return tuple(config.read({**c, 'model': config.shaped(c['model'], shape)}) for c in given)


@artifact.writes('workdir')
def minitron(given: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
  """Make the small model below a directory; returns what summary.json holds.

  Writes teacher/ (if imported), probe/ and corrected/ (if asked for, and if it pays), stats/, cut/,
  student/ and export/.

  Raises:
    ValueError: if a part of the config does not fit the teacher or the data.
  """
  cfg, folder = schema.read(RecipeConfig, json.loads(json.dumps(dict(given)))), Path(workdir)
  for key in ('teacher', 'data', 'sizes'):
    if not getattr(cfg, key):
      raise ValueError(f'{key}: expected a value, found nothing')
  if (folder / 'config.json').exists():
    raise ValueError(f'{folder}: holds a run: choose another directory')
  teacher, sizes = Path(cfg.teacher), slicing.read_sizes(cfg.sizes)
  if (teacher / 'config.json').exists() and rundir.of_transformers(teacher):
    convert.import_model(teacher, folder / 'teacher')
    teacher = folder / 'teacher'
  recover, correct = cfg.training(scoring.shape(teacher))
  recover = dataclasses.replace(recover, data=dataclasses.replace(recover.data, path=cfg.data))
  _check(cfg, recover, correct, scoring.shape(teacher), sizes)
  runs, summary, pays = {'teacher': teacher}, {}, False
  if cfg.probe.steps:
    summary['probe'] = _probe(cfg, recover, correct, teacher, folder / 'probe')
    runs['probe'], pays = folder / 'probe', summary['probe']['pays']
  if pays and correct.steps:
    runs['corrected'] = teacher = folder / 'corrected'
    loop.train(_correction(recover, correct, runs['teacher'], correct.steps), teacher)
  elif pays:
    recover = _meanwhile(cfg, recover, correct)
  stats = str(folder / 'stats')
  commands.calibrate(str(teacher), cfg.data, stats, **vars(cfg.calibrate))
  commands.cut(str(teacher), [stats], sizes, str(folder / 'cut'), **vars(cfg.cut))
  recover = dataclasses.replace(recover, init=str(folder / 'cut'), teacher=str(teacher))
  loop.train(schema.plain(recover), folder / 'student')
  convert.export_model(folder / 'student', folder / 'export', dtype=cfg.export.dtype)
  card.write(folder / 'export', cfg.export.licence)
  summary |= _summary(runs | {'cut': folder / 'cut', 'student': folder / 'student'}, cfg, recover)
  summary |= _verified(folder, cfg.export.tolerance)
  files.write_json(folder / 'summary.json', summary)
  return summary


def _verified(folder: Path, tolerance: float) -> dict[str, float]:
  """Compare the export with transformers, where that is installed."""
  if not (importlib.util.find_spec('transformers') and importlib.util.find_spec('torch')):
    return {}
  worst = verify.verify([folder / 'export', folder / 'student'], tolerance)
  if worst > tolerance:
    raise ValueError(f'{folder / "export"}: transformers computes other logits, by {worst:.3g}')
  return {'verified': worst}


def _check(
  cfg: RecipeConfig, recover: RunConfig, correct: RunConfig, teacher: DecoderConfig,
  sizes: Mapping[str, int],
) -> None:  # fmt: skip
  """Refuse a recipe that some part of would fail, before any work."""
  slicing.check_sizes(teacher, sizes, cfg.cut.align)
  _check_vocabulary(sizes)
  _exportable(teacher, sizes)
  if recover.distributed.enable:
    raise ValueError(
      'recover.distributed.enable: start slm.prune, slm.train and slm.hf by themselves'
    )
  if recover.teacher_cache:
    raise ValueError('recover.teacher_cache: here the teacher itself is asked')
  slicing.check_options(sizes, cfg.cut.task, cfg.cut.norm_gain)
  # At the rate that the probe tries, not at the student's.
  objectives.build(_meanwhile(cfg, recover, correct).objective, {})
  optim.schedule(recover.schedule, recover.steps)
  loader.Split(cfg.data, recover.data.set, recover.data.split, recover.data.index)


def _check_vocabulary(sizes: Mapping[str, int]) -> None:
  if 'vocab' in sizes:
    raise ValueError(
      "sizes: vocab: a teacher has its student's tokenizer: cut it to that vocabulary first, with "
      'slm.prune, and prepare the data with its tokenizer'
    )


def _exportable(teacher: DecoderConfig, sizes: Mapping[str, int]) -> None:
  """Refuse a shape that no architecture of transformers has, before anything is trained.

  Of layers of several types it depends on which are kept: that is not known yet.

  Raises:
    ValueError: saying why.
  """
  if not ('layers' in sizes and teacher.layer_types):
    families.find(slicing.shape(teacher, {axis: np.arange(n) for axis, n in sizes.items()}))


def _meanwhile(cfg: RecipeConfig, recover: RunConfig, correct: RunConfig) -> RunConfig:
  """Return the recovery under a teacher that learns beside it, if the probe can ask for that.

  Raises:
    ValueError: if the teacher would learn faster than the student.
  """
  if correct.steps or not cfg.probe.steps:
    return recover
  share = correct.schedule.peak / recover.schedule.peak
  if share > 1:
    raise ValueError(
      f'correct.schedule.peak={correct.schedule.peak:g}: expected at most '
      f'recover.schedule.peak={recover.schedule.peak:g} of a teacher that is corrected meanwhile '
      '(correct.steps=0)'
    )
  objective = dataclasses.replace(recover.objective, correct=share)
  return dataclasses.replace(recover, objective=objective)


def _correction(
  recover: RunConfig, correct: RunConfig, teacher: str | Path, steps: int
) -> dict[str, Any]:
  """Return the config of a teacher's training on the text of the recovery."""
  d, schedule = recover.data, correct.schedule
  warmup = min(schedule.warmup, steps // 10)
  return schema.plain(
    dataclasses.replace(
      correct,
      phase='correct',
      init=str(teacher),
      steps=steps,
      data=dataclasses.replace(correct.data, path=d.path, set=d.set, index=d.index),
      schedule=dataclasses.replace(schedule, warmup=warmup),
    )
  )


def _probe(
  cfg: RecipeConfig, recover: RunConfig, correct: RunConfig, teacher: Path, run: Path
) -> dict[str, Any]:
  """Find out whether correcting a teacher pays (arXiv 2408.11796, section 3.1), by a short run.

  It does if the held-out loss falls by more than what is asked, at the lower end of the paired
  bootstrap's 95 % interval.
  """
  loop.train(_correction(recover, correct, teacher, cfg.probe.steps), run)
  on, rows = f'{recover.data.set}/validation', {}
  for path in (teacher, run):
    mesh = sharding.fit_mesh(scoring.shape(path).embed)
    heldout.run(path, cfg.data, [on], mesh, recover.eval.batch_size)
    rows[path, 0] = heldout.kept(path, on)[0]
  by_run = stats.losses(rows, 0, on, stats.documents(cfg.data, on))
  before, after = by_run[teacher], by_run[run]
  gain = before.seeds[0] - after.seeds[0]
  drawn = before.replicates[0] - after.replicates[0]
  low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
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
    phases = ledger.read_ledger(path)['phases'] if name != 'teacher' else []
    rows[name] = {
      'parameters': sum(num_params(shapes[name]).values()),
      'loss': loss['loss'],
      'bits per byte': loss['bpb'],
      'flops': sum(p['flops'] for p in phases if p['phase'] != 'evaluate'),
      'tokens': sum(p['tokens'] for p in phases if p['phase'] != 'evaluate'),
      'ms per token': 1e3 * speed[name]['token'] if name in speed else None,
    }
  return {'on': on, 'models': rows, 'machine': jax.devices()[0].device_kind}


def table(found: Mapping[str, Any]) -> str:
  """Lay out a summary for reading."""
  lines = [
    f'{"":9s} {"parameters":>12s} {"loss":>8s} {"bits/byte":>10s} {"ms/token":>9s} '
    f'{"tokens":>12s} {"FLOPs":>9s}'
  ]
  for name, m in found['models'].items():
    speed = '' if m['ms per token'] is None else f'{m["ms per token"]:.2f}'
    cost = f'{m["tokens"]:12,} {m["flops"]:9.2e}' if m['flops'] else ''
    lines.append(
      f'{name:9s} {m["parameters"]:12,} {m["loss"]:8.4f} {m["bits per byte"]:10.4f} {speed:>9s} '
      f'{cost}'
    )
  lines.append(f'loss in nats per token on {found["on"]}, decoding at one row on this machine')
  if 'probe' in found:
    p = found['probe']
    lines.append(
      f"a short correction lowers the teacher's held-out loss by {p['gain']:.4f} "
      f'[{p["interval"][0]:.4f}, {p["interval"][1]:.4f}]: '
      + ('it was corrected' if p['pays'] else 'it was left as it is')
    )
  if 'verified' in found:
    lines.append(f'transformers computes the same logits, within {found["verified"]:.1e}')
  else:
    lines.append("not verified: transformers or torch is not installed (pip install 'slm[hf]')")
  return '\n'.join(lines)


def dry_run(
  given: Mapping[str, Any], devices: int, chip: str, mfu: float
) -> tuple[DecoderConfig, DecoderConfig, str]:
  """Plan a recipe: the shapes before and after, and what the recovery takes on which mesh.

  Raises:
    ValueError: if neither a teacher nor its shape is given, or a size does not fit.
  """
  cfg = schema.read(RecipeConfig, json.loads(json.dumps(dict(given))))
  if not (cfg.teacher or cfg.model):
    raise ValueError('teacher or model: expected one of them, found neither')
  if cfg.teacher:
    teacher = scoring.shape(Path(cfg.teacher))
  else:
    teacher = schema.read(DecoderConfig, cfg.model, 'model')
  sizes = slicing.read_sizes(cfg.sizes)
  slicing.check_sizes(teacher, sizes, cfg.cut.align)
  _check_vocabulary(sizes)
  student = slicing.shape(teacher, {axis: np.arange(n) for axis, n in sizes.items()})
  context = cfg.context or (loader.manifest(cfg.data)['context'] if cfg.data else 0)
  if not context:
    raise ValueError('data or context: expected one of them, found neither')
  recover = dataclasses.replace(cfg.training(student)[0], context=context)
  correct = dataclasses.replace(cfg.training(teacher)[1], context=context)
  recover = _meanwhile(cfg, recover, correct)
  text = f'{"teacher parameters":28} {sum(num_params(teacher).values()):,}\n'
  text += plan.text(plan.plan(recover, devices, chip, mfu, teacher))
  if cfg.probe.steps:
    given = _correction(recover, correct, '', cfg.probe.steps + correct.steps)
    text += '\n\nthe probe, and the correction of the teacher if it pays\n'
    text += plan.text(plan.plan(config.read(given), devices, chip, mfu))
  return teacher, student, text
