"""Cached generation against full forward passes; sampling; slots; the entry point."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm import models
from slm.models import decode
from slm.models.decoder import unembed
from slm.runs.config import section
from slm.weights import sharding

MODEL = models.build(
  section('model', {
    'name': 'decoder', 'vocab': 29, 'embed': 16, 'num_layers': 2, 'num_heads': 4,
    'num_kv_heads': 2, 'head_dim': 4, 'mlp': 24,
  })
)  # fmt: skip
KEY = jax.random.key(1)
PARAMS = jax.jit(MODEL.init)(KEY)


@jax.jit
def logits_of(ids):
  batch = {'inputs': ids, 'positions': jnp.arange(ids.shape[1])[None], 'segments': ids * 0 + 1}
  return unembed(PARAMS, MODEL.forward(PARAMS, batch))


def slow_greedy(prompt, n):
  """Recompute the whole prefix for every token; what comes after a prefix does not change it."""
  ids = np.zeros(len(prompt) + n, int)
  ids[: len(prompt)] = prompt
  for i in range(len(prompt), len(ids)):
    ids[i] = logits_of(ids[None])[0, i - 1].argmax()
  return ids[len(prompt) :].tolist()


def test_cached_greedy_equals_recomputing_even_when_padded():
  prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8]]
  padded = np.array([[0] * (5 - len(p)) + p for p in prompts])
  mask = np.array([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
  out = decode.generate(MODEL, PARAMS, padded, mask, KEY, max_tokens=7)
  for row, prompt in zip(np.asarray(out.tokens), prompts, strict=True):
    assert row.tolist() == slow_greedy(prompt, 7)
  assert out.lengths.tolist() == [7, 7, 7]


def test_logprobs_are_the_models():
  prompt = jnp.array([[3, 1, 4]])
  out = decode.generate(MODEL, PARAMS, prompt, prompt * 0 + 1, KEY, max_tokens=4)
  ids = jnp.concatenate([prompt, out.tokens], axis=1)
  logits = logits_of(ids)
  want = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, 2:6], out.tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(out.logprobs, want, atol=1e-5)


def test_a_row_stops_at_the_end_id():
  prompt = jnp.array([[3, 1, 4]])
  free = decode.generate(MODEL, PARAMS, prompt, prompt * 0 + 1, KEY, max_tokens=8)
  tokens = free.tokens[0].tolist()
  end = tokens[3]
  first = tokens.index(end)
  for ends in ({end}, {end, 28, max(set(range(28)) - set(tokens))}):
    out = decode.generate(
      MODEL, PARAMS, prompt, prompt * 0 + 1, KEY, max_tokens=8, end=frozenset(ends)
    )
    assert out.lengths[0] == first + 1
    assert out.tokens[0].tolist() == tokens[: first + 1] + [end] * (7 - first)


def test_ids_without_a_token_are_never_chosen():
  """Those beyond the tokenizer's, and gaps in it."""
  prompt = jnp.array([[3, 1, 4], [9, 2, 6]])
  free = decode.generate(MODEL, PARAMS, prompt, prompt * 0 + 1, KEY, max_tokens=8)
  known = np.ones(25, bool)
  known[free.tokens[0, 0]] = False
  for sampler in (
    decode.greedy,
    functools.partial(decode.sampled, temperature=9.0, top_k=28, top_p=1.0),
  ):
    out = decode.generate(
      MODEL, PARAMS, prompt, prompt * 0 + 1, KEY, max_tokens=40, sampler=sampler, known=known
    )
    assert set(np.unique(out.tokens)) <= set(np.flatnonzero(known))
    assert np.isfinite(out.logprobs).all() and len(np.unique(out.tokens)) > 2
  every = decode.generate(
    MODEL, PARAMS, prompt, prompt * 0 + 1, KEY, max_tokens=8, known=np.ones(40, bool)
  )
  np.testing.assert_array_equal(every.tokens, free.tokens)
  np.testing.assert_allclose(every.logprobs, free.logprobs, atol=1e-6)


def test_top_k_and_top_p_cut_the_distribution():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  draw = lambda **kw: {int(decode.sampled(logits, jax.random.key(i), **kw)[0]) for i in range(200)}
  assert draw(temperature=1.0, top_k=2, top_p=1.0) == {0, 1}
  assert draw(temperature=1.0, top_k=0, top_p=0.75) == {0, 1}
  assert draw(temperature=1.0, top_k=0, top_p=0.4) == {0}
  assert draw(temperature=1.0, top_k=0, top_p=1.0) == {0, 1, 2, 3}
  assert draw(temperature=0.01, top_k=0, top_p=1.0) == {0}
  for cold in (1e-6, 1e-40, 5e-324):
    assert draw(temperature=cold, top_k=3, top_p=0.9) == {0}
  assert draw(temperature=1.0, top_k=99, top_p=1.0) == {0, 1, 2, 3}


def test_samples_follow_the_softmax():
  logits = jnp.tile(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), (4000, 1))
  sampler = functools.partial(decode.sampled, temperature=1.0, top_k=0, top_p=1.0)
  counts = np.bincount(sampler(logits, KEY), minlength=3) / 4000
  np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.04)  # 5 standard errors


