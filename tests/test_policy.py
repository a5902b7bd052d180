"""Policy gradients on sampled answers: the loss, what is drawn and scored, and whole runs."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from test_conversations import fields, write
from test_distill import Stop

from configs import grpo
from slm.base import console, files
from slm.data import loader, prepare, tokenizer
from slm.data.settings import TokenizerConfig
from slm.inference import rewards
from slm.models.decoder import Output, unembed
from slm.objectives import answers, policy
from slm.objectives.losses import target_logprobs
from slm.runs import checkpoint, config, load, processes, rundir
from slm.runs.config import PolicyConfig, RunConfig
from slm.training import loop
from slm.weights import sharding

ROWS, T, VOCAB, WIDTH = 6, 7, 11, 5
MAKE_MESH = sharding.make_mesh


def test_advantages_are_relative_to_the_group():
  scores = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 5.0], [2.0, 2.0, 2.0, 2.0]])
  mean, std = scores.mean(1, keepdims=True), scores.std(1, keepdims=True, ddof=1)
  others = (scores.sum(1, keepdims=True) - scores) / 3
  expected = {'std': (scores - mean) / (std + 1e-8), 'center': scores - mean,
              'loo': scores - others}  # fmt: skip
  for kind, want in expected.items():
    found = policy.group_advantage(jnp.asarray(scores), kind)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert not np.any(found[2])


def test_equal_rewards_of_any_value_give_no_advantage():
  """The mean of eight thirds in float32 is another number than a third."""
  for value in (0.1, 1 / 3, 0.7, 10.0):
    for size in (2, 6, 8, 16):
      scores = jnp.full((1, size), value, jnp.float32)
      for kind in ('std', 'center', 'loo'):
        assert not np.any(policy.group_advantage(scores, kind)), (value, size, kind)


def test_kl_estimates_have_the_kl_as_their_mean():
  rng = np.random.default_rng(0)
  p, q = (np.exp(x) / np.exp(x).sum() for x in rng.normal(size=(2, 50)))
  kl = np.sum(p * np.log(p / q))
  estimate = lambda kind: np.asarray(policy.kl_estimate(jnp.log(p), jnp.log(q), kind))
  for kind in ('k1', 'k3'):
    assert np.sum(p * estimate(kind)) == pytest.approx(kl, rel=1e-4)
  assert (estimate('k3') >= 0).all() and (estimate('k1') < 0).any()
  np.testing.assert_allclose(estimate('k2'), np.log(p / q) ** 2 / 2, rtol=1e-3, atol=1e-6)
  far = policy.kl_estimate(jnp.array([-200.0]), jnp.array([0.0]), 'k3')
  assert np.isfinite(far).all()


@functools.cache
def fixture():
  """Return hidden states, a head, a reference's states and a batch; one answer has no token."""
  rng = np.random.default_rng(1)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  lengths = np.array([7, 2, 4, 1, 0, 5])
  weights = (np.arange(T)[None] < lengths[:, None]).astype(np.float32)
  batch = {
    'targets': rng.integers(0, VOCAB, (ROWS, T)).astype(np.int32),
    'weights': weights,
    'old': (-2.4 + 0.8 * normal(ROWS, T)) * weights,
    'advantages': np.repeat(normal(ROWS, 1), T, 1) * weights,
  }
  hidden, head, reference = normal(ROWS, T, WIDTH), normal(VOCAB, WIDTH), normal(ROWS, T, WIDTH)
  return hidden, head, reference, batch


def loss(cfg, hidden, head, reference, batch):
  """Return the objective's loss of given hidden states, and its sums."""
  read = lambda params, _: Output(params['hidden'])
  forward = {
    'student': read,
    'reference': lambda p, batch: target_logprobs(read, p, batch, 12, cfg.temperature),
  }
  frozen = {'hidden': reference, 'embedding': jax.lax.stop_gradient(head)}
  sums = policy.policy(cfg, forward)({'hidden': hidden, 'embedding': head}, frozen, batch)
  return sums['loss'][0] / sums['loss'][1], sums


