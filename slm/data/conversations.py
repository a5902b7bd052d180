"""Conversations, preference pairs and prompts in JSON lines, and how much a mix takes of each.

A source is `PATH[?KEY=VALUE&...]`, and several make a mix: `A?fraction=0.5;B?rows=2000`. Keys are
`fraction` or `rows`, what is taken of it, and names of fields as in settings.ChatConfig. A fraction
above 1, or more rows than there are, take whole copies and then a seeded sample.
"""

import dataclasses
import itertools
import json
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from slm.data import sources
from slm.data.settings import ChatConfig

_NUMBER = '#source='  # after a path: the number of its source in the mix
_FIELDS = [f.name for f in dataclasses.fields(ChatConfig) if f.name not in ('kind', 'template')]


@dataclasses.dataclass(frozen=True)
class Source:
  """A source of a mix; `fraction` and `rows` are None where all is taken."""

  path: str
  chat: ChatConfig
  fraction: float | None = None
  rows: int | None = None


def parse(spec: str, chat: ChatConfig) -> tuple[Source, ...]:
  """Return the sources of a mix.

  Raises:
    ValueError: naming the source, if a key is unknown, or it does not say in one way how much is
      taken.
  """
  items = [item.strip() for item in spec.split(';')]
  return tuple(_source(item, chat, len(items) > 1) for item in items)


def _source(item: str, chat: ChatConfig, mixed: bool) -> Source:
  path, _, query = item.rpartition('?')
  if not path or not re.fullmatch(r'\w+=[^=]*', query.partition('&')[0]):
    path, query = item, ''  # what follows ? is a part of a glob
  options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
  if unknown := options.keys() - {'fraction', 'rows', *_FIELDS}:
    known = ', '.join(['fraction', 'rows', *_FIELDS])
    raise ValueError(f'{path}: has no key {min(unknown)!r}; expected one of {known}')
  fraction, rows = options.pop('fraction', None), options.pop('rows', None)
  if fraction and rows or mixed and not (fraction or rows):
    found = 'both' if rows else 'neither'
    raise ValueError(f'{path}: expected fraction or rows, which say how much of it: found {found}')
  try:
    amounts = float(fraction) if fraction else None, int(rows) if rows else None
  except ValueError:
    amounts = (0.0, 0)
  if any(amount is not None and not 0 < amount < float('inf') for amount in amounts):
    raise ValueError(
      f'{path}: expected fraction, a number above 0, or rows, a whole number above 0; '
      f'found {fraction or rows!r}'
    )
  return Source(path, dataclasses.replace(chat, **options), *amounts)


def expand(spec: str, chat: ChatConfig) -> dict[str, int]:
  """Return the files of a mix, as PATH#source=NUMBER, with their sizes in bytes."""
  return {
    f'{path}{_NUMBER}{number}': size
    for number, source in enumerate(parse(spec, chat))
    for path, size in sources.expand(source.path).items()
  }


def file(path: str) -> str:
  """Return the file that `expand` named."""
  return path.rpartition(_NUMBER)[0] or path


def number(path: str) -> int:
  """Return the number of the source of a file that `expand` named."""
  return int(path.rpartition(_NUMBER)[2])


def read(path: str, spec: str, chat: ChatConfig, id_field: str) -> Iterator[tuple[str, str]]:
  """Yield the documents of a file that `expand` named: JSON, and an id.

  Without `id_field` the id is what comes before the first answer, so that lines that ask the same
  are held out together. A document has `messages`, or a `prompt` (messages) with `chosen` and
  `rejected` (messages) or with `verifiers`, as well as `tools` and `weight` where the source has
  them.

  Raises:
    ValueError: naming the line, if a field is missing or holds something else.
  """
  source = parse(spec, chat)[number(path)].chat
  for line, record in sources.records(file(path)):
    where = f'{file(path)}:{line}'
    document = _KINDS[source.kind](where, record, source)
    if tools := record.get(source.tools):
      document['tools'] = tools
    if source.weight:
      document['weight'] = _weight(where, record, source.weight)
    if id_field and id_field not in record:
      raise ValueError(f'{where}: no field {id_field!r}; the line has {_names(record)}')
    # JSON can hold lone surrogates, which UTF-8 cannot: they become '?'.
    text = json.dumps(document, ensure_ascii=False).encode('utf-8', 'replace').decode()
    yield text, str(record[id_field]) if id_field else _asked(document)


def _asked(document: Mapping[str, Any]) -> str:
  """Return the messages before the first answer of a document as JSON, '' if there are none."""
  first = lambda: itertools.takewhile(lambda m: m['role'] != 'assistant', document['messages'])
  found = document.get('prompt') or [*first()]
  return json.dumps(found) if found else ''


def whole(spec: str) -> Source:
  """Return the source of prompts that is all of a specification, and is taken whole.

  Raises:
    ValueError: if there are several, or it says how much of it is taken.
  """
  source, *others = parse(spec, ChatConfig('prompts'))
  if others or source.fraction or source.rows:
    raise ValueError(f'{spec}: expected one source of prompts, without fraction and rows')
  return source


