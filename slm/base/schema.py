"""Dataclasses as schemas of configs: plain values to dataclasses and back, with one-line errors."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar('T')


def read(kind: type[T], values: Mapping[str, Any], where: str = '') -> T:
  """Make the dataclass `kind` from a mapping; missing keys take its defaults.

  Lists become tuples and integers floats where the field's type says so. A field that is a union of
  dataclasses becomes the one whose default `name` is the mapping's.

  Raises:
    ValueError: naming the key, if it is unknown, missing, of another type, or has a wrong value.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f'{where or kind.__name__}: expected a section of keys, found {values!r}')
  hints = typing.get_type_hints(kind)
  for key in values:
    if key not in hints:
      near = difflib.get_close_matches(str(key), hints, 1)
      hint = f'did you mean {near[0]!r}?' if near else f'expected one of {", ".join(hints)}'
      raise ValueError(f'{where or "config"}: has no key {key!r}; {hint}')
  dotted = lambda key: f'{where}.{key}' if where else key
  for field in dataclasses.fields(kind):
    needed = field.init and field.default is field.default_factory is dataclasses.MISSING
    if needed and field.name not in values:
      raise ValueError(f'{where or "config"}: lacks the key {field.name!r}')
  return kind(**{key: convert(hints[key], value, dotted(key)) for key, value in values.items()})


def defaults(kind: type) -> dict[str, Any]:
  """Return the defaults of `kind` as nested dicts; of a union, its first member's.

  Fields with the metadata 'given': False, which are derived rather than given, are left out.
  """
  hints, values = typing.get_type_hints(kind), {}
  for field in dataclasses.fields(kind):
    if not field.metadata.get('given', True):
      continue
    section = (_members(hints[field.name]) or [hints[field.name]])[0]
    if dataclasses.is_dataclass(section):
      values[field.name] = defaults(section)
    elif field.default is dataclasses.MISSING:
      values[field.name] = field.default_factory()
    else:
      values[field.name] = field.default
  return values


def sections(kind: type, values: Mapping[str, Any]) -> dict[str, type]:
  """Return the dataclass of each section of a config's values."""
  hints, kinds = typing.get_type_hints(kind), {}
  for name in hints.keys() & values.keys():
    if dataclasses.is_dataclass(hints[name]):
      kinds[name] = hints[name]
    elif (members := _members(hints[name])) and isinstance(values[name], Mapping):
      kinds[name] = _named(members, values[name], name)
  return kinds


def plain(value: Any) -> Any:
  """Return a config as nested dicts and lists, as in JSON, without fields that are None."""
  if dataclasses.is_dataclass(value):
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    value = {name: x for name, x in fields.items() if x is not None}
  if isinstance(value, Mapping):
    return {key: plain(x) for key, x in value.items()}
  return [plain(x) for x in value] if isinstance(value, tuple | list) else value


def _members(hint: Any) -> list[type]:
  """Return the dataclasses of a union, in order."""
  if not isinstance(hint, types.UnionType):
    return []
  return [member for member in typing.get_args(hint) if dataclasses.is_dataclass(member)]


def convert(hint: Any, value: Any, where: str) -> Any:
  """Convert a value to a field's type; ValueError names the field, `where`."""
  if members := _members(hint):
    if value is None and type(None) in typing.get_args(hint):
      return None
    hint = _named(members, value, where)
  if dataclasses.is_dataclass(hint):
    return value if isinstance(value, hint) else read(hint, value, where)
  if typing.get_origin(hint) is typing.Literal:
    if value not in typing.get_args(hint):
      options = ', '.join(map(str, typing.get_args(hint)))
      raise ValueError(f'{where}: expected one of {options}, found {value!r}')
    return value
  if typing.get_origin(hint) is tuple:
    if not isinstance(value, tuple | list):
      raise ValueError(f'{where}: expected a list, found {value!r}')
    return tuple(convert(typing.get_args(hint)[0], x, where) for x in value)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if hint in (int, float, str, bool) and (
    not isinstance(value, hint) or hint is int and isinstance(value, bool)
  ):
    raise ValueError(f'{where}: expected {_NAMES[hint]}, found {value!r}')
  return value


_NAMES = {int: 'a whole number', float: 'a number', str: 'text', bool: 'True or False'}


def _named(members: list[type], value: Any, where: str) -> type:
  """Return the dataclass of a section: the only member of its union, or the one of its `name`."""
  if len(members) == 1:
    return members[0]
  if type(value) in members:
    return type(value)
  table = {member.name: member for member in members}
  name = value.get('name') if isinstance(value, Mapping) else value
  if not isinstance(name, str) or name not in table:
    raise ValueError(f'{where}.name: expected one of {", ".join(table)}, found {name!r}')
  return table[name]
