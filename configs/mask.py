"""Fine-tune a binary mask of frozen weights (Piggyback, Mallya et al. 2018)."""

from configs import base, finetune
from slm.reparam.dense import MaskConfig


def get_config():
  """Return a fine-tuning run of `init` that trains scores and serves weights x bits."""
  c = finetune.get_config()
  c.reparam = base.section(MaskConfig)
  # Adam moves a score by at most the peak per step: the first bit flips after threshold / peak =
  # 250 steps. At ten times the rate many flip at once, before their gradients differ.
  c.schedule.peak = 2e-5
  c.eval.patience = 20
  c.optim.weight_decay = 0.0  # decay would mask every weight
  return c
