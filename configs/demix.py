"""Pretrain one MLP per cluster inside shared attention (DEMix by cluster): ablates `project`."""

from configs import project


def get_config():
  """Return the projected network's run with independent instead of combined leaves."""
  c = project.get_config()
  c.reparam = {'name': 'demix', 'clusters': 16, 'leaves': ('w_gate', 'w_up', 'w_down')}
  return c
