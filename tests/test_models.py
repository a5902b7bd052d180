"""The decoder against itself by other routes, and its own accounting."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from slm import models, objectives
from slm.models import layers
from slm.models.decoder import by_layer, init_cache, unembed
from slm.models.layers import attention
from slm.runs.config import section
from slm.training import optim
from slm.training.step import init_state, make_train_step
from slm.weights import axes
from slm.weights.count import forward_flops, num_params

SMALL = {
  'name': 'decoder',
  'vocab': 96,
  'embed': 32,
  'num_layers': 2,
  'num_heads': 4,
  'num_kv_heads': 4,
  'head_dim': 8,
  'mlp': 48,
}
VARIANTS = {
  'dense': {},
  'grouped': {'num_kv_heads': 2},
  'multi_query': {'num_kv_heads': 1},
  'untied': {'tied': False},
  'wide_heads': {'head_dim': 16, 'num_kv_heads': 2},
  'bias': {'qkv_bias': True},
  'qk_norm': {'qk_norm': 'head', 'head_dim': 16},
}
# What only models of transformers have; tests/test_hf.py compares the logits of all.
IMPORTED = {
  'biases': {'qkv_bias': True, 'out_bias': True, 'mlp_bias': True},
  'olmo2': {'norms': 'post', 'qk_norm': 'all', 'num_kv_heads': 2},
  'gemma2': {
    'norms': 'sandwich', 'norm_offset': True, 'embed_scale': True, 'activation': 'gelu',
    'attention_cap': 5.0, 'logit_cap': 3.0, 'query_scale': 24.0, 'window': 4,
    'layer_types': ('window', 'full'),
  },
  'gemma3': {
    'qk_norm': 'head', 'window': 4, 'layer_types': ('window', 'full'), 'rope': 'linear',
    'rope_factor': 8.0, 'rope_theta_window': 100.0,
  },
  'mistral': {'window': 4, 'layer_types': ('window', 'window')},
  'smollm3': {'layer_types': ('full', 'nope')},
  'llama3': {'rope': 'llama3', 'rope_factor': 8.0, 'rope_context': 16, 'rope_theta': 100.0},
}  # fmt: skip
EVERY = {**VARIANTS, **IMPORTED}


def make(**changes):
  """Return a model and weights in which norms, biases and scales are not at their start."""
  return _make(tuple(changes.items()))


@functools.cache
def _make(changes):
  model = models.build(section('model', {**SMALL, **dict(changes)}))
  return model, toy.noisy(model, 0.1)


def make_batch(rows=2, t=12, vocab=96, seed=0):
  """Return one-document rows."""
  inputs = np.random.default_rng(seed).integers(0, vocab, (rows, t)).astype(np.int32)
  positions = np.broadcast_to(np.arange(t, dtype=np.int32), (rows, t))
  ones = np.ones((rows, t), np.int32)
  return {'inputs': inputs, 'positions': positions, 'segments': ones}


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, batch):
  return unembed(params, model.forward(params, batch))


@pytest.mark.parametrize('t', [24, 300])
def test_documents_of_a_packed_row_do_not_see_each_other(t):
  model, params = make()
  cut = t // 3
  batch = make_batch(rows=1, t=t)
  batch['segments'] = np.where(np.arange(t) < cut, 1, 2)[None].astype(np.int32)
  batch['positions'] = np.where(np.arange(t) < cut, np.arange(t), np.arange(t) - cut)[None]
  before = logits_of(model, params, batch)
  for changed in (slice(0, cut), slice(cut, t)):
    other = dict(batch, inputs=batch['inputs'].copy())
    other['inputs'][:, changed] = (other['inputs'][:, changed] + 1) % 96
    same = np.ones(t, bool)
    same[changed] = False
    after = logits_of(model, params, other)
    np.testing.assert_array_equal(after[:, same], before[:, same])
    assert np.abs(after[:, ~same] - before[:, ~same]).max() > 0.1
  alone = {name: x[:, cut:] for name, x in batch.items()}
  np.testing.assert_allclose(before[:, cut:], logits_of(model, params, alone), atol=1e-5)


@pytest.mark.parametrize('t', [24, 300])
def test_no_query_sees_a_later_key(t):
  model, params = make()
  batch = make_batch(rows=1, t=t)
  before = logits_of(model, params, batch)
  for at in (t // 2, t - 1):
    other = dict(batch, inputs=batch['inputs'].copy())
    other['inputs'][:, at] = (other['inputs'][:, at] + 1) % 96
    after = logits_of(model, params, other)
    np.testing.assert_array_equal(after[:, :at], before[:, :at])


def loss_and_gradient(model, params, batch):
  weight = jax.random.normal(jax.random.key(2), (model.cfg.embed,))
  loss = lambda p: jnp.sum(jnp.sin(model.forward(p, batch).hidden) @ weight)
  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize('changes', [{'unroll': 2}, {'remat': 'full'}, {'remat': 'dots'}])
def test_unrolling_and_rematerialisation_change_no_value_or_gradient(changes):
  model, params = make(**VARIANTS['grouped'])
  other = models.build(
    section(
      'model', {'name': 'decoder', **dataclasses.asdict(dataclasses.replace(model.cfg, **changes))}
    )
  )
  batch = make_batch(t=20)
  ours, theirs = (loss_and_gradient(m, params, batch) for m in (model, other))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, theirs)


def test_rematerialisation_keeps_what_it_says():
  """Per layer and token: `full` its input; `dots` also q, k, v, wo's product, gate and up."""
  cfg = models.build(section('model', {**SMALL, **VARIANTS['grouped']})).cfg
  batch = make_batch(t=20)
  tokens = batch['inputs'].size * cfg.num_layers

  def kept(remat):
    model = models.build(
      section('model', {'name': 'decoder', **dataclasses.asdict(cfg), 'remat': remat})
    )
    params = jax.eval_shape(model.init, jax.random.key(0))
    run = lambda p: jax.vjp(lambda p: model.forward(p, batch).hidden, p)[1]
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(run, params)))

  none, dots, full = (kept(remat) for remat in ('none', 'dots', 'full'))
  products = cfg.head_dim * (cfg.num_heads + 2 * cfg.num_kv_heads) + cfg.embed + 2 * cfg.mlp
  assert dots - full == tokens * products
  assert none > 1.5 * dots


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('t', [12, 300])
def test_attention_gradient_equals_that_of_autodiff(kv_heads, t):
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (2, 4, t, 8))
  k, v = (jax.random.normal(key, (2, kv_heads, t, 8)) for key in keys[1:3])
  segments = jnp.broadcast_to(jnp.arange(t) * 2 // t, (2, t))
  mask = jnp.tril(jnp.ones((t, t), bool))[None] & (segments[:, :, None] == segments[:, None, :])
  direction = jax.random.normal(keys[3], q.shape)

  def plain(q, k, v):
    k, v = (jnp.repeat(x, 4 // kv_heads, axis=1) for x in (k, v))
    scores = jnp.einsum('bhtc,bhsc->bhts', q, k) / 8**0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum('bhts,bhsc->bhtc', weights, v)

  gradient = lambda f: jax.jit(
    jax.value_and_grad(lambda *x: jnp.sum(f(*x) * direction), argnums=(0, 1, 2))
  )(q, k, v)
  ours, theirs = gradient(lambda q, k, v: attention(q, k, v, mask)), gradient(plain)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), ours, theirs)


def test_attention_by_row_is_that_of_the_batch(monkeypatch):
  """Forward and backward, as one CPU device takes them."""
  keys = jax.random.split(jax.random.key(0), 5)
  draw = lambda key, *shape: jax.random.normal(key, (3, 2, *shape))
  q, d_out = draw(keys[0], 2, 140, 8), draw(keys[1], 2, 140, 8)
  k, v = draw(keys[2], 140, 8), draw(keys[3], 140, 8)
  bias = jnp.where(jnp.tril(jax.random.bernoulli(keys[4], 0.9, (3, 1, 1, 140, 140))), 0.0, -1e30)
  out, norms = layers._forward(q, k, v, bias)
  arguments = d_out, q, k, v, bias, out, norms
  gradients = layers._backward(*arguments)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  text = str(jax.make_jaxpr(lambda *x: layers._by_row(layers._backward, *x))(*arguments))
  assert 'scan' in text
  mapped = layers._by_row(layers._forward, q, k, v, bias)
  mapped += layers._by_row(layers._backward, *arguments)
  for ours, whole in zip(mapped, (out, norms, *gradients), strict=True):
    np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('variant', ['grouped', *IMPORTED])
def test_layers_one_by_one_are_their_scan(variant):
  model, params = make(**EVERY[variant])
  batch = make_batch(t=10)
  cache = init_cache(model.cfg, 2, 16, jnp.float32)
  forward = jax.jit(lambda params, cache: model.forward(params, batch, cache, states=(0, 1)))
  scanned, apart = forward(params, cache), forward(by_layer(params), by_layer(cache))
  assert isinstance(apart.cache['k'], list)
  stacked = {name: jnp.stack(apart.cache[name]) for name in ('k', 'v')}
  apart = apart.replace(cache=apart.cache | stacked)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), scanned, apart)


