"""Synthetic studies: run directories with known losses and costs, and the study.json over them."""

import functools
import hashlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

from experiments.specialise.cells import Comparison, compare
from experiments.specialise.study import load_study
from slm.runs import config

LABELS = {
  'slm': 'SLM',
  'slm_noft': 'SLM, no fine-tuning',
  'slm_nopt': 'SLM, no pretraining',
  'llm': 'LLM',
  'importance': 'SLM-is, importance sampling',
  'distill': 'SLM-d, distillation',
  'mixture': 'SLM-mix, hard mixture',
  'project': 'SLM-pn, projected network',
}
# Loss above the plain SLM's, nats per token.
OFFSETS = {
  'slm': 0.0,
  'slm_noft': 0.6,
  'slm_nopt': 1.4,
  'llm': -0.17,
  'importance': -0.08,
  'distill': -0.01,
  'mixture': -0.0,
  'project': -0.05,
}
GENERIC_FLOPS, TUNE_FLOPS = 1e14, 2e12


def write(path: Path, value: object) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def write_run(
  path: Path, phase: str, flops: float, losses: dict[str, np.ndarray], end: float = 3.0
) -> None:
  """Write a finished run; losses map set/split to rows [rows,2]."""
  tokens = int(flops / 1e7)
  settings = config.defaults() | {'phase': phase}
  settings['model']['vocab'] = 256
  write(path / 'config.json', settings)
  environment = {'python': '3.11.0', 'device_kind': 'cpu', 'packages': {'jax': '0.1'}}
  write(path / 'starts.json', [{'step': 0, 'code': 'abc', 'environment': environment}])
  entry = {'tokens': tokens, 'flops': flops, 'device_seconds': flops / 1e11}
  held_out = {'phase': 'evaluate', 'tokens': 7, 'flops': 1e30, 'device_seconds': 1e30}
  ledger = {'phases': [{'phase': phase, **entry}, held_out], 'ancestors': []}
  write(path / 'ledger.json', ledger)
  write(path / 'result.json', {'steps': 100})
  (path / 'metrics.jsonl').write_text(metrics(tokens, end))
  results = {}
  for name, rows in losses.items():
    file = path / 'eval' / f'{name.replace("/", "-")}.npy'
    file.parent.mkdir(exist_ok=True)
    np.save(file, rows)
    results[name] = {'nll': rows[:, 0].sum(), 'bytes': int(4 * rows[:, 1].sum()), 'step': 100}
    results[name]['rows_sha256'] = 'abc'
  write(path / 'eval.json', results)