def asked(spec: str) -> Iterator[list[dict[str, Any]]]:
  """Yield what each line of a source asks: messages, of which the last is the user's.

  The answer to it, if the line has one, is left out.

  Raises:
    ValueError: as `whole`; or naming the line, if a field is missing or the last message is not a
      user's text.
  """
  source = whole(spec)
  for path in sources.expand(source.path):
    for line, record in sources.records(path):
      where = f'{path}:{line}'
      found = _prompt(where, record, source.chat)
      if len(found) > 1 and found[-1]['role'] == 'assistant':
        found = found[:-1]
      if found[-1]['role'] != 'user' or not found[-1]['content']:
        raise ValueError(f'{where}: expected text of a user last, found {str(found[-1])[:60]}')
      yield found


def dialogue(text: str) -> list[tuple[str, str]]:
  """Return (role, text) of a message, or of those of a dialogue of `Human:` and `Assistant:`."""
  if not text.startswith('Human: '):
    return [('user', text)]
  _, *parts = re.split(r'(?:^|\n\n)(Human|Assistant): ', text)
  roles = [{'Human': 'user', 'Assistant': 'assistant'}[name] for name in parts[::2]]
  return list(zip(roles, parts[1::2], strict=True))


def _names(record: Mapping[str, Any]) -> str:
  return ', '.join(sorted(record))


def _weight(where: str, record: Mapping[str, Any], field: str) -> float:
  value = record.get(field)
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
    raise ValueError(f'{where}: field {field!r}: expected a weight of at least 0, found {value!r}')
  return float(value)


def _messages(where: str, field: str, value: Any, role: str) -> list[dict[str, Any]]:
  """Return messages: a list of them, one, or the text of one of a role."""
  if isinstance(value, str):
    return [{'role': role, 'content': value}]
  found = [value] if isinstance(value, dict) else value
  good = lambda m: (
    isinstance(m, dict)
    and isinstance(m.get('role'), str)
    and isinstance(m.get('content'), str | None)
  )
  if not isinstance(found, list) or not found or not all(map(good, found)):
    raise ValueError(
      f'{where}: field {field!r}: expected text, or messages with a role and a text as content, '
      f'found {str(value)[:60]}'
    )
  return found


def _field(where: str, record: Mapping[str, Any], field: str) -> Any:
  if field not in record:
    raise ValueError(f'{where}: no field {field!r}; the line has {_names(record)}')
  return record[field]


def _prompt(where: str, record: Mapping[str, Any], c: ChatConfig) -> list[dict[str, Any]]:
  field = c.messages if c.messages in record and c.prompt not in record else c.prompt
  return _messages(where, field, _field(where, record, field), 'user')


def _conversation(where: str, record: Mapping[str, Any], c: ChatConfig) -> dict[str, Any]:
  if c.messages in record:
    return {'messages': _messages(where, c.messages, record[c.messages], 'user')}
  for field in (c.prompt, c.response):
    if field not in record:
      raise ValueError(
        f'{where}: expected the field {c.messages!r}, or {c.prompt!r} and {c.response!r}; '
        f'the line has {_names(record)}'
      )
  answer = _messages(where, c.response, record[c.response], 'assistant')
  return {'messages': _messages(where, c.prompt, record[c.prompt], 'user') + answer}


def _pair(where: str, record: Mapping[str, Any], c: ChatConfig) -> dict[str, Any]:
  fields = (c.chosen, c.rejected)
  answers = [_messages(where, f, _field(where, record, f), 'assistant') for f in fields]
  if c.prompt in record:
    prompt = _messages(where, c.prompt, record[c.prompt], 'user')
  else:  # both answers repeat it
    begun = zip(*(answer[:-1] for answer in answers), strict=False)
    prompt = [first for first, _ in itertools.takewhile(lambda both: both[0] == both[1], begun)]
  if not prompt:
    raise ValueError(f'{where}: expected the field {c.prompt!r}, or answers that repeat the prompt')
  n = len(prompt)
  repeats = lambda answer: answer[:n] == prompt and len(answer) > n
  answers = [answer[n:] if repeats(answer) else answer for answer in answers]
  return {'prompt': prompt, 'chosen': answers[0], 'rejected': answers[1]}


def _labelled(where: str, record: Mapping[str, Any], c: ChatConfig) -> dict[str, Any]:
  label = _field(where, record, c.label)
  ids = c.verifier_id or _field(where, record, c.verifier)
  if isinstance(ids, str):
    ids, label = [ids], [label]
  fits = isinstance(ids, list) and isinstance(label, list) and len(ids) == len(label)
  if not fits or not ids or not all(isinstance(i, str) and i for i in ids):
    raise ValueError(
      f'{where}: expected the id of a verifier in {c.verifier!r} and its arguments in {c.label!r}, '
      'or as many of both in lists'
    )
  verifiers = [{'id': i, 'args': x} for i, x in zip(ids, label, strict=True)]
  return {'prompt': _prompt(where, record, c), 'verifiers': verifiers}


_KINDS = {'conversations': _conversation, 'pairs': _pair, 'prompts': _labelled}
