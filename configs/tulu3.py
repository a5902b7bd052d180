"""Tülu 3 as published: `python -m slm.tulu --config=configs/tulu3.py:8b --dry_run`; 8b or 70b.

Tables 11, 15 and 18 to 21 of arXiv 2411.15124, on the shapes of Llama 3.1, and as RLVR the GRPO of
Tülu 3.1. A row holds one conversation, as in the paper; its own data are not here.
"""

import math

from configs import tulu

_LLAMA = {
  'vocab': 128_256, 'num_kv_heads': 8, 'head_dim': 128, 'tied': False, 'rope': 'llama3',
  'rope_theta': 5e5, 'rope_factor': 8.0,
}  # fmt: skip
_CONVERSATIONS = 939_344
# Shape, pairs, and the rates of SFT, DPO and RLVR; prompts of a step of 16 answers.
SIZES = {
  '8b': ({'embed': 4096, 'mlp': 14_336, 'num_layers': 32, 'num_heads': 32}, 271_409,
         (5e-6, 5e-7, 5e-7), 48),
  '70b': ({'embed': 8192, 'mlp': 28_672, 'num_layers': 80, 'num_heads': 64}, 334_302,
          (2e-6, 2e-7, 1e-7), 48),
}  # fmt: skip


def get_config(size: str = '8b'):
  """Return the recipe of a size; set start and the sources."""
  if size not in SIZES:
    raise ValueError(f'configs/tulu3.py: expected one of {", ".join(SIZES)}, found {size!r}')
  shape, pairs, rates, prompts = SIZES[size]
  c = tulu.get_config()
  c.model = _LLAMA | shape
  c.template, c.control = 'tulu', False
  for rows, context in (('conversations', 4096), ('pairs', 2048), ('prompts', 2048)):
    c[rows].context = context
  # A row of pairs holds both answers.
  c.pairs.context *= 2
  for name, rate in zip(('sft', 'dpo', 'rlvr'), rates, strict=True):
    c[name].dtype, c[name].schedule.peak = 'bfloat16', rate
    c[name].mesh.fsdp = 64
    c[name].model.remat = 'full'
  c.reward.update(dtype='bfloat16', steps=math.ceil(pairs / 256), epochs=0.0)
  c.reward.model.remat, c.reward.mesh.fsdp, c.reward.data.batch_size = 'full', 64, 256
  c.reward.schedule.peak = 3e-6
  c.sft.objective.reduction, c.sft.data.batch_size = 'sum', 128
  c.sft.update(epochs=0.0, steps=math.ceil(2 * _CONVERSATIONS / 128))
  c.dpo.update(epochs=0.0, steps=math.ceil(pairs / 128))
  c.dpo.data.batch_size = 128
  c.rlvr.steps = 1950  # three passes over 29,946 prompts
  c.rlvr.data.batch_size = prompts
  c.rlvr.mesh.update(fsdp=16, tensor=4)  # 16 shares of the prompts
  c.rlvr.objective.update(samples=16, max_tokens=2048)
  return c
