"""Training on conversations: the loss of a step, its config, a run."""

import functools
import importlib
import json
import math

import jax
import numpy as np
import optax
import pytest
import toy
from test_conversations import SAY, fields, write

from slm import models, reparam
from slm.data import loader, prepare, rows, tokenizer
from slm.data.settings import TokenizerConfig
from slm.inference.chat import Chat
from slm.models import decode
from slm.models.config import DecoderConfig
from slm.objectives import build
from slm.runs import config, load, processes
from slm.runs.config import NextTokenConfig
from slm.training import loop
from slm.training.step import State, make_sums, make_train_step
from slm.weights import sharding

SHAPE = DecoderConfig(
  vocab=64, embed=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp=24
)


def talks(count: int = 8, t: int = 32) -> rows.Rows:
  """Make rows of packed conversations whose answers are of very different lengths."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 64, (count, t)).astype(np.int32)
  segments = np.repeat(np.arange(1, 5, dtype=np.int32)[None], count, 0).repeat(t // 4, axis=1)
  lengths = np.array([0, 3, 30, 2, 12, 2, 28, 3])[np.arange(count) % 8]
  trained = (np.arange(t) < lengths[:, None]).astype(np.uint8)
  return {'tokens': tokens, 'segments': segments, 'trained': trained}


@functools.cache
def compiled(devices: int, reduction: str):
  """Return a mesh, weights and the loop's own step on it, whose update is the gradient."""
  model = models.build(SHAPE)
  rep = reparam.build(config.section('reparam', {'name': 'full'}), model.init)
  mesh = sharding.make_mesh({'data': devices}, jax.devices()[:devices])
  forward = {'student': reparam.map_groups(rep, model.forward)}
  objective = build(NextTokenConfig(chunk=16, reduction=reduction), forward)
  tx = optax.sgd(1.0)
  step = make_train_step(make_sums(objective, rep, 'float32'), tx, reduction=reduction)
  theta = toy.noisy(model, 0.05)
  return mesh, State(np.zeros((), np.int32), theta, {}, tx.init(theta)), jax.jit(step)


def gradient(columns: rows.Rows, accum: int = 1, devices: int = 1, reduction: str = 'mean'):
  """Return the gradient of a training step on rows, float64, and its metrics."""
  mesh, state, step = compiled(devices, reduction)
  share = lambda x: x.reshape(accum, -1, 1, *x.shape[1:])
  batch = {name: share(x) for name, x in rows.batch(columns).items()}
  batch['condition'] = np.zeros(batch['inputs'].shape[:2], np.int32)
  with jax.set_mesh(mesh):
    after, metrics = step(state, {}, processes.global_rows(batch, mesh, axis=1))
  flat = lambda tree: np.concatenate([np.asarray(x, float).ravel() for x in jax.tree.leaves(tree)])
  return flat(state.theta) - flat(after.theta), metrics


def differs(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope='module')
def whole():
  return gradient(talks())


@pytest.mark.parametrize(('accum', 'devices'), [(2, 1), (4, 1), (8, 1), (1, 2), (4, 2), (1, 8)])
def test_the_gradient_is_the_same_for_every_split_and_number_of_devices(whole, accum, devices):
  expected, metrics = whole
  found, same = gradient(talks(), accum, devices)
  assert differs(found, expected) < 1e-6
  assert float(same['tokens']) == float(metrics['tokens']) == rows.batch(talks())['weights'].sum()
  np.testing.assert_allclose(same['loss'], metrics['loss'], rtol=1e-6)


def test_a_mean_of_means_would_not_be(whole):
  """The test above fails for what divides each microbatch by its own number of tokens."""
  columns = talks()
  parts = [{name: x[i : i + 2] for name, x in columns.items()} for i in range(0, 8, 2)]
  mean = np.mean([gradient(part)[0] for part in parts], axis=0)
  assert differs(mean, whole[0]) > 0.1


