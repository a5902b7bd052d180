"""Train a run (`init`) by rewards of its own answers to prompts; `:PRESET` picks a published loss.

`configs/grpo.py` is Tülu 3.1's GRPO, `configs/grpo.py:dr_grpo` Dr. GRPO, and so on. The settings
are plain: each may be changed by itself. Published batches are 48 to 512 prompts with 16 answers
each, at rates of 5e-7 to 1e-6; smaller models take more.
"""

from configs import base
from slm.runs.config import PolicyConfig

PRESETS = {
  # Tülu 3.1 8B: the loss averaged over tokens, a KL of 0.01, two updates a step.
  'tulu': {'advantage': 'std', 'normalise': 'tokens', 'kl': 0.01, 'minibatches': 2},
  # DeepSeekMath (arXiv 2402.03300): averaged over each answer, then over answers.
  'grpo': {'advantage': 'std', 'normalise': 'sequences', 'kl': 0.04},
  # Liu et al. 2025 (arXiv 2503.20783): no division by a deviation or a length.
  'dr_grpo': {'advantage': 'center', 'normalise': 'constant', 'kl': 0.0},
  # Yu et al. 2025 (arXiv 2503.14476): a higher upper clip, groups with variance alone.
  'dapo': {'advantage': 'std', 'normalise': 'tokens', 'kl': 0.0, 'clip_high': 0.28, 'keep': 16},
}


def get_config(preset='tulu'):
  """Return a run on the prompts of the set `prompts`; set init and data.path."""
  if preset not in PRESETS:
    raise ValueError(f'configs/grpo.py: expected one of {", ".join(PRESETS)}, found {preset!r}')
  c = base.get_config()
  c.phase = 'finetune'
  c.init = '?'  # must be named
  c.steps = 200
  c.objective = base.section(PolicyConfig, **PRESETS[preset])
  c.data.update(set='prompts', batch_size=32)  # prompts, each answered objective.samples times
  c.schedule.update(name='constant', peak=1e-5, warmup=10)
  c.optim.update(weight_decay=0.0)
  c.eval.update(every=50, max_rows=256)
  c.checkpoint.every = 50
  c.log_every = 1
  return c
