"""Prompts with labels that a program makes: constraints, arithmetic, tasks of reasoning-gym.

A row is a line of JSON that slm.data.prepare reads as a prompt: `prompt`, with the ids of its
verifiers in `verifier` and their arguments in `label`. The rows follow from the seed alone.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
  spec: str, *, rows: int, seed: int, labels: str, least: int, most: int,
  kinds: Sequence[str] = (), longest: int = 0,
) -> Iterator[dict[str, Any]]:  # fmt: skip
  """Yield prompts of a source, `rows` of them (0: all), each with `least` to `most` constraints.

  They are of `kinds`, ids of constraints.KINDS; without any, of all. `longest` leaves out prompts
  whose last message has more characters (0: none).
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
  fits = lambda messages: not longest or len(messages[-1]['content']) <= longest
  prompts = list(filter(fits, conversations.asked(spec)))
  rng = random.Random(seed)
  if rows > len(prompts):
    which = f' of at most {longest} characters' if longest else ''
    raise ValueError(f'--rows={rows}: {spec} has {len(prompts):,} prompts{which}')
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


_LETTERS = 'abcdefghijkl'
_SIZES = range(2, 8)  # letters of an answer
# What a string of letters is asked for, and the regular expression that it has to match.
_MARKS = {'first': '^{}', 'last': r'{}\Z', 'with': '{}'}
FORMATS = ('letters', *_MARKS)  # and how many there are


def formats(rows: int, seed: int, tasks: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
  """Yield `rows` different prompts that ask for a short string of letters with one to three marks.

  The marks are of `tasks`, of FORMATS; without any, of all. `chosen` is a random string with all
  marks, and `rejected` one that lacks some. No two prompts ask for the same.

  Raises:
    ValueError: if there is no such mark, or they make too few prompts.
  """
  if unknown := [x for x in tasks if x not in FORMATS]:
    raise ValueError(f'--task={unknown[0]}: expected one of {", ".join(FORMATS)}')
  rng, seen = random.Random(seed), set()
  names = [x for x in FORMATS if x in (tasks or FORMATS)]
  for i in range(rows):
    made = (_format(rng, names) for _ in range(_TRIES))
    row = next((x for x in made if x['prompt'] not in seen), None)
    if not row:
      raise ValueError(f'formats: has hardly more prompts than the {i:,} made: lower --rows')
    seen.add(row['prompt'])
    yield row


def _format(rng: random.Random, names: Sequence[str]) -> dict[str, Any]:
  """Draw a prompt of marks, its label, and a right and a wrong answer."""
  count = rng.randint(1, min(3, len(names)))
  asked: dict[str, Any] = {name: rng.choice(_LETTERS) for name in _MARKS}
  asked['letters'] = rng.choice(_SIZES)
  chosen = sorted(rng.sample(names, count), key=FORMATS.index)
  ids, labels, texts = [], [], []
  for name in chosen:
    if name == 'letters':
      labels.append({'unit': 'characters', 'at_least': asked[name], 'at_most': asked[name]})
    else:
      labels.append({'pattern': _MARKS[name].format(asked[name])})
    ids.append('length' if name == 'letters' else 'regex')
    texts.append(f'{asked[name]} letters' if name == 'letters' else f'{name} {asked[name]}')

  def right(text: str) -> bool:
    return all(
      len(text) == x['at_least'] if 'unit' in x else bool(re.search(x['pattern'], text))
      for x in labels
    )

  text = lambda: rng.choices(_LETTERS, k=rng.choice(_SIZES))
  fits = next(x for x in iter(lambda: _marked(rng, chosen, asked, text()), None) if right(x))
  fails = next(x for x in iter(lambda: ''.join(text()), None) if not right(x))
  return {
    'prompt': ', '.join(texts), 'verifier': ids, 'label': labels, 'source': 'formats',
    'chosen': fits, 'rejected': fails,
  }  # fmt: skip


def _marked(
  rng: random.Random, names: Sequence[str], asked: Mapping[str, Any], letters: list[str]
) -> str:
  """Return a string of letters with marks put into it, of which one may hide another."""
  if 'letters' in names:
    letters = rng.choices(_LETTERS, k=asked['letters'])
  places = {'with': rng.randrange(len(letters)), 'first': 0, 'last': len(letters) - 1}
  for name, place in places.items():
    if name in names:
      letters[place] = asked[name]
  return ''.join(letters)


def demonstrated(
  rows: Iterable[Mapping[str, Any]], seed: int, wrong: float
) -> Iterator[dict[str, Any]]:
  """Add a `response` to rows, of which a share is `wrong`, and `chosen` and `rejected` answers.

  Rows without these two have numbers as labels; a wrong number has another digit somewhere.
  """
  rng = random.Random(seed)
  for row in rows:
    if 'chosen' not in row:
      row = {**row, 'chosen': row['label'], 'rejected': _misprinted(rng, row['label'])}
    yield {**row, 'response': row['rejected' if rng.random() < wrong else 'chosen']}


def _misprinted(rng: random.Random, number: str) -> str:
  """Return a number with one digit changed."""
  at = rng.choice([i for i, x in enumerate(number) if x.isdigit()])
  other = rng.choice([x for x in '0123456789' if x != number[at]])
  return number[:at] + other + number[at + 1 :]


def lines(spec: str, rows: int, seed: int, dialogues: bool) -> Iterator[dict[str, Any]]:
  """Yield `rows` lines of a source in random order (0: all).

  With `dialogues` a prompt that is a dialogue of `Human:` and `Assistant:` becomes messages.

  Raises:
    ValueError: if there are fewer, or the source says how much of it is taken.
  """
  source = conversations.whole(spec)
  read = [line for path in sources.expand(source.path) for _, line in sources.records(path)]
  if rows > len(read):
    raise ValueError(f'rows={rows}: {spec} has {len(read):,}')
  for row in random.Random(seed).sample(read, rows or len(read)):
    if dialogues:
      talk = conversations.dialogue(row[source.chat.prompt])
      row[source.chat.prompt] = [{'role': role, 'content': text} for role, text in talk]
    yield row


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
