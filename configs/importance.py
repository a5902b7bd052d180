"""Pretrain on the generic set resampled to a domain's cluster histogram (SLM-is, paper §2.2).

Make the index first: `python -m slm.data.importance --data=DATA --on=law/train --out=law-is ...`.
"""

from configs import base


def get_config():
  """Return a pretraining run on an index of the generic set."""
  c = base.get_config()
  c.data.index = 'importance'
  return c
