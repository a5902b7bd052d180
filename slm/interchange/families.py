"""Translation between the config.json of a Hugging Face model and the shape of a decoder.

A family is one `model_type` of transformers and one row of `FAMILIES`: the fields that all its
models share, the keys of its config.json, and the values that transformers assumes for absent keys.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from slm.models.config import DecoderConfig

Keys = Mapping[str, Any]
_ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu'}
# Field of DecoderConfig -> key of config.json, unless a family names another.
_KEYS = {
  'vocab': 'vocab_size',
  'embed': 'hidden_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'mlp': 'intermediate_size',
  'activation': 'hidden_act',
  'norm_eps': 'rms_norm_eps',
  'tied': 'tie_word_embeddings',
}
# Keys that change the computation and are not supported -> the values that leave it unchanged.
_NEUTRAL = {
  'quantization_config': (None,),
  'partial_rotary_factor': (None, 1.0),
  'clip_qkv': (None,),
  'use_bidirectional_attention': (None, False),
  'decoder_sparse_step': (None, 1),
  'mlp_only_layers': (None, []),
  'per_layer_config': (None, {}),
}


@dataclasses.dataclass(frozen=True)
class Family:
  """A model_type of transformers.

  Attributes:
    architecture: the class name in transformers.
    defaults: values that transformers assumes for absent keys, in addition to `_DEFAULTS`.
    fixed: fields of DecoderConfig that all models of the family share.
    keys: field -> key, in addition to `_KEYS`; `bias` stands for qkv_bias and out_bias.
    attention: how the types of layers are derived, see `_layer_types`.
    experts: the module of router and experts in a layer, and the experts' gate, up and down.
    heads_divide_embed: whether transformers requires num_heads to divide embed.
    heads_fill_embed: whether transformers requires num_heads * head_dim to equal embed.
  """

  architecture: str
  defaults: Keys
  fixed: Keys = dataclasses.field(default_factory=dict)
  keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
  attention: str = 'full'
  experts: tuple[str, str, str, str] = ()
  heads_divide_embed: bool = False
  heads_fill_embed: bool = False


# Values that transformers 5.23 assumes for absent keys, unless a family has another.
_DEFAULTS = {
  'hidden_size': 4096,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': None,  # num_attention_heads
  'head_dim': None,  # hidden_size / num_attention_heads
  'max_position_embeddings': 32_768,
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'rope_theta': 10_000.0,
  'initializer_range': 0.02,
  'tie_word_embeddings': False,
  'attention_bias': False,
  'mlp_bias': False,
  'use_sliding_window': False,
  'sliding_window': None,
  'norm_topk_prob': False,
  'bos_token_id': None,
  'eos_token_id': None,
  'pad_token_id': None,
}
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
# Keys kept from the config.json of another family: they do not affect the computation.
_CARRIED = (*TOKEN_IDS, 'max_position_embeddings', 'initializer_range')

_BIAS = {'bias': 'attention_bias'}
_BIASES = {**_BIAS, 'mlp_bias': 'mlp_bias'}
_GEMMA = {'norms': 'sandwich', 'norm_offset': True, 'embed_scale': True}
_GEMMA_KEYS = {
  **_BIAS, 'activation': 'hidden_activation', 'query_scale': 'query_pre_attn_scalar',
  'attention_cap': 'attn_logit_softcapping', 'logit_cap': 'final_logit_softcapping',
}  # fmt: skip
_GEMMA_DEFAULTS = {
  'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26,
  'num_attention_heads': 8, 'num_key_value_heads': 4, 'head_dim': 256,
  'hidden_activation': 'gelu_pytorch_tanh', 'query_pre_attn_scalar': 256, 'sliding_window': 4096,
  'tie_word_embeddings': True, 'bos_token_id': 2, 'eos_token_id': 1, 'pad_token_id': 0,
}  # fmt: skip
_QWEN_DEFAULTS = {
  'vocab_size': 151_936, 'intermediate_size': 22_016, 'num_key_value_heads': 32,
  'sliding_window': 4096, 'max_window_layers': 28,
}  # fmt: skip
# transformers 5 renamed one of these to the other: either is read, both are written.
_EXPERT_COUNTS = ('num_experts', 'num_local_experts')
_EXPERTS = ('mlp', 'gate_proj', 'up_proj', 'down_proj')
_EXPERT_KEYS = {
  **_BIAS, 'num_experts': 'num_experts', 'experts_per_token': 'num_experts_per_tok',
  'renormalise': 'norm_topk_prob',
}  # fmt: skip

FAMILIES: dict[str, Family] = {
  'llama': Family(
    'LlamaForCausalLM', keys=_BIASES, heads_divide_embed=True,
    defaults={
      'vocab_size': 32_000, 'intermediate_size': 11_008, 'max_position_embeddings': 2048,
      'bos_token_id': 1, 'eos_token_id': 2,
    },
  ),
  'mistral': Family(
    'MistralForCausalLM', attention='every',
    defaults={
      'vocab_size': 32_000, 'intermediate_size': 14_336, 'num_key_value_heads': 8,
      'max_position_embeddings': 131_072, 'sliding_window': 4096,
      'bos_token_id': 1, 'eos_token_id': 2,
    },
  ),
  'qwen2': Family(
    'Qwen2ForCausalLM', attention='late', fixed={'qkv_bias': True}, defaults=_QWEN_DEFAULTS
  ),
  'qwen3': Family(
    'Qwen3ForCausalLM', attention='late', fixed={'qk_norm': 'head'}, keys=_BIAS,
    defaults={**_QWEN_DEFAULTS, 'head_dim': 128},
  ),
  'smollm3': Family(
    'SmolLM3ForCausalLM', attention='nope', keys=_BIASES,
    defaults={
      'vocab_size': 128_256, 'hidden_size': 2048, 'intermediate_size': 11_008,
      'num_hidden_layers': 36, 'num_attention_heads': 16, 'num_key_value_heads': 4,
      'rope_theta': 2_000_000.0, 'no_rope_layer_interval': 4, 'tie_word_embeddings': True,
      'bos_token_id': 128_000, 'eos_token_id': 128_001, 'pad_token_id': 128_004,
    },
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM', attention='mixed', heads_divide_embed=True,
    fixed=_GEMMA, keys=_GEMMA_KEYS,
    defaults={
      **_GEMMA_DEFAULTS, 'vocab_size': 256_000, 'max_position_embeddings': 8192,
      'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0,
    },
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM', attention='mixed', heads_divide_embed=True,
    fixed={**_GEMMA, 'qk_norm': 'head'}, keys=_GEMMA_KEYS,
    defaults={
      **_GEMMA_DEFAULTS, 'vocab_size': 262_208, 'max_position_embeddings': 131_072,
      'attn_logit_softcapping': None, 'final_logit_softcapping': None,
      'rope_theta': 1_000_000.0, 'rope_local_base_freq': 10_000.0, 'sliding_window_pattern': 6,
    },
  ),
  'olmo2': Family(
    'Olmo2ForCausalLM', fixed={'norms': 'post', 'qk_norm': 'all'}, keys=_BIAS,
    defaults={
      'vocab_size': 50_304, 'intermediate_size': 11_008, 'max_position_embeddings': 2048,
      'rms_norm_eps': 1e-5, 'eos_token_id': 50_279, 'pad_token_id': 1,
    },
  ),
  'mixtral': Family(
    'MixtralForCausalLM', attention='every',
    keys={'num_experts': 'num_local_experts', 'experts_per_token': 'num_experts_per_tok'},
    defaults={
      'vocab_size': 32_000, 'intermediate_size': 14_336, 'num_key_value_heads': 8,
      'max_position_embeddings': 131_072, 'rms_norm_eps': 1e-5, 'rope_theta': 1_000_000.0,
      'num_local_experts': 8, 'num_experts_per_tok': 2, 'bos_token_id': 1, 'eos_token_id': 2,
    },
    experts=('block_sparse_moe', 'w1', 'w3', 'w2'),
  ),
  'olmoe': Family(
    'OlmoeForCausalLM', heads_fill_embed=True, fixed={'qk_norm': 'all'}, keys=_EXPERT_KEYS,
    defaults={
      'vocab_size': 50_304, 'hidden_size': 2048, 'intermediate_size': 2048,
      'num_hidden_layers': 16, 'num_attention_heads': 16, 'max_position_embeddings': 4096,
      'rms_norm_eps': 1e-5, 'num_experts': 64, 'num_experts_per_tok': 8,
      'eos_token_id': 50_279, 'pad_token_id': 1,
    },
    experts=_EXPERTS,
  ),
  'qwen3_moe': Family(
    'Qwen3MoeForCausalLM', attention='every', fixed={'qk_norm': 'head'},
    keys={**_EXPERT_KEYS, 'mlp': 'moe_intermediate_size'},
    defaults={
      'vocab_size': 151_936, 'hidden_size': 2048, 'moe_intermediate_size': 768,
      'num_hidden_layers': 24, 'num_key_value_heads': 4, 'sliding_window': 4096,
      'num_experts': 128, 'num_experts_per_tok': 8,
    },
    experts=_EXPERTS,
  ),
}  # fmt: skip
# Families that ignore sliding_window unless use_sliding_window is true.
_WINDOW_SWITCH = ('qwen2', 'qwen3', 'qwen3_moe')


def resolve(hf: Keys) -> dict[str, Any]:
  """Complete config.json with the values that transformers assumes for absent keys.

  Raises:
    ValueError: naming the key, if the family or the value of a key is not supported.
  """
  name = hf.get('model_type')
  if name not in FAMILIES:
    raise ValueError(f'model_type {name!r}: expected one of {", ".join(FAMILIES)}')
  family = FAMILIES[name]
  for key, allowed in _NEUTRAL.items():
    if hf.get(key) not in allowed:
      raise ValueError(f'{key}={hf[key]!r}: expected one of {allowed}')
  full = {**_DEFAULTS, **family.defaults, **hf}
  counts = [hf[key] for key in _EXPERT_COUNTS if hf.get(key) is not None]
  if family.experts and counts:
    full |= dict.fromkeys(_EXPERT_COUNTS, counts[0])
  if name in _WINDOW_SWITCH and not full['use_sliding_window']:
    full['sliding_window'] = None
  if name == 'gemma2':
    full['sliding_window_pattern'] = 2  # transformers ignores the key
  return full


def read(hf: Keys) -> dict[str, Any]:
  """Return the fields of DecoderConfig that config.json describes.

  Raises:
    ValueError: as `resolve` does.
  """
  hf = resolve(hf)
  family = FAMILIES[hf['model_type']]
  keys = {**_KEYS, **family.keys}
  fields = {field: hf[key] for field, key in keys.items()}
  if fields['num_kv_heads'] is None:
    fields['num_kv_heads'] = fields['num_heads']
  if fields['head_dim'] is None:
    fields['head_dim'] = fields['embed'] // (fields['num_heads'] or 1)  # DecoderConfig refuses 0
  for cap in ('attention_cap', 'logit_cap'):
    fields[cap] = fields.get(cap) or 0.0
  if 'bias' in fields:
    fields['qkv_bias'] = fields['out_bias'] = fields.pop('bias')
  if fields['activation'] not in _ACTIVATIONS:
    key, value = keys['activation'], fields['activation']
    raise ValueError(f'{key}={value!r}: expected one of {", ".join(_ACTIVATIONS)}')
  fields['activation'] = _ACTIVATIONS[fields['activation']]
  types = _layer_types(hf, family.attention)
  if set(types) != {'full'}:
    fields['layer_types'] = tuple(types)
  fields['window'] = hf['sliding_window'] if 'window' in types else 0
  return {**family.fixed, **fields, **_read_rope(hf, types)}


_MOST_LAYERS = 10_000  # what a damaged file says must not take all memory
_LAYER_TYPES = {'full_attention': 'full', 'sliding_attention': 'window'}


def _layer_types(hf: Keys, attention: str) -> list[str]:
  """Return the type of each layer, as in DecoderConfig.layer_types."""
  count, window = hf['num_hidden_layers'], hf['sliding_window']
  if not isinstance(count, int) or count > _MOST_LAYERS:
    raise ValueError(f'num_hidden_layers={count!r}: expected a number up to {_MOST_LAYERS:,}')
  layers = range(count)
  if attention in ('late', 'mixed') and hf.get('layer_types'):
    if unknown := set(hf['layer_types']) - set(_LAYER_TYPES):
      raise ValueError(f'layer_types: expected {tuple(_LAYER_TYPES)}, found {sorted(unknown)}')
    return [_LAYER_TYPES[name] for name in hf['layer_types']]
  if attention == 'nope':
    return _nope_layers(hf)
  full = {
    'full': lambda i: True,
    'every': lambda i: window is None,
    'late': lambda i: window is None or i < hf['max_window_layers'],
    'mixed': lambda i: (i + 1) % hf['sliding_window_pattern'] == 0,
  }[attention]
  return ['full' if full(i) else 'window' for i in layers]


def _nope_layers(hf: Keys) -> list[str]:
  if hf['use_sliding_window']:
    raise ValueError('use_sliding_window=True: not supported beside no_rope_layers')
  count, has_rope = hf['num_hidden_layers'], hf.get('no_rope_layers')
  if has_rope is None:
    has_rope = [(i + 1) % hf['no_rope_layer_interval'] != 0 for i in range(count)]
  if len(has_rope) < count:
    raise ValueError(f'no_rope_layers: expected {count} of them, one per layer, found {has_rope}')
  return ['full' if rope else 'nope' for rope in has_rope[:count]]


# RoPE type -> the fields that it has besides theta, and their keys.
_ROPE_KEYS = {
  'default': {},
  'linear': {'rope_factor': 'factor'},
  'llama3': {
    'rope_factor': 'factor',
    'rope_low': 'low_freq_factor',
    'rope_high': 'high_freq_factor',
    'rope_context': 'original_max_position_embeddings',
  },
}


def _read_rope(hf: Keys, types: list[str]) -> dict[str, Any]:
  """Read rope_parameters (transformers 5), or rope_theta and rope_scaling (transformers 4)."""
  scaling, window_theta = {**(hf.get('rope_parameters') or {})}, 0.0
  if hf['model_type'] == 'gemma3_text':  # rope_parameters has a section for each type of layer
    local = {'rope_theta': hf['rope_local_base_freq'], **(scaling.get('sliding_attention') or {})}
    if (kind := local.get('rope_type', 'default')) != 'default':
      raise ValueError(f'rope_parameters.sliding_attention: rope_type {kind!r} is not supported')
    scaling = {**(scaling.get('full_attention') or {}), **(hf.get('rope_scaling') or {})}
    window_theta = float(local['rope_theta']) if 'window' in types else 0.0
  elif hf.get('rope_scaling'):  # transformers prefers it to rope_parameters
    scaling = {**hf['rope_scaling']}
  scaling = {'rope_theta': hf['rope_theta'], **scaling}
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind not in _ROPE_KEYS:
    raise ValueError(f'rope_type {kind!r}: expected one of {", ".join(_ROPE_KEYS)}')
  if (fraction := scaling.get('partial_rotary_factor')) not in (None, 1.0):
    raise ValueError(f'partial_rotary_factor={fraction!r}: expected one of (None, 1.0)')
  if kind == 'llama3':
    context = 'original_max_position_embeddings'  # at the top level it overrides the section's
    scaling.setdefault(context, hf['max_position_embeddings'])
    if hf.get(context) is not None:
      scaling[context] = hf[context]
  if not isinstance(theta := scaling['rope_theta'], int | float):
    raise ValueError(f'rope_theta: expected a number, found {theta!r}')
  for key in _ROPE_KEYS[kind].values():
    if key not in scaling:
      raise ValueError(f'rope_type {kind!r}: no key {key!r}')
  fields = {field: scaling[key] for field, key in _ROPE_KEYS[kind].items()}
  return {'rope': kind, 'rope_theta': float(theta), 'rope_theta_window': window_theta, **fields}


def write(cfg: DecoderConfig, name: str, source: Keys | None = None) -> dict[str, Any]:
  """Return the config.json of a shape in a family, in the dialects of transformers 4 and 5.

  Keys of `source` that do not affect the computation (token ids, lengths) are carried over.

  Raises:
    ValueError: if the family cannot have the shape, naming the first field that differs.
  """
  family, source = FAMILIES[name], source or {}
  if family.heads_divide_embed and cfg.embed % cfg.num_heads:
    raise ValueError(f'{name} needs num_heads={cfg.num_heads} to divide embed={cfg.embed}')
  if family.heads_fill_embed and cfg.embed != cfg.num_heads * cfg.head_dim:
    raise ValueError(
      f'{name} needs num_heads={cfg.num_heads} times head_dim={cfg.head_dim} to be '
      f'embed={cfg.embed}, the width of its norms of queries and keys'
    )
  values = dataclasses.asdict(cfg)
  runtime = {field: values[field] for field in ('dispatch', 'remat', 'unroll')}
  activation = next(key for key, value in _ACTIVATIONS.items() if value == cfg.activation)
  scale = cfg.query_scale or cfg.head_dim
  values |= {
    'activation': activation,
    'bias': cfg.out_bias,
    'query_scale': int(scale) if scale == int(scale) else scale,
    'attention_cap': cfg.attention_cap or None,
    'logit_cap': cfg.logit_cap or None,
  }
  hf = {**(source if source.get('model_type') == name else _carried(source, family))}
  hf |= {key: values[field] for field, key in {**_KEYS, **family.keys}.items()}
  hf |= {'model_type': name, 'architectures': [family.architecture], 'hidden_act': activation}
  if family.experts:
    hf |= dict.fromkeys(_EXPERT_COUNTS, cfg.num_experts)
  hf |= _write_attention(cfg, name) | _write_rope(cfg, name)
  reread = dataclasses.asdict(DecoderConfig(**read(hf), **runtime))
  for field, value in dataclasses.asdict(cfg).items():
    same = (value or cfg.head_dim) if field == 'query_scale' else value
    if reread[field] not in (value, same):
      raise ValueError(f'{name} cannot have {field}={value!r} (it is read as {reread[field]!r})')
  return hf


def _carried(source: Keys, family: Family) -> dict[str, Any]:
  """Return the keys of another family's config.json that apply to any family."""
  full = resolve(source) if source.get('model_type') in FAMILIES else source
  defaults = {**_DEFAULTS, **family.defaults}
  carried = {key: full[key] for key in _CARRIED if key in full}
  for key in TOKEN_IDS:
    if carried.get(key) is None:  # null only where absence would mean the family's own id
      carried.pop(key, None)
      carried |= {} if defaults[key] is None else {key: None}
  return carried


