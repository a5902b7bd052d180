"""Preference pairs: losses and gradients, the reference, a run, held-out pairs."""

import dataclasses
import functools
import importlib
import math
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from test_conversations import fields, write

from slm import models, objectives, reparam
from slm.base import files
from slm.data import loader, prepare, rows, tokenizer
from slm.data.settings import TokenizerConfig
from slm.models.config import DecoderConfig
from slm.objectives import losses, preference, reference, signals, teacher
from slm.runs import config, load, processes, rundir
from slm.runs.config import DistillConfig, DpoConfig
from slm.training import loop, program
from slm.training.recorder import Recorder
from slm.training.step import State, make_sums, make_train_step
from slm.weights import sharding
from slm.weights.count import forward_flops

KINDS = ('norm', 'plain', 'ipo', 'simpo')
T = 32
CONTEXT = 192  # bytes in a prepared row, which hold two pairs
MODEL = models.build(
  DecoderConfig(vocab=64, embed=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, mlp=24)
)
LENGTHS = ((4, 3), (4, 2), (2, 9), (3, 5))  # of the prompt and an answer: two pairs, 32 tokens


def row(lengths=LENGTHS, seed: int = 0, t: int = T) -> rows.Rows:
  """Make a row of pairs: two segments for each two (prompt, answer)s."""
  rng, made = np.random.default_rng(seed), []
  for number, (prompt, answer) in enumerate(lengths, 1):
    tokens = rng.integers(1, 64, prompt + answer)
    made += [(x, number, i >= prompt) for i, x in enumerate(tokens)]
  made += [(0, 0, False)] * (t - len(made))
  columns = map(np.array, zip(*made, strict=True))
  dtypes = {'tokens': np.int32, 'segments': np.int32, 'trained': np.uint8}
  return {
    name: x[None].astype(kind) for (name, kind), x in zip(dtypes.items(), columns, strict=True)
  }


def stack(parts) -> rows.Rows:
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@functools.cache
def pairs() -> rows.Rows:
  """Make eight rows of one or two pairs, answers of very different lengths."""
  shapes = (LENGTHS, LENGTHS[:2], ((1, 14), (1, 2)), LENGTHS[::-1])
  return stack([row(shapes[i % 4], seed=i) for i in range(8)])


def flat(columns: rows.Rows) -> dict[str, jax.Array]:
  return {name: jnp.asarray(x) for name, x in rows.batch(columns).items()}


@functools.cache
def weights():
  """Return the weights of a model and of its reference."""
  start = toy.noisy(MODEL, 0.05)
  return jax.tree.map(lambda x: x * 1.1 + 0.01, start), start


def forward(cfg: DpoConfig):
  live = lambda frozen, batch: logprobs(frozen['reference'], batch)
  return {'student': MODEL.forward} | ({'reference': live} if cfg.has_reference else {})


def logprobs(params, batch):
  return losses.target_logprobs(MODEL.forward, params, batch, 16)


@functools.cache
def compiled(cfg: DpoConfig, axes: tuple[tuple[str, int], ...]):
  """Return a mesh, a state and the loop's own step on it, whose update is the gradient."""
  rep = reparam.build(config.section('reparam', {'name': 'full'}), MODEL.init)
  count = math.prod(size for _, size in axes)
  mesh = sharding.make_mesh(dict(axes), jax.devices()[:count])
  passes = forward(cfg) | {'student': reparam.map_groups(rep, MODEL.forward)}
  tx = optax.sgd(1.0)
  sums = make_sums(objectives.build(cfg, passes), rep, 'float32')
  theta, start = (jax.device_put(x, sharding.shardings(x, mesh)) for x in weights())
  state = State(np.zeros((), np.int32), theta, {}, tx.init(theta))
  return mesh, state, {'reference': start}, jax.jit(make_train_step(sums, tx))


NORM = DpoConfig(chunk=16)