def transcribed(cfg, hidden, head, reference, batch):
  """Return the loss and its gradients by torch, written after the papers, sequence by sequence."""
  torch = pytest.importorskip('torch')
  hidden, head = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, head))
  batch = {name: torch.tensor(x) for name, x in batch.items()}

  def log_probs(states, head):
    scores = torch.log_softmax(states @ head.T / cfg.temperature, -1)
    return scores.gather(-1, batch['targets'].long()[..., None])[..., 0]

  per_answer, count = [], 0
  new, ref = log_probs(hidden, head), log_probs(torch.tensor(reference).double(), head.detach())
  for i in range(ROWS):
    n = int(batch['weights'][i].sum())
    if not n:
      continue
    count += n
    ratio = torch.exp(new[i, :n] - batch['old'][i, :n])
    a = batch['advantages'][i, :n]
    surrogate = torch.min(a * ratio, a * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high))
    log_ratio = ref[i, :n] - new[i, :n]
    per_answer.append(-surrogate + cfg.kl * (torch.exp(log_ratio) - log_ratio - 1))
  if cfg.normalise == 'sequences':
    total = torch.stack([x.mean() for x in per_answer]).mean()
  else:
    divisor = count if cfg.normalise == 'tokens' else len(per_answer) * cfg.max_tokens
    total = torch.cat(per_answer).sum() / divisor
  total.backward()
  return float(total.detach()), hidden.grad.numpy(), head.grad.numpy()


@pytest.mark.parametrize('name', grpo.PRESETS)
def test_loss_and_gradient_are_those_of_a_transcription(name):
  cfg = PolicyConfig(**grpo.PRESETS[name], chunk=12, max_tokens=9, temperature=0.7)
  hidden, head, reference, batch = fixture()
  value = lambda h, w: loss(cfg, h, w, reference, batch)
  (found, sums), gradients = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(hidden, head)
  want, *expected = transcribed(cfg, hidden, head, reference, batch)
  assert float(found) == pytest.approx(want, rel=1e-5)
  for a, b in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  assert 0 < float(sums['clipped'][0]) < float(sums['tokens'][0]) == 19


def test_gradient_is_that_of_finite_differences():
  cfg = PolicyConfig(kl=0.3, normalise='sequences', chunk=12)
  hidden, head, reference, batch = fixture()
  value = jax.jit(lambda h: loss(cfg, h, head, reference, batch)[0])
  direction = np.random.default_rng(2).normal(size=hidden.shape).astype(np.float32)
  slope = float(jnp.sum(jax.jit(jax.grad(value))(hidden) * direction))
  eps = 1e-3
  numeric = (value(hidden + eps * direction) - value(hidden - eps * direction)) / (2 * eps)
  assert float(numeric) == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize('kind', ['tokens', 'sequences', 'constant'])
def test_sums_of_microbatches_are_those_of_the_whole(kind):
  """Divided apart, the losses of two halves would have another mean: the test can fail."""
  cfg = PolicyConfig(normalise=kind, chunk=12)
  hidden, head, reference, batch = fixture()
  part = lambda s: loss(cfg, hidden[s], head, reference[s], {n: x[s] for n, x in batch.items()})
  whole, _ = part(slice(None))
  halves = [part(slice(0, 2)), part(slice(2, 6))]
  total = sum(s['loss'][0] for _, s in halves) / sum(s['loss'][1] for _, s in halves)
  assert float(total) == pytest.approx(float(whole), rel=1e-5)
  if kind != 'constant':
    assert abs(float(np.mean([x for x, _ in halves])) - float(whole)) > 1e-3


def test_nothing_to_train_on_gives_a_gradient_of_zero():
  hidden, head, reference, batch = fixture()
  batch = {**batch, 'weights': np.zeros_like(batch['weights'])}
  for kind in ('tokens', 'sequences', 'constant'):
    cfg = PolicyConfig(normalise=kind)
    value = jax.grad(lambda h, cfg=cfg: loss(cfg, h, head, reference, batch)[0])
    assert not np.any(value(hidden))


def drawn_answers():
  """Return two prompts and their three answers of up to four tokens each, as `draw` does."""
  prompts = {
    'inputs': jnp.array([[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]]),
    'length': jnp.array([3, 2]),
    'row': jnp.array([4, 1]),
  }
  tokens = jnp.arange(24).reshape(2, 3, 4) + 100
  out = {
    'tokens': tokens,
    'logprobs': -tokens / 100,
    'lengths': jnp.array([[4, 1, 2], [3, 3, 4]]),
    'ended': jnp.array([[False, True, True], [True, True, False]]),
  }
  return prompts, out


