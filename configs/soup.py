"""Pretrain weights as a function of a cluster histogram (Soup-of-Experts, Ablin et al. 2025)."""

from configs import base
from slm.reparam.projection import SoupConfig


def get_config():
  """Return a run on random histograms; slm.specialise --rule=histogram serves one."""
  c = base.get_config()
  c.reparam = base.section(SoupConfig)
  c.data.level = 16
  c.data.order = 'histogram'
  c.data.rows_per_group = 4
  return c
