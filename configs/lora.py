"""Fine-tune low-rank changes of frozen weights (LoRA, Hu et al. 2021; paper, appendix F)."""

from configs import base, finetune
from slm.reparam.dense import LoraConfig


def get_config():
  """Return a fine-tuning run of `init` that trains rank x (in + out) numbers per matrix."""
  c = finetune.get_config()
  c.reparam = base.section(LoraConfig)
  return c
