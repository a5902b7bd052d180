"""Preparation: resuming, duplicates, splits, sources, bad input."""

import codecs
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import toy
import zstandard

from slm.base import files
from slm.data import documents, installed, loader, prepare, rows, settings, sources, work


def state(out: str) -> dict[str, str]:
  """Hash everything that training reads; the cost of making it differs between runs."""
  root = pathlib.Path(out)
  kept = ('.array_record', '.npy', '.npz', '.safetensors', '.md')
  hashes = {
    str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
    for p in sorted(root.rglob('*'))
    if p.suffix in kept
  }
  manifest = loader.manifest(out)
  del manifest['cost']
  return hashes | {'manifest': json.dumps(manifest, sort_keys=True)}


@pytest.fixture
def cfg(tmp_path) -> settings.PrepareConfig:
  return toy.config(tmp_path, toy.corpus(tmp_path))


def expect(message: str, tmp_path, sets, error=ValueError, **changes) -> None:
  with pytest.raises(error, match=message):
    prepare.prepare(toy.config(tmp_path, sets, **changes))


def test_manifest_counts_are_exact(cfg):
  manifest = prepare.prepare(cfg)
  texts = toy.documents(['law', 'law', 'sea'], 90, 1)[60:]
  test = manifest['sets']['law']['test']
  assert test['documents'] == 30 and test['bytes'] == sum(len(t.encode()) for t in texts)
  assert test['tokens'] == test['bytes'] + 30  # bytes and one EOS each
  generic = manifest['sets']['generic']
  assert sum(s['documents'] for s in generic.values()) == 480
  assert all(s['documents'] > 20 for s in generic.values())
  train = generic['train']
  assert train['tokens'] / train['rows'] / 63 > 0.9  # packing efficiency
  assert set(manifest['cost']) == {'documents', 'tokenizer', 'windows', 'clusters', 'rows'}
  assert manifest['cost']['clusters']['flops'] > 0


@pytest.mark.parametrize('module, name', [(rows, 'write'), (documents, 'cut')])
def test_a_killed_run_continues_to_the_same_bytes(cfg, tmp_path, monkeypatch, module, name):
  calls, real = [], getattr(module, name)

  def dies(task):
    calls.append(task)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return real(task)

  monkeypatch.setattr(module, name, dies)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare(cfg)
  assert not (pathlib.Path(cfg.out) / 'manifest.json').exists()
  monkeypatch.setattr(module, name, real)
  prepare.prepare(cfg)
  expected = state(toy.prepared())
  expected.pop('index/law-is.npy', None)  # another test adds it
  assert state(cfg.out) == expected


def test_lost_and_cut_files_are_made_again(cfg):
  prepare.prepare(cfg)
  before, out = state(cfg.out), pathlib.Path(cfg.out)
  (out / 'manifest.json').write_text('{"version": 2, "cont')
  (out / 'generic/train/rows-00000-of-00001.array_record').unlink()
  (out / 'law/test/rows-00000-of-00001.npy').write_bytes(b'cut')
  next((out / 'windows/tokens/generic').glob('*.npz')).unlink()
  prepare.prepare(cfg)
  assert state(cfg.out) == before


def test_unreadable_summaries_and_lost_outputs_are_made_again(cfg, capsys):
  prepare.prepare(cfg)
  before, out = state(cfg.out), pathlib.Path(cfg.out)
  summary = next((out / 'windows/tokens/law').glob('*.clusters.json'))
  rows_summary = out / 'law/test/rows-00000-of-00001.json'

  def damage():
    for path in (out / 'manifest.json', summary, rows_summary, out / 'index/law-500.json'):
      path.write_text(path.read_text()[:-9])
    for name in ('index/law-2000.npy', 'clusters/histograms.md', 'clusters/histograms.png'):
      (out / name).unlink()

  for verify in (False, True):
    damage()
    capsys.readouterr()
    prepare.prepare(cfg, verify)
    assert state(cfg.out) == before and (out / 'clusters/histograms.png').exists()
    loader.Split(cfg.out, 'law', 'train', 'law-500')
  errors = capsys.readouterr().err
  for path in (out / 'manifest.json', summary, rows_summary):
    assert f'{path}: truncated or damaged' in errors and files.read_json(path)


