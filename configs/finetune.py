"""Fine-tune a dense run (`init`) on a domain set with early stopping (paper §3.3).

The paper's peak rates: a third of pretraining's for the smallest set, the same for larger ones.
"""

from configs import base


def get_config():
  """Return a fine-tuning run; set init, data.set and data.index."""
  c = base.get_config()
  c.phase = 'finetune'
  c.init = '?'  # must be named
  c.steps = 1000
  c.schedule.update(name='constant', peak=5e-4, warmup=10)
  c.eval.every = 20
  c.eval.patience = 4
  return c
