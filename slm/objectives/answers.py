"""Answers to prompts, drawn from the weights in training and scored, as batches to train on."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm import models, reparam
from slm.data import loader, tokenizer
from slm.models.decode import answer, drawn, generate, greedy
from slm.objectives import critic, losses, policy, reference
from slm.objectives.losses import Batch
from slm.objectives.setup import ROWS, Evaluator, Reward, Setup
from slm.runs import load, processes
from slm.runs.config import PolicyConfig, RunConfig
from slm.weights import sharding, tree
from slm.weights.axes import Params
from slm.weights.count import forward_flops, hidden_flops

Score = Callable[[int, list[int], list[str]], list[float]]  # (step, rows, texts) -> rewards
_LEAVES = {'inputs': np.int32, 'targets': np.int32, 'segments': np.int32, 'positions': np.int32,
           'weights': np.float32, 'old': np.float32, 'advantages': np.float32}  # fmt: skip
_OF_VALUES = dict.fromkeys(('returns', 'values', 'value_weights'), np.float32)
# What a key of draws is for, folded into that of the run.
_TRAIN, _HELD_OUT, _COIN, _SHUFFLE, _ORDER = 3, 4, 5, 6, 7


def setup(
  cfg: RunConfig,
  model: models.Model,
  rep: reparam.Reparam,
  mesh: jax.sharding.Mesh,
  reward: Reward | None,
) -> Setup:
  """Set up a run that is trained on answers, scored by `reward`.

  Raises:
    ValueError: if there is no reward, it does not know a label of a prompt, or keys do not fit.
  """
  if reward is None:
    raise ValueError(
      "objective 'policy': expected a reward of answers: python -m slm.train has one"
    )
  split = loader.Split(cfg.data.path, cfg.data.set, cfg.data.split, cfg.data.index)
  frozen, beside = {}, {}
  if cfg.objective.has_values:
    beside = critic.start(cfg, model, mesh)
  if cfg.objective.kl:
    if not cfg.init:
      raise ValueError(
        f'init: objective.kl={cfg.objective.kl} is from the weights of a run: name it with '
        '--config.init=RUN, or set objective.kl=0'
      )
    frozen = reference.weights(rep, load.source(cfg, 'init', mesh).params())
  tok = tokenizer.load(f'{cfg.data.path}/tokenizer')
  return dataclasses.replace(
    _shaped(cfg, model, rep, mesh),
    evaluators={'heldout': evaluator(cfg, model, tok, mesh, reward)},
    frozen=frozen,
    beside=beside,
    draw=make_draw(cfg, model, rep, tok, mesh),
    rewrite=make_rewrite(cfg, model, rep, tok, mesh, scorer(cfg, split, reward)),
    ahead=_rollout(cfg, mesh) if cfg.objective.stale else None,
  )


def outline(
  cfg: RunConfig, model: models.Model, rep: reparam.Reparam, mesh: jax.sharding.Mesh
) -> Setup:
  """Set up the training step of such a run with shapes for weights; it draws no answers."""
  frozen = reference.weights(rep, reference.shapes(model, mesh)) if cfg.objective.kl else {}
  beside = critic.shapes(critic.network(cfg, model), mesh) if cfg.objective.has_values else {}
  return dataclasses.replace(_shaped(cfg, model, rep, mesh), frozen=frozen, beside=beside)


def _shaped(cfg, model, rep, mesh) -> Setup:
  """Return what the shapes of a run decide: objective, batches and FLOPs."""
  o, d, devices = cfg.objective, cfg.data, sharding.batch_devices(mesh)
  if rep.clusters or d.mix_share:
    raise ValueError(
      "objective 'policy': expected one dense model and one set of prompts, found "
      f'reparam {cfg.reparam.name!r}, data.mix_share={d.mix_share}'
    )
  groups = o.keep or d.batch_size
  if groups > d.batch_size:
    raise ValueError(
      f'objective.keep={o.keep}: expected at most data.batch_size={d.batch_size} groups'
    )
  count, width = groups * o.samples, cfg.context + o.max_tokens
  if count % (o.minibatches * d.accum * devices):
    raise ValueError(
      f'objective.minibatches={o.minibatches}: expected the {count} answers of a step '
      f'(objective.samples={o.samples} to each of {groups} prompts) to be a multiple of '
      f'minibatches x data.accum x devices = {o.minibatches} x {d.accum} x {devices}'
    )
  if o.whiten and count % o.whiten:
    raise ValueError(
      f'objective.whiten={o.whiten}: expected a divisor of the {count} answers of a step, or 0 for '
      'all'
    )
  split = sharding.batch_sharding(mesh, axis=len(_lead(o, d.accum)))
  shape = (*_lead(o, d.accum), count // (o.minibatches * d.accum), 1, width)
  leaf = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=split)
  trained = count * width * _passes(cfg, model, width)
  usual = 3 * forward_flops(model.cfg, cfg.context)
  dtypes = _LEAVES | (_OF_VALUES if o.has_values else {})
  return Setup(
    {ROWS: policy.policy(o, _forward(cfg, model, rep))},
    {},
    flops=trained / (d.batch_size * cfg.context) - usual,
    ancestors=(o.value,) if o.value else (),
    leaves={name: leaf(dtype) for name, dtype in dtypes.items()},
  )


def _passes(cfg, model, width: int) -> float:
  """Count the FLOPs of a step for each token of its answers' rows."""
  o, pass_ = cfg.objective, forward_flops(model.cfg, width)
  corrected = bool(o.correction) * pass_
  if not o.has_values:
    return o.epochs * (3 + bool(o.kl)) * pass_ + corrected
  value = hidden_flops(critic.network(cfg, model).cfg, width)
  # The reference's and the values at the draw, once.
  return (3 * o.epochs + bool(o.kl)) * pass_ + (3 * o.epochs + 1) * value + corrected


