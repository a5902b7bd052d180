"""The axis table on a 2x4 mesh: weights, activations, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from slm import models
from slm.objectives import next_token
from slm.runs.config import NextTokenConfig, section
from slm.weights import sharding

MODEL = models.build(
  section('model', {
    'name': 'decoder', 'vocab': 32, 'embed': 16, 'num_layers': 2, 'num_heads': 4,
    'num_kv_heads': 4, 'head_dim': 4, 'mlp': 24, 'qk_norm': 'head', 'qkv_bias': True,
    'tied': False,
  })
)  # fmt: skip
KEY = jax.random.key(0)


def rows(b=8, t=16):
  ids = jax.random.randint(KEY, (b, t), 0, 32)
  positions = jnp.broadcast_to(jnp.arange(t), (b, t))
  return {
    'inputs': ids, 'targets': ids, 'positions': positions, 'segments': jnp.ones_like(ids),
    'weights': jnp.ones((b, t)),
  }  # fmt: skip


@pytest.fixture
def mesh():
  return sharding.make_mesh({'fsdp': 2, 'tensor': 4})


def test_weights_lie_as_the_rules_say(mesh):
  shapes = jax.eval_shape(MODEL.init, KEY)
  where = jax.tree.map(lambda s: s.spec, sharding.shardings(shapes, mesh))
  attention = where['blocks']['attn']
  assert attention['wq'] == P(None, 'fsdp', 'tensor', None)
  assert attention['wo'] == P(None, 'tensor', None, 'fsdp')
  assert attention['bq'] == P(None, 'tensor', None)
  assert where['blocks']['mlp']['w_down'] == P(None, 'tensor', 'fsdp')
  assert where['embedding'] == where['lm_head'] == P('tensor', 'fsdp')
  assert where['final_norm']['scale'] == P('fsdp')


def test_sharded_init_and_loss_equal_one_device(mesh):
  objective = next_token.next_token(NextTokenConfig(chunk=32), {'student': MODEL.forward})
  alone = MODEL.init(KEY)
  want, want_grad = jax.value_and_grad(lambda p: objective(p, {}, rows())['loss'][0])(alone)
  with jax.set_mesh(mesh):
    where = sharding.shardings(jax.eval_shape(MODEL.init, KEY), mesh)
    params = jax.jit(MODEL.init, out_shardings=where)(KEY)
    batch = jax.device_put(rows(), sharding.batch_sharding(mesh))
    got, grad = jax.jit(jax.value_and_grad(lambda p, b: objective(p, {}, b)['loss'][0]))(
      params, batch
    )
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(want_grad), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_residual_stream_keeps_its_batch_sharding():
  """With weights sharded over the batch axes, the compiler must not gather the batch."""
  mesh = sharding.make_mesh({'fsdp': 8})
  with jax.set_mesh(mesh):
    where = sharding.shardings(jax.eval_shape(MODEL.init, KEY), mesh)
    params = jax.jit(MODEL.init, out_shardings=where)(KEY)
    batch = jax.device_put(rows(), sharding.batch_sharding(mesh))
    hidden = jax.jit(lambda p, b: MODEL.forward(p, b).hidden)(params, batch)
  assert hidden.sharding.spec[0] == 'fsdp'
  assert hidden.addressable_shards[0].data.shape == (1, 16, 16)


def test_constrain_without_a_mesh_returns_its_argument():
  x = jnp.ones((2, 3))
  assert sharding.constrain(x, 'batch', None) is x


def test_errors_name_the_thing(mesh):
  with pytest.raises(ValueError, match=r"unknown axes \['model'\]"):
    sharding.make_mesh({'model': 8})
  with pytest.raises(ValueError, match='needs 6 devices, found 8'):
    sharding.make_mesh({'data': 2, 'tensor': 3})
  with pytest.raises(ValueError, match="no row for 'w_typo'"):
    sharding.shardings({'mlp': {'w_typo': jnp.ones((2, 2))}}, mesh)
  with pytest.raises(ValueError, match='axes .* shape'):
    sharding.shardings({'mlp': {'w_up': jnp.ones((2, 2, 2))}}, mesh)
  with pytest.raises(ValueError, match='vocab=33, which tensor=4 does not divide'):
    sharding.shardings({'embedding': jnp.ones((33, 16))}, mesh)


def test_mesh_takes_the_devices_that_are_left():
  mesh = sharding.make_mesh({'data': -1, 'tensor': 2})
  assert dict(mesh.shape) == {'data': 4, 'fsdp': 1, 'tensor': 2, 'expert': 1}
