"""PPO: rewards of tokens, advantages and masks by hand, the loss, and whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_policy
from test_distill import Stop
from test_policy import begins, fixture, metrics

from configs import ppo
from slm.base import console, files
from slm.models.decoder import Output
from slm.objectives import answers, critic, policy, scalar
from slm.runs import checkpoint, config, load
from slm.runs.config import PolicyConfig, RewardConfig
from slm.training import loop, program
from slm.weights import sharding
from slm.weights.count import forward_flops, hidden_flops

start = test_policy.start
one_device = test_policy.one_device

# Three answers of up to four tokens: one that ends after two, one that does not end, one that ends
# at the last place. Values are of the states before each token, and what follows the end.
LENGTHS, ENDED = [2, 4, 4], [True, False, True]
VALUES = [[1.0, 2.0, 3.0, 9.0], [1.0, 0.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]]
KL = [[0.1, 0.2, 7.0, 7.0], [0.0, 0.1, 0.0, 0.2], [0.0, 0.0, 0.0, 0.0]]
# By hand, with scores of 10, -10 (no end) and 10, beta = 1, gamma = 1 and lambda = 1/2.
REWARDS = {
  'standard': [[-0.1, 9.8, 0, 0], [0, -0.1, 0, -10.2], [0, 0, 0, 10]],
  'tulu3': [[-0.1, -0.2, 10, 0], [0, -0.1, 0, -10.2], [0, 0, 0, 10]],
}
CUT = [-1.325, -0.65, -5.1, -14.2]  # the differences are -1, 1.9, 2, -14.2
LAST = [1.125, 2.25, 4.5, 9]  # 0, 0, 0, 9
ADVANTAGES = {
  'standard': [[4.8, 7.8, 0, 0], CUT, LAST],  # 0.9, 7.8
  'tulu3': [[3.05, 4.3, 7, 0], CUT, LAST],  # 0.9, 0.8, 7
}
RETURNS = {
  'standard': [[5.8, 9.8, 0, 0], [-0.325, -0.65, -3.1, -10.2], [2.125, 3.25, 5.5, 10]],
  'tulu3': [[4.05, 6.3, 10, 0], [-0.325, -0.65, -3.1, -10.2], [2.125, 3.25, 5.5, 10]],
}
STATES = {'standard': [2, 4, 4], 'tulu3': [3, 4, 4]}  # whose value is trained


def preset(name, **changes):
  given = {**ppo.BOTH, **ppo.PRESETS[name], 'kl': 1.0, 'lam': 0.5, 'whiten': 0, 'chunk': 12}
  return PolicyConfig(**given | changes)


@pytest.mark.parametrize('name', ppo.PRESETS)
def test_rewards_advantages_and_returns_are_those_by_hand(name):
  cfg, scores = preset(name), jnp.array([10.0, -10.0, 10.0])
  rewards = policy.token_rewards(scores, jnp.array(KL), jnp.array(LENGTHS), 1.0, cfg.score_at)
  np.testing.assert_allclose(rewards, REWARDS[name], rtol=1e-6)
  real = np.arange(4)[None] < np.array(STATES[name])[:, None]
  found = policy.gae(rewards, jnp.array(VALUES) * real, 1.0, 0.5)
  np.testing.assert_allclose(found, ADVANTAGES[name], rtol=1e-6)


@pytest.mark.parametrize('name', ppo.PRESETS)
def test_rows_have_them_at_the_places_that_predict_the_tokens(name):
  """Answers of two prompts of 3 and 2 tokens, scored 1, 0 (replaced) and 1."""
  prompts = {
    'inputs': jnp.array([[5, 6, 7, 0], [8, 9, 0, 0], [5, 6, 0, 0]]),
    'length': jnp.array([3, 2, 2]),
    'row': jnp.arange(3),
  }
  out = {
    'tokens': jnp.arange(12).reshape(3, 1, 4) + 100,
    'logprobs': jnp.array(KL)[:, None] - 2,
    'lengths': jnp.array(LENGTHS)[:, None],
    'ended': jnp.array(ENDED)[:, None],
  }
  cfg = preset(name)
  spread = lambda x: answers.placed(prompts, jnp.array(x)[:, None])
  seen = []

  def look(made):
    seen.append(made['inputs'])
    return spread(np.full((3, 4), -2.0)), spread(VALUES)

  rewards = jnp.array([[1.0], [0.0], [1.0]])
  made, told = answers.train_rows(cfg, prompts, out, rewards, look)
  assert seen[0].shape == (3, 1, 8)
  tokens = np.concatenate([np.array(ADVANTAGES[name])[i, :n] for i, n in enumerate(LENGTHS)])
  for i, first in enumerate([2, 1, 1]):  # the last token of the prompt predicts the answer's first
    states, n = STATES[name][i], LENGTHS[i]
    row = {key: np.asarray(x[i]) for key, x in made.items()}
    assert np.flatnonzero(row['weights']).tolist() == [*range(first, first + n)]
    assert np.flatnonzero(row['value_weights']).tolist() == [*range(first, first + states)]
    np.testing.assert_allclose(row['values'][first : first + states], VALUES[i][:states])
    want = np.array(RETURNS[name][i][:states])
    np.testing.assert_allclose(row['returns'][first : first + states], want, rtol=1e-5)
    want = (np.array(ADVANTAGES[name][i][:n]) - tokens.mean()) / tokens.std(ddof=1)
    np.testing.assert_allclose(row['advantages'][first : first + n], want, rtol=1e-5)
    for key, last in (('advantages', n), ('values', states), ('returns', states)):
      assert not np.any(np.delete(row[key], range(first, first + last)))
  returns = np.concatenate([RETURNS[name][i][:n] for i, n in enumerate(STATES[name])])
  values = np.concatenate([VALUES[i][:n] for i, n in enumerate(STATES[name])])
  explained = 1 - np.var(returns - values) / np.var(returns)
  same = {'explained_variance': explained, 'returns': returns.mean(), 'kl': 0.06, 'reward': 10 / 3}
  assert {key: float(told[key]) for key in same} == pytest.approx(same, rel=1e-5)


def test_advantages_are_those_of_a_loop():
  rng = np.random.default_rng(0)
  rewards, values = rng.normal(size=(2, 5, 7))
  want = np.zeros((5, 7))
  for i in range(5):
    for t in range(7):
      for later in range(t, 7):
        following = values[i, later + 1] if later < 6 else 0.0
        difference = rewards[i, later] + 0.9 * following - values[i, later]
        want[i, t] += (0.9 * 0.7) ** (later - t) * difference
  found = jax.jit(policy.gae, static_argnums=(2, 3))(rewards, values, 0.9, 0.7)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_whitening_by_device_is_not_that_of_all():
  rng = np.random.default_rng(0)
  x, mask = rng.normal(size=(6, 4)) * np.arange(1, 7)[:, None], rng.random((6, 4)) < 0.7
  x, mask = x.astype(np.float32), mask.astype(np.float32)
  for rows in (0, 2, 3):
    found = np.asarray(policy.whitened(x, mask, rows))
    assert not np.any(found[mask == 0])
    for i in range(0, 6, rows or 6):
      part, here = x[i : i + (rows or 6)], mask[i : i + (rows or 6)] > 0
      want = (part[here] - part[here].mean()) / part[here].std(ddof=1)
      np.testing.assert_allclose(found[i : i + (rows or 6)][here], want, rtol=1e-4, atol=1e-5)
  assert np.abs(policy.whitened(x, mask, 2) - policy.whitened(x, mask, 0)).max() > 0.1
  assert not np.any(policy.whitened(x, np.zeros_like(mask), 2))


def value_fixture():
  """Return test_policy's fixture with values, returns, and a head."""
  hidden, head, _, batch = fixture()
  rng = np.random.default_rng(3)
  normal = lambda: rng.normal(size=batch['weights'].shape).astype(np.float32)
  after = (
    np.pad(batch['weights'][:, :-1], ((0, 0), (1, 0))) * (batch['weights'].sum(1) > 0)[:, None]
  )
  states = np.maximum(batch['weights'], after)  # a state more for each answer
  batch = batch | {
    'values': normal() * states, 'returns': normal() * states, 'value_weights': states
  }  # fmt: skip
  network = {'model': rng.normal(size=hidden.shape).astype(np.float32),
             'head': {'w_score': normal()[0, :5], 'b_score': np.float32(0.1)}}  # fmt: skip
  return hidden, head, network, batch