def test_complete_directory_is_left_alone(cfg, monkeypatch):
  prepare.prepare(cfg)
  monkeypatch.setattr(work, 'run', None)  # no stage may run
  assert prepare.prepare(cfg) == loader.manifest(cfg.out)


def test_workers_do_not_change_the_result(cfg):
  prepare.prepare(toy.config(pathlib.Path(cfg.out).parent, cfg.sets, workers=2))
  assert state(cfg.out)['manifest'] == state(toy.prepared())['manifest']


def test_changed_config_and_sources_are_refused(cfg, tmp_path):
  prepare.prepare(cfg)
  expect('what another config made: context was 64, now 32', tmp_path, cfg.sets, context=32)
  toy.write_jsonl(tmp_path / 'generic-2.jsonl', ['a new file'])
  expect('out: .*generic-2.jsonl is new since it was prepared', tmp_path, cfg.sets)
  (tmp_path / 'out/manifest.json').unlink()
  expect('out: .*generic-2.jsonl is new since it was prepared', tmp_path, cfg.sets)
  (tmp_path / 'generic-2.jsonl').unlink()
  plain = tmp_path / 'generic-1.jsonl'
  text = plain.read_bytes()
  os.utime(plain, ns=(0, 0))  # a new time of change alone is no change
  prepare.prepare(cfg)
  plain.write_bytes(text.replace(b'ship', b'boat'))
  expect('out: .*generic-1.jsonl has other content since', tmp_path, cfg.sets)
  plain.rename(tmp_path / 'elsewhere.jsonl')
  expect('out: .*generic-1.jsonl is gone since', tmp_path, cfg.sets)


@pytest.mark.parametrize(
  ('changes', 'named', 'message'),
  [
    ({'out': 'gs://bucket/data'}, {}, 'out=gs://bucket/data: is written .* give a --runner'),
    ({'sets': {'generic': {'all': 'gs://b/*.txt'}}}, {}, 'gs://b/.*: is read .* give a --runner'),
    ({}, {'runner': 'flink'}, r'--runner=flink: needs apache-beam, pip install slm\[beam\]'),
  ],
)
def test_apache_beam_is_named_where_it_is_needed(tmp_path, monkeypatch, changes, named, message):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  cfg = toy.config(tmp_path, **{'sets': toy.corpus(tmp_path)} | changes)
  with pytest.raises(ValueError, match=message):
    prepare.prepare(cfg, **named)
  assert not (tmp_path / 'out').exists()


def test_another_tokenizer_in_the_same_file_is_refused(tmp_path):
  sets, path = toy.corpus(tmp_path), tmp_path / 'bpe.json'
  tokenizers.Tokenizer(tokenizers.models.WordLevel({'<unk>': 0}, '<unk>')).save(str(path))
  huggingface = settings.TokenizerConfig('huggingface', 0, str(path))
  cfg = toy.config(tmp_path, sets, tokenizer=huggingface)
  stamps = prepare._contents(cfg, {}, {})
  assert list(stamps) == [str(path)]
  path.write_text(path.read_text() + ' ')
  with pytest.raises(ValueError, match='bpe.json has other content since it was prepared'):
    prepare._same_contents(tmp_path, stamps, prepare._contents(cfg, {}, stamps))
  prepare._sources(cfg, tmp_path / 'out')
  record = files.read_json(tmp_path / 'out/prepare.json')
  assert str(path) in record.pop('contents')
  files.write_json(tmp_path / 'out/prepare.json', record)  # as earlier versions wrote it
  prepare._sources(cfg, tmp_path / 'out')


def test_only_the_files_of_a_tokenizer_are_inputs(tmp_path):
  (folder := tmp_path / 'model').mkdir()
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<unk>': 0}, '<unk>'))
  model.save(str(folder / 'tokenizer.json'))
  (folder / 'config.json').write_text('{}')
  huggingface = settings.TokenizerConfig('huggingface', 0, str(folder))
  cfg, out = toy.config(tmp_path, toy.corpus(tmp_path), tokenizer=huggingface), tmp_path / 'out'
  prepare._sources(cfg, out)
  record = files.read_json(out / 'prepare.json')
  read = {str(folder / name) for name in ('tokenizer.json', 'config.json')}
  assert {path for path in record['contents'] if path.startswith(str(folder))} == read
  (folder / 'README.md').write_text('added later')
  prepare._sources(cfg, out)
  record['contents'][str(folder / 'onnx/model.onnx')] = [1, 0, '']  # as earlier versions recorded
  files.write_json(out / 'prepare.json', record)
  prepare._sources(cfg, out)
  (folder / 'config.json').unlink()
  with pytest.raises(ValueError, match='config.json is gone since it was prepared'):
    prepare._sources(cfg, out)


