"""All of Tülu 3 on a toy of 0.1M parameters and made data, in minutes on two cores.

Prompts ask for a short string of letters with one to three marks, such as `4 letters, last c`, and
half of the demonstrations lack a mark. SFT learns the form and satisfies few; what DPO and RLVR add
is visible, and that random rewards add nothing. No prompt that is evaluated is trained on.
"""

from configs import tulu


def get_config():
  """Return the recipe; it needs no file."""
  c = tulu.get_config()
  c.template = 'tulu'
  c.made = {'marks': {'kind': 'formats', 'rows': 4000, 'heldout': 400, 'wrong': 0.5}}
  train, held_out = '{made}/marks.jsonl', '{made}/marks_heldout.jsonl'
  c.conversations.update(train=train, validation=held_out, context=128)
  c.prompts.update(train=train, validation=held_out, context=64)
  c.pairs.update(train='{answers}/pairs.jsonl', validation=held_out, context=128)
  shape = {'embed': 64, 'num_layers': 2, 'num_heads': 4, 'num_kv_heads': 4, 'head_dim': 16}
  c.model = {'vocab': 259, 'mlp': 192, **shape}
  c.sft.model.update(mlp=192, **shape)
  c.sft.update(init='', epochs=0.0, steps=300)
  c.sft.schedule.update(peak=3e-3, warmup_share=0.05)
  c.answers.update(count=4, max_tokens=10, batch_size=256)
  c.dpo.update(epochs=1.0)
  c.dpo.data.batch_size = 16
  c.dpo.schedule.update(peak=1e-4)
  c.rlvr.update(steps=40)
  c.rlvr.data.batch_size = 16
  c.rlvr.objective.update(samples=16, max_tokens=10)
  c.rlvr.schedule.update(peak=3e-4, warmup=10)
  c.rlvr.eval.every = 10
  c.evaluate.update(prompts=400, samples=8, max_tokens=10, batch_size=256)
  c.evaluate.tasks = {'preference': {'file': held_out, 'kind': 'preference', 'chat': True}}
  return c
