"""Cutting a model to kept indices of each axis; the axis table says where each leaf is cut.

Kept indices are arrays by axis: 'embed', 'vocab' and 'layers' [n], and per layer 'mlp', 'heads',
'kv_heads', 'experts' and 'shared_mlp' [l,n] (the MLPs of experts [l,e,n]); they count from 0 in the
model that is cut. Every layer keeps equally many, so that the result is an ordinary model.
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
  sizes = {}
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    if axis not in SIZES or not size.isdigit():
      raise ValueError(f'sizes: expected axis=size of {", ".join(SIZES)}, found {part!r}')
    if axis in sizes:
      raise ValueError(f'sizes: {axis} is named twice')
    sizes[axis] = int(size)
  return sizes


def check_options(wanted: dict[str, int], task: str, norm_gain: str) -> None:
  """Refuse options that concern an axis which is not cut.

  Raises:
    ValueError: naming the option and the axis.
  """
  for name, value, axis in (('task', task, 'layers'), ('norm_gain', norm_gain, 'embed')):
    if value not in ('', 'none') and axis not in wanted:
      raise ValueError(f'{name}={value} needs a size of {axis}, which sizes does not name')
  if 'kv_heads' in wanted and 'heads' not in wanted:
    raise ValueError('sizes: kv_heads: expected a size of heads beside it')


def check_sizes(cfg: DecoderConfig, wanted: dict[str, int], align: int) -> None:
  """Refuse sizes that the model does not have, and widths that are slow on accelerators.

  Widths must be multiples of `align`; 0 stands for 128 where the whole width is at least 1024, and
  for 8 elsewhere.

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
    groups = f', or kv_heads={heads // per_kv} beside it' * (not heads % per_kv)
    raise ValueError(
      f'sizes: heads={heads}: expected a multiple of the {kv} key-value heads{groups}'
    )
  for axis in wanted.keys() & {'vocab', 'embed', 'mlp', 'shared_mlp'}:
    multiple = align or (128 if getattr(cfg, SIZES[axis]) >= 1024 else 8)
    if wanted[axis] % multiple:
      raise ValueError(
        f'sizes: {axis}={wanted[axis]}: expected a multiple of {multiple}, for the speed of '
        'accelerators; align=1 (--align=1) allows any'
      )


def check(cfg: DecoderConfig, kept: Kept) -> None:
  """Refuse kept indices that do not fit the model.

  Raises:
    ValueError: naming the axis and what is wrong with its indices.
  """
  for axis, index in kept.items():
    if axis not in SIZES:
      raise ValueError(f'prune: unknown axis {axis!r}, expected some of {", ".join(SIZES)}')
    size, index = getattr(cfg, SIZES[axis]), np.asarray(index)
    lead = int(axis not in ('vocab', 'embed', 'layers'))
    lead += axis == 'mlp' and bool(cfg.num_experts)
    if index.ndim != lead + 1 or not index.shape[-1]:
      raise ValueError(f'prune: {axis} has indices of shape {index.shape}')
    if lead and index.shape[0] != cfg.num_layers:
      raise ValueError(f'prune: {axis} has {index.shape[0]} rows for {cfg.num_layers} layers')
    if index.min() < 0 or index.max() >= size or (np.diff(index, axis=-1) <= 0).any():
      raise ValueError(f'prune: {axis}: expected ascending indices below {size}')
  if 'kv_heads' in kept or 'heads' in kept:
    _check_groups(cfg, kept)
  if 'experts' in kept and kept['experts'].shape[-1] < cfg.experts_per_token:
    raise ValueError(
      f'prune: {kept["experts"].shape[-1]} experts are fewer than the '
      f'{cfg.experts_per_token} a token is sent to'
    )


