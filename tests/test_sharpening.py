"""A proof in seconds: rewards sharpen a model of half-wrong demonstrations, a coin does not."""

import contextlib
import importlib
import string

import jax
import numpy as np
import pytest
import toy
from test_conversations import fields, write

from slm.data import prepare, tokenizer
from slm.data.settings import TokenizerConfig
from slm.inference import rewards
from slm.runs import rundir
from slm.training import loop
from slm.weights import sharding

pytestmark = pytest.mark.long

LETTERS = string.ascii_lowercase[1:11]


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
  """Fine-tune on 'the letter after the first of a pair', half of whose answers are another.

  Return the run, the prompts, and pairs of the right letter and another.
  """
  root, rng = tmp_path_factory.mktemp('sharpening'), np.random.default_rng(0)
  tok = tokenizer.build('bytes', 0, '', [], root / 'data' / 'tokenizer')
  after = dict(zip(LETTERS, np.roll([*LETTERS], -1).tolist(), strict=True))
  asked = [a + b + c for a in LETTERS for b in LETTERS for c in LETTERS]
  said = lambda x: after[x[0]] if rng.random() < 0.5 else str(rng.choice([*LETTERS]))
  label = lambda x: {'answer': after[x[0]], 'strict': True}
  write(root / 'talks.jsonl', [{'prompt': x, 'response': said(x)} for x in asked])
  made = [{'prompt': x, 'label': label(x), 'verifier': 'exact'} for x in asked]
  write(root / 'prompts.jsonl', made)
  others = lambda x: [y for y in LETTERS if y != after[x[0]]]
  pair = lambda x: {'prompt': x, 'chosen': after[x[0]], 'rejected': str(rng.choice(others(x)))}
  write(root / 'pairs.jsonl', [pair(x) for x in asked])
  kinds = {'conversations': 'talks', 'prompts': 'prompts', 'pairs': 'pairs'}
  for kind, name in kinds.items():
    prepare.prepare(
      fields({name: {'all': str(root / f'{name}.jsonl')}}, root / kind, TokenizerConfig('bytes'),
             chat={'kind': kind, 'template': 'tulu'}, heldout=(0.2, 0.0),
             context=80 if kind == 'pairs' else 40)
    )  # fmt: skip
  with one_device():
    given = config(
      'sft', toy.random_model(root, tok, sure=1.0), root / 'conversations' / 'out',
      **{'epochs': 0.0, 'steps': 200, 'schedule.peak': 1e-2, 'data.batch_size': 32,
         'data.set': 'talks'},
    )  # fmt: skip
    loop.train(given, root / 'sft')
  return root / 'sft', root / 'prompts' / 'out', root / 'pairs' / 'out'


@contextlib.contextmanager
def one_device():
  """Train on one of the simulated devices: programs of one compile faster."""
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda *_: mesh)
    yield


def config(name, init, data, **changes):
  c = importlib.import_module(f'configs.{name}').get_config()
  c.init, c.data.path, c.tensorboard = str(init), str(data), False
  c.eval.update(every=0, batch_size=32, max_rows=60)
  c.checkpoint.every = 1000
  c.update_from_flattened_dict(changes)
  return c.to_dict()


def test_rewards_sharpen_and_a_coin_does_not(tuned, tmp_path):
  found = {}
  for kind in ('verifiers', 'random'):
    given = config(
      'grpo', *tuned[:2],
      **{'steps': 15, 'schedule.peak': 3e-3, 'schedule.warmup': 2, 'data.batch_size': 16,
         'objective.samples': 8, 'objective.max_tokens': 3, 'objective.reward': kind},
    )  # fmt: skip
    with one_device():
      loop.train(given, tmp_path / kind, reward=rewards.reward)
    found[kind] = rundir.read_metrics(tmp_path / kind)
  rewarded, coin = found['verifiers'], found['random'][-1]
  # Of all answers before any step, and of one to each held-out prompt after the last.
  assert rewarded[0]['reward'] < 0.65
  assert rewarded[-1]['eval_reward'] > 0.8
  assert rewarded[-1]['eval_greedy_reward'] > 0.9
  assert coin['eval_reward'] < 0.65


def test_ppo_from_a_reward_model_does_too(tuned, tmp_path):
  """The value network starts from a reward model of the toy; scores are those of the verifiers."""
  start, prompts, pairs = tuned
  reward = config(
    'reward', start, pairs,
    **{'epochs': 0.0, 'steps': 80, 'schedule.peak': 1e-2, 'data.batch_size': 32},
  )  # fmt: skip
  found = {}
  with one_device():
    loop.train(reward, tmp_path / 'reward')
    for kind in ('verifiers', 'random'):
      given = config(
        'ppo', start, prompts,
        **{'steps': 15, 'schedule.peak': 3e-3, 'schedule.warmup': 2, 'data.batch_size': 64,
           'objective.max_tokens': 3, 'objective.reward': kind,
           'objective.value': str(tmp_path / 'reward')},
      )  # fmt: skip
      loop.train(given, tmp_path / kind, reward=rewards.reward)
      found[kind] = rundir.read_metrics(tmp_path / kind)
  rewarded, coin = found['verifiers'], found['random'][-1]
  assert rundir.read_metrics(tmp_path / 'reward')[-1]['eval_accuracy'] > 0.65
  # Scores are ten times 0 or 1.
  assert rewarded[0]['reward'] < 6.5
  assert rewarded[-1]['eval_reward'] > 8
  assert rewarded[-1]['eval_greedy_reward'] > 9
  assert coin['eval_reward'] < 6.5
