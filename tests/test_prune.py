"""Cutting models: masked and cut are the same model, for every shape and axis there is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from slm import models
from slm.models import moe
from slm.models.decoder import unembed
from slm.pruning import slicing
from slm.runs.config import section
from slm.weights.count import num_params

SMALL = {
  'name': 'decoder', 'vocab': 61, 'embed': 24, 'num_layers': 3, 'num_heads': 4, 'num_kv_heads': 2,
  'head_dim': 8, 'mlp': 20, 'norm_eps': 1e-6,
}  # fmt: skip
SHAPES = {
  'llama': {},
  'untied': {'tied': False, 'qkv_bias': True, 'out_bias': True, 'mlp_bias': True},
  'qwen3': {'qk_norm': 'head', 'num_kv_heads': 1},
  'multi_head': {'num_kv_heads': 4},
  'olmo2': {'norms': 'post', 'qk_norm': 'all'},
  'gemma2': {
    'norms': 'sandwich', 'norm_offset': True, 'embed_scale': True, 'activation': 'gelu',
    'attention_cap': 5.0, 'logit_cap': 3.0, 'window': 4,
    'layer_types': ('window', 'full', 'window'),
  },
  'gemma3': {
    'norms': 'sandwich', 'norm_offset': True, 'embed_scale': True, 'qk_norm': 'head', 'tied': False,
  },
  'smollm3': {'layer_types': ('full', 'nope', 'full')},
  'mixtral': {'num_experts': 4, 'experts_per_token': 2, 'shared_mlp': 6},
}  # fmt: skip


def make(name):
  """Return a model and weights in which nothing is at its start."""
  model, params = _make(name)
  return model, jax.tree.map(lambda w: w, params)


@functools.cache
def _make(name):
  model = models.build(section('model', {**SMALL, **SHAPES[name]}))
  return model, toy.noisy(model, 0.2)


def cut(params, cfg, kept, gain='none'):
  """Cut in one program."""
  shapes = []

  def run(params):
    small, shape = slicing.cut(params, cfg, kept, gain)
    shapes.append(shape)
    return small

  return jax.jit(run)(params), shapes[0]


def choose(rng, count, size, *lead):
  """Draw ascending indices [*lead, count] below size."""
  drawn = rng.permuted(np.broadcast_to(np.arange(size), (*lead, size)), axis=-1)
  return np.sort(drawn[..., :count], axis=-1)


def sets(cfg, *axes, seed=0):
  """Draw what is kept of some axes."""
  rng, found = np.random.default_rng(seed), {}
  n, groups = cfg.num_layers, cfg.num_heads // cfg.num_kv_heads
  for axis in axes:
    if axis == 'heads' and groups == 1:  # each goes with its own keys and values
      found |= dict.fromkeys(('heads', 'kv_heads'), choose(rng, 2, cfg.num_heads, n))
    elif axis == 'heads':  # as many of every group
      each = choose(rng, max(groups // 2, 1), groups, n, cfg.num_kv_heads)
      found[axis] = (each + groups * np.arange(cfg.num_kv_heads)[:, None]).reshape(n, -1)
    elif axis == 'mlp':
      lead = (n, cfg.num_experts) if cfg.num_experts else (n,)
      found[axis] = choose(rng, 13, cfg.mlp, *lead)
    elif axis == 'embed':
      found[axis] = choose(rng, 16, cfg.embed)
    elif axis == 'vocab':
      found[axis] = choose(rng, 40, cfg.vocab)
    elif axis == 'layers':
      found[axis] = np.array([0, 2])
    elif axis == 'experts':
      found[axis] = np.tile([0, 1, 3], (n, 1))
  return found


def masked(params, cfg, kept):
  """Return the whole model with zeros for everything that is not kept, along widths alone."""
  slicing.check(cfg, kept)

  def mask(path, leaf):
    names = slicing.axes(path)
    for place, axis in enumerate(names):
      if axis not in kept or axis in ('layers', 'experts', 'vocab'):
        continue
      index = np.asarray(kept[axis])
      stays = np.zeros((*index.shape[:-1], leaf.shape[place]), bool)
      np.put_along_axis(stays, index, True, axis=-1)
      dims = [1] * leaf.ndim
      dims[place] = leaf.shape[place]
      for lead, name in enumerate(('layers', 'experts')[: index.ndim - 1]):
        dims[names.index(name)] = index.shape[lead]
      leaf = leaf * stays.reshape(dims)
    return leaf

  return jax.jit(lambda p: jax.tree_util.tree_map_with_path(mask, p))(params)


@functools.cache
def forward(cfg):
  model = models.build(section('model', {'name': 'decoder', **dataclasses.asdict(cfg)}))
  return jax.jit(lambda params, batch: unembed(params, model.forward(params, batch)))


def logits_of(cfg, params, ids=None):
  if ids is None:
    ids = np.random.default_rng(5).integers(0, cfg.vocab, (2, 11))
  ids = np.asarray(ids, np.int32)
  t = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
  batch = {'inputs': ids, 'positions': t, 'segments': np.ones_like(ids)}
  return np.asarray(forward(cfg)(params, batch))


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('axes', [('embed',), ('heads',), ('mlp',), ('embed', 'heads', 'mlp')])
def test_cut_is_masked(name, axes):
  model, params = make(name)
  kept = sets(model.cfg, *axes)
  small, cfg = cut(params, model.cfg, kept, 'sqrt')
  whole = logits_of(model.cfg, masked(params, model.cfg, kept))
  np.testing.assert_allclose(logits_of(cfg, small), whole, rtol=1e-4, atol=1e-4)
  assert np.abs(whole - logits_of(model.cfg, params)).max() > 0.05
  assert sum(num_params(cfg).values()) == sum(x.size for x in jax.tree.leaves(small))
  if 'embed' in axes:  # without the gain it is another model
    plain, cfg = cut(params, model.cfg, kept)
    assert np.abs(logits_of(cfg, plain) - whole).max() > 1e-3


@pytest.mark.parametrize('name', SHAPES)
def test_layers_that_add_nothing_can_go(name):
  model, params = make(name)
  kept = sets(model.cfg, 'layers')
  small, cfg = cut(params, model.cfg, kept)
  idle = lambda path, w: w.at[1].set(0.0) if path[-1].key in ('wo', 'w_down', 'bo', 'b_down') else w
  silent = jax.tree_util.tree_map_with_path(idle, params)
  np.testing.assert_allclose(
    logits_of(cfg, small), logits_of(model.cfg, silent), rtol=1e-4, atol=1e-4
  )
  if model.cfg.layer_types:
    assert cfg.layer_types == model.cfg.layer_types[::2] or set(model.cfg.layer_types[::2]) == {
      'full'
    }


@pytest.mark.parametrize('name', ['llama', 'untied'])
def test_rows_of_the_vocabulary(name):
  model, params = make(name)
  kept = sets(model.cfg, 'vocab')
  small, cfg = cut(params, model.cfg, kept)
  ids = np.random.default_rng(3).integers(0, 40, (2, 9))
  whole = logits_of(model.cfg, params, kept['vocab'][ids])[..., kept['vocab']]
  np.testing.assert_allclose(logits_of(cfg, small, ids), whole, rtol=1e-5, atol=1e-5)


def test_experts_go_as_if_the_router_never_chose_them(monkeypatch):
  """Every layer loses another expert: its logits are -inf, marked by a NaN in its column."""
  model, params = make('mixtral')
  kept = sets(model.cfg, 'mlp') | {'experts': np.array([[0, 1, 3], [1, 2, 3], [0, 1, 2]])}
  small, cfg = cut(params, model.cfg, kept)
  assert cfg.num_experts == 3 and small['blocks']['mlp']['experts']['w_up'].shape == (3, 3, 24, 13)
  ours = logits_of(cfg, small)

  def route(x, w_router, k, renormalise=True):
    logits = jnp.where(jnp.isnan(w_router[:1]), -jnp.inf, x @ jnp.nan_to_num(w_router))
    probabilities = jax.nn.softmax(logits)
    weights, ids = jax.lax.top_k(probabilities, k)
    zero = jnp.zeros_like(probabilities)
    found = {'probability': zero, 'chosen': zero, 'z': zero[..., 0]}
    return weights / weights.sum(-1, keepdims=True), ids, found

  monkeypatch.setattr(moe, 'route', route)
  forward.cache_clear()
  whole = masked(params, model.cfg, {'mlp': kept['mlp']})
  router = whole['blocks']['mlp']['w_router']
  gone = [6 - sum(k) for k in kept['experts'].tolist()]
  whole['blocks']['mlp']['w_router'] = router.at[jnp.arange(3), :, jnp.array(gone)].set(jnp.nan)
  np.testing.assert_allclose(ours, logits_of(model.cfg, whole), rtol=1e-4, atol=1e-4)
  forward.cache_clear()


def test_key_value_heads_go_with_their_queries():
  model, params = make('llama')
  kept = {'kv_heads': np.array([[0], [1], [0]]), 'heads': np.array([[0, 1], [2, 3], [0, 1]])}
  small, cfg = cut(params, model.cfg, kept)
  assert (cfg.num_heads, cfg.num_kv_heads) == (2, 1)
  whole = logits_of(model.cfg, masked(params, model.cfg, kept))
  np.testing.assert_allclose(logits_of(cfg, small), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', SHAPES)
def test_keeping_everything_is_the_identity_and_cutting_twice_is_cutting_once(name):
  model, params = make(name)
  c = model.cfg
  every = {
    axis: np.arange(getattr(c, slicing.SIZES[axis])) for axis in ('vocab', 'embed', 'layers')
  }
  every['heads'] = np.tile(np.arange(c.num_heads), (c.num_layers, 1))
  for gain in ('none', 'sqrt'):
    same, cfg = cut(params, c, every, gain)
    assert cfg == c
    jax.tree.map(np.testing.assert_array_equal, same, params)
  first = sets(c, 'embed', 'mlp')
  once, cfg = cut(params, c, first)
  fewer = {'embed': np.arange(0, 16, 2)}
  twice, small = cut(once, cfg, fewer)
  direct, also = cut(params, c, {**first, 'embed': first['embed'][::2]})
  assert small == also
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), twice, direct)


@pytest.mark.parametrize(
  ('kept', 'message'),
  [
    ({'width': np.arange(3)}, "unknown axis 'width'"),
    ({'embed': np.array([3, 1])}, 'embed: expected ascending indices below 24'),
    ({'embed': np.array([3, 24])}, 'embed: expected ascending indices below 24'),
    ({'mlp': np.arange(4)}, r'mlp has indices of shape \(4,\)'),
    ({'mlp': np.tile(np.arange(4), (2, 1))}, 'mlp has 2 rows for 3 layers'),
    ({'heads': np.tile([0, 1, 2], (3, 1))}, r'layer 0 keeps \[2, 1\] query heads'),
    ({'kv_heads': np.tile([0], (3, 1))}, 'layer 0 keeps'),
  ],
)
def test_sets_that_do_not_fit_are_refused(kept, message):
  model, params = make('llama')
  with pytest.raises(ValueError, match=message):
    slicing.cut(params, model.cfg, kept)


def test_a_token_needs_its_experts():
  model, params = make('mixtral')
  with pytest.raises(ValueError, match='1 experts are fewer than the 2 a token is sent to'):
    slicing.cut(params, model.cfg, {'experts': np.array([[0], [1], [2]])})
