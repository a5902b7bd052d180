r"""Write a teacher's predictions to disk: computed once, read by any run on the same rows.

    python -m slm.signals --run=RUN --on=generic/train --mode=sampled --k=64 --out=DIR
    python -m slm.train --config=configs/recover.py --config.teacher_cache=DIR ...
    python -m slm.signals --run=RUN --data=PAIRS --on=pairs/train --mode=targets --out=DIR

Rows are looked up by the hash of their tokens, so that order, batch size, mesh and vocabulary
padding may differ. --mode=topk keeps the k most probable ids and their probabilities; all other ids
count as one. --mode=sampled draws k ids, the gradient of whose cross-entropy is an unbiased
estimate of that of the KL (random sampling KD, arXiv 2503.16870). --mode=targets keeps the
log-probability of every token of the rows, for a reference (configs/dpo.py). The same command
continues an interrupted one.
"""

from absl import flags

from slm.base import console
from slm.objectives.signals import MODES, TARGETS, verify, write


def main(_: list[str]) -> None:
  """Write the signals, or verify them."""
  f = flags.FLAGS
  console.required('out', *([] if f.verify else ['run']))
  if f.verify:
    print(verify(f.out))
    return
  about = write(
    f.run, f.data, f.on, f.out, mode=f.mode, k=f.k, seed=f.seed, batch_size=f.batch_size
  )
  kept = 'the log-probability' if f.mode == TARGETS else f'{about["k"]} ids'
  print(f'{f.out}: {kept} for each token of {about["rows"]:,} rows')


if __name__ == '__main__':
  flags.DEFINE_string('run', '', 'Teacher: a run (or RUN@STEP) of a dense model.')
  flags.DEFINE_string('data', '', "Data directory; default: the teacher's own.")
  flags.DEFINE_string('on', 'generic/train', 'SET/SPLIT[@INDEX] whose rows are predicted.')
  flags.DEFINE_enum(
    'mode', 'topk', MODES, 'Keep the most probable ids, sampled ids, or the targets.'
  )
  flags.DEFINE_integer('k', 64, 'Ids per token, but of --mode=targets.')
  flags.DEFINE_integer('seed', 0, 'Seed of --mode=sampled.')
  flags.DEFINE_integer('batch_size', 16, 'Rows per forward pass.')
  flags.DEFINE_string('out', '', 'Directory to write.')
  flags.DEFINE_bool('verify', False, 'Compare --out with its teacher instead.')
  console.run(main, renamed={'teacher': '--run=RUN', 'index': '--on=SET/SPLIT@INDEX'})
