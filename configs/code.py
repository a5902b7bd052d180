"""Tune only the code of a projected network (m numbers) on a domain, from its histogram's mean."""

from configs import base, finetune
from slm.reparam.projection import CodeConfig


def get_config():
  """Return a run that starts from a projected network; configs/finetune.py continues it."""
  c = finetune.get_config()
  c.phase = 'select'
  c.reparam = base.section(CodeConfig)  # its keys are derived from init and the domain
  c.schedule.peak = 1e-2
  return c
