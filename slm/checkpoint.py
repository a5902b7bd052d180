"""Check that the checkpoints of runs are as they were written.

    python -m slm.checkpoint verify RUN [RUN@STEP ...]

reads every file of every checkpoint, compares it with the size and SHA-256 that were recorded when
it was saved, and prints a line for each checkpoint. It changes nothing, and fails if a file is
damaged, naming the first.
"""

from slm.base import console
from slm.runs import checkpoint


def main(argv: list[str]) -> None:
  """Run the subcommand that the first argument names."""
  verify(console.subcommand(argv, {'verify': 'RUN...'})[1])


def verify(refs: list[str]) -> None:
  """Print what is wrong with each checkpoint; raise ValueError if something is."""
  problems = []
  for ref in refs:
    for name, problem in checkpoint.verify(ref):
      print(f'{name}: {problem or "as it was written"}', flush=True)
      problems.append(problem)
  if wrong := [*filter(None, problems)]:
    raise ValueError(f'{len(wrong)} of {len(problems)} checkpoints failed: {wrong[0]}')


if __name__ == '__main__':
  console.run(main, positional=True)
