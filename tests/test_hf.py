"""Models of `transformers` in and out: identical bytes, equal logits, refusals by name."""

import collections
import contextlib
import copy
import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import toy
from test_tokenizer import huggingface_file

from slm.data import prepare, settings, tokenizer
from slm.inference import completion
from slm.interchange import card, convert, families, tokenizer_files, verify, weights
from slm.models import decode
from slm.models.config import DecoderConfig
from slm.pruning import commands
from slm.runs import ledger, load, rundir
from slm.training import loop
from slm.weights import sharding

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

# Odd sizes: head_dim is not hidden / heads, the vocabulary no multiple of anything.
SMALL = {
  'vocab_size': 101, 'hidden_size': 48, 'intermediate_size': 72, 'num_hidden_layers': 3,
  'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 16, 'rms_norm_eps': 1e-5,
  'max_position_embeddings': 1024, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0,
  'initializer_range': 0.2,
}  # fmt: skip
LLAMA3 = {
  'rope_type': 'llama3', 'rope_theta': 5000.0, 'factor': 8.0, 'low_freq_factor': 1.0,
  'high_freq_factor': 4.0, 'original_max_position_embeddings': 128,
}  # fmt: skip
LINEAR = {
  'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
}
MOE = {'num_experts': 6, 'num_experts_per_tok': 2}
CASES = {
  'llama2': ('Llama', {'num_key_value_heads': 4, 'head_dim': 12}),
  'llama3': ('Llama', {'rope_parameters': LLAMA3, 'tie_word_embeddings': True}),
  'llama_bias': ('Llama', {'attention_bias': True, 'mlp_bias': True, 'num_key_value_heads': 1}),
  'mistral': ('Mistral', {'sliding_window': 24, 'hidden_size': 40}),
  'mistral_full': ('Mistral', {'sliding_window': None}),
  'llama_gqa8': ('Llama', {'num_attention_heads': 16, 'num_key_value_heads': 2, 'head_dim': 10}),
  'qwen2': ('Qwen2', {}),
  'qwen2_window': (
    'Qwen2',
    {'use_sliding_window': True, 'sliding_window': 20, 'max_window_layers': 1, 'head_dim': 12},
  ),
  'qwen3': ('Qwen3', {'hidden_size': 40, 'tie_word_embeddings': True}),
  'qwen3_bias': ('Qwen3', {'attention_bias': True, 'num_key_value_heads': 4}),
  'smollm2': ('Llama', {'num_attention_heads': 8, 'num_key_value_heads': 8, 'head_dim': 6}),
  'smollm3': (
    'SmolLM3', {'num_hidden_layers': 5, 'no_rope_layer_interval': 2}
  ),
  'gemma2': ('Gemma2', {'sliding_window': 16, 'query_pre_attn_scalar': 24}),
  'gemma2_mha': ('Gemma2', {'num_key_value_heads': 4, 'head_dim': 20, 'vocab_size': 99}),
  'gemma3': (
    'Gemma3Text',
    {'sliding_window': 16, 'num_hidden_layers': 7, 'query_pre_attn_scalar': 24,
     'rope_parameters': LINEAR},
  ),
  'olmo2': ('Olmo2', {}),
  'olmo2_mha': ('Olmo2', {'num_key_value_heads': 4, 'head_dim': 12, 'tie_word_embeddings': True}),
  'mixtral': ('Mixtral', {'num_local_experts': 5, 'num_experts_per_tok': 2}),
  'olmoe': ('Olmoe', {**MOE, 'head_dim': 12}),
  'qwen3_moe_window': (
    'Qwen3Moe',
    {**MOE, 'moe_intermediate_size': 40, 'use_sliding_window': True, 'sliding_window': 16},
  ),
  'qwen3_moe': (
    'Qwen3Moe', {**MOE, 'moe_intermediate_size': 40, 'norm_topk_prob': True}
  ),
}  # fmt: skip


@pytest.fixture(scope='session')
def directories(tmp_path_factory):
  """Make the model of a case once: every weight random, norms and biases too."""
  made = {}

  def make(case, dtype='float32', **save):
    key = (case, dtype, *save.items())
    if key not in made:
      name, changes = CASES[case]
      torch.manual_seed(len(made))
      config = getattr(transformers, f'{name}Config')(**{**SMALL, **changes})
      architecture = config.model_type
      model = transformers.AutoModelForCausalLM.from_config(config)
      for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
      path = tmp_path_factory.mktemp(architecture) / 'model'
      model.to(getattr(torch, dtype)).save_pretrained(path, **save)
      made[key] = path
    return made[key]

  return make


def tensors(path):
  with contextlib.ExitStack() as stack:
    opened = weights.Tensors(path, stack)
    return {n: (opened.dtype(n), opened.read(n)) for n in opened.files}


@pytest.mark.parametrize('case', CASES)
def test_logits_equal_those_of_transformers(case, directories, capsys):
  """Texts of 3, 64 and 600 tokens, and a batch padded on the left."""
  worst, shown = verify.verify([directories(case)], 1e-4), capsys.readouterr().out
  assert worst < 1e-4 and shown.count('%  ok\n') == 4, shown


@pytest.mark.parametrize(
  ('case', 'dtype'),
  [*((c, 'bfloat16') for c in CASES), *((c, 'float32') for c in ('llama3', 'gemma2', 'mixtral'))],
)
def test_in_and_out_again_are_the_same_bytes(case, dtype, directories, tmp_path):
  source = directories(case, dtype)
  convert.import_model(source, tmp_path / 'run')
  lineage = convert.export_model(tmp_path / 'run', tmp_path / 'out')
  assert lineage['dtype'] == dtype
  before, after = tensors(source), tensors(tmp_path / 'out')
  assert before.keys() == after.keys()
  for name, (kind, w) in before.items():
    assert after[name][0] == kind and after[name][1].tobytes() == w.tobytes(), name
  old, new = (transformers.AutoConfig.from_pretrained(p) for p in (source, tmp_path / 'out'))
  actual = {k: v for k, v in new.to_dict().items() if k in old.to_dict()}
  expected = old.to_dict()
  for key in ('_name_or_path', 'transformers_version', 'torch_dtype', 'dtype'):
    actual.pop(key, None)
    expected.pop(key, None)
  assert actual == expected


