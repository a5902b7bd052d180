"""Tülu 3's recipe on SmolLM2-135M-Instruct: `--config.start=MODEL --config.corpus=DIR`.

DIR/posttrain has instructions, GSM8K, MAWPS, preference pairs and IFEval as JSON lines, DIR/eval
PIQA, and DIR/general text. Sizes are for about five core-hours on two cores: short answers, few
steps, evaluations on samples. RLVR trains on constraints that a short answer can satisfy, and on
MAWPS; the prompts of IFEval and of GSM8K's test are dropped from what is trained on.
"""

from configs import grpo, tulu

# Constraints that an answer of 48 tokens can satisfy.
SHORT = (
  'keywords:existence', 'length_constraints:number_sentences',
  'detectable_content:number_placeholders', 'detectable_content:postscript',
  'detectable_format:number_bullet_lists', 'detectable_format:number_highlighted_sections',
  'detectable_format:title', 'startend:end_checker', 'startend:quotation',
  'change_case:english_capital', 'change_case:english_lowercase', 'punctuation:no_comma',
)  # fmt: skip
_POSTTRAIN = '{corpus}/posttrain'
_NUMBER = 'prompt=question&label=final&verifier_id=gsm8k.numeric'


def get_config():
  """Return the recipe; set start and corpus."""
  c = tulu.get_config()
  c.start = 'models/smollm2-135m-instruct'
  talks = f'{_POSTTRAIN}/sft_train.jsonl.gz'
  short = {'longest': 120, 'tasks': SHORT, 'labels': 'official_loose', 'least': 1, 'most': 1}
  lines = lambda source, rows, held_out, **more: {
    'kind': 'lines', 'source': source, 'rows': rows, 'heldout': held_out, **more
  }  # fmt: skip
  c.made = {
    'asked': {'kind': 'constraints', 'source': talks, 'rows': 1200, 'heldout': 250, **short},
    'answered': lines('{made}/asked.jsonl', 150, 0),
    'sums': lines(f'{_POSTTRAIN}/mawps_train.jsonl.gz', 400, 100),
    'pairs': lines(f'{_POSTTRAIN}/pref_train.jsonl.gz', 700, 100, dialogues=True),
  }
  c.clean.eval = (
    f'ifeval={_POSTTRAIN}/ifeval.jsonl.gz:prompt',
    f'gsm8k={_POSTTRAIN}/gsm8k_test.jsonl.gz:question',
  )
  solved = f'{_POSTTRAIN}/gsm8k_train.jsonl.gz?rows=400&prompt=question&response=answer'
  c.conversations.update(
    train=f'{talks}?rows=2400;{solved}', validation=f'{_POSTTRAIN}/sft_validation.jsonl.gz',
    context=192, too_long='drop',
  )  # fmt: skip
  c.pairs.update(
    train='{made}/pairs.jsonl?fraction=1;{answers}/pairs.jsonl?fraction=1',
    validation='{made}/pairs_heldout.jsonl', context=256, too_long='drop',
  )  # fmt: skip
  c.prompts.update(
    train=f'{{made}}/asked.jsonl?fraction=1;{{made}}/sums.jsonl?fraction=1&{_NUMBER}',
    validation='{made}/asked_heldout.jsonl?fraction=1;'
    f'{{made}}/sums_heldout.jsonl?fraction=0.5&{_NUMBER}',
    context=96,
  )  # fmt: skip
  c.sft.update(epochs=0.0, steps=80)
  c.sft.schedule.peak = 1e-4
  c.sft.data.batch_size = c.dpo.data.batch_size = 8
  c.answers.update(prompts='{made}/answered.jsonl', count=4, max_tokens=64, batch_size=64)
  c.dpo.update(epochs=0.0, steps=40)
  c.dpo.schedule.peak = 1e-5
  # At first the rewards of six prompts in ten are all equal, so half of the prompts are trained on.
  # Without a divergence from the start a step costs a quarter less.
  c.rlvr = grpo.get_config('dapo')
  c.rlvr.update(steps=40, tensorboard=False)
  c.rlvr.data.batch_size = 12
  c.rlvr.objective.update(samples=8, keep=6, max_tokens=48)
  c.rlvr.schedule.update(peak=5e-5, warmup=4)
  for name in ('sft', 'dpo', 'rlvr'):
    c[name].eval.update(every=0, batch_size=8, max_rows=64)
    c[name].checkpoint.every = 5
    c[name].log_every = 1
  c.evaluate.update(prompts=250, samples=2, max_tokens=48, context=640, batch_size=64)
  c.evaluate.tasks = {
    'ifeval': {'file': f'{_POSTTRAIN}/ifeval.jsonl.gz', 'chat': True, 'max_tokens': 256,
               'limit': 150},
    'gsm8k': {'file': f'{_POSTTRAIN}/gsm8k_test.jsonl.gz', 'kind': 'solution', 'chat': True,
              'max_tokens': 128, 'limit': 150},
    'preference': {'file': f'{_POSTTRAIN}/pref_test.jsonl.gz', 'chat': True, 'limit': 200},
    'piqa': {'file': '{corpus}/eval/piqa.jsonl.gz', 'split': 'test', 'metric': 'acc_norm',
             'limit': 250},
  }  # fmt: skip
  c.evaluate.text, c.evaluate.text_rows = '{corpus}/general/validation.jsonl.gz', 60
  return c
