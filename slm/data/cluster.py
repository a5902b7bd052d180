"""Clusters of windows: embeddings and k-means on the generic set, nested over several levels.

Windows are embedded by TF-IDF and SVD, or by a Sentence-BERT model that lies on this machine.
"""

import dataclasses
import functools
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
from slm.data import documents

Path = pathlib.Path
_FEATURES = 1 << 16
_CHUNK = 2048  # windows embedded at once


@dataclasses.dataclass(frozen=True)
class Model:
  """Everything that assigns a window to a cluster, as arrays.

  idf [features], components [dims, features], centroids [k, dims] (float32);
  parents maps each level to int32 [k], the cluster at that level of each finest cluster. With
  `sbert`, the directory of a sentence-transformers model, idf and components are empty.
  """

  idf: np.ndarray
  components: np.ndarray
  centroids: np.ndarray
  parents: dict[int, np.ndarray]
  sbert: str = ''


def count(texts: Sequence[str]) -> scipy.sparse.csr_matrix:
  """Count hashed words; no vocabulary has to be stored. Stop words and numbers carry no topic."""
  return _vectorizer().transform(texts)


@functools.cache
def _vectorizer() -> HashingVectorizer:
  return HashingVectorizer(
    n_features=_FEATURES,
    alternate_sign=False,
    norm=None,
    stop_words='english',
    token_pattern=r'(?u)\b[^\W\d]\w+\b',
    dtype=np.float32,
  )


