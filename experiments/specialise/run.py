"""Run the whole study: prepare, train every row, evaluate, report. Started again, it continues.

python -m experiments.specialise.run --scale=quick --out=runs/quick
python -m experiments.specialise.run --scale=cpu --corpus=/path/to/corpora --out=runs/cpu
python -m experiments.specialise.run --scale=paper --dry_run --devices=64 --chip=tpu-v5p
python -m experiments.specialise.run --scale=paper --topology=v5p:4x4x4 --out=runs/paper
"""

import copy
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import common, compiled
from experiments.specialise import check, claims, ensemble, report, runs
from experiments.specialise.methods import BEFORE, FAMILIES, METHODS, uses_clusters
from experiments.specialise.scales import NOTES, SCALES, SMALLER, Scale
from experiments.specialise.study import load_study
from slm.base import console, files, schema
from slm.data import dsir, importance, loader
from slm.inference import specialist
from slm.objectives import heldout
from slm.runs.config import section, without_data
from slm.training import loop, plan
from slm.weights import sharding
from slm.weights.chips import CHIPS


def do_train(job: dict[str, Any], root: Path) -> None:
  """Train one job; its init and teacher are names of other jobs."""
  overrides = copy.deepcopy(job['set'])
  for key in ('init', 'teacher'):
    if overrides.get(key):
      overrides[key] = str(root / 'runs' / overrides[key])
  loop.train(common.config(job['config'], overrides), root / 'runs' / job['name'])


def do_importance(job: dict[str, Any], root: Path) -> None:
  """Write the index of rows that importance sampling trains on."""
  path = root / 'data'
  request = importance.Request(
    data=str(path),
    domain=job['domain'],
    level=job['level'],
    tokens=job['tokens'] * loader.manifest(path)['context'],
    out=job['name'],
    seed=job['seed'],
    domain_index=job['domain_index'],
    top=job.get('top', False),
  )
  _sample(importance, request)


def do_dsir(job: dict[str, Any], root: Path) -> None:
  """Write the index of rows that DSIR chooses."""
  path = root / 'data'
  tokens = loader.manifest(path)['sets']['generic']['train']['tokens']
  request = importance.Selection(
    data=str(path),
    domain=job['domain'],
    tokens=int(job['share'] * tokens),
    out=job['name'],
    seed=job['seed'],
    domain_index=job['domain_index'],
  )
  _sample(dsir, request)


def _sample(how: Any, request: Any) -> None:
  """Write the index that a request describes, unless it is there."""
  known = Path(request.data) / 'index' / f'{request.out}.json'
  made = files.read_json(known)['made'] if known.exists() else {}
  if any(made.get(key) != value for key, value in request.record().items()):
    how.sample(request)


def do_specialise(job: dict[str, Any], root: Path) -> None:
  """Take a specialist out of a run that holds several."""
  name, run = root / 'runs' / job['name'], root / 'runs' / job['run']
  specialist.specialise(run, job['domain'], name, job['rule'], job['index'])


def do_ensemble(job: dict[str, Any], root: Path) -> None:
  """Evaluate several specialists together."""
  run = root / 'runs' / job['name']
  if sets := heldout.missing(run, root / 'data', job['evaluate']):
    ensemble.ensemble(root / 'runs' / job['run'], sets, run)


DO = {
  'train': do_train,
  'importance': do_importance,
  'dsir': do_dsir,
  'specialise': do_specialise,
  'ensemble': do_ensemble,
  'evaluate': lambda job, root: None,
}


def do_evaluate(job: dict[str, Any], root: Path, mesh: jax.sharding.Mesh) -> None:
  """Evaluate a finished run on what its job lists, unless it was."""
  run = root / 'runs' / job['name']
  heldout.run(run, str(root / 'data'), job['evaluate'], mesh, batch_size=32)


