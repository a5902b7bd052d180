"""Pretrain a network that makes changes of the MLPs from a cluster's vector (SLM-hn, paper v1)."""

from configs import base, project
from slm.reparam.projection import HyperConfig


def get_config():
  """Return the projected network's run with weights made by a small network."""
  c = project.get_config()
  c.reparam = base.section(HyperConfig)
  return c