def embed(model: Model, texts: Sequence[str]) -> tuple[np.ndarray, float]:
  """Embed windows as unit vectors float32 [n, dims], and count the FLOPs it took.

  A TF-IDF vector is zero where no word is known.
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
  """Load a sentence-transformers model from disk: safetensors alone, no code of its own."""
  try:
    from sentence_transformers import SentenceTransformer
  except ImportError:
    raise ValueError(f'sbert={path}: needs sentence-transformers, pip install slm[sbert]') from None
  if not (Path(path) / 'modules.json').is_file():
    raise ValueError(f'sbert={path}: expected the directory of a sentence-transformers model')
  weights = {'use_safetensors': True}
  try:
    return SentenceTransformer(
      path, local_files_only=True, trust_remote_code=False, model_kwargs=weights, device='cpu'
    )
  except (OSError, ValueError) as e:
    raise ValueError(f'sbert={path}: cannot be read ({str(e).splitlines()[0]})') from None


def _tfidf(model: Model, counts: scipy.sparse.csr_matrix) -> np.ndarray:
  weighted = _unit_rows(counts.multiply(model.idf).tocsr())
  points = np.asarray(weighted @ model.components.T)
  return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def _unit_rows(matrix: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
  norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
  return (scipy.sparse.diags(1 / np.maximum(norms, 1e-12)) @ matrix).astype(np.float32)


def assign(centroids: np.ndarray, points: np.ndarray) -> np.ndarray:
  """Find the nearest centroid: points [n, dims] -> int32 [n]."""
  distances = (centroids**2).sum(axis=1) - 2 * points @ centroids.T
  return distances.argmin(axis=1).astype(np.int32)


def fit(
  texts: Sequence[str], levels: Sequence[int], dims: int, seed: int, sbert: str = ''
) -> tuple[Model, float]:
  """Fit on windows of the generic set; also return the floating-point operations it took.

  Coarser levels are k-means of the next finer level's centroids, weighted by their sizes, so a
  cluster lies in one parent at each level.
  """
  levels = sorted(levels, reverse=True)
  if levels[0] > len(texts):
    raise ValueError(
      f'levels: {levels[0]} clusters need at least as many windows, and only {len(texts)} '
      'windows of generic/train were taken to fit them (fit_windows, or a small corpus)'
    )
  # One thread: sums over threads would make the clusters depend on the machine.
  with threadpoolctl.threadpool_limits(1):
    if sbert:
      nothing = np.zeros(0, np.float32)
      model = Model(nothing, nothing, nothing, {}, sbert)
      points, flops = embed(model, texts)
    else:
      model, points, flops = _fit_tfidf(texts, min(dims, len(texts) - 1) or 1, seed)
    kmeans = KMeans(levels[0], n_init=1, random_state=seed).fit(points)
    parents = {levels[0]: np.arange(levels[0], dtype=np.int32)}
    centroids, sizes = kmeans.cluster_centers_, np.bincount(kmeans.labels_, minlength=levels[0])
    for finer, level in zip(levels, levels[1:], strict=False):
      # Directions from the mean: plain centroids differ mostly in how tight their cluster is,
      # and their k-means gives one cluster most of the corpus.
      centred = centroids - np.average(centroids, axis=0, weights=np.maximum(sizes, 1))
      centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
      coarse = KMeans(level, n_init=20, random_state=seed)
      coarse.fit(centred, sample_weight=np.maximum(sizes, 1))
      parents[level] = coarse.labels_[parents[finer]].astype(np.int32)
      sizes = np.bincount(coarse.labels_, sizes, minlength=level)
      centroids = coarse.cluster_centers_
  flops += 2.0 * points.size * levels[0] * kmeans.n_iter_
  found = kmeans.cluster_centers_.astype(np.float32)
  return dataclasses.replace(model, centroids=found, parents=dict(sorted(parents.items()))), flops


def _fit_tfidf(texts: Sequence[str], dims: int, seed: int) -> tuple[Model, np.ndarray, float]:
  counts = count(texts)
  tfidf = TfidfTransformer().fit(counts)
  svd = TruncatedSVD(dims, random_state=seed).fit(tfidf.transform(counts))
  idf, components = (np.ascontiguousarray(x, np.float32) for x in (tfidf.idf_, svd.components_))
  model = Model(idf, components, np.zeros((0, dims), np.float32), {})
  # Randomised SVD passes over the counts twice per power iteration (5) and twice more.
  return model, _tfidf(model, counts), 2.0 * counts.nnz * (dims + 10) * 12


def save(model: Model, path: Path) -> None:
  """Write the model as safetensors."""
  arrays = {'idf': model.idf, 'components': model.components, 'centroids': model.centroids}
  arrays |= {f'parents_{k}': v for k, v in model.parents.items()}
  # Safetensors writes memory as it lies, so a transposed array would be read back scrambled.
  arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
  with files.replacing(path) as temporary:
    safetensors.numpy.save_file(arrays, temporary, {'sbert': model.sbert})


def load(path: Path) -> Model:
  """Read the model."""
  try:
    arrays = safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as e:
    raise ValueError(f'{path}: truncated or damaged ({e})') from None
  parents = {int(k.split('_')[1]): v for k, v in arrays.items() if k.startswith('parents_')}
  named = {k: v for k, v in arrays.items() if not k.startswith('parents_')}
  with safetensors.safe_open(path, 'np') as f:
    sbert = (f.metadata() or {}).get('sbert', '')
  return Model(**named, parents=dict(sorted(parents.items())), sbert=sbert)


@functools.cache
def _load_once(path: Path) -> Model:
  return load(path)


def assign_shard(task: tuple[Path, Path]) -> dict[str, Any]:
  """Write int32 [windows] of finest clusters beside a shard's windows (npz -> npy)."""
  model_path, windows_path = task
  model, tok = _load_once(model_path), documents.get_tokenizer()
  tokens, offsets, _, _ = documents.load_windows(windows_path)
  clusters, flops = [np.zeros(0, np.int32)], 0.0
  for start in range(0, len(offsets) - 1, _CHUNK):
    edges = offsets[start : start + _CHUNK + 1]
    texts = [tok.decode(tokens[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    with threadpoolctl.threadpool_limits(1):
      points, took = embed(model, texts)
      clusters.append(assign(model.centroids, points))
    flops += took + 2.0 * len(texts) * model.centroids.size
  out = windows_path.with_suffix('.npy')
  files.write_npy(out, np.concatenate(clusters))
  return {'files': [out.name], 'flops': flops}
