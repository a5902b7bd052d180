"""Print a prepared row: its text, with the tokens that are trained marked.

  python -m slm.data.show --data=DATA --on=SET/SPLIT --row=12

The trained tokens are in colour on a terminal, and between ⟦ and ⟧ in a file.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from slm.base import console
from slm.data import loader, masking, rows, tokenizer


def row(data: str, on: str, number: int, documents: int = 0) -> None:
  """Print row `number` of SET/SPLIT[@INDEX], or only so many of its documents.

  Raises:
    ValueError: if there is no such row.
  """
  split = loader.Split(data, *loader.parse_on(data, on))
  if not 0 <= number < len(split.ids):
    raise ValueError(f'--row={number}: {on} has rows 0 to {len(split.ids) - 1}')
  tok = tokenizer.load(Path(data) / 'tokenizer')
  ids = split.ids[number : number + 1]
  content = {name: values[0] for name, values in split.read(ids).items()}
  print(f'{on}, row {number} ({", ".join(_facts(content))}):')
  segments, trained = content['segments'], content.get('trained')
  for segment in range(1, min(documents or segments.max(), segments.max()) + 1):
    place = np.flatnonzero(segments == segment)
    mask = None if trained is None else trained[place]
    console.marked(_parts(content['tokens'][place], mask, tok))
  for label in split.labels()[ids[0] : ids[0] + 1]:
    print(json.dumps(label['verifiers'], ensure_ascii=False))


def _facts(content: Mapping[str, np.ndarray]) -> Iterator[str]:
  segments = content['segments']
  yield f'{segments.max()} segments'
  yield f'{np.count_nonzero(segments):,} of {len(segments):,} tokens filled'
  if 'trained' in content:
    yield f'{int(rows.batch(content)["weights"].astype(bool).sum()):,} trained'


def _parts(
  ids: np.ndarray, trained: np.ndarray | None, tok: tokenizer.Tokenizer
) -> Iterator[tuple[str, bool]]:
  """Yield the text of tokens and whether it is trained, part by part."""
  mask = np.zeros(len(ids), bool) if trained is None else trained > 0
  for mark, group in itertools.groupby(range(len(ids)), mask.__getitem__):
    yield tok.written(ids[[*group]]), bool(mark)
  yield '\n', False


def summary(manifest: Mapping[str, Any], split: str, facts: Mapping[str, Any]) -> str:
  """Describe what was prepared of a split of conversations, and what was not."""
  kind, filled = manifest['chat']['kind'], facts['positions'] / facts['rows'] / manifest['context']
  what = 'tokens' if kind == 'prompts' else 'trained tokens'
  lines = [
    f'{split}: {facts["documents"]:,} {kind} ({facts["duplicates"]:,} duplicates dropped), '
    f'{facts["tokens"]:,} {what} of {facts["positions"]:,}, {facts["rows"]:,} rows, '
    f'{filled:.0%} filled'
  ]
  if 'pairs_per_row' in facts:
    lines[0] += f', at most {facts["pairs_per_row"]} pairs in a row'
  for reason, n in facts['dropped'].items():
    lines.append(f'  dropped {n:,}: {facts["why"].get(reason, masking.REASONS[reason])}')
  notes = facts['notes']
  lines += [f'  {notes[note]:,}: {text}' for note, text in masking.NOTES.items() if note in notes]
  if manifest['chat']['pad_is_end']:
    stop = repr(manifest['chat']['stop'][1])
    lines.append(f'  the tokenizer pads with {stop}: it is trained after answers, padding is not')
  return '\n'.join(lines)


def _main(_: list[str]) -> None:
  console.required('data', 'on')
  row(flags.FLAGS.data, flags.FLAGS.on, flags.FLAGS.row)


if __name__ == '__main__':
  flags.DEFINE_string('data', None, 'Prepared data directory.')
  flags.DEFINE_string('on', None, 'SET/SPLIT[@INDEX]: whose row.')
  flags.DEFINE_integer('row', 0, 'Number of the row.')
  console.run(_main)
