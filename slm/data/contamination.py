"""Training files compared with evaluation items, and written again without rows: the tasks.

Every task reads one training file, as a stream, and writes one file; `slm.data.decontaminate` runs
them in processes or under Apache Beam.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from slm.base import files
from slm.data import overlap, sources

Path = pathlib.Path
FIELDS = (
  'messages', 'prompt', 'question', 'query', 'instruction', 'problem', 'context',
  'context_options', 'text',
)  # fmt: skip
TURNS = ('user', 'all')
KINDS = ('overlap', 'equal', 'masked')  # of what is found; masked: with numbers masked alone
_IDS = ('id', 'key')  # fields that name an item
_BATCH = 1 << 20  # characters of documents compared at once
_EXCERPT = 200  # characters of a span that are shown


class Source(NamedTuple):
  """A file of a training set or of an evaluation."""

  set: str
  path: str
  fields: tuple[str, ...]  # (): the first of FIELDS that a row has


class Item(NamedTuple):
  """An item of an evaluation."""

  evaluation: str
  id: str
  texts: dict[str, str]  # by field

  @property
  def short(self) -> bool:
    """Return whether no field has 8 tokens."""
    return all(len(overlap.tokens(text)) < overlap.NGRAM for text in self.texts.values())


class Document(NamedTuple):
  """A text of a training row."""

  line: int
  field: str
  text: str


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is compared, and how."""

  turns: str = 'user'  # of messages
  combine: str = 'mean'  # of the scores of an item's fields
  strip: str = ''  # regular expression of what is left out of items
  mask_numbers: bool = False  # compare a second time, with all numbers alike

  def __post_init__(self) -> None:
    with files.reading(f'--strip={self.strip}', 'a regular expression'):
      re.compile(self.strip)


@dataclasses.dataclass(frozen=True)
class Scan:
  """A task: compare the documents of a training file with all items."""

  out: Path  # .jsonl, a line per match
  source: Source
  evaluations: tuple[Source, ...]
  contents: str  # hash of the evaluations
  rule: Rule
  copy: str = ''  # where the training file is read, if not at its own path


@dataclasses.dataclass(frozen=True)
class Clean:
  """A task: write a training file again without some rows."""

  folder: Path  # of the summary
  name: str  # of the file to write, seen from there
  source: Source
  dropped: frozenset[int]  # lines, from 1
  copy: str = ''


