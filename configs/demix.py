"""Pretrain one MLP per cluster inside shared attention (DEMix by cluster): ablates `project`."""

from configs import base, project
from slm.reparam.dense import DemixConfig


def get_config():
  """Return the projected network's run with independent instead of combined leaves."""
  c = project.get_config()
  c.reparam = base.section(DemixConfig)
  return c