def test_rows_hold_prompt_and_answer_and_train_the_answer():
  prompts, out = drawn_answers()
  made = {name: np.asarray(x) for name, x in answers.rows(prompts, out).items()}
  assert made['inputs'][0, 2].tolist() == [5, 6, 7, 108, 109, 0, 0, 0, 0]
  assert made['segments'][0, 2].tolist() == [1] * 5 + [0] * 4
  assert made['positions'][0, 2].tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 0]
  for i, j in np.ndindex(2, 3):
    trained = made['weights'][i, j] > 0
    n, start = int(out['lengths'][i, j]), int(prompts['length'][i])
    assert np.flatnonzero(trained).tolist() == [*range(start - 1, start - 1 + n)]
    np.testing.assert_array_equal(made['targets'][i, j][trained], out['tokens'][i, j, :n])
    np.testing.assert_allclose(made['old'][i, j][trained], out['logprobs'][i, j, :n], rtol=1e-6)
    assert not np.any(made['old'][i, j][~trained])


def test_groups_without_variance_are_left_out_and_counted():
  prompts, out = drawn_answers()
  nan, cfg = np.nan, PolicyConfig(keep=1, samples=3, score_unended=True, advantage='center')
  rewards = jnp.array([[1.0, 1.0, 1.0], [1.0, nan, 0.0]])
  made, metrics = answers.train_rows(cfg, prompts, out, rewards)
  assert made['inputs'].shape == (3, 9)  # static, whatever varies
  assert np.asarray(made['inputs'])[:, 0].tolist() == [8, 8, 8]
  np.testing.assert_allclose(made['advantages'][0, 1], 2 / 3, rtol=1e-6)
  same = {'no_variance': 0.5, 'trained_groups': 1, 'undecided': 1 / 6, 'reward': 4 / 6,
          'answer_tokens': 17 / 6, 'rollout_tokens': 17}  # fmt: skip
  assert {name: float(metrics[name]) for name in same} == pytest.approx(same)

  punished = dataclasses.replace(cfg, keep=0, score_unended=False, unended=-10.0)
  made, metrics = answers.train_rows(punished, prompts, out, rewards)
  assert made['inputs'].shape == (6, 9) and float(metrics['trained_groups']) == 2
  want = np.array([-10.0, 1.0, 1.0]) - np.mean([-10.0, 1.0, 1.0])
  np.testing.assert_allclose(made['advantages'][:3].max(1), np.maximum(want, 0), rtol=1e-5)

  made, none = answers.train_rows(cfg, prompts, out, jnp.ones((2, 3)))
  assert float(none['trained_groups']) == 0 and not np.any(made['weights'])


def test_every_epoch_shares_all_answers_among_updates_in_an_order_of_its_own():
  made = {'inputs': jnp.arange(24).repeat(9).reshape(24, 9), 'old': jnp.ones((24, 9))}
  share = lambda key, **keys: np.asarray(
    answers.shared(PolicyConfig(**keys), made, 2, jax.random.key(key))['inputs']
  )
  one = share(0)
  assert one.shape == (2, 12, 1, 9) and one[..., 0].ravel().tolist() == [*range(24)]
  found = share(0, epochs=3, minibatches=4)
  assert found.shape == (12, 2, 3, 1, 9)
  orders = found[..., 0].reshape(3, 24).tolist()
  assert all(sorted(order) == [*range(24)] for order in orders)
  assert len(set(map(tuple, orders))) == 3
  assert (share(0, epochs=2, minibatches=4) == found[:8]).all()
  assert (share(1, epochs=3, minibatches=4) != found).any()


