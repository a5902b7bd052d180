"""Damaged files of every kind that is read end in one line that names the file, or are read.

Where hypothesis is installed, tests/mutations.py flips bits, cuts, repeats and inserts bytes, and
in JSON replaces, removes and renames values; SLM_FUZZ_EXAMPLES sets how often. What it found is
kept as an example that is always tried.
"""

import contextlib
import gzip
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import toy
import zstandard

from slm.base import console, files
from slm.data import contamination, conversations, loader, prepare, settings, sources, tokenizer
from slm.interchange import convert, families, weights
from slm.models.config import DecoderConfig
from slm.reporting import stats
from slm.runs import checkpoint, config, ledger, load, rundir


def damaged(path, read):
  """Read mutations of a file."""
  pytest.importorskip('mutations', reason='needs hypothesis').damaged(path, read)


def refuse(path, content, read):
  """Read a file of other content: a ValueError that names it."""
  path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
  with pytest.raises(ValueError, match=path.name):
    read(path)


@pytest.mark.parametrize('suffix', ['', '.gz', '.zst'])
def test_json_lines(suffix, tmp_path):
  lines = [{'text': f'document {i}', 'id': i, 'more': [i, {'x': None}]} for i in range(9)]
  data = '\n'.join(map(json.dumps, lines)).encode()
  pack = {'': bytes, '.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}[suffix]
  path = tmp_path / f'text.jsonl{suffix}'
  path.write_bytes(pack(data))
  damaged(path, lambda path: [*sources.read(str(path), 'text', 'id')])


def test_conversations(tmp_path):
  turns = [{'role': 'user', 'content': 'what is it?'}, {'role': 'assistant', 'content': None}]
  parts = [{'role': 'user', 'content': [{'type': 'text', 'text': 'look'}, {'type': 'image'}]}]
  rows = [{'id': 1, 'messages': turns}, {'messages': parts}, {'context_options': ['a', 'b']}]
  path = tmp_path / 'chat.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  source = contamination.Source('chat', str(path), ())
  damaged(path, lambda path: contamination.items([source], contamination.Rule('all')))


@pytest.mark.parametrize('kind', settings.KINDS)
def test_chat_sources(kind, tmp_path):
  turns = [{'role': 'user', 'content': 'what?'}, {'role': 'assistant', 'content': 'that'}]
  answers = {'chosen': turns, 'rejected': [turns[0], {'role': 'assistant', 'content': ''}]}
  label = {'label': [1, {}], 'verifier': ['a', 'b'], 'tools': [{'type': 'function'}]}
  path, c = tmp_path / 'chat.jsonl', settings.ChatConfig(kind)
  path.write_text((json.dumps({'messages': turns, **answers, **label}) + '\n') * 3)
  (name,) = conversations.expand(str(path), c)
  damaged(path, lambda path: [*conversations.read(name, str(path), c, '')])


def read_tensors(path):
  with contextlib.ExitStack() as stack:
    tensors = weights.Tensors(path.parent, stack)
    for name in tensors.files:
      tensors.shape(name), tensors.dtype(name), tensors.read(name)


@pytest.mark.parametrize('name', ['model.safetensors', 'model.safetensors.index.json'])
def test_tensors(name, tmp_path):
  saved = {'a': np.arange(12, dtype=np.float32).reshape(3, 4), 'b.weight': np.ones(5, np.float16)}
  index = name.endswith('.json')
  safetensors.numpy.save_file(saved, tmp_path / ('part.safetensors' if index else name))
  if index:
    shards = dict.fromkeys(saved, 'part.safetensors')
    (tmp_path / name).write_text(json.dumps({'metadata': {'total_size': 58}, 'weight_map': shards}))
  damaged(tmp_path / name, read_tensors)


SHAPE = {
  'vocab': 300, 'embed': 32, 'num_layers': 2, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 8,
  'mlp': 48,
}  # fmt: skip


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'smollm3', 'gemma3_text', 'olmoe'])
def test_configs_of_transformers(family, tmp_path):
  more = {'num_experts': 4, 'experts_per_token': 2} if family == 'olmoe' else {}
  cfg = DecoderConfig(**{**SHAPE, **more, **families.FAMILIES[family].fixed})
  hf = families.write(cfg, family, {'max_position_embeddings': 512})
  scaling = {'rope_type': 'linear', 'factor': 2.0} if family == 'llama' else None
  path = tmp_path / 'config.json'
  path.write_text(json.dumps({**hf, 'model_type': family, 'rope_scaling': scaling}))
  convert.read_config(tmp_path)
  damaged(path, lambda path: convert.read_config(path.parent))