def test_the_sum_is_the_mean_times_the_tokens(whole):
  expected, metrics = whole
  for accum in (1, 4):
    found, same = gradient(talks(), accum, reduction='sum')
    assert differs(found, expected * float(metrics['tokens'])) < 1e-6
    np.testing.assert_allclose(same['loss'], metrics['loss'], rtol=1e-6)


def test_a_weight_of_two_is_the_example_twice():
  columns = {name: x[2:5] for name, x in talks().items()}
  weights = np.ones(columns['tokens'].shape, np.float32)
  weights[1] = 2
  twice = {name: x[[0, 1, 1, 2]] for name, x in columns.items()}
  expected, _ = gradient(twice)
  assert differs(gradient({**columns, 'weights': weights})[0], expected) < 1e-6


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """Write a random run over bytes, conversations and pairs for it; return the run and the data."""
  root = tmp_path_factory.mktemp('sft')
  tok = tokenizer.build('bytes', 0, '', [], root / 'data' / 'tokenizer')
  run = toy.random_model(root, tok)
  words = toy.TOPICS['sea'].split()
  made = [  # the question differs: copies are dropped
    {'messages': [SAY('user', f'{word} {i}'), SAY('assistant', 'aye')]}
    for i, word in enumerate(words * 4)
  ]
  pairs = [{'prompt': word, 'chosen': 'a', 'rejected': 'b'} for word in words]
  sets = lambda name: {'sft': {'all': str(root / name)}}
  write(root / 'talks.jsonl', made)
  write(root / 'pairs.jsonl', pairs)
  options = {'heldout': (0.3, 0.0), 'context': 64}
  for kind, name in (('conversations', 'talks'), ('pairs', 'pairs')):
    prepare.prepare(
      fields(sets(f'{name}.jsonl'), root / kind, TokenizerConfig('bytes'),
             chat={'kind': kind, 'template': 'tulu'}, **options)
    )  # fmt: skip
  return run, root


def sft(start, **changes):
  run, root = start
  c = importlib.import_module('configs.sft').get_config()
  c.init, c.data.path, c.data.batch_size = str(run), str(root / 'conversations' / 'out'), 8
  c.log_every, c.tensorboard = 1, False
  c.eval.update(every=0, batch_size=8)
  c.objective.chunk = 64
  c.update_from_flattened_dict(changes)
  return c.to_dict()


def test_epochs_decide_the_steps_and_their_share_the_warm_up(start):
  cfg = config.resolve(sft(start))
  count = len(loader.Split(cfg.data.path, 'sft', 'train').ids)
  assert cfg.steps == math.ceil(2 * count / 8) and count > 16
  assert cfg.schedule.warmup == math.ceil(0.03 * cfg.steps)
  assert config.resolve(sft(start, **{'epochs': 0.0, 'steps': 7})).steps == 7
  for changes, message in (
    ({'epochs': -1.0}, 'epochs=-1.0'),
    ({'schedule.warmup_share': 1.0}, 'warmup_share=1.0'),
    (
      {'data.path': str(start[1] / 'pairs' / 'out')},
      "holds pairs, on which objective 'next_token'",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      config.resolve(sft(start, **changes))


def test_a_run_learns_to_answer_and_to_stop(start, tmp_path):
  given = sft(start, **{'epochs': 8.0, 'schedule.peak': 1e-2, 'eval.every': 5})
  for reduction in ('mean', 'sum'):
    given['objective']['reduction'] = reduction
    workdir = tmp_path / reduction
    loop.train(given, workdir)
    assert json.loads((workdir / 'config.json').read_text())['objective']['reduction'] == reduction
    lines = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
    losses = [x['eval_loss'] for x in lines if 'eval_loss' in x]
    assert losses[-1] < 0.8 * losses[0]
  loaded = load.load(tmp_path / 'mean', sharding.make_mesh({'data': 1}, jax.devices()[:1]))
  tok, _ = load.reads(loaded)  # that of the data, with their template
  talk = Chat(loaded, loaded.params(), tok, decode.greedy, 0)
  assert ''.join(talk.answer([SAY('user', 'anchor 99')], 20)) == 'aye'
