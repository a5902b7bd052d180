"""Pretrain a dense small model on the generic set (the paper's SLM; larger sizes: the LLM)."""

from configs import base


def get_config():
  """Return the SLM's pretraining run."""
  return base.get_config()
