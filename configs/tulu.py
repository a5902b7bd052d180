"""Post-train a model end to end: `python -m slm.tulu --config=configs/tulu.py`.

slm/posttraining/settings.py documents every key. The sections sft, reward, dpo and rlvr are
training configs, those of configs/sft.py, configs/reward.py, configs/dpo.py and configs/grpo.py.
"""

from ml_collections import ConfigDict

from configs import base, dpo, grpo, reward, sft
from slm.posttraining.settings import TuluConfig


def get_config() -> ConfigDict:
  """Return a recipe without a reward model; set start, and the sources of all rows."""
  stages = {'sft': sft, 'reward': reward, 'dpo': dpo, 'rlvr': grpo}
  c = base.section(TuluConfig, **{name: module.get_config() for name, module in stages.items()})
  c.reward.steps, c.tokenizer.name = 0, 'bytes'
  for name in stages:
    c[name].tensorboard = False
  return c
