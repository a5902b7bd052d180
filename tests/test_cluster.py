"""Clusters: the plain scikit-learn pipeline, nesting, storage."""

import numpy as np
import pytest
import threadpoolctl
import toy
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from slm.data import cluster, loader

TEXTS = toy.documents(list(toy.TOPICS), 200, 0)


@pytest.fixture(scope='module')
def model() -> cluster.Model:
  return cluster.fit(TEXTS, (2, 4, 12), 8, 0)[0]


def test_embeddings_equal_scikit_learn(model):
  counts = cluster.count(TEXTS)
  pipeline = make_pipeline(
    TfidfTransformer(), TruncatedSVD(8, random_state=0), Normalizer(copy=False)
  )
  with threadpoolctl.threadpool_limits(1):  # the order of sums decides weak directions
    expected = pipeline.fit(counts).transform(counts)
  np.testing.assert_allclose(cluster.embed(model, TEXTS)[0], expected, atol=1e-5)


def test_assignment_equals_predict(model):
  points = cluster.embed(model, toy.documents(list(toy.TOPICS), 100, 7))[0]
  kmeans = KMeans(12, n_init=1, random_state=0).fit(cluster.embed(model, TEXTS)[0])
  np.testing.assert_array_equal(cluster.assign(model.centroids, points), kmeans.predict(points))


def test_topics_are_found(model):
  clusters = cluster.assign(model.centroids, cluster.embed(model, TEXTS)[0])
  clusters = model.parents[4][clusters]
  topic = np.arange(len(TEXTS)) % 4
  for c in range(4):
    assert len(np.unique(topic[clusters == c])) == 1


def test_levels_are_nested(model):
  assert list(model.parents) == [2, 4, 12]
  np.testing.assert_array_equal(model.parents[12], np.arange(12))
  for coarse, fine in ((2, 4), (4, 12)):
    assert sorted(np.unique(model.parents[coarse])) == list(range(coarse))
    for c in range(fine):
      assert len(np.unique(model.parents[coarse][model.parents[fine] == c])) == 1


def test_save_and_load(model, tmp_path):
  cluster.save(model, tmp_path / 'm.safetensors')
  again = cluster.load(tmp_path / 'm.safetensors')
  for name in ('idf', 'components', 'centroids'):
    np.testing.assert_array_equal(getattr(model, name), getattr(again, name))
  for level, parents in model.parents.items():
    np.testing.assert_array_equal(again.parents[level], parents)
  transposed = cluster.Model(model.idf, np.asfortranarray(model.components), model.centroids, {})
  cluster.save(transposed, tmp_path / 't.safetensors')
  np.testing.assert_array_equal(
    cluster.load(tmp_path / 't.safetensors').components, model.components
  )
  (tmp_path / 'm.safetensors').write_bytes(b'cut')
  with pytest.raises(ValueError, match='truncated or damaged'):
    cluster.load(tmp_path / 'm.safetensors')


def test_text_without_words_has_a_cluster(model):
  points = cluster.embed(model, ['', '1234 5678', 'the of and'])[0]
  np.testing.assert_array_equal(points, 0)
  assert cluster.assign(model.centroids, points).shape == (3,)


def test_too_many_clusters_are_refused():
  with pytest.raises(ValueError, match='300 clusters need at least as many windows, and only 200'):
    cluster.fit(TEXTS, (4, 300), 8, 0)


def test_domain_histogram_is_concentrated():
  path = toy.prepared()
  law, generic = (loader.histogram(path, s, 'train', 8) for s in ('law', 'generic'))
  assert law.sum() == pytest.approx(1) and generic.sum() == pytest.approx(1)
  assert (law > 0).sum() < (generic > 0).sum()


@pytest.fixture(scope='module')
def sbert(tmp_path_factory) -> str:
  """Save a tiny random Sentence-BERT model."""
  transformers = pytest.importorskip('transformers')
  st = pytest.importorskip('sentence_transformers')
  root = tmp_path_factory.mktemp('sbert')
  words = sorted({w for topic in toy.TOPICS.values() for w in topic.split()})
  (root / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *words]))
  shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
  config = transformers.BertConfig(vocab_size=len(words) + 5, **shape)
  transformers.BertModel(config).save_pretrained(root / 'bert')
  transformers.BertTokenizer(str(root / 'vocab.txt')).save_pretrained(root / 'bert')
  from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

  word = Transformer(str(root / 'bert'), max_seq_length=64)
  st.SentenceTransformer(modules=[word, Pooling(16)]).save(str(root / 'model'))
  return str(root / 'model')


def test_sentence_bert_embeds_instead(sbert, tmp_path):
  st = pytest.importorskip('sentence_transformers')
  fitted, flops = cluster.fit(TEXTS, (2, 4, 12), 8, 0, sbert)
  points, _ = cluster.embed(fitted, TEXTS)
  want = st.SentenceTransformer(sbert).encode(TEXTS, normalize_embeddings=True)
  np.testing.assert_allclose(points, want, atol=1e-5)
  assert fitted.centroids.shape == (12, 16) and flops > 0
  cluster.save(fitted, tmp_path / 'm.safetensors')
  again = cluster.load(tmp_path / 'm.safetensors')
  assert again.sbert == sbert
  np.testing.assert_array_equal(
    cluster.assign(again.centroids, cluster.embed(again, TEXTS)[0]),
    cluster.assign(fitted.centroids, points),
  )


def test_a_missing_sentence_bert_model_is_named(tmp_path):
  pytest.importorskip('sentence_transformers')
  with pytest.raises(ValueError, match='expected the directory of a sentence-transformers model'):
    cluster.fit(TEXTS, (2,), 8, 0, str(tmp_path))
