"""Clusters of windows: embeddings and k-means on the generic set, nested over several levels.

Windows are embedded by TF-IDF and SVD, or by a local Sentence-BERT model.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import scipy.sparse
import threadpoolctl
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from slm.base import files
from slm.data import documents, tokenizer

Path = pathlib.Path
FILE = 'model.safetensors'  # of the model, in clusters/
# Hashing needs no stored vocabulary.
_VECTORIZER = HashingVectorizer(
  n_features=1 << 16,
  alternate_sign=False,
  norm=None,
  stop_words='english',
  token_pattern=r'(?u)\b[^\W\d]\w+\b',
  dtype=np.float32,
)
_CHUNK = 2048  # windows embedded at once


@dataclasses.dataclass(frozen=True)
class Model:
  """The arrays that assign windows to clusters; all are float32 except `parents`."""

  idf: np.ndarray  # [features]; empty with `sbert`
  components: np.ndarray  # [dims, features]; empty with `sbert`
  centroids: np.ndarray  # [k, dims]
  parents: dict[int, np.ndarray]  # level -> int32 [k], the cluster there of each finest cluster
  sbert: str = ''  # directory of a sentence-transformers model that embeds instead of TF-IDF


def count(texts: Sequence[str]) -> scipy.sparse.csr_matrix:
  """Count the hashed words of each text [texts, features], without stop words and numbers."""
  return _VECTORIZER.transform(texts)


def embed(model: Model, texts: Sequence[str]) -> tuple[np.ndarray, float]:
  """Return unit vectors of windows, float32 [n, dims], and the FLOPs spent.

  The TF-IDF vector of a text without known words is zero.
  """
  if model.sbert:
    return _sbert(model.sbert, texts)
  counts = count(texts)
  return _tfidf(model, counts), 2.0 * counts.nnz * len(model.components)


def _sbert(path: str, texts: Sequence[str]) -> tuple[np.ndarray, float]:
  encoder = _encoder(path)
  points = encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
  tokens = encoder.tokenize(list(texts))['attention_mask'].sum().item() if len(texts) else 0
  weights = sum(p.numel() for n, p in encoder.named_parameters() if 'embeddings' not in n)
  dims = encoder.get_embedding_dimension()
  return np.asarray(points, np.float32).reshape(-1, dims), 2.0 * weights * tokens


@functools.cache
def _encoder(path: str) -> Any:
  """Load a sentence-transformers model from disk: safetensors only, without running its code."""
  try:
    from sentence_transformers import SentenceTransformer
  except ImportError:
    raise ValueError(f'sbert={path}: needs sentence-transformers, pip install slm[sbert]') from None
  if not (Path(path) / 'modules.json').is_file():
    raise ValueError(f'sbert={path}: expected the directory of a sentence-transformers model')
  options = {'local_files_only': True, 'trust_remote_code': False, 'device': 'cpu'}
  try:
    return SentenceTransformer(path, model_kwargs={'use_safetensors': True}, **options)
  except (OSError, ValueError) as e:
    raise ValueError(f'sbert={path}: cannot be read ({str(e).splitlines()[0]})') from None


def _tfidf(model: Model, counts: scipy.sparse.csr_matrix) -> np.ndarray:
  weighted = counts.multiply(model.idf).tocsr()
  norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
  unit = (scipy.sparse.diags(1 / np.maximum(norms, 1e-12)) @ weighted).astype(np.float32)
  points = np.asarray(unit @ model.components.T)
  return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def assign(centroids: np.ndarray, points: np.ndarray) -> np.ndarray:
  """Return the nearest centroid of each of the points [n, dims]: int32 [n]."""
  distances = (centroids**2).sum(axis=1) - 2 * points @ centroids.T
  return distances.argmin(axis=1).astype(np.int32)


def fit(
  texts: Sequence[str], levels: Sequence[int], dims: int, seed: int, sbert: str = ''
) -> tuple[Model, float]:
  """Fit clusters on windows of the generic set; also return the FLOPs spent.

  A coarser level is k-means of the next finer level's centroids, weighted by their sizes, so each
  cluster has one parent at every level.

  Raises:
    ValueError: if there are fewer texts than clusters.
  """
  levels = sorted(levels, reverse=True)
  if levels[0] > len(texts):
    raise ValueError(
      f'levels: {levels[0]} clusters need at least as many windows, and only {len(texts)} of '
      'generic/train are fitted: raise fit_windows, lower levels or give more text'
    )
  # One thread: sums over threads would make the clusters depend on the machine.
  with threadpoolctl.threadpool_limits(1):
    if sbert:
      model = Model(*[np.zeros(0, np.float32)] * 3, {}, sbert)
      points, flops = embed(model, texts)
    else:
      model, points, flops = _fit_tfidf(texts, min(dims, len(texts) - 1) or 1, seed)
    kmeans = KMeans(levels[0], n_init=1, random_state=seed).fit(points)
    parents = {levels[0]: np.arange(levels[0], dtype=np.int32)}
    centroids, sizes = kmeans.cluster_centers_, np.bincount(kmeans.labels_, minlength=levels[0])
    for finer, level in zip(levels, levels[1:], strict=False):
      # Directions from the mean: centroids themselves differ mostly in how tight their clusters
      # are, and k-means would give one cluster most of the corpus.
      centred = centroids - np.average(centroids, axis=0, weights=np.maximum(sizes, 1))
      centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
      coarse = KMeans(level, n_init=20, random_state=seed)
      coarse.fit(centred, sample_weight=np.maximum(sizes, 1))
      parents[level] = coarse.labels_[parents[finer]].astype(np.int32)
      sizes = np.bincount(coarse.labels_, sizes, minlength=level)
      centroids = coarse.cluster_centers_
  flops += 2.0 * points.size * levels[0] * kmeans.n_iter_
  centroids, parents = kmeans.cluster_centers_.astype(np.float32), dict(sorted(parents.items()))
  return dataclasses.replace(model, centroids=centroids, parents=parents), flops


def _fit_tfidf(texts: Sequence[str], dims: int, seed: int) -> tuple[Model, np.ndarray, float]:
  counts = count(texts)
  tfidf = TfidfTransformer().fit(counts)
  svd = TruncatedSVD(dims, random_state=seed).fit(tfidf.transform(counts))
  idf, components = (np.ascontiguousarray(x, np.float32) for x in (tfidf.idf_, svd.components_))
  model = Model(idf, components, np.zeros((0, dims), np.float32), {})
  # Randomised SVD passes over the counts twice in each of 5 power iterations, and twice more.
  return model, _tfidf(model, counts), 2.0 * counts.nnz * (dims + 10) * 12


def save(model: Model, path: Path) -> None:
  """Write the model as safetensors."""
  arrays = {'idf': model.idf, 'components': model.components, 'centroids': model.centroids}
  arrays |= {f'parents_{k}': v for k, v in model.parents.items()}
  # Safetensors writes the memory of an array as it is: a transposed one would be scrambled.
  arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
  with files.replacing(path) as temporary:
    safetensors.numpy.save_file(arrays, temporary, {'sbert': model.sbert})


def load(path: Path) -> Model:
  """Read the model.

  Raises:
    ValueError: if the file is damaged.
  """
  with files.reading(path), safetensors.safe_open(path, 'np') as f:
    arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (no mapping)
    sbert = (f.metadata() or {}).get('sbert', '')
  levels = sorted(int(name.split('_')[1]) for name in arrays if name.startswith('parents_'))
  parents = {level: arrays.pop(f'parents_{level}') for level in levels}
  return Model(**arrays, parents=parents, sbert=sbert)


_load_once = functools.cache(load)


def assign_shard(task: tuple[Path, documents.Cut]) -> dict[str, Any]:
  """Write the finest clusters of a shard's windows, int32 [windows], beside them (npz -> npy)."""
  model_path, cut = task
  model, made = _load_once(model_path), documents.load_windows(cut.out)
  clusters, flops = assign_windows(model, made, cut.tokenizer)
  out = cut.out.with_suffix('.npy')
  files.write_npy(out, clusters)
  return {'files': [out.name], 'flops': flops}


def assign_windows(
  model: Model, made: documents.Windows, tok: tokenizer.Tokenizer
) -> tuple[np.ndarray, float]:
  """Return the finest clusters of a shard's windows, int32 [windows], and the FLOPs spent."""
  clusters, flops = [np.zeros(0, np.int32)], 0.0
  for start in range(0, len(made.splits), _CHUNK):
    edges = made.offsets[start : start + _CHUNK + 1]
    texts = [tok.decode(made.tokens[a:b]) for a, b in itertools.pairwise(edges)]
    with threadpoolctl.threadpool_limits(1):
      points, took = embed(model, texts)
      clusters.append(assign(model.centroids, points))
    flops += took + 2.0 * len(texts) * model.centroids.size
  return np.concatenate(clusters), flops
