"""Pretrain a token-routed mixture of experts: the baseline that routes tokens, not clusters."""

from configs import base
from slm.runs.config import NextTokenConfig


def get_config():
  """Return a run whose active parameters are those of the dense model of configs/pretrain.py."""
  c = base.get_config()
  c.model.num_experts = 8
  c.model.experts_per_token = 2
  c.model.mlp //= 2
  c.objective = base.section(NextTokenConfig, balance=0.01, z=1e-3)
  return c
