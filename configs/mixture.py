"""Pretrain a hard mixture: one independent SLM per cluster (SLM-mix, paper §2.4)."""

from configs import base
from slm.reparam.dense import MixtureConfig


def get_config():
  """Return a run in which every batch holds one group of rows per expert."""
  c = base.get_config()
  c.reparam = base.section(MixtureConfig)
  c.data.level = 16
  c.data.order = 'every'
  c.data.rows_per_group = 2
  return c