def step(columns, cfg: DpoConfig = NORM, accum: int = 1, axes=(('data', 1),)):
  """Return the gradient of a training step on rows, float64, and its metrics."""
  mesh, state, frozen, run = compiled(cfg, axes)
  share = lambda x: x.reshape(accum, -1, 1, *x.shape[1:])
  batch = {name: share(x) for name, x in rows.batch(columns).items()}
  batch['condition'] = np.zeros(batch['inputs'].shape[:2], np.int32)
  with jax.set_mesh(mesh):
    after, metrics = run(state, frozen, processes.global_rows(batch, mesh, axis=1))
  line = lambda tree: np.concatenate([np.asarray(x, float).ravel() for x in jax.tree.leaves(tree)])
  return line(state.theta) - line(after.theta), {name: float(x) for name, x in metrics.items()}


def differs(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope='module')
def whole():
  return step(pairs())


@pytest.mark.parametrize(
  ('accum', 'axes'),
  [
    (2, (('data', 1),)), (8, (('data', 1),)), (4, (('data', 2),)),
    (1, (('data', 2), ('fsdp', 4))), (2, (('data', 2), ('fsdp', 2), ('tensor', 2))),
  ],
)  # fmt: skip
def test_the_gradient_is_the_same_for_every_split_and_mesh(whole, accum, axes):
  expected, metrics = whole
  found, same = step(pairs(), accum=accum, axes=axes)
  assert differs(found, expected) < 1e-6
  assert same['tokens'] == metrics['tokens'] == rows.batch(pairs())['weights'].sum()
  for name in ('loss', 'margin', 'accuracy', 'chosen_reward', 'rejected_reward'):
    np.testing.assert_allclose(same[name], metrics[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_mean_of_means_would_not_be(whole):
  """The test above fails for what divides each microbatch by its own number of pairs."""
  parts = [{name: x[i : i + 1] for name, x in pairs().items()} for i in range(8)]
  assert differs(np.mean([step(part)[0] for part in parts], axis=0), whole[0]) > 0.05


def test_packed_pairs_are_unpacked_pairs(whole):
  apart = [
    {name: np.where(inside, x[None], 0) for name, x in one.items()}
    for one in ({name: x[i] for name, x in pairs().items()} for i in range(8))
    for n in (1, 3)
    if (inside := (one['segments'] == n) | (one['segments'] == n + 1)[None]).any()
  ]
  expected, metrics = whole
  found, same = step(stack(apart))
  assert len(stack(apart)['tokens']) == 12
  assert differs(found, expected) < 2e-6
  np.testing.assert_allclose(same['loss'], metrics['loss'], rtol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_at_the_reference_margins_are_zero(kind, smoothing):
  if kind == 'ipo' and smoothing:
    return
  cfg = DpoConfig(kind=kind, chunk=16, smoothing=smoothing)
  start = weights()[1]
  sums = jax.jit(objectives.build(cfg, forward(cfg)))(start, {'reference': start}, flat(pairs()))
  value = {name: float(total / weight) for name, (total, weight) in sums.items()}
  assert float(sums['loss'][1]) == 12
  if kind == 'simpo':  # no reference
    assert value['margin'] != 0
    return
  expected = 1 / (2 * cfg.scale) ** 2 if kind == 'ipo' else math.log(2)
  assert value['loss'] == pytest.approx(expected, rel=1e-6)
  for name in ('margin', 'accuracy', 'chosen_reward', 'rejected_reward'):
    assert value[name] == 0


def of_logits(cfg, columns):
  """Return f(logits [b,t,v], reference [b,t]): the mean loss, and the batch."""
  batch = flat(columns)

  def loss(logits, known):
    return of_logprobs(-losses.cross_entropy(logits, batch['targets']), known)

  def of_logprobs(found, known):
    difference = found - known if cfg.has_reference else found
    values = preference.judge(cfg, cfg.scale * preference.scores(cfg, difference, batch))
    weight = preference.pair_weights(batch)
    return (values['loss'] * weight).sum() / weight.sum()

  return loss, batch


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_are_finite_differences(kind):
  cfg, rng = DpoConfig(kind=kind, smoothing=0.1 * (kind == 'norm')), np.random.default_rng(0)
  loss, _ = of_logits(cfg, pairs())
  logits = jnp.asarray(rng.normal(0, 1, (8, T, 64)), jnp.float32)
  known = jnp.asarray(rng.normal(-4, 0.1, (8, T)), jnp.float32)
  gradient, run = jax.jit(jax.grad(loss))(logits, known), jax.jit(loss)
  for seed in range(3):
    towards = np.random.default_rng(seed).normal(size=logits.shape) + 30 * np.asarray(gradient)
    towards /= np.linalg.norm(towards)
    ahead, back = (run(logits + d * towards, known) for d in (0.1, -0.1))
    found = float(jnp.vdot(gradient, towards))
    assert (float(ahead) - float(back)) / 0.2 == pytest.approx(found, rel=5e-3, abs=2e-6)


def test_the_norm_does_not_grow_with_the_length():
  """Every token of the answers twice: the margin per token stays, that of sums doubles."""
  rng, made = np.random.default_rng(0), []
  once = row()
  values = {}
  for times in (1, 2):
    places = np.repeat(np.arange(T), np.where(once['trained'][0] > 0, times, 1))
    made = {name: x[:, places] for name, x in once.items()}
    batch = flat(made)
    if times == 1:
      given = jnp.asarray(rng.normal(-3, 1, (1, T)), jnp.float32)
      # A target's value stands a place before it.
      of_token = np.append(0, np.asarray(given)[0, :-1])
    given = jnp.asarray(np.append(of_token[places][1:], 0))[None]
    for kind in ('norm', 'plain'):
      score = preference.scores(DpoConfig(kind=kind), given, batch)
      values[kind, times] = np.asarray(score[0, 0] - score[0, 1])[:2]
  assert np.abs(values['norm', 1]).min() > 1e-3
  np.testing.assert_allclose(values['norm', 2], values['norm', 1], rtol=1e-5)
  np.testing.assert_allclose(values['plain', 2], 2 * values['plain', 1], rtol=1e-5)


def test_example_weights_weigh_pairs():
  """Whatever the weight of a pair, its scores stay those of its tokens."""
  heavy = np.ones((8, T), np.float32)
  heavy[1] = 2
  heavy[2] = 0
  batch, plain = flat({**pairs(), 'weights': heavy}), flat(pairs())
  expected = np.array(preference.pair_weights(plain))
  assert expected.sum() == 12 and set(expected.ravel()) == {0, 1}
  expected[1] *= 2
  expected[2] = 0
  np.testing.assert_allclose(preference.pair_weights(batch), expected, rtol=1e-6)
  known = jnp.asarray(np.random.default_rng(0).normal(-3, 1, (8, T)), jnp.float32)
  for kind in ('norm', 'plain'):
    one, two = (preference.scores(DpoConfig(kind=kind), known, x) for x in (plain, batch))
    np.testing.assert_array_equal(one[:2], two[:2])


@pytest.mark.parametrize(
  ('kind', 'name', 'beta'),
  [('plain', 'sigmoid', 0.1), ('norm', 'sigmoid_norm', 5.0), ('ipo', 'ipo', 0.1)],
)
def test_losses_and_gradients_are_those_of_trl(kind, name, beta):
  """TRL's own _compute_loss on log-probabilities that torch makes of the same logits."""
  torch = pytest.importorskip('torch')
  trainer = pytest.importorskip('trl.trainer.dpo_trainer')
  rng = np.random.default_rng(1)
  columns = stack([row(LENGTHS[:2], 0), row(((1, 14), (1, 2)), 1), row(LENGTHS[2:], 2)])
  cfg = DpoConfig(kind=kind)
  assert cfg.scale == beta
  loss, batch = of_logits(cfg, columns)
  logits = rng.normal(0, 1, (3, T, 64)).astype(np.float32)
  known = rng.normal(-4, 0.3, (3, T)).astype(np.float32)
  value, gradient = jax.jit(jax.value_and_grad(loss))(logits, known)

  # TRL has a row for each answer: all chosen ones, then all rejected ones.
  given = torch.tensor(logits, requires_grad=True)
  targets = torch.tensor(np.asarray(batch['targets']), dtype=torch.int64)
  masks = [np.asarray(batch['weights'] * (batch['segments'] == s)) for s in (1, 2)]
  mask = torch.tensor(np.concatenate(masks))
  ours = torch.log_softmax(given, -1).gather(-1, targets[..., None])[..., 0]
  chosen, rejected = (torch.tensor((known * m).sum(1)) for m in masks)
  inputs = {
    'input_ids': torch.zeros(6, T + 1, dtype=torch.int64), 'ref_chosen_logps': chosen,
    'completion_mask': torch.nn.functional.pad(mask, (1, 0)).long(), 'ref_rejected_logps': rejected,
    'attention_mask': torch.ones(6, T + 1),
  }  # fmt: skip
  zeros = torch.zeros(6, T)
  out = types.SimpleNamespace(
    log_probs=ours.repeat(2, 1) * mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
  )
  same = lambda x: x
  model = lambda **_: out
  model.training = True
  stub = types.SimpleNamespace(
    model=model, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, beta=beta,
    f_divergence_type='reverse_kl', loss_types=[name], loss_weights=[1.0], label_smoothing=0.0,
    use_weighting=False, _total_train_tokens=0, _tp_size=1,
    accelerator=types.SimpleNamespace(device='cpu', gather=same, gather_for_metrics=same),
    _metrics={'train': {key: [] for key in TRL_METRICS}},
  )  # fmt: skip
  theirs = trainer.DPOTrainer._compute_loss(stub, stub.model, inputs, False)
  theirs.backward()
  assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
  assert differs(np.asarray(gradient), given.grad.numpy()) < 1e-5


TRL_METRICS = (
  'entropy', 'logits/chosen', 'logits/rejected', 'mean_token_accuracy', 'rewards/chosen',
  'rewards/rejected', 'rewards/accuracies', 'rewards/margins', 'logps/chosen', 'logps/rejected',
)  # fmt: skip


def test_simpo_and_smoothing_by_hand():
  rewards = jnp.asarray([[[1.5, -0.2], [0.7, 0.4]]], jnp.float32)  # margins 0.8 and -0.6
  log_sigmoid = lambda x: -math.log1p(math.exp(-x))
  simpo = preference.judge(DpoConfig(kind='simpo', gamma=0.5), rewards)
  np.testing.assert_allclose(simpo['loss'][0], [-log_sigmoid(m - 0.5) for m in (0.8, -0.6)], 1e-6)
  smooth = preference.judge(DpoConfig(smoothing=0.1), rewards)
  expected = [-0.9 * log_sigmoid(m) - 0.1 * log_sigmoid(-m) for m in (0.8, -0.6)]
  np.testing.assert_allclose(smooth['loss'][0], expected, 1e-6)
  np.testing.assert_array_equal(smooth['accuracy'][0], [1, 0])


def test_a_summary_has_standard_errors_over_pairs():
  table = np.array([[-1.0, -2.0, 1, 5], [-2.0, -1.5, 1, 7], [-1.0, -4.0, 1, 4]])
  known = np.array([[-1.5, -1.5, 1, 5], [-2.0, -2.0, 1, 7], [-4.0, -4.0, 1, 4]])
  found = reference.summary(DpoConfig(beta=1.0), table, known)
  margins = np.array([1.0, -0.5, 3.0])
  assert found['pairs'] == 3 and found['tokens'] == 16
  assert found['margin'] == pytest.approx(margins.mean())
  assert found['margin_stderr'] == pytest.approx(margins.std(ddof=1) / 3**0.5)
  assert found['accuracy'] == found['preferred'] == found['gain'] == pytest.approx(2 / 3)
  assert found['loss'] == pytest.approx(np.log1p(np.exp(-margins)).mean())
  with pytest.raises(ValueError, match='hold no pair'):
    reference.summary(DpoConfig(), table[:0])


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """Write a random run over bytes and pairs for it; return the run and the data."""
  root = tmp_path_factory.mktemp('dpo')
  tok = tokenizer.build('bytes', 0, '', [], root / 'data' / 'tokenizer')
  run = toy.random_model(root, tok)
  words = toy.TOPICS['sea'].split()
  lines = [
    {'prompt': f'{word} {i}', 'chosen': 'aye', 'rejected': ('no', 'nay', 'never')[i % 3]}
    for i, word in enumerate(words * 4)
  ]
  write(root / 'pairs.jsonl', lines)
  prepare.prepare(
    fields({'pairs': {'all': str(root / 'pairs.jsonl')}}, root / 'pairs', TokenizerConfig('bytes'),
           chat={'kind': 'pairs', 'template': 'tulu'}, heldout=(0.3, 0.0), context=CONTEXT)
  )  # fmt: skip
  return run, str(root / 'pairs' / 'out')


def given(start, **changes):
  c = importlib.import_module('configs.dpo').get_config()
  c.init, c.data.path, c.data.batch_size = str(start[0]), start[1], 8
  c.epochs, c.steps, c.schedule.peak, c.log_every, c.tensorboard = 0.0, 4, 3e-3, 1, False
  c.eval.update(every=2, batch_size=8)
  c.checkpoint.every = 2
  c.objective.chunk = 128
  for key, value in changes.items():
    if key == 'reparam':
      c.reparam = value
    else:
      c.update_from_flattened_dict({key: value})
  return c.to_dict()


@pytest.fixture(scope='module')
def cache(start, tmp_path_factory):
  out = tmp_path_factory.mktemp('cache') / 'signals'
  signals.write(str(start[0]), start[1], 'pairs/train', str(out), mode='targets', batch_size=8)
  return out


@pytest.fixture(scope='module')
def trained(start, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run') / 'dpo'
  loop.train(given(start), workdir)
  return workdir


def test_a_run_prefers_the_chosen_answers(trained, start):
  first, *_, last = rundir.read_metrics(trained)
  assert first['loss'] == pytest.approx(math.log(2), abs=1e-5) and abs(first['margin']) < 1e-5
  assert last['loss'] < 0.6 and last['accuracy'] > 0.9 and last['margin'] > 0
  assert last['eval_loss'] < 0.65 and last['eval_accuracy'] > 0.9 and 'eval_ppl' not in last
  assert last['eval_margin'] > 3 * last['eval_margin_stderr'] > 0
  assert last['eval_gain'] <= last['eval_preferred'] <= 1
  cfg = config.of(trained)
  assert cfg.objective == DpoConfig(chunk=128) and load.load(trained, mesh()).step == 4
  flops = (
    4 * 8 * CONTEXT * 4 * forward_flops(cfg.model, CONTEXT)
  )  # three passes and the reference's
  assert files.read_json(trained / 'ledger.json')['phases'][0]['flops'] == pytest.approx(flops)
  assert 0 < last['tokens'] < 4 * 8 * CONTEXT


def mesh():
  return sharding.make_mesh({'data': 1}, jax.devices()[:1])


def curves(run):
  names = ('loss', 'margin', 'chosen_reward', 'grad_norm', 'eval_loss', 'eval_margin', 'tokens')
  return [[line.get(name) for name in names] for line in rundir.read_metrics(run)]


def test_held_out_pairs_are_those_that_were_prepared_without_padding(start):
  cfg = config.resolve(given(start))
  params, scores = load.load(start[0], mesh()).params(), jnp.zeros((8, 2, CONTEXT // 2))
  with jax.set_mesh(mesh()):
    _, rep = load.build(cfg)
    evaluate = reference.Evaluator(cfg, cfg.objective, lambda *_: scores, rep, mesh())
    table = evaluate.pairs(lambda condition: params, {})
  facts = loader.facts(start[1], 'pairs/validation')
  assert len(table) == facts['documents'] and table[:, 3].sum() == facts['tokens']
  assert facts['rows'] % cfg.eval.batch_size  # some rows of the last batch are empty


class KilledError(Exception):
  pass


def test_a_run_that_was_killed_continues_bitwise(trained, start, tmp_path, monkeypatch):
  whole = Recorder.dispatched

  def dispatched(self, step, metrics):
    if step == 4:  # after the checkpoint of step 2 and the third step
      raise KilledError
    whole(self, step, metrics)

  with monkeypatch.context() as m:
    m.setattr(Recorder, 'dispatched', dispatched)
    with pytest.raises(KilledError):
      loop.train(given(start), tmp_path / 'run')
  loop.train(given(start), tmp_path / 'run')
  assert rundir.restarts(tmp_path / 'run') == [2]
  assert curves(tmp_path / 'run') == curves(trained)
  one, two = (load.load(run, mesh()).theta for run in (trained, tmp_path / 'run'))
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_log_probabilities_from_disk_are_those_of_the_live_reference(
  trained, start, cache, tmp_path
):
  loop.train(given(start, teacher_cache=str(cache)), tmp_path / 'cached')
  for live, cached in zip(curves(trained), curves(tmp_path / 'cached'), strict=True):
    for a, b in zip(live, cached, strict=True):
      assert a is b is None or a == pytest.approx(b, rel=1e-5, abs=1e-6)
  ledger = files.read_json(tmp_path / 'cached' / 'ledger.json')
  flops = 4 * 8 * CONTEXT * 3 * forward_flops(config.of(trained).model, CONTEXT)
  assert ledger['phases'][0]['flops'] == pytest.approx(flops)
  assert ledger['ancestors'] == [str(start[0]), str(cache)]
  columns = loader.Split(start[1], 'pairs', 'train').read(np.arange(8))
  params, batch = load.load(start[0], mesh()).params(), flat(columns)
  live = losses.target_logprobs(models.build(config.of(start[0]).model).forward, params, batch, 64)
  found = signals.Signals(cache)(columns)['teacher_logprobs']
  np.testing.assert_allclose(found, live, rtol=1e-6, atol=2e-6)
  assert 'log-probabilities differ' in signals.verify(str(cache))
  damaged = shutil.copytree(cache, tmp_path / 'damaged')
  (path,) = signals.shards(damaged, files.read_json(damaged / 'signals.json'))
  shard = np.load(path)
  shard['logprobs'] -= 0.1
  files.write_npy(path, shard)
  with pytest.raises(ValueError, match='its signals are not those of'):
    signals.verify(str(damaged))


def test_what_is_not_of_this_reference_and_these_rows_is_refused(start, cache, tmp_path):
  for key, value in (
    ('weights', 'f' * 64), ('rows_sha256', 'f' * 64), ('tokenizer', 'f' * 64), ('mode', 'topk')
  ):  # fmt: skip
    stale = tmp_path / key
    shutil.copytree(cache, stale)
    facts = files.read_json(stale / 'signals.json') | {key: value}
    for path in signals.shards(stale, facts):  # of the layout that is promised
      shard = np.load(path)
      files.write_npy(path, shard if key != 'mode' else np.zeros(len(shard), signals.layout(facts)))
    files.write_json(stale / 'signals.json', facts)
    message = f'teacher_cache: {stale} has {key} {value[:12]}, this run .*: make it again'
    with pytest.raises(ValueError, match=message):
      loop.train(given(start, teacher_cache=str(stale)), tmp_path / 'run')
  distil = dataclasses.replace(
    config.of(start[0]), objective=DistillConfig(), teacher_cache=str(cache), context=CONTEXT
  )
  with pytest.raises(ValueError, match='has the log-probabilities of targets alone'):
    teacher.open_signals(distil)


def test_lora_has_its_reference_in_its_base(start, tmp_path):
  lora = {'name': 'lora', 'rank': 2, 'alpha': 16.0, 'leaves': ('wq', 'w_up')}
  run = given(start, reparam=lora, steps=2)
  loop.train(run, tmp_path)
  first, last = rundir.read_metrics(tmp_path)
  assert first['loss'] == pytest.approx(math.log(2), abs=1e-5) and abs(first['margin']) < 1e-5
  assert last['loss'] < first['loss']
  for name, kept in (('lora', {'base'}), ('full', {'reference'})):
    cfg = config.resolve(given(start, reparam=lora) if name == 'lora' else given(start))
    outlined = program.outline(cfg, mesh())
    assert set(outlined.frozen) == kept
    size = sum(x.size for x in jax.tree.leaves(outlined.state.theta))
    if name == 'full':  # a plan counts the copy, and its pass
      assert program.memory(outlined.kinds)['frozen weights'] == 4 * size
      tokens = 8 * CONTEXT * forward_flops(cfg.model, CONTEXT)
      assert outlined.flops == pytest.approx(4 * tokens)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'init': ''}, "init: objective 'dpo' needs the run to start from"),
    ({'teacher': 'x'}, "teacher: objective 'dpo' has none"),
    ({'objective.kind': 'simpo', 'teacher_cache': 'x'}, "objective.kind='simpo' has no reference"),
    ({'objective.kind': 'other'}, 'objective.kind: expected one of norm, plain, ipo, simpo'),
    ({'objective.beta': -1.0}, 'objective.beta=-1.0'),
    ({'objective.kind': 'ipo', 'objective.smoothing': 0.1}, 'smoothing=0.1: expected 0 with'),
  ],
)
def test_bad_configs_are_refused(start, changes, message):
  with pytest.raises(ValueError, match=message):
    config.resolve(given(start, **changes))