def loss(cfg, hidden, head, network, batch):
  """Return the objective's loss of given states, and its sums."""
  read = lambda params, _: Output(params['hidden'])
  forward = {
    'student': read,
    'value': lambda frozen, _: scalar.read(frozen['value']['head'], frozen['value']['model']),
  }
  objective = policy.policy(cfg, forward)
  sums = objective({'hidden': hidden, 'embedding': head}, {'value': network}, batch)
  return sums['loss'][0] / sums['loss'][1], sums


def transcribed(cfg, hidden, head, network, batch):
  """Return the loss and its gradients by torch, written after the release."""
  torch = pytest.importorskip('torch')
  leaves = (hidden, head, network['model'], network['head']['w_score'])
  hidden, head, states, weight = (
    torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in leaves
  )
  b = {name: torch.tensor(x) for name, x in batch.items()}
  logp = torch.log_softmax(hidden @ head.T, -1).gather(-1, b['targets'].long()[..., None])[..., 0]
  ratio = torch.exp(logp - b['old'])
  losses = torch.max(-b['advantages'] * ratio, -b['advantages'] * torch.clamp(ratio, 0.8, 1.2))
  mask = b['weights'] > 0
  values = states @ weight + 0.1
  clipped = torch.clamp(values, b['values'] - 0.2, b['values'] + 0.2)
  errors = torch.max(torch.square(values - b['returns']), torch.square(clipped - b['returns']))
  states_mask = b['value_weights'] > 0
  per_state = states_mask.sum() if cfg.normalise == 'microbatches' else mask.sum()
  total = losses[mask].sum() / mask.sum() + 0.1 * 0.5 * errors[states_mask].sum() / per_state
  total.backward()
  return float(total.detach()), [x.grad.numpy() for x in (hidden, head, states, weight)]