@pytest.mark.parametrize('case', ['gemma3', 'mixtral', 'qwen3'])
def test_each_device_gets_its_part(case, directories, monkeypatch):
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 4})
  alone = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  (_, spread, *_), (_, whole, *_) = (convert.read(directories(case), m) for m in (mesh, alone))
  jax.tree.map(np.testing.assert_array_equal, spread, whole)
  w = spread['blocks']['attn']['wq']
  assert w.addressable_shards[0].data.size == w.size // 4
  reads = collections.Counter()
  read = weights.Tensors.read
  monkeypatch.setattr(weights.Tensors, 'read', lambda self, n: reads.update([n]) or read(self, n))
  convert.read(directories(case), mesh)
  assert set(reads.values()) == {1}  # however many devices take a part


def test_several_files_in_and_out(directories, tmp_path):
  source = directories('qwen3', max_shard_size='20KB')
  assert len(list(source.glob('*.safetensors'))) > 2
  convert.import_model(source, tmp_path / 'run')
  convert.export_model(tmp_path / 'run', tmp_path / 'out', shard_bytes=20_000)
  before, after = tensors(source), tensors(tmp_path / 'out')
  assert {n: w.tobytes() for n, (_, w) in before.items()} == {
    n: w.tobytes() for n, (_, w) in after.items()
  }
  index = json.loads((tmp_path / 'out' / weights.INDEX).read_text())
  files = {p.name for p in (tmp_path / 'out').glob('*.safetensors')}
  assert set(index['weight_map'].values()) == files and len(files) > 2
  assert index['metadata']['total_parameters'] == sum(w.size for _, w in before.values())
  assert verify.verify([source, tmp_path / 'out'], 1e-4) < 1e-4


def edit(path, **changes):
  config = json.loads((path / 'config.json').read_text())
  (path / 'config.json').write_text(json.dumps({**config, **changes}))


def test_configs_of_transformers_4_mean_the_same(directories, tmp_path):
  """They say rope_theta, rope_scaling and torch_dtype where transformers 5 has rope_parameters."""
  for case in ('llama3', 'gemma3'):
    path = tmp_path / case
    shutil.copytree(directories(case), path)
    _, shape = convert.read_config(path)
    config = json.loads((path / 'config.json').read_text())
    rope = config.pop('rope_parameters')
    if case == 'gemma3':
      config['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
      config['sliding_window_pattern'] = 6
      rope = rope['full_attention']
      del config['layer_types']
    config['rope_theta'] = rope.pop('rope_theta')
    config['rope_scaling'] = rope
    config['torch_dtype'] = config.pop('dtype')
    (path / 'config.json').write_text(json.dumps(config))
    assert convert.read_config(path)[1] == shape
    assert verify.verify([path], 1e-4) < 1e-4  # and transformers reads that dialect alike
    family, written = families.find(shape, config)
    assert written['rope_theta'] == written.get('rope_parameters', {}).get(
      'rope_theta', written['rope_parameters'].get('full_attention', {}).get('rope_theta')
    )
    assert family == config['model_type']


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model_type': 'gpt2'}, "model_type 'gpt2': expected one of llama"),
    ({'hidden_act': 'relu'}, "hidden_act='relu': expected one of silu"),
    ({'quantization_config': {'bits': 4}}, 'quantization_config='),
    ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1.0}}, "rope_type 'yarn'"),
    ({'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 1.0}}, "no key 'factor'"),
    ({'rope_parameters': None, 'rope_scaling': {'rope_type': 'linear'}}, "no key 'factor'"),
    ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
    ({'rope_parameters': {'rope_theta': None}}, 'rope_theta: expected a number, found None'),
    ({'model_type': 'smollm3', 'no_rope_layers': [1]}, 'no_rope_layers: expected 3 of them'),
    ({'num_attention_heads': 3}, 'num_heads=3 is not a multiple'),
    ({'hidden_size': 32}, 'expected shape (48, 32), found (48, 48)'),
    ({'num_hidden_layers': 4}, 'model.layers.3'),
    ({'num_hidden_layers': 2}, 'not part of llama (9 such tensors)'),
    ({'attention_bias': True}, 'missing'),
    ({'tie_word_embeddings': True}, 'lm_head.weight: differs from the embedding'),
    ({'hidden_size': 48.0}, 'model.embed: expected a whole number, at least 1, found 48.0'),
    ({'num_attention_heads': 0}, 'model.num_heads: expected a whole number, at least 1, found 0'),
    ({'rms_norm_eps': None}, 'model.norm_eps: expected a number above 0, found None'),
  ],
)
def test_what_cannot_be_read_is_refused_by_name(changes, message, directories, tmp_path):
  path = tmp_path / 'model'
  shutil.copytree(directories('llama2'), path)
  edit(path, **changes)
  with pytest.raises(ValueError, match=re.escape(message)) as e:
    convert.import_model(path, tmp_path / 'run')
  assert str(path) in str(e.value) and '\n' not in str(e.value)
  assert not (tmp_path / 'run' / 'result.json').exists()