def _write_attention(cfg: DecoderConfig, name: str) -> dict[str, Any]:
  attention, types = FAMILIES[name].attention, cfg.layer_types or ('full',) * cfg.num_layers
  if attention == 'full':
    return {}
  if attention == 'nope':
    has_rope = [int(kind != 'nope') for kind in types]
    return {'no_rope_layers': has_rope, 'use_sliding_window': False, 'layer_types': None}
  keys: dict[str, Any] = {'sliding_window': cfg.window or None}
  if name in _WINDOW_SWITCH:
    keys['use_sliding_window'] = bool(cfg.window)
  if attention == 'late' and cfg.window:
    keys['max_window_layers'] = types.index('window')
  if attention in ('late', 'mixed'):
    names = {kind: key for key, kind in _LAYER_TYPES.items()}
    keys['layer_types'] = [names.get(kind, kind) for kind in types]
  return keys


def _write_rope(cfg: DecoderConfig, name: str) -> dict[str, Any]:
  scaling = {'rope_type': cfg.rope}
  scaling |= {key: getattr(cfg, field) for field, key in _ROPE_KEYS[cfg.rope].items()}
  rope = {**scaling, 'rope_theta': cfg.rope_theta}
  keys: dict[str, Any] = {
    'rope_theta': cfg.rope_theta,
    'rope_scaling': None if cfg.rope == 'default' else scaling,
    'rope_parameters': rope,
  }
  if name == 'gemma3_text':
    theta = cfg.rope_theta_window or cfg.rope_theta
    local = {'rope_type': 'default', 'rope_theta': theta}
    keys['rope_local_base_freq'] = theta
    keys['rope_parameters'] = {'full_attention': rope, 'sliding_attention': local}
  return keys


def find(cfg: DecoderConfig, source: Keys | None = None) -> tuple[str, dict[str, Any]]:
  """Return a family that can have a shape, the source's if possible, and its config.json.

  Raises:
    ValueError: if no family can, with the reason of the first one tried.
  """
  preferred = (source or {}).get('model_type')
  reasons = []
  for name in sorted(FAMILIES, key=lambda family: family != preferred):
    try:
      return name, write(cfg, name, source)
    except ValueError as e:
      reasons.append(str(e))
  raise ValueError(f'no architecture of transformers has this shape: {reasons[0]}, and so on')
