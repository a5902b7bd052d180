r"""Make data for post-training without a judge: prompts with labels, and answers that are checked.

    python -m slm.synthesise constraints --prompts='FILE.jsonl?prompt=question' --out=ASKED.jsonl
    python -m slm.synthesise arithmetic --rows=1000 --out=SUMS.jsonl
    python -m slm.synthesise formats --rows=1000 --wrong=0.5 --out=MARKS.jsonl
    python -m slm.synthesise gym --task=gcd --task=syllogism --rows=1000 --out=GYM.jsonl
    python -m slm.synthesise answers --run=RUN --prompts=ASKED.jsonl --answers=4 --out=ANSWERS

The first four write prompts whose labels are checks of slm.inference.verifiers; rows follow from
--seed alone. `answers` samples answers of a model to such prompts, checks them, and writes into a
directory what is kept: best.jsonl and passing.jsonl are conversations, pairs.jsonl and
relaxed.jsonl preference pairs. The same command continues an interrupted one.
"""

from absl import flags

from slm.base import console
from slm.data import constraints, synthesis

USAGES = {'constraints': '', 'arithmetic': '', 'formats': '', 'gym': '', 'answers': ''}


def main(argv: list[str]) -> None:
  """Run the command."""
  kind, _ = console.subcommand(argv, USAGES)
  f = flags.FLAGS
  if kind == 'answers':
    console.required('run', 'prompts', 'out')
    _answers()
    return
  console.required('out', *(['prompts'] if kind == 'constraints' else []))
  if f.rows < (kind != 'constraints'):
    raise ValueError(f'--rows={f.rows}: expected at least {int(kind != "constraints")}')
  if kind == 'constraints':
    options = {'labels': f.labels, 'least': f.least, 'most': f.most, 'kinds': f.task}
    rows = synthesis.constrained(f.prompts, rows=f.rows, seed=f.seed, **options)
  else:
    rows = getattr(synthesis, kind)(f.rows, f.seed, f.task)
    if f.wrong is not None and kind != 'gym':
      rows = synthesis.demonstrated(rows, f.seed, f.wrong)
  print(f'{f.out}: {synthesis.write(rows, f.out):,} prompts')


def _answers() -> None:
  from slm.inference import answering  # imported here: the other kinds need no model

  f = flags.FLAGS
  counts = answering.write(
    f.run, f.prompts, f.out, count=f.answers, max_tokens=f.max_tokens, temperature=f.temperature,
    top_p=f.top_p, seed=f.seed, batch_size=f.batch_size, relax=f.relax,
  )  # fmt: skip
  n = counts.__getitem__
  print(
    f'{n("prompts"):,} prompts: {n("mixed"):,} with passing and failing answers, '
    f'{n("none_pass"):,} without a passing one, {n("all_pass"):,} without a failing one, '
    f'{n("unusable"):,} without one that is kept, {n("too_long"):,} too long\n'
    f'{n("answers"):,} answers: {n("passing"):,} pass, {n("failing"):,} fail, {n("cut"):,} cut at '
    f'--max_tokens, {n("blank"):,} blank; {n("undecided"):,} checks undecided'
  )
  if f.relax:
    print(
      f'{n("relaxable"):,} prompts answered without a constraint: {n("kept_relaxed"):,} pairs, '
      f'{n("relaxed_none_pass"):,} without a passing answer, {n("relaxed_none_violates"):,} '
      'without a violating one'
    )
  for name in answering.KEPT:
    if rows := n(f'kept_{name}'):
      print(f'{f.out}/{name}.jsonl: {rows:,}')


if __name__ == '__main__':
  flags.DEFINE_string('out', '', 'File of JSON lines to write; answers: directory.')
  flags.DEFINE_integer('seed', 0, 'Seed of all that is drawn.')
  flags.DEFINE_string('prompts', '', 'constraints, answers: FILE[?prompt=FIELD&...] of prompts.')
  flags.DEFINE_integer('rows', 0, 'Prompts to make; constraints: of the file, 0 is all.')
  flags.DEFINE_multi_string('task', [], 'Kind of problem or constraint; repeat for several.')
  told = 'arithmetic, formats: add a `response`, of which this share is wrong, and a pair.'
  flags.DEFINE_float('wrong', None, told, 0.0, 1.0)
  flags.DEFINE_string('labels', 'official', f'constraints: {" | ".join(constraints.LABELS)}.')
  flags.DEFINE_integer('least', 1, 'constraints: fewest for a prompt.')
  flags.DEFINE_integer('most', 3, 'constraints: most for a prompt.')
  flags.DEFINE_string('run', '', 'answers: run (or RUN@STEP) with a chat template.')
  flags.DEFINE_integer('answers', 4, 'answers: for each prompt.')
  flags.DEFINE_bool('relax', False, 'answers: also to the prompt without one of its constraints.')
  flags.DEFINE_integer('max_tokens', 256, 'answers: most tokens of one.')
  flags.DEFINE_float('temperature', 1.0, 'answers: sampling temperature.')
  flags.DEFINE_float('top_p', 1.0, 'answers: sample within this probability mass.')
  flags.DEFINE_integer('batch_size', 32, 'answers: sampled at a time.')
  console.run(main, positional=True)