def _forward(cfg, model, rep) -> dict[str, Callable]:
  """Return the forward passes of a run by name."""
  o = cfg.objective
  return {
    'student': reparam.map_groups(rep, model.forward),
    'reference': reference.logprobs(model, rep, o.chunk, o.temperature),
    'value': critic.values(critic.network(cfg, model)) if o.has_values else None,
  }


def scorer(cfg: RunConfig, split: loader.Split, reward: Reward) -> Score:
  """Return the reward that cfg.objective.reward names, for the prompts of a split.

  The coin of 'random' depends on (seed, step, row, sample) alone; 'shuffled' gives every prompt the
  label of another, the same at all steps.
  """
  labels = [entry['verifiers'] for entry in split.labels()]
  kind, seed = cfg.objective.reward, cfg.seed
  if kind == 'random':
    coin = lambda *at: float(np.random.default_rng([seed, _COIN, *at]).integers(2))
    samples = cfg.objective.samples
    return lambda step, rows, texts: [coin(step, r, i % samples) for i, r in enumerate(rows)]
  if kind == 'shuffled':  # moving all of a random order by one place leaves no label in its place
    order = np.random.default_rng([seed, _SHUFFLE]).permutation(len(labels))
    moved = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    labels = [labels[moved[i]] for i in range(len(labels))]
  grade = reward(labels)
  return lambda step, rows, texts: grade(rows, texts)


def keys(key: jax.Array, rows: jax.Array, samples: int) -> jax.Array:
  """Return the keys [n * samples] of the answers to prompts [n], by their row and number."""
  fold = jax.random.fold_in
  one = lambda row: jax.vmap(lambda i: fold(fold(key, row), i))(jnp.arange(samples))
  return jax.vmap(one)(rows).reshape(-1)


def draw(
  cfg: PolicyConfig, model: models.Model, tok: tokenizer.Tokenizer, params: Params, batch: Batch,
  key: jax.Array, samples: int, sampler: Callable | None = None,
) -> dict[str, jax.Array]:  # fmt: skip
  """Answer the prompts of a batch: inputs [n,t] padded on the right, `length` and `row` [n].

  Returns tokens and logprobs [n,samples,max_tokens], lengths and `ended` [n,samples], where the
  end token counts as part of an answer.
  """
  n, t = batch['inputs'].shape
  options = {
    'max_tokens': cfg.max_tokens, 'end': tok.ends, 'known': tok.known,
    'temperature': cfg.temperature,
    'sampler': sampler or functools.partial(drawn, temperature=cfg.temperature),
  }  # fmt: skip
  own = keys(key, batch['row'], samples)
  if cfg.slots:
    out = answer(model, params, batch['inputs'], batch['length'], own, slots=cfg.slots, **options)
  else:
    place = jnp.arange(t)[None] - (t - batch['length'][:, None])  # padding goes to the left
    ids = jnp.take_along_axis(batch['inputs'], jnp.maximum(place, 0), axis=1)
    repeat = lambda x: jnp.repeat(x, samples, axis=0)
    out = generate(model, params, repeat(ids), repeat(place >= 0), own, **options)
  last = jnp.take_along_axis(out.tokens, out.lengths[:, None] - 1, axis=1)[:, 0]
  ended = jnp.isin(last, jnp.array(sorted(tok.ends), jnp.int32))
  made = {**out._asdict(), 'ended': ended}
  return {name: x.reshape(n, samples, *x.shape[1:]) for name, x in made.items()}


