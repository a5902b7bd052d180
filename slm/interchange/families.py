"""config.json of a Hugging Face model to the shape of a decoder, and back.

A family is a row of a table: what it fixes, and which of its keys mean which of ours.
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
    fixed: fields of DecoderConfig that all its models share.
    keys: further fields -> their keys.
    defaults: keys that config.json may leave out.
    attention: which layers see a window, and which no positions: a reader and a writer.
    experts: where the router and the experts lie in a layer, and the experts' three matrices.
    divides: whether transformers insists that the heads divide the hidden size.
    square: whether it takes the heads to be as wide as the hidden size, whatever head_dim says.
  """

  architecture: str
  fixed: Keys = dataclasses.field(default_factory=dict)
  keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
  defaults: Keys = dataclasses.field(default_factory=dict)
  attention: str = 'full'
  mlp: str = 'intermediate_size'
  experts: tuple[str, str, str, str] = ()
  divides: bool = False
  square: bool = False


def _every_window(hf: Keys) -> list[str]:
  """Read Mistral's sliding_window: every layer has it."""
  return ['window' if hf.get('sliding_window') else 'full'] * hf['num_hidden_layers']


def _switched_window(hf: Keys) -> list[str]:
  """Read that of Qwen's mixtures: every layer has it, where it is used."""
  return _every_window(hf if hf.get('use_sliding_window') else {**hf, 'sliding_window': None})


def _late_window(hf: Keys) -> list[str]:
  """Read Qwen's: where it is used, from layer max_window_layers on."""
  n, windowed = hf['num_hidden_layers'], hf.get('use_sliding_window') and hf.get('sliding_window')
  first = hf.get('max_window_layers', 0) if windowed else n
  return ['full' if i < first else 'window' for i in range(n)]


def _mixed_window(every: int) -> Callable[[Keys], list[str]]:
  """Read Gemma's: all layers but each `every`th."""

  def read(hf: Keys) -> list[str]:
    step = hf.get('sliding_window_pattern', every)
    return ['full' if (i + 1) % step == 0 else 'window' for i in range(hf['num_hidden_layers'])]

  return read


def _nope(hf: Keys) -> list[str]:
  """Read SmolLM3's: no positions in each no_rope_layer_interval-th layer."""
  n, step = hf['num_hidden_layers'], hf.get('no_rope_layer_interval', 4)
  kept = hf.get('no_rope_layers') or [int((i + 1) % step != 0) for i in range(n)]
  if hf.get('use_sliding_window'):
    raise ValueError('use_sliding_window=True: not supported beside no_rope_layers')
  return ['full' if rope else 'nope' for rope in kept]


# Kind of attention -> how the types of layers are read where layer_types does not name them.
_ATTENTION: dict[str, Callable[[Keys], list[str]]] = {
  'full': lambda hf: ['full'] * hf['num_hidden_layers'],
  'every': _every_window,
  'switched': _switched_window,
  'late': _late_window,
  'gemma2': _mixed_window(2),
  'gemma3': _mixed_window(6),
  'nope': _nope,
}

# Of a source of another family, what says nothing of the computation.
_KEPT = (
  'bos_token_id', 'eos_token_id', 'pad_token_id', 'max_position_embeddings', 'initializer_range'
)  # fmt: skip
_LATER = {'use_sliding_window': False, 'sliding_window': None, 'rope_theta': 10_000.0}
_GEMMA = {'norms': 'sandwich', 'norm_offset': True, 'embed_scale': True}
_GEMMA_KEYS = {
  'query_scale': 'query_pre_attn_scalar',
  'attention_cap': 'attn_logit_softcapping',
  'logit_cap': 'final_logit_softcapping',
  'bias': 'attention_bias',
}
_BIAS = {'bias': 'attention_bias'}  # of q, k, v and o alike
# transformers 5 renamed one of these to the other: read either, write both.
_COUNTS = ('num_experts', 'num_local_experts')
_NO_BIAS = {'attention_bias': False}
_EXPERTS = ('mlp', 'gate_proj', 'up_proj', 'down_proj')
_ROUTED = {
  **_BIAS, 'num_experts': 'num_experts', 'experts_per_token': 'num_experts_per_tok',
  'renormalise': 'norm_topk_prob',
}  # fmt: skip

