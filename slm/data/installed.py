"""Text that every installation of slm holds: docstrings, descriptions and licences.

It comes from Python itself and from what slm requires, directly or not, so that other packages
in the same environment change nothing.

`python:docs` gives one document per module (its docstrings under its dotted name) and one per
package description; `python:licences` gives what differs between licence texts, in pieces of about
4,000 characters. No paragraph occurs twice, but a file's pieces may fall in different splits.
`?max_mb=12` stops at that many megabytes, shared evenly over the packages.
"""

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import pathlib
import pydoc_data.topics
import re
import sys
import sysconfig
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from slm.base import console

_SKIP = {'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', '__pycache__'}
_SHORTEST = 200  # characters
_LICENCE = 4000  # characters per licence document
_LARGEST_FILE = 1 << 20  # bytes; larger modules are tables, not prose
_NAMES = re.compile(r'^(licen[cs]es?|copying|notice|unlicense|eula)', re.IGNORECASE)
_PYTHON = 'python'

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


def read(spec: str, parallel_map: Map) -> Iterator[str]:
  """Yield the documents of a `python:` spec in a fixed order."""
  name, _, query = spec.removeprefix('python:').partition('?')
  options = dict(urllib.parse.parse_qsl(query))
  limit = options.pop('max_mb', '0')
  readers = {'docs': _docs, 'licences': _licences}
  if name not in readers or options or not re.fullmatch(r'\d+(\.\d+)?', limit):
    raise ValueError(
      f'{spec}: expected python:docs or python:licences, with ?max_mb=NUMBER if wanted'
    )
  yield from readers[name](int(float(limit) * 1e6), parallel_map)


def _docs(limit: int, parallel_map: Map) -> Iterator[str]:
  names = [_PYTHON, *_distributions()]
  packages = []
  with console.progress('installed packages', len(names), 'package') as bar:
    # A scan stops early inside a large package: at a twelfth of all, or its even share.
    most = limit // min(12, len(names))
    for texts in parallel_map(functools.partial(_package, limit=most), names):
      packages.append(texts)
      bar.update(1, megabytes=sum(sum(map(len, t)) for t in packages) / 1e6)
  share = _share([sum(map(len, texts)) for texts in packages], limit)
  for texts in packages:
    used = 0
    for text in texts:
      used += len(text)
      if limit and used > share:
        break
      yield text


def _share(sizes: Sequence[int], limit: int) -> int:
  """Find the cap per package at which packages cut to the cap give `limit` in all."""
  left = limit
  for i, size in enumerate(sorted(sizes)):
    if size * (len(sizes) - i) > left:
      return left // (len(sizes) - i)
    left -= size
  return limit


def fingerprint() -> str:
  """Hash the names and versions of what the text is taken from."""
  versions = [f'{name}=={importlib.metadata.version(name)}' for name in _distributions()]
  return hashlib.sha256('\n'.join([sys.version, *versions]).encode()).hexdigest()


def _distributions() -> list[str]:
  return closure(_requirements())