def rows(batch: Batch, out: Batch) -> Batch:
  """Put every answer [n,g,m] behind its prompt [n,t]: leaves [n,g,t+m] of a training batch."""
  (n, t), m = batch['inputs'].shape, out['tokens'].shape[-1]
  start, stop = batch['length'][:, None, None], batch['length'][:, None] + out['lengths']
  index, stop = jnp.arange(t + m)[None, None], stop[..., None]
  answer = jnp.clip(index - start, 0, m - 1)
  at = lambda x, place: jnp.take_along_axis(x, jnp.broadcast_to(place, (*x.shape[:2], t + m)), 2)
  prompt = jnp.broadcast_to(batch['inputs'][:, None], (n, out['tokens'].shape[1], t))
  ids = jnp.where(index < start, at(prompt, jnp.minimum(index, t - 1)), at(out['tokens'], answer))
  real = index < stop
  ids = jnp.where(real, ids, 0)
  following = jnp.pad(ids[..., 1:], ((0, 0), (0, 0), (0, 1)))
  predicts = (index >= start - 1) & (index < stop - 1)
  return {
    'inputs': ids,
    'targets': following,
    'segments': real.astype(jnp.int32),
    'positions': jnp.where(real, index, 0),
    'weights': predicts.astype(jnp.float32),
    'old': jnp.where(predicts, placed(batch, out['logprobs']), 0.0),
  }


def placed(batch: Batch, x: jax.Array) -> jax.Array:
  """Put x [n,g,m] of answers' tokens where rows predict them: [n,g,t+m], 0 elsewhere."""
  t, m = batch['inputs'].shape[1], x.shape[2]
  index = jnp.arange(t + m)[None, None] - (batch['length'][:, None, None] - 1)
  index = jnp.broadcast_to(index, (*x.shape[:2], t + m))
  found = jnp.take_along_axis(x, jnp.clip(index, 0, m - 1), axis=2)
  return jnp.where((index >= 0) & (index < m), found, 0.0)


def taken(batch: Batch, x: jax.Array, m: int) -> jax.Array:
  """Take what rows [n,g,t+m] have where they predict the m tokens of answers: [n,g,m]."""
  index = batch['length'][:, None, None] - 1 + jnp.arange(m)[None, None]
  return jnp.take_along_axis(x, jnp.broadcast_to(index, (*x.shape[:2], m)), axis=2)


def final(cfg: PolicyConfig, rewards: jax.Array, ended: jax.Array) -> jax.Array:
  """Return the rewards of answers as they are trained on: scaled, those without an end replaced.

  NaN, where nothing could be decided, counts 0.
  """
  rewards = cfg.scale * jnp.where(jnp.isnan(rewards), 0.0, rewards)
  return rewards if cfg.score_unended else jnp.where(ended, rewards, cfg.unended)


def train_rows(
  cfg: PolicyConfig, batch: Batch, out: Batch, rewards: jax.Array,
  look: Callable[[Batch], tuple[jax.Array | None, jax.Array]] | None = None,
) -> tuple[Batch, dict[str, jax.Array]]:  # fmt: skip
  """Make the rows to train on, leaves [answers,t+m], and the metrics of all answers.

  `rewards` [n,g] are NaN where nothing could be decided, which counts 0. With cfg.keep, groups
  whose rewards are all the same are left out; where fewer than `keep` remain, others fill their
  places with weight 0.

  With a value network, `look` gives the reference's log-probabilities and the values at every
  position of such rows, leaves [n,g,t+m].
  """
  undecided = jnp.isnan(rewards)
  rewards = final(cfg, rewards, out['ended'])
  varies = jnp.any(rewards != rewards[:, :1], axis=1)
  made, told = rows(batch, out), {}
  if cfg.has_values:
    added, told = _credited(cfg, batch, out, rewards, *look(made))
    made |= added
  else:
    advantages = policy.group_advantage(rewards, cfg.advantage)[..., None]
    made['advantages'] = advantages * (made['weights'] > 0)
    trained = jnp.minimum(varies.sum(), cfg.keep) if cfg.keep else varies.sum()
    told = {'no_variance': jnp.mean(~varies), 'trained_groups': trained}
  if cfg.keep:
    chosen = jnp.argsort(~varies, stable=True)[: cfg.keep]
    made['weights'] *= varies[:, None, None]
    made = {name: x[chosen] for name, x in made.items()}
  mean = lambda x: jnp.mean(x.astype(jnp.float32))
  return {name: x.reshape(-1, x.shape[-1]) for name, x in made.items()}, {
    'reward': mean(rewards),
    'reward_std': jnp.std(rewards),
    'answer_tokens': mean(out['lengths']),
    'ended': mean(out['ended']),
    'undecided': mean(undecided),
    'rollout_tokens': out['lengths'].sum(),
    **told,
  }


