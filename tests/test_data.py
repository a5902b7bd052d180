"""Rows and the loader: exact windows, one cluster per row, one stream for any number of hosts."""

import json
import pathlib
import shutil
import types

import numpy as np
import pytest
import tokenizers
import toy

from slm.data import documents, loader, prepare, rows, settings, tokenizer, work

BEGIN = types.SimpleNamespace(begin=(1,), ids=tokenizer.Ids(pad=0, bos=1, eos=2))
NONE = types.SimpleNamespace(begin=(), ids=BEGIN.ids)  # a tokenizer without begin tokens


def cfg(**changes) -> loader.DataConfig:
  return loader.DataConfig(**dict(path=toy.prepared(), batch_size=8) | changes)


def take(n: int, config: loader.DataConfig, **build) -> list[loader.Batch]:
  batches = loader.build(config, **build)
  return [next(batches) for _ in range(n)]


def equal(a: loader.Batch, b: loader.Batch) -> bool:
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('n', [0, 1, 6, 7, 8, 14, 100])
def test_windows_cover_the_text_exactly(n):
  ids = list(range(10, 10 + n))
  windows = list(documents.windows(ids, 8, BEGIN))
  assert all(2 <= len(w) <= 8 and w[0] == 1 and w.dtype == np.int32 for w in windows)
  assert np.concatenate([w[1:] for w in windows]).tolist() == [*ids, 2]


@pytest.mark.parametrize('n', [0, 1, 6, 7, 8, 14, 15, 100])
def test_windows_without_a_begin_token_predict_all_but_the_first(n):
  ids = list(range(10, 10 + n))
  windows = list(documents.windows(ids, 8, NONE))
  assert all(2 <= len(w) <= 8 and w.dtype == np.int32 for w in windows)
  assert [i for w in windows for i in w[1:]] == [*ids, 2][1:]
  assert [w[0] for w in windows] == [*ids, 2][:-1:7]  # the last token of the previous window


def test_rows_hold_every_window_once_with_one_cluster():
  rng = np.random.default_rng(0)
  windows = [(int(rng.integers(5)), rng.integers(3, 99, rng.integers(2, 33))) for _ in range(2000)]
  numbered = ((cluster, i, window) for i, (cluster, window) in enumerate(windows))
  packed = [(c, [w for _, w in row]) for c, row in rows.pack(numbered, 32)]
  key = lambda cluster, window: (cluster, window.tobytes())  # noqa: E731
  packed_windows = sorted(key(c, w) for c, row in packed for w in row)
  assert packed_windows == sorted(key(c, w) for c, w in windows)
  used = sum(len(w) for _, w in windows)
  assert used / (32 * len(packed)) > 0.9
  assert all(sum(map(len, row)) <= 32 for _, row in packed)


def test_main_document_of_a_row():
  window = lambda n: np.zeros(n, np.int32)  # noqa: E731
  assert rows.main_document([(4, window(5)), (2, window(9)), (4, window(6))]) == 4
  assert rows.main_document([(7, window(5)), (2, window(5))]) == 7
  # 4 predicted tokens in one window of 5 tokens, 3 in two windows of 2 and 3
  assert rows.main_document([(2, window(2)), (2, window(3)), (9, window(5))]) == 9


def test_document_ids_name_the_text_of_each_row(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, '_SHARD', 400)
  monkeypatch.setattr(rows, 'BLOCK', 2)
  # One letter per document, so that a row shows which documents it holds.
  texts = [chr(ord('a') + i) * (30 + 17 * i) for i in range(20)]
  generic = toy.write_jsonl(tmp_path / 'generic.jsonl', texts[:12])
  law = toy.write_jsonl(tmp_path / 'law.jsonl', texts[12:])
  test = toy.write_jsonl(tmp_path / 'test.jsonl', ['A' * 100])
  sets = {
    'generic': {'train': str(generic)},
    'law': {'train': str(law), 'test': str(test)},
  }
  changes = dict(levels=(1, 2), fit_windows=30, sizes=())
  manifest = prepare.prepare(toy.config(tmp_path, sets, **changes))
  path, offset = str(tmp_path / 'out'), ord('a') + 3
  for set, first in (('generic', 0), ('law', 12)):
    owners = loader.Split(str(path), set, 'train').documents
    facts = manifest['sets'][set]['train']
    assert owners.dtype == np.int32 and len(owners) == facts['rows']
    assert len(facts['shards']) > 1  # documents are numbered across shards
    assert owners.min() >= 0 and owners.max() < facts['documents'] and len(np.unique(owners)) > 3
    for _, ids, batch in loader.evaluation_batches(path, set, 'train', 4):
      for id, inputs, targets, weights in zip(
        ids, batch['inputs'], batch['targets'], batch['weights'], strict=True
      ):
        letters = targets[(weights > 0) & (targets >= offset)] - offset - first
        if id >= 0:
          letter_counts = np.bincount(letters, minlength=20)
          assert letter_counts[owners[id]] >= letter_counts.max() - 1, inputs  # EOS may decide
  assert (loader.Split(str(path), 'law', 'test').documents == 0).all()


