"""A model's own text: as a corpus, and in place of a batch's rows."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.base import console, files
from slm.data import loader, sources, tokenizer
from slm.inference import continuations
from slm.models import decode
from slm.models.decoder import unembed
from slm.objectives import losses, rollout
from slm.runs import checkpoint, ledger, load, rundir
from slm.runs.config import resolve, without_data
from slm.training import loop
from slm.weights import sharding
from slm.weights.count import forward_flops

KD = {'name': 'distill', 'chunk': 64, 'temperature': 1.0, 'mixing': 1.0, 'kl': 'jsd', 'beta': 0.3}


def test_generalised_divergence_beside_a_loop():
  rng, beta = np.random.default_rng(0), 0.3
  teacher, student = rng.normal(0, 2, (2, 5, 13))
  soft = lambda x: np.exp(x) / np.exp(x).sum()
  for t, s, found in zip(
    teacher, student, losses.jensen_shannon(jnp.asarray(teacher), jnp.asarray(student), beta),
    strict=True,
  ):  # fmt: skip
    p, q = soft(t), soft(s)
    m = beta * p + (1 - beta) * q
    want = beta * np.sum(p * np.log(p / m)) + (1 - beta) * np.sum(q * np.log(q / m))
    assert float(found) == pytest.approx(want, rel=1e-4)


def test_rewritten_rows_are_what_the_model_drew(tiny_config):
  c, prompt, tok = tiny_config, 5, tokenizer.load(f'{tiny_config.data.path}/tokenizer')
  c.model.vocab = 264  # padded
  model, rep = load.build(without_data(c.to_dict(), 32))
  params, key = jax.jit(rep.init)(jax.random.key(0)), jax.random.key(1)
  rows = next(loader.evaluation_batches(c.data.path, 'generic', 'test', 8))[2]
  rows['segments'][0, 3:], rows['segments'][1, 3:] = 2, 0  # a window that has just begun; padding
  rows = {name: jnp.asarray(x) for name, x in rows.items()}
  made = rollout.rewrite(model, params, rows, key, prompt, tok)
  assert {n: (x.shape, x.dtype) for n, x in made.items()} == {
    n: (x.shape, x.dtype) for n, x in rows.items()
  }
  ids, mask = rollout.prompts(rows['inputs'], rows['segments'], prompt)
  assert mask[0].tolist() == [False] * 3 + [True] * 2 and not mask[1].any()
  sampler = functools.partial(decode.sampled, temperature=1.0, top_k=0, top_p=1.0)
  how = {'sampler': sampler, 'end': frozenset([2]), 'known': tok.known}
  drawn = decode.generate(model, params, ids, mask, key, max_tokens=28, **how)
  assert int(drawn.tokens.max()) < 259
  np.testing.assert_array_equal(made['inputs'][:, :prompt], ids)
  logits = jax.jit(lambda p: jax.nn.log_softmax(unembed(p, model.forward(p, made))))(params)
  picked = jnp.take_along_axis(logits, made['targets'][..., None], axis=-1)[..., 0]
  for row in range(8):
    n = int(drawn.lengths[row]) * bool(mask[row].any())
    want = [0.0] * (prompt - 1) + [1.0] * n + [0.0] * (32 - prompt + 1 - n)
    assert made['weights'][row].tolist() == want
    there = slice(prompt - 1, prompt - 1 + n)
    np.testing.assert_array_equal(made['targets'][row, there], drawn.tokens[row, :n])
    np.testing.assert_allclose(picked[row, there], drawn.logprobs[row, :n], atol=1e-4)


class Stop:
  """Asks to stop after the second step, as a signal would."""

  def __enter__(self):
    return lambda step: step >= 2

  def __exit__(self, *_):
    pass


@pytest.mark.parametrize('share', [{'on_policy': 0.5}, {'on_policy': 1.0, 'on_policy_from': 0.5}])
def test_half_of_the_steps_are_the_students(share, tiny_config, train_once, tmp_path, monkeypatch):
  c = tiny_config
  train_once(c.to_dict(), tmp_path / 'teacher')
  c.phase, c.teacher = 'distill', str(tmp_path / 'teacher')
  c.objective = {**KD, **share, 'prompt': 4}
  loop.train(c.to_dict(), tmp_path / 'whole')
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'StopSignal', Stop)
    with pytest.raises(console.Interrupted):
      loop.train(c.to_dict(), tmp_path / 'halves')
  loop.train(c.to_dict(), tmp_path / 'halves')
  whole, halves, rows = (rundir.read_metrics(tmp_path / n) for n in ('whole', 'halves', 'teacher'))
  assert [x['loss'] for x in whole] == [x['loss'] for x in halves]
  # The rows' own numbers of predicted tokens, where it was their turn.
  own = [rollout.is_own(resolve(c.to_dict()), step) for step in range(1, 5)]
  assert set(own) == {True, False} and ('on_policy_from' not in share or own[2:] == [True, True])
  counts = lambda lines: np.diff([0] + [x['tokens'] for x in lines])
  assert [a != b for a, b in zip(counts(whole), counts(rows), strict=True)] == own
  model = load.load(tmp_path / 'whole', sharding.make_mesh({'data': -1})).model
  spent = ledger.read_ledger(tmp_path / 'whole')['phases'][0]
  # Three of the student, one of the teacher, and in half of the steps one to write.
  assert spent['flops'] == pytest.approx(4 * 8 * 32 * 4.5 * forward_flops(model.cfg, 32))
  # Own text has a divergence of its own: up to the first such step nothing else changes.
  c.objective.on_policy_kl = 'forward'
  loop.train(c.to_dict(), tmp_path / 'other')
  other, first = rundir.read_metrics(tmp_path / 'other'), own.index(True)
  same = [a['loss'] == b['loss'] for a, b in zip(whole, other, strict=True)]
  assert all(same[:first]) and not same[first]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'on_policy': 1.5}, 'objective.on_policy=1.5, on_policy_from=0.0: expected shares'),
    ({'on_policy': 0.5, 'mixing': 0.5}, 'needs mixing=1'),
    ({'on_policy': 0.5, 'correct': 1.0}, 'needs mixing=1'),
    ({'on_policy': 0.5, 'prompt': 40}, 'a prompt of 1 to 31 tokens'),
    ({'beta': 0.0}, 'objective.beta=0.0: expected more than 0'),
  ],
)
def test_impossible_settings_are_refused(change, message, tiny_config):
  c = tiny_config
  c.objective, c.model.vocab = {**KD, **change}, 264
  with pytest.raises(ValueError, match=message):
    cfg = without_data(c.to_dict(), 32)
    rollout.make_rewrite(*load.build(cfg), cfg, sharding.make_mesh({'data': -1}))


def test_a_corpus_of_continuations(tiny_config, train_once, tmp_path):
  c = tiny_config
  train_once(c.to_dict(), tmp_path / 'run')
  how = {
    'count': 40, 'prompt': 6, 'max_tokens': 9, 'temperature': 1.0, 'seed': 0, 'batch_size': 16
  }  # fmt: skip
  write = lambda out, **more: continuations.write(
    str(tmp_path / 'run'), '', 'generic/test', str(out), **{**how, **more}
  )
  count = write(tmp_path / 'text')
  (path,) = (tmp_path / 'text').glob('*.jsonl')
  texts = [text for _, text in sources.read(str(path), 'text', 'id')]
  assert len(texts) == count > 0
  tok = tokenizer.load(f'{c.data.path}/tokenizer')
  split = loader.Split(c.data.path, 'generic', 'test')
  for line in path.read_text().splitlines():
    line = json.loads(line)
    read = split.read(np.array([int(line['id'])]))
    ids, mask = rollout.prompts(read['tokens'], read['segments'], 6)
    assert line['text'].startswith(tok.decode(ids[0][mask[0]]))
  (spent,) = ledger.read_ledger(tmp_path / 'text')['phases']
  flops = forward_flops(load.load(tmp_path / 'run', load.mesh_for(tmp_path / 'run')).model.cfg, 15)
  # As many prompts as texts, of a begin token and what else of six tokens is the row's own.
  heard = spent['flops'] / flops - spent['tokens']
  assert 2 * count < heard <= 6 * count and spent['tokens'] <= 9 * count
  before = path.read_text()
  path.unlink()
  assert write(tmp_path / 'text') == count and path.read_text() == before
  with pytest.raises(ValueError, match='other continuations: seed was 0, now 1'):
    write(tmp_path / 'text', seed=1)
  for wrong in ({'prompt': 33}, {'batch_size': 0}, {'batch_size': -3}):
    with pytest.raises(ValueError, match='expected --prompt of 1 to 32'):
      write(tmp_path / 'none', **wrong)
  assert not (tmp_path / 'none').exists()
  assert files.read_json(tmp_path / 'text' / 'continuations.json')['rows'] == 40