@pytest.mark.parametrize('name', ppo.PRESETS)
def test_loss_and_gradients_are_those_of_a_transcription(name):
  cfg = preset(name)
  hidden, head, network, batch = value_fixture()
  value = lambda *weights: loss(cfg, *weights, batch)
  run = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
  (found, sums), gradients = run(hidden, head, network)
  want, expected = transcribed(cfg, hidden, head, network, batch)
  assert float(found) == pytest.approx(want, rel=1e-5)
  found = [*gradients[:2], gradients[2]['model'], gradients[2]['head']['w_score']]
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert np.abs(b).max() > 1e-4
  assert float(sums['value_loss'][1]) == batch['value_weights'].sum() == 23
  assert 'kl' not in sums  # it is in the rewards


def test_a_mean_over_microbatches_is_not_that_over_tokens():
  hidden, head, network, batch = value_fixture()
  cut = lambda tree, part: jax.tree.map(lambda x: x[part] if np.ndim(x) > 1 else x, tree)

  def halves(cfg):
    total = [0.0, 0.0]
    for part in (slice(0, 2), slice(2, 6)):
      _, sums = loss(cfg, hidden[part], head, cut(network, part), cut(batch, part))
      total = [a + b for a, b in zip(total, sums['loss'], strict=True)]
    return float(total[0] / total[1])

  whole = {name: float(loss(preset(name), hidden, head, network, batch)[0]) for name in ppo.PRESETS}
  assert halves(preset('standard')) == pytest.approx(whole['standard'], rel=1e-5)
  assert abs(halves(preset('tulu3')) - whole['tulu3']) > 1e-3