def test_a_correction_weighs_advantages_by_the_ratio_of_probabilities():
  made = {
    'weights': jnp.array([[1.0, 1.0, 1.0, 0.0]]),
    'advantages': jnp.array([[2.0, 2.0, 2.0, 0.0]]),
    'old': jnp.log(jnp.array([[0.5, 0.1, 0.4, 1.0]])),
  }
  now = jnp.log(jnp.array([[0.25, 0.9, 0.4, 0.1]]))
  found, told = answers.corrected(PolicyConfig(correction=3.0), made, now)
  np.testing.assert_allclose(found['advantages'], [[1.0, 6.0, 2.0, 0.0]], rtol=1e-6)
  np.testing.assert_allclose(found['old'], [[*now[0, :3], 0.0]], rtol=1e-6)
  assert float(told['importance']) == pytest.approx(1.5)
  assert float(told['truncated']) == pytest.approx(1 / 3)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """Write a random run over bytes, and prompts for it whose answers must begin with a letter."""
  root = tmp_path_factory.mktemp('policy')
  tok = tokenizer.build('bytes', 0, '', [], root / 'data' / 'tokenizer')
  run = toy.random_model(root, tok, sure=2.0)
  label = {'label': '[a-m].*', 'verifier': 'regex'}
  made = [
    {'prompt': f'{word} {i}', **label} for i, word in enumerate(toy.TOPICS['sea'].split() * 4)
  ]
  write(root / 'prompts.jsonl', made)
  prepare.prepare(
    fields({'prompts': {'all': str(root / 'prompts.jsonl')}}, root / 'prompts',
           TokenizerConfig('bytes'), chat={'kind': 'prompts', 'template': 'tulu'},
           heldout=(0.3, 0.0), context=48)
  )  # fmt: skip
  return str(run), str(root / 'prompts' / 'out')


def config_of(start, preset='tulu', **changes):
  """Return a run of four steps on eight prompts with four answers each."""
  c = grpo.get_config(preset)
  c.init, c.data.path = start
  c.steps, c.tensorboard, c.log_every = 4, False, 1
  c.data.batch_size = 8
  c.schedule.update(peak=3e-3, warmup=1)
  c.eval.update(every=0, max_rows=8, batch_size=8)
  c.checkpoint.every = 2
  c.objective.update(chunk=64, samples=4, max_tokens=6, score_unended=True, keep=0, minibatches=1)
  c.update_from_flattened_dict(changes)
  return c.to_dict()


def begins(labels):
  """Reward what begins with a small letter, in place of verifiers."""
  assert all(len(label) == 1 for label in labels)
  return lambda rows, texts: [float('a' <= text[:1] <= 'z') for text in texts]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Train on one of the simulated devices: programs of one compile faster."""
  on(monkeypatch, {'data': 1})


def on(monkeypatch, axes):
  size = int(np.prod([*axes.values()]))
  mesh = MAKE_MESH(axes, jax.devices()[:size])
  monkeypatch.setattr(sharding, 'make_mesh', lambda *_: mesh)


def metrics(path):
  return rundir.read_metrics(path)


def killed(c, path, monkeypatch):
  """Train whole, and killed after two steps and continued; return the result and both's metrics."""
  whole = loop.train(c, path / 'whole', reward=begins)
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'StopSignal', Stop)
    with pytest.raises(console.Interrupted):
      loop.train(c, path / 'halves', reward=begins)
  loop.train(c, path / 'halves', reward=begins)
  return whole, *(metrics(path / name) for name in ('whole', 'halves'))


def same(first, second):
  """Return whether the metrics of two runs are equal, but for times and sizes."""
  timed = ('second', 'bytes')
  kept = lambda line: {n: x for n, x in line.items() if not any(word in n for word in timed)}
  return [*map(kept, first)] == [*map(kept, second)]


def test_a_killed_run_continues_bitwise_rollouts_included(start, tmp_path, monkeypatch):
  c = config_of(
    start,
    'dapo',
    **{'objective.keep': 4, 'data.accum': 2, 'objective.samples': 8, 'data.batch_size': 16,
       'objective.epochs': 2, 'objective.minibatches': 2},
  )  # fmt: skip
  whole, lines, again = killed(c, tmp_path, monkeypatch)
  assert len(lines) == 4 and same(lines, again)
  told = 'reward reward_std no_variance answer_tokens ended clipped entropy rollouts_per_second'
  assert {*told.split(), 'rollout_seconds', 'score_seconds'} <= lines[0].keys()
  assert 'kl' not in lines[0] and [x['policy_step'] for x in lines] == [0, 1, 2, 3]
  phases = {p['phase']: p for p in files.read_json(tmp_path / 'whole' / 'ledger.json')['phases']}
  assert phases['rollout']['tokens'] == whole['rollout_tokens'] > 0
  assert phases['rollout']['device_seconds'] == whole['rollout_device_seconds'] > 0
  assert phases['finetune']['tokens'] == whole['tokens'] < 2 * whole['rollout_tokens']


STALE = {'objective.stale': 1, 'objective.correction': 2.0, 'schedule.peak': 0.02}