def _credited(cfg, batch, out, rewards, ref, values) -> tuple[Batch, dict[str, jax.Array]]:
  """Return what `critic.credit` gives answers [n,g], at the places of their rows, and metrics."""
  shape = out['tokens'].shape
  flat = lambda x: x.reshape(shape[0] * shape[1], *x.shape[2:])
  of_answers = lambda x: None if x is None else flat(taken(batch, x, shape[2]))
  drawn = {name: flat(out[name]) for name in ('logprobs', 'lengths')}
  given, told = critic.credit(cfg, drawn, flat(rewards), of_answers(ref), of_answers(values))
  return {name: placed(batch, x.reshape(shape)) for name, x in given.items()}, told


def _lead(cfg: PolicyConfig, accum: int) -> tuple[int, ...]:
  """Return the axes that the rows of a batch come after: its updates, if several, and accum."""
  return (cfg.updates, accum) if cfg.updates > 1 else (accum,)


def shared(cfg: PolicyConfig, made: Batch, accum: int, key: jax.Array) -> Batch:
  """Share rows [answers,t] among the updates of a step: leaves [updates,accum,rows,1,t].

  Each epoch takes all rows, in an order of its own by `key`. One update has them as they are, and
  no axis for updates.
  """
  if cfg.updates > 1:
    order = lambda i: jax.random.permutation(jax.random.fold_in(key, i), len(made['inputs']))
    places = jax.vmap(order)(jnp.arange(cfg.epochs)).reshape(-1)
    made = {name: x[places] for name, x in made.items()}
  lead = _lead(cfg, accum)
  return {name: x.reshape(*lead, -1, 1, x.shape[-1]) for name, x in made.items()}


def corrected(cfg: PolicyConfig, made: Batch, logp: jax.Array) -> tuple[Batch, Batch]:
  """Correct rows [answers,t] for the weights that drew them, from log-probabilities by those now.

  Advantages get weights, see `policy.importance`, and `old` becomes `logp`. Returns metrics too.
  """
  trained = made['weights'] > 0
  weights = policy.importance(logp, made['old'], cfg.correction)
  made = made | {
    'old': jnp.where(trained, logp, 0.0),
    'advantages': made['advantages'] * jnp.where(trained, weights, 0.0),
  }
  mean = lambda x: jnp.sum(x * trained) / jnp.maximum(trained.sum(), 1)
  return made, {'importance': mean(weights), 'truncated': mean(weights >= cfg.correction)}


def texts(tok: tokenizer.Tokenizer, batch: Mapping[str, Any], out: Mapping[str, Any]) -> list[str]:
  """Decode answers [n,g,m] to prompts [n,t], those of a prompt one after the other."""
  found = []
  for prompt, length, tokens, lengths in zip(
    batch['inputs'], batch['length'], out['tokens'], out['lengths'], strict=True
  ):
    context = prompt[:length].tolist()
    answers = zip(tokens.tolist(), lengths.tolist(), strict=True)
    found += [tok.continued(context, ids[:size]) for ids, size in answers]
  return found


