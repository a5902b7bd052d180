"""Checkers of an answer: numbers, texts, choices, JSON, patterns, length."""

import collections
import functools
import json
import math
import re
import string
import sys
from typing import Literal

from slm.inference.verifiers import pool, words
from slm.inference.verifiers.arguments import Count, Letter, Object, Pattern, Text

RELEASE = re.compile(r'[-+]?\d*\.\d+|\d+')  # the sign of an integer is lost
CURRENT = re.compile(r'[-+]?(?:\d*\.\d+|\d+)')
_NUMBER = re.compile(r'(?:(?<!\d)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)')
# A pattern without these is searched in a time that its length and the text's bound.
_REPEATING = frozenset('*+?{(')


def last_number(text: str, grammar: re.Pattern[str] = CURRENT) -> str:
  """Return the last number of a text without thousands separators; the text if it has none."""
  joined = re.sub(r'(\d),(\d)', r'\1\2', text)
  return (grammar.findall(joined) or [joined])[-1]


def gsm8k_release(text: str, answer: Text) -> bool:
  """Return whether the last number is written as the answer is; -5 is read as 5.

  As open-instruct compared when Tülu 3 was trained (Lambert et al. 2024, arXiv 2411.15124).
  """
  return last_number(text, RELEASE).lower() == answer.lower()


def gsm8k_current(text: str, answer: Text) -> bool:
  """Return whether the last number, with a sign before it, is written as the answer is."""
  return last_number(text).lower() == answer.lower()


def gsm8k_numeric(text: str, answer: Text) -> bool:
  """Return whether the last number equals the answer: 72.00 is 72, $3.50 is 3.5.

  An answer of one number and a unit is that number; one of no or several numbers is compared as
  text.
  """
  expected, written = (_NUMBER.findall(x) for x in (answer, text))
  if len(expected) != 1:
    return normalised(text) == normalised(answer)
  value = lambda numbers: float(numbers[-1].replace(',', ''))
  close = functools.partial(math.isclose, rel_tol=1e-6, abs_tol=1e-9)
  return bool(written) and close(value(written), value(expected))


def normalised(text: str) -> str:
  """Drop case, punctuation, articles and extra space (SQuAD, Rajpurkar et al. 2016)."""
  kept = ''.join(c for c in text.lower() if c not in string.punctuation)
  return ' '.join(w for w in kept.split() if w not in ('a', 'an', 'the'))


def exact(text: str, answer: Text, aliases: tuple[str, ...] = (), strict: bool = False) -> bool:
  """Return whether the text is the answer or an alias, normalised or (strict) but for its ends."""
  form = str.strip if strict else normalised
  accepted = {form(x) for x in (answer, *aliases)} - {''}
  return form(text) in accepted


def f1(text: str, answer: Text, aliases: tuple[str, ...] = ()) -> float:
  """Return the F1 of normalised words with the answer, or with the nearest alias (SQuAD)."""
  return max(_f1(normalised(text).split(), normalised(x).split()) for x in (answer, *aliases))


def _f1(found: list[str], wanted: list[str]) -> float:
  common = (collections.Counter(found) & collections.Counter(wanted)).total()
  return 2 * common / (len(found) + len(wanted)) if common else 0.0


def extract_choice(text: str, letters: str = 'ABCD', phrase: str = '') -> tuple[str, str]:
  """Return the letter that a text chooses and the rule that found it, '' and 'none' if none did.

  The rules of Tülu 3's evaluations, in order, each for its last match: `phrase`, which the prompt
  asked for, before a letter; 'answer is' or 'answer:' before one; a letter in parentheses; a
  capital letter alone. A share of the last rule that grows is a format that is being lost.
  """
  letter = f'([{re.escape(letters)}])'
  rules = {
    'phrase': rf'{re.escape(phrase)}\W{{0,8}}{letter}\b' if phrase else r'(?!)',
    'answer is': rf'(?i:\banswer(?:\s{{1,3}}is|\s?:))\W{{0,8}}{letter}\b',
    'parentheses': rf'\({letter}\)',
    'letter': rf'(?<!\w){letter}(?!\w)',
  }
  for rule, pattern in rules.items():
    if found := re.findall(pattern, text):
      return found[-1], rule
  return '', 'none'


def choice(text: str, answer: Letter, letters: Text = 'ABCD', phrase: str = '') -> bool:
  """Return whether the letter that the text chooses is the answer."""
  return extract_choice(text, letters, phrase)[0] == answer


def is_json(text: str) -> bool:
  """Return whether the whole text is JSON."""
  try:
    json.loads(text)
  except (ValueError, RecursionError):
    return False
  return True


def json_schema(text: str, schema: Object) -> bool:
  """Return whether the whole text is JSON that conforms to a schema."""
  return is_json(text) and pool.call('conforms', text, schema)


def count(
  pattern: str, text: str, before: str = '', after: str = '', ignore_case: bool = True
) -> int:
  """Count the matches of a label's pattern between patterns of the code."""
  search = functools.partial(pool.call, 'matches') if _REPEATING & set(pattern) else matches
  return search(before + pattern + after, text, ignore_case, False)


def regex(text: str, pattern: Pattern, whole: bool = False, ignore_case: bool = False) -> bool:
  """Return whether a regular expression matches in the text, or all of it.

  Raises:
    pool.Undecided: if it backtracks for longer than a call may take.
  """
  search = functools.partial(pool.call, 'matches') if _REPEATING & set(pattern) else matches
  return bool(search(pattern, text, ignore_case, whole))


def matches(pattern: str, text: str, ignore_case: bool, whole: bool) -> int:
  """Count the matches of a regular expression; with `whole`, 1 if it matches the whole text."""
  flags = re.IGNORECASE * ignore_case
  if whole:
    return int(re.fullmatch(pattern, text, flags) is not None)
  return sum(1 for _ in re.finditer(pattern, text, flags))


def length(
  text: str,
  unit: Literal['characters', 'words', 'sentences', 'lines', 'paragraphs'],
  at_least: Count = 0,
  at_most: Count = sys.maxsize,
) -> bool:
  """Return whether the text has as many units; words are between white space."""
  size = {
    'characters': lambda: len(text),
    'words': lambda: len(text.split()),
    'sentences': lambda: len(words.sentences(text)),
    'lines': lambda: sum(bool(x.strip()) for x in text.split('\n')),
    'paragraphs': lambda: sum(bool(x.strip()) for x in re.split(r'\n[^\S\n]*\n', text)),
  }[unit]()
  return at_least <= size <= at_most