@pytest.fixture(scope='module')
def tokenizer_folder(tmp_path_factory):
  """Write a small byte-level tokenizer and the files beside it."""
  folder = tmp_path_factory.mktemp('tok')
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=60, show_progress=False, special_tokens=['<s>', '</s>', '<pad>']
  )
  made.train_from_iterator(['the ship sails', 'the rope and the anchor'], trainer)
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 0)]
  )
  made.save(str(folder / 'tokenizer.json'))
  beside = {
    'tokenizer_config.json': {
      'bos_token': '<s>', 'eos_token': {'content': '</s>', 'lstrip': False}, 'pad_token': '<pad>',
      'added_tokens_decoder': {'70': {'content': '<tool>', 'special': True}},
      'extra_special_tokens': ['<end>'], 'chat_template': [{'name': 'default', 'template': 'x'}],
    },
    'special_tokens_map.json': {'eos_token': '</s>', 'unk_token': None},
    'added_tokens.json': {'<more>': 71},
    'generation_config.json': {'bos_token_id': 0, 'eos_token_id': [1, 2], 'pad_token_id': 2},
  }  # fmt: skip
  for name, content in beside.items():
    (folder / name).write_text(json.dumps(content))
  return folder


@pytest.fixture(scope='module')
def pieces_folder(tmp_path_factory):
  """Train a small SentencePiece model, with settings and added tokens beside it."""
  folder = tmp_path_factory.mktemp('pieces')
  (folder / 'tokenizer.model').write_bytes(tokenizer.train(toy.documents(['sea'], 40, 0), 300))
  (folder / 'added_tokens.json').write_text('{"<tool>": 300, "<more>": 301}')
  settings = {'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': True, 'legacy': False}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  return folder


def read_tokenizer(path):
  tok = tokenizer.load(path.parent)
  tok.decode(tok.encode('the ship'))


@pytest.mark.parametrize(
  'name',
  ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
   'generation_config.json'],
)  # fmt: skip
def test_tokenizers(name, tokenizer_folder):
  damaged(tokenizer_folder / name, read_tokenizer)


@pytest.mark.parametrize('name', ['tokenizer.model', 'tokenizer_config.json', 'added_tokens.json'])
def test_sentencepiece(name, pieces_folder):
  damaged(pieces_folder / name, read_tokenizer)


def read_gguf(path):
  from slm.interchange import gguf, gguf_tokenizer

  file = gguf.File(path)
  gguf_tokenizer.rebuild(path, file.fields)
  gguf.read_config(file)
  for name in file.files:
    file.shape(name), file.dtype(name), file.read(name)


def test_gguf(tmp_path):
  ggufs = pytest.importorskip('ggufs')
  tok = ggufs.byte_pairs('gpt-2')
  cfg, hf, params = ggufs.random_model(
    'llama', len(tok['tokens']), embed=32, mlp=32, num_layers=1, head_dim=8
  )
  path = ggufs.write(tmp_path / 'model.gguf', 'llama', cfg, hf, params, tok, 'Q8_0')
  read_gguf(path)
  damaged(path, read_gguf)


def read_prepared(path):
  split = loader.Split(str(path.parent), 'generic', 'train', '', 4)
  split.read(split.ids[:2])
  loader.parse_on(path.parent, 'court/test')
  loader.histogram(str(path.parent), 'court', 'train', 2)


def test_manifests(tiny_data, tmp_path):
  folder = shutil.copytree(tiny_data, tmp_path / 'data')
  damaged(folder / 'manifest.json', read_prepared)