FAMILIES: dict[str, Family] = {
  'llama': Family(
    'LlamaForCausalLM', divides=True,
    keys={**_BIAS, 'mlp_bias': 'mlp_bias'},
    # The published Llama 2 says nothing of its rope_theta.
    defaults={**_NO_BIAS, 'mlp_bias': False, 'tie_word_embeddings': False, 'rope_theta': 10_000.0},
  ),
  'mistral': Family(
    'MistralForCausalLM', attention='every',
    defaults={'tie_word_embeddings': False, 'sliding_window': 4096},
  ),
  'qwen2': Family(
    'Qwen2ForCausalLM', attention='late', fixed={'qkv_bias': True},
    defaults={'tie_word_embeddings': False, **_LATER},
  ),
  'qwen3': Family(
    'Qwen3ForCausalLM', attention='late', fixed={'qk_norm': 'head'}, keys=_BIAS,
    defaults={**_NO_BIAS, 'tie_word_embeddings': False, **_LATER},
  ),
  'smollm3': Family(
    'SmolLM3ForCausalLM', attention='nope',
    keys={**_BIAS, 'mlp_bias': 'mlp_bias'},
    defaults={**_NO_BIAS, 'mlp_bias': False, 'tie_word_embeddings': True},
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM',
    fixed=_GEMMA,
    keys=_GEMMA_KEYS,
    defaults={
      **_NO_BIAS, 'tie_word_embeddings': True, 'attn_logit_softcapping': 50.0,
      'final_logit_softcapping': 30.0, 'rope_theta': 10_000.0,
    },
    attention='gemma2',
    divides=True,
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM',
    fixed={**_GEMMA, 'qk_norm': 'head'},
    keys=_GEMMA_KEYS,
    defaults={
      **_NO_BIAS, 'tie_word_embeddings': True, 'attn_logit_softcapping': None,
      'final_logit_softcapping': None, 'rope_theta': 1_000_000.0, 'rope_local_base_freq': 10_000.0,
    },
    attention='gemma3',
    divides=True,
  ),
  'olmo2': Family(
    'Olmo2ForCausalLM', fixed={'norms': 'post', 'qk_norm': 'all'}, keys=_BIAS,
    defaults={**_NO_BIAS, 'tie_word_embeddings': False},
  ),
  'mixtral': Family(
    'MixtralForCausalLM',
    keys={'num_experts': 'num_local_experts', 'experts_per_token': 'num_experts_per_tok'},
    defaults={'tie_word_embeddings': False},
    attention='every',
    experts=('block_sparse_moe', 'w1', 'w3', 'w2'),
  ),
  'olmoe': Family(
    'OlmoeForCausalLM', square=True, fixed={'qk_norm': 'all'},
    keys=_ROUTED,
    defaults={**_NO_BIAS, 'norm_topk_prob': False, 'tie_word_embeddings': False},
    experts=_EXPERTS,
  ),
  'qwen3_moe': Family(
    'Qwen3MoeForCausalLM',
    fixed={'qk_norm': 'head'},
    keys=_ROUTED,
    defaults={**_NO_BIAS, 'norm_topk_prob': False, 'tie_word_embeddings': False, **_LATER},
    attention='switched',
    mlp='moe_intermediate_size',
    experts=_EXPERTS,
  ),
}  # fmt: skip


def read(hf: Keys) -> dict[str, Any]:
  """Turn config.json into DecoderConfig fields.

  Raises:
    ValueError: naming the key, if the architecture is unknown, a key is missing, or a value asks
      for something that is not computed here.
  """
  name = hf.get('model_type')
  if name not in FAMILIES:
    raise ValueError(f'model_type {name!r}: expected one of {", ".join(FAMILIES)}')
  family = FAMILIES[name]
  for key, allowed in _NEUTRAL.items():
    if hf.get(key) not in allowed:
      raise ValueError(f'{key}={hf[key]!r}: expected one of {allowed}')
  hf = {'num_key_value_heads': None, 'head_dim': None, **family.defaults, **hf}
  for key, other in (_COUNTS, _COUNTS[::-1]):
    if family.experts and hf.get(key) is None and other in hf:
      hf[key] = hf[other]
  keys = {**_COMMON, **family.keys, 'mlp': family.mlp}
  for key in keys.values():
    if key not in hf:
      raise ValueError(f'no key {key!r}')
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
  act = hf.get('hidden_activation') or hf.get('hidden_act')
  if act not in _ACTIVATIONS:
    raise ValueError(f'hidden_act={act!r}: expected one of {", ".join(_ACTIVATIONS)}')
  found['activation'] = _ACTIVATIONS[act]
  types = _layer_types(hf, family)
  if set(types) != {'full'}:
    found['layer_types'] = tuple(types)
  found['window'] = hf.get('sliding_window') if 'window' in types else 0
  return {**family.fixed, **found, **_read_rope(hf, types)}