@pytest.mark.parametrize('variant', ['grouped', 'qk_norm', 'bias', *IMPORTED])
def test_prefill_and_decoding_from_a_cache_equal_the_full_pass(variant):
  model, params = make(**EVERY[variant])
  batch = make_batch(t=10)
  forward = jax.jit(model.forward)
  full = forward(params, batch).hidden
  cache = init_cache(model.cfg, 2, 16, jnp.float32)  # longer than the row
  part = lambda start, end: {name: x[:, start:end] for name, x in batch.items()}
  out = forward(params, part(0, 6), cache)
  pieces = [out.hidden]
  for i in range(6, 10):
    out = forward(params, part(i, i + 1), out.cache)
    pieces.append(out.hidden)
  np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, atol=1e-5)
  assert int(out.cache['index']) == 10


@pytest.mark.parametrize('variant', ['gemma2', 'gemma3', 'olmo2'])
def test_gradients_are_finite_differences(variant):
  """Along one direction, through caps, windows, norms and scales."""
  model, params = make(**IMPORTED[variant])
  batch = make_batch(t=12)
  batch |= {'targets': np.roll(batch['inputs'], -1, 1), 'weights': np.ones((2, 12), np.float32)}
  objective = objectives.build(
    section('objective', {'name': 'next_token', 'chunk': 8}), {'student': model.forward}
  )
  loss = jax.jit(lambda p: objective(p, {}, batch)['loss'][0])
  keys = iter(jax.random.split(jax.random.key(3), 99))
  way = jax.tree.map(lambda w: jax.random.normal(next(keys), w.shape), params)
  moved = lambda h: jax.tree.map(lambda w, d: w + h * d, params, way)
  slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.jit(jax.grad(loss))(params), way)))
  h = 1e-3
  assert (loss(moved(h)) - loss(moved(-h))) / (2 * h) == pytest.approx(float(slope), rel=2e-2)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'activation': 'relu'}, "model.activation: expected one of .* found 'relu'"),
    ({'layer_types': ('full',)}, 'model.layer_types: expected 2 of'),
    ({'layer_types': ('full', 'odd')}, 'model.layer_types: expected 2 of'),
    ({'window': 8}, 'model.window=8: expected a number of tokens if, and only if'),
    ({'layer_types': ('full', 'window')}, 'model.window=0'),
    ({'rope': 'yarn'}, "model.rope: expected one of .* found 'yarn'"),
  ],
)
def test_impossible_shapes_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    models.build(section('model', {**SMALL, **changes}))


