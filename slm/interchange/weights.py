"""Conversion between safetensors of Hugging Face models and trees of weights.

Tensors are renamed, transposed, reshaped and stacked. Hugging Face matrices are [out, in], ours
[in..., out...]: `INPUTS` names the input axes.
"""

import collections
import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from slm.base import console, files
from slm.interchange.families import FAMILIES
from slm.models.config import DecoderConfig
from slm.weights.axes import AXES, INPUTS, Params
from slm.weights.tree import flatten, unflatten

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
SHARD_BYTES = 5 << 30
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}

# Leaf -> tensor, outside the blocks and within a layer.
_TOP = {
  'embedding': 'model.embed_tokens.weight',
  'lm_head': 'lm_head.weight',
  'final_norm': 'model.norm.weight',
}
_LAYER = {
  'attn/wq': 'self_attn.q_proj.weight', 'attn/bq': 'self_attn.q_proj.bias',
  'attn/wk': 'self_attn.k_proj.weight', 'attn/bk': 'self_attn.k_proj.bias',
  'attn/wv': 'self_attn.v_proj.weight', 'attn/bv': 'self_attn.v_proj.bias',
  'attn/wo': 'self_attn.o_proj.weight', 'attn/bo': 'self_attn.o_proj.bias',
  'attn/q_scale': 'self_attn.q_norm.weight', 'attn/q_scale_all': 'self_attn.q_norm.weight',
  'attn/k_scale': 'self_attn.k_norm.weight', 'attn/k_scale_all': 'self_attn.k_norm.weight',
  'mlp/w_gate': 'mlp.gate_proj.weight', 'mlp/b_gate': 'mlp.gate_proj.bias',
  'mlp/w_up': 'mlp.up_proj.weight', 'mlp/b_up': 'mlp.up_proj.bias',
  'mlp/w_down': 'mlp.down_proj.weight', 'mlp/b_down': 'mlp.down_proj.bias',
}  # fmt: skip
# post_attention_layernorm precedes the MLP in some families and follows the attention in others.
_NORMS = {
  'pre': {'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'},
  'post': {
    'attn_post_norm': 'post_attention_layernorm', 'mlp_post_norm': 'post_feedforward_layernorm'
  },
  'sandwich': {
    'attn_norm': 'input_layernorm', 'attn_post_norm': 'post_attention_layernorm',
    'mlp_norm': 'pre_feedforward_layernorm', 'mlp_post_norm': 'post_feedforward_layernorm',
  },
}  # fmt: skip
# Buffers that older versions of transformers saved: they are computed from the config.
_BUFFERS = re.compile(r'rotary_emb\.\w+$|(attn|attention)\.(masked_)?bias$|\bposition_ids$')


def names(path: tuple[str, ...], cfg: DecoderConfig, family: str) -> np.ndarray:
  """Return the tensor names of a leaf: an array [], [layers] or [layers, experts]."""
  top, *rest = path
  if top != 'blocks':
    return np.array(_TOP[top], object)
  if 'experts' in path:
    module, *matrices = FAMILIES[family].experts
    matrix = matrices[('w_gate', 'w_up', 'w_down').index(path[-1])]
    suffixes = [f'{module}.experts.{e}.{matrix}.weight' for e in range(cfg.num_experts)]
  elif path[-1] == 'w_router':
    suffixes = f'{FAMILIES[family].experts[0]}.gate.weight'
  elif path[-1] == 'scale':
    suffixes = f'{_NORMS[cfg.norms][rest[0]]}.weight'
  else:
    suffixes = _LAYER['/'.join(rest)]
  prefixes = np.array([f'model.layers.{i}.' for i in range(cfg.num_layers)], object)
  return np.add.outer(prefixes, np.array(suffixes, object))


def to_huggingface(leaf: str, w: np.ndarray) -> np.ndarray:
  """Return one layer's leaf as a Hugging Face tensor: [out, in], or flat if it is no matrix."""
  if leaf not in INPUTS:
    return w if leaf in ('embedding', 'lm_head') else w.reshape(-1)
  inputs = math.prod(n for a, n in zip(AXES[leaf], w.shape, strict=True) if a in INPUTS[leaf])
  return w.reshape(inputs, -1).T


def huggingface_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Return the shape that `to_huggingface` gives a leaf of one layer."""
  return to_huggingface(leaf, np.broadcast_to(np.zeros((), np.int8), shape)).shape


def from_huggingface(leaf: str, w: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Undo `to_huggingface`: return one layer's leaf of the given shape."""
  if leaf not in INPUTS:
    return w.reshape(shape)
  transposed = np.empty(w.shape[::-1], w.dtype)
  for i in range(0, len(w), 64):  # more rows at once would touch more pages than a TLB holds
    transposed[:, i : i + 64] = w[i : i + 64].T
  return transposed.reshape(shape)


