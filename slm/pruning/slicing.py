"""Cut a model down to what is kept of each axis; a leaf's axes say where to cut it.

Kept sets are index arrays by axis: 'embed', 'vocab' and 'layers' [n], and per layer 'mlp', 'heads',
'kv_heads', 'experts' and 'shared_mlp' [l,n] (the MLPs of experts [l,e,n]); indices count from 0 in
the model that is cut. Every layer keeps equally many, so that what comes out is an ordinary model.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.models.config import DecoderConfig
from slm.weights.axes import Params, leaf_axes
from slm.weights.tree import flatten

Kept = Mapping[str, np.ndarray]
GAINS = ('none', 'sqrt', 'calibrated')
# Axis -> the field of DecoderConfig that is its size.
SIZES = {
  'vocab': 'vocab',
  'embed': 'embed',
  'layers': 'num_layers',
  'mlp': 'mlp',
  'heads': 'num_heads',
  'kv_heads': 'num_kv_heads',
  'experts': 'num_experts',
  'shared_mlp': 'shared_mlp',
}


def read_sizes(text: str) -> dict[str, int]:
  """Read axis=size,axis=size.

  Raises:
    ValueError: if a part is not of that form.
  """
  found = {}
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    if axis not in SIZES or not size.isdigit():
      raise ValueError(f'sizes: expected axis=size of {", ".join(SIZES)}, found {part!r}')
    if axis in found:
      raise ValueError(f'sizes: {axis} is named twice')
    found[axis] = int(size)
  return found


def check_options(wanted: dict[str, int], task: str, norm_gain: str) -> None:
  """Refuse options of axes that are not cut.

  Raises:
    ValueError: naming the option.
  """
  for name, value, axis in (('task', task, 'layers'), ('norm_gain', norm_gain, 'embed')):
    if value not in ('', 'none') and axis not in wanted:
      raise ValueError(f'{name}={value}: is for cutting {axis}, which sizes does not name')
  if 'kv_heads' in wanted and 'heads' not in wanted:
    raise ValueError('sizes: kv_heads: expected a size of heads beside it')


def check_sizes(cfg: DecoderConfig, wanted: dict[str, int], align: int) -> None:
  """Refuse sizes that are not there, or that accelerators do badly with.

  align 0: multiples of 128 of at least 1024, otherwise of 8.

  Raises:
    ValueError: naming the axis.
  """
  if not wanted:
    raise ValueError('sizes: name at least one axis')
  for axis, size in wanted.items():
    if not 0 < size <= (whole := getattr(cfg, SIZES[axis])):
      raise ValueError(f'sizes: {axis}={size}: expected 1 to {whole}')
  kv, per_kv = wanted.get('kv_heads', cfg.num_kv_heads), cfg.num_heads // cfg.num_kv_heads
  if (heads := wanted.get('heads', kv)) % kv:
    beside = f'; with kv_heads={heads // per_kv} beside it whole groups go' * (not heads % per_kv)
    raise ValueError(
      f'sizes: heads={heads}: expected a multiple of the {kv} key-value heads{beside}'
    )
  for axis in wanted.keys() & {'vocab', 'embed', 'mlp', 'shared_mlp'}:
    by = align or (128 if getattr(cfg, SIZES[axis]) >= 1024 else 8)
    if wanted[axis] % by:
      raise ValueError(
        f'sizes: {axis}={wanted[axis]}: expected a multiple of {by}, which accelerators want; '
        'align=1 allows any'
      )


def check(cfg: DecoderConfig, kept: Kept) -> None:
  """Refuse kept sets that do not fit the model.

  Raises:
    ValueError: naming the axis and what is wrong with its indices.
  """
  for axis, index in kept.items():
    if axis not in SIZES:
      raise ValueError(f'prune: unknown axis {axis!r}, expected some of {", ".join(SIZES)}')
    size, index = getattr(cfg, SIZES[axis]), np.asarray(index)
    lead = {'vocab': 0, 'embed': 0, 'layers': 0}.get(axis, 1)
    lead += axis == 'mlp' and bool(cfg.num_experts)
    if index.ndim != lead + 1 or not index.shape[-1]:
      raise ValueError(f'prune: {axis} has indices of shape {index.shape}')
    if lead and index.shape[0] != cfg.num_layers:
      raise ValueError(f'prune: {axis} has {index.shape[0]} rows for {cfg.num_layers} layers')
    if index.min() < 0 or index.max() >= size or (np.diff(index, axis=-1) <= 0).any():
      raise ValueError(f'prune: {axis}: expected ascending indices below {size}')
  if ('kv_heads' in kept or 'heads' in kept) and (uneven := _uneven_groups(cfg, kept)):
    raise ValueError(f'prune: {uneven}')
  if 'experts' in kept and kept['experts'].shape[-1] < cfg.experts_per_token:
    raise ValueError(
      f'prune: {kept["experts"].shape[-1]} experts are fewer than the '
      f'{cfg.experts_per_token} a token is sent to'
    )


def _uneven_groups(cfg: DecoderConfig, kept: Kept) -> str:
  """Say what is wrong if query heads are not shared equally by the kept key-value heads."""
  groups = cfg.num_heads // cfg.num_kv_heads
  heads = kept.get('heads', np.tile(np.arange(cfg.num_heads), (cfg.num_layers, 1)))
  kv = kept.get('kv_heads', np.tile(np.arange(cfg.num_kv_heads), (cfg.num_layers, 1)))
  for layer, (mine, of) in enumerate(zip(heads, kv, strict=True)):
    counts = np.bincount(mine // groups, minlength=cfg.num_kv_heads)
    if len(set(counts[of])) != 1 or counts.sum() != counts[of].sum():
      return f'layer {layer} keeps {counts.tolist()} query heads of its key-value heads {of}'
  return ''


def shape(cfg: DecoderConfig, kept: Kept, gain: str = 'none') -> DecoderConfig:
  """Return the shape of what is kept."""
  sizes = {SIZES[axis]: int(np.shape(index)[-1]) for axis, index in kept.items()}
  if 'layers' in kept and cfg.layer_types:
    types = tuple(cfg.layer_types[i] for i in kept['layers'])
    sizes |= {'layer_types': types if set(types) != {'full'} else ()}
    if 'window' not in types:
      sizes |= {'window': 0, 'rope_theta_window': 0.0}
  if gain != 'none' and 'embed' in kept:  # see `cut`
    sizes['norm_eps'] = cfg.norm_eps * cfg.embed / len(kept['embed'])
  return dataclasses.replace(cfg, **sizes)


def axes(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Return a leaf's axes; an expert that every token goes to has a width of its own."""
  shared = any(k.key == 'shared' for k in path)
  return tuple('shared_mlp' if shared and a == 'mlp' else a for a in leaf_axes(path))


