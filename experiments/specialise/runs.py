"""Every run of the study as plain data, in an order that meets their needs."""

from typing import Any

from experiments.specialise.scales import Scale
from slm.models.decoder import DecoderConfig, forward_flops

Job = dict[str, Any]


def jobs(scale: Scale, data: str, context: int, vocab: int) -> list[Job]:
  """List the jobs: {'name', 'do', ...}; `do` names the entry point that runs it.

  Names are run directories below the study's. 'evaluate' lists set/split names.
  """
  common = {'data.path': data, **scale.train}
  small = {f'model.{k}': v for k, v in scale.small.items()}
  large = {f'model.{k}': v for k, v in scale.large.items()}
  ratio = _flops(scale.large, context, vocab) / _flops(scale.small, context, vocab)
  found: list[Job] = []
  for seed in scale.seeds:
    pretrain = {
      **common,
      'seed': seed,
      'steps': scale.steps,
      'data.batch_size': scale.batch_size,
      'schedule.peak': scale.peak,
      'schedule.warmup': scale.steps // 20,
      'eval.every': max(scale.steps // 5, 1),
      'checkpoint.every': max(scale.steps // 5, 1),
    }
    less = max(int(scale.steps / ratio), 1)
    few = {**pretrain, 'steps': less, 'schedule.warmup': less // 20, 'eval.every': less // 4 or 1}
    few['schedule.peak'] = scale.large_peak
    groups = {
      'data.level': scale.clusters,
      'reparam.clusters': scale.clusters,
      'data.rows_per_group': scale.batch_size // scale.clusters,
    }
    generic = ['generic/test']
    found += [
      _train(f'slm-{seed}', 'pretrain', {**pretrain, **small}, generic),
      _train(f'llm-{seed}', 'pretrain', {**few, **large}, generic),
      _train(f'mixture-{seed}', 'mixture', {**pretrain, **small, **groups}, generic),
      _train(
        f'project-{seed}',
        'project',
        {**pretrain, **small, **groups, 'reparam.capacity': scale.clusters,
         'reparam.code': scale.clusters},
        generic,
      ),
    ]  # fmt: skip
    for domain in scale.domains:
      found += _domain_jobs(scale, domain, seed, common, pretrain, small, large)
  return found


def _domain_jobs(scale, domain, seed, common, pretrain, small, large) -> list[Job]:
  smallest = f'{domain}-{scale.sizes[0]}'
  index = f'{domain}-is-{seed}'
  tests = [f'{domain}/{split}' for split in scale.eval_splits]
  start = {
    'slm': f'slm-{seed}',
    'llm': f'llm-{seed}',
    'importance': f'importance-{domain}-{seed}',
    'mixture': f'mixture-{domain}-{seed}',
    'project': f'project-{domain}-{seed}',
    'slm_nopt': '',
  }
  found = [
    {'name': f'slm-{seed}', 'do': 'evaluate', 'evaluate': tests},
    {
      'name': index,
      'do': 'importance',
      'domain': domain,
      'level': scale.selection_level,
      'domain_index': smallest,
      'tokens': pretrain['steps'] * scale.batch_size,  # times the context, see run.py
      'seed': seed,
    },
    _train(start['importance'], 'importance', {**pretrain, **small, 'data.index': index}, tests),
  ]
  for method in ('mixture', 'project'):
    found.append(
      {
        'name': start[method],
        'do': 'specialise',
        'run': f'{method}-{seed}',
        'domain': domain,
        'index': smallest,
        'evaluate': tests,
      }
    )
  for i, size in enumerate(scale.sizes):
    steps = scale.finetune_steps[i]
    tune = {
      **common,
      'seed': seed,
      'steps': steps,
      'data.set': domain,
      'data.index': f'{domain}-{size}',
      'data.batch_size': scale.finetune_batch,
      'schedule.warmup': min(10, steps // 2),
      'eval.every': max(steps // 15, 1),
      'checkpoint.every': steps,
    }
    for method, init in start.items():
      own = {**small, 'schedule.peak': scale.peak}
      if method == 'llm':
        own = {**large, 'schedule.peak': scale.large_peak}
      # The paper fine-tunes at the pretraining's rate, and at a third of it on its smallest set.
      own['schedule.peak'] /= 3 if i == 0 else 1
      name = f'{method}-{domain}-{size}-{seed}'
      found.append(_train(name, 'finetune', {**tune, **own, 'init': init}, tests))
    taught = {'init': start['slm'], 'teacher': f'llm-{domain}-{size}-{seed}'}
    taught['schedule.peak'] = scale.peak / (3 if i == 0 else 1)
    name = f'distill-{domain}-{size}-{seed}'
    found.append(_train(name, 'distill', {**tune, **small, **taught}, tests))
  return found


def _train(name: str, config: str, overrides: dict[str, Any], evaluate: list[str]) -> Job:
  return {
    'name': name,
    'do': 'train',
    'config': f'configs/{config}.py',
    'set': overrides,
    'evaluate': evaluate,
  }


def _flops(shape: dict[str, int], context: int, vocab: int) -> float:
  return forward_flops(DecoderConfig(vocab=vocab, **shape), context)


def table_rows(scale: Scale) -> list[dict[str, Any]]:
  """List the cells of the report: which run serves, and which runs had to be paid for."""
  found = []
  for seed in scale.seeds:
    for method in ('slm', 'llm', 'mixture', 'project'):
      run = f'runs/{method}-{seed}'
      found.append(_row(method, None, None, seed, run, [run], []))
    for domain in scale.domains:
      for size in scale.sizes:
        cells = _cells(domain, size, seed)
        found += [_row(m, domain, size, seed, *cell) for m, cell in cells.items()]
  return found


def _cells(domain: str, size: int, seed: int) -> dict[str, tuple[str, list[str], list[str]]]:
  """Map each method to its served run, the runs paid before the domain is known, and after."""
  served = lambda method: f'runs/{method}-{domain}-{size}-{seed}'
  of_domain = lambda method: f'runs/{method}-{domain}-{seed}'
  slm, llm, mixture, project = (f'runs/{m}-{seed}' for m in ('slm', 'llm', 'mixture', 'project'))
  return {
    'slm': (served('slm'), [slm], [served('slm')]),
    'slm_noft': (slm, [slm], []),
    'slm_nopt': (served('slm_nopt'), [], [served('slm_nopt')]),
    'importance': (served('importance'), [], [of_domain('importance'), served('importance')]),
    'distill': (served('distill'), [slm, llm], [served('llm'), served('distill')]),
    'mixture': (served('mixture'), [mixture], [of_domain('mixture'), served('mixture')]),
    'project': (served('project'), [project], [of_domain('project'), served('project')]),
    'llm': (served('llm'), [llm], [served('llm')]),
  }


def _row(method, domain, size, seed, served, generic_runs, specialise_runs) -> dict[str, Any]:
  return {
    'method': method,
    'domain': domain,
    'size': size,
    'seed': seed,
    'run': served,
    'kind': 'large' if method == 'llm' else 'small',
    'generic_runs': generic_runs,
    'specialise_runs': specialise_runs,
  }