def test_what_an_earlier_version_prepared_goes_by_sizes(cfg, tmp_path):
  """Its record has no hashes of inputs, its manifest and summaries have no hashes of files."""
  prepare.prepare(cfg)
  before, out = state(cfg.out), tmp_path / 'out'
  record = files.read_json(out / 'prepare.json')
  del record['contents']
  files.write_json(out / 'prepare.json', record)
  manifest = files.read_json(out / 'manifest.json')
  for splits in manifest['sets'].values():
    for facts in splits.values():
      del facts['files']
  files.write_json(out / 'manifest.json', manifest)
  for path in out.rglob('*.json'):
    content = files.read_json(path)
    if 'seconds' in content:
      content['files'] = {name: size for name, (size, _) in content['files'].items()}
      files.write_json(path, content)
  assert 'files' not in prepare.prepare(cfg)['sets']['generic']['train']
  (out / 'generic/train/rows-00000-of-00001.array_record').write_bytes(b'')
  prepare.prepare(cfg)
  assert {**state(cfg.out), 'manifest': ''} == {**before, 'manifest': ''}
  toy.write_jsonl(tmp_path / 'generic-1.jsonl', ['shorter'])
  expect('generic-1.jsonl has other content', tmp_path, cfg.sets)


@pytest.mark.parametrize('name', ['rows-00000-of-00001.array_record', 'clusters.npy'])
def test_damaged_rows_are_named_and_made_again(cfg, name, capsys):
  prepare.prepare(cfg)
  before, path = state(cfg.out), pathlib.Path(cfg.out) / 'generic/train' / name
  whole = path.read_bytes()
  for damage in (path.unlink, lambda: path.write_bytes(b''), lambda: path.write_bytes(whole[:99])):
    damage()
    with pytest.raises(ValueError, match=f'{name}: .*slm.data.prepare makes it again'):
      loader.Split(cfg.out, 'generic', 'train')
    prepare.prepare(cfg)
    assert state(cfg.out) == before
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1
  path.write_bytes(flipped)
  prepare.prepare(cfg)
  assert path.read_bytes() == flipped  # undetected: the size is the same
  capsys.readouterr()
  prepare.prepare(cfg, verify=True)
  assert f'{path}: is not as it was written: it is made again' in capsys.readouterr().err
  assert state(cfg.out) == before


def test_flipped_bits_in_a_record_are_one_line(cfg):
  prepare.prepare(cfg)
  split = loader.Split(cfg.out, 'generic', 'train')
  path = pathlib.Path(cfg.out) / 'generic/train' / split.facts['shards'][0]
  data = bytearray(path.read_bytes())
  for i in range(len(data) // 4, 3 * len(data) // 4):
    data[i] ^= 0xFF
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r'generic/train: .*record.* slm.data.prepare .*--verify'):
    loader.Split(cfg.out, 'generic', 'train').read(np.arange(split.facts['rows']))


def test_duplicates_leave_training_first(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, '_BUCKET', 8)  # several ranges of hashes
  texts = toy.documents(list(toy.TOPICS), 60, 0)
  toy.write_jsonl(tmp_path / 'train.jsonl', [*texts[:50], *texts[10:20]])
  toy.write_jsonl(tmp_path / 'test.jsonl', [texts[0], *texts[50:], texts[50]])
  sets = {'generic': {k: str(tmp_path / f'{k}.jsonl') for k in ('train', 'test')}}
  splits = prepare.prepare(toy.config(tmp_path, sets))['sets']['generic']
  assert (splits['train']['documents'], splits['train']['duplicates']) == (49, 11)
  assert (splits['test']['documents'], splits['test']['duplicates']) == (11, 1)


