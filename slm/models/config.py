"""The shape of a decoder: enough of them to be any Llama, Qwen, Mistral, Gemma, OLMo or SmolLM."""

import dataclasses

from slm.models import layers, moe

NORMS = ('pre', 'post', 'sandwich')
QK_NORMS = ('', 'head', 'all')
# What a layer's attention sees: all of the past, a window of it, or all without positions (NoPE).
LAYER_TYPES = ('full', 'window', 'nope')


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Shape of a decoder; head_dim is free of embed / num_heads. configs/base.py explains each."""

  vocab: int
  embed: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp: int
  activation: str = 'silu'
  norms: str = 'pre'
  norm_eps: float = 1e-5
  norm_offset: bool = False
  qk_norm: str = ''
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  tied: bool = True
  embed_scale: bool = False
  query_scale: float = 0.0
  attention_cap: float = 0.0
  logit_cap: float = 0.0
  rope: str = 'default'
  rope_theta: float = 10_000.0
  rope_factor: float = 1.0
  rope_low: float = 1.0
  rope_high: float = 4.0
  rope_context: int = 8192
  rope_theta_window: float = 0.0
  window: int = 0
  layer_types: tuple[str, ...] = ()
  num_experts: int = 0
  experts_per_token: int = 2
  renormalise: bool = True
  shared_mlp: int = 0
  dispatch: str = 'einsum'
  remat: str = 'none'
  unroll: int = 1

  def __post_init__(self):
    object.__setattr__(self, 'layer_types', tuple(self.layer_types))
    sizes = ('vocab', 'embed', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp')
    for name in sizes:
      if not isinstance(value := getattr(self, name), int) or value < 1:
        raise ValueError(f'model.{name}: expected a whole number, at least 1, found {value!r}')
    if not isinstance(self.norm_eps, int | float) or not self.norm_eps > 0:
      raise ValueError(f'model.norm_eps: expected a number above 0, found {self.norm_eps!r}')
    allowed = {
      'activation': layers.ACTIVATIONS, 'norms': NORMS, 'qk_norm': QK_NORMS, 'rope': layers.ROPES,
      'dispatch': moe.DISPATCH, 'remat': ('none', 'dots', 'full'),
    }  # fmt: skip
    for name, options in allowed.items():
      if getattr(self, name) not in options:
        raise ValueError(
          f'model.{name}: expected one of {tuple(options)}, found {getattr(self, name)!r}'
        )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'model.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'model.head_dim: RoPE needs an even size, found {self.head_dim}')
    self._check_layers()
    if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
      raise ValueError(
        f'model.experts_per_token={self.experts_per_token}: expected 1 to {self.num_experts}'
      )
    if min(self.num_experts, self.shared_mlp) < 0 or self.shared_mlp and not self.num_experts:
      raise ValueError(
        f'model.num_experts={self.num_experts}, shared_mlp={self.shared_mlp}: expected at least 0, '
        'and a shared MLP only beside experts'
      )
    if self.mlp_bias and self.num_experts:
      raise ValueError('model.mlp_bias: experts have none')

  def _check_layers(self):
    types = self.layer_types
    if types and (len(types) != self.num_layers or set(types) - set(LAYER_TYPES)):
      raise ValueError(
        f'model.layer_types: expected {self.num_layers} of {LAYER_TYPES}, found {types}'
      )
    if ('window' in types) != bool(self.window):
      raise ValueError(
        f'model.window={self.window}: expected a number of tokens if, and only if, some of '
        'layer_types are "window"'
      )
