r"""Text that a model goes on with itself: as a corpus, or in place of the rows of a batch.

    python -m slm.continuations --run=RUN --on=generic/train --rows=10000 --out=TEXT
    python -m slm.data.prepare --out=DATA --config='configs/data.py:generic=TEXT/*.jsonl' ...

Rows begin, the model continues: a corpus in the teacher's own words, to distil on where the text it
was trained on is not at hand. With objective.on_policy it is the student that continues, while it
trains, and the teacher that judges (GKD, Agarwal et al. 2023, arXiv 2306.13649). Killed at any
moment, the same command continues.
"""

from absl import flags

from slm.base import console
from slm.inference.continuations import write


def main(_: list[str]) -> None:
  """Write the continuations that the flags ask for."""
  f = flags.FLAGS
  console.required('run', 'out')
  found = write(
    f.run, f.data, f.on, f.out, count=f.rows, prompt=f.prompt, max_tokens=f.max_tokens,
    temperature=f.temperature, seed=f.seed, batch_size=f.batch_size,
  )  # fmt: skip
  print(f'{f.out}: {found:,} texts')


if __name__ == '__main__':
  flags.DEFINE_string('run', '', 'Run (or RUN@STEP) of a dense model.')
  flags.DEFINE_string('data', '', "Data directory; default: the run's own.")
  flags.DEFINE_string('on', 'generic/train', 'SET/SPLIT[@INDEX] whose rows are continued.')
  flags.DEFINE_integer('rows', 1024, 'Rows, evenly spaced.')
  flags.DEFINE_integer('prompt', 16, 'Tokens at the start of a row that are kept.')
  flags.DEFINE_integer('max_tokens', 128, 'Tokens to generate.')
  flags.DEFINE_float('temperature', 1.0, 'Of sampling.')
  flags.DEFINE_integer('seed', 0, 'Of sampling.')
  flags.DEFINE_integer('batch_size', 32, 'Rows at a time.')
  flags.DEFINE_string('out', '', 'Directory to write.')
  console.run(main)