def test_a_killed_stale_run_continues_bitwise(start, tmp_path, monkeypatch):
  """What was drawn for the next step, by weights that are gone, is saved with the run."""
  _, lines, again = killed(config_of(start, **STALE), tmp_path, monkeypatch)
  assert len(lines) == 4 and same(lines, again)
  assert [x['policy_step'] for x in lines] == [0, 0, 1, 2]


def test_stale_answers_are_those_of_a_loop_that_keeps_earlier_weights(start, tmp_path, monkeypatch):
  loop.train(config_of(start, **STALE), tmp_path / 'run', reward=begins)
  made, kept = answers.make_draw, []

  def earlier(*args):
    draw = made(*args)

    def by_kept(theta, frozen, batch, step, policy_step):
      assert policy_step == step - 1 == len(kept)
      kept.append(jax.tree.map(jnp.copy, theta))
      policy_step = max(step - 2, 0)
      return draw(kept[policy_step], frozen, batch, step, policy_step)

    return by_kept

  monkeypatch.setattr(answers, 'make_draw', earlier)
  plain = config_of(start, **STALE | {'objective.stale': 0})
  loop.train(plain, tmp_path / 'plain', reward=begins)
  lines = metrics(tmp_path / 'run')
  assert len(lines) == 4 and same(lines, metrics(tmp_path / 'plain'))
  mesh = sharding.make_mesh()
  weights = [load.load(str(tmp_path / name), mesh).params() for name in ('run', 'plain')]
  jax.tree.map(np.testing.assert_array_equal, *weights)
  assert abs(lines[0]['importance'] - 1) < 1e-5 and lines[0]['truncated'] == 0
  assert abs(lines[-1]['importance'] - 1) > 1e-3 and lines[-1]['truncated'] > 0
  assert all(x['moved'] < 1e-5 for x in lines)  # since the start of the step


def test_answers_are_scored_while_the_device_is_busy(start, tmp_path, monkeypatch):
  """With the updates before and a draw after them, which has not finished then."""
  made, drawn, finished = answers.make_draw, [], []

  def kept(*args):
    draw = made(*args)
    return lambda *given: drawn.append(draw(*given)) or drawn[-1]

  def reward(labels):
    def grade(rows, texts):
      finished.append([made['answers']['tokens'].is_ready() for made in drawn])
      return begins(labels)(rows, texts)

    return grade

  monkeypatch.setattr(answers, 'make_draw', kept)
  changes = {'steps': 3, 'checkpoint.every': 9, 'objective.max_tokens': 64, 'objective.epochs': 8}
  for stale in (0, 1):
    c = config_of(start, **changes | {'objective.stale': stale})
    loop.train(c, tmp_path / str(stale), reward=reward)
  one, two = [True], [True, True]
  assert finished[:3] == [one, two, [*two, True]]
  # The draw for the third step waits for the updates of the first.
  assert [*map(len, finished[4:7])] == [5, 6, 7] and not finished[5][-1]


def test_a_run_that_goes_back_draws_anew(start, tmp_path, monkeypatch):
  """What was drawn for the step that failed may be the cause."""
  c = config_of(start, **STALE)
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'StopSignal', Stop)
    with pytest.raises(console.Interrupted):
      loop.train(c, tmp_path / 'run', reward=begins)
  back = {'step': 3, 'to': 2, 'next': 3, 'why': 'loss', 'totals': {}}
  files.write_json(tmp_path / 'run' / 'rewinds.json', [back])
  loop.train(c, tmp_path / 'run', reward=begins)
  assert [x['policy_step'] for x in metrics(tmp_path / 'run')] == [0, 0, 2, 2]


def test_the_sampler_has_the_weights_of_the_step(start, tmp_path, monkeypatch):
  """The log-probabilities of draws are those of the weights they train; stale ones would show."""
  watched = {'rewind.steps': 1, 'rewind.above': 1.01, 'checkpoint.keep': 2}
  loop.train(config_of(start, **watched), tmp_path / 'run', reward=begins)
  lines = metrics(tmp_path / 'run')
  # Losses lie around 0, where no multiple of their average is a spike.
  assert any(abs(x['loss']) > 2 * abs(lines[0]['loss']) for x in lines)
  assert not (tmp_path / 'run' / 'rewinds.json').exists()
  assert all(x['moved'] < 1e-5 and x['clipped'] == 0 for x in lines)
  assert lines[0]['kl'] < 1e-6 < 1e-4 < lines[-1]['kl']  # by the last step they have moved
  made = answers.make_draw

  def stale(*args):
    draw, first = made(*args), []

    def old(theta, *rest):
      first.append(jax.tree.map(jnp.copy, theta))
      return draw(first[0], *rest)

    return old

  monkeypatch.setattr(answers, 'make_draw', stale)
  loop.train(config_of(start), tmp_path / 'stale', reward=begins)
  assert metrics(tmp_path / 'stale')[-1]['moved'] > 1e-3


