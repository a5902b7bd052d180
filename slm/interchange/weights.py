"""safetensors of a Hugging Face model to weights and back: rename, transpose, reshape, stack.

Their matrices are [out, in], ours [in..., out...]: the axis table says which axes are inputs.
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

INDEX = 'model.safetensors.index.json'
SHARD_BYTES = 5 << 30
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}

_TOP = {
  'embedding': 'model.embed_tokens.weight',
  'lm_head': 'lm_head.weight',
  'final_norm': 'model.norm.weight',
}
# What older versions of transformers saved beside the weights: computed from the config.
_BUFFERS = re.compile(r'rotary_emb\.\w+$|(attn|attention)\.(masked_)?bias$|\bposition_ids$')
_ATTENTION = {
  'wq': 'q_proj.weight', 'wk': 'k_proj.weight', 'wv': 'v_proj.weight', 'wo': 'o_proj.weight',
  'bq': 'q_proj.bias', 'bk': 'k_proj.bias', 'bv': 'v_proj.bias', 'bo': 'o_proj.bias',
  'q_scale': 'q_norm.weight', 'k_scale': 'k_norm.weight',
  'q_scale_all': 'q_norm.weight', 'k_scale_all': 'k_norm.weight',
}  # fmt: skip
_MLP = {
  'w_gate': 'gate_proj.weight', 'w_up': 'up_proj.weight', 'w_down': 'down_proj.weight',
  'b_gate': 'gate_proj.bias', 'b_up': 'up_proj.bias', 'b_down': 'down_proj.bias',
}  # fmt: skip
# The same name stands before the MLP in some families and after the attention in others.
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


def names(path: tuple[str, ...], cfg: DecoderConfig, family: str) -> np.ndarray:
  """Name the tensors of a leaf: an array [layers] or [layers, experts], or [] for one tensor."""
  leaf = path[-1]
  if path[0] != 'blocks':
    return np.array(_TOP[path[0]], object)
  if leaf == 'scale':
    suffix = f'{_NORMS[cfg.norms][path[1]]}.weight'
  elif path[1] == 'attn':
    suffix = f'self_attn.{_ATTENTION[leaf]}'
  elif leaf == 'w_router':
    suffix = f'{FAMILIES[family].experts[0]}.gate.weight'
  elif 'experts' in path:
    where, *matrices = FAMILIES[family].experts
    matrix = dict(zip(('w_gate', 'w_up', 'w_down'), matrices, strict=True))[leaf]
    suffix = [f'{where}.experts.{e}.{matrix}.weight' for e in range(cfg.num_experts)]
  else:
    suffix = f'mlp.{_MLP[leaf]}'
  many = [suffix] if isinstance(suffix, str) else suffix
  found = [[f'model.layers.{i}.{s}' for s in many] for i in range(cfg.num_layers)]
  found = np.array(found, object)
  return found[:, 0] if isinstance(suffix, str) else found


def to_theirs(leaf: str, w: np.ndarray) -> np.ndarray:
  """Turn one layer's leaf into their tensor: matrices to [out, in], the rest flat or as it is."""
  if leaf not in INPUTS:
    return w if leaf in ('embedding', 'lm_head') else w.reshape(-1)
  inputs = math.prod(n for a, n in zip(AXES[leaf], w.shape, strict=True) if a in INPUTS[leaf])
  return w.reshape(inputs, -1).T


