"""Verifiers: programs that check a text against a label, for rewards and for evaluation.

A label is a list of checks, `{'id': ..., 'args': {...}, 'weight': ...}`; CHECKERS is the table of
ids. A checker is a pure function of a text and arguments that returns a bool or, where it is
graded, a float from 0 to 1; its signature declares the arguments. Nothing here imports JAX, and no
text of a model is evaluated as code.
"""

import concurrent.futures
import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from slm.inference.verifiers import answers, arguments, latex, official, pool, tulu3

CHECKERS: dict[str, Callable[..., bool | float]] = {
  'gsm8k.release': answers.gsm8k_release,
  'gsm8k.current': answers.gsm8k_current,
  'gsm8k.numeric': answers.gsm8k_numeric,
  'math.flex': latex.flex,
  'math.verify': latex.verify,
  'exact': answers.exact,
  'f1': answers.f1,
  'choice': answers.choice,
  'json': answers.is_json,
  'json.schema': answers.json_schema,
  'regex': answers.regex,
  'length': answers.length,
  **{f'ifeval.official.{k}': official.strict(f) for k, f in official.CHECKERS.items()},
  **{f'ifeval.official_loose.{k}': official.loose(f) for k, f in official.CHECKERS.items()},
  **{f'ifeval.tulu3_released.{k}': tulu3.stripped(f) for k, f in tulu3.RELEASED.items()},
  **{f'ifeval.tulu3_fixed.{k}': tulu3.stripped(f) for k, f in tulu3.FIXED.items()},
}
# What a checker found in a text, for reports.
FOUND: dict[str, Callable[..., Any]] = {
  'gsm8k.release': lambda text, answer: answers.last_number(text, answers.RELEASE),
  'gsm8k.current': lambda text, answer: answers.last_number(text),
  'math.flex': lambda text, answer: latex.candidates(text),
  'choice': lambda text, answer, **how: answers.extract_choice(text, **how),
}


class Check(NamedTuple):
  """A checker with its arguments, and its weight in the reward."""

  id: str
  args: dict[str, Any]
  weight: float = 1.0


class Verdict(NamedTuple):
  """What came of a check: a value from 0 to 1, or 0 and the reason why it is undecided."""

  id: str
  weight: float
  value: float
  undecided: str = ''
  found: Any = None  # what the checker extracted from the text, where FOUND says so


class Score(NamedTuple):
  """The reward of a text, sum of weight * value, and what it is made of."""

  reward: float
  verdicts: tuple[Verdict, ...]


def read(label: str | Sequence[Mapping[str, Any]]) -> tuple[Check, ...]:
  """Read a label, as a list or its JSON; it is not changed.

  Raises:
    ValueError: if it holds no check, or one with an unknown id, or arguments that are missing,
      unknown or of another type.
  """
  try:
    entries = json.loads(label) if isinstance(label, str) else label
  except ValueError:
    entries = None
  if not isinstance(entries, list | tuple) or not entries:
    raise ValueError(f'label: expected a list of checks, found {label!r}')
  return tuple(map(_check, entries))


def _check(entry: Any) -> Check:
  if not isinstance(entry, Mapping) or 'id' not in entry or entry.keys() - set(Check._fields):
    raise ValueError(f'label: expected a check with id, args and weight, found {entry!r}')
  name, weight = entry['id'], entry.get('weight', 1.0)
  if type(weight) not in (int, float) or not math.isfinite(weight):
    raise ValueError(f'{name}: weight: expected a number, found {weight!r}')
  return Check(name, bind(name, entry.get('args', {})), float(weight))


def bind(name: str, args: Any) -> dict[str, Any]:
  """Return the arguments of the checker `name`, converted to their types.

  A value that is no mapping is the argument that must be given, if there is only one.

  Raises:
    ValueError: if there is no such checker, or an argument is missing, unknown or of another type.
  """
  if not isinstance(name, str) or name not in CHECKERS:
    near = difflib.get_close_matches(str(name), CHECKERS, 1)
    hint = f'did you mean {near[0]!r}?' if near else 'slm.inference.verifiers.CHECKERS lists them'
    raise ValueError(f'there is no verifier {name!r}: {hint}')
  needed = [key for key, (_, must) in arguments.declared(CHECKERS[name]).items() if must]
  if not isinstance(args, Mapping) and len(needed) == 1:
    args = {needed[0]: args}
  return arguments.bind(name, CHECKERS[name], args)


def verify(name: str, text: str, **args: Any) -> bool | float:
  """Return what the checker `name` says of a text.

  Raises:
    ValueError: as bind.
    pool.Undecided: if it has no answer in time.
  """
  return CHECKERS[name](text, **bind(name, args))


def score(text: str, checks: Sequence[Check], *, strip_thinking: bool = False) -> Score:
  """Check a text; what has no answer in time counts 0 and says so."""
  text = answer_of(text) if strip_thinking else text
  verdicts = tuple(_verdict(text, check) for check in checks)
  return Score(sum(v.weight * v.value for v in verdicts), verdicts)


def _verdict(text: str, check: Check) -> Verdict:
  found = FOUND[check.id](text, **check.args) if check.id in FOUND else None
  try:
    value, undecided = float(CHECKERS[check.id](text, **check.args)), ''
  except pool.Undecided as e:
    value, undecided = 0.0, str(e)
  return Verdict(check.id, check.weight, value, undecided, found)


def scores(
  texts: Sequence[str], labels: Sequence[Sequence[Check]], *, strip_thinking: bool = False
) -> list[Score]:
  """Check each text against its own label, several at a time where processes do the work."""
  one = lambda pair: score(*pair, strip_thinking=strip_thinking)
  with concurrent.futures.ThreadPoolExecutor(pool.SIZE) as threads:
    return list(threads.map(one, zip(texts, labels, strict=True)))


def ready(labels: Sequence[Sequence[Check]]) -> None:
  """Try one check of every id, so that a missing library is named before answers are drawn.

  Raises:
    ValueError: naming a library that is not installed, and how to get it.
  """
  by_id = {check.id: check for label in labels for check in label}
  for text in ('A.', 'a.'):  # some look at the language of capitals alone, or of small letters
    score(text, tuple(by_id.values()))


def answer_of(text: str) -> str:
  """Return what follows the last </think>, without the tags <answer> and </answer>."""
  text = text.rpartition('</think>')[2]
  return text.replace('<answer>', '').replace('</answer>', '').strip()
