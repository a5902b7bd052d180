"""Objectives compared with optax and torch, and chunked losses with full logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.spatial

from slm import objectives
from slm.models.decoder import Output, logits
from slm.objectives import distill, losses
from slm.runs.config import section
from slm.weights import sharding

EMBED, VOCAB = 8, 31
CE = {'name': 'next_token'}
KD = {'name': 'distill', 'temperature': 2.0, 'mixing': 0.7, 'kl': 'forward'}


def forward(params, batch):
  """Stand in for a decoder: a table look-up, then a nonlinearity."""
  return Output(jnp.tanh(jnp.take(params['embedding'], batch['inputs'], axis=0)), None)


def make_params(seed, groups=()):
  draw = lambda i, *s: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), s)
  return {'embedding': draw(0, *groups, VOCAB, EMBED), 'lm_head': draw(1, *groups, VOCAB, EMBED)}


def make_batch(*shape):
  rng = np.random.default_rng(3)
  ids = lambda: rng.integers(0, VOCAB, shape).astype(np.int32)
  weights = (rng.random(shape) < 0.8).astype(np.float32)
  return {'inputs': ids(), 'targets': ids(), 'weights': weights}


BATCH = make_batch(1, 1)


def build(cfg, chunk):
  return objectives.build(
    section('objective', {**cfg, 'chunk': chunk}), {'student': forward, 'teacher': forward}
  )


def full(cfg, params, teacher, batch):
  """Return the objective's loss from full logits and library losses."""
  logits = lambda p: forward(p, batch).hidden @ p['lm_head'].T
  ours, theirs = logits(params), logits(teacher)
  loss = optax.softmax_cross_entropy_with_integer_labels(ours, batch['targets'])
  if cfg['name'] == 'distill':
    t, m = cfg['temperature'], cfg['mixing']
    log_p, log_q = jax.nn.log_softmax(theirs / t), jax.nn.log_softmax(ours / t)
    if cfg['kl'] == 'reverse':
      log_p, log_q = log_q, log_p
    kl = optax.losses.kl_divergence_with_log_targets(log_q, log_p)
    loss = (1 - m) * loss + m * t * t * kl
  return jnp.sum(loss * batch['weights'])


def logit_pair():
  keys = jax.random.split(jax.random.key(0))
  return tuple(4 * jax.random.normal(k, (5, 7, VOCAB)) for k in keys)


def test_cross_entropy_equals_optax_and_torch():
  logits, _ = logit_pair()
  targets = make_batch(5, 7)['targets']
  ours = losses.cross_entropy(logits, targets)
  theirs = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  torch = pytest.importorskip('torch')
  theirs = torch.nn.functional.cross_entropy(
    torch.tensor(np.asarray(logits)).reshape(-1, VOCAB),
    torch.tensor(targets).reshape(-1).long(),
    reduction='none',
  )
  np.testing.assert_allclose(ours.reshape(-1), theirs.numpy(), atol=1e-5)


def test_cross_entropy_is_float32_and_finite_for_extreme_logits():
  logits = jnp.array([[1e4, 0.0, -1e4]], jnp.bfloat16)
  nll = losses.cross_entropy(logits, jnp.array([2]))
  assert nll.dtype == jnp.float32
  assert np.isfinite(nll).all()


def test_divergences_equal_optax_and_torch():
  teacher, student = logit_pair()
  log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
  kl = optax.losses.kl_divergence_with_log_targets
  np.testing.assert_allclose(losses.forward_kl(teacher, student), kl(log_q, log_p), atol=1e-4)
  np.testing.assert_allclose(losses.reverse_kl(teacher, student), kl(log_p, log_q), atol=1e-4)
  torch = pytest.importorskip('torch')
  p, q = (torch.tensor(np.asarray(x)) for x in (log_p, log_q))
  theirs = torch.nn.functional.kl_div(q, p, reduction='none', log_target=True).sum(-1)
  np.testing.assert_allclose(losses.forward_kl(teacher, student), theirs, atol=1e-4)


