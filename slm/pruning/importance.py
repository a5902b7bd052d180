"""Importance of channels, neurons, heads, experts, layers and tokens, from sums over rows."""

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
  """Aggregate moments [...,3,2,n] of the aggregators over tokens over `count` sequences: [...,n].

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

  Channels are scored by the outputs of the norms, summed over layers; neurons by the inputs of the
  down projection; heads by the L2 norm of the inputs of the output projection; layers by block
  influence, 1 - cos of their input and output.

  In a mixture of experts 'mlp' is [l,e,f], over the tokens sent to each expert and the sequences
  that have some, and 'experts' [l,e] is the mean of gate x ||output|| over those tokens (REAP).
  """
  sums, count, mlp = stats['sums'], stats['count'], stats['sums']['mlp']
  score = lambda moments, count=count: over_sequences(moments, count, tokens, sequences)
  heads = sums['attn']['heads']  # [l,3,2,h,c]
  elements = score(heads.reshape(*heads.shape[:3], -1)).reshape(len(heads), *heads.shape[3:])
  distance, weight = np.moveaxis(sums['turn'], -1, 0)
  scores = {
    'embed': sum(score(sums[site]).sum(0) for site in ('attn_in', 'mlp_in')),
    'heads': np.sqrt((elements**2).sum(-1)),
    'layers': distance / np.maximum(weight, 1),
  }
  if 'routed' not in mlp:
    return scores | {'mlp': score(mlp['mlp'])}
  norms, sent, reached = np.moveaxis(mlp['routed']['experts'], -1, 0)
  scores['experts'] = norms / np.maximum(sent, 1)
  scores['mlp'] = score(mlp['routed']['mlp'], np.maximum(reached, 1)[..., None])
  if 'shared' in mlp:
    scores['shared_mlp'] = score(mlp['shared']['mlp'])
  return scores


def by_axis(values: Params) -> Scores:
  """Sum values, one for every weight, over the weights of each channel, neuron, head and expert."""
  scores: dict[str, Any] = {}

  def add(path, value):
    names = slicing.axes(path)
    for axis in WIDTHS:
      if axis in names:
        stacks = {'embed': (), 'mlp': ('layers', 'experts')}.get(axis, ('layers',))
        others = tuple(i for i, name in enumerate(names) if name not in (axis, *stacks))
        scores[axis] = scores.get(axis, 0.0) + value.sum(others)

  jax.tree_util.tree_map_with_path(add, values)
  return {axis: np.asarray(score, np.float64) for axis, score in scores.items()}


def weight_scores(params: Params) -> Scores:
  """Score by the sum of squares over the matrices."""

  def square(path, w):
    return jnp.square(w.astype(jnp.float32)) if path[-1].key in INPUTS else jnp.zeros_like(w)

  return by_axis(jax.tree_util.tree_map_with_path(square, params))


def taylor_scores(params: Params, gradients: Params) -> Scores:
  """Score by the first-order change of the loss, |w dL/dw| summed over the weights of a unit.

  The gradient is that of the summed loss of all rows (Molchanov et al. 2019; LLM-Pruner).
  """
  return by_axis(
    jax.tree.map(lambda w, g: np.abs(np.asarray(w, np.float64) * g), params, gradients)
  )


def random_scores(like: Scores, seed: int) -> Scores:
  """Draw scores of the same shapes: the baseline of every criterion."""
  rng = np.random.default_rng(seed)
  return {axis: rng.random(score.shape) for axis, score in like.items()}


def deletion_scores(sums: Params) -> np.ndarray:
  """Return the rise of the loss per token without each window of `measure.windows`: [n]."""
  nll = sums['nll'] / sums['weight']
  return nll[:-1] - nll[-1]


def best_window(layers: int, size: int, score: Callable[[np.ndarray], float]) -> np.ndarray:
  """Return the `size` layers [size] with the best score among those that lack one window.

  `score` is a task's, of the layers kept (Winogrande in arXiv 2408.11796); the first of ties wins.
  """
  return max((np.flatnonzero(g) for g in measure.windows(layers, layers - size)[:-1]), key=score)


def mix(a: Scores, b: Scores, share: float) -> Scores:
  """Interpolate (1 - share) a + share b, each divided by its mean size in a layer (or expert)."""
  unit = lambda x: x / np.maximum(np.abs(x).mean(-1, keepdims=True), 1e-30)
  return {axis: (1 - share) * unit(a[axis]) + share * unit(b[axis]) for axis in a}


def overlap(a: np.ndarray, b: np.ndarray) -> float:
  """Return the share of kept indices [...,n] that two sets have in common."""
  pairs = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
  return float(np.mean([np.isin(x, y).mean() for x, y in pairs]))


def keep(scores: Scores, sizes: Mapping[str, int], num_kv_heads: int) -> dict[str, np.ndarray]:
  """Choose the units with the highest scores: ascending indices by axis, see slm.pruning.slicing.

  Channels are the same in every layer. Every group of query heads keeps equally many. If there are
  scores of 'windows' [n], the layers of the one with the lowest go. The score of a key-value head,
  which no published recipe removes, is the sum of its query heads'; 'heads' is the number of query
  heads that stay.

  Raises:
    ValueError: if an axis has no scores, or a size does not fit.
  """
  kept = {}
  for axis, size in sizes.items():
    if axis == 'kv_heads':
      if 'heads' not in sizes:
        raise ValueError('prune: kv_heads: expected a size of heads beside it')
      continue  # chosen with the heads
    if axis not in scores:
      raise ValueError(f'prune: no scores for {axis!r}, expected one of {", ".join(scores)}')
    score = scores[axis]
    if axis == 'heads':
      kv_size = sizes.get('kv_heads', num_kv_heads)
      if size % kv_size:
        raise ValueError(f'prune: {size} heads do not share {kv_size} key-value heads equally')
      groups = score.reshape(*score.shape[:-1], num_kv_heads, -1)
      kv_heads = _top(groups.sum(-1), kv_size, 'kv_heads')[..., None]
      members = _top(np.take_along_axis(groups, kv_heads, -2), size // kv_size, axis)
      heads = members + kv_heads * groups.shape[-1]
      kept[axis] = heads.reshape(*score.shape[:-1], size)
      if kv_size < num_kv_heads:
        kept['kv_heads'] = kv_heads[..., 0]
    elif axis == 'layers' and 'windows' in scores:
      gates = measure.windows(len(score), len(score) - size)
      kept[axis] = np.flatnonzero(gates[np.argmin(scores['windows'])])
    else:
      kept[axis] = _top(score, size, axis)
  return kept


def _top(score: np.ndarray, size: int, axis: str) -> np.ndarray:
  """Return the ascending indices [...,size] of the highest scores; the first of ties win."""
  if not 0 < size <= score.shape[-1]:
    raise ValueError(f'prune: {axis}: expected 1 to {score.shape[-1]}, found {size}')
  order = np.argsort(-score, axis=-1, kind='stable')
  return np.sort(order[..., :size], axis=-1)
