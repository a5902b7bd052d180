"""Cut a model and distil it back: `python -m slm.minitron --config=configs/minitron.py`.

slm/pruning/recipe.py documents every key.
"""

from ml_collections import ConfigDict

from configs import base, pretrain, recover
from slm.pruning.recipe import RecipeConfig


def get_config() -> ConfigDict:
  """Return a recipe; set teacher, data and sizes."""
  c = base.section(RecipeConfig, model={}, recover=recover.get_config())
  c.correct = pretrain.get_config()
  c.correct.steps = 0
  c.correct.schedule.update(peak=8e-5)  # a fifth of the recovery's peak
  return c
