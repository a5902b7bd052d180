"""GGUF files of random models, written as llama.cpp's converter writes them; llama.cpp itself."""

import json
import random
import urllib.request

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
import toy
from tokenizers import models as token_models
from tokenizers import pre_tokenizers, trainers

from slm import models
from slm.interchange import families, weights
from slm.models.config import DecoderConfig
from slm.runs import config
from slm.weights.tree import flatten, unflatten

gguf = pytest.importorskip('gguf')

ARCHITECTURE = {'gemma3_text': 'gemma3'}  # of those with another name in transformers
CHATML = (
  "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIECES = (
  'tide', "don't", "THEY'LL", '12345', '1,000.5', '  ', '\n\n', '\t', '\r\n', 'naïve', '日本語',
  'E\u0301', '\u00e9', '🙂', '①②½', '__init__', 'x=3.14;', ' storm ', '—', 'Ωμέγα', '\u00a0',
  '\u200b', "'s", '#!/bin', '<|im_start|>', '<|im_end|>', '<tool>', '<', '|', 'a' * 30,
)  # fmt: skip


def texts(count, seed=0):
  """Draw texts of words, digits, contractions, spaces, other scripts and special tokens."""
  rng = random.Random(seed)
  draw = lambda i: (' ' if i % 2 else '').join(rng.choices(PIECES, k=rng.randint(1, 12)))
  return [draw(i) for i in range(count)]


def byte_pairs(pre):
  """Train a byte-level tokenizer; returns what a GGUF file holds of it."""
  split = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tok = tokenizers.Tokenizer(token_models.BPE())
  tok.pre_tokenizer = split
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<tool>']
  trainer = trainers.BpeTrainer(
    vocab_size=420, show_progress=False, special_tokens=special,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  )  # fmt: skip
  tok.train_from_iterator(toy.documents(list(toy.TOPICS), 100, 3) + texts(300, 7), trainer)
  saved = json.loads(tok.to_str())['model']
  tokens = sorted(saved['vocab'], key=saved['vocab'].get)
  return {
    'model': 'gpt2', 'pre': pre, 'tokens': tokens, 'merges': [' '.join(m) for m in saved['merges']],
    'token_type': [3, 3, 3, 4] + [1] * (len(tokens) - 4), 'bos_token_id': 1, 'eos_token_id': 2,
    'padding_token_id': 0, 'add_bos_token': pre == 'llama-bpe',
  }  # fmt: skip


def sentencepieces(folder, prefix):
  """Train a SentencePiece model; returns what a GGUF file holds of it, and the model."""
  file = folder / f'text-{prefix}.txt'
  file.write_text('\n'.join(toy.documents(list(toy.TOPICS), 200, 3)))
  sentencepiece.SentencePieceTrainer.train(
    input=str(file), model_prefix=str(folder / f'm-{prefix}'), model_type='bpe', vocab_size=440,
    byte_fallback=True, normalization_rule_name='identity', add_dummy_prefix=prefix,
    remove_extra_whitespaces=False, control_symbols=['<|im_start|>', '<|im_end|>'],
    user_defined_symbols=['<tool>'], minloglevel=2,
  )  # fmt: skip
  m = sentencepiece.SentencePieceProcessor(model_file=str(folder / f'm-{prefix}.model'))
  kind = lambda i: (
    2 if m.is_unknown(i) else 3 if m.is_control(i) else 6 if m.is_byte(i)
    else 4 if m.id_to_piece(i) == '<tool>' else 1
  )  # fmt: skip
  ids = range(m.get_piece_size())
  return {
    'model': 'llama', 'pre': 'default', 'tokens': [m.id_to_piece(i) for i in ids],
    'scores': [m.get_score(i) for i in ids], 'token_type': [kind(i) for i in ids],
    'bos_token_id': 1, 'eos_token_id': 2, 'unknown_token_id': 0, 'add_space_prefix': prefix,
  }, m  # fmt: skip


def random_model(family, vocab, seed=0, **changes):
  """Return (config, config.json, weights) of a small model, norms and biases random too."""
  shape = {
    'vocab': vocab, 'embed': 64, 'num_layers': 3, 'num_heads': 4, 'num_kv_heads': 2,
    'head_dim': 16, 'mlp': 96, **families.FAMILIES[family].fixed, **changes,
  }  # fmt: skip
  cfg = DecoderConfig(**shape)
  hf = families.write(cfg, family, {'model_type': family, 'max_position_embeddings': 512})
  model = models.build(config.section('model', {'name': 'decoder', **shape}))
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    scale = {'embedding': 0.4, 'lm_head': 0.4}.get(path[0], 0.15)
    middle = 1.0 if path[-1].endswith(('scale', 'scale_all')) and not cfg.norm_offset else 0.0
    return middle + scale * rng.standard_normal(leaf.shape, np.float32)

  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return cfg, hf, unflatten({path: draw(path, leaf) for path, leaf in flatten(shapes)})


