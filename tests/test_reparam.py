"""Materialise: closed forms of the projected network, the mixture, what depends on what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm import models, reparam
from slm.objectives import next_token
from slm.runs.config import NextTokenConfig, section
from slm.training.step import make_sums
from slm.weights import sharding

MLP = ('w_gate', 'w_up', 'w_down')
MODEL = models.build(
  section('model', {
    'name': 'decoder', 'vocab': 23, 'embed': 12, 'num_layers': 2, 'num_heads': 2,
    'num_kv_heads': 1, 'head_dim': 4, 'mlp': 20,
  })
)  # fmt: skip
MODEL = dataclasses.replace(MODEL, init=jax.jit(MODEL.init))
KEY = jax.random.key(0)


def project(k=3, h=4, m=5, leaves=MLP, shared_mix=True):
  cfg = {'name': 'project', 'clusters': k, 'capacity': h, 'code': m}
  return jitted(section('reparam', {**cfg, 'leaves': leaves, 'shared_mix': shared_mix}))


def jitted(cfg):
  """Build a reparameterisation of MODEL that draws its theta in one program."""
  rep = reparam.build(cfg, MODEL.init)
  return dataclasses.replace(rep, init=jax.jit(rep.init))


def batch(rows=2, t=6, groups=0):
  shape = (groups, rows, t) if groups else (rows, t)
  ids = jax.random.randint(KEY, shape, 0, 23)
  positions = jnp.broadcast_to(jnp.arange(t), shape)
  ones = jnp.ones(shape, jnp.int32)
  return {
    'inputs': ids, 'targets': jnp.roll(ids, -1, -1), 'positions': positions, 'segments': ones,
    'weights': jnp.ones(shape),
  }  # fmt: skip


def test_full_is_the_identity():
  rep = reparam.build(section('reparam', {'name': 'full'}), MODEL.init)
  theta = rep.init(KEY)
  assert rep.materialize(theta, {}, None) is theta


@pytest.mark.parametrize('shared_mix', [True, False])
def test_projection_equals_the_papers_sum(shared_mix):
  """Section 2.5's equation as loops over clusters, layers, q and r."""
  k, h, m = 3, 4, 5
  theta = project(k, h, m, shared_mix=shared_mix).init(KEY)
  codes = np.asarray(theta['expert_code'])
  for i in range(k):
    params = project(k, h, m, shared_mix=shared_mix).materialize(theta, {}, i)
    for name in MLP:
      bases = np.asarray(theta['blocks']['mlp']['bases'][name])
      mixes = theta['blocks']['mix'] if shared_mix else theta['blocks'][name]['mix']
      for layer in range(2):
        want = sum(
          codes[i, q] * np.asarray(mixes)[layer, q, r] * bases[layer, r]
          for q in range(m)
          for r in range(h)
        )
        got = params['blocks']['mlp'][name][layer]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_last_layers_projects_those_alone():
  """The layers before keep one matrix for all clusters; the last ones follow the same sum."""
  k, h, m = 3, 4, 5
  cfg = {'name': 'project', 'clusters': k, 'capacity': h, 'code': m, 'leaves': MLP}
  rep = jitted(section('reparam', {**cfg, 'shared_mix': True, 'last_layers': 1}))
  with jax.enable_x64(True):  # in float32 the two orders of one sum differ by more than 1e-6
    theta = jax.tree.map(lambda x: x.astype(jnp.float64), rep.init(KEY))
    grouped = rep.materialize(theta, {}, jnp.arange(k))['blocks']['mlp']
    for name in MLP:
      shared = theta['shared']['blocks']['mlp'][name]
      basis = theta['blocks']['mlp']['bases'][name]
      assert (len(shared), len(basis)) == (1, 1)
      for i in range(k):
        dense = rep.materialize(theta, {}, i)['blocks']['mlp'][name]
        want = jnp.einsum(
          'q,qr,r...->...', theta['expert_code'][i], theta['blocks']['mix'][0], basis[0]
        )
        np.testing.assert_array_equal(dense[0], shared[0])
        np.testing.assert_allclose(dense[1], want, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(grouped[name][:, i], dense, rtol=1e-12)
  with pytest.raises(ValueError, match='last_layers: expected 0 to 2, found 3'):
    reparam.build(
      section('reparam', {**cfg, 'shared_mix': True, 'last_layers': 3}), MODEL.init
    ).init(KEY)


def test_identity_codes_make_the_projected_leaves_a_mixture():
  """With h = k = m and E = M = I, cluster i's projected leaves are slice i (paper, 2.5)."""
  k = 3
  mixed = jitted(section('reparam', {'name': 'mixture', 'clusters': k}))
  experts = mixed.init(KEY)
  rep = project(k, k, k)
  theta = rep.init(KEY)
  theta['expert_code'] = jnp.eye(k)
  theta['blocks']['mix'] = jnp.broadcast_to(jnp.eye(k), (2, k, k))
  for name in MLP:
    stack = experts['experts']['blocks']['mlp'][name]  # [experts, layers, ...]
    theta['blocks']['mlp']['bases'][name] = jnp.swapaxes(stack, 0, 1)
  for i in range(k):
    projected, expert = rep.materialize(theta, {}, i), mixed.materialize(experts, {}, i)
    for name in MLP:
      np.testing.assert_array_equal(projected['blocks']['mlp'][name], expert['blocks']['mlp'][name])


@pytest.mark.parametrize('name', ['mixture', 'project'])
def test_a_group_of_rows_sees_its_own_clusters_model(name):
  """The mapped forward pass equals each cluster's dense model on its own rows."""
  k = 4
  rep = (
    project(k) if name == 'project' else jitted(section('reparam', {'name': name, 'clusters': k}))
  )
  theta, rows = rep.init(KEY), batch(groups=4)
  condition = jnp.array([2, 0, 2, 3]) if name == 'project' else jnp.arange(4)
  objective = next_token.next_token(
    NextTokenConfig(chunk=5), {'student': reparam.map_groups(rep, MODEL.forward)}
  )
  sums = make_sums(objective, rep, 'float32')
  got, weight = jax.jit(sums)(theta, {}, {**rows, 'condition': condition})['loss']
  alone, want = jax.jit(objective), []
  for g in range(4):
    dense = rep.materialize(theta, {}, int(condition[g]))
    want.append(alone(dense, {}, jax.tree.map(lambda x, g=g: x[g], rows))['loss'])
  sums, tokens = zip(*want, strict=True)
  if rep.independent:  # every model has its own loss
    np.testing.assert_allclose(got, sums, rtol=1e-5)
    np.testing.assert_array_equal(weight, tokens)
  else:
    np.testing.assert_allclose(got, sum(sums), rtol=1e-5)
    assert weight == sum(tokens)


def test_clusters_not_in_the_batch_get_no_gradient():
  rep = project(k=4)
  objective = next_token.next_token(
    NextTokenConfig(chunk=5), {'student': reparam.map_groups(rep, MODEL.forward)}
  )
  sums = make_sums(objective, rep, 'float32')
  rows = {**batch(groups=2), 'condition': jnp.array([1, 3])}
  grads = jax.jit(jax.grad(lambda t: sums(t, {}, rows)['loss'][0].sum()))(rep.init(KEY))
  moved = np.abs(np.asarray(grads['expert_code'])).sum(1) > 0
  assert moved.tolist() == [False, True, False, True]
  assert all(np.abs(g).sum() > 0 for g in jax.tree.leaves(grads['shared']['embedding']))


def test_initial_scale_of_a_projected_weight_is_a_dense_weights():
  big = models.build(
    section('model', {
      'name': 'decoder', 'vocab': 8, 'embed': 64, 'num_layers': 2, 'num_heads': 2,
      'num_kv_heads': 2, 'head_dim': 8, 'mlp': 96,
    })
  )  # fmt: skip
  cfg = {'name': 'project', 'clusters': 32, 'capacity': 16, 'code': 16, 'leaves': MLP}
  rep = reparam.build(section('reparam', {**cfg, 'shared_mix': True}), big.init)
  theta, dense = jax.jit(rep.init)(KEY), big.init(KEY)
  params = rep.materialize(theta, {}, jnp.arange(32))
  for name in MLP:
    made = np.square(params['blocks']['mlp'][name]).mean()
    want = np.square(dense['blocks']['mlp'][name]).mean()
    np.testing.assert_allclose(made, want, rtol=0.25)  # 32 random clusters: 5 sigma


def test_parameter_count_is_the_papers_formula():
  k, h, m = 6, 4, 5
  theta, dense = project(k, h, m).init(KEY), MODEL.init(KEY)
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  mlp = count(dense['blocks']['mlp'])
  shared = count(dense) - mlp
  assert count(theta) == shared + h * mlp + 2 * m * h + k * m
  assert count(theta['shared']) == shared


def test_specialist_has_the_dense_models_structure():
  for rep in (
    project(),
    reparam.build(section('reparam', {'name': 'mixture', 'clusters': 3}), MODEL.init),
  ):
    made = rep.materialize(rep.init(KEY), {}, 1)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(made) == shapes(MODEL.init(KEY))


SECTIONS = {
  'full': {},
  'mixture': {'clusters': 3},
  'demix': {'clusters': 3, 'leaves': MLP},
  'project': {'clusters': 3, 'capacity': 4, 'code': 5, 'leaves': MLP, 'shared_mix': False},
  'soup': {'clusters': 3, 'experts': 4, 'leaves': MLP, 'router': 'linear', 'hidden': 0},
  'soup_mlp': {'clusters': 3, 'experts': 4, 'leaves': MLP, 'router': 'mlp', 'hidden': 6},
  'hyper': {'clusters': 3, 'code': 5, 'hidden': 6, 'rank': 2, 'leaves': (*MLP, 'wo')},
  'hyper_whole': {'clusters': 3, 'code': 5, 'hidden': 6, 'rank': 0, 'leaves': MLP},
  'lora': {'rank': 2, 'alpha': 4.0, 'leaves': (*MLP, 'wq', 'wo')},
  'mask': {'leaves': MLP, 'threshold': 0.1},
}


def build(name):
  return jitted(section('reparam', {'name': name.partition('_')[0], **SECTIONS[name]}))


def moved(theta):
  """Draw every leaf anew, so that what starts at zero counts too."""
  leaves, tree = jax.tree.flatten(theta)
  keys = jax.random.split(KEY, len(leaves))
  draw = lambda k, x: 0.3 * jax.random.normal(k, x.shape)
  return jax.tree.unflatten(tree, [draw(k, x) for k, x in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize('name', sorted(SECTIONS))
def test_axes_cover_every_theta(name):
  sharding.shardings(build(name).init(KEY), sharding.make_mesh({'data': 8}))


@pytest.mark.parametrize('name', [n for n in sorted(SECTIONS) if n not in ('full', 'mixture')])
def test_what_a_reparameterisation_adds_starts_at_the_dense_model_it_shares(name):
  rep, base = build(name), MODEL.init(KEY)
  theta = rep.init(jax.random.key(1))
  shared = base if rep.base else theta['shared']
  made = rep.materialize(theta, {'base': base}, 1 if rep.clusters else None)
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, base)
  if name in ('project', 'demix'):  # these have no shared weight to start from
    return
  for path, w in jax.tree_util.tree_leaves_with_path(made):
    want = shared
    for k in path:
      want = want[k.key]
    np.testing.assert_array_equal(w, want)


CLUSTERED = [n for n in sorted(SECTIONS) if 'clusters' in SECTIONS[n] and n != 'mixture']


@pytest.mark.parametrize('name', CLUSTERED)
def test_a_cluster_is_the_histogram_with_all_its_mass(name):
  """And groups of either kind hold what single conditions give."""
  rep = build(name)
  theta = moved(rep.init(KEY))
  ids = jnp.array([2, 0, 2, 1])
  by_id, by_histogram = rep.materialize(theta, {}, ids), rep.materialize(theta, {}, jnp.eye(3)[ids])
  single = [rep.materialize(theta, {}, int(i)) for i in ids]
  for path, w in jax.tree_util.tree_leaves_with_path(by_id):
    get = lambda tree, path=path: functools.reduce(lambda t, k: t[k.key], path, tree)
    np.testing.assert_allclose(get(by_histogram), w, rtol=1e-5, atol=1e-6)
    varies = path[-1].key in rep.varies
    stack = [get(s) for s in single]
    want = jnp.stack(stack, rep.group_axis) if varies else stack[0]
    np.testing.assert_allclose(w, want, rtol=1e-5, atol=1e-6)
    assert not varies or not np.allclose(stack[0], stack[1])


def test_a_histogram_averages_experts_and_codes():
  p = jnp.array([0.5, 0.2, 0.3])
  rep = build('mixture')
  theta = rep.init(KEY)
  got = rep.materialize(theta, {}, p)['blocks']['attn']['wq']
  want = sum(w * rep.materialize(theta, {}, i)['blocks']['attn']['wq'] for i, w in enumerate(p))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  rep = build('project')
  theta = rep.init(KEY)
  own = {**theta, 'expert_code': (p @ theta['expert_code'])[None]}
  got, want = rep.materialize(theta, {}, p), rep.materialize(own, {}, 0)
  np.testing.assert_allclose(
    got['blocks']['mlp']['w_up'], want['blocks']['mlp']['w_up'], rtol=1e-5, atol=1e-6
  )


def test_demix_is_a_projected_network_with_identities():
  k, rep = 3, build('demix')
  theta = rep.init(KEY)
  network = project(k, k, k)
  other = network.init(KEY)
  experts = theta['experts']['blocks']['mlp']
  other |= {'shared': theta['shared'], 'expert_code': jnp.eye(k)}
  other['blocks']['mix'] = jnp.broadcast_to(jnp.eye(k), (2, k, k))
  other['blocks']['mlp']['bases'] = {n: jnp.swapaxes(w, 0, 1) for n, w in experts.items()}
  for i in range(k):
    a, b = rep.materialize(theta, {}, i), network.materialize(other, {}, i)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_soup_is_a_shared_matrix_plus_weighted_bases():
  p = jnp.array([0.5, 0.2, 0.3])
  for name in ('soup', 'soup_mlp'):
    rep = build(name)
    theta = moved(rep.init(KEY))
    hidden = p
    if name == 'soup_mlp':
      hidden = jax.nn.gelu(p @ theta['router_in'] + theta['router_bias'])
    alpha = hidden @ theta['router_out']
    for leaf in MLP:
      bases = theta['blocks']['mlp']['bases'][leaf]
      want = theta['shared']['blocks']['mlp'][leaf] + jnp.einsum('r,lr...->l...', alpha, bases)
      got = rep.materialize(theta, {}, p)['blocks']['mlp'][leaf]
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_hypernetwork_emits_a_low_rank_change():
  rep = build('hyper')
  theta = moved(rep.init(KEY))
  z = jnp.tanh(theta['expert_code'][1] @ theta['hyper_in'] + theta['hyper_bias'])
  f = theta['blocks']['mlp']['bases']['w_up']
  for layer in range(2):
    a = jnp.einsum('r,rio->io', z, f['lora_a'][layer])
    b = jnp.einsum('r,rio->io', z, f['lora_b'][layer])
    want = theta['shared']['blocks']['mlp']['w_up'][layer] + a @ b
    got = rep.materialize(theta, {}, 1)['blocks']['mlp']['w_up'][layer]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_lora_adds_its_scaled_product_and_masks_switch_weights_off():
  base, rep = MODEL.init(KEY), build('lora')
  theta = moved(rep.init(KEY))
  made = rep.materialize(theta, {'base': base}, None)
  f = theta['blocks']['attn']['wo']  # two input axes, heads and head_dim
  change = jnp.einsum('lhcr,lrd->lhcd', f['lora_a'], f['lora_b'])
  want = base['blocks']['attn']['wo'] + 4.0 / 2 * change
  np.testing.assert_allclose(made['blocks']['attn']['wo'], want, rtol=1e-5, atol=1e-6)
  assert made['embedding'] is base['embedding']

  rep = build('mask')
  theta = moved(rep.init(KEY))
  frozen = {'base': base}
  made = rep.materialize(theta, frozen, None)['blocks']['mlp']['w_up']
  score, w = theta['blocks']['mlp']['w_up'], base['blocks']['mlp']['w_up']
  np.testing.assert_allclose(made, jnp.where(score > 0.1, w, 0.0), atol=1e-6)
  total = lambda t: rep.materialize(t, frozen, None)['blocks']['mlp']['w_up'].sum()
  grad = jax.grad(total)(theta)['blocks']['mlp']['w_up']
  np.testing.assert_allclose(grad, w, rtol=1e-6)  # as if the score itself multiplied


def test_code_tunes_one_vector_of_a_frozen_network():
  network = {'name': 'project', **SECTIONS['project']}
  base = reparam.build(section('reparam', network), MODEL.init)
  theta = base.init(KEY)
  p = [0.5, 0.2, 0.3]
  rep = reparam.build(
    section('reparam', {'name': 'code', 'of': network, 'histogram': p}), MODEL.init
  )
  delta = rep.init(KEY)
  assert jax.tree.map(jnp.shape, delta) == {'expert_code': (1, 5)}
  got = rep.materialize(delta, {'base': theta}, None)
  want = base.materialize(theta, {}, jnp.array(p))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
  with pytest.raises(ValueError, match='expected init to name'):
    reparam.build(section('reparam', {'name': 'code'}), MODEL.init)


def test_mixture_and_demix_start_from_a_dense_model():
  dense = MODEL.init(KEY)
  for name in ('mixture', 'demix', 'full'):
    rep = build(name)
    made = rep.materialize(rep.start(dense), {}, 2)
    jax.tree.map(np.testing.assert_array_equal, made, dense)


@pytest.mark.parametrize('name', CLUSTERED)
def test_counted_flops_of_forming_weights_are_xlas(name):
  rep, groups = build(name), 3
  theta = rep.init(KEY)
  form = jax.jit(lambda t, c: rep.materialize(t, {}, c))
  cost = form.lower(theta, jnp.arange(groups)).compile().cost_analysis()['flops']
  counted = reparam.materialize_flops(rep, theta, groups)
  # XLA also counts what is added to the shared weights, and the router.
  extra = 3 * groups * sum(w.size for w in jax.tree.leaves(MODEL.init(KEY)['blocks'])) + 2000
  assert counted <= cost <= counted + extra


def test_mixture_needs_every_cluster_in_a_batch():
  rep = reparam.build(section('reparam', {'name': 'mixture', 'clusters': 3}), MODEL.init)
  with pytest.raises(ValueError, match='expected a group per expert'):
    rep.materialize(rep.init(KEY), {}, jnp.arange(2))


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match=r"reparam.leaves: .*'w_gat'"):
    project(leaves=('w_gat',)).init(KEY)
  with pytest.raises(ValueError, match="found 'projct'"):
    reparam.build(section('reparam', {'name': 'projct'}), MODEL.init)


def test_expert_parallel_mixture_needs_no_communication():
  """With experts and their groups on the mesh, the forward pass holds no collective."""
  k = 8
  mesh = sharding.make_mesh({'expert': k})
  rep = reparam.build(section('reparam', {'name': 'mixture', 'clusters': k}), MODEL.init)
  objective = next_token.next_token(NextTokenConfig(chunk=6), {'student': MODEL.forward})
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(rep.init, KEY)
    theta = jax.jit(rep.init, out_shardings=sharding.shardings(shapes, mesh))(KEY)
    rows = {**batch(groups=k), 'condition': jnp.arange(k)}
    rows = jax.device_put(rows, sharding.batch_sharding(mesh))
    sums = make_sums(objective, rep, 'float32')
    text = jax.jit(lambda t, r: sums(t, {}, r)['loss'][0]).lower(theta, rows).compile().as_text()
    gradient = jax.jit(
      jax.grad(lambda t, r: sums(t, {}, r)['loss'][0].sum()),
      out_shardings=sharding.shardings(shapes, mesh),
    )
    backward = gradient.lower(theta, rows).compile().as_text()
  collectives = ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter')
  assert not [c for c in collectives if c in text]
  assert not [c for c in collectives if c in backward]


def test_each_device_forms_only_its_own_groups_weights():
  """A projected network's group axis lies on the mesh: 8 groups, one per device."""
  mesh = sharding.make_mesh({'data': 8})
  rep = project(k=8)
  with jax.set_mesh(mesh):
    theta = jax.jit(rep.init)(KEY)
    condition = jax.device_put(jnp.arange(8), sharding.batch_sharding(mesh))
    params = jax.jit(lambda t, c: rep.materialize(t, {}, c))(theta, condition)
  weight = params['blocks']['mlp']['w_up']
  assert weight.shape == (2, 8, 12, 20)
  assert weight.addressable_shards[0].data.shape == (2, 1, 12, 20)
