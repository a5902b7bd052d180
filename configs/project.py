"""Pretrain a projected network over clusters (SLM-pn, paper §2.5)."""

from configs import base
from slm.reparam.projection import ProjectConfig


def get_config():
  """Return a run whose batches mix groups of rows of several clusters."""
  c = base.get_config()
  c.reparam = base.section(ProjectConfig)
  c.data.level = 16
  c.data.rows_per_group = 4
  return c