def test_a_record_holds_the_columns_that_are_declared():
  declared = [*rows.columns(4), {'name': 'weights', 'dtype': 'float32', 'shape': [4]},
              {'name': 'crops', 'dtype': 'uint8', 'shape': [2, 3]}]  # fmt: skip
  record = rows.layout(json.loads(json.dumps(declared)))
  row = rows.packed([np.array([1, 5, 6])], 4)
  row |= {'weights': np.array([0, 0.5, 0.25, 0]), 'crops': np.arange(6).reshape(2, 3)}
  read = rows.decode([rows.encode(row, record)] * 2, record)
  for name, values in row.items():
    np.testing.assert_array_equal(read[name], np.stack([values] * 2))
  batch = rows.batch(read)
  assert batch['weights'].tolist() == [[0.5, 0.25, 0, 0]] * 2  # of the predicted token
  assert batch['crops'].shape == (2, 2, 3) and batch['inputs'].shape == (2, 4)
  for wrong in ({'tokens': row['tokens']}, row | {'other': row['tokens']},
                row | {'crops': np.zeros(3)}):  # fmt: skip
    with pytest.raises(ValueError, match='row: '):
      rows.encode(wrong, record)
  with pytest.raises(ValueError, match='expected a name, dtype and shape'):
    rows.layout([{'name': 'tokens', 'dtype': 'no type', 'shape': [4]}])


def test_further_columns_reach_the_batches(tmp_path):
  """A column of weights in the records scales the weights of the batches."""
  shutil.copytree(toy.prepared(), path := tmp_path / 'data')
  manifest = json.loads((path / 'manifest.json').read_text())
  manifest['columns'].append({'name': 'weights', 'dtype': 'float32', 'shape': [64]})
  record = rows.layout(manifest['columns'])
  plain = loader.Split(toy.prepared(), 'generic', 'train')
  (shard,) = manifest['sets']['generic']['train']['shards']
  with work.record_writer(path / 'generic' / 'train' / shard) as writer:
    for i in plain.ids.tolist():
      row = {name: x[0] for name, x in plain.read(np.array([i])).items()}
      writer.write(rows.encode(row | {'weights': np.full(64, 0.5)}, record))
  (path / 'manifest.json').write_text(json.dumps(manifest))
  batches = take(2, cfg(path=str(path)))
  for half, whole in zip(batches, take(2, cfg()), strict=True):
    np.testing.assert_array_equal(2 * half['weights'], whole['weights'])
    np.testing.assert_array_equal(half['inputs'], whole['inputs'])


def test_a_directory_of_version_2_is_read(tmp_path, monkeypatch):
  shutil.copytree(toy.prepared(), path := tmp_path / 'data')
  manifest = json.loads((path / 'manifest.json').read_text())
  del manifest['columns']
  (path / 'manifest.json').write_text(json.dumps(manifest | {'version': 2}))
  monkeypatch.setattr(rows, 'columns', None)  # new columns do not change old directories
  assert equal(take(1, cfg(path=str(path)))[0], take(1, cfg())[0])