def _layer_types(hf: Keys, family: Family) -> list[str]:
  types = _ATTENTION[family.attention](hf)
  if family.attention in ('late', 'gemma2', 'gemma3') and hf.get('layer_types'):
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
  given = hf.get('rope_parameters') or {}
  if 'full_attention' in given or 'sliding_attention' in given:  # one for each type of layer
    local = given.get('sliding_attention') or {}
    given = given.get('full_attention') or {}
    if (kind := local.get('rope_type', 'default')) != 'default':
      raise ValueError(f'rope_parameters.sliding_attention: rope_type {kind!r} is not supported')
    theta_window = local.get('rope_theta', hf.get('rope_local_base_freq', 0.0))
  else:
    theta_window = hf.get('rope_local_base_freq', 0.0)
  scaling = {**(hf.get('rope_scaling') or {}), **given}
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind not in _SCALING:
    raise ValueError(f'rope_type {kind!r}: expected one of {", ".join(_SCALING)}')
  theta = scaling.get('rope_theta', hf.get('rope_theta'))
  if theta is None:
    raise ValueError("no key 'rope_theta', nor in rope_parameters")
  found = {'rope': kind, 'rope_theta': float(theta)}
  for ours, key in _SCALING[kind].items():
    if key not in scaling:
      raise ValueError(f'rope_type {kind!r}: no key {key!r}')
    found[ours] = scaling[key]
  if 'window' in types and theta_window:
    found['rope_theta_window'] = float(theta_window)
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
  if (source or {}).get('model_type') != name:
    source = {key: source[key] for key in _KEPT if key in (source or {})}
  values = dataclasses.asdict(cfg) | {'bias': cfg.out_bias}
  hf = {**source, **{key: values[ours] for ours, key in _COMMON.items()}}
  hf |= {key: values[ours] for ours, key in family.keys.items()} | {family.mlp: cfg.mlp}
  act = next(k for k, v in _ACTIVATIONS.items() if v == cfg.activation)
  hf |= {'model_type': name, 'architectures': [family.architecture], 'hidden_act': act}
  if family.experts:
    hf |= dict.fromkeys(_COUNTS, cfg.num_experts)
  if name.startswith('gemma'):
    hf['hidden_activation'] = act
    hf['query_pre_attn_scalar'] = cfg.query_scale or cfg.head_dim
    hf |= {key: hf[key] or None for key in ('attn_logit_softcapping', 'final_logit_softcapping')}
  hf |= _write_attention(cfg, family) | _write_rope(cfg, name)
  hf.setdefault('max_position_embeddings', 2048)
  hf.setdefault('initializer_range', 0.02)
  for token in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
    hf.setdefault(token, None)
  back = dataclasses.asdict(DecoderConfig(**{**read(hf), **_runtime(cfg)}))
  for key, value in dataclasses.asdict(cfg).items():
    if back[key] != value and not (key == 'query_scale' and (value or cfg.head_dim) == back[key]):
      raise ValueError(f'{name} cannot have {key}={value!r} (it would be read as {back[key]!r})')
  return hf


def _runtime(cfg: DecoderConfig) -> dict[str, Any]:
  """Return the fields that say how, not what, is computed."""
  return {key: getattr(cfg, key) for key in ('dispatch', 'remat', 'unroll')}


def _write_attention(cfg: DecoderConfig, family: Family) -> dict[str, Any]:
  types = cfg.layer_types or ('full',) * cfg.num_layers
  if family.attention == 'full':
    return {}
  if family.attention == 'nope':
    kept = [int(t != 'nope') for t in types]
    return {'no_rope_layers': kept, 'use_sliding_window': False, 'layer_types': None}
  found: dict[str, Any] = {'sliding_window': cfg.window or None}
  if 'use_sliding_window' in family.defaults:
    found |= {'use_sliding_window': bool(cfg.window)}
  if family.attention == 'late' and cfg.window:
    found['max_window_layers'] = types.index('window')
  if family.attention in ('late', 'gemma2', 'gemma3'):
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
