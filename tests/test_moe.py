"""Token-routed experts: two dispatches, the dense limit, transformers, the auxiliary losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm import models, objectives, reparam
from slm.models import decoder, moe
from slm.runs.config import section
from slm.weights import axes, count, sharding

SMALL = {
  'name': 'decoder', 'vocab': 37, 'embed': 16, 'num_layers': 2, 'num_heads': 2, 'num_kv_heads': 1,
  'head_dim': 8, 'mlp': 12, 'num_experts': 4, 'experts_per_token': 2,
}  # fmt: skip
KEY = jax.random.key(0)


def make(**changes):
  """Return a model, its pass and its weights as drawn, each compiled."""
  model, forward, params = _make(tuple(changes.items()))
  return model, forward, jax.tree.map(lambda w: w, params)


@functools.cache
def _make(changes):
  model = models.build(section('model', {**SMALL, **dict(changes)}))
  return model, jax.jit(model.forward), jax.jit(model.init)(KEY)


def batch(rows=8, t=10, padding=3):
  ids = np.asarray(jax.random.randint(KEY, (rows, t), 0, 37))
  real = np.broadcast_to(np.arange(t) < t - padding, (rows, t))
  return {
    'inputs': ids, 'targets': np.roll(ids, -1, 1), 'segments': real.astype(np.int32),
    'positions': np.broadcast_to(np.arange(t), (rows, t)), 'weights': real.astype(np.float32),
  }  # fmt: skip


def loss(model, **weights):
  cfg = {'name': 'next_token', 'chunk': 64, **weights}
  objective = objectives.build(section('objective', cfg), {'student': model.forward})
  return lambda params, rows: objective(params, {}, rows)


@pytest.mark.parametrize('devices', [1, 8])
def test_dispatches_agree_in_value_and_gradient(devices):
  mesh = sharding.make_mesh({'data': devices}, jax.devices()[:devices])
  rows = jax.device_put(batch(), sharding.batch_sharding(mesh))
  results = []
  for dispatch in moe.DISPATCH:
    model, _, params = make(shared_mlp=6, dispatch=dispatch)
    fn = lambda p, r, m=model: loss(m, balance=0.1, z=0.1)(p, r)['loss'][0]
    with jax.set_mesh(mesh):
      results.append(jax.jit(jax.value_and_grad(fn))(params, rows))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
  jax.tree.map(close, results[0], results[1])
  assert all(np.abs(g).sum() > 0 for g in jax.tree.leaves(results[0][1]))


def test_equal_experts_are_one_dense_mlp():
  _, forward, params = make()
  experts = params['blocks']['mlp'].pop('experts')
  first = {n: w[:, 0] for n, w in experts.items()}
  mlp = params['blocks']['mlp']
  same = {n: jnp.broadcast_to(w[:, None], experts[n].shape) for n, w in first.items()}
  routed = {**params, 'blocks': {**params['blocks'], 'mlp': {**mlp, 'experts': same}}}
  dense = {**params, 'blocks': {**params['blocks'], 'mlp': first}}
  plain = jax.jit(models.build(section('model', {**SMALL, 'num_experts': 0})).forward)
  got, want = forward(routed, batch()).hidden, plain(dense, batch()).hidden
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_routing_statistics_leave_out_padding_and_add_up():
  _, forward, params = make()
  rows = batch()
  routing = forward(params, rows).routing
  real = rows['segments'].sum(1)
  np.testing.assert_array_equal(routing['tokens'], np.stack([real, real], 1))
  np.testing.assert_allclose(routing['chosen'].sum(-1), 2 * routing['tokens'])
  np.testing.assert_allclose(routing['probability'].sum(-1), routing['tokens'], rtol=1e-5)
  halves = [{n: x[i : i + 4] for n, x in rows.items()} for i in (0, 4)]
  parts = [forward(params, h).routing for h in halves]
  joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  assert moe.balance(joined) == pytest.approx(float(moe.balance(routing)), rel=1e-5)


def test_balance_is_one_when_even_and_the_number_of_experts_at_worst():
  even = {'chosen': jnp.full((3, 1, 4), 5.0), 'probability': jnp.full((3, 1, 4), 2.5)}
  assert moe.balance(even) == pytest.approx(1.0)
  worst = jax.tree.map(lambda x: x * jnp.array([4.0, 0, 0, 0])[None, None], even)
  assert moe.balance(worst) == pytest.approx(4.0)


def test_auxiliary_losses_are_their_formulas_and_are_minimised():
  """On two layers: Fedus et al. eq. 4 and Zoph et al. eq. 5, from the routers' logits."""
  model, forward, params = make()
  rows = batch(rows=1, t=6, padding=0)
  seen = {}

  def logits_of(w_router):  # the layers' inputs, by a router that shows them
    mlp = {**params['blocks']['mlp'], 'w_router': w_router}
    return forward({**params, 'blocks': {**params['blocks'], 'mlp': mlp}}, rows).routing

  routing = logits_of(params['blocks']['mlp']['w_router'])
  share = np.asarray(routing['chosen'][0]) / 12  # [layers, experts], two of six tokens' choices
  mean = np.asarray(routing['probability'][0]) / 6
  balance = np.mean([4 * share[i] @ mean[i] for i in range(2)])
  assert moe.balance(routing) == pytest.approx(balance, rel=1e-5)

  def z_of(router):
    x = jax.random.normal(jax.random.key(5), (1, 6, 16))
    return moe.route(x, router, 2)[2]['z'], jnp.einsum('btd,de->bte', x, router)

  z, logits = z_of(jax.random.normal(KEY, (16, 4)))
  np.testing.assert_allclose(z, np.log(np.exp(logits).sum(-1)) ** 2, rtol=1e-5)
  sums = jax.jit(loss(model, balance=0.3, z=0.7))(params, rows)
  value = {name: float(total / weight) for name, (total, weight) in sums.items()}
  seen['z'] = float(routing['z'].sum() / routing['tokens'].sum())
  assert value['balance'] == pytest.approx(balance, rel=1e-5)
  assert value['router_z'] == pytest.approx(seen['z'], rel=1e-5)
  whole = value['nll'] + 0.3 * value['balance'] + 0.7 * value['router_z']
  assert value['loss'] == pytest.approx(whole, rel=1e-6) and value['loss'] > value['nll']
  each = jax.jit(loss(model, balance=1.0, z=1.0))
  gradient = lambda name: jax.jit(jax.grad(lambda p: each(p, rows)[name][0]))
  for name in ('balance', 'router_z'):
    g = gradient(name)(params)['blocks']['mlp']['w_router']
    step = jax.tree.map(lambda x: x, params)
    step['blocks']['mlp']['w_router'] = params['blocks']['mlp']['w_router'] - 1e-2 * g
    after = each(step, rows)[name][0]
    assert np.abs(g).max() > 0 and after < sums[name][0]


