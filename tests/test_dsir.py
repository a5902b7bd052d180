"""Importance resampling by hashed n-grams: the published package, closed forms, the command."""

import subprocess
import sys

import numpy as np
import pytest
import toy

from slm.data import dsir, loader

RAW = toy.documents(list(toy.TOPICS), 60, 0)
TARGET = toy.documents(['law'], 12, 1)


def test_counts_words_and_pairs():
  matrix = dsir.count(['A b, a b', 'c'])
  by_hand = {}
  for gram in ('a', 'b', ',', 'a', 'b', 'a b', 'b ,', ', a', 'a b'):
    by_hand[dsir._bucket(gram)] = by_hand.get(dsir._bucket(gram), 0) + 1
  assert dict(zip(matrix[0].indices, matrix[0].data, strict=True)) == by_hand
  assert matrix.shape == (2, dsir.BUCKETS) and matrix[1].sum() == 1


def test_equals_the_published_package(tmp_path):
  """Features and log importance weights of p-lambda/dsir on a sample."""
  package = pytest.importorskip('data_selection')
  from data_selection.hashed_ngram_dsir import get_ngram_counts

  texts = [*RAW, "It's 5% of 3.14… naïve\n\tcafé __init__ x=1;", '']
  for text, row in zip(texts, dsir.count(texts), strict=True):
    np.testing.assert_array_equal(row.toarray()[0], get_ngram_counts(text))

  paths = [toy.write_jsonl(tmp_path / f'{n}.jsonl', t) for n, t in (('raw', RAW), ('to', TARGET))]
  theirs = package.HashedNgramDSIR(
    [str(paths[0])], [str(paths[1])], str(tmp_path / 'cache'), num_proc=1, min_example_length=0
  )
  theirs.fit_importance_estimator(num_tokens_to_fit='all')
  theirs.compute_importance_weights()
  (file,) = (tmp_path / 'cache').rglob('log_importance_weights/**/*.npy')
  rows, target = dsir.count(RAW), dsir.count(TARGET)
  total = lambda matrix: np.asarray(matrix.sum(axis=0)).ravel()
  ours = dsir.log_weights(rows, total(target), total(rows))
  np.testing.assert_allclose(ours, np.load(file), rtol=1e-9, atol=1e-9)


def test_gumbel_noise_draws_in_proportion_to_the_weights():
  """The first row drawn has probability w / sum w (Gumbel-max)."""
  w = np.array([1.0, 2.0, 5.0])
  first = [dsir.choose(np.log(w), np.ones(3, int), 1, seed)[0] for seed in range(4000)]
  np.testing.assert_allclose(np.bincount(first) / 4000, w / w.sum(), atol=0.03)
  order = dsir.choose(np.log(w), np.array([4, 4, 4]), 12, 0)
  assert sorted(order) == [0, 1, 2]
  np.testing.assert_array_equal(dsir.choose(np.log(w), np.array([4, 4, 4]), 5, 0), order[:2])
  with pytest.raises(ValueError, match='13 tokens requested, the rows hold 12'):
    dsir.choose(np.log(w), np.array([4, 4, 4]), 13, 0)


def test_counts_are_kept_for_the_same_rows(monkeypatch):
  split = loader.Split(toy.prepared(), 'law', 'test')
  matrix = dsir.features(split)
  with monkeypatch.context() as patch:
    patch.setattr(dsir, 'count', None)  # read, not counted again
    assert (dsir.features(split) != matrix).nnz == 0
  (path,) = (split.path / split.name).glob('ngrams*.npz')
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match=f'{path}: truncated or damaged'):
    dsir.features(split)
  split.facts['sha256'] = 'of other rows of the same number'
  assert (dsir.features(split) != matrix).nnz == 0
  for path in (split.path / split.name).glob('ngrams*.npz'):
    path.unlink()


def test_command_selects_the_domains_rows(tmp_path):
  path = toy.prepared()
  command = [sys.executable, '-m', 'slm.data.dsir', f'--data={path}', '--on=law/train@law-2000']
  command += ['--tokens=4000', '--out=law-dsir']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0 and 'law-dsir:' in done.stdout, done.stderr
  split = loader.Split(path, 'generic', 'train', 'law-dsir')
  assert len(np.unique(split.ids)) == len(split.ids)
  assert 4000 <= split.counts[split.ids, 1].sum() < 4200
  # The rows are from clusters that are frequent in the domain.
  clusters = loader.Split(path, 'generic', 'train', level=8).clusters
  law = loader.histogram(path, 'law', 'train', 8)
  assert law[clusters[split.ids]].mean() > 1.5 * law[clusters].mean()
  refused = subprocess.run([*command, '--tokens=1e9'], capture_output=True, text=True)
  assert refused.returncode == 1 and 'tokens requested, the rows hold' in refused.stderr


def test_smoothing_adds_to_each_count_of_the_domain():
  rows, target = dsir.count(RAW), np.asarray(dsir.count(TARGET[:1]).sum(axis=0)).ravel()
  raw = np.asarray(rows.sum(axis=0)).ravel()
  plain, smooth = (dsir.log_weights(rows, target, raw, s) for s in (0.0, 5.0))
  share = lambda x: x / x.sum()
  p, q = share(target + 5.0), share(raw.astype(float))
  expected = np.asarray(rows @ (np.log(p + 1e-8) - np.log(q + 1e-8))).ravel()
  np.testing.assert_allclose(smooth, expected, rtol=1e-6)
  assert np.abs(smooth - plain).max() > 0.1
