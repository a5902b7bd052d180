"""Pretrain a projected network over clusters (SLM-pn, paper §2.5)."""

from configs import base


def get_config():
  """Return a run whose batches mix groups of rows of several clusters."""
  c = base.get_config()
  c.reparam = {
    'name': 'project',
    'clusters': 16,  # k
    'capacity': 16,  # h, basis matrices per weight
    'code': 16,  # m, size of a cluster's vector
    'leaves': ('w_gate', 'w_up', 'w_down'),
    'shared_mix': True,  # one M per layer; False: one per layer and leaf
    'last_layers': 0,  # how many layers at the end are projected; 0: all
  }
  c.data.level = 16
  c.data.rows_per_group = 4
  return c
