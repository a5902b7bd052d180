"""From a big model to a small one that transformers loads: Minitron end to end."""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm import models, objectives
from slm.base import artifact, files
from slm.data import loader
from slm.inference import latency, scoring
from slm.interchange import card, convert, families, verify
from slm.models.config import DecoderConfig
from slm.models.decoder import num_params
from slm.objectives import heldout
from slm.pruning import commands, slicing
from slm.reporting import comparison
from slm.runs import ledger, rundir
from slm.training import loop, optim, plan
from slm.weights import sharding


@artifact.writes('workdir')
def minitron(config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
  """Make the small model below a directory; returns what summary.json holds.

  Writes teacher/ (if imported), probe/ and corrected/ (if asked for, and if it pays), stats/, cut/,
  student/ and export/.

  Raises:
    ValueError: if a part of the config does not fit the teacher or the data.
  """
  cfg = json.loads(json.dumps(dict(config)))
  for key in ('teacher', 'data', 'sizes'):
    if not cfg[key]:
      raise ValueError(f'{key}: expected a value, found nothing')
  teacher, folder = Path(cfg['teacher']), Path(workdir)
  if (folder / 'config.json').exists():
    raise ValueError(f'{folder}: holds a run: choose another directory')
  if (teacher / 'config.json').exists() and rundir.of_transformers(teacher):
    convert.import_model(teacher, folder / 'teacher')
    teacher = folder / 'teacher'
  sizes, recover = slicing.read_sizes(cfg['sizes']), cfg['recover']
  slicing.check_sizes(scoring.shape(teacher), sizes, cfg['cut']['align'])
  _check_vocabulary(sizes)
  _exportable(scoring.shape(teacher), sizes)
  if recover['distributed']['enable']:
    raise ValueError(
      'recover.distributed.enable: start slm.prune, slm.train and slm.hf by themselves'
    )
  meanwhile = _meanwhile(cfg)
  if meanwhile > 1:
    raise ValueError(
      f'correct.schedule.peak={cfg["correct"]["schedule"]["peak"]:g}: expected at most '
      f'recover.schedule.peak={recover["schedule"]["peak"]:g} of a teacher that is corrected '
      'meanwhile (correct.steps=0)'
    )
  if recover['teacher_cache']:
    raise ValueError('recover.teacher_cache: here the teacher itself is asked')
  slicing.check_options(sizes, cfg['cut']['task'], cfg['cut']['norm_gain'])
  if meanwhile:  # at the rate that the probe tries, not at the student's
    objectives.build(recover['objective'] | {'correct': meanwhile}, {})
  objectives.build(recover['objective'], {})
  optim.schedule(recover['schedule'], recover['steps'])
  loader.Split(cfg['data'], *(recover['data'][key] for key in ('set', 'split', 'index')))
  recover['data']['path'] = cfg['data']
  runs, found, pays = {'teacher': teacher}, {}, False
  if cfg['probe']['steps']:
    found['probe'] = _probe(cfg, teacher, folder / 'probe')
    runs['probe'], pays = folder / 'probe', found['probe']['pays']
  if pays and cfg['correct']['steps']:
    runs['corrected'] = teacher = folder / 'corrected'
    loop.train(_correction(cfg, runs['teacher'], cfg['correct']['steps']), teacher)
  elif pays:
    recover['objective']['correct'] = meanwhile
  c = cfg['calibrate']
  commands.calibrate(
    str(teacher), cfg['data'], str(folder / 'stats'), c['set'], c['split'], c['index'], c['rows'],
    c['batch_size'],
  )  # fmt: skip
  commands.cut(str(teacher), [str(folder / 'stats')], sizes, str(folder / 'cut'), **cfg['cut'])
  recover |= {'init': str(folder / 'cut'), 'teacher': str(teacher)}
  loop.train(recover, folder / 'student')
  how = cfg['export']
  convert.export_model(folder / 'student', folder / 'export', dtype=how['dtype'])
  card.write(folder / 'export', how['licence'])
  found |= _summary(runs | {'cut': folder / 'cut', 'student': folder / 'student'}, cfg)
  if importlib.util.find_spec('transformers') and importlib.util.find_spec('torch'):
    found['verified'] = verify.verify([folder / 'export', folder / 'student'], how['tolerance'])
    if found['verified'] > how['tolerance']:
      raise ValueError(
        f'{folder / "export"}: transformers computes other logits, by {found["verified"]:.3g}'
      )
  files.write_json(folder / 'summary.json', found)
  return found


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


def _meanwhile(cfg: Mapping[str, Any]) -> float:
  """Return the share of the student's rate at which a teacher learns beside it, if it pays."""
  rates = [of['schedule']['peak'] for of in (cfg['correct'], cfg['recover'])]
  return rates[0] / rates[1] if cfg['probe']['steps'] and not cfg['correct']['steps'] else 0.0


def _correction(cfg: Mapping[str, Any], teacher: Path, steps: int) -> dict[str, Any]:
  """Return the config of a teacher's training on the text of the recovery."""
  correct, recover = cfg['correct'], cfg['recover']
  schedule = correct['schedule']
  return correct | {
    'phase': 'correct',
    'init': str(teacher),
    'steps': steps,
    'data': correct['data'] | {name: recover['data'][name] for name in ('path', 'set', 'index')},
    'schedule': schedule | {'warmup': min(schedule['warmup'], steps // 10)},
  }


def _probe(cfg: Mapping[str, Any], teacher: Path, run: Path) -> dict[str, Any]:
  """Find out whether correcting a teacher pays (arXiv 2408.11796, section 3.1), by a short run.

  It does if the held-out loss falls by more than what is asked, at the lower end of the paired
  bootstrap's 95 % interval.
  """
  loop.train(_correction(cfg, teacher, cfg['probe']['steps']), run)
  name, batch = cfg['recover']['data']['set'], cfg['recover']['eval']['batch_size']
  values = []
  for path in (teacher, run):
    mesh = sharding.fit_mesh(scoring.shape(path).embed)
    heldout.run(path, cfg['data'], [f'{name}/validation'], mesh, batch)
    values.append(files.read_npy(rundir.evaluations(path) / f'{name}-validation.npy'))
  nll, tokens = np.stack([v[:, 0] for v in values], axis=1), values[0][:, 1]
  documents = files.read_npy(Path(cfg['data']) / name / 'validation' / 'documents.npy')
  many = documents if len(np.unique(documents)) > 1 else ()
  drawn = comparison.resample(nll, tokens, 0, documents=many)
  low, high = np.quantile(drawn[:, 0] - drawn[:, 1], (0.025, 0.975)).tolist()
  gain = float((nll[:, 0] - nll[:, 1]).sum() / tokens.sum())
  return {'gain': gain, 'interval': [low, high], 'pays': low > cfg['probe']['worth']}


def _summary(runs: Mapping[str, Path], cfg: Mapping[str, Any]) -> dict[str, Any]:
  """Measure the models side by side: size, held-out loss, cost and speed on this machine."""
  on = f'{cfg["recover"]["data"]["set"]}/test'
  shapes = {name: scoring.shape(path) for name, path in runs.items()}
  served = {n: shapes[n] for n in ('teacher', 'student')}
  speed = latency.measure(served, cfg['recover']['dtype'], 1, 64, 32, 5)
  found = {}
  for name, path in runs.items():
    batch = cfg['recover']['eval']['batch_size']
    mesh = sharding.fit_mesh(shapes[name].embed)
    loss = heldout.run(path, cfg['data'], [on], mesh, batch)[on]
    phases = ledger.read_ledger(path)['phases'] if name != 'teacher' else []
    found[name] = {
      'parameters': sum(num_params(shapes[name]).values()),
      'loss': loss['loss'],
      'bits per byte': loss['bpb'],
      'flops': sum(p['flops'] for p in phases if p['phase'] != 'evaluate'),
      'tokens': sum(p['tokens'] for p in phases if p['phase'] != 'evaluate'),
      'ms per token': 1e3 * speed[name]['token'] if name in speed else None,
    }
  return {'on': on, 'models': found, 'machine': jax.devices()[0].device_kind}


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


def _shaped(cfg: Mapping[str, Any], shape: DecoderConfig) -> dict[str, Any]:
  """Return the model section of a shape, computed as the config says."""
  how = {name: cfg['model'][name] for name in ('dispatch', 'remat', 'unroll')}
  return {'name': 'decoder', **dataclasses.asdict(shape), **how}


def dry_run(
  config: Mapping[str, Any], devices: int, chip: str, mfu: float
) -> tuple[DecoderConfig, DecoderConfig, str]:
  """Plan a recipe: the shapes before and after, and what the recovery takes on which mesh.

  Raises:
    ValueError: if neither a teacher nor its shape is given, or a size does not fit.
  """
  cfg = json.loads(json.dumps(dict(config)))
  recover = cfg['recover']
  if not (cfg['teacher'] or cfg['model']):
    raise ValueError('teacher or model: expected one of them, found neither')
  if cfg['teacher']:
    teacher = scoring.shape(Path(cfg['teacher']))
  else:
    teacher = models.build({'name': 'decoder', **cfg['model']}).cfg
  sizes = slicing.read_sizes(cfg['sizes'])
  slicing.check_sizes(teacher, sizes, cfg['cut']['align'])
  _check_vocabulary(sizes)
  kept = {axis: np.arange(n) for axis, n in sizes.items()}
  student = slicing.shape(teacher, kept)
  recover['model'] = _shaped(recover, student)
  if meanwhile := _meanwhile(cfg):
    recover['objective']['correct'] = meanwhile
  context = cfg['context'] or (loader.manifest(cfg['data'])['context'] if cfg['data'] else 0)
  if not context:
    raise ValueError('data or context: expected one of them, found neither')
  text = f'{"teacher parameters":28} {sum(num_params(teacher).values()):,}\n'
  text += plan.text(plan.plan(recover, devices, chip, mfu, context, teacher))
  steps = cfg['probe']['steps'] and cfg['probe']['steps'] + cfg['correct']['steps']
  if steps:
    correct = _correction(cfg, Path(), steps) | {'init': ''}
    correct['model'] = _shaped(correct, teacher)
    text += '\n\nthe probe, and the correction of the teacher if it pays\n'
    text += plan.text(plan.plan(correct, devices, chip, mfu, context))
  return teacher, student, text