def test_damaged_directories_are_refused_by_name(directories, tmp_path):
  path = tmp_path / 'model'
  shutil.copytree(directories('qwen3', max_shard_size='20KB'), path)
  refused = lambda message: pytest.raises(ValueError, match=message)
  file = sorted(path.glob('*.safetensors'))[1]
  whole = file.read_bytes()
  file.write_bytes(whole[:-9])
  with refused(f'{file.name}: truncated or not safetensors'):
    convert.import_model(path, tmp_path / 'run')
  file.unlink()
  with refused(f'{file.name}: no such file'):
    convert.import_model(path, tmp_path / 'run')
  file.write_bytes(whole)
  arrays = safetensors.numpy.load_file(file)
  safetensors.numpy.save_file(dict(list(arrays.items())[1:]), file)
  with refused('lacks .* which model.safetensors.index.json says'):
    convert.import_model(path, tmp_path / 'run')
  for text, message in (
    ('{', 'truncated or damaged'),
    ('[]', 'expected weight_map'),
    ('{"weight_map": ["a"]}', 'expected weight_map'),
    ('{"weight_map": {"a": "../other/model.safetensors"}}', 'expected a file of its own'),
    ('{"weight_map": {"a": "/else/model.safetensors"}}', 'expected a file of its own'),
  ):
    (path / weights.INDEX).write_text(text)
    with refused(f'model.safetensors.index.json: .*{message}'):
      convert.import_model(path, tmp_path / 'run')
  safetensors.numpy.save_file({}, path / 'model.safetensors')
  with refused('model.safetensors holds no tensor'):
    convert.import_model(path, tmp_path / 'run')
  (path / 'config.json').write_text('[]')
  with refused('config.json: expected an object'):
    convert.import_model(path, tmp_path / 'run')
  with refused('holds no config.json'):
    convert.import_model(tmp_path, tmp_path / 'run')


def transformers_own(hf):
  """Return config.json as transformers completes it; None where it refuses."""
  hf = copy.deepcopy(hf)
  family = type(transformers.AutoConfig.for_model(hf.pop('model_type')))
  try:
    return family.from_dict(hf).to_dict()
  except Exception:  # noqa: BLE001 (its validators raise classes of their own)
    return None


def shape_of(hf):
  """Return the shape that is read of a config, or why there is none."""
  try:
    return DecoderConfig(**families.read(hf))
  except ValueError as e:
    return str(e)


def check_defaults(hf):
  """Compare what is read of a config with what is read of the same one written in full."""
  full = transformers_own(hf)
  if full is None:
    return False
  assert shape_of(hf) == shape_of(full), hf
  kept = (*families.TOKEN_IDS, 'max_position_embeddings', 'initializer_range')
  ours = families.resolve(hf)
  assert [ours[key] for key in kept] == [full[key] for key in kept], hf
  return True


@pytest.mark.parametrize('case', CASES)
def test_every_key_has_the_default_of_transformers(case):
  """Of a config each key is left out in turn, and once more without what follows from others."""
  name, changes = CASES[case]
  hf = getattr(transformers, f'{name}Config')(**{**SMALL, **changes}).to_dict()
  del hf['transformers_version']
  compared = 0
  for derived in ((), ('layer_types', 'no_rope_layers')):
    left = {key: value for key, value in hf.items() if key not in derived}
    for gone in left.keys() - {'model_type'}:
      compared += check_defaults({key: value for key, value in left.items() if key != gone})
  assert compared > 40  # the others have sizes that transformers itself refuses


@pytest.mark.parametrize('family', families.FAMILIES)
def test_a_family_is_that_of_transformers_without_any_key(family):
  assert check_defaults({'model_type': family})
  minimal = {k: v for k, v in SMALL.items() if k.endswith('_size') or k.startswith('num_')}
  assert check_defaults({'model_type': family, **minimal})


LLAMA3_SHORT = {
  k: v for k, v in LLAMA3.items() if k not in ('rope_theta', 'original_max_position_embeddings')
}


@pytest.mark.parametrize(
  ('family', 'changes'),
  [
    ('llama', {'rope_scaling': {'type': 'linear', 'factor': 2.0}, 'rope_theta': 5.0}),
    # Both dialects, and they differ.
    ('llama', {'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}, 'rope_theta': 7.0,
               'rope_parameters': {'rope_type': 'default', 'rope_theta': 9.0}}),
    ('llama', {'rope_scaling': LLAMA3_SHORT, 'rope_theta': 7.0}),
    ('llama', {'rope_parameters': LLAMA3, 'original_max_position_embeddings': 32}),
    ('gemma3_text', {'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}, 'rope_theta': 9.0,
                     'rope_local_base_freq': 7.0, 'num_hidden_layers': 7}),
    ('gemma3_text', {'rope_parameters': {'rope_type': 'linear', 'factor': 2.0},
                     'num_hidden_layers': 7}),
    ('gemma3_text', {'sliding_window_pattern': 3, 'num_hidden_layers': 7}),
    # Keys that transformers does not look at.
    ('gemma2', {'sliding_window_pattern': 3, 'hidden_act': 'silu'}),
    ('qwen3', {'sliding_window': 5, 'max_window_layers': 0}),
    ('mixtral', {'num_experts': 3}),
    ('qwen3_moe', {'num_local_experts': 3, 'use_sliding_window': True}),
    ('qwen2', {'use_sliding_window': True, 'max_window_layers': 1}),
    ('smollm3', {'no_rope_layers': [1, 0, 1, 1]}),
    ('gemma2', {'attn_logit_softcapping': None}),
    ('llama', {'num_key_value_heads': None, 'head_dim': None}),
  ],
)  # fmt: skip
def test_either_dialect_means_what_transformers_takes_it_for(family, changes):
  sizes = {key: value for key, value in SMALL.items() if key != 'head_dim'}
  assert check_defaults({'model_type': family, **sizes, **changes})


