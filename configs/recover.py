"""Recover a cut run (`init`) under the whole one (`teacher`): Minitron, arXiv 2407.14679.

Forward KL to the teacher's logits alone, over every token at T = 1, on generic text. A teacher that
was trained on other text can first be corrected (arXiv 2408.11796): fine-tune it here by
configs/pretrain.py with --config.init=WHOLE and a fifth of its peak, and name that run as teacher.
Or it is corrected meanwhile: --config.objective.correct=0.1. `slm.minitron` finds out by a short
run whether that pays (--config.probe.steps). Where many layers were removed,
--config.objective.states="('-3:-3', 'embed')" helps.
"""

from configs import base
from slm.runs.config import DistillConfig


def get_config():
  """Return a recovery run over pretraining's steps; set init and teacher."""
  c = base.get_config()
  c.phase = 'distill'
  c.objective = base.section(DistillConfig, mixing=1.0)
  c.schedule.update(peak=4e-4)  # a fifth of the pretraining peak
  return c