class Tensors:
  """The tensors of a directory, read one at a time.

  Attributes:
    files: tensor name -> name of the file that holds it.

  Raises:
    ValueError: naming the file that is missing, truncated, empty or not safetensors.
  """

  def __init__(self, path: Path, stack: contextlib.ExitStack):
    self._path, self._open = path, {}
    if (path / SINGLE).exists():  # transformers prefers it to an index
      self._open_file(SINGLE, stack)
      self.files = dict.fromkeys(self._open[SINGLE].keys(), SINGLE)
      if not self.files:
        raise ValueError(f'{path}: {SINGLE} holds no tensor')
      return
    if not (path / INDEX).exists():
      raise ValueError(f'{path}: holds neither {SINGLE} nor {INDEX}')
    self.files = _weight_map(path / INDEX)
    for name in sorted(set(self.files.values())):
      self._open_file(name, stack)
    held = {name: set(file.keys()) for name, file in self._open.items()}
    for tensor, name in self.files.items():
      if tensor not in held[name]:
        raise ValueError(f'{path / name}: lacks {tensor}, which {INDEX} says it holds')

  def _open_file(self, name: str, stack: contextlib.ExitStack) -> None:
    path = self._path / name
    if not path.exists():
      raise ValueError(f'{path}: no such file, but {INDEX} names it')
    try:
      self._open[name] = stack.enter_context(safetensors.safe_open(path, 'np'))
    except (safetensors.SafetensorError, OSError) as e:
      raise ValueError(f'{path}: truncated or not safetensors ({e})') from None

  def shape(self, name: str) -> tuple[int, ...]:
    """Return a tensor's shape."""
    return tuple(self._open[self.files[name]].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """Return a tensor's type in the terms of safetensors: F32, BF16."""
    return self._open[self.files[name]].get_slice(name).get_dtype()

  def read(self, name: str) -> np.ndarray:
    """Read a tensor."""
    # A mapping of its own is unmapped afterwards: its pages do not accumulate beside the model.
    path = self._path / self.files[name]
    with files.reading(path), safetensors.safe_open(path, 'np') as file:
      return file.get_tensor(name)


def _weight_map(path: Path) -> dict[str, str]:
  """Read the name of each tensor's file from an index.

  Raises:
    ValueError: if the file is not an index, or names a file of another directory.
  """
  index = files.read_json(path)
  weight_map = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f'{path}: expected weight_map, tensor to file, found {str(weight_map)[:40]}')
  for name in set(map(str, weight_map.values())):
    if Path(name).name != name or name in ('.', '..'):
      raise ValueError(f'{path}: names {name!r}, expected a file of its own directory')
  return {tensor: str(file) for tensor, file in weight_map.items()}


Plan = dict[tuple[str, ...], np.ndarray]  # leaf -> the names of its tensors


def plan(
  tensors: Tensors, cfg: DecoderConfig, family: str, shapes: Params
) -> tuple[Plan, list[str]]:
  """Match the leaves of a model to tensors; return the plan and the names of unused buffers.

  Raises:
    ValueError: naming the first tensor that is missing, of another shape, or neither a weight nor
      a known buffer.
  """
  planned: Plan = {}
  for path, leaf in flatten(shapes):
    planned[path] = names(path, cfg, family)
    expected = huggingface_shape(path[-1], leaf.shape[planned[path].ndim :])
    for name in planned[path].ravel().tolist():
      if name not in tensors.files:
        raise ValueError(f'{name}: missing, {"/".join(path)} needs it')
      if tensors.shape(name) != expected:
        raise ValueError(f'{name}: expected shape {expected}, found {tensors.shape(name)}')
  unused = set(tensors.files).difference(*(array.ravel() for array in planned.values()))
  head = _TOP['lm_head']
  if head in unused and cfg.tied:
    if not np.array_equal(*(tensors.read(n).view(np.uint8) for n in (head, _TOP['embedding']))):
      raise ValueError(f'{head}: differs from the embedding, but tie_word_embeddings is true')
    unused.remove(head)
  buffers = sorted(filter(_BUFFERS.search, unused))
  if unknown := sorted(unused.difference(buffers)):
    raise ValueError(f'{unknown[0]}: not part of {family} ({len(unknown)} such tensors)')
  return planned, buffers