def test_row_fields():
  record = rows.layout(rows.columns(8))
  written = rows.encode(rows.packed([np.array([1, 5, 6]), np.array([1, 7, 2])], 8), record)
  assert written == np.array([[1, 5, 6, 1, 7, 2, 0, 0], [1, 1, 1, 2, 2, 2, 0, 0]], '<i4').tobytes()
  batch = rows.batch({name: x[0] for name, x in rows.decode([written], record).items()})
  assert batch['inputs'].tolist() == [1, 5, 6, 1, 7, 2, 0, 0]
  assert batch['targets'].tolist() == [5, 6, 1, 7, 2, 0, 0, 0]
  assert batch['segments'].tolist() == [1, 1, 1, 2, 2, 2, 0, 0]
  assert batch['positions'].tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
  assert batch['weights'].tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
  assert {k: v.dtype for k, v in batch.items()} == {
    'inputs': np.int32, 'targets': np.int32, 'segments': np.int32, 'positions': np.int32,
    'weights': np.float32,
  }  # fmt: skip


def test_epoch_has_every_row_once():
  facts = loader.manifest(toy.prepared())['sets']['generic']['train']
  for level, per_group in ((0, 1), (8, 4)):
    order = loader.Order(
      cfg(level=level, rows_per_group=per_group, batch_size=per_group),
      loader.Split(toy.prepared(), 'generic', 'train', level=level),
    )
    steps = int(order._chunk_ends[-1])
    ids = np.concatenate([order.step(s)[1].ravel() for s in range(steps)])
    assert sorted(ids[ids >= 0]) == list(range(facts['rows']))
    again = np.concatenate([order.step(s)[1].ravel() for s in range(steps, 2 * steps)])
    assert sorted(again[again >= 0]) == list(range(facts['rows']))
    assert (ids != again).any()


@pytest.mark.parametrize('level', [2, 8])
def test_groups_hold_one_cluster(level):
  config = cfg(level=level, rows_per_group=4, accum=2, batch_size=32)
  split = loader.Split(config.path, 'generic', 'train', level=level)
  order = loader.Order(config, split)
  for step in range(20):
    clusters, ids = order.step(step)
    for c, group in zip(clusters, ids, strict=True):
      assert (split.clusters[group[group >= 0]] == c).all()
  batch = take(1, config)[0]
  assert batch['inputs'].shape == (2, 4, 4, 64) and batch['condition'].shape == (2, 4)
  assert batch['condition'].dtype == np.int32


def test_every_order_cycles_over_each_cluster():
  config = cfg(level=8, order='every', rows_per_group=2, batch_size=32, accum=2)
  split = loader.Split(config.path, 'generic', 'train', level=8)
  order = loader.Order(config, split)
  sizes = np.bincount(split.clusters, minlength=8)
  seen = [order.step(s) for s in range(40)]
  for clusters, _ in seen:
    assert clusters.tolist() == [*range(8), *range(8)]
  stream = np.concatenate([ids.reshape(2, 8, 2) for _, ids in seen]).transpose(1, 0, 2)
  for c in range(8):
    first = stream[c].ravel()[: sizes[c]]
    assert len(np.unique(first)) == len(first) and (split.clusters[first] == c).all()


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'level': 8, 'rows_per_group': 2},
    {'level': 8, 'order': 'every'},
    {'level': 8, 'order': 'histogram', 'rows_per_group': 2},
    {'mix_share': 0.3, 'mix_set': 'law', 'mix_index': 'law-500'},
  ],
)
def test_same_global_batches_on_any_number_of_hosts(changes):
  config = cfg(**changes)
  whole = take(3, config)
  for count in (2, 4):
    parts = [take(3, config, process_index=i, process_count=count) for i in range(count)]
    for step, batch in enumerate(whole):
      for key, value in batch.items():
        joined = np.concatenate([part[step][key] for part in parts], axis=1)
        np.testing.assert_array_equal(joined, value)


def test_groups_follow_their_random_histogram():
  config = cfg(level=8, order='histogram', rows_per_group=4, batch_size=32, histogram_clusters=3)
  split = loader.Split(config.path, 'generic', 'train', level=8)
  order = loader.Order(config, split)
  drawn, expected, support = np.zeros(8), np.zeros(8), set()
  for step in range(300):
    histograms, ids = order.step(step)
    assert histograms.shape == (8, 8) and histograms.dtype == np.float32
    np.testing.assert_allclose(histograms.sum(1), 1, rtol=1e-6)
    for h, group in zip(histograms, ids, strict=True):
      clusters = split.clusters[group]
      assert (h[clusters] > 0).all()
      drawn += np.bincount(clusters, minlength=8) / len(group)
      expected += h
      support.add(int((h > 0).sum()))
  assert support == {1, 2, 3}
  np.testing.assert_allclose(drawn, expected, atol=5 * np.sqrt(expected.max() / 4))
  batch = take(1, config)[0]
  assert batch['condition'].shape == (1, 8, 8) and batch['inputs'].shape == (1, 8, 4, 64)