def test_labels(tmp_path):
  """Those of prompts; a byte or line of another length is found by the size."""
  prompts = [{'prompt': f'{i} + {i}?', 'label': str(2 * i), 'verifier': 'sum'} for i in range(4)]
  source = tmp_path / 'sums.jsonl'
  source.write_text(''.join(json.dumps(prompt) + '\n' for prompt in prompts))
  cfg = toy.config(
    tmp_path, {'sums': {'train': str(source)}}, chat=settings.ChatConfig('prompts', 'tulu')
  )
  prepare.prepare(cfg)
  read = lambda path: loader.Split(cfg.out, 'sums', 'train').labels()
  path = pathlib.Path(cfg.out) / 'sums/train/labels.jsonl'
  damaged(path, read)
  lines = path.read_text().splitlines(keepends=True)
  refuse(path, ''.join([lines[1], lines[0], *lines[2:]]).encode(), read)


@pytest.fixture
def run(tmp_path):
  """Write the files of a finished run of two layers; nothing is trained."""
  data = loader.DataConfig(path=str(tmp_path / 'data'))
  cfg = config.RunConfig(context=64, tokenizer='0' * 64, model=DecoderConfig(**SHAPE), data=data)
  run = tmp_path / 'run'
  config.write_run(run, cfg)
  entry = {'phase': 'pretrain', 'tokens': 9, 'flops': 1e9, 'device_seconds': 2.5}
  ledger.write_ledger(run, [entry, entry | {'phase': 'evaluate'}], ['runs/other'])
  line = {'loss': 2.5, 'grad_norm': 0.1, 'tokens': 9, 'flops': 1e9, 'device_seconds': 2.5}
  lines = [json.dumps({'step': step, **line}) + '\n' for step in (1, 2, 3)]
  (run / 'metrics.jsonl').write_text(''.join(lines))
  result = {'steps': 3, 'best_step': 3, 'best_loss': 2.5, 'loss': 2.5}
  (run / 'result.json').write_text(json.dumps(result))
  rewinds = [{'step': 3, 'to': 2, 'next': 3, 'why': 'x', 'totals': {'tokens': 9}}]
  (run / 'rewinds.json').write_text(json.dumps(rewinds))
  folder = run / 'checkpoints/3'
  folder.mkdir(parents=True)
  (folder / 'theta').write_bytes(b'0' * 64)
  stamp = {'theta': files.stamp(folder / 'theta')}
  (folder / 'checksums.json').write_text(json.dumps(stamp))
  return run


READ = {
  'config.json': lambda path: config.of(path.parent),
  'ledger.json': lambda path: stats.training_cost(path.parent),
  'metrics.jsonl': lambda path: stats.training_cost(pathlib.Path(f'{path.parent}@2')),
  'result.json': lambda path: load.served_step(path.parent),
  'starts.json': lambda path: rundir.read_starts(path.parent)[-1:],
  'rewinds.json': lambda path: rundir.rewound_to(path.parent, 2),
  'checkpoints/3/checksums.json': lambda path: [*checkpoint.verify(path.parents[2])],
}


@pytest.mark.parametrize('name', READ)
def test_runs(name, run):
  damaged(run / name, READ[name])


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('ledger.json', 0),
    ('ledger.json', {}),
    ('ledger.json', {'phases': [{'phase': 'x', 'tokens': 9, 'flops': 1.0}], 'ancestors': []}),
    ('ledger.json', {'phases': [], 'ancestors': [[]]}),
    ('metrics.jsonl', b'{\xff\n{}'),
    ('metrics.jsonl', b'[' * 100_000 + b'\n{}'),
    ('metrics.jsonl', {'loss': 1}),
    ('metrics.jsonl', {'step': 2, 'tokens': 1, 'flops': None, 'device_seconds': 1}),
    ('result.json', 1),
    ('result.json', {}),
    ('starts.json', None),
    ('starts.json', [{'step': 0}]),
    ('rewinds.json', 0),
    ('rewinds.json', [{'step': 3, 'next': 3, 'why': 'x', 'totals': {}}]),
  ],
)
def test_a_file_of_a_run_that_holds_something_else_is_named(name, content, run):
  refuse(run / name, content, READ[name])