def _look(cfg, model, rep) -> Callable[[Params, Batch], tuple[jax.Array | None, jax.Array]]:
  """Make f(frozen, rows [n,g,t+m]) -> the reference's log-probabilities and the values there."""
  o, forward = cfg.objective, _forward(cfg, model, rep)

  def look(frozen, made):
    frozen = tree.cast(frozen, jnp.dtype(cfg.dtype))
    reference = lambda rows: forward['reference'](frozen, rows) if o.kl else None
    both = lambda rows: (reference(rows), forward['value'](frozen, rows))
    # As many rows at a time as in a microbatch of the training step.
    count = o.minibatches * cfg.data.accum
    parts = {name: x.reshape(count, -1, x.shape[-1]) for name, x in made.items()}
    return jax.tree.map(lambda x: x.reshape(made['inputs'].shape), jax.lax.map(both, parts))

  return look


def _rollout(cfg: RunConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Return the shapes and layout of what `make_draw` draws for a step."""
  d, o, split = cfg.data, cfg.objective, sharding.batch_sharding(mesh, axis=1)
  leaf = lambda dtype, *shape: jax.ShapeDtypeStruct(
    (d.accum, d.batch_size // d.accum, *shape), dtype, sharding=split
  )
  each = (o.samples, o.max_tokens)
  return {
    'prompts': {'inputs': leaf(np.int32, 1, cfg.context), 'length': leaf(np.int32, 1, 1),
                'row': leaf(np.int32, 1)},
    'answers': {'tokens': leaf(np.int32, *each), 'logprobs': leaf(np.float32, *each),
                'lengths': leaf(np.int32, o.samples), 'ended': leaf(np.bool_, o.samples)},
    'policy_step': np.zeros((), np.int32),
  }  # fmt: skip


def make_draw(
  cfg: RunConfig, model: models.Model, rep: reparam.Reparam, tok: tokenizer.Tokenizer,
  mesh: jax.sharding.Mesh,
) -> Callable[..., dict[str, Any]]:  # fmt: skip
  """Make f(theta, frozen, batch [accum,groups,1,t], step, policy_step) -> answers to its prompts.

  They are drawn from theta itself, on all devices, and depend on theta and (seed, step, row) alone;
  `policy_step` only tells of which step theta is.
  """
  o, key = cfg.objective, jax.random.fold_in(jax.random.key(cfg.seed), _TRAIN)
  apart = lambda x: x.reshape(cfg.data.accum, -1, *x.shape[1:])

  @functools.partial(jax.jit, out_shardings=sharding.batch_sharding(mesh, axis=1))
  def respond(theta, frozen, batch, step):
    params = tree.cast(rep.materialize(theta, frozen, None), jnp.dtype(cfg.dtype))
    own = jax.random.fold_in(key, step)
    return jax.tree.map(apart, draw(o, model, tok, params, _flat(batch), own, o.samples))

  def draw_for(theta, frozen, batch, step, policy_step):
    prompts = {name: batch[name] for name in ('inputs', 'length', 'row')}
    answers = respond(theta, frozen, prompts, step)
    policy_step = np.asarray(policy_step, np.int32)
    return {'prompts': prompts, 'answers': answers, 'policy_step': policy_step}

  return draw_for


def make_rewrite(
  cfg: RunConfig, model: models.Model, rep: reparam.Reparam, tok: tokenizer.Tokenizer,
  mesh: jax.sharding.Mesh, score: Score,
) -> Callable[..., tuple[str, Batch, dict[str, Any]]]:  # fmt: skip
  """Make f(theta, frozen, what `make_draw` gives, step) -> (kind, batch, metrics).

  Each process scores the answers to its own rows.
  """
  o, accum = cfg.objective, cfg.data.accum
  by_rows = sharding.batch_sharding(mesh, axis=len(_lead(o, accum)))
  look = _look(cfg, model, rep)
  key = jax.random.fold_in(jax.random.key(cfg.seed), _ORDER)
  joined = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

  def logprobs(theta, frozen, made):  # as much at a time as a microbatch
    params = tree.cast(rep.materialize(theta, frozen, None), jnp.dtype(cfg.dtype))
    one = lambda rows: losses.target_logprobs(model.forward, params, rows, o.chunk, o.temperature)
    count = o.minibatches * accum
    parts = {name: x.reshape(count, -1, x.shape[-1]) for name, x in made.items()}
    return jax.lax.map(one, parts).reshape(made['targets'].shape)

  @functools.partial(jax.jit, out_shardings=(by_rows, None))
  def assemble(theta, frozen, prompts, out, rewards, step):
    see = functools.partial(look, frozen)
    made, metrics = train_rows(o, _flat(prompts), joined(out), joined(rewards), see)
    if o.correction:
      made, told = corrected(o, made, logprobs(theta, frozen, made))
      metrics |= told
    return shared(o, made, accum, jax.random.fold_in(key, step)), metrics

  def rewrite(theta, frozen, rollout, step):
    began = time.monotonic()
    prompts, out = rollout['prompts'], rollout['answers']
    here = processes.local_rows((prompts, out), axis=1)
    drawn_at = time.monotonic()
    rewards = scored(score, tok, step, *joined(here)).reshape(accum, -1, o.samples)
    rewards = processes.global_rows(rewards, mesh, axis=1)
    seconds = {'rollout_seconds': drawn_at - began, 'score_seconds': time.monotonic() - drawn_at}
    made, metrics = assemble(theta, frozen, prompts, out, rewards, step)
    speed = cfg.data.batch_size * o.samples / sum(seconds.values())
    measured = {**seconds, 'rollouts_per_second': speed, 'policy_step': rollout['policy_step']}
    return ROWS, made, metrics | {name: np.float32(x) for name, x in measured.items()}

  return rewrite


def _flat(batch: Batch) -> Batch:
  """Return inputs [n,t], length [n] and row [n] of prompts, whatever axes lead."""
  t = batch['inputs'].shape[-1]
  return {name: x.reshape((-1, t) if name == 'inputs' else -1) for name, x in batch.items()}


def scored(
  score: Score, tok: tokenizer.Tokenizer, step: int, batch: Mapping[str, np.ndarray],
  out: Mapping[str, np.ndarray],
) -> np.ndarray:  # fmt: skip
  """Return the rewards [n,g] of the answers to prompts, leaves [n,...]."""
  prompts = _flat(batch)
  shape = out['lengths'].shape
  numbers = np.repeat(prompts['row'], shape[1]).tolist()
  rewards = score(step, numbers, texts(tok, prompts, out))
  return np.asarray(rewards, np.float32).reshape(shape)


def evaluator(
  cfg: RunConfig, model: models.Model, tok: tokenizer.Tokenizer, mesh: jax.sharding.Mesh,
  reward: Reward,
) -> Evaluator:  # fmt: skip
  """Make the evaluator of a run in training: the rewards of answers to held-out prompts.

  The verifiers score one answer drawn as in training and one greedy one. The draws are the same at
  every evaluation. The loss is minus the mean reward of what was drawn.
  """
  e, o = cfg.eval, cfg.objective
  devices = sharding.batch_devices(mesh)
  size = -(-e.batch_size // devices) * devices
  index, count = processes.local_share(mesh)
  labels = loader.Split(cfg.data.path, e.set, e.split).labels()
  grade = reward([entry['verifiers'] for entry in labels])
  score = lambda step, rows, texts: grade([max(row, 0) for row in rows], texts)
  key = jax.random.fold_in(jax.random.key(cfg.seed), _HELD_OUT)
  split = sharding.batch_sharding(mesh)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  @functools.partial(jax.jit, out_shardings=split)
  def respond(params, batch):
    params = tree.cast(params, jnp.dtype(cfg.dtype))
    both = [draw(o, model, tok, params, _flat(batch), key, 1, how) for how in (None, greedy)]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *both)

  @functools.partial(jax.jit, out_shardings=replicated)
  def total(rewards, out, row):
    rewards = final(o, rewards, out['ended'])
    real = row >= 0
    tokens = out['lengths'].sum(1) * real
    return *(rewards * real[:, None]).sum(0), real.sum(), tokens.sum()

  def evaluate(specialist, _):
    params, sums = specialist(0), np.zeros(4)
    batches = loader.evaluation_batches(
      cfg.data.path, e.set, e.split, size, max_rows=e.max_rows, process_index=index,
      process_count=count,
    )  # fmt: skip
    for _, ids, batch in batches:
      row = ids.reshape(count, -1)[index].astype(np.int32)
      batch = {'inputs': batch['inputs'], 'length': batch['length'], 'row': row}
      placed = processes.global_rows(batch, mesh)
      out = respond(params, placed)
      rewards = scored(score, tok, 0, *processes.local_rows((batch, out)))
      rewards = processes.global_rows(rewards, mesh)
      sums += np.array(total(rewards, out, placed['row']), float)
    sampled, best = (sums[:2] / sums[2]).tolist()
    return {'loss': -sampled, 'reward': sampled, 'greedy_reward': best, 'tokens': int(sums[3])}

  return evaluate