def test_an_absent_token_id_stays_absent():
  shape = DecoderConfig(
    vocab=100, embed=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp=64
  )
  own = {'max_position_embeddings': 64, 'bos_token_id': 3, 'eos_token_id': [4, 5]}
  written = families.write(shape, 'llama', own)
  assert 'pad_token_id' not in written and written['eos_token_id'] == [4, 5]
  # Families that have one of their own are told that there is none.
  other = dataclasses.replace(shape, norms='post', qk_norm='all')
  assert families.write(other, 'olmo2', own)['pad_token_id'] is None
  # What another family left out is what that family takes.
  written = families.write(shape, 'mistral', {'model_type': 'gemma2'})
  assert [written[key] for key in families.TOKEN_IDS] == [2, 1, 0]
  written = families.write(shape, 'llama', {'model_type': 'llama', 'pad_token_id': None})
  assert 'bos_token_id' not in written and written['pad_token_id'] is None


def test_a_mixture_whose_heads_are_narrower_than_its_stream_is_of_no_family(directories):
  """OLMoE's norms of queries and keys are as wide as the stream in transformers."""
  hf, shape = convert.read_config(directories('olmoe'))
  assert families.find(shape, hf)[0] == 'olmoe'
  narrower = dataclasses.replace(shape, embed=40)
  with pytest.raises(ValueError, match='num_heads=4 times head_dim=12 to be embed=40'):
    families.find(narrower, hf)


def test_an_export_is_verified_against_its_run(directories, tmp_path, monkeypatch):
  monkeypatch.setattr(verify, 'LENGTHS', (3, 8))
  convert.import_model(directories('llama3'), tmp_path / 'run')
  convert.export_model(tmp_path / 'run', tmp_path / 'out', dtype='bfloat16')
  assert verify.verify([tmp_path / 'out', tmp_path / 'run'], 1e-4) < 1e-4
  convert.import_model(directories('llama_bias'), tmp_path / 'other')
  assert verify.verify([tmp_path / 'out', tmp_path / 'other'], 1e-4) > 0.1


def test_numbers_that_are_none_are_no_agreement(directories, tmp_path):
  shutil.copytree(directories('llama2'), tmp_path / 'model')
  file = tmp_path / 'model' / 'model.safetensors'
  arrays = safetensors.numpy.load_file(file)
  arrays['model.norm.weight'] = np.full_like(arrays['model.norm.weight'], np.nan)
  safetensors.numpy.save_file(arrays, file, {'format': 'pt'})
  assert verify.verify([tmp_path / 'model'], 1e-4) == np.inf


def test_logits_are_compared_at_full_precision_on_any_device():
  class Watched:
    @staticmethod
    def forward(params, batch):
      raise InterruptedError(jax.make_jaxpr(jnp.dot)(np.ones((2, 2)), np.ones((2, 2))))

  with pytest.raises(InterruptedError, match='HIGHEST'):
    verify._logits(Watched, None)(np.ones((1, 3), np.int32), np.ones((1, 3), np.int32))


def test_other_weights_at_the_same_place_are_another_import(directories, tmp_path):
  shutil.copytree(directories('llama2'), tmp_path / 'model')
  convert.import_model(tmp_path / 'model', tmp_path / 'run')
  convert.import_model(tmp_path / 'model', tmp_path / 'run')  # the same: nothing to do
  file = tmp_path / 'model' / 'model.safetensors'
  arrays = {n: 2 * w for n, w in safetensors.numpy.load_file(file).items()}
  safetensors.numpy.save_file(arrays, file, {'format': 'pt'})
  with pytest.raises(ValueError, match='hf.files.model.safetensors'):
    convert.import_model(tmp_path / 'model', tmp_path / 'run')


def test_a_vocabulary_that_was_cut_goes_home_with_its_own_ids(directories, tmp_path, monkeypatch):
  """The configs name its tokens, not those of the whole tokenizer; the chat template stays."""
  monkeypatch.setattr(verify, 'LENGTHS', (3, 8))
  source = tmp_path / 'source'
  shutil.copytree(directories('llama3'), source)
  huggingface_file(source / 'tokenizer.json', ['<s>', '</s>'])
  file = tokenizers.Tokenizer.from_file(str(source / 'tokenizer.json'))
  file.add_special_tokens(['<fill>', '<turn>'])  # they have the last ids
  file.save(str(source / 'tokenizer.json'))
  fill, turn = (file.token_to_id(t) for t in ('<fill>', '<turn>'))
  whole = tokenizer.load(source / 'tokenizer.json')
  model = transformers.AutoModelForCausalLM.from_pretrained(source)
  model.resize_token_embeddings(whole.vocab + 5)
  model.save_pretrained(source)
  tokenizer_config = {
    'bos_token': '<s>',
    'eos_token': '</s>',
    'pad_token': '<fill>',
    'model_max_length': 99,
  }
  tokenizer_config |= {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'added_tokens_decoder': {str(fill): {'content': '<fill>', 'special': True}},
  }
  (source / 'tokenizer_config.json').write_text(json.dumps(tokenizer_config))
  (source / 'chat_template.jinja').write_text('{{ messages }}')
  reserved = whole.vocab + 3  # an end id that the tokenizer lacks
  (source / 'generation_config.json').unlink()
  edit(source, bos_token_id=0, eos_token_id=[1, turn, reserved], pad_token_id=fill)
  convert.import_model(source, tmp_path / 'run')
  own = settings.TokenizerConfig('huggingface', 0, str(source / 'tokenizer.json'))
  data = toy.config(tmp_path, toy.corpus(tmp_path), tokenizer=own)
  prepare.prepare(data)
  commands.calibrate(str(tmp_path / 'run'), data.out, str(tmp_path / 'stats'), 'law/train', 16, 8)
  cut = tmp_path / 'cut'
  commands.cut(str(tmp_path / 'run'), [str(tmp_path / 'stats')], {'vocab': 272}, str(cut))
  convert.export_model(cut, tmp_path / 'home')
  tok = tokenizer.load(cut / 'tokenizer')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'home')
  assert len(theirs) == tok.vocab == 271 < whole.vocab  # and a row of no token
  for text in toy.documents(['law', 'sea'], 4, 0):
    assert theirs.encode(text, add_special_tokens=False) == tok.encode(text)
  ids = json.loads((tmp_path / 'home' / 'config.json').read_text())
  new = {t: theirs.convert_tokens_to_ids(t) for t in ('<s>', '</s>', '<fill>', '<turn>')}
  assert new['<fill>'] < 272 < fill and theirs.pad_token_id == new['<fill>'] == ids['pad_token_id']
  assert ids['bos_token_id'] == new['<s>']
  assert ids['eos_token_id'] == [new['</s>'], new['<turn>'], 271]
  decoding = json.loads((tmp_path / 'home' / 'generation_config.json').read_text())
  assert set(decoding['eos_token_id']) == set(ids['eos_token_id'])
  written = json.loads((tmp_path / 'home' / 'tokenizer_config.json').read_text())
  assert written['added_tokens_decoder'][str(new['<fill>'])]['content'] == '<fill>'
  assert theirs.chat_template == '{{ messages }}' and theirs.model_max_length == 99
  assert verify.verify([tmp_path / 'home', cut], 1e-4) < 1e-4