def test_the_gradient_of_the_kl_is_that_of_its_definition():
  """The hand-written gradient to the teacher's and the student's logits is right."""
  with jax.enable_x64(True):
    pair = 3 * jax.random.normal(jax.random.key(0), (2, 4, 11), jnp.float64)

    def definition(teacher, student):
      p, q = (jax.nn.softmax(x, axis=-1) for x in (teacher, student))
      return jnp.sum(p * jnp.log(p / q), axis=-1)

    weighted = lambda kl: lambda *x: jnp.sum(kl(*x) * jnp.arange(1.0, 5))
    for a, b in zip(
      *(jax.grad(weighted(kl), (0, 1))(*pair) for kl in (losses.forward_kl, definition)),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('chunk', [4, 8, 21, 64])  # 21 tokens: a rest, a rest, exact, too large
@pytest.mark.parametrize('cfg', [CE, KD, {**KD, 'kl': 'reverse'}], ids=['ce', 'kd', 'reverse'])
def test_chunks_give_the_value_and_gradient_of_full_logits(cfg, chunk):
  params, teacher, batch = make_params(0), make_params(1), make_batch(3, 7)
  objective = build(cfg, chunk)
  loss = lambda p: objective(p, {'teacher': teacher}, batch)['loss'][0]
  ours = jax.jit(jax.value_and_grad(loss))(params)
  theirs = jax.jit(jax.value_and_grad(lambda p: full(cfg, p, teacher, batch)))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)
  value, weight = jax.jit(objective)(params, {'teacher': teacher}, batch)['loss']
  np.testing.assert_allclose(value, theirs[0], rtol=1e-5)  # the undifferentiated form
  assert weight == batch['weights'].sum()


@pytest.mark.parametrize('chunk', [4, 8, 21, 64])
@pytest.mark.parametrize('cap', [0.0, 3.0])
def test_token_logprobs_are_those_of_full_logits(chunk, cap):
  """Value and gradients of a loss of whole sequences, such as DPO."""
  params, batch = make_params(0), make_batch(3, 7)

  def loss(params, logprobs):
    return jnp.sum(jax.nn.log_sigmoid(logprobs(params, forward(params, batch).hidden).sum(-1)))

  def whole(params, hidden):
    scores = logits(params['lm_head'], hidden, cap)
    return -optax.softmax_cross_entropy_with_integer_labels(scores, batch['targets'])

  pieces = lambda p, hidden: losses.token_logprobs(
    p['lm_head'], hidden, batch['targets'], cap, chunk
  )
  hidden = forward(params, batch).hidden
  np.testing.assert_allclose(pieces(params, hidden), whole(params, hidden), rtol=1e-5, atol=1e-5)
  grads = (jax.jit(jax.grad(loss), static_argnums=1)(params, f) for f in (pieces, whole))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)


def along_tokens(weight, hidden, targets, logprobs):
  """Return the log-probabilities of targets, and the gradients of a loss of whole rows."""

  def loss(weight, hidden):
    values = logprobs(weight, hidden, targets)
    return jnp.sum(jax.nn.log_sigmoid(values.sum(-1) / 5)), values

  gradients, values = jax.grad(loss, (0, 1), has_aux=True)(weight, hidden)
  return values, *gradients


def of_full_logits(weight, hidden, targets):
  return -losses.cross_entropy(logits(weight, hidden, 5.0) / 0.7, targets)


def of_chunks(weight, hidden, targets):
  return losses.token_logprobs(weight, hidden, targets, 5.0, 8, 0.7)


def head_and_tokens(dtype, *groups: int):
  keys = jax.random.split(jax.random.key(0), 3)
  weight = jax.random.normal(keys[0], (48, 16), dtype)
  hidden = jax.random.normal(keys[1], (*groups, 8, 13, 16), dtype)
  return weight, hidden, jax.random.randint(keys[2], hidden.shape[:-1], 0, 48)


@pytest.mark.parametrize(
  ('axes', 'dtype', 'atol'),
  [
    ({'data': 1}, 'float32', 1e-6),
    ({'data': 2, 'fsdp': 4}, 'float32', 1e-6),
    ({'fsdp': 2, 'expert': 2, 'tensor': 2}, 'float32', 1e-6),
    ({'data': 2, 'fsdp': 4}, 'bfloat16', 1e-2),
  ],
)
def test_token_logprobs_are_the_same_on_every_mesh(axes, dtype, atol):
  args = head_and_tokens(dtype)
  expected = along_tokens(
    *(x.astype('float32') if x.ndim == 3 else x for x in args), of_full_logits
  )
  mesh = sharding.make_mesh(axes, jax.devices()[: math.prod(axes.values())])
  rows = sharding.batch_sharding(mesh)
  places = sharding.shardings({'lm_head': args[0]}, mesh)['lm_head'], rows, rows
  with jax.set_mesh(mesh):
    found = jax.jit(along_tokens, static_argnums=3)(*map(jax.device_put, args, places), of_chunks)
  for a, b in zip(found, expected, strict=True):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=atol * np.abs(b).max())


