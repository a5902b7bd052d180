"""config.json of a Hugging Face model to the shape of a decoder, and back.

A family is a row of a table: what it fixes, which of its keys mean which of ours, and what
transformers takes for the keys that a config.json leaves out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from slm.models.config import DecoderConfig

Keys = Mapping[str, Any]
_ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu'}
# Ours -> theirs, in every family.
_COMMON = {
  'vocab': 'vocab_size',
  'embed': 'hidden_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'norm_eps': 'rms_norm_eps',
  'tied': 'tie_word_embeddings',
}
# What would change the computation and is not computed here -> the values that do not.
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
    architecture: its class.
    defaults: what transformers takes for keys that config.json leaves out, beside `_DEFAULTS`.
    fixed: fields of DecoderConfig that all its models share.
    keys: further fields -> their keys.
    attention: which layers see a window, and which no positions: a reader and a writer.
    mlp: the key of the width of its MLPs, or of each expert's.
    activation: the key of its activation.
    experts: where the router and the experts lie in a layer, and the experts' three matrices.
    divides: whether transformers insists that the heads divide the hidden size.
    square: whether it takes the heads to be as wide as the hidden size, whatever head_dim says.
  """

  architecture: str
  defaults: Keys
  fixed: Keys = dataclasses.field(default_factory=dict)
  keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
  attention: str = 'full'
  mlp: str = 'intermediate_size'
  activation: str = 'hidden_act'
  experts: tuple[str, str, str, str] = ()
  divides: bool = False
  square: bool = False