def _check_groups(cfg: DecoderConfig, kept: Kept) -> None:
  """Refuse query heads that the kept key-value heads do not share equally."""
  every = lambda count: np.tile(np.arange(count), (cfg.num_layers, 1))
  heads, kv = kept.get('heads', every(cfg.num_heads)), kept.get('kv_heads', every(cfg.num_kv_heads))
  for layer, (queries, groups) in enumerate(zip(heads, kv, strict=True)):
    group_size = cfg.num_heads // cfg.num_kv_heads
    counts = np.bincount(queries // group_size, minlength=cfg.num_kv_heads)
    if len(set(counts[groups])) != 1 or counts.sum() != counts[groups].sum():
      raise ValueError(
        f'prune: layer {layer} keeps {counts.tolist()} query heads of its key-value heads {groups}'
      )


def shape(cfg: DecoderConfig, kept: Kept, gain: str = 'none') -> DecoderConfig:
  """Return the shape of the model cut to the kept indices."""
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
  """Return a leaf's axes; the width of a shared expert is 'shared_mlp'."""
  shared = any(k.key == 'shared' for k in path)
  return tuple('shared_mlp' if shared and a == 'mlp' else a for a in leaf_axes(path))


def _take(path: tuple[Any, ...], leaf: jax.Array, kept: Kept) -> jax.Array:
  """Take the kept indices of a leaf along its axes; along 'layers' last, as others are by layer."""
  names = axes(path)
  for axis in sorted(names, key=lambda name: name == 'layers'):
    if axis not in kept:
      continue
    index, place = kept[axis], names.index(axis)
    if index.ndim == 1:
      leaf = jnp.take(leaf, index, axis=place)
    else:  # [l,n] or, of each expert, [l,e,n]
      dims = [1] * leaf.ndim
      for name, size in zip(('layers', 'experts'), index.shape[:-1], strict=False):
        dims[names.index(name)] = size
      dims[place] = index.shape[-1]
      leaf = jnp.take_along_axis(leaf, jnp.asarray(index).reshape(dims), axis=place)
  return leaf


def cut(
  params: Params, cfg: DecoderConfig, kept: Kept, gain: str = 'none', ratios: Params | None = None
) -> tuple[Params, DecoderConfig]:
  """Return the weights and the shape of the model cut to the kept indices.

  A norm over fewer channels divides by another root mean square. gain='none' leaves the scales as
  they are. 'sqrt' multiplies each by sqrt(whole / kept), and epsilon by whole / kept, as if the
  channels that go had been zero: the result computes exactly what the whole model does with those
  channels masked (except that norms over heads share their epsilon). 'calibrated' multiplies by the
  measured E[rms(kept) / rms(all)] instead (`ratios`, a leaf 'gain' [l] or scalar beside each
  'scale', see measure.shrinkage); epsilon and the norms over all heads are as with 'sqrt'.

  Raises:
    ValueError: if the kept indices do not fit, or the gain is unknown or lacks its ratios.
  """
  check(cfg, kept)
  if gain not in GAINS:
    raise ValueError(f'prune: expected a gain of {GAINS}, found {gain!r}')
  if gain == 'calibrated' and 'embed' in kept and not ratios:
    raise ValueError("prune: gain 'calibrated' needs the ratios of measure.shrinkage")
  kept = {axis: np.asarray(index) for axis, index in kept.items()}
  if 'experts' in kept and 'mlp' in kept:  # the neurons of the experts that stay
    kept['mlp'] = np.take_along_axis(kept['mlp'], kept['experts'][..., None], axis=1)
  new = shape(cfg, kept, gain)
  if gain != 'none':
    params = _regain(params, cfg, new, ratios if gain == 'calibrated' else None)
  params = jax.tree_util.tree_map_with_path(lambda path, w: _take(path, w, kept), params)
  if cfg.embed_scale and new.embed < cfg.embed:
    # The stream starts as the embedding times sqrt(embed), which is now smaller.
    factor, final = math.sqrt(cfg.embed / new.embed), params['final_norm']['scale']
    params = {**params, 'embedding': params['embedding'] * factor}
    if cfg.tied:  # the embedding is the head too
      final = (1 + final) / factor - 1 if cfg.norm_offset else final / factor
      params['final_norm'] = {'scale': final}
  return params, new


def _regain(
  params: Params, cfg: DecoderConfig, new: DecoderConfig, ratios: Params | None
) -> Params:
  """Multiply the scales of norms over cut axes by the measured ratios, or sqrt(whole / kept)."""
  measured = {path[:-1]: ratio for path, ratio in flatten(ratios or {})}
  shares = {
    'scale': cfg.embed / new.embed,
    'q_scale_all': cfg.num_heads / new.num_heads,
    'k_scale_all': cfg.num_kv_heads / new.num_kv_heads,
  }

  def regain(path, scale):
    share, site = shares.get(path[-1].key, 1.0), tuple(k.key for k in path[:-1])
    if share == 1:
      return scale
    factor = math.sqrt(share)
    if site in measured and path[-1].key == 'scale':
      factor = jnp.asarray(measured[site], scale.dtype)[..., None]
    return (1 + scale) * factor - 1 if cfg.norm_offset else scale * factor

  return jax.tree_util.tree_map_with_path(regain, params)
