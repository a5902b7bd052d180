"""Pretrain a network that emits changes of the MLPs from a cluster's vector (SLM-hn, paper v1)."""

from configs import project


def get_config():
  """Return the projected network's run with weights emitted by a small network."""
  c = project.get_config()
  c.reparam = {
    'name': 'hyper',
    'clusters': 16,  # k
    'code': 16,  # m, size of a cluster's vector
    'hidden': 16,  # of the network; each unit has its own matrix (or factors) per weight
    'rank': 8,  # of the change; 0: whole matrices
    'leaves': ('w_gate', 'w_up', 'w_down'),
  }
  return c