def test_devices_slots_parts_and_a_correction_do_not_change_a_step(start, tmp_path, monkeypatch):
  found = []
  for i, (mesh, accum) in enumerate((({'data': 1}, 1), ({'data': 2, 'fsdp': 2}, 2))):
    on(monkeypatch, mesh)
    changes = {'steps': 1, 'schedule.warmup': 0, 'data.accum': accum, 'objective.slots': 5 * i,
               'objective.minibatches': 2, 'objective.correction': 2.0 * i}  # fmt: skip
    loop.train(config_of(start, 'grpo', **changes), tmp_path / str(i), reward=begins)
    found.append(metrics(tmp_path / str(i))[0])
  for name in ('loss', 'grad_norm', 'reward', 'answer_tokens', 'entropy', 'eval_reward'):
    assert found[0][name] == pytest.approx(found[1][name], rel=1e-4, abs=1e-6), name
  assert abs(found[1]['importance'] - 1) < 1e-5  # of answers by the weights of the step


def recorded(monkeypatch):
  """Record copies of the weights and the batch of every step of a run."""
  made, seen = answers.make_rewrite, []

  def recording(*args):
    rewrite = made(*args)

    def noted(theta, *rest):
      kind, batch, told = rewrite(theta, *rest)
      seen.append(jax.tree.map(np.array, (theta, batch)))
      return kind, batch, told

    return noted

  monkeypatch.setattr(answers, 'make_rewrite', recording)
  return seen


EPS = 1e-4  # of Adam: with 1e-8 a gradient of mere rounding moves a weight by the whole rate


def plain_updates(cfg, model, params, batches, rates):
  """Return the weights after an update on each batch [rows,t] of one rollout: PPO by the book."""
  tx = optax.inject_hyperparams(
    lambda rate: optax.chain(
      optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.95, EPS, weight_decay=0.0)
    )
  )(rate=0.0)
  state = tx.init(params)

  def loss(params, batch):
    out = model.forward(params, {n: batch[n] for n in ('inputs', 'segments', 'positions')})
    table = jax.nn.log_softmax(unembed(params, out))
    logp = jnp.take_along_axis(table, batch['targets'][..., None], -1)[..., 0]
    ratio, a = jnp.exp(logp - batch['old']), batch['advantages']
    low, high = 1 - cfg['clip_low'], 1 + cfg['clip_high']
    gain = jnp.minimum(ratio * a, jnp.clip(ratio, low, high) * a)
    return -jnp.sum(gain * batch['weights']) / jnp.sum(batch['weights'])

  @jax.jit
  def update(params, state, batch):
    change, state = tx.update(jax.grad(loss)(params, batch), state, params)
    return optax.apply_updates(params, change), state

  for batch, rate in zip(batches, rates, strict=True):
    state.hyperparams['rate'] = jnp.asarray(rate)
    params, state = update(params, state, batch)
  return params


def test_a_step_is_the_plain_loop_of_its_updates(start, tmp_path, monkeypatch):
  """All on one rollout, with ratios to the probabilities of the draw, and its clip holds some."""
  seen = recorded(monkeypatch)
  c = config_of(
    start,
    **{'objective.epochs': 2, 'objective.minibatches': 2, 'objective.kl': 0.0, 'data.accum': 2,
       'steps': 2, 'objective.advantage': 'center', 'schedule.peak': 0.02, 'optim.eps': EPS},
  )  # fmt: skip
  loop.train(c, tmp_path / 'run', reward=begins)
  (theta, batch), (after, _) = seen
  assert batch['inputs'].shape[:4] == (4, 2, 8, 1)
  batches = [{n: x[i].reshape(16, -1) for n, x in batch.items()} for i in range(4)]
  rates = [0.02 * (1 + share) / 2 for share in (0, 0.25, 0.5, 0.75)]  # a warm-up of one step
  model = load.load(start[0], sharding.make_mesh()).model
  want = plain_updates(c['objective'], model, theta, batches, rates)
  first = plain_updates(c['objective'], model, theta, batches[:1], rates[:1])
  apart = lambda *trees: max(jax.tree.leaves(jax.tree.map(lambda a, b: abs(a - b).max(), *trees)))
  assert apart(after, want) < 1e-5 < 1e-2 < min(apart(theta, want), apart(first, want))
  line = metrics(tmp_path / 'run')[0]
  assert 0 < line['clipped'] < 1 and line['moved'] > 1e-2
  assert line['tokens'] == sum(x['weights'].sum() for x in batches)


