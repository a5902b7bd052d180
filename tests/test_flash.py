"""The splash kernel computes what the reference does, and is taken where it can be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm import models
from slm.models import flash
from slm.models.config import DecoderConfig
from slm.weights import sharding

CFG = DecoderConfig(
  vocab=64, embed=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, mlp=32,
  attention='reference',
)  # fmt: skip
ROWS, TOKENS = 4, 128


@pytest.fixture(scope='module')
def batch():
  """Rows of three documents and padding."""
  random = np.random.default_rng(0)
  segments = np.sort(random.integers(1, 4, (ROWS, TOKENS)), axis=1).astype(np.int32)
  segments[:, -9:] = 0
  ids = random.integers(0, CFG.vocab, (ROWS, TOKENS)).astype(np.int32)
  positions = np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1))
  return {'inputs': ids, 'positions': positions, 'segments': segments}


@pytest.fixture(scope='module')
def params():
  return models.build(CFG).init(jax.random.key(0))


def outputs(attention, params, batch):
  """Return the hidden states of real tokens and a gradient."""
  model = models.build(dataclasses.replace(CFG, attention=attention))
  real = (batch['segments'] > 0)[..., None]

  def fn(params):
    hidden = model.forward(params, batch).hidden * real
    return jnp.sin(hidden).sum(), hidden

  (_, hidden), gradient = jax.jit(jax.value_and_grad(fn, has_aux=True))(params)
  return hidden, gradient


def test_splash_equals_the_reference_on_a_device_and_on_a_mesh(params, batch):
  expected = outputs('reference', params, batch)
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  # Gradients are sums over rows that nearly cancel: errors are small beside their largest.
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
  jax.tree.map(close, outputs('splash', params, batch), expected)
  with jax.set_mesh(mesh):
    jax.tree.map(close, outputs('splash', params, batch), expected)


def test_a_changed_document_changes_no_other(params, batch):
  before, _ = outputs('splash', params, batch)
  third = batch['segments'] == 3
  changed = batch | {'inputs': np.where(third, (batch['inputs'] + 1) % CFG.vocab, batch['inputs'])}
  after, _ = outputs('splash', params, changed)
  np.testing.assert_array_equal(before[~third], after[~third])
  assert np.abs(before - after)[third].max() > 1e-3


@pytest.mark.parametrize(
  ('changes', 'tokens', 'message'),
  [
    ({}, 100, 'rows of 100 tokens, no multiple of 128'),
    ({'attention_cap': 30.0}, 128, 'capped scores'),
    ({'window': 8, 'layer_types': ('window',)}, 128, 'layers with a window'),
  ],
)
def test_what_the_kernel_cannot_do_is_named_and_left_to_the_reference(changes, tokens, message):
  cfg = dataclasses.replace(CFG, **changes)
  with pytest.raises(ValueError, match=f'model.attention=splash: the kernel cannot do {message}'):
    flash.kernel(dataclasses.replace(cfg, attention='splash'), tokens, cached=False)
  assert flash.kernel(dataclasses.replace(cfg, attention='auto'), tokens, False) == 'reference'


def test_auto_is_splash_on_tpus_alone_and_a_cache_has_the_reference(monkeypatch):
  auto = dataclasses.replace(CFG, attention='auto')
  assert flash.kernel(auto, TOKENS, cached=False) == 'reference'
  monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
  assert flash.kernel(auto, TOKENS, cached=False) == 'splash'
  assert flash.kernel(auto, TOKENS, cached=True) == 'reference'
  assert flash.kernel(CFG, TOKENS, cached=False) == 'reference'