def items(evaluations: Iterable[Source], rule: Rule) -> list[Item]:
  """Read the items of evaluations.

  Raises:
    ValueError: if a file holds none, or a row lacks the text.
  """
  found, seen, strip = [], set(), re.compile(rule.strip)
  for source in evaluations:
    before = len(found)
    for line, record in _rows(source.path):
      where = f'{source.path}:{line}'
      texts = _texts(record, where, source.fields, rule.turns)
      if rule.strip:
        texts = {field: strip.sub('', text) for field, text in texts.items()}
      name = str(next((record[key] for key in _IDS if key in record), line))
      if (source.set, name) in seen:
        name = f'{name} ({where})'
      seen.add((source.set, name))
      found.append(Item(source.set, name, texts))
    if len(found) == before:
      raise ValueError(f'{source.path}: expected items of {source.set}, found none')
  return found


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yield the rows of a file with the lines at which they begin; those of text are documents."""
  if is_text(path):
    line = 1
    for text, _ in sources.read(path, 'text', ''):
      yield line, {'text': text}
      line += text.count('\n')
  else:
    yield from sources.records(path)


def is_text(path: str) -> bool:
  """Return whether a file is text, and not JSON lines."""
  return bool(re.search(r'\.txt(\.gz|\.zst)?$', path))


def _texts(
  record: Mapping[str, Any], where: str, fields: Sequence[str], turns: str
) -> dict[str, str]:
  """Return the texts of a row by field, such as prompt, or messages[0] of a list."""
  there = ', '.join(sorted(record))
  names = fields or [field for field in FIELDS if field in record][:1]
  if not names:
    raise ValueError(f'{where}: no field with text; name it, as FILE:FIELD, of {there}')
  texts = {}
  for name in names:
    if name not in record:
      raise ValueError(f'{where}: no field {name!r}; the line has {there}')
    value = record[name]
    if isinstance(value, str):
      texts[name] = value
    elif isinstance(value, list):
      texts |= {
        f'{name}[{i}]': text
        for i, part in enumerate(value)
        if (text := _part(part, f'{where}: {name}[{i}]', turns)) is not None
      }
    else:
      raise ValueError(f'{where}: field {name!r} is {type(value).__name__}, expected text')
  return texts


def _part(part: Any, where: str, turns: str) -> str | None:
  """Return the text of an element of a list; None if it is a turn that is left out."""
  if isinstance(part, str):
    return part
  if not isinstance(part, Mapping) or 'role' not in part:
    raise ValueError(f'{where}: expected text, or a message with role and content')
  if turns == 'user' and part['role'] != 'user':
    return None
  content = part.get('content')
  if content is None or isinstance(content, str):  # None: a call of tools alone
    return content
  if not isinstance(content, list):
    raise ValueError(f'{where}: content is {type(content).__name__}, expected text')
  texts = [x.get('text') for x in content if isinstance(x, dict)]
  return '\n'.join(text for text in texts if isinstance(text, str))


@functools.lru_cache(1)
def _indexes(
  evaluations: tuple[Source, ...], contents: str, rule: Rule
) -> tuple[list[Item], dict[bool, overlap.Index]]:
  """Return all items, and an index of them by whether numbers are masked; once per process."""
  del contents  # other items may have been in these files before
  found = items(evaluations, rule)
  texts = [list(item.texts.values()) for item in found]
  masks = (False, True) if rule.mask_numbers else (False,)
  return found, {mask: overlap.Index(texts, rule.combine, mask) for mask in masks}


def scan(task: Scan) -> dict[str, Any]:
  """Write what a training file shares with the items; return how much was read."""
  counts = Counter(rows=0, documents=0, characters=0)

  def lines() -> Iterator[bytes]:
    for batch in _batches(_documents(task, counts)):
      for match in _matches(batch, task):
        yield json.dumps(match).encode() + b'\n'

  sources.write_lines(task.out, lines())
  return {'files': [task.out.name], **counts}


def _documents(task: Scan, counts: Counter) -> Iterator[Document]:
  for line, record in _rows(task.copy or task.source.path):
    where = f'{task.source.path}:{line}'
    texts = _texts(record, where, task.source.fields, task.rule.turns)
    counts.update(rows=1, documents=len(texts), characters=sum(map(len, texts.values())))
    yield from (Document(line, field, text) for field, text in texts.items())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += len(document.text)
    if size >= _BATCH:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _matches(batch: Sequence[Document], task: Scan) -> Iterator[dict[str, Any]]:
  """Yield what some documents share with the items, a record for each document and item."""
  found, indexes = _indexes(task.evaluations, task.contents, task.rule)
  texts = [document.text for document in batch]
  exact = set()
  for masked, index in indexes.items():
    for match in index.match(texts):
      pair = match.document, match.item
      if masked and pair in exact:
        continue
      exact.add(pair)
      document, item = batch[match.document], found[match.item]
      yield {
        'kind': 'masked' if masked else 'equal' if match.short else 'overlap',
        'evaluation': item.evaluation,
        'item': item.id,
        'file': task.source.path,
        'line': document.line,
        'field': document.field,
        'score': match.score,
        'spans': [_span(span, item, masked) for span in match.spans],
      }


def _span(span: overlap.Span, item: Item, masked: bool) -> dict[str, Any]:
  """Describe a span: tokens of the item's field, of the document, and the item's words there."""
  field = list(item.texts)[span.field]
  text = overlap.excerpt(item.texts[field], span.start, span.end, masked)
  return {
    'item_field': field,
    'item_tokens': [span.start, span.end],
    'training_token': span.at,
    'text': text if len(text) <= _EXCERPT else f'{text[:_EXCERPT]} [...]',
  }


def clean(task: Clean) -> dict[str, Any]:
  """Write a training file without some rows, the others byte for byte; return the counts."""
  counts = Counter(kept=0, dropped=0)

  def lines() -> Iterator[bytes]:
    for number, line in enumerate(sources.raw_lines(task.copy or task.source.path), 1):
      out = number in task.dropped
      counts['dropped' if out else 'kept'] += bool(out or line.strip())
      if not out:
        yield line

  sources.write_lines(task.folder / task.name, lines())
  return {'files': [task.name], **counts}
