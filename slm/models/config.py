"""The shape of a decoder: covers Llama, Qwen, Mistral, Gemma, OLMo and SmolLM."""

import dataclasses
import functools
from typing import Literal

from slm.models import layers
from slm.weights.count import Leaf

# Attention to all of the past, to a window of it, or to all of it without positions (NoPE).
LAYER_TYPES = ('full', 'window', 'nope')


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The shape of a decoder, and how it is computed; head_dim need not be embed / num_heads."""

  vocab: int = 0  # 0: the tokenizer's
  embed: int = 128
  num_layers: int = 4
  num_heads: int = 4
  num_kv_heads: int = 4
  head_dim: int = 32
  mlp: int = 384
  activation: Literal['silu', 'gelu'] = 'silu'  # of the MLP: silu | gelu (tanh)
  # pre: before attention and MLP | post: after them (OLMo 2) | sandwich: both (Gemma 2)
  norms: Literal['pre', 'post', 'sandwich'] = 'pre'
  norm_eps: float = 1e-5
  norm_offset: bool = False  # norms multiply by 1 + scale (Gemma)
  # norm of queries and keys: '' | head: of each head (Qwen3) | all: of all heads together (OLMo 2)
  qk_norm: Literal['', 'head', 'all'] = ''
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  tied: bool = True
  embed_scale: bool = False  # multiply embeddings by sqrt(embed) (Gemma)
  query_scale: float = 0.0  # divide scores by its square root; 0: head_dim
  attention_cap: float = 0.0  # scores become cap * tanh(scores / cap) (Gemma 2); 0: unchanged
  logit_cap: float = 0.0  # logits become cap * tanh(logits / cap) (Gemma 2); 0: unchanged
  rope: Literal['default', 'linear', 'llama3'] = 'default'  # default | linear | llama3
  rope_theta: float = 10_000.0
  rope_factor: float = 1.0  # linear, llama3: the extension of the context
  rope_low: float = 1.0  # llama3: divide frequencies with fewer turns in rope_context
  rope_high: float = 4.0  # llama3: keep frequencies with more turns in rope_context
  rope_context: int = 8192
  rope_theta_window: float = 0.0  # for layers with a window (Gemma 3); 0: rope_theta
  window: int = 0  # tokens that layers of type "window" attend to
  # full | window | nope (no positions), one per layer; (): all full
  layer_types: tuple[str, ...] = ()
  num_experts: int = 0  # token-routed experts, each `mlp` wide; 0: one MLP for all tokens
  experts_per_token: int = 2
  renormalise: bool = True  # make the chosen experts' probabilities sum to one
  shared_mlp: int = 0  # width of an expert that processes every token
  # einsum: compute all experts | ragged: the chosen ones, for TPUs
  dispatch: Literal['einsum', 'ragged'] = 'einsum'
  # recompute in the backward pass: none | dots: all but products with weights | full
  remat: Literal['none', 'dots', 'full'] = 'none'
  # kernels that hold no scores, splash on TPUs and triton on GPUs | auto: there, where they can be
  # had, else reference: layers.py
  attention: Literal['auto', 'splash', 'triton', 'reference'] = 'auto'
  unroll: int = 1  # layers per iteration of the scan
  name: Literal['decoder'] = 'decoder'

  def __post_init__(self):
    object.__setattr__(self, 'layer_types', tuple(self.layer_types))
    for name in ('vocab', 'embed', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp'):
      if not isinstance(value := getattr(self, name), int) or value < 1:
        raise ValueError(f'model.{name}: expected a whole number, at least 1, found {value!r}')
    if not isinstance(self.norm_eps, int | float) or not self.norm_eps > 0:
      raise ValueError(f'model.norm_eps: expected a number above 0, found {self.norm_eps!r}')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'model.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'model.head_dim: RoPE needs an even size, found {self.head_dim}')
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
      raise ValueError('model.mlp_bias: experts have no biases')

  @functools.cached_property
  def sizes(self) -> dict[str, int]:
    """The size of every axis of the weights."""
    sizes = {axis: getattr(self, axis) for axis in ('vocab', 'embed', 'head_dim', 'mlp')}
    sizes |= {'layers': self.num_layers, 'heads': self.num_heads, 'kv_heads': self.num_kv_heads}
    if self.num_experts:
      sizes |= {'experts': self.num_experts, 'experts_per_token': self.experts_per_token}
    return sizes

  @functools.cached_property
  def leaves(self) -> tuple[Leaf, ...]:
    """The weights."""
    matrices = ('w_gate', 'w_up', 'w_down')
    block = [Leaf(name, 'attention') for name in ('wq', 'wk', 'wv', 'wo')]
    block += [Leaf(name, 'attention') for name in ('bq', 'bk', 'bv') if self.qkv_bias]
    block += [Leaf('bo', 'attention')] * self.out_bias
    if self.qk_norm:
      suffix = {'head': '_scale', 'all': '_scale_all'}[self.qk_norm]
      block += [Leaf(name + suffix, 'attention') for name in 'qk']
    block += [Leaf(name, 'mlp') for name in ('b_gate', 'b_up', 'b_down') if self.mlp_bias]
    stacks = ('experts',) if self.num_experts else ()
    block += [Leaf(name, 'mlp', stacks) for name in matrices]
    block += [Leaf('w_router', 'mlp')] * bool(self.num_experts)
    if self.shared_mlp:
      block += [Leaf(name, 'mlp', (), {'mlp': self.shared_mlp}) for name in matrices]
    block += [Leaf('scale', 'norm')] * (4 if self.norms == 'sandwich' else 2)
    whole = [Leaf('embedding', 'embedding'), *[Leaf('lm_head', 'embedding')] * (not self.tied)]
    stacked = [leaf._replace(stacks=('blocks', *leaf.stacks)) for leaf in block]
    return (*whole, *stacked, Leaf('scale', 'norm'))

  def score_flops(self, context: int) -> float:
    """Count the FLOPs of scores and their products with values, per token of a context."""
    return 4 * layers.mean_keys(context) * self.num_heads * self.head_dim * self.num_layers