def config_of(start, name='standard', **changes):
  """Return a run of four steps on eight prompts with one answer each."""
  c = ppo.get_config(name)
  c.init, c.data.path = start
  c.steps, c.tensorboard, c.log_every = 4, False, 1
  c.data.batch_size = 8
  c.schedule.update(peak=3e-3, warmup=1)
  c.eval.update(every=0, max_rows=8, batch_size=8)
  c.checkpoint.every = 2
  c.objective.update(chunk=64, epochs=2, max_tokens=6, whiten=4 if name == 'tulu3' else 0)
  c.update_from_flattened_dict(changes)
  return c.to_dict()


@pytest.fixture(scope='module')
def reward_run(start, tmp_path_factory):
  """Write a reward model of other weights than the policy's start."""
  path = tmp_path_factory.mktemp('value') / 'reward'
  loaded = load.load(start[0], test_policy.MAKE_MESH({'data': 1}, jax.devices()[:1]))
  cfg = dataclasses.replace(loaded.cfg, objective=RewardConfig())
  config.write_run(path, cfg)
  params = jax.tree.map(lambda x: x * 1.01, loaded.params())
  head = scalar.draw_head(jax.random.key(3), cfg.model.embed) | {'b_score': jnp.asarray(0.5)}
  with checkpoint.Checkpoints(path / 'checkpoints', keep=1) as saved:
    saved.save(0, params, beside={scalar.HEAD: head})
  files.write_json(path / 'result.json', {'steps': 0})
  return path


def given(start, reward_run, **changes):
  """Return a run of the settings that differ most: two microbatches, whitened by four answers."""
  value = {'objective.value': str(reward_run), 'objective.normalise': 'tokens'}
  return config_of(start, 'tulu3', **{**value, 'data.accum': 2, **changes})


@pytest.fixture(scope='module')
def whole(start, reward_run, tmp_path_factory):
  """Train four steps; return the run and the value network at its first draw."""
  path, first, made = tmp_path_factory.mktemp('whole') / 'run', [], answers.make_rewrite

  def recording(*args):
    rewrite = made(*args)

    def recorded(theta, frozen, *rest):
      first.append(jax.tree.map(np.array, frozen[critic.VALUE]))
      return rewrite(theta, frozen, *rest)

    return recorded

  with pytest.MonkeyPatch.context() as patch:
    test_policy.on(patch, {'data': 1})
    patch.setattr(answers, 'make_rewrite', recording)
    loop.train(given(start, reward_run), path, reward=begins)
  return path, first[0]


def beside_of(run):
  """Return the value network in a run's checkpoint."""
  mesh = sharding.make_mesh()
  loaded = load.load(run, mesh)
  return load.beside(loaded, critic.shapes(loaded.model, mesh), mesh)[critic.VALUE]


def test_the_value_network_starts_from_the_reward_model(start, reward_run, whole):
  mesh, (path, first) = sharding.make_mesh(), whole
  params, head = scalar.load_run(load.load(reward_run, mesh), mesh)
  jax.tree.map(np.testing.assert_array_equal, first, {'model': params, 'head': head})
  run, init = load.load(path, mesh), load.load(start[0], mesh).params()
  assert jax.tree.structure(run.params()) == jax.tree.structure(init)  # what is served
  assert run.cfg.source_steps == {'init': 0, 'objective.value': 0}
  ledger = files.read_json(path / 'ledger.json')
  assert ledger['ancestors'] == [str(start[0]), str(reward_run)]

  objective = dataclasses.replace(run.cfg.objective, value='')
  cfg = dataclasses.replace(run.cfg, objective=objective)
  fresh = critic.start(cfg, run.model, mesh)[critic.VALUE]
  jax.tree.map(np.testing.assert_array_equal, fresh['model'], init)
  assert np.any(fresh['head']['w_score']) and fresh['head']['b_score'] == 0
  with pytest.raises(ValueError, match='objective.value: with advantage=.gae. expected'):
    critic.start(dataclasses.replace(cfg, init=''), run.model, mesh)
  objective = dataclasses.replace(objective, value=start[0])
  with pytest.raises(ValueError, match='expected a reward model, of configs/reward.py, found'):
    critic.start(dataclasses.replace(cfg, objective=objective), run.model, mesh)


