"""Arguments of checkers: their types, and the values that a label gives for them."""

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from slm.base import schema

LONGEST_PATTERN = 500  # characters


def _count(value: int) -> str:
  return '' if value >= 0 else 'at least 0'


def _letter(value: str) -> str:
  return '' if len(value) == 1 else 'one character'


def _filled(value: str) -> str:
  return '' if value.strip() else 'a text that is not blank'


def _pattern(value: str) -> str:
  if not value.strip() or len(value) > LONGEST_PATTERN:
    return f'1 to {LONGEST_PATTERN} characters'
  try:
    re.compile(value)
  except (re.error, OverflowError, RecursionError) as e:
    return f'a regular expression ({e})'
  return ''


def _object(value: Any) -> str:
  return '' if isinstance(value, Mapping) else 'an object'


def _some(value: Sequence[str]) -> str:
  return '' if value and all(map(str.strip, value)) else 'one text or more, none of them blank'


# Each type is what base.schema converts to, and a function that returns what was expected if a
# value is not it.
Count = Annotated[int, _count]
Text = Annotated[str, _filled]
Letter = Annotated[str, _letter]
Pattern = Annotated[str, _pattern]  # a regular expression of a label
Object = Annotated[dict, _object]
Words = Annotated[tuple[str, ...], _some]
Patterns = Annotated[tuple[Pattern, ...], _some]


def declared(function: Callable[..., Any]) -> dict[str, tuple[Any, bool]]:
  """Return the type of each argument after the text, and whether it must be given."""
  hints = typing.get_type_hints(function, include_extras=True)
  parameters = list(inspect.signature(function).parameters.values())[1:]
  return {p.name: (hints[p.name], p.default is p.empty) for p in parameters}


def bind(name: str, function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """Return the arguments for the checker `name`, converted to their types.

  Raises:
    ValueError: naming an argument that is unknown, missing, or of another type.
  """
  if not isinstance(given, Mapping):
    raise ValueError(f'{name}: expected arguments by name, found {given!r}')
  expected = declared(function)
  for key in given:
    if key not in expected:
      raise ValueError(f'{name}: has no argument {key!r}; it takes {_listed(expected)}')
  for key, (_, needed) in expected.items():
    if needed and key not in given:
      raise ValueError(f'{name}: lacks the argument {key!r}; it takes {_listed(expected)}')
  return {key: _convert(expected[key][0], value, f'{name}: {key}') for key, value in given.items()}


def _listed(names: Mapping[str, Any]) -> str:
  return ', '.join(names) or 'none'


def _convert(hint: Any, value: Any, where: str) -> Any:
  rules = getattr(hint, '__metadata__', ())
  plain = hint.__origin__ if rules else hint
  value = schema.convert(plain, value, where)
  if typing.get_origin(plain) is tuple:
    inner = typing.get_args(plain)[0]
    value = tuple(_convert(inner, x, where) for x in value)
  for rule in rules:
    if expected := rule(value):
      raise ValueError(f'{where}: expected {expected}, found {value!r}')
  return value
