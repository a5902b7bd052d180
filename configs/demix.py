"""Pretrain one MLP per cluster with shared attention (DEMix by cluster): an ablation of project."""

from configs import base, project
from slm.reparam.dense import DemixConfig


def get_config():
  """Return the projected network's run with independent MLPs in place of combined ones."""
  c = project.get_config()
  c.reparam = base.section(DemixConfig)
  return c
