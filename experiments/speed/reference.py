"""The other contestants: the same shapes in torch with `transformers` (extra `reference`)."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers


def _model(cfg: Mapping[str, Any], dtype: str) -> Any:
  """Return a LlamaForCausalLM of slm's shape, tied embeddings, sdpa attention."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=cfg['vocab'],
    hidden_size=cfg['embed'],
    intermediate_size=cfg['mlp'],
    num_hidden_layers=cfg['num_layers'],
    num_attention_heads=cfg['num_heads'],
    num_key_value_heads=cfg['num_kv_heads'],
    head_dim=cfg['head_dim'],
    tie_word_embeddings=True,
    attn_implementation='sdpa',
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=0,
  )
  return transformers.LlamaForCausalLM(config).to(_device(), getattr(torch, dtype))


def _device() -> str:
  """Return the device of both libraries: JAX's."""
  if jax.default_backend() != 'gpu':
    return 'cpu'
  if not torch.cuda.is_available():
    raise RuntimeError(f'expected torch with CUDA, as jax has it, found torch {torch.__version__}')
  return 'cuda'


def _wait() -> None:
  if _device() == 'cuda':
    torch.cuda.synchronize()


def train_step(
  cfg: Mapping[str, Any], batch: Mapping[str, np.ndarray], dtype: str, compiled: bool = False
) -> Callable[[], None]:
  """Return one step: loss, backward, clipping, AdamW; float32 weights, autocast if bf16.

  With `compiled`, torch.compile takes the loss, and with it the backward pass.

  Raises:
    RuntimeError: if torch.compile has no C++ compiler.
  """
  # Inductor's own choice on CPU is a CXX that is set, or else g++.
  compiler = os.environ.get('CXX', 'g++')
  if compiled and _device() == 'cpu' and shutil.which(compiler) is None:
    raise RuntimeError(f'expected a C++ compiler, found no {compiler}; install it or set CXX')
  device = _device()  # here, as torch.compile would trace into jax
  model = _model(cfg, 'float32').train()
  tx = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
  context = batch['inputs'].shape[-1]
  inputs, targets = (
    torch.tensor(batch[name].reshape(-1, context)).long().to(device)
    for name in ('inputs', 'targets')
  )

  def loss(inputs, targets):
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32'):
      logits = model(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

  forward = torch.compile(loss, dynamic=False, fullgraph=True) if compiled else loss

  def run() -> None:
    tx.zero_grad(set_to_none=True)
    forward(inputs, targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    tx.step()
    _wait()

  return run


def decode(
  cfg: Mapping[str, Any], rows: int, prompt: int, new_tokens: int, dtype: str, compiled: bool
) -> Callable[[], None]:
  """Return greedy `generate` with a cache; `compiled`, a static one, whose steps are compiled.

  Raises:
    RuntimeError: if they would not be compiled: transformers does so on accelerators alone.
  """
  if compiled and _device() == 'cpu':
    raise RuntimeError('generate compiles its steps on accelerators, found cpu')
  model = _model(cfg, dtype).eval()
  inputs = torch.randint(0, cfg['vocab'], (rows, prompt), device=_device())
  mask = torch.ones_like(inputs)

  def run() -> None:
    with torch.inference_mode():
      out = model.generate(
        inputs,
        attention_mask=mask,
        do_sample=False,
        use_cache=True,
        cache_implementation='static' if compiled else None,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
      )
    _wait()
    if out.shape[1] != prompt + new_tokens:
      raise ValueError(f'transformers generated {out.shape[1] - prompt} of {new_tokens} tokens')

  return run


def draw(
  folder: Path, prompts: Sequence[Sequence[int]], lengths: Sequence[int], rows: int
) -> Callable[[], None]:
  """Return `generate` of sampled answers in batches of `rows`, each batch until its longest ends.

  An answer ends after as many tokens as `lengths` says, in place of an end token, so that the work
  is known; the model is that of a directory of transformers.
  """
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='sdpa'
  ).eval()
  model.generation_config.eos_token_id = None
  parts = []
  for i in range(0, len(prompts), rows):
    part, room = prompts[i : i + rows], max(map(len, prompts[i : i + rows]))
    padding = torch.tensor([[0] * (room - len(x)) + [1] * len(x) for x in part])
    ids = torch.tensor([[0] * (room - len(x)) + list(x) for x in part])
    parts.append((ids, padding, torch.tensor(lengths[i : i + rows])))

  def run() -> None:
    for ids, mask, asked in parts:
      ended = lambda made, _, start=ids.shape[1], asked=asked: made.shape[1] - start >= asked
      with torch.inference_mode():
        out = model.generate(
          ids,
          attention_mask=mask,
          do_sample=True,
          temperature=1.0,
          top_k=0,
          top_p=1.0,
          max_new_tokens=int(asked.max()),
          stopping_criteria=[ended],
          pad_token_id=0,
        )
      if out.shape[1] != ids.shape[1] + int(asked.max()):
        made = out.shape[1] - ids.shape[1]
        raise ValueError(f'transformers drew {made} of {int(asked.max())} tokens')

  return run