def test_two_types_of_16_bits_become_one_that_holds_both(directories, tmp_path):
  shutil.copytree(directories('llama2'), tmp_path / 'model')
  file = tmp_path / 'model' / 'model.safetensors'
  arrays = {n: w.astype(np.float16) for n, w in safetensors.numpy.load_file(file).items()}
  norm = arrays['model.norm.weight'].astype(weights.jax.numpy.bfloat16)
  safetensors.numpy.save_file({**arrays, 'model.norm.weight': norm}, file, {'format': 'pt'})
  convert.import_model(tmp_path / 'model', tmp_path / 'run')
  lineage = convert.export_model(tmp_path / 'run', tmp_path / 'out')
  assert lineage['dtype'] == 'float32'
  for name, (_, w) in tensors(tmp_path / 'out').items():
    np.testing.assert_array_equal(
      w,
      arrays[name].astype(np.float32)
      if name in arrays and name != 'model.norm.weight'
      else norm.astype(np.float32),
    )


def test_buffers_of_older_versions_are_left_out_by_name(directories, tmp_path):
  """Their type is not the model's: float32 frequencies beside bfloat16 weights."""
  shutil.copytree(directories('llama2', 'bfloat16'), tmp_path / 'model')
  file = tmp_path / 'model' / 'model.safetensors'
  arrays, attention = safetensors.numpy.load_file(file), 'model.layers.1.self_attn'
  buffers = {
    'model.rotary_emb.inv_freq': np.ones(6, np.float32),
    f'{attention}.rotary_emb.cos_cached': np.ones((9, 12), np.float64),
    f'{attention}.rotary_emb.sin_cached': np.ones((9, 12), np.float32),
    f'{attention}.masked_bias': np.full((), -1e9, np.float32),
    f'{attention}.bias': np.ones((1, 1, 9, 9), np.bool_),
    'model.embed_tokens.position_ids': np.arange(9),
  }
  safetensors.numpy.save_file({**arrays, **buffers}, file, {'format': 'pt'})
  done = run('import', tmp_path / 'model', tmp_path / 'run')
  first, last = done.stdout.splitlines()
  assert first.startswith('left out: 6 tensors that are not weights (model.embed_tokens.position')
  assert 'ready to use as a run' in last, done.stderr
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  assert result['dtype'] == 'bfloat16' and set(result['left_out']) == set(buffers)
  convert.export_model(tmp_path / 'run', tmp_path / 'out')
  after = tensors(tmp_path / 'out')
  assert after.keys() == arrays.keys() and {kind for kind, _ in after.values()} == {'BF16'}
  own = arrays['model.norm.weight'].astype(np.float64)
  safetensors.numpy.save_file({**arrays, 'model.norm.weight': own}, file, {'format': 'pt'})
  with pytest.raises(ValueError, match='model.norm.weight: of type F64, expected one of F32, BF16'):
    convert.import_model(tmp_path / 'model', tmp_path / 'other')