def take(path: tuple[Any, ...], leaf: jax.Array, kept: Kept) -> jax.Array:
  """Take what is kept of a leaf, along each of its axes."""
  names = axes(path)
  for place, axis in enumerate(names):
    if axis in kept and axis != 'layers':
      leaf = _take_along(leaf, kept[axis], names, place)
  if 'layers' in names and 'layers' in kept:
    leaf = jnp.take(leaf, kept['layers'], axis=names.index('layers'))
  return leaf


def _take_along(
  leaf: jax.Array, index: np.ndarray, names: tuple[str, ...], place: int
) -> jax.Array:
  """Take indices [n], or [l,n] and [l,e,n] where each layer (and expert) has its own."""
  if index.ndim == 1:
    return jnp.take(leaf, index, axis=place)
  shape = [1] * leaf.ndim
  shape[place] = index.shape[-1]
  for lead, axis in enumerate(('layers', 'experts')[: index.ndim - 1]):
    shape[names.index(axis)] = index.shape[lead]
  return jnp.take_along_axis(leaf, jnp.asarray(index).reshape(shape), axis=place)


def cut(
  params: Params, cfg: DecoderConfig, kept: Kept, gain: str = 'none', ratios: Params | None = None
) -> tuple[Params, DecoderConfig]:
  """Return the weights and the shape of what is kept.

  A norm divides by the root mean square over fewer channels, so its output shrinks. With
  gain='sqrt' every scale (and epsilon) makes up for it as if what was cut had been zero: then the
  result computes exactly what the whole model does with those channels masked (of heads that are
  normed, up to the epsilon, which they share). 'none' leaves them.

  What is cut is not zero, though: with gain='calibrated' each norm's scale is multiplied by its
  r = E[rms(kept) / rms(all)] over tokens of the whole model (`ratios`, a leaf 'gain' [l] or scalar
  beside each 'scale', see measure.shrinkage) in the place of sqrt(whole / kept). Epsilon and the
  norms over all heads are as with 'sqrt', and channels that are zero give exactly 'sqrt'.

  Raises:
    ValueError: if the kept sets do not fit, or the gain is unknown or lacks its ratios.
  """
  check(cfg, kept)
  if gain not in GAINS:
    raise ValueError(f'prune: expected a gain of {GAINS}, found {gain!r}')
  if gain == 'calibrated' and 'embed' in kept and not ratios:
    raise ValueError("prune: gain 'calibrated' needs the ratios of measure.shrinkage")
  kept = _of_kept_experts(kept)
  new = shape(cfg, kept, gain)
  if gain != 'none':
    params = _regain(params, cfg, new, ratios if gain == 'calibrated' else None)
  found = jax.tree_util.tree_map_with_path(lambda path, w: take(path, w, kept), params)
  if cfg.embed_scale and new.embed < cfg.embed:
    # The stream starts as the embedding times sqrt(embed), which is now smaller.
    found = _restream(found, math.sqrt(cfg.embed / new.embed), cfg)
  return found, new