def test_mixing_puts_an_exact_share_of_another_sets_rows_between():
  config = cfg(mix_share=0.3, mix_set='law', mix_index='law-500', batch_size=8)
  law = loader.Split(config.path, 'law', 'train', 'law-500')
  own = {law.read(law.ids[i : i + 1])['tokens'].tobytes() for i in range(len(law.ids))}
  plain = [b['inputs'] for b in take(9, cfg(batch_size=8))]
  generic = iter(np.concatenate([b.reshape(-1, 64) for b in plain]))
  where, seen = [], []
  for batch in take(10, config):
    for tokens in batch['inputs'].reshape(-1, 64):
      row = tokens.astype(np.int32).tobytes()
      where.append(row in own)
      if where[-1]:
        seen.append(row)
      else:  # the generic rows keep their order
        np.testing.assert_array_equal(tokens, next(generic))
  assert sum(where) == 24 and np.flatnonzero(where)[:4].tolist() == [3, 6, 9, 13]
  assert set(seen[: len(own)]) == own  # every row of the domain once per epoch


def test_state_is_one_integer_and_resumes_anywhere():
  batches = take(6, cfg())
  for step in range(6):
    stream = loader.build(cfg())
    stream.set_state(step)
    assert stream.get_state() == step and isinstance(stream.get_state(), int)
    assert equal(next(stream), batches[step])
    assert stream.get_state() == step + 1


def test_seed_changes_the_order():
  assert not equal(take(1, cfg())[0], take(1, cfg(), seed=1)[0])


def test_evaluation_covers_a_split_once():
  path = toy.prepared()
  facts = loader.manifest(path)['sets']['law']['test']
  for level in (0, 2, 8):
    batches = list(loader.evaluation_batches(path, 'law', 'test', 4, level=level))
    ids = np.concatenate([i for _, i, _ in batches])
    assert sorted(ids[ids >= 0]) == list(range(facts['rows']))
    assert sum(b['weights'].sum() for _, _, b in batches) == facts['tokens']
    assert all(b['inputs'].shape == (4, 64) for _, _, b in batches)
    for condition, ids, batch in batches:
      assert (batch['weights'][ids < 0] == 0).all()
      if level:
        clusters = loader.Split(path, 'law', 'test', level=level).clusters
        assert (clusters[ids[ids >= 0]] == condition).all()
  few = [i for _, i, _ in loader.evaluation_batches(path, 'law', 'test', 4, max_rows=6)]
  assert (np.concatenate(few) >= 0).sum() == 6


def test_text_comes_back():
  path = toy.prepared()
  tok = tokenizer.load(pathlib.Path(path) / 'tokenizer')
  texts = json.dumps(toy.documents(['law', 'law', 'sea'], 90, 1)[60:])
  for _, ids, batch in loader.evaluation_batches(path, 'law', 'test', 4):
    for row in range(4):
      for segment in range(1, batch['segments'][row].max() + 1):
        window = batch['inputs'][row][batch['segments'][row] == segment]
        assert window[0] == tok.ids.bos
        if '\ufffd' not in (text := tok.decode(window)):  # a character cut in two
          assert json.dumps(text)[1:-1] in texts
    assert ids.shape == (4,)


