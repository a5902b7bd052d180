"""Tune a projected network's vector alone (m numbers) on a domain, from its histogram's average."""

from configs import finetune


def get_config():
  """Return a run on a projected network (`init`); fine-tune its result with configs/finetune.py."""
  c = finetune.get_config()
  c.phase = 'select'
  c.reparam = {'name': 'code', 'of': {}, 'histogram': ()}  # both are found out: init and the domain
  c.schedule.peak = 1e-2
  return c