def _requirements() -> list[str]:
  """List slm's own requirements, as installed or (in a checkout) from requirements.txt."""
  try:
    return importlib.metadata.requires('slm') or []
  except importlib.metadata.PackageNotFoundError:
    path = pathlib.Path(__file__).parents[2] / 'requirements.txt'
    if not path.exists():
      raise FileNotFoundError(
        f'{path}: not found, and slm is not installed, so what it requires is not known'
      ) from None
    lines = (line.partition('#')[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def closure(requirements: Sequence[str]) -> list[str]:
  """List the installed packages that requirements lead to, without extras, by name."""
  found: dict[str, str] = {}
  todo = list(requirements)
  while todo:
    requirement = Requirement(todo.pop())
    key = canonicalize_name(requirement.name)
    if key in found or (requirement.marker and not requirement.marker.evaluate({'extra': ''})):
      continue
    try:
      distribution = importlib.metadata.distribution(requirement.name)
    except importlib.metadata.PackageNotFoundError:
      continue  # whether the pins are installed is pip's affair
    found[key] = distribution.metadata['Name']
    todo += distribution.requires or []
  return [found[key] for key in sorted(found)]


def _package(name: str, limit: int) -> list[str]:
  texts, size = [], 0
  for text in _standard_library() if name == _PYTHON else _distribution(name):
    if len(text) >= _SHORTEST:
      # Lone surrogates are legal in Python literals and illegal in UTF-8.
      texts.append(text.encode('utf-8', 'replace').decode())
      size += len(text)
    if limit and size > limit:
      break
  return texts


def _standard_library() -> Iterator[str]:
  for topic in sorted(pydoc_data.topics.topics):
    yield pydoc_data.topics.topics[topic].strip()
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  for path in sorted(root.rglob('*.py')):
    relative = path.relative_to(root)
    if not _SKIP.intersection(relative.parts):
      yield _module(path, relative)


def _distribution(name: str) -> Iterator[str]:
  distribution = importlib.metadata.distribution(name)
  description = distribution.metadata.get_payload() or distribution.metadata['Description'] or ''
  yield f'{name}\n\n{inspect.cleandoc(description)}'
  for file in sorted(distribution.files or (), key=str):
    if file.suffix == '.py' and not _SKIP.intersection(file.parts):
      yield _module(pathlib.Path(distribution.locate_file(file)), pathlib.Path(file))


def _module(path: pathlib.Path, relative: pathlib.Path) -> str:
  """Join the docstrings of one module; '' when there are none or it cannot be parsed."""
  try:
    source = path.read_bytes()
    if len(source) > _LARGEST_FILE:
      return ''
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # invalid escapes in other people's strings
      tree = ast.parse(source)
  except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
    return ''  # templates and old syntax are installed as .py files too
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
  texts = [text for text in found if text]
  parts = relative.with_suffix('').parts
  name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
  return '\n\n'.join([name, *texts]) if texts else ''


def _licences(limit: int, parallel_map: Map) -> Iterator[str]:
  del parallel_map  # a few hundred small files
  seen: set[str] = set()
  used = 0
  for path in _licence_files():
    for text in _documents(_new_paragraphs(path, seen)):
      used += len(text)
      if limit and used > limit:
        return
      yield text


def _licence_files() -> Iterator[pathlib.Path]:
  # Where Python keeps its own licence depends on how it was built.
  stdlib = pathlib.Path(sysconfig.get_paths()['stdlib'])
  for path in (stdlib / 'LICENSE.txt', pathlib.Path(sys.base_prefix) / 'LICENSE.txt'):
    if path.is_file():
      yield path
      break
  for name in _distributions():
    distribution = importlib.metadata.distribution(name)
    for file in sorted(distribution.files or (), key=str):
      inside = {'licenses', 'licences'}.intersection(part.lower() for part in file.parts[:-1])
      if (_NAMES.match(file.name) or inside) and file.suffix not in ('.py', '.pyc', '.so'):
        path = pathlib.Path(distribution.locate_file(file))
        if path.is_file():
          yield path


def _new_paragraphs(path: pathlib.Path, seen: set[str]) -> list[str]:
  """Return the paragraphs that no earlier licence had, up to case and white space."""
  kept = []
  for paragraph in re.split(r'\n[ \t]*\n', path.read_text('utf-8', 'replace')):
    key = ' '.join(paragraph.lower().split())
    if key and key not in seen:
      seen.add(key)
      kept.append(paragraph.strip('\n'))
  return kept


def _documents(paragraphs: Sequence[str]) -> Iterator[str]:
  held: list[str] = []
  for paragraph in [*paragraphs, '']:
    if held and (not paragraph or sum(map(len, held)) + len(paragraph) > _LICENCE):
      text = '\n\n'.join(held)
      if len(text) >= _SHORTEST:
        yield text
      held = []
    held.append(paragraph)
