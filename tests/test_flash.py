"""Kernels of attention compute what the reference does, and are taken where they can be."""

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


@pytest.mark.parametrize('name', flash.KERNELS)
def test_a_kernel_equals_the_reference_on_a_device_and_on_a_mesh(name, params, batch):
  expected = outputs('reference', params, batch)
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  # Gradients are sums over rows that nearly cancel: errors are small beside their largest.
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
  jax.tree.map(close, outputs(name, params, batch), expected)
  with jax.set_mesh(mesh):
    jax.tree.map(close, outputs(name, params, batch), expected)


@pytest.mark.parametrize('name', flash.KERNELS)
def test_a_changed_document_changes_no_other(name, params, batch):
  before, _ = outputs(name, params, batch)
  third = batch['segments'] == 3
  changed = batch | {'inputs': np.where(third, (batch['inputs'] + 1) % CFG.vocab, batch['inputs'])}
  after, _ = outputs(name, params, changed)
  np.testing.assert_array_equal(before[~third], after[~third])
  assert np.abs(before - after)[third].max() > 1e-3


@pytest.mark.parametrize('name', flash.KERNELS)
@pytest.mark.parametrize(
  ('changes', 'tokens', 'message'),
  [
    ({}, 100, 'rows of 100 tokens, no multiple of 128'),
    ({'attention_cap': 30.0}, 128, 'capped scores'),
    ({'window': 8, 'layer_types': ('window',)}, 128, 'layers with a window'),
  ],
)
def test_what_a_kernel_cannot_do_is_named_and_left_to_the_reference(
  name, changes, tokens, message, monkeypatch
):
  cfg = dataclasses.replace(CFG, **changes)
  with pytest.raises(ValueError, match=f'model.attention={name}: the kernel cannot do {message}'):
    flash.kernel(dataclasses.replace(cfg, attention=name), tokens, cached=False)
  on(monkeypatch, flash.KERNELS[name].platform)
  assert flash.kernel(dataclasses.replace(cfg, attention='auto'), tokens, False) == 'reference'


def on(monkeypatch, platform, capability='9.0'):
  """Trace for a platform, with a GPU of a compute capability."""
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  monkeypatch.setattr(flash, '_capability', lambda: capability)


AUTO = dataclasses.replace(CFG, attention='auto')


@pytest.mark.parametrize(('platform', 'name'), [('tpu', 'splash'), ('gpu', 'triton')])
def test_auto_is_the_kernel_of_the_platform_and_a_cache_has_the_reference(
  platform, name, monkeypatch
):
  assert flash.kernel(AUTO, TOKENS, cached=False) == 'reference'
  on(monkeypatch, platform)
  assert flash.kernel(AUTO, TOKENS, cached=False) == name
  assert flash.kernel(AUTO, TOKENS, cached=True) == 'reference'
  assert flash.kernel(CFG, TOKENS, cached=False) == 'reference'
  (other,) = set(flash.KERNELS) - {name}
  with pytest.raises(ValueError, match=f'{other}: the kernel cannot do code for {platform}'):
    flash.kernel(dataclasses.replace(CFG, attention=other), TOKENS, cached=False)


@pytest.mark.parametrize(
  ('head_dim', 'capability', 'message'),
  [
    (16, '7.5', 'code for GPUs of compute capability 7.5'),
    (16, 'gfx942', 'code for GPUs of compute capability gfx942'),
    (80, '9.0', 'heads of 80, none of 16, 32, 64 and 128'),
  ],
)
def test_gpus_and_heads_that_triton_has_no_code_for_have_the_reference(
  head_dim, capability, message, monkeypatch
):
  on(monkeypatch, 'gpu', capability)
  cfg = dataclasses.replace(AUTO, head_dim=head_dim)
  assert flash.kernel(cfg, TOKENS, cached=False) == 'reference'
  with pytest.raises(ValueError, match=f'triton: the kernel cannot do {message}'):
    flash.kernel(dataclasses.replace(cfg, attention='triton'), TOKENS, cached=False)


def test_a_jax_without_the_kernel_of_gpus_has_the_reference(monkeypatch):
  on(monkeypatch, 'gpu')
  monkeypatch.setattr(flash, '_MHA', 'jax.no_such_module')
  assert flash.kernel(AUTO, TOKENS, cached=False) == 'reference'
  with pytest.raises(ValueError, match='code in jax .*, which lacks jax.no_such_module'):
    flash.kernel(dataclasses.replace(CFG, attention='triton'), TOKENS, cached=False)


def lowered(monkeypatch, step, *inputs):
  """Return the program of a step for an H100, which is not here."""
  monkeypatch.setattr(flash, '_capability', lambda: '9.0')
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', num_cores=None, platform='gpu')
  axes = sharding.MESH_AXES
  mesh = jax.sharding.AbstractMesh((1,) * len(axes), axes, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(step).trace(*inputs).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize(
  ('head_dim', 'dtype'), [(64, 'bfloat16'), (128, 'bfloat16'), (128, 'float32')]
)
def test_the_kernel_of_gpus_is_lowered_for_cuda_where_there_is_no_gpu(head_dim, dtype, monkeypatch):
  shape = lambda heads: jax.ShapeDtypeStruct((2, heads, 256, head_dim), dtype)
  inputs = (shape(4), shape(2), shape(2), jax.ShapeDtypeStruct((2, 256), jnp.int32))
  cfg = dataclasses.replace(AUTO, head_dim=head_dim)
  loss = lambda *x: flash.attention(cfg, *x).astype(jnp.float32).sum()
  text = lowered(monkeypatch, jax.value_and_grad(loss, (0, 1, 2)), *inputs)
  assert text.count('xla.gpu.triton') == 3  # forward, row sums, backward


def test_the_kernel_of_gpus_is_lowered_in_groups_and_in_recomputed_layers(monkeypatch, params):
  model = models.build(dataclasses.replace(AUTO, remat='dots'))
  shape = lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
  ids = jax.ShapeDtypeStruct((3, 2, TOKENS), jnp.int32)
  rows = dict.fromkeys(('inputs', 'positions', 'segments'), ids)
  forward = sharding.vmap_groups(lambda p, x: model.forward(p, x).hidden, (0, 0))
  step = jax.grad(lambda p, x: forward(p, x).sum())
  text = lowered(monkeypatch, step, jax.tree.map(shape, params), rows)
  assert text.count('xla.gpu.triton') == 4  # forward, forward again, row sums, backward
