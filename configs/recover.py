"""Recover a cut run (`init`) by distilling the whole one (`teacher`): Minitron, arXiv 2407.14679.

The loss is the forward KL to the teacher's logits, over every token at T = 1, on generic text. A
teacher that was trained on other text should be corrected (arXiv 2408.11796): first, by fine-tuning
it with configs/pretrain.py, --config.init=WHOLE and a fifth of its peak; or meanwhile, with
--config.objective.correct=0.1. A short run of `slm.minitron` measures whether that pays
(--config.probe.steps). --config.objective.states="('-3:-3', 'embed')" helps where many layers were
removed.
"""

from configs import base
from slm.runs.config import DistillConfig


def get_config():
  """Return a recovery run as long as pretraining; set init and teacher."""
  c = base.get_config()
  c.phase = 'distill'
  c.objective = base.section(DistillConfig, mixing=1.0)
  c.schedule.update(peak=4e-4)  # a fifth of the pretraining peak
  return c
