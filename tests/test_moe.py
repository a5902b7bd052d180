"""Token-routed experts: two dispatches, the dense limit, transformers, the auxiliary losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm import models, objectives, sharding
from slm.models import decoder, moe

SMALL = {
  'name': 'decoder', 'vocab': 37, 'embed': 16, 'num_layers': 2, 'num_heads': 2, 'num_kv_heads': 1,
  'head_dim': 8, 'mlp': 12, 'num_experts': 4, 'experts_per_token': 2,
}  # fmt: skip
KEY = jax.random.key(0)


def batch(rows=8, t=10, padding=3):
  ids = np.asarray(jax.random.randint(KEY, (rows, t), 0, 37))
  real = np.broadcast_to(np.arange(t) < t - padding, (rows, t))
  return {
    'inputs': ids, 'targets': np.roll(ids, -1, 1), 'segments': real.astype(np.int32),
    'positions': np.broadcast_to(np.arange(t), (rows, t)), 'weights': real.astype(np.float32),
  }  # fmt: skip


def loss(model, **weights):
  section = {'name': 'next_token', 'chunk': 64, **weights}
  objective = objectives.build(section, {'student': model.forward})
  return lambda params, rows: objective(params, {}, rows)


@pytest.mark.parametrize('devices', [1, 8])
def test_dispatches_agree_in_value_and_gradient(devices):
  mesh = sharding.make_mesh({'data': devices}, jax.devices()[:devices])
  params = models.build(SMALL).init(KEY)
  rows = jax.device_put(batch(), sharding.batch_sharding(mesh))
  found = []
  for dispatch in moe.DISPATCH:
    model = models.build({**SMALL, 'shared_mlp': 6, 'dispatch': dispatch})
    params = model.init(KEY)
    fn = lambda p, r, m=model: loss(m, balance=0.1, z=0.1)(p, r)['loss'][0]
    with jax.set_mesh(mesh):
      found.append(jax.jit(jax.value_and_grad(fn))(params, rows))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
  jax.tree.map(close, found[0], found[1])
  assert all(np.abs(g).sum() > 0 for g in jax.tree.leaves(found[0][1]))


def test_equal_experts_are_one_dense_mlp():
  model = models.build(SMALL)
  params = model.init(KEY)
  experts = params['blocks']['mlp'].pop('experts')
  first = {n: w[:, 0] for n, w in experts.items()}
  mlp = params['blocks']['mlp']
  same = {n: jnp.broadcast_to(w[:, None], experts[n].shape) for n, w in first.items()}
  routed = {**params, 'blocks': {**params['blocks'], 'mlp': {**mlp, 'experts': same}}}
  dense = {**params, 'blocks': {**params['blocks'], 'mlp': first}}
  plain = models.build({**SMALL, 'num_experts': 0})
  got, want = model.forward(routed, batch()).hidden, plain.forward(dense, batch()).hidden
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_routing_statistics_leave_out_padding_and_add_up():
  model = models.build(SMALL)
  rows = batch()
  found = model.forward(model.init(KEY), rows).routing
  real = rows['segments'].sum(1)
  np.testing.assert_array_equal(found['tokens'], np.stack([real, real], 1))
  np.testing.assert_allclose(found['chosen'].sum(-1), 2 * found['tokens'])
  np.testing.assert_allclose(found['probability'].sum(-1), found['tokens'], rtol=1e-5)
  halves = [{n: x[i : i + 4] for n, x in rows.items()} for i in (0, 4)]
  parts = [model.forward(model.init(KEY), h).routing for h in halves]
  joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  assert moe.balance(joined) == pytest.approx(float(moe.balance(found)), rel=1e-5)


def test_balance_is_one_when_even_and_the_number_of_experts_at_worst():
  even = {'chosen': jnp.full((3, 1, 4), 5.0), 'probability': jnp.full((3, 1, 4), 2.5)}
  assert moe.balance(even) == pytest.approx(1.0)
  worst = jax.tree.map(lambda x: x * jnp.array([4.0, 0, 0, 0])[None, None], even)
  assert moe.balance(worst) == pytest.approx(4.0)


def test_equals_mixtral():
  """Logits and the load-balance loss of transformers' Mixtral with our weights."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

  model = models.build({**SMALL, 'num_layers': 1, 'rope_theta': 1e4, 'tied': False})
  c, params = model.cfg, model.init(KEY)
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
  ours = model.forward(params, data)
  logits = decoder.unembed(params, ours.hidden)
  np.testing.assert_allclose(logits, theirs.logits.numpy(), rtol=2e-4, atol=2e-4)
  uneven = load_balancing_loss_func(theirs.router_logits, 4, 2)  # theirs adds the k choices up
  assert 2 * moe.balance(ours.routing) == pytest.approx(float(uneven), rel=1e-4)


def test_counts_and_axes():
  model = models.build({**SMALL, 'shared_mlp': 6})
  params = model.init(KEY)
  assert sum(decoder.num_params(model.cfg).values()) == sum(x.size for x in jax.tree.leaves(params))
  idle = 2 * 2 * 3 * 16 * 12  # two layers, two experts not taken
  total, active = (f(model.cfg)['mlp'] for f in (decoder.num_params, decoder.active_params))
  assert total - active == idle
  names = sharding.axes(params)['blocks']['mlp']
  assert names['experts']['w_up'] == ('layers', 'experts', 'embed', 'mlp')
  assert names['w_router'] == ('layers', 'embed', 'experts')
  mesh = sharding.make_mesh({'expert': 4, 'data': 2})
  where = sharding.shardings(params, mesh)['blocks']['mlp']['experts']['w_up']
  assert where.spec == jax.sharding.PartitionSpec(None, 'expert', None, None)


def test_cached_decoding_equals_the_whole_pass():
  model = models.build(SMALL)
  params, rows = model.init(KEY), batch(rows=2, padding=0)
  whole = model.forward(params, rows).hidden
  cache, parts = decoder.init_cache(model.cfg, 2, 10, jnp.float32), []
  for i in range(10):
    step = {n: jnp.asarray(x[:, i : i + 1]) for n, x in rows.items()}
    out = model.forward(params, step, cache)
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
    models.build({**SMALL, **changes})
