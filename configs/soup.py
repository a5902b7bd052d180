"""Pretrain weights that follow a cluster histogram (Soup-of-Experts, Ablin et al. 2025)."""

from configs import base


def get_config():
  """Return a run on random histograms; specialise it with --rule=histogram."""
  c = base.get_config()
  c.reparam = {
    'name': 'soup',
    'clusters': 16,  # k, the length of a histogram
    'experts': 16,  # n, matrices added to the shared one
    'leaves': ('w_gate', 'w_up', 'w_down'),
    'router': 'linear',  # linear | mlp: from the histogram to n coefficients
    'hidden': 64,  # of the MLP
  }
  c.data.level = 16
  c.data.order = 'histogram'
  c.data.rows_per_group = 4
  return c