@pytest.mark.parametrize('t', [8, 300])
def test_padding_gives_finite_values_and_leaves_the_text_alone(t):
  model, params = make()
  batch = make_batch(t=t)
  batch['segments'] = np.where(np.arange(t) < t // 2, 1, 0)[None].repeat(2, 0).astype(np.int32)
  logits = logits_of(model, params, batch)
  assert np.isfinite(logits).all()
  text = {name: x[:, : t // 2] for name, x in batch.items()}
  np.testing.assert_allclose(logits[:, : t // 2], logits_of(model, params, text), atol=1e-5)
  _, gradient = loss_and_gradient(model, params, batch)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_padding_on_the_left_of_a_cached_prompt_is_finite():
  model, params = make()
  batch = make_batch(t=6)
  batch['segments'] = np.array([[0, 0, 1, 1, 1, 1], [1] * 6], np.int32)
  out = jax.jit(model.forward)(params, batch, init_cache(model.cfg, 2, 9, jnp.float32))
  assert np.isfinite(out.hidden).all()


@pytest.mark.parametrize('variant', EVERY)
def test_axis_table_and_parameter_count_cover_every_leaf(variant):
  model = models.build(section('model', {**SMALL, **EVERY[variant]}))
  params = jax.eval_shape(model.init, jax.random.key(0))
  names = jax.tree_util.tree_map_with_path(lambda path, _: axes.leaf_axes(path), params)
  c = model.cfg
  sizes = {
    'vocab': c.vocab,
    'embed': c.embed,
    'heads': c.num_heads,
    'kv_heads': c.num_kv_heads,
    'head_dim': c.head_dim,
    'mlp': c.mlp,
    'layers': c.num_layers,
  }
  is_names = lambda x: isinstance(x, tuple)
  expected = jax.tree.map(lambda n: tuple(sizes[a] for a in n), names, is_leaf=is_names)
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert shapes == expected
  assert sum(num_params(c).values()) == sum(x.size for x in jax.tree.leaves(params))


WIDE = {
  'vocab': 512, 'embed': 256, 'num_layers': 2, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 64,
  'mlp': 704, 'unroll': 2,
}  # fmt: skip


@pytest.mark.parametrize('t', [64, 512])
def test_flops_agree_with_the_compiler(t):
  model = models.build(section('model', {**SMALL, **WIDE}))
  params = jax.eval_shape(model.init, jax.random.key(0))
  batch = make_batch(rows=1, t=t)
  forward = jax.jit(lambda p, b: unembed(p, model.forward(p, b)))
  counted = forward.lower(params, batch).compile().cost_analysis()['flops']
  expected = forward_flops(model.cfg, t) * t
  assert counted == pytest.approx(expected, rel=0.05)


def test_train_step_flops_are_three_forwards():
  model = models.build(section('model', {**SMALL, **WIDE}))
  t = 64
  hyper = {'clip': 1.0, 'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1}
  tx = optim.build(section('optim', hyper), lambda step: 1e-3, False)
  params = jax.eval_shape(model.init, jax.random.key(0))
  state = jax.eval_shape(lambda p: init_state(p, tx, {}), params)
  batch = make_batch(rows=64, t=t)
  batch |= {'targets': batch['inputs'], 'weights': np.ones((64, t), np.float32)}
  # One chunk holds every token, since the compiler counts a loop's body once.
  objective = objectives.build(
    section('objective', {'name': 'next_token', 'chunk': 64 * t}), {'student': model.forward}
  )
  step = jax.jit(make_train_step(objective, tx))
  batch = {name: x[None] for name, x in batch.items()}
  counted = step.lower(state, {}, batch).compile().cost_analysis()['flops']
  assert counted == pytest.approx(3 * forward_flops(model.cfg, t) * 64 * t, rel=0.06)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_kv_heads': 3}, 'num_kv_heads=3'),
    ({'head_dim': 7}, 'head_dim'),
    ({'mlp': 0}, 'model.mlp'),
    ({'remat': 'some'}, 'remat'),
    ({'depth': 3}, 'depth'),
    ({'name': 'encoder'}, 'encoder'),
  ],
)
def test_impossible_models_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    models.build(section('model', {**SMALL, **changes}))