@functools.cache
def metrics(tokens: int, end: float) -> str:
  """Make the metrics.jsonl of 100 steps whose loss ends at 0.3 above `end`."""
  rng, lines = np.random.default_rng(0), []
  for step in range(1, 101):
    loss = end + 3 * step**-0.5
    line = {'step': step, 'tokens': tokens * step // 100, 'loss': loss + rng.normal(0, 0.05)}
    line |= {'eval_loss': loss + 0.03} if step % 20 == 0 else {}
    lines.append(json.dumps(line) + '\n')
  return ''.join(lines)


class Maker:
  """Makes synthetic studies: rows share a difficulty, so that differences are paired.

  With a `store`, runs that are alike are written there once, for all studies, and linked.
  """

  def __init__(
    self, path: Path, domains=('law',), sizes=(20_000,), seeds=(0,), rows=300, store=None
  ):
    self.path, self.domains, self.sizes, self.seeds = path, domains, sizes, seeds
    self.store = store
    rng = np.random.default_rng(1)
    self.hard = {d: rng.normal(0, 0.4, rows) for d in domains}
    self.tokens = {d: rng.integers(20, 256, rows) for d in domains}
    self.runs: list[dict] = []

  def write_run(
    self, name: str, phase: str, flops: float, losses: dict[str, np.ndarray], end: float = 3.0
  ) -> None:
    path = self.path / name
    if not self.store:
      write_run(path, phase, flops, losses, end)
      return
    what = repr((phase, flops, end, {n: rows.tobytes() for n, rows in losses.items()}))
    made = self.store / hashlib.sha256(what.encode()).hexdigest()
    if not made.exists():
      write_run(made, phase, flops, losses, end)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(made)

  def rows(self, domain: str, loss: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(abs(hash((round(loss, 6), seed))))
    tokens = self.tokens[domain]
    noise = rng.normal(0, 0.02, len(tokens))
    return np.stack([(loss + self.hard[domain] + noise) * tokens, tokens.astype(float)], axis=1)

  def add(
    self, method: str, offset: float | dict[str, float], shrink: float = 0.6, budget: float = 1
  ) -> None:
    """Add a method at every domain, size and seed; its offset shrinks with the set size."""
    tag = '' if budget == 1 else f'-budget{budget:g}'
    kind = 'large' if method == 'llm' else 'small'
    costly = {'llm': 6.0, 'project': 1.6}.get(method, 1.0) * GENERIC_FLOPS
    for seed in self.seeds:
      shared = {'distill': ['slm', 'llm'], 'slm_noft': ['slm']}.get(method, [method])
      shared = [f'runs/{m}-{seed}{tag}' for m in shared if method not in ('importance', 'slm_nopt')]
      for name in shared:
        if not (self.path / name).exists():
          self.write_run(name, 'pretrain', costly * budget, {})
      for (i, size), (j, domain) in itertools.product(
        enumerate(self.sizes), enumerate(self.domains)
      ):
        own = f'runs/{method}-{domain}-{size}-{seed}{tag}'
        above = offset[domain] if isinstance(offset, dict) else offset
        loss = 3.0 + 0.1 * j - 0.15 * i + above * shrink**i + 0.002 * seed
        rows = {f'{domain}/test': self.rows(domain, loss, seed)}
        self.write_run(own, 'finetune', TUNE_FLOPS * (i + 1), rows)
        paid = [own] if method != 'slm_noft' else []
        if method == 'importance':
          paid.append(f'runs/importance-{domain}-{seed}{tag}')
          self.write_run(paid[-1], 'pretrain', GENERIC_FLOPS * budget, {}, end=2.6)
        self.runs.append({
          'method': method, 'domain': domain, 'size': size, 'seed': seed, 'run': own,
          'kind': kind, 'generic_runs': shared, 'specialise_runs': paid, 'budget': budget,
        })  # fmt: skip

  def add_generic(self, method: str, offset: float) -> None:
    """Add a method's loss on generic text before any specialisation."""
    rng = np.random.default_rng(7)
    hard, tokens = rng.normal(0, 0.4, 200), rng.integers(20, 256, 200).astype(float)
    for seed in self.seeds:
      run = f'runs/{method}-{seed}'
      rows = np.stack([(3 + offset + 0.002 * seed + hard) * tokens, tokens], axis=1)
      self.write_run(run, 'pretrain', GENERIC_FLOPS, {'generic/test': rows})
      self.runs.append({
        'method': method, 'domain': None, 'size': None, 'seed': seed, 'run': run, 'kind': 'small',
        'generic_runs': [run], 'specialise_runs': [], 'budget': 1,
      })  # fmt: skip

  def save(self, scale: str = 'cpu', **changes: object) -> Path:
    """Write study.json and the data directory's part; returns the study's directory."""
    study = {
      'title': 'Law from general text',
      'scale': scale,
      'data': 'data',
      'domains': list(self.domains),
      'generic': 'generic',
      'sizes': list(self.sizes),
      'methods': [
        {'name': m, 'label': label, 'describe': f'What {label} does.'}
        for m, label in LABELS.items()
      ],
      'runs': self.runs,
      'params': {m: 771_000_000 if m == 'llm' else 126_000_000 for m in LABELS},
      'notes': ['Models are smaller than in the paper.'],
    }
    write(self.path / 'study.json', study | changes)
    cost = {'clusters': {'seconds': 50.0, 'flops': 5e11}}
    write(self.path / 'data' / 'manifest.json', {'cost': cost})
    return self.path


def full_study(path: Path, **kwargs) -> Path:
  """Make a study with every method, on several domains and sizes, with clusters."""
  maker = Maker(path, **kwargs)
  for method, offset in OFFSETS.items():
    maker.add(method, offset)
  rng, sets = np.random.default_rng(2), {}
  for name, spread in [('generic', 9.0), *((d, 0.25) for d in maker.domains)]:
    windows = rng.multinomial(4000, rng.dirichlet(np.full(16, spread)))
    p = windows[windows > 0] / windows.sum()
    entropy = float(-(p * np.log(p)).sum())
    sets[name] = {
      'windows': windows.tolist(), 'entropy': entropy, 'effective_clusters': math.exp(entropy),
      'ess_fraction': 0.3, 'top_cluster': float(p.max()),
    }  # fmt: skip
  write(path / 'data' / 'clusters' / 'histograms.json', {'16': sets})
  return maker.save()


def run_main(study: Path, *flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'experiments.specialise.report', f'--study={study}', *flags]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def one(path: Path, offsets: dict[str, float], scale: str = 'cpu', **kwargs) -> Comparison:
  maker = Maker(path, **kwargs)
  for method, offset in offsets.items():
    maker.add(method, offset)
  return compare(load_study(maker.save(scale)))
