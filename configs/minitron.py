"""Cut a big model and distil it back: `python -m slm.minitron --config=configs/minitron.py`."""

from ml_collections import ConfigDict

from configs import pretrain, recover


def get_config() -> ConfigDict:
  """Return a recipe; set teacher, data and sizes."""
  c = ConfigDict()
  c.teacher = ''  # run directory, or a directory of transformers
  c.data = ''  # made by slm.data.prepare with the teacher's tokenizer
  c.model = ConfigDict()  # the teacher's shape, for --dry_run where there is no teacher yet
  c.context = 0  # tokens in a row, for --dry_run
  c.calibrate = {'set': 'generic', 'split': 'train', 'index': '', 'rows': 1024, 'batch_size': 16}
  c.sizes = ''  # what to keep: axis=size,... of embed, mlp, heads, layers
  # See slm.prune cut; with a task file the window of layers is chosen by its items.
  c.cut = {'norm_gain': 'none', 'depth': 'influence', 'task': '', 'limit': 0, 'align': 0}
  c.recover = recover.get_config()
  # If so many steps on the recovery's text lower the teacher's held-out loss by more than `worth`
  # nats, it is corrected: by `correct` before it is cut, or at steps=0 while it teaches.
  c.probe = {'steps': 0, 'worth': 0.01}
  c.correct = pretrain.get_config()
  c.correct.steps = 0
  c.correct.schedule.update(peak=8e-5)  # a fifth of the recovery's peak
  c.export = {'dtype': '', 'licence': '', 'tolerance': 1e-4}
  return c
