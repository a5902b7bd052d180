"""Train a run (`init`) by rewards of its own answers, with a value network: PPO, in two variants.

`configs/ppo.py` is the textbook's, `configs/ppo.py:tulu3` the one that Tülu 3 released. Name the
reward model that the value network starts from with objective.value; without one it is a copy of
`init`. The settings are plain: each may be changed by itself. The paper's batches are 224 prompts
at a rate of 3e-7 for 8B parameters; smaller models take more.
"""

from configs import base, grpo
from slm.runs.config import PolicyConfig

BOTH = {
  'advantage': 'gae', 'samples': 1, 'epochs': 4, 'scale': 10.0, 'unended': -10.0, 'kl': 0.05,
  'kl_kind': 'k1',
}  # fmt: skip
PRESETS = {
  # The score is the end token's reward, advantages are whitened over all answers, and losses are
  # divided by the number of the step's tokens.
  'standard': {'score_at': 'end', 'whiten': 0, 'normalise': 'tokens'},
  # It is that of the step after the end token. Each device whitened its own 32 answers, and each
  # microbatch was divided by its own tokens.
  'tulu3': {'score_at': 'after', 'whiten': 32, 'normalise': 'microbatches'},
}


def get_config(preset='standard'):
  """Return a run on the prompts of the set `prompts`; set init and data.path."""
  if preset not in PRESETS:
    raise ValueError(f'configs/ppo.py: expected one of {", ".join(PRESETS)}, found {preset!r}')
  c = grpo.get_config()
  c.objective = base.section(PolicyConfig, **BOTH, **PRESETS[preset])
  c.data.batch_size = 64
  c.schedule.update(name='linear', final=0.0)
  return c