def test_what_remat_keeps_and_flops_count():
  """`dots` keeps each expert's two products; FLOPs are of the experts that were chosen."""
  rows = batch(rows=2, padding=0)
  kept = {}
  for remat in ('dots', 'full'):
    model = models.build(section('model', {**SMALL, 'remat': remat}))
    params = jax.eval_shape(model.init, KEY)
    run = lambda p, m=model: jax.vjp(lambda p: m.forward(p, rows).hidden, p)[1]
    kept[remat] = sum(x.size for x in jax.tree.leaves(jax.eval_shape(run, params)))
  c, tokens = model.cfg, 2 * rows['inputs'].size
  attention = c.head_dim * (c.num_heads + 2 * c.num_kv_heads) + c.embed
  assert kept['dots'] - kept['full'] == tokens * (attention + 2 * c.num_experts * c.mlp)
  dense = count.forward_flops(models.build(section('model', {**SMALL, 'num_experts': 0})).cfg, 10)
  expert, router = 2 * 3 * c.embed * c.mlp, 2 * c.embed * c.num_experts
  assert count.forward_flops(c, 10) == pytest.approx(dense + 2 * (expert + router))


@pytest.mark.parametrize('name', ['lora', 'demix', 'project', 'hyper', 'mask'])
def test_experts_are_not_reparameterised(name):
  from configs import demix, hyper, lora, mask, project

  config = {'lora': lora, 'demix': demix, 'project': project, 'hyper': hyper, 'mask': mask}[name]
  rep = reparam.build(
    section('reparam', config.get_config().reparam.to_dict()),
    models.build(section('model', SMALL)).init,
  )
  with pytest.raises(ValueError, match='are of token-routed experts'):
    rep.init(KEY)


