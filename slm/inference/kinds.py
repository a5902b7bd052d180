"""Kinds of task items: the fields they have, how they are asked, and how an answer is scored.

A file holds JSON lines, each an item with an `id` and the fields of its kind in KINDS. `type` names
the kind; items without one are told by their fields.
"""

import json
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm.base import files
from slm.data import sources
from slm.inference import verifiers

Item = Mapping[str, Any]
Pair = tuple[str, str]


class Kind(NamedTuple):
  """A kind of item: its fields, its (context, continuation) pairs, and the scores of an answer.

  `score` takes the item and the (log-probability, greedy) of each pair or, where max_tokens is set,
  the text generated after the context; `main` names the score that models are compared by.
  Few-shot examples show the gold pair: item['gold'], or the first. `rule` says how an answer was
  found in a text, `parts` how many parts of an item the scores named `*_parts` are shares of.
  """

  fields: Mapping[str, type]
  pairs: Callable[[Item], list[Pair]]
  score: Callable[[Item, Any], dict[str, float]]
  main: str = 'acc'
  max_tokens: int = 0
  until: tuple[str, ...] = ()
  rule: Callable[[Item, str], str] | None = None
  parts: Callable[[Item], int] | None = None
  answered: bool = True  # items hold an answer, so that they can be examples


def choose(item: Item, answers: Sequence[tuple[float, bool]]) -> dict[str, float]:
  """Score choices: acc, acc_norm by bytes, bits per byte of the gold one; ties go to the first.

  Bytes are those of the choice in the file (acc_bytes of lm-evaluation-harness; OLMES, Gu et al.
  2024, arXiv 2406.08446).
  """
  logprobs = np.array([logprob for logprob, _ in answers])
  sizes = np.array([len(text.strip().encode()) for _, text in KINDS[item['type']].pairs(item)])
  gold = item['gold']
  return {
    'acc': float(logprobs.argmax() == gold),
    'acc_norm': float((logprobs / sizes).argmax() == gold),
    'bpb': float(-logprobs[gold] / sizes[gold] / math.log(2)),
  }


def choose_context(item: Item, answers: Sequence[tuple[float, bool]]) -> dict[str, float]:
  """Score contexts by the same continuation after each (Trinh and Le 2018, arXiv 1806.02847)."""
  return {name: value for name, value in choose(item, answers).items() if name != 'acc_norm'}


def last_word(item: Item, answers: Sequence[tuple[float, bool]]) -> dict[str, float]:
  """Score a continuation: acc (whether it is the greedy one), NLL (nats), bits per byte."""
  logprob, greedy = answers[0]
  size = len(item['continuation'].strip().encode())
  return {'acc': float(greedy), 'nll': -logprob, 'bpb': -logprob / math.log(2) / size}


def short_answer(item: Item, text: str) -> dict[str, float]:
  """Score a generated answer: exact match with the answer or one of its aliases."""
  exact = verifiers.answers.exact(text, item['answer'], item['aliases'])
  return {'exact_match': float(exact)}


def final_number(item: Item, text: str) -> dict[str, float]:
  """Score a generated solution: its last number is the final one (Cobbe et al. 2021, GSM8K).

  verifiers.answers.gsm8k_numeric says how they are compared.
  """
  return {'exact_match': float(verifiers.answers.gsm8k_numeric(text, item['final']))}


def lettered(item: Item) -> str:
  """Write a question with its choices as lines A to Z, unless the choices are letters already."""
  query = re.sub(r'\s*\n(?:Answer|A):\s*$', '', item['query'])
  if item['choices'] == list(_letters(item)):
    return query
  lines = zip(_letters(item), item['choices'], strict=True)
  return '\n'.join([query, *(f'{letter}. {text}' for letter, text in lines)])


def _letters(item: Item) -> str:
  return string.ascii_uppercase[: len(item['choices'])]


def _chosen(item: Item, text: str) -> tuple[str, str]:
  how = {'letters': _letters(item), 'phrase': item.get('phrase', '')}
  return verifiers.answers.extract_choice(text, **how)