@pytest.mark.parametrize('content', [-1, 'x', {'theta': []}, {'theta': 1}, {'theta': [64]}])
def test_checksums_that_are_damaged_are_damage(content, run):
  path = run / 'checkpoints/3/checksums.json'
  path.write_text(json.dumps(content))
  assert str(path) in checkpoint.damage(path.parent)


def test_a_section_without_a_name_is_refused(run):
  values = files.read_json(run / 'config.json')
  values['objective']['name'] = []
  refuse(run / 'config.json', values, READ['config.json'])


@pytest.mark.parametrize('change', [{'columns': 'x'}, {'columns': [], 'sets': {}}, {'sets': 0}])
def test_a_manifest_of_something_else_is_named(change, tiny_data, tmp_path):
  path = shutil.copytree(tiny_data, tmp_path / 'data') / 'manifest.json'
  refuse(path, files.read_json(path) | change, read_prepared)


def test_a_manifest_that_differs_from_its_records_is_named(tiny_data, tmp_path):
  path = shutil.copytree(tiny_data, tmp_path / 'data') / 'manifest.json'
  whole = files.read_json(path)
  scalar = [{'name': 'tokens', 'dtype': 'int32', 'shape': []}, *whole['columns'][1:]]
  refuse(path, whole | {'columns': scalar}, read_prepared)
  refuse(path, whole | {'columns': whole['columns'][1:]}, read_prepared)
  facts = whole['sets']['generic']['train']
  for stamps in (1, {'clusters.npy': []}):
    facts['files'] = stamps
    refuse(path, whole, read_prepared)
  facts |= {'files': {}, 'shards': []}
  path.write_text(json.dumps(whole))
  with pytest.raises(ValueError, match='generic/train: a record file is missing or damaged'):
    read_prepared(path)


@pytest.mark.parametrize('count', [2**31, 10**30, 'x'])
def test_a_number_of_layers_takes_no_memory(count, tmp_path):
  hf = {'model_type': 'llama', 'num_hidden_layers': count}
  refuse(tmp_path / 'config.json', hf, lambda path: convert.read_config(path.parent))


@pytest.mark.parametrize('token', [1, '\ud800'])
def test_a_token_that_is_no_text_is_refused(token, pieces_folder):
  path = pieces_folder / 'tokenizer_config.json'
  whole = path.read_bytes()
  refuse(path, {'eos_token': token}, read_tokenizer)
  path.write_bytes(whole)


def test_a_piece_that_is_no_text_is_refused(pieces_folder):
  path = pieces_folder / 'tokenizer.model'
  whole = path.read_bytes()
  refuse(path, whole.replace(b'<unk>', b'<\xffnk>', 1), read_tokenizer)
  path.write_bytes(whole)


def test_a_panic_of_the_tokenizers_library_is_one_line(tmp_path):
  """Its merges are taken apart by a prefix that they do not have."""
  model = {'type': 'BPE', 'vocab': {'a': 0, 'b': 1, 'ab': 2}, 'merges': [['a', 'b']]}
  content = {'version': '1.0', 'model': model | {'continuing_subword_prefix': 'x' * 8}}
  refuse(tmp_path / 'tokenizer.json', content, read_tokenizer)


@pytest.mark.parametrize('i', [2**31, -1])
def test_an_id_takes_no_memory(i, pieces_folder):
  path = pieces_folder / 'added_tokens.json'
  path.write_text(json.dumps({'<more>': i}))
  with pytest.raises(
    ValueError, match='tokenizer.model: expected ids from 0 to less than 16,777,216'
  ):
    tokenizer.load(pieces_folder)
  path.unlink()


def test_a_line_that_quotes_a_file_is_short(capsys):
  with pytest.raises(SystemExit), console.one_line_errors():
    raise ValueError('x.jsonl:1: no field; the line has ' + '[\n' * 100_000 + '\ud800')
  said = capsys.readouterr().err
  assert said.startswith('error: x.jsonl:1: no field') and said.count('\n') == 1
  assert len(said) < 2100
