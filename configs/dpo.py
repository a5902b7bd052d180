"""Train a fine-tuned run (`init`) on preference pairs: length-normalised DPO as in Tülu 3.

The paper's rate (table 18) is 5e-7 for 8B parameters, with batches of 128 pairs; smaller models
take more. A row holds one or several pairs. `init` is also the reference.
"""

from configs import base
from slm.runs.config import DpoConfig


def get_config():
  """Return a run on the set `pairs`; set init and data.path."""
  c = base.get_config()
  c.phase = 'finetune'
  c.init = '?'  # must be named
  c.objective = base.section(DpoConfig)
  c.data.set = 'pairs'
  c.epochs = 1.0
  c.schedule.update(name='linear', peak=1e-5, warmup_share=0.1, final=0.0)
  c.optim.update(b2=0.999, weight_decay=0.0)
  c.eval.every = 100
  return c