def reasoned_letter(item: Item, text: str) -> dict[str, float]:
  """Score a generated answer: the letter that verifiers.answers.extract_choice finds."""
  return {'exact_match': float(_chosen(item, text)[0] == _letters(item)[item['gold']])}


def follow(item: Item, text: str) -> dict[str, float]:
  """Score an answer to a prompt of IFEval (Zhou et al. 2023, arXiv 2311.07911).

  Whether all its constraints hold, and the share of them that do (`_parts`), strict and loose.
  """
  result = {}
  for name in ('strict', 'loose'):
    label = verifiers.official.label(
      item['instruction_id_list'], item['kwargs'], loose=name == 'loose'
    )
    verdicts = verifiers.score(text, verifiers.read(label)).verdicts
    result[name] = float(all(v.value for v in verdicts))
    result[f'{name}_parts'] = sum(bool(v.value) for v in verdicts) / len(verdicts)
  return result


def prefer(item: Item, answers: Sequence[tuple[float, bool]]) -> dict[str, float]:
  """Score a pair: acc (the chosen answer is likelier), acc_norm by bytes; a tie is half."""
  (chosen, _), (rejected, _) = answers
  sizes = [len(item[name].strip().encode()) for name in ('chosen', 'rejected')]
  larger = lambda a, b: float(a > b) + 0.5 * (a == b)
  return {
    'acc': larger(chosen, rejected),
    'acc_norm': larger(chosen / sizes[0], rejected / sizes[1]),
  }


def satisfy(item: Item, text: str) -> dict[str, float]:
  """Score an answer by a label: whether all checks pass, and the reward, as in training.

  What has no answer in time counts 0.
  """
  found = verifiers.score(text, verifiers.read(item['verifiers']))
  return {'pass': float(all(v.value >= 1 for v in found.verdicts)), 'reward': found.reward}


def worked(answer: str) -> str:
  """Write a solution of GSM8K as prose: without <<calculations>>, its result in a sentence."""
  return re.sub(
    r'\n?####\s*(.*)$', r'\nSo the answer is \1.', re.sub('<<.*?>>', '', answer)
  ).strip()


def _with_answer(query: str) -> str:
  """Add the line `Answer:` to a query with a `Question:` that does not end in a colon."""
  lacks = re.search(r'^Question:', query, re.MULTILINE) and not query.rstrip().endswith(':')
  return f'{query}\nAnswer:' if lacks else query


KINDS = {
  'mc': Kind(
    {'query': str, 'choices': list, 'gold': int},
    lambda x: [(_with_answer(x['query']), choice) for choice in x['choices']],
    choose,
  ),
  'schema': Kind(
    {'context_options': list, 'continuation': str, 'gold': int},
    lambda x: [(context, x['continuation']) for context in x['context_options']],
    choose_context,
  ),
  'lm': Kind(
    {'context': str, 'continuation': str},
    lambda x: [(x['context'], x['continuation'])],
    last_word,
  ),
  'qa': Kind(
    {'query': str, 'answer': str, 'aliases': list},
    lambda x: [(_with_answer(x['query']), x['answer'])],
    short_answer,
    'exact_match',
    32,
    ('\n',),
  ),
  'numeric': Kind(
    {'question': str, 'final': str},
    lambda x: [(f'Question: {x["question"]}\nAnswer:', x.get('answer') or x['final'])],
    final_number,
    'exact_match',
    256,
    ('\n\n', 'Question:'),
  ),
  'letter': Kind(
    {'query': str, 'choices': list, 'gold': int},
    lambda x: [(f'{lettered(x)}\nAnswer:', letter) for letter in _letters(x)],
    choose_context,
  ),
  'reasoned': Kind(
    {'query': str, 'choices': list, 'gold': int},
    lambda x: [(lettered(x), letter) for letter in _letters(x)],
    reasoned_letter,
    'exact_match',
    512,
    rule=lambda x, text: _chosen(x, text)[1],
  ),
  'solution': Kind(
    {'question': str, 'final': str},
    lambda x: [(x['question'], worked(x.get('answer') or f'#### {x["final"]}'))],
    final_number,
    'exact_match',
    512,
  ),
  'ifeval': Kind(
    {'prompt': str, 'instruction_id_list': list, 'kwargs': dict},
    lambda x: [(x['prompt'], '')],
    follow,
    'loose',
    1280,
    parts=lambda x: len(x['instruction_id_list']),
    answered=False,
  ),
  'labelled': Kind(
    {'prompt': str, 'verifiers': dict},
    lambda x: [(x['prompt'], '')],
    satisfy,
    'pass',
    256,
    answered=False,
  ),
  'preference': Kind(
    {'prompt': str, 'chosen': str, 'rejected': str},
    lambda x: [(x['prompt'], x['chosen']), (x['prompt'], x['rejected'])],
    prefer,
    'acc_norm',
  ),
}
# Kinds of items without a `type` of KINDS, by fields that they have.
_TOLD_BY = {
  'numeric': {'question', 'final'},
  'ifeval': {'prompt', 'instruction_id_list', 'kwargs'},
  'labelled': {'prompt', 'verifiers'},
  'preference': {'prompt', 'chosen', 'rejected'},
}  # fmt: skip


