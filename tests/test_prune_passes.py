"""Passes over calibration rows: deleted layers, gradients and norms, each beside a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_prune import logits_of, make, masked, sets
from test_prune_scores import rows

from slm.pruning import importance, measure, slicing
from slm.weights import sharding
from slm.weights.tree import flatten


def total(of, params, batch, devices=1):
  mesh = sharding.make_mesh({'data': devices}, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    return measure.summing(of)(params, placed)


def nll(logits, batch):
  """Sum -log softmax at the targets by hand."""
  found = 0.0
  for b, t in zip(*np.nonzero(batch['weights']), strict=True):
    z = np.asarray(logits[b, t], np.float64)
    found += np.log(np.exp(z - z.max()).sum()) + z.max() - z[batch['targets'][b, t]]
  return found


@pytest.mark.parametrize(('name', 'width'), [('gemma2', 1), ('mixtral', 1), ('olmo2', 2)])
def test_a_closed_gate_is_a_layer_less(name, width):
  model, params = make(name)
  batch = rows(padding=False)
  gates = measure.windows(3, width)
  assert gates.shape == (5 - width, 3) and (gates.sum(1) == [*[3 - width] * (4 - width), 3]).all()
  of = measure.losses(model, 'float32', 64, gates)
  one, eight = (total(of, params, batch, n) for n in (1, 8))
  for key in ('nll', 'weight'):
    np.testing.assert_allclose(eight['sums'][key], one['sums'][key], rtol=1e-5)
  assert one['sums']['weight'] == batch['weights'].sum()
  found = []
  for gate in gates:
    small, cfg = slicing.cut(params, model.cfg, {'layers': np.flatnonzero(gate)})
    found.append(nll(logits_of(cfg, small, batch['inputs']), batch))
  np.testing.assert_allclose(one['sums']['nll'], found, rtol=1e-5)
  rise = importance.deletion_scores(one['sums'])
  want = (np.array(found[:-1]) - found[-1]) / batch['weights'].sum()
  np.testing.assert_allclose(rise, want, atol=1e-5)
  scores = {'layers': np.ones(3), 'windows': rise}
  kept = importance.keep(scores, {'layers': 3 - width}, 2)['layers']
  np.testing.assert_array_equal(kept, np.flatnonzero(gates[np.argmin(rise)]))


def test_windows_by_a_task():
  """A task that counts the layers it knows keeps them, though the first window would be next."""
  model, params = make('llama')
  mark = params['blocks']['attn_norm']['scale'][1:, 0]

  def task(layers):
    left, _ = slicing.cut(params, model.cfg, {'layers': layers})
    return float(np.isin(left['blocks']['attn_norm']['scale'][:, 0], mark).sum())

  np.testing.assert_array_equal(importance.best_window(3, 2, task), [1, 2])


@pytest.mark.parametrize('name', ['untied', 'mixtral'])
def test_taylor_scores_beside_a_loop(name):
  model, params = make(name)
  batch = rows(padding=False)
  of = measure.gradients(model, 'float32', 64)
  one, eight = (total(of, params, batch, n)['sums'] for n in (1, 8))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, eight)

  def loss(params):
    out = model.forward(params, batch)
    z = jnp.einsum('btd,vd->btv', out.hidden, params.get('lm_head', params['embedding']))
    return -jnp.take_along_axis(jax.nn.log_softmax(z), batch['targets'][..., None], -1).sum()

  gradient = jax.jit(jax.grad(loss))(params)
  found = importance.taylor_scores(params, one)
  change = jax.tree.map(lambda w, g: np.abs(np.asarray(w * g)), params, gradient)
  mlp, attn, embed = change['blocks']['mlp'], change['blocks']['attn'], np.zeros(24)
  for c in range(24):
    embed[c] = change['embedding'][:, c].sum() + change['final_norm']['scale'][c]
    embed[c] += change['lm_head'][:, c].sum() if 'lm_head' in change else 0
    for block in ('attn_norm', 'mlp_norm'):
      embed[c] += change['blocks'][block]['scale'][:, c].sum()
    embed[c] += sum(attn[n][:, c].sum() for n in ('wq', 'wk', 'wv')) + attn['wo'][..., c].sum()
    embed[c] += attn['bo'][:, c].sum() if 'bo' in attn else 0
    for m in (mlp, mlp.get('shared', {}), mlp.get('experts', {})):
      embed[c] += sum(m[n][..., c, :].sum() for n in ('w_gate', 'w_up', 'w_router') if n in m)
      embed[c] += sum(m[n][..., c].sum() for n in ('w_down', 'b_down') if n in m)
  np.testing.assert_allclose(found['embed'], embed, rtol=1e-3)
  for layer in range(3):
    for h in range(4):
      want = attn['wq'][layer, :, h].sum() + attn['wo'][layer, h].sum()
      want += attn['bq'][layer, h].sum() if 'bq' in attn else 0
      np.testing.assert_allclose(found['heads'][layer, h], want, rtol=1e-3)
    for e in range(4 if 'experts' in mlp else 0):
      of = {n: w[layer, e] for n, w in mlp['experts'].items()}
      want = sum(w.sum() for w in of.values()) + mlp['w_router'][layer, :, e].sum()
      np.testing.assert_allclose(found['experts'][layer, e], want, rtol=1e-3)
      want = of['w_gate'][:, 7].sum() + of['w_up'][:, 7].sum() + of['w_down'][7].sum()
      np.testing.assert_allclose(found['mlp'][layer, e, 7], want, rtol=1e-3)


@pytest.mark.parametrize('name', ['untied', 'gemma3', 'olmo2'])
def test_norms_are_calibrated_by_what_is_kept(name):
  """Beside a loop over tokens at a site; what is silent is sqrt, exactly."""
  model, params = make(name)
  c, batch = model.cfg, rows()
  kept = sets(c, 'embed')

  def ratios(params, devices=1):
    of = measure.shrinkage(model, 'float32', kept['embed'])
    sums = total(of, params, batch, devices)['sums']
    return jax.tree.map(lambda x: x[..., 0] / x[..., 1], sums)

  found = ratios(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, ratios(params, 8))
  if c.norms != 'post':
    x = np.asarray(params['embedding'][batch['inputs']], np.float64)
    x = x * c.embed**0.5 if c.embed_scale else x
    want = []
    for b, t in zip(*np.nonzero(batch['segments']), strict=True):
      mine = (x[b, t, kept['embed']] ** 2).mean() + c.norm_eps * 24 / 16
      want.append(np.sqrt(mine / ((x[b, t] ** 2).mean() + c.norm_eps)))
    np.testing.assert_allclose(found['blocks']['attn_norm']['gain'][0], np.mean(want), rtol=1e-5)
  sites = {p[:-1] for p, _ in flatten(params) if p[-1] == 'scale'}
  assert {p[:-1] for p, _ in flatten(found)} == sites
  small, cfg = slicing.cut(params, c, kept, 'calibrated', found)
  site = 'attn_post_norm' if c.norms == 'post' else 'attn_norm'
  scale, r = np.asarray(params['blocks'][site]['scale']), found['blocks'][site]['gain'][:, None]
  want = ((1 + scale) * r - 1 if c.norm_offset else scale * r)[:, kept['embed']]
  np.testing.assert_allclose(small['blocks'][site]['scale'], want, rtol=1e-5, atol=1e-6)
  silent = masked(params, c, kept)
  exact, same = slicing.cut(silent, c, kept, 'sqrt')
  close, cfg = slicing.cut(silent, c, kept, 'calibrated', ratios(silent))
  assert cfg == same
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), close, exact)
  with pytest.raises(ValueError, match="'calibrated' needs the ratios"):
    slicing.cut(params, c, kept, 'calibrated')


def test_mixing_and_overlap():
  a = {'mlp': np.array([[1.0, 2.0, 3.0], [10.0, 30.0, 20.0]])}
  b = {'mlp': np.array([[300.0, 200.0, 100.0], [0.0, 0.0, 3.0]])}
  found = importance.mix(a, b, 0.25)['mlp']
  want = [[0.75 * 0.5 + 0.25 * 1.5, 1.0, 0.75 * 1.5 + 0.25 * 0.5], [0.375, 1.125, 0.75 + 0.75]]
  np.testing.assert_allclose(found, want)
  for share, end in ((0.0, a), (1.0, b)):
    mixed = importance.keep(importance.mix(a, b, share), {'mlp': 1}, 1)
    np.testing.assert_array_equal(mixed['mlp'], importance.keep(end, {'mlp': 1}, 1)['mlp'])
  assert importance.overlap(np.array([[0, 1], [2, 3]]), np.array([[1, 2], [2, 3]])) == 0.75
