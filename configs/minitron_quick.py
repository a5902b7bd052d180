"""Cut the quickstart's model to two thirds and recover it by distillation, in minutes on two cores.

`make quickstart` makes the teacher and the data.
"""

from configs import minitron


def get_config():
  """Return a recipe for `python -m slm.minitron`."""
  c = minitron.get_config()
  c.teacher = 'runs/quick/runs/slm-0'
  c.data = 'runs/quick/data'
  c.calibrate.update(rows=256, batch_size=32)
  c.sizes = 'layers=3,mlp=128'
  r = c.recover
  r.steps, r.tensorboard = 300, False
  r.data.batch_size = 16
  r.schedule.update(peak=2e-3, warmup=20)
  c.correct.schedule.peak = 4e-4
  r.eval.update(every=100, max_rows=256)
  r.checkpoint.every = 100
  return c