def _of_kept_experts(kept: Kept) -> dict[str, np.ndarray]:
  """Drop the kept neurons of experts that go."""
  found = {axis: np.asarray(index) for axis, index in kept.items()}
  if 'experts' in found and 'mlp' in found:
    found['mlp'] = np.take_along_axis(found['mlp'], found['experts'][..., None], axis=1)
  return found


def _regain(
  params: Params, cfg: DecoderConfig, new: DecoderConfig, ratios: Params | None
) -> Params:
  """Multiply the scales of norms over cut axes."""
  measured = {path[:-1]: r for path, r in flatten(ratios or {})}
  shares = {
    'scale': cfg.embed / new.embed,
    'q_scale_all': cfg.num_heads / new.num_heads,
    'k_scale_all': cfg.num_kv_heads / new.num_kv_heads,
  }

  def one(path, scale):
    share, site = shares.get(path[-1].key, 1.0), tuple(k.key for k in path[:-1])
    if share == 1:
      return scale
    by = math.sqrt(share)
    if site in measured and path[-1].key == 'scale':
      by = jnp.asarray(measured[site], scale.dtype)[..., None]
    return (1 + scale) * by - 1 if cfg.norm_offset else scale * by

  return jax.tree_util.tree_map_with_path(one, params)


def _restream(params: Params, by: float, cfg: DecoderConfig) -> Params:
  """Multiply what the stream starts with, and nothing else."""
  embedding, final = params['embedding'] * by, params['final_norm']['scale']
  found = {**params, 'embedding': embedding}
  if cfg.tied:  # the embedding is the head too
    final = (1 + final) / by - 1 if cfg.norm_offset else final / by
    found['final_norm'] = {'scale': final}
  return found


def mask(params: Params, cfg: DecoderConfig, kept: Kept) -> Params:
  """Return the whole model with everything that is not kept set to zero: what `cut` is tested by.

  Layers, experts and vocabulary cannot be masked by zeros and stay.
  """
  check(cfg, kept)

  def one(path, leaf):
    names = axes(path)
    for place, axis in enumerate(names):
      if axis not in kept or axis in ('layers', 'experts', 'vocab'):
        continue
      index = np.asarray(kept[axis])
      there = np.zeros((*index.shape[:-1], leaf.shape[place]), bool)
      np.put_along_axis(there, index, True, axis=-1)
      shape = [1] * leaf.ndim
      shape[place] = leaf.shape[place]
      for lead, name in enumerate(('layers', 'experts')[: index.ndim - 1]):
        shape[names.index(name)] = index.shape[lead]
      leaf = leaf * there.reshape(shape)
    return leaf

  return jax.tree_util.tree_map_with_path(one, params)