def test_rows_begin_as_the_tokenizer_begins_texts(tmp_path):
  """Rows of a transformers tokenizer that puts nothing before a text."""
  words = sorted({w for t in toy.TOPICS.values() for w in t.split()})
  vocab = {w: i for i, w in enumerate(['<s>', '</s>', '<unk>', *words])}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '<unk>'))
  model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  (tmp_path / 'hf').mkdir()
  model.save(str(tmp_path / 'hf' / 'tokenizer.json'))
  (tmp_path / 'hf' / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')
  texts = toy.documents(['law', 'sea'], 40, 0)
  source = toy.write_jsonl(tmp_path / 'a.jsonl', texts)
  own = settings.TokenizerConfig('sentencepiece', 400, str(tmp_path / 'hf'))  # the path decides
  cfg = toy.config(
    tmp_path, {'generic': {'train': str(source)}}, tokenizer=own, levels=(1,), sizes=()
  )
  made = prepare.prepare(cfg)
  assert made['tokenizer']['begins'] is False and made['tokenizer']['name'] == 'huggingface'
  split, windows = loader.Split(cfg.out, 'generic', 'train'), []
  record = split.read(split.ids)
  for tokens, segments in zip(record['tokens'], record['segments'], strict=True):
    windows += [tokens[segments == i].tolist() for i in range(1, segments.max() + 1)]
  expected = [[vocab.get(w, 2) for w in t.split()] + [1] for t in texts]
  assert sorted(windows) == sorted(
    w[i : i + 64] for w in expected for i in range(0, len(w) - 1, 63)
  )
  facts = made['sets']['generic']['train']
  assert facts['tokens'] == sum(len(w) - 1 for w in expected)
  # Rows without this entry were made by a version that always put a begin token.
  path = pathlib.Path(cfg.out) / 'manifest.json'
  manifest = json.loads(path.read_text())
  del manifest['tokenizer']['begins']
  path.write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match='out: its rows begin with a token .*; prepare it again'):
    loader.manifest(cfg.out)


def copy(tmp_path) -> pathlib.Path:
  shutil.copytree(toy.prepared(), tmp_path / 'data', ignore=shutil.ignore_patterns('windows'))
  return tmp_path / 'data'


def test_refusals(tmp_path):
  path = toy.prepared()
  tok = loader.manifest(path)['tokenizer']
  loader.build(cfg(), tokenizer=tok['fingerprint'])
  with pytest.raises(ValueError, match=f'bytes tokenizer {tok["fingerprint"]}.* expects other'):
    loader.build(cfg(), tokenizer='other')
  for changes, message in {
    'set': 'nope/train: expected SET/SPLIT.*has generic/test.*law/train',
    'split': 'law/nope: expected SET/SPLIT.*such as law/test.*law/train',
    'index': 'no such index; there are: law-2000',
  }.items():
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      loader.build(cfg(**{'set': 'law', changes: 'nope'}))
  with pytest.raises(ValueError, match='is of law/train, not of generic/train'):
    loader.build(cfg(index='law-500'))
  with pytest.raises(ValueError, match='no level 5; there are: 2, 8'):
    loader.build(cfg(level=5))
  with pytest.raises(ValueError, match='8 groups per batch cannot be shared by 3'):
    loader.build(cfg(), process_count=3)
  with pytest.raises(ValueError, match='level \\* rows_per_group = 8, found 16'):
    loader.build(cfg(level=8, order='every', batch_size=16))
  with pytest.raises(ValueError, match='clusters .* have no rows in law/test'):
    loader.build(cfg(set='law', split='test', level=8, order='every'))
  for changes in ({'batch_size': 7, 'accum': 2}, {'order': 'random'}, {'rows_per_group': 2}):
    with pytest.raises(ValueError, match='data'):
      cfg(**changes)


def test_damaged_directories_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='manifest.json: not found'):
    loader.manifest(tmp_path)
  path = copy(tmp_path)
  text = (path / 'manifest.json').read_text()
  (path / 'manifest.json').write_text(text[:100])
  with pytest.raises(ValueError, match='manifest.json: truncated or damaged'):
    loader.manifest(path)
  (path / 'manifest.json').write_text(json.dumps(json.loads(text) | {'version': 99}))
  with pytest.raises(ValueError, match='expected version 3, found 99'):
    loader.manifest(path)
  (path / 'manifest.json').write_text(text)
  clusters = path / 'generic/train/clusters.npy'
  np.save(clusters, np.load(clusters)[:-1])
  with pytest.raises(ValueError, match='clusters.npy: has .* bytes, expected .* makes it again'):
    loader.build(cfg(path=str(path)))
  shutil.copy(pathlib.Path(toy.prepared()) / 'generic/train/clusters.npy', clusters)
  owners = path / 'generic/train/documents.npy'
  np.save(owners, np.load(owners)[:-1])
  with pytest.raises(ValueError, match='documents.npy: has .* bytes, expected'):
    loader.build(cfg(path=str(path)))
  index = path / 'index/law-500.npy'
  np.save(index, np.load(index)[::-1].copy())
  with pytest.raises(ValueError, match='does not match the hash'):
    loader.build(cfg(path=str(path), set='law', index='law-500'))