def dtype_of(tensors: Tensors, planned: Plan) -> str:
  """Return the NumPy name of the narrowest type that holds all planned tensors.

  Raises:
    ValueError: naming a tensor of an unsupported type.
  """
  kinds = {tensors.dtype(name): name for array in planned.values() for name in array.ravel()}
  for kind, name in kinds.items():
    if kind not in DTYPES:
      raise ValueError(f'{name}: of type {kind}, expected one of {", ".join(DTYPES)}')
  return DTYPES[next(iter(kinds))] if len(kinds) == 1 else 'float32'


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Allocate an array at an address that JAX on CPU adopts instead of copying."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def load(
  tensors: Tensors, planned: Plan, shapes: Params, shardings: Params, dtype: np.dtype
) -> Params:
  """Load weights onto their shardings; each device's shard is made of the tensors it needs.

  Every tensor is read once. The largest leaves come first, while little else is in memory.
  """

  def leaf(path, shape, sharding):
    array = planned[path]
    layer_shape = shape.shape[array.ndim :]
    shards: dict[str, np.ndarray] = {}
    uses = collections.defaultdict(list)  # tensor -> (shard, its leading axes, place, slices)
    indices = sharding.addressable_devices_indices_map(shape.shape).values()
    for key, index in {str(index): index for index in indices}.items():
      chosen = np.asarray(array[index[: array.ndim]])
      for i in np.ndindex(chosen.shape):
        uses[chosen[i]].append((key, chosen.shape, i, index[array.ndim :]))
    for name, places in uses.items():
      whole = from_huggingface(path[-1], tensors.read(name), layer_shape)
      for key, lead, i, slices in places:
        part = whole[slices]
        if key not in shards:
          shards[key] = _aligned((*lead, *part.shape), dtype)
        shards[key][i] = part
      progress.update(1)
    return jax.block_until_ready(
      jax.make_array_from_callback(shape.shape, sharding, lambda index: shards[str(index)])
    )

  by_size = sorted(flatten(shapes), key=lambda item: -item[1].size)
  places = dict(flatten(shardings))
  count = sum(array.size for array in planned.values())
  with console.Progress('read', count, 'tensors', show=not jax.process_index()) as progress:
    return unflatten({path: leaf(path, shape, places[path]) for path, shape in by_size})


def tensors_of(
  params: Params, cfg: DecoderConfig, family: str, dtype: Any
) -> list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
  """List (name, shape, function that makes it) of a model's tensors, layer by layer."""
  made = []
  for path, w in flatten(params):
    array = names(path, cfg, family)
    shape = huggingface_shape(path[-1], w.shape[array.ndim :])
    for i in np.ndindex(array.shape):
      make = lambda leaf=path[-1], w=w, i=i: to_huggingface(leaf, np.asarray(w[i]).astype(dtype))
      made.append((array[i], shape, make))
  number = lambda part: int(part) if part.isdigit() else part
  return sorted(made, key=lambda tensor: [number(part) for part in tensor[0].split('.')])


def save(
  params: Params, cfg: DecoderConfig, family: str, out: Path, dtype: np.dtype, shard_bytes: int
) -> dict[str, int]:
  """Write model.safetensors, or several files with an index; return total bytes and parameters."""
  shards: list[list] = [[]]
  filled = total = 0
  for tensor in tensors_of(params, cfg, family, dtype):
    size = math.prod(tensor[1]) * dtype.itemsize
    if filled and filled + size > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(tensor)
    filled, total = filled + size, total + size
  weight_map: dict[str, str] = {}
  for i, shard in enumerate(shards, 1):
    file = f'model-{i:05d}-of-{len(shards):05d}.safetensors' if len(shards) > 1 else SINGLE
    # safetensors 0.8.0 ignores strides: arrays must be contiguous.
    arrays = {name: np.ascontiguousarray(make()) for name, _, make in shard}
    with files.replacing(out / file) as temporary:
      safetensors.numpy.save_file(arrays, temporary, {'format': 'pt'})
    weight_map |= dict.fromkeys(arrays, file)
  sizes = {'total_size': total, 'total_parameters': total // dtype.itemsize}
  kept = set(weight_map.values())
  if len(shards) > 1:
    files.write_json(out / INDEX, {'metadata': sizes, 'weight_map': weight_map})
    kept.add(INDEX)
  for previous in out.glob('model*.safetensors*'):  # of an export with other shards
    if previous.name not in kept:
      previous.unlink()
  return sizes
