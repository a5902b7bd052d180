"""Importance of every channel, neuron, head, expert, layer and token, from sums over rows."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.models.observe import AGGREGATORS
from slm.pruning import measure, slicing
from slm.pruning.measure import Stats
from slm.weights.axes import INPUTS, Params

Scores = dict[str, np.ndarray]  # by axis, the larger the more important
WIDTHS = ('embed', 'mlp', 'heads', 'experts', 'shared_mlp')


def over_sequences(moments: np.ndarray, count: int, tokens: str, sequences: str) -> np.ndarray:
  """Finish moments [...,3,2,n]: aggregate over sequences what was aggregated over tokens.

  Raises:
    ValueError: if an aggregator is unknown.
  """
  if {tokens, sequences} - set(AGGREGATORS):
    raise ValueError(f'aggregators: expected some of {AGGREGATORS}, found {tokens}, {sequences}')
  first, second = np.moveaxis(moments, (-3, -2), (0, 1))[AGGREGATORS.index(tokens)]
  if sequences == 'mean':
    return first / count
  if sequences == 'l2':
    return np.sqrt(second)
  return np.maximum(second / count - (first / count) ** 2, 0.0)


def activation_scores(stats: Stats, tokens: str = 'mean', sequences: str = 'l2') -> Scores:
  """Score by activations (Minitron §2.2): 'embed' [d], 'mlp' [l,f], 'heads' [l,h], 'layers' [l].

  Of a mixture of experts 'mlp' is [l,e,f], over the tokens sent to each expert and the sequences
  that have some; 'experts' [l,e] is the mean of gate x ||output|| over those tokens (REAP).

  Channels are summed over the sites that read the residual stream, neurons are what goes into the
  down projection, heads what goes into the output projection, combined by their L2 norm. Layers
  are 1 - cos of what goes in and comes out (block influence).
  """
  sums, count = stats['sums'], stats['count']
  done = lambda x, count=count: over_sequences(x, count, tokens, sequences)
  heads = sums['attn']['heads']  # [l,3,2,h,c]
  elements = done(heads.reshape(*heads.shape[:3], -1)).reshape(len(heads), *heads.shape[3:])
  turned, seen = np.moveaxis(sums['turn'], -1, 0)
  found = {
    'embed': sum(done(sums[site]).sum(0) for site in ('attn_in', 'mlp_in')),
    'heads': np.sqrt((elements**2).sum(-1)),
    'layers': turned / np.maximum(seen, 1),
  }
  mlp = sums['mlp']
  if 'mlp' in mlp:
    return found | {'mlp': done(mlp['mlp'])}
  did, neurons = mlp['routed']['experts'], mlp['routed']['mlp']
  norms, sent, reached = np.moveaxis(did, -1, 0)
  found['experts'] = norms / np.maximum(sent, 1)
  found['mlp'] = done(neurons, np.maximum(reached, 1)[..., None])
  return found | ({'shared_mlp': done(mlp['shared']['mlp'])} if 'shared' in mlp else {})


def by_axis(values: Params) -> Scores:
  """Sum values, one for every weight, over what belongs to a channel, neuron, head or expert.

  The axis table says which weights that is.
  """
  found: dict[str, Any] = {}

  def add(path, value):
    names = slicing.axes(path)
    for axis in WIDTHS:
      if axis in names:
        keep = {axis, 'layers', *('experts',) * (axis == 'mlp')} if axis != 'embed' else {axis}
        others = tuple(i for i, name in enumerate(names) if name not in keep)
        found[axis] = found.get(axis, 0.0) + value.sum(others)

  jax.tree_util.tree_map_with_path(add, values)
  return {axis: np.asarray(score, np.float64) for axis, score in found.items()}


def weight_scores(params: Params) -> Scores:
  """Score by weights alone: the sum of squares over the matrices."""

  def square(path, w):
    return jnp.square(w.astype(jnp.float32)) if path[-1].key in INPUTS else jnp.zeros_like(w)

  return by_axis(jax.tree_util.tree_map_with_path(square, params))


def taylor_scores(params: Params, gradients: Params) -> Scores:
  """Score by the first-order change of the loss, |w dL/dw| summed over all weights of a unit.

  The gradient is of the loss of all rows together (Molchanov et al. 2019; LLM-Pruner).
  """
  return by_axis(
    jax.tree.map(lambda w, g: np.abs(np.asarray(w, np.float64) * g), params, gradients)
  )


def random_scores(like: Scores, seed: int) -> Scores:
  """Draw scores of the same shapes: what any criterion must beat."""
  rng = np.random.default_rng(seed)
  return {axis: rng.random(score.shape) for axis, score in like.items()}


def deletion_scores(sums: Params) -> np.ndarray:
  """Return by how much the loss per token rises without each window of `measure.windows` [n]."""
  nll = sums['nll'] / sums['weight']
  return nll[:-1] - nll[-1]


def best_window(layers: int, size: int, score: Callable[[np.ndarray], float]) -> np.ndarray:
  """Keep `size` layers [size]: without the contiguous others the model scores highest.

  The score, of the layers that stay, is any task's (as Minitron's Winogrande, arXiv 2408.11796);
  ties: the first window.
  """
  return max((np.flatnonzero(g) for g in measure.windows(layers, layers - size)[:-1]), key=score)


def mix(a: Scores, b: Scores, share: float) -> Scores:
  """Interpolate: (1 - share) a + share b, each axis over its mean size in a layer (or expert)."""
  unit = lambda x: x / np.maximum(np.abs(x).mean(-1, keepdims=True), 1e-30)
  return {axis: (1 - share) * unit(a[axis]) + share * unit(b[axis]) for axis in a}


def overlap(a: np.ndarray, b: np.ndarray) -> float:
  """Return the share of kept indices [...,n] that two kept sets have in common."""
  pairs = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
  return float(np.mean([np.isin(x, y).mean() for x, y in pairs]))


def keep(scores: Scores, sizes: Mapping[str, int], num_kv_heads: int) -> dict[str, np.ndarray]:
  """Choose the highest scores of each axis, indices ascending: kept sets of slm.pruning.slicing.

  Channels are the same in every layer. Every group of query heads keeps equally many. Scores of
  'windows' [n] choose the contiguous layers that go, the lowest score. A key-value head, which no
  published recipe removes, is worth what its query heads are; 'heads' says how many of those stay.

  Raises:
    ValueError: if an axis has no scores, or a size does not fit.
  """
  found = {}
  for axis, size in sizes.items():
    if axis == 'kv_heads':
      if 'heads' not in sizes:
        raise ValueError('prune: kv_heads: expected a size of heads beside it')
      continue  # chosen with the heads
    if axis not in scores:
      raise ValueError(f'prune: no scores for {axis!r}, there are: {", ".join(scores)}')
    score = scores[axis]
    if axis == 'heads':
      kv = sizes.get('kv_heads', num_kv_heads)
      if size % kv:
        raise ValueError(f'prune: {size} heads do not share {kv} key-value heads equally')
      groups = score.reshape(*score.shape[:-1], num_kv_heads, -1)
      of = _top(groups.sum(-1), kv, 'kv_heads')
      mine = _top(np.take_along_axis(groups, of[..., None], -2), size // kv, axis)
      found[axis] = (mine + of[..., None] * groups.shape[-1]).reshape(*score.shape[:-1], size)
      found |= {'kv_heads': of} if kv < num_kv_heads else {}
    elif axis == 'layers' and 'windows' in scores:
      gates = measure.windows(len(score), len(score) - size)
      found[axis] = np.flatnonzero(gates[np.argmin(scores['windows'])])
    else:
      found[axis] = _top(score, size, axis)
  return found


def _top(score: np.ndarray, size: int, axis: str) -> np.ndarray:
  """Return the ascending indices [...,size] of the highest scores; ties: the first."""
  if not 0 < size <= score.shape[-1]:
    raise ValueError(f'prune: {axis}: expected 1 to {score.shape[-1]}, found {size}')
  order = np.argsort(-score, axis=-1, kind='stable')
  return np.sort(order[..., :size], axis=-1)
