"""Whether answers pass that nobody should be rewarded for."""

import collections
from collections.abc import Iterable, Sequence

from slm.inference.verifiers import Check, score

CONSTANTS = ('The answer is 0.', 'Yes.', 'I do not know.', '{}')
Table = tuple[list[str], list[list[str]]]


def audit(
  rows: Iterable[tuple[str, Sequence[Check]]], constants: Sequence[str] = CONSTANTS
) -> Table:
  """Return a table of the share of labels, by id, that each of several empty answers satisfies.

  A row is a prompt and its label. The answers are: none, each of `constants`, and a copy of the
  prompt. slm.reporting.tables formats the table.
  """
  labels: collections.Counter[str] = collections.Counter()
  passed: collections.Counter[tuple[str, str]] = collections.Counter()
  names = ['nothing', *map(repr, constants), 'the prompt']
  for prompt, checks in rows:
    labels.update(check.id for check in checks)
    for name, text in zip(names, ('', *constants, prompt), strict=True):
      for verdict in score(text, checks).verdicts:
        passed[verdict.id, name] += verdict.value == 1
  shares = lambda key: [f'{100 * passed[key, name] / labels[key]:.0f} %' for name in names]
  return ['verifier', 'labels', *names], [
    [key, str(number), *shares(key)] for key, number in sorted(labels.items())
  ]
