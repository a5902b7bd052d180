"""Fine-tune a run (`init`) on conversations: supervised fine-tuning as in Tülu 3, table 11.

The paper's rate for 8B parameters is 5e-6, with batches of 128 conversations; smaller models take
more. A row holds several conversations. `objective.reduction=sum` is the paper's loss.
"""

from configs import base


def get_config():
  """Return a fine-tuning run on the set `sft`; set init and data.path."""
  c = base.get_config()
  c.phase = 'finetune'
  c.init = '?'  # must be named
  c.data.set = 'sft'
  c.epochs = 2.0
  c.schedule.update(name='linear', peak=1e-4, warmup_share=0.03, final=0.0)
  c.optim.update(b2=0.999, weight_decay=0.0)
  c.eval.every = 100
  return c