def test_equals_mixtral():
  """Logits and the load-balance loss of transformers' Mixtral with our weights."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

  model, forward, params = make(num_layers=1, rope_theta=1e4, tied=False)
  c = model.cfg
  config = transformers.MixtralConfig(
    vocab_size=c.vocab, hidden_size=c.embed, intermediate_size=c.mlp, num_hidden_layers=1,
    num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim,
    rms_norm_eps=c.norm_eps, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
    rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_theta},
    attn_implementation='eager', tie_word_embeddings=False,
  )  # fmt: skip
  hf = transformers.MixtralForCausalLM(config).eval()
  block = jax.tree.map(lambda x: np.asarray(x[0]), params['blocks'])
  rows = lambda x: x.reshape(c.embed, -1).T
  experts, at = block['mlp']['experts'], 'model.layers.0.'
  swap = lambda x: x.swapaxes(1, 2)
  weights = {
    'model.embed_tokens.weight': params['embedding'],
    'model.norm.weight': params['final_norm']['scale'],
    'lm_head.weight': params['lm_head'],
    at + 'input_layernorm.weight': block['attn_norm']['scale'],
    at + 'post_attention_layernorm.weight': block['mlp_norm']['scale'],
    **{at + f'self_attn.{n}_proj.weight': rows(block['attn'][f'w{n}']) for n in 'qkv'},
    at + 'self_attn.o_proj.weight': block['attn']['wo'].reshape(-1, c.embed).T,
    at + 'mlp.gate.weight': block['mlp']['w_router'].T,
    at + 'mlp.experts.gate_up_proj': np.concatenate(
      [swap(experts['w_gate']), swap(experts['w_up'])], 1
    ),
    at + 'mlp.experts.down_proj': swap(experts['w_down']),
  }
  hf.load_state_dict({n: torch.tensor(np.array(w)) for n, w in weights.items()})
  data = batch(padding=0)
  with torch.no_grad():
    theirs = hf(torch.tensor(data['inputs']).long(), output_router_logits=True)
  ours = forward(params, data)
  logits = decoder.unembed(params, ours)
  np.testing.assert_allclose(logits, theirs.logits.numpy(), rtol=2e-4, atol=2e-4)
  uneven = load_balancing_loss_func(theirs.router_logits, 4, 2)  # theirs adds the k choices up
  assert 2 * moe.balance(ours.routing) == pytest.approx(float(uneven), rel=1e-4)


def test_a_distilled_router_is_kept_balanced():
  """What distillation adds up is the divergence and what the next-token loss adds for a router."""
  teacher = models.build(section('model', SMALL))
  student, _, params = make()
  weights, rows = jax.jit(teacher.init)(jax.random.key(7)), batch()
  passes = {'student': student.forward, 'teacher': teacher.forward}
  kd = {'name': 'distill', 'chunk': 8, 'temperature': 1.0, 'mixing': 1.0, 'kl': 'forward'}
  taught = lambda **more: jax.jit(objectives.build(section('objective', {**kd, **more}), passes))(
    params, {'teacher': weights}, rows
  )
  plain, both = taught(balance=0.0, z=0.0), taught(balance=0.3, z=0.7)
  alone = jax.jit(loss(student, balance=0.3, z=0.7))(params, rows)
  for name in ('balance', 'router_z'):
    np.testing.assert_allclose(both[name][0], alone[name][0], rtol=1e-6)
  more = 0.3 * both['balance'][0] + 0.7 * both['router_z'][0]
  assert float(both['loss'][0]) == pytest.approx(float(plain['loss'][0] + more), rel=1e-6)
  assert float(plain['loss'][0]) == pytest.approx(float(plain['kl'][0]), rel=1e-6)


def test_counts_and_axes():
  model, _, params = make(shared_mlp=6)
  assert sum(count.num_params(model.cfg).values()) == sum(x.size for x in jax.tree.leaves(params))
  idle = 2 * 2 * 3 * 16 * 12  # two layers, two experts not taken
  total, active = (f(model.cfg)['mlp'] for f in (count.num_params, count.active_params))
  assert total - active == idle
  names = jax.tree_util.tree_map_with_path(lambda path, _: axes.leaf_axes(path), params)
  assert names['blocks']['mlp']['experts']['w_up'] == ('layers', 'experts', 'embed', 'mlp')
  assert names['blocks']['mlp']['w_router'] == ('layers', 'embed', 'experts')
  mesh = sharding.make_mesh({'expert': 4, 'data': 2})
  where = sharding.shardings(params, mesh)['blocks']['mlp']['experts']['w_up']
  assert where.spec == jax.sharding.PartitionSpec(None, 'expert', None, None)


def test_cached_decoding_equals_the_whole_pass():
  model, forward, params = make()
  rows = batch(rows=2, padding=0)
  whole = forward(params, rows).hidden
  cache, parts = decoder.init_cache(model.cfg, 2, 10, jnp.float32), []
  for i in range(10):
    step = {n: jnp.asarray(x[:, i : i + 1]) for n, x in rows.items()}
    out = forward(params, step, cache)
    cache = out.cache
    parts.append(out.hidden)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'experts_per_token': 5}, 'experts_per_token=5: expected 1 to 4'),
    ({'num_experts': 0, 'shared_mlp': 4}, 'a shared MLP only beside experts'),
    ({'dispatch': 'magic'}, "dispatch: expected one of .* found 'magic'"),
  ],
)
def test_impossible_models_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    models.build(section('model', {**SMALL, **changes}))
