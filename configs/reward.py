"""Train a reward model from a fine-tuned run (`init`) on preference pairs, as in Tülu 3.

The paper's rate is 3e-6 for 8B parameters, with batches of 256 pairs; smaller models take more. A
row holds one or several pairs.
"""

from configs import base
from slm.runs.config import RewardConfig


def get_config():
  """Return a run on the set `pairs`; set init and data.path."""
  c = base.get_config()
  c.phase = 'finetune'
  c.init = '?'  # must be named
  c.objective = base.section(RewardConfig)
  c.data.set = 'pairs'
  c.epochs = 1.0
  c.schedule.update(name='linear', peak=1e-4, warmup=0, final=0.0)
  c.optim.update(b2=0.999, weight_decay=0.0)
  c.eval.every = 100
  return c