def test_held_out_text_of_any_set_leaves_training(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, '_BUCKET', 8)
  texts = toy.documents(list(toy.TOPICS), 80, 0)
  parts = {
    'generic.train': texts[:40],
    'generic.test': [*texts[40:50], texts[70]],  # 70 is held out twice: kept in both
    'law.train': [*texts[45:60], *texts[:5], texts[70]],  # 45..49, 70 are held out; 0..4 trained on
    'law.test': [*texts[60:72], *texts[35:40]],  # 35..39 are in generic.train
  }
  sets: dict = {'generic': {}, 'law': {}}
  for key, part in parts.items():
    name, split = key.split('.')
    sets[name][split] = str(toy.write_jsonl(tmp_path / f'{key}.jsonl', part))
  facts = prepare.prepare(toy.config(tmp_path, sets))['sets']
  counts = {f'{s}.{k}': facts[s][k]['documents'] for s in sets for k in sets[s]}
  assert counts == {'generic.train': 35, 'generic.test': 11, 'law.train': 15, 'law.test': 17}


def test_split_depends_on_the_document_alone():
  digests = [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(5000)]
  splits = np.array([documents.hash_split(d, (0.1, 0.2)) for d in digests])
  np.testing.assert_allclose(np.bincount(splits) / 5000, [0.7, 0.1, 0.2], atol=0.02)


def test_id_field_keeps_parts_together(tmp_path):
  lines = [
    json.dumps({'body': f'{t} {part}', 'book': i % 40})
    for part in range(4)
    for i, t in enumerate(toy.documents(list(toy.TOPICS), 40, 0))
  ]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  sets = {'generic': {'all': str(tmp_path / 'a.jsonl')}}
  cfg = toy.config(tmp_path, sets, text_field='body', id_field='book', heldout=(0.2, 0.2))
  splits = prepare.prepare(cfg)['sets']['generic']
  assert all(s['documents'] % 4 == 0 for s in splits.values())


def test_formats_read_alike(tmp_path):
  texts = ['one\u2028line\n', 'two\r\n\nwords', '\ud800 half a pair']
  plain = toy.write_jsonl(tmp_path / 'a.jsonl', texts).read_bytes()
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(plain))
  half = len(plain) // 2
  frames = [zstandard.compress(part) for part in (plain[:half], plain[half:])]
  (tmp_path / 'a.jsonl.zst').write_bytes(b''.join(frames))
  expected = [(t, '') for t in (*texts[:2], '? half a pair')]
  for path in tmp_path.iterdir():
    assert list(sources.read(str(path), 'text', '')) == expected
  (tmp_path / 'c.txt.jsonl').write_text('{"text": "one"}\n')
  assert list(sources.read(str(tmp_path / 'c.txt.jsonl'), 'text', '')) == [('one', '')]
  (tmp_path / 'b.txt').write_text('first\n\nstill first\n')
  assert list(sources.read(str(tmp_path / 'b.txt'), '', '')) == [('first\n\nstill first\n', '')]


def test_a_byte_order_mark_is_not_text(tmp_path):
  for name, content in {'a.jsonl': b'{"text": "one"}\n', 'a.txt': b'one'}.items():
    for suffix, pack in {'': bytes, '.gz': gzip.compress, '.zst': zstandard.compress}.items():
      path = tmp_path / f'{name}{suffix}'
      path.write_bytes(pack(codecs.BOM_UTF8 + content))
      assert list(sources.read(str(path), 'text', '')) == [('one', '')]


def test_zstd_frames_of_the_longest_window_are_read(tmp_path):
  """`zstd --long=31` writes such frames from a pipe, whose size is unknown."""
  settings = zstandard.ZstdCompressionParameters(window_log=31, compression_level=1)
  frame = zstandard.ZstdCompressor(compression_params=settings).compressobj()
  content = frame.compress(b'{"text": "one"}\n') + frame.flush()
  (tmp_path / 'a.jsonl.zst').write_bytes(content + zstandard.compress(b'{"text": "two"}\n'))
  texts = [text for text, _ in sources.read(str(tmp_path / 'a.jsonl.zst'), 'text', '')]
  assert texts == ['one', 'two']