def test_an_export_cut_short_is_begun_again(directories, tmp_path, monkeypatch):
  convert.import_model(directories('llama2'), tmp_path / 'run')
  out = tmp_path / 'out'

  def stopped(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
    m.setattr(convert.weights, 'save', stopped)
    convert.export_model(tmp_path / 'run', out)
  assert not (out / 'config.json').exists()  # nothing that loads
  for reader in (convert.read_config, rundir.read_config, lambda p: verify.verify([p], 1)):
    with pytest.raises(ValueError, match='out: an export that was cut short: run `slm.hf export`'):
      reader(out)
  (tmp_path / 'other').mkdir()
  convert.import_model(directories('llama2'), tmp_path / 'other' / 'another')
  with pytest.raises(ValueError, match='out: holds the export of run, not of another'):
    convert.export_model(tmp_path / 'other' / 'another', out)
  convert.import_model(directories('llama3'), tmp_path / 'other' / 'run')
  for other, message in (('other/run', 'with config_sha256 .*, not '), ('run@0', 'with step None')):
    with pytest.raises(ValueError, match=f'out: holds the export of run {message}'):
      convert.export_model(tmp_path / other, out)
  (out / 'model.safetensors.99.tmp').write_text('of a process that was killed')
  (out / 'tokenizer.json').write_text('{}')  # of what stood there before
  convert.export_model(tmp_path / 'run', out)
  assert not (out / 'tokenizer.json').exists() and not [*out.glob('*.tmp')]
  assert verify.verify([out], 1e-4) < 1e-4
  with pytest.raises(ValueError, match='--dtype=int8: expected one of float32, bfloat16'):
    convert.export_model(tmp_path / 'run', out, 'int8')


def test_a_shape_goes_out_as_a_family_that_has_it():
  base = dict(vocab=100, embed=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp=64)
  name = lambda **changes: families.find(DecoderConfig(**{**base, **changes}))[0]
  assert name() == 'llama'
  # transformers insists for some families that the heads divide the hidden size.
  assert name(embed=38) == 'mistral'
  assert name(qk_norm='head') == 'qwen3' and name(qkv_bias=True) == 'qwen2'
  assert name(norms='post', qk_norm='all') == 'olmo2'
  assert name(layer_types=('full', 'nope')) == 'smollm3'
  assert name(num_experts=4) == 'mixtral'
  source = {'model_type': 'llama', 'eos_token_id': 7, 'attention_dropout': 0.3}
  family, hf = families.find(DecoderConfig(**{**base, 'embed': 38}), source)
  assert family == 'mistral' and hf['eos_token_id'] == 7 and 'attention_dropout' not in hf
  with pytest.raises(ValueError, match="llama cannot have norms='sandwich'"):
    name(qk_norm='all', norms='sandwich')


def run(*arguments):
  command = [sys.executable, '-m', 'slm.hf', *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def test_from_training_to_transformers_and_back(tiny_config, train_once, tmp_path):
  """A model trained here: exported, verified, described; its tokenizer says the same ids."""
  train_once(tiny_config.to_dict(), tmp_path / 'run')
  done = run('export', tmp_path / 'run', tmp_path / 'out')
  assert done.returncode == 0 and 'llama' in done.stdout, done.stderr
  done = run('verify', tmp_path / 'out')
  assert done.returncode == 0 and done.stdout.count('%  ok\n') == 4, done.stdout + done.stderr
  assert card.write(tmp_path / 'out', 'apache-2.0') == str(tmp_path / 'out' / 'README.md')
  text = (tmp_path / 'out' / 'README.md').read_text()
  assert 'license: apache-2.0' in text and '| run | pretrain | next_token |' in text
  lineage = (tmp_path / 'out' / convert.LINEAGE).read_text()
  assert str(tmp_path) not in lineage + text  # nothing of this machine
  with pytest.raises(ValueError, match='is not empty and was not exported here'):
    convert.export_model(tmp_path / 'run', tmp_path)
  assert (
    '- Made from: random weights.' in text
    and (tmp_path / 'out/model.safetensors').stat().st_mode
    == (tmp_path / 'out/config.json').stat().st_mode
  )  # whoever reads one reads the other
  convert.export_model(tmp_path / 'run', tmp_path / 'out')
  assert not (tmp_path / 'out' / 'README.md').exists()  # it was of the weights before
  for wrong in (load.mesh_for, lambda path: load.load(path, None), rundir.read_config):
    with pytest.raises(
      ValueError, match='out: a model of transformers, not a run: import it with python -m'
    ):
      wrong(tmp_path / 'out')
  refused = run('verify', tmp_path / 'out', '--tolerance=1e-12')
  assert refused.returncode == 1 and 'is above --tolerance=1e-12' in refused.stderr
  convert.import_model(tmp_path / 'out', tmp_path / 'back')
  one, two = (load.load(tmp_path / n, sharding.make_mesh({'data': -1})) for n in ('run', 'back'))
  jax.tree.map(np.testing.assert_array_equal, one.theta, two.theta)


def test_a_sentencepiece_tokenizer_says_the_same_ids(tmp_path):
  text = ' '.join(toy.documents(list(toy.TOPICS), 200, 3))
  tok = tokenizer.build('sentencepiece', 400, '', [text], tmp_path / 'data' / 'tokenizer')
  out = tmp_path / 'out'
  folder, content = tokenizer_files.newest([{'run': str(tmp_path), 'data': str(tmp_path / 'data')}])
  hf = tokenizer_files.token_ids(tok)
  content = tokenizer_files.exported(content, tok, [tok.ids.bos], hf)
  tokenizer_files.write(out, content)
  assert folder == tmp_path / 'data/tokenizer' and hf['pad_token_id'] == tok.ids.pad
  assert json.loads(content['generation_config.json'])['eos_token_id'] == tok.ids.eos
  (out / 'config.json').write_text('{"model_type": "llama"}')
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  for sample in (text[:500], '  two  spaces\nand\n\nlines\t', 'é 漢字 😀', ''):
    assert theirs.encode(sample, add_special_tokens=False) == tok.encode(sample)
    assert theirs.encode(sample) == [tok.ids.bos, *tok.encode(sample)]  # as rows begin
    assert theirs.decode(tok.encode(sample)) == sample
  assert (theirs.bos_token_id, theirs.eos_token_id) == (tok.ids.bos, tok.ids.eos)
  assert (hf['bos_token_id'], hf['eos_token_id']) == (tok.ids.bos, tok.ids.eos)


@pytest.mark.parametrize('kind', ['fast', 'sentencepiece'])
def test_an_export_reads_and_ends_texts_as_the_model_did(kind, tmp_path, capsys, monkeypatch):
  """transformers puts the begin token before texts as training did, and knows every end."""
  monkeypatch.setattr(verify, 'LENGTHS', (3, 8))
  folder = tmp_path / 'data' / 'tokenizer'
  if kind == 'fast':  # nothing in the file begins texts
    folder.mkdir(parents=True)
    huggingface_file(folder / 'tokenizer.json', ['<s>', '</s>'])
    tok = tokenizer.load(folder)
  else:
    text = ' '.join(toy.documents(list(toy.TOPICS), 200, 3))
    tok = tokenizer.build('sentencepiece', 400, '', [text], folder)
  path = toy.random_model(tmp_path, tok)
  convert.export_model(path, tmp_path / 'out')
  _, begin = load.reads(load.load(path, load.mesh_for(path)))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  for text in verify.TEXTS:
    assert theirs(text).input_ids == [*begin, *tok.encode(text)]
  config, decoding = (
    json.loads((tmp_path / 'out' / f'{name}.json').read_text())
    for name in ('config', 'generation_config')
  )
  assert config['eos_token_id'] == decoding['eos_token_id'] == tok.ids.eos
  assert ('pad_token_id' in config) == ('pad_token_id' in decoding) == (kind == 'sentencepiece')
  assert verify.verify([tmp_path / 'out', path], 1e-4) < 1e-4
  shown = capsys.readouterr().out
  assert shown.count('with begin token') == 2 * len(begin), shown
  # Without the begin token that is told, first of all.
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    if (tmp_path / 'out' / name).exists():
      content = json.loads((tmp_path / 'out' / name).read_text())
      content |= {'post_processor': None} if name == 'tokenizer.json' else {'add_bos_token': False}
      (tmp_path / 'out' / name).write_text(json.dumps(content))
  if begin:
    with pytest.raises(ValueError, match=r"out: the text '' is .* for .*, and .* here"):
      verify.verify([tmp_path / 'out', path], 1e-4)


@pytest.fixture
def foreign(tmp_path):
  """A directory of transformers whose 320 embeddings are more than its tokens."""
  (tmp_path / 'first' / 'data' / 'tokenizer').mkdir(parents=True)
  file = huggingface_file(tmp_path / 'first' / 'data' / 'tokenizer' / 'tokenizer.json', ENDS)
  convert.export_model(
    toy.random_model(tmp_path / 'first', tokenizer.load(file), 320), tmp_path / 'foreign'
  )
  (tmp_path / 'foreign' / convert.LINEAGE).unlink()
  return tmp_path / 'foreign'


ENDS = ['<s>', '</s>', '<turn>']


def test_every_end_token_goes_along(foreign, tmp_path):
  """Those of config.json and of generation_config.json, which was not told of them all."""
  tokenizer_config = {'bos_token': '<s>', 'eos_token': '</s>', 'chat_template': '{{ messages }}'}
  (foreign / 'tokenizer_config.json').write_text(json.dumps(tokenizer_config))
  edit(foreign, eos_token_id=[2, 319])
  decoding = {'eos_token_id': 2, 'temperature': 0.5}
  (foreign / 'generation_config.json').write_text(json.dumps(decoding))
  (foreign / 'additional_chat_templates').mkdir()
  (foreign / 'additional_chat_templates' / 'tools.jinja').write_text('{{ tools }}')
  convert.import_model(foreign, tmp_path / 'run')
  convert.export_model(tmp_path / 'run', tmp_path / 'out')
  read = lambda name: json.loads((tmp_path / 'out' / name).read_text())
  decoding |= {'bos_token_id': 0, 'eos_token_id': [2, 319, 1]}
  assert read('generation_config.json') == decoding
  assert read('config.json')['eos_token_id'] == [2, 319]
  for name in ('tokenizer.json', 'tokenizer_config.json', 'additional_chat_templates/tools.jinja'):
    assert (tmp_path / 'out' / name).read_bytes() == (foreign / name).read_bytes()


def test_tokens_embeddings_and_ids_in_use_are_three_sizes(foreign, tmp_path):
  convert.import_model(foreign, tmp_path / 'run')
  tokens = tokenizer.load(foreign).vocab
  assert convert.remarks(tmp_path / 'run') == [
    f'320 embeddings for {tokens} tokens: the last {320 - tokens} are unused'
  ]
  convert.export_model(tmp_path / 'run', tmp_path / 'out')
  assert tensors(tmp_path / 'out')['model.embed_tokens.weight'][1].shape[0] == 320
  config = json.loads((foreign / 'config.json').read_text())
  for name, content in (
    ('config.json', {**config, 'eos_token_id': [2, 320]}),
    ('generation_config.json', {'pad_token_id': 320}),
  ):
    before = (foreign / name).read_bytes() if (foreign / name).exists() else None
    (foreign / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f'{name}: names the id 320, the model has 320 embeddings'):
      convert.import_model(foreign, tmp_path / 'other')
    (foreign / name).write_bytes(before) if before else (foreign / name).unlink()
  for name, content in (
    ('added_tokens.json', {'<pad>': 320}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'320': {'content': '<pad>'}}}),
  ):
    before = (foreign / name).read_bytes() if (foreign / name).exists() else None
    (foreign / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"'<pad>' would get the id {tokens}, the files beside it"):
      convert.import_model(foreign, tmp_path / 'other')
    (foreign / name).write_bytes(before) if before else (foreign / name).unlink()
  model = tokenizers.Tokenizer.from_file(str(foreign / 'tokenizer.json'))
  model.add_special_tokens([f'<extra {i}>' for i in range(321 - tokens)])
  model.save(str(foreign / 'tokenizer.json'))
  with pytest.raises(ValueError, match='the tokenizer has 321 ids, the model 320 embeddings'):
    convert.import_model(foreign, tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


def test_a_run_remembers_what_an_export_was_made_from(foreign, tmp_path):
  convert.export_model(tmp_path / 'first' / 'run', tmp_path / 'whole')
  convert.import_model(tmp_path / 'whole', tmp_path / 'again')
  lineage = convert.export_model(tmp_path / 'again', tmp_path / 'out')
  assert [x['phase'] for x in lineage['history']] == ['import', 'pretrain']
  assert lineage['made_from'] == ['whole', 'random weights']
  assert '| run | pretrain | next_token |' in card.text('x', lineage, {'architectures': ['L']}, '')
  assert str(tmp_path) not in json.dumps(lineage)
  convert.import_model(tmp_path / 'out', tmp_path / 'third')
  lineage = convert.export_model(tmp_path / 'third', tmp_path / 'last')
  assert [x['phase'] for x in lineage['history']] == ['import', 'import', 'pretrain']
  assert lineage['made_from'] == ['out', 'whole', 'random weights']
  for wrong in ('[]', '{}', '{"history": [{"run": 1}], "made_from": []}', '[' * 100_000):
    (tmp_path / 'whole' / convert.LINEAGE).write_text(wrong)
    with pytest.raises(ValueError, match=f'whole/{convert.LINEAGE}: ') as e:
      convert.import_model(tmp_path / 'whole', tmp_path / 'other')
    assert '\n' not in str(e.value)


def test_a_teachers_type_and_files_do_not_come_along(directories, tmp_path):
  """An export is of the line its weights came down; of a teacher it says the name and the cost."""
  base, taught = tmp_path / 'base', tmp_path / 'taught'
  convert.import_model(directories('smollm2'), base)
  convert.import_model(directories('llama3', 'bfloat16'), tmp_path / 'big')
  (tmp_path / 'big/tokenizer').mkdir(exist_ok=True)
  (tmp_path / 'big/tokenizer/chat_template.jinja').write_text('{{ big }}')
  signals = tmp_path / 'signals'
  signals.mkdir()
  manifest = {'teacher': str(tmp_path / 'big'), 'mode': 'topk', 'data': '', 'on': 'law/train'}
  (signals / 'signals.json').write_text(
    json.dumps({**manifest, 'rows_sha256': 'ab', 'tokenizer': 'cd', 'step': 0})
  )
  cost = [ledger.phase_entry('signals', 7, 8e3, 0.5)]
  ledger.write_ledger(signals, cost, [manifest['teacher']])
  loaded = load.load(base, load.mesh_for(base))
  live = {'teacher': str(tmp_path / 'big')}
  for more, ancestors in ((live, []), ({'teacher_cache': str(signals)}, [str(signals)])):
    shutil.rmtree(taught, ignore_errors=True)
    shutil.rmtree(tmp_path / 'out', ignore_errors=True)
    cfg = dataclasses.replace(loaded.cfg, hf=None, init=str(base), phase='distill', **more)
    load.write_dense(taught, cfg, loaded.params(), [str(base), *ancestors], loss=1.5)
    made = convert.export_model(taught, tmp_path / 'out')
    assert made['dtype'] == 'float32' and 'chat_template.jinja' not in made['tokenizer']
    card.write(tmp_path / 'out')
    shown = (tmp_path / 'out/README.md').read_text()
    assert 'Made from: model.' in shown and '- Taught by: big.' in shown and '| 1.5000 |' in shown
    assert ('| signals | topk | 7 |' in shown) == bool(ancestors)
    assert [x['phase'] for x in made['history']].count('import') == 2
  with pytest.raises(ValueError, match='out: holds the export of taught, not of base'):
    convert.export_model(base, tmp_path / 'out')


def test_an_imported_model_is_a_run_like_any_other(directories, tmp_path, tiny_config):
  """Fine-tuned here on text of its own tokenizer, then taken home with what came with it."""
  source = tmp_path / 'source'
  shutil.copytree(directories('smollm2'), source)
  words = sorted({w for t in toy.TOPICS.values() for w in t.split()})[:60]
  vocab = {w: i for i, w in enumerate(['<s>', '</s>', '<unk>', *words])}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '<unk>'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.save(str(source / 'tokenizer.json'))
  (source / 'tokenizer_config.json').write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
  (source / 'chat_template.jinja').write_text('{{ messages }}')
  convert.import_model(source, tmp_path / 'run')
  loaded = load.load(tmp_path / 'run', load.mesh_for(tmp_path / 'run'))
  tok, begin = load.reads(loaded)
  assert begin == [] and tok.encode(words[0]) == [3]  # as transformers reads it
  with pytest.raises(ValueError, match='this model reads no begin token'):
    completion.complete(loaded, loaded.params(), tok, begin, ['', 'x'], 2, decode.greedy, 0)
  sets = toy.corpus(tmp_path)
  own = settings.TokenizerConfig('huggingface', 0, str(tmp_path / 'run/tokenizer/tokenizer.json'))
  data = toy.config(tmp_path, sets, tokenizer=own)
  prepare.prepare(data)
  c = tiny_config
  c.init, c.data.path, c.data.set, c.steps = str(tmp_path / 'run'), data.out, 'law', 4
  c.data.index, c.eval.split = '', 'test'
  loop.train(c.to_dict(), tmp_path / 'tuned')
  lineage = convert.export_model(tmp_path / 'tuned', tmp_path / 'home')
  assert [x['phase'] for x in lineage['history']] == ['pretrain', 'import']
  taught = {'name': 'distill', 'kl': 'forward', 'temperature': 2.0, 'chunk': 512}
  newest = {**lineage['history'][0], 'teacher': 'big', 'objective': taught}
  shown = card.text('x', {**lineage, 'history': [newest]}, {'architectures': ['L']}, '')
  assert '- Taught by: big.' in shown and '| distill (kl forward, temperature 2.0) |' in shown
  assert f'| {tmp_path.name}/law |' not in shown and '/law |' in shown
  tuned = load.load(tmp_path / 'tuned', load.mesh_for(tmp_path / 'tuned'))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'home')
  assert theirs(words[0]).input_ids == [*load.reads(tuned)[1], 3]  # as its rows began
  template = (tmp_path / 'home' / 'chat_template.jinja').read_text()
  assert template == theirs.chat_template == '{{ messages }}'
  assert verify.verify([tmp_path / 'home', tmp_path / 'tuned'], 1e-4) < 1e-4
  before, after = tensors(source), tensors(tmp_path / 'home')
  assert before.keys() == after.keys()
  name = 'model.layers.0.mlp.up_proj.weight'
  assert np.abs(before[name][1] - after[name][1]).max() > 0
  (tmp_path / 'run').rename(tmp_path / 'elsewhere')
  with pytest.raises(ValueError, match='run: is missing; .*tuned was made from it'):
    convert.export_model(tmp_path / 'tuned', tmp_path / 'again')