def read(path: str | Path, kind: str = '') -> list[dict[str, Any]]:
  """Read a task file, plain, .gz or .zst; every item gets the `type` of its kind, or `kind`.

  The id of a prompt of IFEval is its `key`.

  Raises:
    ValueError: naming the file and line of an item that is malformed, of another kind than the
      first, or has the id of another.
  """
  items: dict[str, dict[str, Any]] = {}
  for number, line in enumerate(sources.lines(str(path)), 1):
    if not line.strip():
      continue
    where = f'{path}:{number}'
    with files.reading(where, 'valid JSON'):
      item = json.loads(line)
    if isinstance(item, dict) and 'key' in item:
      item.setdefault('id', str(item['key']))
    if not isinstance(item, dict) or not isinstance(item.get('id'), str):
      raise ValueError(f'{where}: expected an object with an id')
    if item.get('type') not in list(KINDS):
      item['type'] = next((k for k, x in _TOLD_BY.items() if x <= set(item)), item.get('type'))
    item['type'] = kind or item['type']
    _check(where, item)
    if item['id'] in items:
      raise ValueError(f'{where}: id {item["id"]!r} was used before')
    items[item['id']] = item
    if item['type'] != (first := next(iter(items.values()))['type']):
      raise ValueError(f'{where}: type {item["type"]!r}, the first item has {first!r}')
  if not items:
    raise ValueError(f'{path}: holds no items')
  return list(items.values())


_EXPECTED = {
  str: ('text', lambda x: isinstance(x, str)),
  list: ('a list of texts', lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x)),
  int: ('a whole number', lambda x: isinstance(x, int)),
  dict: ('a list of objects', lambda x: isinstance(x, list) and all(type(y) is dict for y in x)),
}


def _check(where: str, item: dict[str, Any]) -> None:
  if item.get('type') not in list(KINDS):
    raise ValueError(f'{where}: type: expected one of {list(KINDS)}, found {item.get("type")!r}')
  for name, kind in KINDS[item['type']].fields.items():
    expected, fits = _EXPECTED[kind]
    if not fits(item.get(name)):
      found = repr(item[name]) if name in item else 'none'
      raise ValueError(f'{where}: {name}: expected {expected}, found {found}')
  if not isinstance(item.get('answer', ''), str):
    raise ValueError(f'{where}: an answer is empty or no text')
  pairs = KINDS[item['type']].pairs(item)
  empty = not all(isinstance(text, str) and text.strip() for _, text in pairs)
  if empty and KINDS[item['type']].answered:
    raise ValueError(f'{where}: an answer is empty or no text')
  gold = item.get('gold', 0)
  if not isinstance(gold, int) or not 0 <= gold < len(pairs):
    raise ValueError(f'{where}: gold: expected 0 to {len(pairs) - 1}, found {gold!r}')