def to_ours(leaf: str, w: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Undo `to_theirs`; the shape is one layer's."""
  return (_transposed(w) if leaf in INPUTS else w).reshape(shape)


def _transposed(w: np.ndarray) -> np.ndarray:
  """Return w [a,b] as an array [b,a] of its own."""
  found = np.empty(w.shape[::-1], w.dtype)
  for i in range(0, len(w), 64):  # all rows at once lie on more pages than a TLB holds
    found[:, i : i + 64] = w[i : i + 64].T
  return found


def their_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Return the shape that `to_theirs` gives a leaf of a shape."""
  return to_theirs(leaf, np.broadcast_to(np.zeros((), np.int8), shape)).shape


class Tensors:
  """The tensors of a directory, read one at a time.

  Raises:
    ValueError: naming the file, if one is missing, truncated or not safetensors.
  """

  def __init__(self, path: Path, stack: contextlib.ExitStack):
    if (path / 'model.safetensors').exists():  # transformers prefers it too
      self.files = {}
    elif (path / INDEX).exists():
      self.files = _weight_map(path / INDEX)
    else:
      raise ValueError(f'{path}: holds neither model.safetensors nor {INDEX}')
    opened = {}
    for name in sorted(set(self.files.values()) or {'model.safetensors'}):
      if not (path / name).exists():
        raise ValueError(f'{path / name}: no such file, and {INDEX} names it')
      try:
        opened[name] = stack.enter_context(safetensors.safe_open(path / name, 'np'))
      except (safetensors.SafetensorError, OSError) as e:
        raise ValueError(f'{path / name}: truncated or not safetensors ({e})') from None
    if not self.files:
      self.files = dict.fromkeys(opened['model.safetensors'].keys(), 'model.safetensors')
    self._open, self._path = opened, path
    if not self.files:
      raise ValueError(f'{path}: model.safetensors holds no tensor')
    held = {file: set(f.keys()) for file, f in opened.items()}
    for name, file in self.files.items():
      if name not in held[file]:
        raise ValueError(f'{path / file}: lacks {name}, which {INDEX} says it holds')

  def shape(self, name: str) -> tuple[int, ...]:
    """Return a tensor's shape."""
    return tuple(self._open[self.files[name]].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """Return a tensor's type, as safetensors calls it: BF16, F32."""
    return self._open[self.files[name]].get_slice(name).get_dtype()

  def read(self, name: str) -> np.ndarray:
    """Read a tensor."""
    # By a mapping of its own, whose pages go with it instead of staying beside the model.
    path = self._path / self.files[name]
    with files.reading(path), safetensors.safe_open(path, 'np') as file:
      return file.get_tensor(name)


def _weight_map(path: Path) -> dict[str, str]:
  """Read which file beside an index holds which tensor.

  Raises:
    ValueError: if it is no such index, or names a file elsewhere.
  """
  index = files.read_json(path)
  found = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(found, dict) or not found:
    raise ValueError(f'{path}: expected weight_map, tensor to file, found {str(found)[:40]}')
  for name in set(map(str, found.values())):
    if Path(name).name != name or name in ('.', '..'):
      raise ValueError(f'{path}: names {name!r}, expected a file of its own directory')
  return {tensor: str(file) for tensor, file in found.items()}


Plan = dict[tuple[str, ...], np.ndarray]  # leaf -> the names of its tensors


def plan(
  tensors: Tensors, cfg: DecoderConfig, family: str, shapes: Params
) -> tuple[Plan, list[str]]:
  """Match every leaf to its tensors, and list the buffers that are of no use.

  A tensor that is missing, of another shape, or neither a weight nor a known buffer is refused.

  Raises:
    ValueError: naming the first such tensor.
  """
  found, used = {}, set()
  for path, leaf in flatten(shapes):
    found[path] = names(path, cfg, family)
    expected = their_shape(path[-1], leaf.shape[found[path].ndim :])
    for name in found[path].ravel().tolist():
      if name not in tensors.files:
        raise ValueError(f'{name}: missing, {"/".join(path)} needs it')
      if tensors.shape(name) != expected:
        raise ValueError(f'{name}: expected shape {expected}, found {tensors.shape(name)}')
      used.add(name)
  head = _TOP['lm_head']
  if cfg.tied and head in tensors.files:
    if not np.array_equal(*(tensors.read(n).view(np.uint8) for n in (head, _TOP['embedding']))):
      raise ValueError(f'{head}: differs from the embedding, and tie_word_embeddings is true')
    used.add(head)
  unused = sorted(set(tensors.files) - used)
  buffers = [name for name in unused if _BUFFERS.search(name)]
  if unknown := [name for name in unused if name not in buffers]:
    raise ValueError(f'{unknown[0]}: not part of {family} ({len(unknown)} such tensors)')
  return found, buffers


def dtype_of(tensors: Tensors, planned: Plan) -> str:
  """Return the widest type of the tensors that are weights, as numpy calls it.

  Raises:
    ValueError: naming a tensor of a type that is not read.
  """
  kinds = {tensors.dtype(n): n for wanted in planned.values() for n in wanted.ravel().tolist()}
  for kind, name in kinds.items():
    if kind not in DTYPES:
      raise ValueError(f'{name}: of type {kind}, expected one of {", ".join(DTYPES)}')
  if {'BF16', 'F16'} <= kinds.keys():  # neither holds the other's numbers
    return 'float32'
  return DTYPES[min(kinds, key=list(DTYPES).index)]


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Allocate an array as JAX wants it on a CPU: it takes it over instead of copying it."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def load(tensors: Tensors, planned: Plan, shapes: Params, where: Params, dtype: Any) -> Params:
  """Read weights onto their shardings: each device's part is made of the tensors it needs.

  Every tensor is read once. One leaf at a time and the largest first, so that what is read lies
  beside little else.
  """

  def leaf(path, shape, there):
    wanted = planned[path]
    own = shape.shape[wanted.ndim :]

    parts: dict[str, np.ndarray] = {}
    uses = collections.defaultdict(list)  # tensor -> (part, its leading axes, place, slices)
    indices = there.addressable_devices_indices_map(shape.shape).values()
    for key, index in {str(index): index for index in indices}.items():
      chosen = np.asarray(wanted[index[: wanted.ndim]])
      for i in np.ndindex(chosen.shape):
        uses[chosen[i]].append((key, chosen.shape, i, index[wanted.ndim :]))
    for name, places in uses.items():
      whole = to_ours(path[-1], tensors.read(name), own)
      for key, lead, i, rest in places:
        one = whole[rest]
        if key not in parts:
          parts[key] = _aligned((*lead, *one.shape), dtype)
        parts[key][i] = one
      progress.update(1)
    return jax.block_until_ready(
      jax.make_array_from_callback(shape.shape, there, lambda index: parts[str(index)])
    )

  order = sorted(flatten(shapes), key=lambda x: -x[1].size)
  places = dict(flatten(where))
  num_tensors = sum(wanted.size for wanted in planned.values())
  with console.progress('read', num_tensors, 'tensors', show=not jax.process_index()) as progress:
    return unflatten({path: leaf(path, shape, places[path]) for path, shape in order})


def tensors_of(
  params: Params, cfg: DecoderConfig, family: str, dtype: Any
) -> list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
  """List (name, shape, function that makes it) of every tensor of a model, layer by layer."""
  found = []
  for path, w in flatten(params):
    wanted = names(path, cfg, family)
    shape = their_shape(path[-1], w.shape[wanted.ndim :])
    for i in np.ndindex(wanted.shape):
      make = lambda leaf=path[-1], w=w, i=i: to_theirs(leaf, np.asarray(w[i]).astype(dtype))
      found.append((wanted[i], shape, make))
  return sorted(found, key=lambda x: _order(x[0]))


def _order(name: str) -> tuple[Any, ...]:
  return tuple(int(part) if part.isdigit() else part for part in name.split('.') if part)


def save(
  params: Params, cfg: DecoderConfig, family: str, out: Path, dtype: Any,
  shard_bytes: int,
) -> dict[str, int]:  # fmt: skip
  """Write model.safetensors, or several with an index; returns the sizes written.

  Every array is made contiguous first: safetensors 0.8.0 writes memory as it lies.
  """
  size = np.dtype(dtype).itemsize
  shards: list[list] = [[]]
  filled = total = count = 0
  for item in tensors_of(params, cfg, family, dtype):
    num_bytes = math.prod(item[1]) * size
    if filled and filled + num_bytes > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(item)
    filled, total, count = filled + num_bytes, total + num_bytes, count + math.prod(item[1])
  weight_map: dict[str, str] = {}
  for i, shard in enumerate(shards, 1):
    file = 'model.safetensors'
    if len(shards) > 1:
      file = f'model-{i:05d}-of-{len(shards):05d}.safetensors'
    arrays = {name: np.ascontiguousarray(make()) for name, _, make in shard}
    with files.replacing(out / file) as temporary:
      safetensors.numpy.save_file(arrays, temporary, {'format': 'pt'})
    weight_map |= dict.fromkeys(arrays, file)
  sizes = {'total_size': total, 'total_parameters': count}
  if len(shards) > 1:
    files.write_json(out / INDEX, {'metadata': sizes, 'weight_map': weight_map})
  for old in out.glob('model*.safetensors*'):  # of an export that was cut otherwise
    if old.name not in weight_map.values() and (old.name != INDEX or len(shards) == 1):
      old.unlink()
  return sizes