def test_entry_point_shows_every_run(tiny_config, train_once, tmp_path):
  train_once(tiny_config.to_dict(), tmp_path / 'run')
  command = [sys.executable, '-m', 'slm.generate', f'--run={tmp_path / "run"}']
  done = subprocess.run(
    [*command, '--prompt=the party', '--max_tokens=5'], capture_output=True, text=True, check=True
  )
  assert 'the party' in done.stdout
  bad = subprocess.run([*command, '--cluster=3', '--prompt=x'], capture_output=True, text=True)
  assert bad.returncode == 1
  assert bad.stderr.splitlines()[-1].startswith('error: ')
  assert 'holds one dense model' in bad.stderr


def test_greedy_equals_transformers():
  """Random Llama weights, greedy, cached, batch of two prompts."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  c = MODEL.cfg
  config = transformers.LlamaConfig(
    vocab_size=c.vocab, hidden_size=c.embed, intermediate_size=c.mlp,
    num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
    num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
    tie_word_embeddings=True, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    pad_token_id=0,
  )  # fmt: skip
  other = transformers.LlamaForCausalLM(config).eval()
  tensor = lambda x: torch.tensor(np.asarray(x))
  with torch.no_grad():
    other.model.embed_tokens.weight.copy_(tensor(PARAMS['embedding']))
    other.model.norm.weight.copy_(tensor(PARAMS['final_norm']['scale']))
    for i, layer in enumerate(other.model.layers):
      p = jax.tree.map(lambda x, i=i: x[i], PARAMS['blocks'])
      flat = lambda w: tensor(w).reshape(c.embed, -1).T
      layer.self_attn.q_proj.weight.copy_(flat(p['attn']['wq']))
      layer.self_attn.k_proj.weight.copy_(flat(p['attn']['wk']))
      layer.self_attn.v_proj.weight.copy_(flat(p['attn']['wv']))
      layer.self_attn.o_proj.weight.copy_(tensor(p['attn']['wo']).reshape(-1, c.embed).T)
      layer.mlp.gate_proj.weight.copy_(tensor(p['mlp']['w_gate']).T)
      layer.mlp.up_proj.weight.copy_(tensor(p['mlp']['w_up']).T)
      layer.mlp.down_proj.weight.copy_(tensor(p['mlp']['w_down']).T)
      layer.input_layernorm.weight.copy_(tensor(p['attn_norm']['scale']))
      layer.post_attention_layernorm.weight.copy_(tensor(p['mlp_norm']['scale']))
  prompts = np.array([[3, 1, 4, 1], [9, 2, 6, 5]])
  want = other.generate(
    torch.tensor(prompts), max_new_tokens=20, do_sample=False, attention_mask=torch.ones(2, 4)
  )
  out = decode.generate(MODEL, PARAMS, prompts, prompts * 0 + 1, KEY, max_tokens=20)
  np.testing.assert_array_equal(out.tokens, want[:, 4:].numpy())


def queued(model, params, samples, slots, how=decode.drawn, end=(7,), most=9):
  """Answer prompts of very different lengths in slots and by `generate`."""
  prompts = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5], [8, 9], [7, 9, 3, 2, 3]]
  width = max(map(len, prompts))
  lengths = jnp.array([len(p) for p in prompts])
  right = jnp.array([p + [0] * (width - len(p)) for p in prompts])
  left = jnp.array([[0] * (width - len(p)) + p for p in prompts])
  mask = jnp.arange(width)[None] >= width - lengths[:, None]
  keys = jax.random.split(jax.random.key(3), len(prompts) * samples)
  options = {'max_tokens': most, 'sampler': how, 'end': frozenset(end), 'temperature': 0.9}
  run = jax.jit(functools.partial(decode.answer, model, slots=slots, **options))
  repeat = lambda x: jnp.repeat(x, samples, axis=0)
  expected = decode.generate(model, params, repeat(left), repeat(mask), keys, **options)
  return run(params, right, lengths, keys), expected


@pytest.mark.parametrize(('samples', 'slots'), [(3, 4), (3, 1), (1, 8), (3, 15)])
def test_slots_give_what_waiting_for_the_longest_gives(samples, slots):
  """Whatever their number and so the order, and with answers of one token and of the most."""
  out, expected = queued(MODEL, PARAMS, samples, slots)
  if samples == 3:
    assert {1, 9} <= set(np.asarray(expected.lengths).tolist())
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  np.testing.assert_array_equal(out.lengths, expected.lengths)
  np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-5)


def test_slots_are_greedy_too_and_keep_to_a_window():
  shape = {'layer_types': ('window', 'full'), 'window': 3}
  model = models.build(dataclasses.replace(MODEL.cfg, **shape))
  out, expected = queued(model, PARAMS, 2, 3, decode.greedy)
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  whole, _ = queued(MODEL, PARAMS, 2, 3, decode.greedy)
  assert (out.tokens != whole.tokens).any()  # the window matters


def test_slots_on_several_devices():
  mesh = sharding.make_mesh({'data': 5}, jax.devices()[:5])
  with jax.set_mesh(mesh):
    out, expected = queued(MODEL, PARAMS, 3, 2)
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  np.testing.assert_array_equal(out.lengths, expected.lengths)
