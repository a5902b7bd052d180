"""TFDS sources: a small set built here is prepared like a file of the same documents."""

import os
import pathlib
import subprocess
import sys

import pytest
import toy

from slm.data import loader, prepare, sources


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """Build the set in another process, so that its files are read without its code."""
  root = tmp_path_factory.mktemp('tfds')
  script = pathlib.Path(__file__).with_name('toy_tfds.py')
  env = os.environ | {'PYTHONPATH': str(script.parent.parent)}
  command = [sys.executable, script, str(root)]
  done = subprocess.run(command, capture_output=True, text=True, env=env)
  assert done.returncode == 0, done.stderr
  return root


def test_shards_hold_every_document_once(built):
  spec = f'tfds:toy_text?data_dir={built}'
  shards = sources.expand(spec)
  assert list(shards) == [f'{spec}#shard={i}' for i in range(3)] and min(shards.values()) > 0
  documents = [document for shard in shards for document in sources.read(shard, 'text', 'name')]
  texts = toy.documents(list(toy.TOPICS), 200, 0)
  assert sorted(text for text, _ in documents) == sorted(texts)
  assert sorted(name for _, name in documents) == sorted(f'document {i}' for i in range(200))
  assert 'tensorflow' not in sys.modules
  test = sources.expand(f'tfds:toy_text:1.2.0?split=test&data_dir={built}')
  assert sum(1 for shard in test for _ in sources.read(shard, 'text', '')) == 20


def test_prepared_like_a_file_of_the_same_documents(built, tmp_path):
  file = toy.write_jsonl(tmp_path / 'same.jsonl', toy.documents(list(toy.TOPICS), 200, 0))
  prepared = []
  for name, source in (('tfds', f'tfds:toy_text?data_dir={built}'), ('file', str(file))):
    cfg = toy.config(tmp_path, {'generic': {'all': source}}, out=str(tmp_path / name), sizes=())
    facts = prepare.prepare(cfg)['sets']['generic']
    split = loader.Split(cfg.out, 'generic', 'train')
    windows = [
      bytes(tokens[segments == i])
      for tokens, segments in zip(*split.read(split.ids).values(), strict=True)
      for i in range(1, segments.max() + 1)
    ]
    counts = [[facts[s][key] for key in ('documents', 'windows', 'tokens', 'bytes')] for s in facts]
    prepared.append((counts, sorted(windows)))  # not the rows: the order of documents differs
  assert prepared[0] == prepared[1]


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('tfds:toy_text?split=later&data_dir={}', "no split 'later'; there are: t"),
    ('tfds:nothing?data_dir={}', 'make it with: tfds build nothing --file_format=array_record'),
    ('tfds:c4/en?data_dir={}', 'no such set in'),
    ('tfds:toy_text?shuffle=1&data_dir={}', 'expected tfds:NAME'),
    ('tfds:', 'expected tfds:NAME'),
  ],
)
def test_what_is_not_there_is_one_line(spec, message, built):
  with pytest.raises(ValueError, match=message) as error:
    sources.expand(spec.format(built))
  assert '\n' not in str(error.value)


def test_fields_are_checked(built):
  (first, *_) = sources.expand(f'tfds:toy_text?data_dir={built}')
  with pytest.raises(ValueError, match="no field 'body'; examples have name, number, text"):
    list(sources.read(first, 'body', ''))
  with pytest.raises(ValueError, match="field 'number' is int, expected text"):
    list(sources.read(first, 'number', ''))