def test_text_without_blank_lines_or_lines_is_cut(tmp_path, monkeypatch):
  for name, value in {'_TEXT_DOCUMENT': 100, '_LONGEST': 200, '_PIECE': 64}.items():
    monkeypatch.setattr(sources, name, value)
  for suffix, pack in {'': bytes, '.gz': gzip.compress, '.zst': zstandard.compress}.items():
    path = tmp_path / f'a.txt{suffix}'
    for text in ('a line é\n' * 200, 'é€𝄞x' * 500, 'short\n', 'a\n\n' * 300, '\n'):
      path.write_bytes(pack(text.encode()))
      documents = [t for t, _ in sources.read(str(path), '', '')]
      assert ''.join(documents) == text and max(map(len, documents)) <= 264
      assert all(t.endswith('\n') for t in documents) or '\n' not in text
    path.write_bytes(pack('é'.encode() * 400 + b'\nsecond\xff'))
    with pytest.raises(ValueError, match=f'a.txt{suffix}:2: not UTF-8'):
      list(sources.read(str(path), '', ''))
    path.write_bytes(pack(b'cut inside \xe2\x82'))
    with pytest.raises(ValueError, match=f'a.txt{suffix}:1: not UTF-8'):
      list(sources.read(str(path), '', ''))


def test_bad_sources(tmp_path):
  def fails(name: str, content: bytes, message: str, **fields) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      list(sources.read(str(path), **{'text_field': 'text', 'id_field': ''} | fields))

  line = b'{"text": "words", "id": 1}\n' * 3000
  fails('a.jsonl', line[:54] + b'{"text": \n', r'a.jsonl:3: not valid JSON')
  fails('a.jsonl', line[:27] + b'[' * 99_999, 'a.jsonl:2: not valid JSON .nested too deeply')
  fails('a.jsonl', line, r"a.jsonl:1: no field 'body'; the line has id, text", text_field='body')
  fails('a.jsonl', line, r"a.jsonl:1: no field 'key'", id_field='key')
  fails('a.jsonl', b'{"text": 3}', "a.jsonl:1: field 'text' is int, expected text")
  fails('a.jsonl', b'[]', 'a.jsonl:1: expected a JSON object, found list')
  fails('a.jsonl', line[:27] + b'{"text": "\xff"}', 'a.jsonl:2: not UTF-8')
  fails('a.jsonl.gz', gzip.compress(line)[:-20], r'a.jsonl.gz: truncated or unreadable after line')
  fails('a.jsonl.gz', line, r'a.jsonl.gz: truncated or unreadable after line 0')
  fails('a.jsonl.zst', zstandard.compress(line)[:-20], 'a.jsonl.zst: truncated or unreadable')
  fails('a.jsonl.zst', line, 'a.jsonl.zst: truncated or unreadable after line 0')


def test_bad_corpora(tmp_path):
  sets = toy.corpus(tmp_path)
  expect('nope.jsonl: no file matches', tmp_path, {'generic': {'all': 'nope.jsonl'}}, OSError)
  (tmp_path / 'x.csv').write_text('a')
  expect('x.csv: expected .jsonl or .txt', tmp_path, {'generic': {'all': str(tmp_path / '*.csv')}})
  (tmp_path / 'empty.jsonl').write_text('\n{"text": " "}\n')
  empty = {'all': str(tmp_path / 'empty.jsonl')}
  expect('sets.generic: no document in', tmp_path / 'a', {'generic': empty})
  toy.write_jsonl(tmp_path / 'tiny.jsonl', ['short'])
  tiny = {'train': str(tmp_path / 'tiny.jsonl')}
  expect('law/train: 6 tokens, less than one window of 64', tmp_path / 'b', sets | {'law': tiny})
  toy.write_jsonl(tmp_path / 'one.jsonl', ['one long document ' * 20])
  one = {'all': str(tmp_path / 'one.jsonl')}
  expect(r'no documents left.*\(law\.\w+=\.\.\.\)', tmp_path / 'c', sets | {'law': one})
  expect('999999 clusters need at least', tmp_path / 'd', sets, levels=(2, 999999))
  expect("one must be named 'generic'", tmp_path, {'law': tiny})
  expect('expected one source, or a train split', tmp_path, {'generic': {'test': 'x'}})
  expect('not usable as a folder name', tmp_path, {'generic': tiny, 'index': tiny})
  for wrong, right in (('valid', 'validation'), ('val', 'validation'), ('tests', 'test')):
    named = {'generic': tiny | {wrong: tiny['train']}}
    expect(f'generic.{wrong}: did you mean generic.{right}', tmp_path, named)
  expect('python:nope: expected python:docs', tmp_path / 'e', {'generic': {'all': 'python:nope'}})