def test_a_stopped_run_continues_bitwise_with_its_values(
  start, reward_run, whole, tmp_path, monkeypatch
):
  c = given(start, reward_run)
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'StopSignal', Stop)
    with pytest.raises(console.Interrupted):
      loop.train(c, tmp_path / 'halves', reward=begins)
  loop.train(c, tmp_path / 'halves', reward=begins)
  lines = [metrics(path) for path in (whole[0], tmp_path / 'halves')]
  for a, b in zip(*lines, strict=True):
    same = [key for key in a if not any(word in key for word in ('second', 'bytes'))]
    assert {key: a[key] for key in same} == {key: b[key] for key in same}
  told = 'reward answer_tokens ended clipped entropy kl returns value_loss explained_variance'
  assert {*told.split()} <= lines[0][0].keys() and 'no_variance' not in lines[0][0]
  assert abs(lines[0][0]['kl']) < 1e-5 < lines[0][-1]['kl']
  networks = [beside_of(path) for path in (whole[0], tmp_path / 'halves')]
  jax.tree.map(np.testing.assert_array_equal, *networks)
  assert not np.allclose(networks[0]['model']['embedding'], whole[1]['model']['embedding'])


def test_devices_and_microbatches_do_not_change_a_step(
  start, reward_run, whole, tmp_path, monkeypatch
):
  test_policy.on(monkeypatch, {'data': 2, 'fsdp': 2})
  loop.train(given(start, reward_run, **{'data.accum': 1}), tmp_path / 'run', reward=begins)
  one, four = metrics(whole[0])[0], metrics(tmp_path / 'run')[0]
  for key in ('loss', 'grad_norm', 'reward', 'value_loss', 'explained_variance', 'returns'):
    assert one[key] == pytest.approx(four[key], rel=1e-4, abs=1e-6), key


def test_a_plan_counts_the_value_network(start, reward_run):
  cfg = config.resolve(given(start, reward_run))
  step = program.outline(cfg, sharding.make_mesh())
  width, model = cfg.context + 6, step.model.cfg
  want = 8 * width * (7 * forward_flops(model, width) + 7 * hidden_flops(model, width))
  assert step.flops == pytest.approx(want)
  held = program.memory(step.kinds)
  weights = sum(x.size for x in jax.tree.leaves(step.state.theta))
  beside = weights + model.embed + 1
  assert held['weights trained beside'] == 4 * beside
  assert held['optimiser moments'] == pytest.approx(8 * (weights + beside), rel=1e-3)
  assert held['frozen weights'] == 4 * weights
  assert {*step.batch} == {*answers._LEAVES, *answers._OF_VALUES}
  step.trace()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'samples': 0}, 'expected samples >= 1'),
    ({'keep': 4}, "objective.keep=4: expected 0 with advantage='gae'"),
    ({'lam': 1.5}, 'expected gamma and lam in 0..1'),
    ({'advantage': 'std', 'samples': 2, 'value': 'RUN'}, "value=RUN: expected advantage='gae'"),
  ],
)
def test_keys_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    preset('standard', **changes)


def test_answers_that_are_not_whitened_whole_and_unknown_presets_are_refused(start):
  c = config.resolve(config_of(start, **{'objective.whiten': 3}))
  with pytest.raises(ValueError, match='objective.whiten=3: expected a divisor of the 8 answers'):
    program.outline(c, sharding.make_mesh())
  with pytest.raises(ValueError, match='configs/ppo.py: expected one of standard, tulu3'):
    ppo.get_config('ppo2')
