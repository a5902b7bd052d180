"""Fine-tune a dense run (`init`) on a domain set under a fine-tuned teacher (SLM-d, paper §2.3)."""

from configs import base, finetune
from slm.runs.config import DistillConfig


def get_config():
  """Return a fine-tuning run with the loss (1-mixing) CE + mixing T^2 KL; set teacher too."""
  c = finetune.get_config()
  c.phase = 'distill'
  c.objective = base.section(DistillConfig)
  return c