def study(scale_name: str, corpus: str, root: Path, seeds: tuple[int, ...] = ()) -> None:
  """Run every job of a scale, then write the report; or every job of some seeds, and no more."""
  scale = SCALES[scale_name]
  common.prepare_data(scale.sources, scale.prepare, scale.sizes, corpus, root / 'data')
  manifest = loader.manifest(root / 'data')
  vocab = manifest['tokenizer']['vocab']
  planned = runs.Study(scale, str(root / 'data'), manifest['context'], vocab, seeds)
  todo = list(planned.jobs.values())
  mesh, began = sharding.make_mesh({'data': -1}), time.monotonic()
  for i, job in enumerate(todo, 1):
    print(f'[{i}/{len(todo)}] {job["do"]} {job["name"]}', file=sys.stderr, flush=True)
    DO[job['do']](job, root)
    do_evaluate(job, root, mesh)
  print(f'all runs done in {time.monotonic() - began:.0f} s', file=sys.stderr)
  if seeds:
    print('run again without --seeds for the report', file=sys.stderr)
    return
  write_study(scale_name, planned, root)
  found = load_study(root)
  for name, table in (('1-claims', claims.table), ('2-advice', check.table)):
    files.write_json(root / 'sections' / f'{name}.json', table(found))
  report.report(root)


def write_study(scale_name: str, planned: runs.Study, root: Path) -> None:
  """Describe the finished study for the report."""
  scale = planned.scale
  methods = [m for m in METHODS if m.name in {row['method'] for row in planned.rows}]
  about = lambda m: {
    'name': m.name,
    'label': m.label,
    'describe': m.describe,
    'group': m.group,
    'reference': 'slm_noft' if m.group == BEFORE else '',
    'clusters': bool(m.family) and uses_clusters(FAMILIES[m.family]),
    'sweep': [m.sweep, planned.clusters(FAMILIES[m.family])] if m.sweep else [],
  }
  files.write_json(
    root / 'study.json',
    {
      'title': scale.title,
      'scale': scale_name,
      'data': 'data',
      'domains': list(scale.domains),
      'generic': 'generic',
      'sizes': list(scale.sizes),
      'methods': [about(m) for m in methods],
      'runs': planned.rows,
      'params': {m.name: planned.params(m.name) for m in methods},
      'notes': [*(() if scale_name == 'paper' else (SMALLER,)), *NOTES],
    },
  )


def outline(scale: Scale, seeds: tuple[int, ...] = ()) -> list[compiled.Run]:
  """List what a scale trains, without data or weights."""
  vocab, context = scale.prepare['tokenizer.vocab'], scale.prepare['context']
  planned = runs.Study(scale, '', context, vocab, seeds)
  found = []
  for job in planned.jobs.values():
    if job['do'] == 'train':
      cfg = _config(job, vocab)
      if cfg['reparam']['name'] == 'code':  # of a projected network, whose shape it has
        start = _config(planned.jobs[cfg['init'].partition('@')[0]], vocab)
        clusters = start['reparam']['clusters']
        cfg['model'] = start['model']
        cfg['reparam'] |= {'of': start['reparam'], 'histogram': [1 / clusters] * clusters}
      taught = planned.jobs.get(cfg['teacher'])
      teacher = section('model', _config(taught, vocab)['model']) if taught else None
      cfg |= {'teacher': '', 'init': ''}
      cfg['data'] |= {'path': '', 'set': '', 'index': '', 'mix_share': 0.0}
      cfg['data'] |= {'mix_index': '', 'mix_set': ''}
      found.append(compiled.Run(job['name'], without_data(cfg, context), teacher))
  return found


def _config(job: dict[str, Any], vocab: int) -> dict[str, Any]:
  return common.config(job['config'], {**job['set'], 'model.vocab': vocab})