def test_installed_text_is_deterministic_and_capped():
  first = list(installed.read('python:licences?max_mb=0.1', map))
  assert first == list(installed.read('python:licences?max_mb=0.1', map))
  assert 50_000 < sum(map(len, first)) <= 100_000 and min(map(len, first)) >= 200
  paragraphs = [' '.join(p.lower().split()) for t in first for p in t.split('\n\n')]
  assert len(set(paragraphs)) == len(paragraphs)


def test_installed_docstrings(monkeypatch):
  monkeypatch.setattr(installed, '_distributions', lambda: ['pytest'])
  texts = list(installed.read('python:docs?max_mb=0.4', map))
  assert 100_000 < sum(map(len, texts)) <= 400_000
  assert any(t.startswith('pytest\n\n') for t in texts)  # the description
  assert all(t.strip() for t in texts)


def test_installed_text_is_of_what_slm_requires(monkeypatch):
  packages = installed._distributions()
  assert {'jax', 'numpy', 'grain', 'packaging'} <= set(
    packages
  )  # packaging is an indirect requirement
  assert not {'slm', 'torch', 'transformers', 'pre_commit', 'ruff', 'pip'} & set(packages)
  assert packages == installed.closure(installed._requirements()[::-1])

  class Distribution:
    def __init__(self, name):
      self.metadata, self.requires = {'Name': name}, requires[name]

  requires = {
    'A_b': ['C.d>=1; python_version > "3"', 'e; extra == "x"', 'e; python_version < "3"', 'gone'],
    'C.d': ['a-b[x]==2'],
    'e': None,
  }
  known = {'a-b': 'A_b', 'C.d': 'C.d', 'e': 'e'}

  def distribution(name):
    if name not in known:
      raise importlib.metadata.PackageNotFoundError(name)
    return Distribution(known[name])

  monkeypatch.setattr(importlib.metadata, 'distribution', distribution)
  assert installed.closure(['a-b==1.0', 'e; extra == "test"']) == ['A_b', 'C.d']
  assert installed.closure(['e']) == ['e']


def test_requirements_are_those_installed_or_the_file(monkeypatch):
  monkeypatch.setattr(importlib.metadata, 'requires', lambda name: [f'needs-{name}'])
  assert installed._requirements() == ['needs-slm']

  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'requires', missing)
  requirements = installed._requirements()
  assert any(line.startswith('jax==') for line in requirements)
  assert not any(line.startswith('#') for line in requirements)


def test_shares_fill_the_limit():
  assert installed._share([10, 20, 300, 400], 100) == 35
  assert installed._share([10, 20], 100) >= 20
  assert installed._share([50, 50], 60) == 30


def test_entry_point(tmp_path):
  root = pathlib.Path(__file__).parent.parent
  sets = toy.corpus(tmp_path)
  arg = f'generic={sets["generic"]["all"]},law.train={sets["law"]["train"]}'
  base = [sys.executable, '-m', 'slm.data.prepare', f'--out={tmp_path / "o"}']
  overrides = ['--config.levels=(2,4)', '--config.tokenizer.vocab=400', '--config.workers=1']

  def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*base, *arguments], capture_output=True, text=True, cwd=root)

  done = run(f'--config=configs/data.py:{arg}', *overrides)
  assert done.returncode == 0, done.stderr
  assert '| 4 | law |' in done.stdout and 'bytes per token' in done.stdout
  assert (tmp_path / 'o/clusters/histograms.png').stat().st_size > 1000
  assert loader.manifest(tmp_path / 'o')['tokenizer']['name'] == 'sentencepiece'
  bad = run('--config=configs/data.py:generic=missing-*.jsonl')
  assert bad.returncode == 1
  assert bad.stderr.strip().splitlines()[-1].startswith('error: ')