# What transformers 5.23 takes for keys that are left out, where a family does not say otherwise.
_DEFAULTS = {
  'hidden_size': 4096,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': None,  # as many as attention heads
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


def _every_window(hf: Keys) -> list[str]:
  """Read Mistral's sliding_window: every layer has it."""
  return ['full' if hf['sliding_window'] is None else 'window'] * hf['num_hidden_layers']


def _late_window(hf: Keys) -> list[str]:
  """Read Qwen's: from layer max_window_layers on."""
  n = hf['num_hidden_layers']
  first = n if hf['sliding_window'] is None else hf['max_window_layers']
  return ['full' if i < first else 'window' for i in range(n)]


def _mixed_window(hf: Keys) -> list[str]:
  """Read Gemma's: all layers but each `sliding_window_pattern`th."""
  step = hf['sliding_window_pattern']
  return ['full' if (i + 1) % step == 0 else 'window' for i in range(hf['num_hidden_layers'])]


def _nope(hf: Keys) -> list[str]:
  """Read SmolLM3's: no positions in each no_rope_layer_interval-th layer."""
  if hf['use_sliding_window']:
    raise ValueError('use_sliding_window=True: not supported beside no_rope_layers')
  n, step, kept = hf['num_hidden_layers'], hf['no_rope_layer_interval'], hf.get('no_rope_layers')
  if kept is None:
    kept = [int((i + 1) % step != 0) for i in range(n)]
  if len(kept) < n:
    raise ValueError(f'no_rope_layers: expected {n} of them, one for each layer, found {kept}')
  return ['full' if rope else 'nope' for rope in kept[:n]]


# Kind of attention -> how the types of layers are read where layer_types does not name them.
_ATTENTION: dict[str, Callable[[Keys], list[str]]] = {
  'full': lambda hf: ['full'] * hf['num_hidden_layers'],
  'every': _every_window,
  'late': _late_window,
  'mixed': _mixed_window,
  'nope': _nope,
}

# Of a source of another family, what says nothing of the computation.
_KEPT = (*TOKEN_IDS, 'max_position_embeddings', 'initializer_range')
_GEMMA = {'norms': 'sandwich', 'norm_offset': True, 'embed_scale': True}
_GEMMA_KEYS = {
  'query_scale': 'query_pre_attn_scalar',
  'attention_cap': 'attn_logit_softcapping',
  'logit_cap': 'final_logit_softcapping',
  'bias': 'attention_bias',
}
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
_BIAS = {'bias': 'attention_bias'}  # of q, k, v and o alike
# transformers 5 renamed one of these to the other: read either, write both.
_COUNTS = ('num_experts', 'num_local_experts')
_EXPERTS = ('mlp', 'gate_proj', 'up_proj', 'down_proj')
_ROUTED = {
  **_BIAS, 'num_experts': 'num_experts', 'experts_per_token': 'num_experts_per_tok',
  'renormalise': 'norm_topk_prob',
}  # fmt: skip

FAMILIES: dict[str, Family] = {
  'llama': Family(
    'LlamaForCausalLM', divides=True,
    keys={**_BIAS, 'mlp_bias': 'mlp_bias'},
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
    'SmolLM3ForCausalLM', attention='nope',
    keys={**_BIAS, 'mlp_bias': 'mlp_bias'},
    defaults={
      'vocab_size': 128_256, 'hidden_size': 2048, 'intermediate_size': 11_008,
      'num_hidden_layers': 36, 'num_attention_heads': 16, 'num_key_value_heads': 4,
      'rope_theta': 2_000_000.0, 'no_rope_layer_interval': 4, 'tie_word_embeddings': True,
      'bos_token_id': 128_000, 'eos_token_id': 128_001, 'pad_token_id': 128_004,
    },
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM', attention='mixed', activation='hidden_activation', divides=True,
    fixed=_GEMMA, keys=_GEMMA_KEYS,
    defaults={
      **_GEMMA_DEFAULTS, 'vocab_size': 256_000, 'max_position_embeddings': 8192,
      'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0,
    },
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM', attention='mixed', activation='hidden_activation', divides=True,
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
    'OlmoeForCausalLM', square=True, fixed={'qk_norm': 'all'}, keys=_ROUTED,
    defaults={
      'vocab_size': 50_304, 'hidden_size': 2048, 'intermediate_size': 2048,
      'num_hidden_layers': 16, 'num_attention_heads': 16, 'max_position_embeddings': 4096,
      'rms_norm_eps': 1e-5, 'num_experts': 64, 'num_experts_per_tok': 8,
      'eos_token_id': 50_279, 'pad_token_id': 1,
    },
    experts=_EXPERTS,
  ),
  'qwen3_moe': Family(
    'Qwen3MoeForCausalLM', attention='every', fixed={'qk_norm': 'head'}, keys=_ROUTED,
    defaults={
      'vocab_size': 151_936, 'hidden_size': 2048, 'moe_intermediate_size': 768,
      'num_hidden_layers': 24, 'num_key_value_heads': 4, 'sliding_window': 4096,
      'num_experts': 128, 'num_experts_per_tok': 8,
    },
    mlp='moe_intermediate_size',
    experts=_EXPERTS,
  ),
}  # fmt: skip
# Families whose windows count only where use_sliding_window is true.
_SWITCHED = ('qwen2', 'qwen3', 'qwen3_moe')


def token_ids(hf: Keys) -> dict[str, Any]:
  """Return the token ids that a config.json names."""
  return {key: hf[key] for key in TOKEN_IDS if hf.get(key) is not None}


def resolve(hf: Keys) -> dict[str, Any]:
  """Return config.json with transformers' own value of every key that it leaves out.

  Raises:
    ValueError: naming the key, if the architecture is unknown or a value asks for something that
      is not computed here.
  """
  name = hf.get('model_type')
  if name not in FAMILIES:
    raise ValueError(f'model_type {name!r}: expected one of {", ".join(FAMILIES)}')
  family = FAMILIES[name]
  for key, allowed in _NEUTRAL.items():
    if hf.get(key) not in allowed:
      raise ValueError(f'{key}={hf[key]!r}: expected one of {allowed}')
  full = {**_DEFAULTS, **family.defaults, **hf}
  if family.experts:
    count = next((hf[key] for key in _COUNTS if hf.get(key) is not None), None)
    full |= {} if count is None else dict.fromkeys(_COUNTS, count)
  if name in _SWITCHED and not full['use_sliding_window']:
    full['sliding_window'] = None
  if name == 'gemma2':
    full['sliding_window_pattern'] = 2  # whatever it says
  return full


def read(hf: Keys) -> dict[str, Any]:
  """Turn config.json into DecoderConfig fields.

  Raises:
    ValueError: naming the key, if the architecture is unknown or a value asks for something that
      is not computed here.
  """
  hf = resolve(hf)
  family = FAMILIES[hf['model_type']]
  keys = {**_COMMON, **family.keys, 'mlp': family.mlp}
  found = {ours: hf[key] for ours, key in keys.items()}
  if found['num_kv_heads'] is None:
    found['num_kv_heads'] = found['num_heads']
  if found['head_dim'] is None:
    found['head_dim'] = found['embed'] // (found['num_heads'] or 1)  # 0 is refused later
  for cap in ('attention_cap', 'logit_cap'):
    found[cap] = found.get(cap) or 0.0
  if 'bias' in found:
    bias = found.pop('bias')
    found |= {'qkv_bias': bias, 'out_bias': bias}
  act = hf[family.activation]
  if act not in _ACTIVATIONS:
    raise ValueError(f'{family.activation}={act!r}: expected one of {", ".join(_ACTIVATIONS)}')
  found['activation'] = _ACTIVATIONS[act]
  types = _layer_types(hf, family)
  if set(types) != {'full'}:
    found['layer_types'] = tuple(types)
  found['window'] = hf['sliding_window'] if 'window' in types else 0
  return {**family.fixed, **found, **_read_rope(hf, types)}


def _layer_types(hf: Keys, family: Family) -> list[str]:
  types = _ATTENTION[family.attention](hf)
  if family.attention in ('late', 'mixed') and hf.get('layer_types'):
    names = {'full_attention': 'full', 'sliding_attention': 'window'}
    unknown = set(hf['layer_types']) - set(names)
    if unknown:
      raise ValueError(f'layer_types: expected {tuple(names)}, found {sorted(unknown)}')
    types = [names[t] for t in hf['layer_types']]
  return types


# Ours -> theirs, of the RoPE types that have more than a theta.
_SCALING = {
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
  """Read either dialect: rope_parameters (transformers 5), or rope_theta and rope_scaling (4)."""
  scaling, theta_window = {**(hf.get('rope_parameters') or {})}, 0.0
  if hf['model_type'] == 'gemma3_text':  # one for each type of layer
    local = {'rope_theta': hf['rope_local_base_freq'], **(scaling.get('sliding_attention') or {})}
    if (kind := local.get('rope_type', 'default')) != 'default':
      raise ValueError(f'rope_parameters.sliding_attention: rope_type {kind!r} is not supported')
    scaling = {**(scaling.get('full_attention') or {}), **(hf.get('rope_scaling') or {})}
    theta_window = float(local['rope_theta']) if 'window' in types else 0.0
  elif hf.get('rope_scaling'):  # of both dialects transformers takes the older
    scaling = {**hf['rope_scaling']}
  scaling = {'rope_theta': hf['rope_theta'], **scaling}
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind not in _SCALING:
    raise ValueError(f'rope_type {kind!r}: expected one of {", ".join(_SCALING)}')
  if (part := scaling.get('partial_rotary_factor')) not in (None, 1.0):
    raise ValueError(f'partial_rotary_factor={part!r}: expected one of (None, 1.0)')
  if kind == 'llama3':
    length = hf.get('original_max_position_embeddings')  # goes before what rope_parameters say
    scaling.setdefault('original_max_position_embeddings', hf['max_position_embeddings'])
    scaling |= {} if length is None else {'original_max_position_embeddings': length}
  if not isinstance(theta := scaling['rope_theta'], int | float):
    raise ValueError(f'rope_theta: expected a number, found {theta!r}')
  found = {'rope': kind, 'rope_theta': float(theta), 'rope_theta_window': theta_window}
  for ours, key in _SCALING[kind].items():
    if key not in scaling:
      raise ValueError(f'rope_type {kind!r}: no key {key!r}')
    found[ours] = scaling[key]
  return found


def write(cfg: DecoderConfig, name: str, source: Keys | None = None) -> dict[str, Any]:
  """Turn a shape into config.json of a family, in the dialects of transformers 4 and 5.

  Keys that say nothing of the shape (token ids, lengths) are taken over from `source`.

  Raises:
    ValueError: if the family cannot be that shape, naming the first field that differs.
  """
  family = FAMILIES[name]
  if family.divides and cfg.embed % cfg.num_heads:
    raise ValueError(f'{name} needs num_heads={cfg.num_heads} to divide embed={cfg.embed}')
  if family.square and cfg.embed != cfg.num_heads * cfg.head_dim:
    raise ValueError(
      f'{name} needs num_heads={cfg.num_heads} times head_dim={cfg.head_dim} to be '
      f'embed={cfg.embed}, whose norms of queries and keys are that wide'
    )
  source = source or {}
  if source.get('model_type') != name:
    full = resolve(source) if source.get('model_type') in FAMILIES else source
    source = {key: full[key] for key in _KEPT if key in full}
    # Absent stays absent: null where this family would take an id of its own.
    for key in TOKEN_IDS:
      if source.get(key) is None and source.pop(key, None) != {**_DEFAULTS, **family.defaults}[key]:
        source[key] = None
  values = dataclasses.asdict(cfg) | {'bias': cfg.out_bias}
  hf = {**source, **{key: values[ours] for ours, key in _COMMON.items()}}
  hf |= {key: values[ours] for ours, key in family.keys.items()} | {family.mlp: cfg.mlp}
  act = next(k for k, v in _ACTIVATIONS.items() if v == cfg.activation)
  hf |= {'model_type': name, 'architectures': [family.architecture], 'hidden_act': act}
  if family.experts:
    hf |= dict.fromkeys(_COUNTS, cfg.num_experts)
  if name.startswith('gemma'):
    hf['hidden_activation'] = act
    scale = cfg.query_scale or cfg.head_dim
    hf['query_pre_attn_scalar'] = int(scale) if scale == int(scale) else scale
    hf |= {key: hf[key] or None for key in ('attn_logit_softcapping', 'final_logit_softcapping')}
  hf |= _write_attention(cfg, name) | _write_rope(cfg, name)
  back = dataclasses.asdict(DecoderConfig(**{**read(hf), **_runtime(cfg)}))
  for key, value in dataclasses.asdict(cfg).items():
    if back[key] != value and not (key == 'query_scale' and (value or cfg.head_dim) == back[key]):
      raise ValueError(f'{name} cannot have {key}={value!r} (it would be read as {back[key]!r})')
  return hf


def _runtime(cfg: DecoderConfig) -> dict[str, Any]:
  """Return the fields that say how, not what, is computed."""
  return {key: getattr(cfg, key) for key in ('dispatch', 'remat', 'unroll')}


def _write_attention(cfg: DecoderConfig, name: str) -> dict[str, Any]:
  family, types = FAMILIES[name], cfg.layer_types or ('full',) * cfg.num_layers
  if family.attention == 'full':
    return {}
  if family.attention == 'nope':
    kept = [int(t != 'nope') for t in types]
    return {'no_rope_layers': kept, 'use_sliding_window': False, 'layer_types': None}
  found: dict[str, Any] = {'sliding_window': cfg.window or None}
  if name in _SWITCHED:
    found |= {'use_sliding_window': bool(cfg.window)}
  if family.attention == 'late' and cfg.window:
    found['max_window_layers'] = types.index('window')
  if family.attention in ('late', 'mixed'):
    names = {'full': 'full_attention', 'window': 'sliding_attention'}
    found['layer_types'] = [names.get(t, t) for t in types]
  return found


def _write_rope(cfg: DecoderConfig, name: str) -> dict[str, Any]:
  values = dataclasses.asdict(cfg)
  scaling = {'rope_type': cfg.rope}
  scaling |= {key: values[ours] for ours, key in _SCALING[cfg.rope].items()}
  found: dict[str, Any] = {
    'rope_theta': cfg.rope_theta,
    'rope_scaling': None if cfg.rope == 'default' else scaling,
    'rope_parameters': {**scaling, 'rope_theta': cfg.rope_theta},
  }
  if name == 'gemma3_text':
    local = cfg.rope_theta_window or cfg.rope_theta
    found['rope_local_base_freq'] = local
    found['rope_parameters'] = {
      'full_attention': found['rope_parameters'],
      'sliding_attention': {'rope_type': 'default', 'rope_theta': local},
    }
  return found


def find(cfg: DecoderConfig, source: Keys | None = None) -> tuple[str, dict[str, Any]]:
  """Choose the family that a shape is of, the source's if it can be, and write its config.json.

  Raises:
    ValueError: if no family has that shape, with what kept the first from it.
  """
  first = (source or {}).get('model_type')
  reasons = []
  for name in sorted(FAMILIES, key=lambda n: n != first):
    try:
      return name, write(cfg, name, source)
    except ValueError as e:
      reasons.append(str(e))
  raise ValueError(f'no architecture of transformers has this shape: {reasons[0]}, and so on')
