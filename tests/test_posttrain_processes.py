"""Preference and RL runs of two processes: as of one, rows where they belong, continued by one."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy
from test_conversations import fields, write

from configs import dpo, grpo
from slm.data import prepare, tokenizer
from slm.data.settings import TokenizerConfig
from slm.inference import rewards
from slm.runs import load, rundir
from slm.training import loop
from slm.weights import sharding

SCRIPT = """
import json, pathlib, sys
from slm.inference import rewards
from slm.runs import processes
from slm.training import loop
coordinator, index, *runs = sys.argv[1:]
keys = {'coordinator': coordinator, 'num_processes': 2, 'process_id': int(index), 'timeout': 100}
processes.connect(keys)
with processes.ending():
  for run in runs:
    loop.train(json.loads(pathlib.Path(run + '.json').read_text()), run, reward=rewards.reward)
"""
FIGURES = (
  'loss', 'grad_norm', 'tokens', 'reward', 'reward_std', 'no_variance', 'rollout_tokens', 'kl',
  'margin', 'eval_loss', 'eval_reward', 'eval_greedy_reward', 'eval_margin', 'eval_pairs',
)  # fmt: skip


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """Write a random run over bytes, pairs, and prompts whose labels depend on the row."""
  root = tmp_path_factory.mktemp('posttrain')
  tok = tokenizer.build('bytes', 0, '', [], root / 'data' / 'tokenizer')
  run = toy.random_model(root, tok, sure=2.0)
  words = toy.TOPICS['sea'].split() * 3
  halves = ('[a-m].*', '[^a-m].*')  # a reward of one row is a failure of the next
  made = {
    'pairs': [{'prompt': f'{w} {i}', 'chosen': 'aye', 'rejected': ('no', 'never')[i % 2]}
              for i, w in enumerate(words)],
    'prompts': [{'prompt': f'{w} {i}', 'label': halves[i % 2], 'verifier': 'regex'}
                for i, w in enumerate(words)],
  }  # fmt: skip
  for (kind, lines), context in zip(made.items(), (128, 48), strict=True):
    path = write(root / f'{kind}.jsonl', lines)
    cfg = fields({kind: {'all': path}}, root / kind, TokenizerConfig('bytes'), context=context,
                 chat={'kind': kind, 'template': 'tulu'}, heldout=(0.3, 0.0))  # fmt: skip
    prepare.prepare(cfg)
  return run, root


def config_of(start, kind, steps):
  run, root = start
  c = {'dpo': dpo, 'grpo': grpo}[kind].get_config()
  c.init, c.data.path = str(run), str(root / {'dpo': 'pairs', 'grpo': 'prompts'}[kind] / 'out')
  c.steps, c.tensorboard, c.log_every, c.epochs = steps, False, 1, 0.0
  c.data.batch_size = 8
  c.schedule.update(name='constant', peak=3e-4, warmup=1, warmup_share=0.0)
  c.eval.update(every=2, max_rows=5, batch_size=4)
  c.checkpoint.every = 2
  c.objective.chunk = 64
  if kind == 'grpo':
    c.objective.update(samples=4, max_tokens=5, score_unended=True)
  return c.to_dict()


@pytest.fixture
def two_devices(monkeypatch):
  mesh = sharding.make_mesh({'data': 2}, jax.devices()[:2])
  monkeypatch.setattr(sharding, 'make_mesh', lambda *_: mesh)


def figures(run):
  return [[line.get(key, 0.0) for key in FIGURES] for line in rundir.read_metrics(run)]


def weights(run, step):
  return jax.device_get(load.load(f'{run}@{step}', sharding.make_mesh()).params())


def test_two_processes_are_one_and_one_continues_them(start, tmp_path, two_devices):
  runs = {kind: tmp_path / kind for kind in ('dpo', 'grpo')}
  for kind, run in runs.items():
    (tmp_path / f'{run.name}.json').write_text(json.dumps(config_of(start, kind, 2)))
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
  command = [sys.executable, '-c', SCRIPT, address]
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  env = os.environ | {'JAX_NUM_CPU_DEVICES': '1'}
  several = [
    subprocess.Popen([*command, str(i), *map(str, runs.values())], env=env, **pipes)
    for i in range(2)
  ]
  try:
    for kind in runs:  # meanwhile
      loop.train(config_of(start, kind, 4), tmp_path / f'{kind}-alone', reward=rewards.reward)
    for process in several:
      _, errors = process.communicate(timeout=120)
      assert process.returncode == 0, errors
  finally:
    for process in several:
      process.kill()
  for kind, run in runs.items():
    alone = tmp_path / f'{kind}-alone'
    (started,) = rundir.read_starts(run)
    assert started['environment']['processes'] == 2
    expected = figures(alone)
    np.testing.assert_allclose(figures(run), expected[:2], rtol=1e-5, atol=1e-6)
    loop.train(config_of(start, kind, 4), run, reward=rewards.reward)
    np.testing.assert_allclose(figures(run), expected, rtol=1e-5, atol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, weights(run, 4), weights(alone, 4))
  assert 0.2 < rundir.read_metrics(runs['grpo'])[0]['reward'] < 0.8  # a swap would show
