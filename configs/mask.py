"""Fine-tune which frozen weights are used: one bit each (Piggyback, Mallya et al. 2018)."""

from configs import base, finetune
from slm.reparam.dense import MaskConfig


def get_config():
  """Return a fine-tuning run of `init` that trains scores and serves weights x bits."""
  c = finetune.get_config()
  c.reparam = base.section(MaskConfig)
  # Adam moves a score by up to the peak a step, so that the first bit flips after 250 steps
  # (threshold / peak). Ten times faster many flip at once, before gradients tell them apart.
  c.schedule.peak = 2e-5
  c.eval.patience = 20
  c.optim.weight_decay = 0.0  # decay would switch every weight off
  return c
