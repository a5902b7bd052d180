"""Tune a projected network's vector alone (m numbers) on a domain, from its histogram's average."""

from configs import base, finetune
from slm.reparam.projection import CodeConfig


def get_config():
  """Return a run on a projected network (`init`); fine-tune its result with configs/finetune.py."""
  c = finetune.get_config()
  c.phase = 'select'
  c.reparam = base.section(CodeConfig)  # its keys are found out: from init and from the domain
  c.schedule.peak = 1e-2
  return c
