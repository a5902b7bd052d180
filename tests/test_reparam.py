"""Materialise: closed forms of the projected network, the mixture, what depends on what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm import models, objectives, reparam, sharding, train

MLP = ('w_gate', 'w_up', 'w_down')
MODEL = models.build(
  {
    'name': 'decoder', 'vocab': 23, 'embed': 12, 'num_layers': 2, 'num_heads': 2,
    'num_kv_heads': 1, 'head_dim': 4, 'mlp': 20,
  }
)  # fmt: skip
KEY = jax.random.key(0)


def project(k=3, h=4, m=5, leaves=MLP, shared_mix=True):
  cfg = {'name': 'project', 'clusters': k, 'capacity': h, 'code': m}
  return reparam.build({**cfg, 'leaves': leaves, 'shared_mix': shared_mix}, MODEL.init)


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
  rep = reparam.build({'name': 'full'}, MODEL.init)
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
  rep = reparam.build({**cfg, 'shared_mix': True, 'last_layers': 1}, MODEL.init)
  theta = rep.init(KEY)
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
      np.testing.assert_allclose(dense[1], want, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(grouped[name][:, i], dense, rtol=1e-6)
  with pytest.raises(ValueError, match='last_layers: expected 0 to 2, found 3'):
    reparam.build({**cfg, 'shared_mix': True, 'last_layers': 3}, MODEL.init).init(KEY)


def test_identity_codes_make_the_projected_leaves_a_mixture():
  """With h = k = m and E = M = I, cluster i's projected leaves are slice i (paper, 2.5)."""
  k = 3
  mixed = reparam.build({'name': 'mixture', 'clusters': k}, MODEL.init)
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
    project(k) if name == 'project' else reparam.build({'name': name, 'clusters': k}, MODEL.init)
  )
  theta, rows = rep.init(KEY), batch(groups=4)
  condition = jnp.array([2, 0, 2, 3]) if name == 'project' else jnp.arange(4)
  objective = objectives.next_token({'student': reparam.map_groups(rep, MODEL.forward)}, chunk=5)
  sums = train.make_sums(objective, rep, 'float32')
  got, weight = sums(theta, {}, {**rows, 'condition': condition})['loss']
  want = []
  for g in range(4):
    dense = rep.materialize(theta, {}, int(condition[g]))
    want.append(objective(dense, {}, jax.tree.map(lambda x, g=g: x[g], rows))['loss'])
  sums, tokens = zip(*want, strict=True)
  if rep.independent:  # every model has its own loss
    np.testing.assert_allclose(got, sums, rtol=1e-5)
    np.testing.assert_array_equal(weight, tokens)
  else:
    np.testing.assert_allclose(got, sum(sums), rtol=1e-5)
    assert weight == sum(tokens)


def test_clusters_not_in_the_batch_get_no_gradient():
  rep = project(k=4)
  objective = objectives.next_token({'student': reparam.map_groups(rep, MODEL.forward)}, chunk=5)
  sums = train.make_sums(objective, rep, 'float32')
  rows = {**batch(groups=2), 'condition': jnp.array([1, 3])}
  grads = jax.grad(lambda t: sums(t, {}, rows)['loss'][0].sum())(rep.init(KEY))
  moved = np.abs(np.asarray(grads['expert_code'])).sum(1) > 0
  assert moved.tolist() == [False, True, False, True]
  assert all(np.abs(g).sum() > 0 for g in jax.tree.leaves(grads['shared']['embedding']))


def test_initial_scale_of_a_projected_weight_is_a_dense_weights():
  big = models.build(
    {
      'name': 'decoder', 'vocab': 8, 'embed': 64, 'num_layers': 2, 'num_heads': 2,
      'num_kv_heads': 2, 'head_dim': 8, 'mlp': 96,
    }
  )  # fmt: skip
  cfg = {'name': 'project', 'clusters': 32, 'capacity': 16, 'code': 16, 'leaves': MLP}
  rep = reparam.build({**cfg, 'shared_mix': True}, big.init)
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
  for rep in (project(), reparam.build({'name': 'mixture', 'clusters': 3}, MODEL.init)):
    made = rep.materialize(rep.init(KEY), {}, 1)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(made) == shapes(MODEL.init(KEY))


def test_axes_cover_every_theta():
  for rep in (
    project(shared_mix=False),
    reparam.build({'name': 'mixture', 'clusters': 3}, MODEL.init),
  ):
    sharding.axes(rep.init(KEY))


def test_mixture_needs_every_cluster_in_a_batch():
  rep = reparam.build({'name': 'mixture', 'clusters': 3}, MODEL.init)
  with pytest.raises(ValueError, match='expected a group per expert'):
    rep.materialize(rep.init(KEY), {}, jnp.arange(2))


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match=r"reparam.leaves: .*'w_gat'"):
    project(leaves=('w_gat',)).init(KEY)
  with pytest.raises(ValueError, match="found 'projct'"):
    reparam.build({'name': 'projct'}, MODEL.init)


def test_expert_parallel_mixture_needs_no_communication():
  """With experts and their groups on the mesh, the forward pass holds no collective."""
  k = 8
  mesh = sharding.make_mesh({'expert': k})
  rep = reparam.build({'name': 'mixture', 'clusters': k}, MODEL.init)
  objective = objectives.next_token({'student': MODEL.forward}, chunk=6)
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(rep.init, KEY)
    theta = jax.jit(rep.init, out_shardings=sharding.shardings(shapes, mesh))(KEY)
    rows = {**batch(groups=k), 'condition': jnp.arange(k)}
    rows = jax.device_put(rows, sharding.batch_sharding(mesh))
    sums = train.make_sums(objective, rep, 'float32')
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