def test_advantages_belong_to_the_prompts_and_answers_that_were_scored(start, monkeypatch):
  """Whatever the order of devices and microbatches; a swap of two rows or answers would show."""
  on(monkeypatch, {'data': 2})
  changes = {'data.accum': 2, 'objective.advantage': 'center', 'objective.max_tokens': 3}
  cfg = config.resolve(config_of(start, **changes))
  worth = lambda row, text: zlib.crc32(f'{row} {text}'.encode()) % 7
  seen = {}

  def score(step, rows, texts):
    for row, text in zip(rows, texts, strict=True):
      seen.setdefault(row, []).append(worth(row, text))
    return [float(worth(*both)) for both in zip(rows, texts, strict=True)]

  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    model, rep = load.build(cfg)
    tok = tokenizer.load(f'{start[1]}/tokenizer')
    draw = answers.make_draw(cfg, model, rep, tok, mesh)
    make = answers.make_rewrite(cfg, model, rep, tok, mesh, score)
    batch = next(loader.build(cfg.data, seed=cfg.seed))
    theta = load.load(start[0], mesh).params()
    placed = processes.global_rows(batch, mesh, axis=1)
    _, made, _ = make(theta, {}, draw(theta, {}, placed, 1, 0), 1)
  made = {name: np.asarray(x).reshape(-1, x.shape[-1]) for name, x in made.items()}
  asked = batch['inputs'].reshape(8, -1), batch['length'].reshape(-1), batch['row'].reshape(-1)
  prompts = {tuple(ids[:n]): int(row) for ids, n, row in zip(*asked, strict=True)}
  assert len(made['inputs']) == 32 and len(prompts) == 8
  for ids, trained, advantages in zip(
    made['inputs'], made['weights'], made['advantages'], strict=True
  ):
    begin, size = int(np.flatnonzero(trained)[0]) + 1, int(trained.sum())
    row = prompts[tuple(ids[:begin])]
    text = tok.continued(ids[:begin].tolist(), ids[begin : begin + size].tolist())
    expected = worth(row, text) - np.mean(seen[row])
    np.testing.assert_allclose(advantages[trained > 0], expected, atol=1e-5)
  assert all(len(scores) == 4 for scores in seen.values())


def test_held_out_rewards_are_means_over_the_rows_without_padding(start):
  """Seven rows in batches of four, each worth its number."""
  given = config_of(start, **{'eval.batch_size': 4, 'eval.max_rows': 7, 'objective.max_tokens': 2})
  cfg, mesh = config.resolve(given), sharding.make_mesh()
  worth = lambda labels: lambda rows, texts: [row + 1.0 for row in rows]
  with jax.set_mesh(mesh):
    model, _ = load.build(cfg)
    tok, params = tokenizer.load(f'{start[1]}/tokenizer'), load.load(start[0], mesh).params()
    found = answers.evaluator(cfg, model, tok, mesh, worth)(lambda condition: params, {})
  rows = loader.spaced(loader.Split(start[1], 'prompts', 'validation').ids, 7)
  assert found['reward'] == found['greedy_reward'] == -found['loss']
  assert found['reward'] == pytest.approx(np.mean(rows + 1.0)) and len(rows) == 7


def test_draws_depend_on_seed_step_row_and_number_alone(start):
  run = load.load(start[0], sharding.make_mesh())
  tok = tokenizer.load(f'{start[1]}/tokenizer')
  data = loader.Split(start[1], 'prompts', 'train')
  cfg = PolicyConfig(samples=3, max_tokens=5)

  def draw(rows, key, samples=3):
    read = data.read(np.array(rows))
    batch = {'inputs': read['tokens'], 'length': read['length'][:, 0], 'row': np.array(rows)}
    out = jax.jit(lambda p, b: answers.draw(cfg, run.model, tok, p, b, key, samples))
    return np.asarray(out(run.params(), batch)['tokens'])

  key = jax.random.key(0)
  first, moved = draw([3, 5, 2], key), draw([2, 7, 3], key)
  np.testing.assert_array_equal(first[[0, 2]], moved[[2, 0]])
  np.testing.assert_array_equal(draw([3, 5, 2], key, 2), first[:, :2])
  assert (first[:, 0] != first[:, 1]).any()
  assert (draw([3, 5, 2], jax.random.key(1)) != first).any()


