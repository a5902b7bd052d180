"""Fine-tune a dense run (`init`) on a domain set under a fine-tuned teacher (SLM-d, paper §2.3)."""

from configs import finetune


def get_config():
  """Return a fine-tuning run with (1-mixing) CE + mixing T^2 KL; set teacher too."""
  c = finetune.get_config()
  c.phase = 'distill'
  c.objective = {
    'name': 'distill',
    'chunk': 256,  # half of next_token's: two models' logits at once
    'temperature': 1.0,
    'mixing': 0.5,
    'kl': 'forward',  # forward | reverse | jsd | cosine | mse | wsl
    'beta': 0.5,  # of jsd: towards 1 it weighs what the teacher, towards 0 the student gives
    'top_k': 0,  # tell only the teacher's k best tokens apart from all others; 0: every token
    # Pull states together too: 'embed', or 'TEACHER:STUDENT' layers, such as '-3:-3' (Minitron)
    'states': (),
    'on_policy': 0.0,  # this share of the steps is on the student's own text (GKD) ...
    'on_policy_from': 0.0,  # ... once this share of all steps is done
    'on_policy_kl': '',  # kl of those steps, if another (GKD: jsd)
    'prompt': 16,  # tokens of a row that it starts from
    # Above 0 the teacher learns the next token meanwhile, at this share of the learning rate
    'correct': 0.0,
    'balance': 0.01,  # of a student that routes tokens: its load-balance loss ...
    'z': 1e-3,  # ... and its router's z-loss
  }
  return c
