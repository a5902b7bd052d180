"""Importance: sums beside a plain loop, exact over splits and devices, and what is kept of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_prune import SHAPES, make

from slm import models
from slm.models import moe, observe
from slm.pruning import importance, measure, slicing
from slm.runs.config import section
from slm.weights import sharding


def rows(count=8, t=11, seed=0, padding=True):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(4, t + 1, count) if padding else np.full(count, t)
  segments = (np.arange(t) < lengths[:, None]).astype(np.int32)
  positions = np.broadcast_to(np.arange(t, dtype=np.int32), (count, t))
  inputs = rng.integers(0, 61, (count, t)).astype(np.int32)
  targets = rng.integers(0, 61, (count, t)).astype(np.int32)
  batch = {'inputs': inputs, 'positions': positions, 'segments': segments, 'targets': targets}
  return batch | {'weights': (segments > 0).astype(np.float32)}


def summed(model, params, batches):
  one = measure.summing(measure.activations(model, 'float32'))
  return functools.reduce(measure.merge, (one(params, batch) for batch in batches), {})


def test_tokens_are_aggregated_before_sequences():
  """With more tokens than sequences the wrong order gives another score (Minitron, §2.2)."""
  rng = np.random.default_rng(0)
  x, real = rng.normal(size=(3, 7, 5)) ** 3, np.ones((3, 7), bool)
  real[1, 4:] = real[2, 2:] = False
  expected = np.zeros((3, 2, 5))
  for c in range(5):
    for b in range(3):
      values = [x[b, s, c] for s in range(7) if real[b, s]]
      mean = sum(abs(v) for v in values) / len(values)
      l2 = np.sqrt(sum(v * v for v in values))
      centre = sum(values) / len(values)
      var = sum((v - centre) ** 2 for v in values) / len(values)
      for a, u in enumerate((mean, l2, var)):
        expected[a, 0, c] += u
        expected[a, 1, c] += u * u
  found = np.asarray(observe.moments(jnp.asarray(x, jnp.float32), jnp.asarray(real)))
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  u = np.array([[np.abs(x[b, real[b], c]).mean() for c in range(5)] for b in range(3)])
  for sequences, want in (('mean', u.mean(0)), ('l2', np.sqrt((u**2).sum(0))), ('var', u.var(0))):
    got = importance.over_sequences(expected, 3, 'mean', sequences)
    np.testing.assert_allclose(got, want, rtol=1e-6)
  other_way = np.asarray(
    observe.moments(jnp.asarray(x.swapaxes(0, 1), jnp.float32), jnp.asarray(real.T))
  )
  assert np.abs(other_way[0, 1] - expected[0, 1]).max() > 0.1


def by_hand(params, c, batch):
  """Compute a pre-norm model in NumPy: what each layer's four sites and its turn see."""
  x, found = np.asarray(params['embedding'])[batch['inputs']].astype(np.float64), []
  rms = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * np.asarray(w)
  t, half = x.shape[1], c.head_dim // 2
  angle = np.arange(t)[:, None] * c.rope_theta ** (-np.arange(half) / half)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]  # [t,1,half]

  def rope(x):
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

  for i in range(c.num_layers):
    w = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i], np.float64), params['blocks'])
    start, h = x, rms(x, w['attn_norm']['scale'])
    q, k, v = (np.einsum('btd,dhc->bthc', h, w['attn'][n]) for n in ('wq', 'wk', 'wv'))
    k, v = (np.repeat(y, c.num_heads // c.num_kv_heads, axis=2) for y in (rope(k), v))
    scores = np.einsum('bthc,bshc->bhts', rope(q), k) / np.sqrt(c.head_dim)
    scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    heads = np.einsum('bhts,bshc->bthc', p / p.sum(-1, keepdims=True), v)
    x = x + np.einsum('bthc,hcd->btd', heads, w['attn']['wo'])
    inner = rms(x, w['mlp_norm']['scale'])
    gate, up = (inner @ w['mlp'][n] for n in ('w_gate', 'w_up'))
    hidden = gate / (1 + np.exp(-gate)) * up
    x = x + hidden @ w['mlp']['w_down']
    cosine = (start * x).sum(-1) / np.linalg.norm(start, axis=-1) / np.linalg.norm(x, axis=-1)
    found.append({'attn_in': h, 'mlp_in': inner, 'heads': heads, 'mlp': hidden, 'turn': cosine})
  return found


def test_sites_are_what_the_notes_say():
  """What norms give, what the output projections take, and how far each layer turns the stream."""
  model, params = make('llama')
  batch, c = rows(), model.cfg
  found, real = jax.jit(model.observe)(params, batch)[1]['blocks'], batch['segments'] > 0
  sites = {'attn_in': found['attn_in'], 'mlp_in': found['mlp_in']}
  sites |= {'heads': found['attn']['heads'], 'mlp': found['mlp']['mlp']}
  for i, want in enumerate(by_hand(params, c, batch)):
    for name, got in sites.items():
      flat = jnp.asarray(want[name], jnp.float32)
      np.testing.assert_allclose(got[i], observe.moments(flat, real), rtol=2e-3, atol=1e-6)
    turned = 1 - want['turn'][real]
    np.testing.assert_allclose(found['turn'][i], [turned.sum(), turned.size], rtol=2e-3)
  shapes = jax.tree.map(jnp.shape, found)
  assert shapes == {
    'attn_in': (3, 3, 2, 24), 'mlp_in': (3, 3, 2, 24), 'turn': (3, 2),
    'attn': {'heads': (3, 3, 2, 4, 8)}, 'mlp': {'mlp': (3, 3, 2, 20)},
  }  # fmt: skip


def test_block_influence_is_the_cosine():
  model, params = make('llama')
  batch = rows(padding=False)
  idle = lambda path, w: w.at[1].set(0.0) if path[-1].key in ('wo', 'w_down') else w
  silent = jax.tree_util.tree_map_with_path(idle, params)
  stats = summed(model, silent, [batch])
  influence = importance.activation_scores(stats)['layers']
  assert influence[1] == pytest.approx(0.0, abs=1e-5) and influence[0] > 0.01


@pytest.mark.parametrize('name', SHAPES)
def test_stats_add_up_over_batches_and_devices(name):
  model, params = make(name)
  batch = rows(count=16)
  one = functools.partial(measure.summing(measure.activations(model, 'float32')), params)
  add = lambda stats: functools.reduce(measure.merge, stats, {})
  whole = one(batch)
  parts = [one({n: x[i : i + 4] for n, x in batch.items()}) for i in range(0, 16, 4)]
  halves = [add(parts[i : i + 2]) for i in (0, 2)]
  mesh = sharding.make_mesh({'data': 8})
  with jax.set_mesh(mesh):
    spread = one(jax.device_put(batch, sharding.batch_sharding(mesh)))
  for other in (add(parts), add(halves), spread):
    assert (other['count'], other['tokens']) == (16, int(batch['segments'].sum()))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    jax.tree.map(close, other['sums'], whole['sums'])


def test_observing_changes_nothing():
  model, params = make('gemma2')
  batch = rows()
  out, _ = jax.jit(model.observe)(params, batch)
  np.testing.assert_array_equal(out.hidden, jax.jit(model.forward)(params, batch).hidden)


def test_scores_find_what_was_planted():
  """Neurons, heads and channels that are made loud are kept."""
  model, params = make('llama')
  loud = jax.tree.map(lambda x: x, params)
  loud['blocks']['mlp']['w_up'] = params['blocks']['mlp']['w_up'].at[:, :, 5:9].multiply(9.0)
  loud['blocks']['attn']['wv'] = params['blocks']['attn']['wv'] * 1.0
  loud['embedding'] = params['embedding'].at[:, 3:7].multiply(30.0)
  stats = summed(model, loud, [rows()])
  scores = importance.activation_scores(stats)
  kept = importance.keep(scores, {'mlp': 4, 'embed': 4, 'heads': 2}, model.cfg.num_kv_heads)
  np.testing.assert_array_equal(kept['mlp'], np.tile(np.arange(5, 9), (3, 1)))
  np.testing.assert_array_equal(kept['embed'], np.arange(3, 7))
  assert kept['heads'].shape == (3, 2) and (kept['heads'] // 2 == [0, 1]).all()
  slicing.check(model.cfg, kept)
  magnitude = importance.keep(importance.weight_scores(loud), {'mlp': 4}, 2)['mlp']
  np.testing.assert_array_equal(magnitude, kept['mlp'])


def test_key_value_heads_go_by_the_sum_of_their_query_heads():
  rng = np.random.default_rng(0)
  score = rng.random((3, 8))  # 4 groups of 2
  kept = importance.keep({'heads': score}, {'kv_heads': 2, 'heads': 2}, 4)
  for layer in range(3):
    best = np.sort(np.argsort([-score[layer, 2 * g : 2 * g + 2].sum() for g in range(4)])[:2])
    np.testing.assert_array_equal(kept['kv_heads'][layer], best)
    heads = [2 * g + int(score[layer, 2 * g + 1] > score[layer, 2 * g]) for g in best]
    np.testing.assert_array_equal(kept['heads'][layer], heads)
  whole = importance.keep({'heads': score}, {'kv_heads': 2, 'heads': 4}, 4)
  np.testing.assert_array_equal(whole['heads'] // 2, np.repeat(whole['kv_heads'], 2, axis=1))
  assert 'kv_heads' not in importance.keep({'heads': score}, {'heads': 4}, 4)


def test_weight_scores_are_sums_over_the_axis_table():
  model, params = make('untied')
  mlp, attn = params['blocks']['mlp'], params['blocks']['attn']
  found = importance.weight_scores(params)
  want = sum((mlp[n] ** 2).sum(1 if n != 'w_down' else 2) for n in ('w_gate', 'w_up', 'w_down'))
  np.testing.assert_allclose(found['mlp'], want, rtol=1e-5)
  heads = (attn['wq'] ** 2).sum((1, 3)) + (attn['wo'] ** 2).sum((2, 3))
  np.testing.assert_allclose(found['heads'], heads, rtol=1e-5)
  assert found['embed'].shape == (24,)


def test_routed_experts_are_what_a_loop_says():
  """Gate x ||output|| and |hidden| over the tokens sent to each expert, by token, in NumPy."""
  rng = np.random.default_rng(0)
  x, real = rng.normal(size=(3, 7, 6)), rng.random((3, 7)) < 0.8
  real[2] = [True] + [False] * 6  # so that some expert is reached by fewer sequences
  w_gate, w_up, w_down = (rng.normal(size=s) for s in ((4, 6, 5), (4, 6, 5), (4, 5, 6)))
  weights, ids, _ = moe.route(jnp.asarray(x), jnp.asarray(rng.normal(size=(6, 4))), 2)
  did, neurons = np.zeros((4, 3)), np.zeros((4, 3, 2, 5))
  for e in range(4):
    for b in range(3):
      hidden = []
      for t in range(7):
        if real[b, t] and e in ids[b, t]:
          gate = float(weights[b, t, list(ids[b, t]).index(e)])
          g = x[b, t] @ w_gate[e]
          hidden.append(g / (1 + np.exp(-g)) * (x[b, t] @ w_up[e]))
          did[e, :2] += gate * np.linalg.norm(hidden[-1] @ w_down[e]), 1
      if hidden:
        did[e, 2] += 1
        h = np.array(hidden)
        u = np.stack([np.abs(h).mean(0), np.sqrt((h**2).sum(0)), h.var(0)])
        neurons[e] += np.stack([u, u**2], 1)
  found = moe.expert_statistics(x, weights, ids, real, (w_gate, w_up, w_down), 'silu')
  np.testing.assert_allclose(found['experts'], did, rtol=1e-4)
  np.testing.assert_allclose(found['mlp'], neurons, rtol=1e-3, atol=1e-5)
  one = lambda x: np.asarray(x, np.float64)[None]
  sums = {'attn': {'heads': np.ones((1, 3, 2, 1, 1))}, 'turn': np.ones((1, 2))}
  sums |= dict.fromkeys(('attn_in', 'mlp_in'), np.ones((1, 3, 2, 1)))
  sums['mlp'] = {'routed': jax.tree.map(one, {'experts': did, 'mlp': neurons})}
  scores = importance.activation_scores({'sums': sums, 'count': 3, 'tokens': 1}, 'mean', 'mean')
  np.testing.assert_allclose(scores['experts'][0], did[:, 0] / did[:, 1])
  np.testing.assert_allclose(scores['mlp'][0], neurons[:, 0, 0] / did[:, 2:])


def test_experts_are_scored_alike_by_both_dispatches_and_cut():
  model, params = make('mixtral')
  other = models.build(
    section('model', {'name': 'decoder', **dataclasses.asdict(model.cfg), 'dispatch': 'ragged'})
  )
  stats = [summed(m, params, [rows()]) for m in (model, other)]
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
  jax.tree.map(close, *(s['sums'] for s in stats))
  scores = importance.activation_scores(stats[0])
  others = ('embed', 'heads')
  shapes = {axis: score.shape for axis, score in scores.items() if axis not in others}
  want = {'experts': (3, 4), 'mlp': (3, 4, 20), 'shared_mlp': (3, 6)}
  assert shapes == {'layers': (3,), **want}
  sent = stats[0]['sums']['mlp']['routed']['experts'][..., 1].sum(-1)
  np.testing.assert_array_equal(sent, [2 * stats[0]['tokens']] * 3)
  sizes = {'experts': 3, 'mlp': 8, 'shared_mlp': 4}
  for found in (scores, importance.weight_scores(params)):
    assert want.items() <= {axis: score.shape for axis, score in found.items()}.items()
    _, cfg = slicing.cut(params, model.cfg, importance.keep(found, sizes, 2))
    assert (cfg.num_experts, cfg.mlp, cfg.shared_mlp) == (3, 8, 4)
  with pytest.raises(ValueError, match='1 experts are fewer than the 2'):
    slicing.cut(params, model.cfg, importance.keep(scores, {'experts': 1}, 2))


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'mlp': 21}, 'mlp: expected 1 to 20, found 21'),
    ({'heads': 3}, '3 heads do not share 2 key-value heads'),
    ({'kv_heads': 1}, 'kv_heads: expected a size of heads beside it'),
    ({'kv_heads': 3, 'heads': 3}, 'kv_heads: expected 1 to 2, found 3'),
    ({'depth': 2}, "no scores for 'depth'"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
  model, params = make('llama')
  scores = importance.weight_scores(params)
  with pytest.raises(ValueError, match=message):
    importance.keep(scores, sizes, model.cfg.num_kv_heads)
  drawn = importance.random_scores(scores, 3)
  assert {a: x.shape for a, x in drawn.items()} == {a: x.shape for a, x in scores.items()}