def test_controls_are_seeded_and_shuffled_labels_are_of_other_prompts(start):
  split = loader.Split(start[1], 'prompts', 'train')
  for i, entry in enumerate(labels := split.labels()):
    entry['verifiers'] = [{'id': 'regex', 'args': str(i)}]
  split.labels = lambda: labels
  cfg = lambda kind: RunConfig(
    model=None, data=loader.DataConfig(), objective=PolicyConfig(reward=kind, samples=2)
  )
  seen = []
  answers.scorer(cfg('shuffled'), split, lambda given: seen.extend(given))
  numbers = [int(label[0]['args']) for label in seen]
  assert sorted(numbers) == [*range(len(labels))]
  assert all(i != number for i, number in enumerate(numbers))
  coin = answers.scorer(cfg('random'), split, None)
  rows, texts = [3, 3, 8, 8] * 50, [''] * 200
  flips = coin(1, rows, texts)
  assert flips == coin(1, rows, texts) and flips[:2] == coin(1, [3, 3], texts[:2])
  many = [x for step in range(100) for x in coin(step, [0, 0, 1, 1], texts[:4])]
  assert set(many) == {0.0, 1.0} and 0.4 < np.mean(many) < 0.6


def test_verifiers_reward_and_undecided_is_nan(monkeypatch):
  grade = rewards.reward([[{'id': 'exact', 'args': 'ship', 'weight': 10}],
                          [{'id': 'gsm8k.numeric', 'args': '72'}]])  # fmt: skip
  assert grade([0, 0, 1], ['Ship.', 'boat', 'so 72.0']) == [10.0, 0.0, 1.0]
  late = lambda text, answer: (_ for _ in ()).throw(rewards.verifiers.pool.Undecided('late'))
  monkeypatch.setitem(rewards.verifiers.CHECKERS, 'exact', late)
  assert np.isnan(grade([0], ['ship'])[0])
  with pytest.raises(ValueError, match="the label of prompt 1: there is no verifier 'exct'"):
    rewards.reward([[{'id': 'regex', 'args': '1'}], [{'id': 'exct', 'args': '1'}]])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'objective.keep': 9}, 'objective.keep=9: expected at most data.batch_size=8'),
    ({'objective.keep': 3, 'data.accum': 8}, 'of minibatches x data.accum x devices = 1 x 8 x 1'),
    ({'objective.minibatches': 3}, 'objective.minibatches=3: expected the 32 answers of a step'),
    ({'objective.epochs': 0}, 'expected epochs >= 1'),
    ({'objective.stale': 2}, 'expected stale of 0 or 1'),
    ({'init': ''}, 'objective.kl=0.01 is from the weights of a run'),
    ({'objective.samples': 1}, 'expected samples >= 2'),
    ({'objective.clip_low': 0.0}, 'expected clip_low in 0..1'),
  ],
)
def test_keys_that_do_not_fit_are_refused(start, tmp_path, changes, message):
  given = config_of(start)
  for key, value in changes.items():
    *path, name = key.split('.')
    functools.reduce(dict.get, path, given)[name] = value
  with pytest.raises(ValueError, match=message):
    loop.train(given, tmp_path / 'run', reward=begins)


def test_a_run_needs_rewards_and_prompts(start, tmp_path):
  with pytest.raises(ValueError, match="objective 'policy': expected a reward of answers"):
    loop.train(config_of(start), tmp_path / 'run')
  with pytest.raises(ValueError, match='configs/grpo.py: expected one of tulu'):
    grpo.get_config('ppo')


def test_lora_has_its_base_as_the_reference_and_a_plan(start, tmp_path):
  c = config_of(start, **{'reparam': {'name': 'lora', 'rank': 2}, 'schedule.peak': 3e-2})
  loop.train(c, tmp_path / 'run', reward=begins)
  lines = metrics(tmp_path / 'run')
  assert lines[0]['kl'] < 1e-6 < lines[-1]['kl']
