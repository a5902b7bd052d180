r"""Write a corpus of a model's own continuations of rows.

    python -m slm.continuations --run=RUN --on=generic/train --rows=10000 --out=TEXT
    python -m slm.data.prepare --out=DATA --config='configs/data.py:generic=TEXT/*.jsonl' ...

The first tokens of each row are the prompt. Text of the teacher's own is something to distil on
where the text that it was trained on is not available. (With objective.on_policy the student
continues rows while it trains: GKD, arXiv 2306.13649.) The same command continues an interrupted
one.
"""

from absl import flags

from slm.base import console
from slm.inference.continuations import write


def main(_: list[str]) -> None:
  """Write the continuations."""
  f = flags.FLAGS
  console.required('run', 'out')
  texts = write(
    f.run, f.data, f.on, f.out, count=f.rows, prompt=f.prompt, max_tokens=f.max_tokens,
    temperature=f.temperature, seed=f.seed, batch_size=f.batch_size,
  )  # fmt: skip
  print(f'{f.out}: {texts:,} texts')


if __name__ == '__main__':
  flags.DEFINE_string('run', '', 'Run (or RUN@STEP) of a dense model.')
  flags.DEFINE_string('data', '', "Data directory; default: the run's own.")
  flags.DEFINE_string('on', 'generic/train', 'SET/SPLIT[@INDEX] whose rows are continued.')
  flags.DEFINE_integer('rows', 1024, 'Rows, evenly spaced.')
  flags.DEFINE_integer('prompt', 16, 'Tokens of each row used as the prompt.')
  flags.DEFINE_integer('max_tokens', 128, 'Tokens to generate.')
  flags.DEFINE_float('temperature', 1.0, 'Sampling temperature.')
  flags.DEFINE_integer('seed', 0, 'Sampling seed.')
  flags.DEFINE_integer('batch_size', 32, 'Rows per forward pass.')
  flags.DEFINE_string('out', '', 'Directory to write.')
  console.run(main)
