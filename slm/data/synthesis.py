"""Prompts with labels that a program makes: constraints, arithmetic, tasks of reasoning-gym.

A row is a line of JSON that slm.data.prepare reads as a prompt: `prompt`, with the ids of its
verifiers in `verifier` and their arguments in `label`. The rows follow from the seed alone.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slm.data import constraints, conversations, sources

_TRIES = 1000  # draws in succession that may repeat a problem
_PEOPLE = (
  'Amara', 'Bo', 'Chloe', 'Dmitri', 'Elif', 'Farid', 'Grace', 'Hiro', 'Ines', 'Jonas', 'Kaya',
  'Lena', 'Mateo', 'Nia', 'Omar', 'Priya', 'Rosa', 'Sven', 'Tala', 'Wei',
)  # fmt: skip
_THINGS = (
  'apples', 'beads', 'books', 'buttons', 'candles', 'cards', 'coins', 'eggs', 'marbles', 'nails',
  'pencils', 'photos', 'shells', 'stamps', 'stickers', 'tiles',
)  # fmt: skip


def constrained(
  spec: str, *, rows: int, seed: int, labels: str, least: int, most: int, kinds: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
  """Yield prompts of a source, `rows` of them (0: all), each with `least` to `most` constraints.

  They are of `kinds`, ids of constraints.KINDS; without any, of all.
  `request` is the user's last message without the `sentences` that state the constraints; `labels`
  is one of constraints.LABELS. A prompt may get fewer where the drawn ones admit no other.

  Raises:
    ValueError: if a number or `labels` is out of range, or a line has no prompt.
  """
  if labels not in constraints.LABELS:
    raise ValueError(f'--labels={labels}: expected one of {", ".join(constraints.LABELS)}')
  if unknown := [x for x in kinds if x not in constraints.KINDS]:
    raise ValueError(f'--task={unknown[0]}: expected one of {", ".join(constraints.KINDS)}')
  kinds = tuple(kinds) or tuple(constraints.KINDS)
  if not 1 <= least <= most <= len(kinds):
    raise ValueError(f'--least={least} --most={most}: expected 1 <= least <= most <= {len(kinds)}')
  prompts = list(conversations.asked(spec))
  rng = random.Random(seed)
  if rows > len(prompts):
    raise ValueError(f'--rows={rows}: {spec} has {len(prompts):,} prompts')
  for messages in rng.sample(prompts, rows or len(prompts)):
    request = messages[-1]['content']
    number = rng.randint(least, most)
    prompt, chosen = constraints.attach(rng, request, number, kinds, labels=labels)
    checks = [constraints.labelled(x, labels) for x in chosen]
    whole = [*messages[:-1], {**messages[-1], 'content': prompt}]
    yield {
      'prompt': prompt if len(messages) == 1 else whole,
      'verifier': [x['id'] for x in checks],
      'label': [x['args'] for x in checks],
      'request': request,
      'sentences': [x.sentence for x in chosen],
    }


def _sum(rng: random.Random) -> tuple[str, int]:
  a, b = rng.randint(0, 999), rng.randint(0, 999)
  return rng.choice((f'What is {a} + {b}?', f'Add {a} and {b}.', f'Work out {a} + {b}.')), a + b


def _difference(rng: random.Random) -> tuple[str, int]:
  a, b = rng.randint(0, 999), rng.randint(0, 999)
  forms = (f'What is {a} - {b}?', f'Subtract {b} from {a}.', f'Work out {a} - {b}.')
  return rng.choice(forms), a - b


def _product(rng: random.Random) -> tuple[str, int]:
  a, b = rng.randint(2, 99), rng.randint(2, 99)
  return rng.choice((f'What is {a} times {b}?', f'Multiply {a} by {b}.')), a * b


def _quotient(rng: random.Random) -> tuple[str, int]:
  a, b = rng.randint(2, 99), rng.randint(2, 20)
  return rng.choice((f'What is {a * b} divided by {b}?', f'Divide {a * b} by {b}.')), a


def _two_steps(rng: random.Random) -> tuple[str, int]:
  a, b, c = rng.randint(1, 50), rng.randint(1, 50), rng.randint(2, 12)
  if rng.random() < 0.5:
    return f'What is ({a} + {b}) * {c}?', (a + b) * c
  return f'What is {a} + {b} * {c}?', a + b * c


def _gain(rng: random.Random) -> tuple[str, int]:
  who, what = rng.choice(_PEOPLE), rng.choice(_THINGS)
  a, b = rng.randint(2, 99), rng.randint(2, 99)
  c = rng.randint(1, a + b - 1)
  return (
    f'{who} has {a} {what} and gets {b} more. Then {who} gives {c} of them away. How many {what} '
    f'does {who} have now?'
  ), a + b - c


def _boxes(rng: random.Random) -> tuple[str, int]:
  who, what = rng.choice(_PEOPLE), rng.choice(_THINGS)
  a, b = rng.randint(2, 20), rng.randint(2, 30)
  c = rng.randint(1, a * b - 1)
  return (
    f'{who} buys {a} boxes with {b} {what} in each, and loses {c} of the {what}. How many {what} '
    'are left?'
  ), a * b - c


def _share(rng: random.Random) -> tuple[str, int]:
  what, a, b = rng.choice(_THINGS), rng.randint(2, 40), rng.randint(2, 12)
  return f'{b} friends share {a * b} {what} equally. How many {what} does each of them get?', a


def _change(rng: random.Random) -> tuple[str, int]:
  who, what = rng.choice(_PEOPLE), rng.choice(_THINGS)
  a, b, c = rng.randint(2, 12), rng.randint(2, 15), rng.randint(1, 100)
  return (
    f'{who} buys {a} {what} for {b} dollars each and pays with {a * b + c} dollars. How many '
    f'dollars of change does {who} get?'
  ), c


def _together(rng: random.Random) -> tuple[str, int]:
  (first, second), what = rng.sample(_PEOPLE, 2), rng.choice(_THINGS)
  a, b = rng.randint(2, 60), rng.randint(2, 9)
  return (
    f'{first} has {a} {what}. {second} has {b} times as many. How many {what} do they have '
    'together?'
  ), a * (b + 1)


def _pages(rng: random.Random) -> tuple[str, int]:
  who, a, b, c = rng.choice(_PEOPLE), rng.randint(5, 40), rng.randint(2, 14), rng.randint(1, 200)
  return (
    f'A book has {a * b + c} pages. {who} reads {a} pages a day for {b} days. How many pages are '
    'left?'
  ), c


# Problems in numbers, then in words: functions of a generator that return a prompt and its answer,
# a whole number. Ranges are those of the functions; a difference may be below 0.
ARITHMETIC: dict[str, Callable[[random.Random], tuple[str, int]]] = {
  'sum': _sum, 'difference': _difference, 'product': _product, 'quotient': _quotient,
  'two_steps': _two_steps, 'gain': _gain, 'boxes': _boxes, 'share': _share, 'change': _change,
  'together': _together, 'pages': _pages,
}  # fmt: skip


def arithmetic(rows: int, seed: int, tasks: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
  """Yield `rows` different problems, of the kinds in turn, with answers for gsm8k.numeric.

  Raises:
    ValueError: if there is no such kind, or it has not as many different problems.
  """
  if unknown := [x for x in tasks if x not in ARITHMETIC]:
    raise ValueError(f'--task={unknown[0]}: expected one of {", ".join(ARITHMETIC)}')
  rng, seen, names = random.Random(seed), set(), tuple(tasks) or tuple(ARITHMETIC)
  for i in range(rows):
    name = names[i % len(names)]
    made = (ARITHMETIC[name](rng) for _ in range(_TRIES))
    prompt, answer = next((x for x in made if x[0] not in seen), ('', 0))
    if not prompt:
      raise ValueError(f'--task={name} has hardly more problems than the {i:,} made: lower --rows')
    seen.add(prompt)
    yield _numeric(prompt, str(answer), f'arithmetic/{name}')


def _numeric(prompt: str, answer: str, source: str) -> dict[str, Any]:
  return {'prompt': prompt, 'verifier': 'gsm8k.numeric', 'label': answer, 'source': source}


def gym(rows: int, seed: int, tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Yield `rows` problems of tasks of reasoning-gym, by name and in turn, with their answers.

  A task must be one that reasoning-gym itself checks by comparing texts: others may have several
  answers. An answer that is no number is asked for alone, and compared as it is.

  Raises:
    ValueError: if reasoning-gym is not installed, or there is no such task.
  """
  try:
    import reasoning_gym
    from reasoning_gym import dataset, factory
  except ImportError:
    raise ValueError("needs reasoning-gym, pip install 'slm[rl]'") from None
  plain = dataset.ProceduralDataset.score_answer
  fits = [n for n, (made, _) in factory.DATASETS.items() if made.score_answer is plain]
  if not tasks or (unknown := [x for x in tasks if x not in fits]):
    found = f'--task={unknown[0]}' if tasks else 'no --task'
    raise ValueError(
      f'{found}: expected tasks that are checked by comparing texts: {", ".join(sorted(fits))}'
    )
  size = -(-rows // len(tasks))
  made = [reasoning_gym.create_dataset(name, seed=seed, size=size) for name in tasks]
  for i in range(rows):
    item, source = made[i % len(tasks)][i // len(tasks)], f'gym/{tasks[i % len(tasks)]}'
    if re.fullmatch(r'-?\d+(\.\d+)?', item['answer']):
      yield _numeric(item['question'], item['answer'], source)
    else:
      label = {'answer': item['answer'], 'strict': True}
      prompt = item['question'].rstrip() + '\n\nReply with the answer alone.'
      yield {'prompt': prompt, 'verifier': 'exact', 'label': label, 'source': source}


def write(rows: Iterator[dict[str, Any]], out: str) -> int:
  """Write rows as lines of JSON, plain or as the name of the file says; return their number.

  Raises:
    ValueError: if the file is there with other rows, or is of another kind.
  """
  if not re.search(r'\.jsonl(\.gz|\.zst)?$', out):
    raise ValueError(f'--out={out}: expected .jsonl, plain or with .gz or .zst')
  lines, path = [json.dumps(row).encode() + b'\n' for row in rows], Path(out)
  if path.exists() and list(sources.raw_lines(out)) != lines:
    raise ValueError(f'{out}: holds other rows: choose another file, or remove it')
  sources.write_lines(path, lines)
  return len(lines)