def test_token_logprobs_of_groups_that_are_split_over_a_mesh():
  """Rows inside a group are not split again, nor are they in the backward pass."""
  args = head_and_tokens('float32', 4)
  weight = jnp.stack([args[0] * scale for scale in (0.5, 1.0, 1.5, 2.0)])
  mapped = lambda fn: lambda *x: sharding.vmap_groups(fn, 0)(*x)
  expected = along_tokens(weight, *args[1:], mapped(of_full_logits))
  with jax.set_mesh(sharding.make_mesh({'data': 2, 'fsdp': 2}, jax.devices()[:4])):
    found = jax.jit(lambda *x: along_tokens(*x, mapped(of_chunks)))(weight, *args[1:])
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_token_logprobs_hold_no_full_logits():
  b, t, v, d = 2, 512, 8192, 8
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((v, d), (b, t, d))]
  targets = jax.ShapeDtypeStruct((b, t), jnp.int32)
  loss = lambda w, h, y: losses.token_logprobs(w, h, y, chunk=64).sum()
  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, targets).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < b * t * v * 4 / 3


@pytest.mark.parametrize('shared', ['nothing', 'head', 'everything'])
@pytest.mark.parametrize('cfg', [CE, KD], ids=['ce', 'kd'])
def test_chunks_under_a_map_over_groups(cfg, shared):
  params, teacher, batch = make_params(0, (4,)), make_params(1), make_batch(4, 3, 7)
  axes = {'embedding': 0, 'lm_head': 0}
  for name in {'nothing': (), 'head': ('lm_head',), 'everything': axes}[shared]:
    axes[name], params[name] = None, params[name][0]
  objective = build(cfg, 8)
  frozen = {'teacher': teacher}

  def mapped(fn):
    return lambda p: jax.vmap(fn, in_axes=(axes, 0))(p, batch).sum()

  ours = mapped(lambda p, b: objective(p, frozen, b)['loss'][0])
  theirs = mapped(lambda p, b: full(cfg, p, teacher, b))
  ours, theirs = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, theirs))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_tokens_of_weight_zero_do_not_matter():
  params, batch = make_params(0), make_batch(3, 7)
  objective = build(CE, 8)
  other = dict(batch)
  other['targets'] = np.where(batch['weights'] > 0, batch['targets'], 0)
  loss = jax.value_and_grad(lambda p, b: objective(p, {}, b)['loss'][0])
  jax.tree.map(np.testing.assert_array_equal, loss(params, batch), loss(params, other))
  nothing = dict(batch, weights=np.zeros_like(batch['weights']))
  value, gradient = loss(params, nothing)
  assert value == 0
  assert all((g == 0).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize('kl', list(distill.KL))
def test_distilling_from_an_identical_teacher_changes_nothing(kl):
  params, batch = make_params(0), make_batch(3, 7)
  objective = build({**KD, 'mixing': 1.0, 'kl': kl}, 8)
  loss = lambda p: objective(p, {'teacher': params}, batch)['loss'][0]
  value, gradient = jax.value_and_grad(loss)(params)
  assert value == pytest.approx(0, abs=1e-5)
  assert objective(params, {'teacher': params}, batch)['kl'][0] == pytest.approx(0, abs=1e-5)
  assert max(np.abs(g).max() for g in jax.tree.leaves(gradient)) < 1e-5


def test_distillation_scales_its_divergence_by_the_squared_temperature():
  params, teacher, batch = make_params(0), {'teacher': make_params(1)}, make_batch(3, 7)
  for temperature in (1.0, 3.0):
    cfg = {**KD, 'mixing': 1.0, 'temperature': temperature}
    sums = build(cfg, 8)(params, teacher, batch)
    assert sums['loss'][0] == pytest.approx(temperature**2 * float(sums['kl'][0]), rel=1e-5)
  norm = lambda t: optax.global_norm(
    jax.grad(
      lambda p: build({**KD, 'mixing': 1.0, 'temperature': t}, 8)(p, teacher, batch)['loss'][0]
    )(params)
  )
  # The reason for the factor: the gradient tends to a limit instead of vanishing as 1 / T^2.
  assert norm(400.0) == pytest.approx(float(norm(200.0)), rel=0.05)


def test_distillation_without_mixing_is_the_next_token_loss():
  params, teacher, batch = make_params(0), {'teacher': make_params(1)}, make_batch(3, 7)
  sums = build({**KD, 'mixing': 0.0}, 8)(params, teacher, batch)
  assert sums['loss'][0] == pytest.approx(float(build(CE, 8)(params, {}, batch)['loss'][0]))
  assert sums['loss'][0] == pytest.approx(float(sums['nll'][0]))


def shapes(jaxpr):
  """Yield the shape of every value of a jaxpr and of those inside it."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.shape for v in eqn.outvars)
    for inner in jax.core.jaxprs_in_params(eqn.params):
      yield from shapes(inner)


@pytest.mark.parametrize('cfg', [CE, KD], ids=['ce', 'kd'])
def test_no_full_logits_exist(cfg):
  params, teacher, batch = make_params(0), {'teacher': make_params(1)}, make_batch(8, 16)
  loss = lambda p, chunk: build(cfg, chunk)(p, teacher, batch)['loss'][0]

  def logits(chunk):
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: loss(p, chunk)))(params).jaxpr
    return max(int(np.prod(s[:-1])) for s in shapes(jaxpr) if s and s[-1] == VOCAB)

  assert logits(16) == 16
  assert logits(128) == 128  # the walk does see them


def test_token_losses_are_those_of_the_objective():
  params, batch = make_params(0), make_batch(3, 7)
  nll = losses.token_losses(forward, params, batch, 8)
  assert nll.shape == (3, 7)
  assert nll.sum() == pytest.approx(float(build(CE, 8)(params, {}, batch)['loss'][0]), rel=1e-5)
  assert (np.asarray(nll)[batch['weights'] == 0] == 0).all()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'kl': 'sideways'}, 'sideways'),
    ({'temperature': 0.0}, 'temperature'),
    ({'mixing': 1.5}, 'mixing'),
    ({'name': 'wish'}, 'wish'),
  ],
)
def test_impossible_objectives_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    build({**KD, **changes}, 8)


def pair(seed=0, v=13):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(0, 2, (2, 5, v))), jnp.asarray(rng.normal(0, 2, (2, 5, v)))


def test_divergences_beside_scipy():
  teacher, student = pair()
  p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (teacher, student))
  jsd = scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2
  np.testing.assert_allclose(losses.jensen_shannon(teacher, student), jsd, rtol=1e-4)
  rows = zip(p.reshape(10, -1), q.reshape(10, -1), strict=True)
  both = [scipy.spatial.distance.cosine(a, b) for a, b in rows]
  np.testing.assert_allclose(losses.cosine(teacher, student).ravel(), both, rtol=1e-4)
  mse = np.square(np.asarray(teacher) - np.asarray(student)).mean(-1)
  np.testing.assert_allclose(losses.squared(teacher, student), mse, rtol=1e-5)


def test_the_tail_keeps_the_mass_outside_the_best():
  teacher, student = pair()
  whole = losses.forward_kl(teacher, student)
  for k in (12, 13):  # one token or none is left over: nothing is lost
    merged = losses.forward_kl(*losses.with_tail(teacher, student, k))
    np.testing.assert_allclose(merged, whole, rtol=1e-3, atol=1e-4)
  few = lambda s: losses.forward_kl(*losses.with_tail(teacher, s, 3)).sum()
  assert (losses.forward_kl(*losses.with_tail(teacher, student, 3)) <= whole + 1e-5).all()
  order = jnp.argsort(-teacher, axis=-1)
  outside = jnp.take_along_axis(jax.grad(few)(student), order[..., 3:], axis=-1)
  assert jnp.abs(outside).min() > 0  # renormalised over the three, it would be zero
  p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
  sums = [jnp.take_along_axis(x, order[..., 3:], axis=-1).sum(-1, keepdims=True) for x in (p, q)]
  rest = jnp.take_along_axis(q, order[..., 3:], axis=-1)
  np.testing.assert_allclose(outside, rest * (1 - sums[0] / sums[1]), atol=1e-5)


def test_vocabularies_padded_differently_are_compared_on_what_both_have():
  params, other, batch = make_params(0), make_params(1), make_batch(3, 7)
  padding = jnp.ones((3, EMBED))
  wider = {**other, 'lm_head': jnp.concatenate([other['lm_head'], padding])}
  values = [
    build({**KD, 'mixing': 1.0}, 8)(params, {'teacher': teacher}, batch)['kl'][0]
    for teacher in (other, wider)
  ]
  assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-5)


@pytest.mark.parametrize('top_k', [0, 4])
def test_what_a_student_gives_to_ids_that_the_teacher_lacks_is_lost(top_k):
  """The divergence equals that from a teacher with all ids and no mass on the extra ones."""
  params, other, batch = make_params(0), make_params(1), make_batch(3, 7)
  wide = {**params, 'lm_head': jnp.concatenate([params['lm_head'], 0.3 * jnp.ones((3, EMBED))])}
  kl = lambda p: build({**KD, 'mixing': 1.0, 'top_k': top_k}, 8)(p, {'teacher': other}, batch)
  value, slope = jax.value_and_grad(lambda p: kl(p)['kl'][0])(wide)
  t, weights = KD['temperature'], batch['weights']
  p = jax.nn.log_softmax(forward(other, batch).hidden @ other['lm_head'].T / t)
  q = jax.nn.log_softmax(forward(wide, batch).hidden @ wide['lm_head'].T / t)[..., : p.shape[-1]]
  if not top_k:
    want = float((jnp.sum(jnp.exp(p) * (p - q), -1) * weights).sum())
    assert float(value) == pytest.approx(want, rel=1e-5)
  assert float(value) > float(kl(params)['kl'][0])
  assert float(jnp.abs(jax.grad(lambda p: kl(p)['loss'][0])(wide)['lm_head'][-3:]).min()) > 0


def test_weighted_soft_labels_beside_torch():
  """Zhou et al. 2021: the weight of a token grows with the student's loss over the teacher's."""
  torch = pytest.importorskip('torch')
  params, teacher, batch = make_params(0), make_params(1), make_batch(3, 7)
  t = KD['temperature']
  made = lambda p: torch.tensor(np.asarray(forward(p, batch).hidden @ p['lm_head'].T))
  student = made(params).requires_grad_()
  targets, weights = torch.tensor(batch['targets']).long(), torch.tensor(batch['weights'])
  nll = lambda x: torch.nn.functional.cross_entropy(x.mT, targets, reduction='none')
  soft = lambda x: torch.log_softmax(x / t, -1)
  kl = torch.nn.functional.kl_div(
    soft(student), soft(made(teacher)), reduction='none', log_target=True
  ).sum(-1)
  scale = (1 - torch.exp(-nll(student) / nll(made(teacher)))).detach()
  want = (t * t * scale * kl * weights).sum()
  (slope,) = torch.autograd.grad(want, student)
  objective = build({**KD, 'mixing': 1.0, 'kl': 'wsl'}, 8)
  loss = lambda p: objective(p, {'teacher': teacher}, batch)['loss'][0]
  value, gradient = jax.value_and_grad(loss)(params)
  assert float(value) == pytest.approx(want.item(), rel=1e-5)
  hidden = np.asarray(forward(params, batch).hidden)
  expected = np.einsum('btv,btd->vd', slope.numpy(), hidden)
  np.testing.assert_allclose(gradient['lm_head'], expected, atol=1e-4)


@pytest.mark.parametrize('cfg', [CE, KD, {**KD, 'top_k': 50}], ids=['ce', 'kd', 'top_k'])
def test_memory_does_not_grow_with_tokens_times_vocabulary(cfg):
  """At a vocabulary of 131k, XLA's memory for logits does not grow with the tokens."""
  vocab, width = 131_072, 8

  def temporary(t):
    params = {name: jax.ShapeDtypeStruct((vocab, width), np.float32) for name in make_params(0)}
    batch = {name: jax.ShapeDtypeStruct((2, t), np.asarray(x).dtype) for name, x in BATCH.items()}
    objective = build(cfg, 128)
    loss = lambda p, teacher, batch: objective(p, {'teacher': teacher}, batch)['loss'][0]
    compiled = jax.jit(jax.grad(loss)).lower(params, params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporary(512), temporary(4096)
  hidden = 2 * 4 * 4 * width * 2 * (4096 - 512)  # of two models, four float32 copies of each
  assert long - short < hidden
  assert long < 4 * 2 * 512 * vocab  # less than the shorter rows' logits alone