def write(path, family, cfg, hf, params, tokenizer, kind='F32', extra=None):
  """Write a GGUF file: metadata, tokenizer, and tensors quantised to `kind`."""
  name = ARCHITECTURE.get(family, family)
  w = gguf.GGUFWriter(path, name)
  w.add_context_length(hf['max_position_embeddings'])
  w.add_embedding_length(cfg.embed)
  w.add_block_count(cfg.num_layers)
  w.add_feed_forward_length(cfg.mlp)
  w.add_head_count(cfg.num_heads)
  w.add_head_count_kv(cfg.num_kv_heads)
  w.add_key_length(cfg.head_dim)
  w.add_value_length(cfg.head_dim)
  w.add_rope_dimension_count(cfg.head_dim)
  w.add_layer_norm_rms_eps(cfg.norm_eps)
  w.add_rope_freq_base(cfg.rope_theta)
  w.add_vocab_size(cfg.vocab)
  if cfg.window:
    w.add_sliding_window(cfg.window)
  if cfg.attention_cap:
    w.add_attn_logit_softcapping(cfg.attention_cap)
  if cfg.logit_cap:
    w.add_final_logit_softcapping(cfg.logit_cap)
  if cfg.rope == 'linear':
    w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    w.add_rope_scaling_factor(cfg.rope_factor)
  for key, value in (extra or {}).items():
    {int: w.add_uint32, str: w.add_string, float: w.add_float32}[type(value)](key, value)
  _write_tokenizer(w, tokenizer)
  for tensor, data in tensors(family, cfg, params).items():
    _write_tensor(w, tensor, data, kind)
  if cfg.rope == 'llama3':
    _write_tensor(w, 'rope_freqs.weight', _llama3_factors(cfg), 'F32')
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return path


def _write_tokenizer(w, tokenizer):
  arrays = {
    'tokens': w.add_token_list, 'scores': w.add_token_scores, 'token_type': w.add_token_types,
    'merges': w.add_token_merges,
  }  # fmt: skip
  for key, value in tokenizer.items():
    if key in arrays:
      arrays[key](value)
    elif isinstance(value, bool):
      w.add_bool(f'tokenizer.ggml.{key}', value)
    elif isinstance(value, int):
      w.add_uint32(f'tokenizer.ggml.{key}', value)
    else:
      w.add_string(f'tokenizer.ggml.{key}', value)
  if tokenizer:
    w.add_chat_template(CHATML)


def tensors(family, cfg, params):
  """Return every tensor under llama.cpp's name, changed as its converter does."""
  name = ARCHITECTURE.get(family, family)
  arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name)
  theirs = gguf.get_tensor_name_map(arch, cfg.num_layers)
  made = {}
  for tensor, _, make in weights.tensors_of(params, cfg, family, np.float32):
    base, suffix = tensor.rsplit('.', 1)
    data = make()
    if family.startswith('gemma') and base.endswith('norm'):
      data = data + 1
    for part, heads in (('q_proj', cfg.num_heads), ('k_proj', cfg.num_kv_heads)):
      if family == 'llama' and base.endswith(part):
        split = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
        data = split.swapaxes(1, 2).reshape(data.shape)
    made[f'{theirs.get_name(base)}.{suffix}'] = np.ascontiguousarray(data)
  return made


def _write_tensor(w, name, data, kind):
  kind = getattr(gguf.GGMLQuantizationType, kind)
  if data.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
    w.add_tensor(name, data.astype(np.float32))
  elif 'K' in kind.name:
    w.add_tensor(name, random_blocks(data.shape, kind), raw_dtype=kind)
  else:
    w.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)


# Where the half-precision scales of a block of K-quants lie: the library only reads those types.
SCALES = {'Q2_K': (80, 82), 'Q3_K': (108,), 'Q4_K': (0, 2), 'Q5_K': (0, 2), 'Q6_K': (208,)}


def random_blocks(shape, kind):
  """Draw blocks of a type that the library does not write: any bits are numbers."""
  size, width = gguf.GGML_QUANT_SIZES[kind]
  rng = np.random.default_rng(shape[0])
  blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, width), np.uint8)
  for at in SCALES[kind.name]:
    scale = np.float16(4e-4 if kind.name[1] in '245' else 1e-4)
    blocks[..., at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
  return blocks.reshape(*shape[:-1], -1)


def _llama3_factors(cfg):
  """Return the factors of Llama 3.1's frequencies, as llama.cpp's converter computes them."""
  made = []
  for i in range(0, cfg.head_dim, 2):
    wavelength = 2 * np.pi * cfg.rope_theta ** (i / cfg.head_dim)
    if wavelength < cfg.rope_context / cfg.rope_high:
      made.append(1)
    elif wavelength > cfg.rope_context / cfg.rope_low:
      made.append(cfg.rope_factor)
    else:
      smooth = cfg.rope_context / wavelength - cfg.rope_low
      smooth /= cfg.rope_high - cfg.rope_low
      made.append(1 / ((1 - smooth) / cfg.rope_factor + smooth))
  return np.array(made, np.float32)


def llama_cpp(path):
  """Return a function that asks llama.cpp's own server, which computes in float32 where it can."""
  xllamacpp = pytest.importorskip('xllamacpp')
  p = xllamacpp.CommonParams()
  p.model.path = str(path)
  p.n_ctx, p.warmup, p.verbosity = 512, False, 0
  p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
  p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
  p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
  server = xllamacpp.Server(p)

  def ask(route, **body):
    url, data = server.listening_address + route, json.dumps(body).encode()
    request = urllib.request.Request(url, data, {'Content-Type': 'application/json'})
    with urllib.request.urlopen(request) as answer:
      return json.load(answer)

  return ask