def dry_run(scale: Scale, devices: int, chip: str, mfu: float) -> str:
  """Say what a scale would train, by kind of run, without data."""
  kinds: dict[str, list[dict[str, Any]]] = {}
  plans: dict[Any, dict[str, Any]] = {}
  for run in outline(scale):
    cfg, d = run.cfg, run.cfg.data
    # A vector of rows divides over fewer devices than a pretraining's batch.
    count = math.gcd(devices, d.batch_size // d.rows_per_group)
    cfg = dataclasses.replace(cfg, seed=0, mesh=sharding.MeshConfig(data=count))
    what = json.dumps([schema.plain(cfg), run.teacher and vars(run.teacher)], sort_keys=True)
    if what not in plans:  # runs differ mostly in their text
      plans[what] = plan.plan(cfg, count, chip, mfu, run.teacher)
    name = run.name.split('-')[0] if cfg.phase == 'pretrain' else cfg.phase
    kinds.setdefault(name, []).append(plans[what])
  head = ('runs', 'count', 'served', 'trained', 'steps', 'tokens', 'FLOPs', f'{chip}-hours')
  lines = ['{:16} {:>6} {:>9} {:>9} {:>10} {:>9} {:>9} {:>12}'.format(*head)]
  for name, found in kinds.items():
    first = found[0]
    total = lambda key, found=found: sum(x[key] for x in found)
    hours = sum(x['chip-hours'] for x in found)
    size = lambda key, first=first: sum(first[key].values())
    lines.append(
      f'{name:16} {len(found):6} {size("served parameters"):9.3g} '
      f'{size("trained parameters"):9.3g} {first["steps"]:10,} {total("tokens"):9.3g} '
      f'{total("FLOPs"):9.3g} {hours:12,.3g}'
    )
  every = [x for found in kinds.values() for x in found]
  flops = sum(x['FLOPs'] for x in every)
  hours = sum(x['chip-hours'] for x in every)
  return '\n'.join(
    [*lines, f'in all {len(every)} runs, {flops:.3g} FLOPs, {hours:,.3g} {chip}-hours at {mfu:.0%}']
  )


def main(_: list[str]) -> None:
  """Run the study that the flags name."""
  f = flags.FLAGS
  if f.scale not in SCALES:
    raise ValueError(f'--scale: expected one of {sorted(SCALES)}, found {f.scale!r}')
  known = SCALES[f.scale].seeds
  seeds = tuple(int(s) if s.isdigit() else s for s in f.seeds)
  if unknown := [s for s in seeds if s not in known]:
    raise ValueError(f'--seeds: expected some of {known}, found {unknown}')
  if f.dry_run and f.topology:
    raise ValueError('--dry_run, --topology: expected one of them: each prints a cost of its own')
  if f.dry_run:
    print(dry_run(SCALES[f.scale], f.devices, f.chip, f.mfu))
    return
  console.required('out')
  if f.topology:
    print(compiled.study(outline(SCALES[f.scale], seeds), f.topology, Path(f.out)))
    return
  common.cache(f.cache)
  study(f.scale, f.corpus, Path(f.out), seeds)


if __name__ == '__main__':
  flags.DEFINE_string('scale', 'quick', f'One of {sorted(SCALES)}.')
  flags.DEFINE_string('corpus', '', 'Directory of the corpora, for scales that read files.')
  flags.DEFINE_string('out', 'runs/quick', 'Where data, runs and the report go.')
  flags.DEFINE_string('cache', '~/.cache/slm/xla', "JAX's compilation cache.")
  flags.DEFINE_list('seeds', [], "Do these seeds' runs alone, say on an accelerator of their own.")
  flags.DEFINE_bool('dry_run', False, 'Print what would be trained and its cost; train nothing.')
  flags.DEFINE_integer('devices', 8, '--dry_run: how many chips at most a run is spread over.')
  flags.DEFINE_enum('chip', 'h100', sorted(CHIPS), '--dry_run: on what.')
  flags.DEFINE_float('mfu', 0.4, "--dry_run: the share of the chip's peak that is reached.")
  compiled.define_flag()
  console.run(main)
