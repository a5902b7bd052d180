"""Text of every installation of slm: docstrings, package descriptions and licences.

It comes from Python and from the direct and indirect requirements of slm alone, so other packages
in the same environment change nothing.

`python:docs` has a document for every module (its docstrings under its dotted name) and every
package description. `python:licences` has the paragraphs of licences, each once, in documents of
about 4,000 characters; those of one file may fall in different splits. `?max_mb=12` limits the text
to that many megabytes, shared evenly between packages.
"""

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import math
import pathlib
import pydoc_data.topics
import re
import sys
import sysconfig
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from slm.base import console

_SKIP = {'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', '__pycache__'}
_SHORTEST = 200  # characters in a document
_LICENCE = 4000  # characters in a document of licences
_LARGEST_FILE = 1 << 20  # bytes; larger modules are tables, not prose
_LICENCE_NAMES = re.compile(r'^(licen[cs]es?|copying|notice|unlicense|eula)', re.IGNORECASE)
_PYTHON = 'python'

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


def read(spec: str, parallel_map: Map) -> Iterator[str]:
  """Yield the documents of a `python:` spec in a fixed order."""
  name, _, query = spec.removeprefix('python:').partition('?')
  options = dict(urllib.parse.parse_qsl(query))
  megabytes = options.pop('max_mb', '0')
  known = name in ('docs', 'licences') and re.fullmatch(r'\d+(\.\d+)?', megabytes)
  if not known or options:
    raise ValueError(
      f'{spec}: expected python:docs or python:licences, optionally with ?max_mb=NUMBER'
    )
  limit = float(megabytes) * 1e6 or math.inf
  yield from _docs(limit, parallel_map) if name == 'docs' else _up_to(limit, _licences())


def _docs(limit: float, parallel_map: Map) -> Iterator[str]:
  names = [_PYTHON, *_distributions()]
  packages = []
  with console.Progress('installed packages', len(names), 'package') as bar:
    # The scan of a large package stops early, at an even share but at least a twelfth of all.
    cap = limit / min(12, len(names))
    for texts in parallel_map(functools.partial(_package, limit=cap), names):
      packages.append(texts)
      bar.update(1, megabytes=sum(sum(map(len, t)) for t in packages) / 1e6)
  share = _share([sum(map(len, texts)) for texts in packages], limit)
  for texts in packages:
    yield from _up_to(share, texts)


def _up_to(limit: float, texts: Iterable[str]) -> Iterator[str]:
  """Yield texts until they have `limit` characters in all."""
  used = 0
  for text in texts:
    used += len(text)
    if used > limit:
      return
    yield text


def _share(sizes: Sequence[int], limit: float) -> float:
  """Return the largest size per package at which all packages together have `limit`."""
  rest = limit
  for i, size in enumerate(sorted(sizes)):
    if size * (len(sizes) - i) > rest:
      return rest / (len(sizes) - i)
    rest -= size
  return limit


def fingerprint() -> str:
  """Hash the names and versions of Python and the packages that the text comes from."""
  versions = [f'{name}=={importlib.metadata.version(name)}' for name in _distributions()]
  return hashlib.sha256('\n'.join([sys.version, *versions]).encode()).hexdigest()


def _distributions() -> list[str]:
  return closure(_requirements())


def _requirements() -> list[str]:
  """Return the requirements of slm: as installed, or in a checkout from requirements.txt."""
  try:
    return importlib.metadata.requires('slm') or []
  except importlib.metadata.PackageNotFoundError:
    path = pathlib.Path(__file__).parents[2] / 'requirements.txt'
    if not path.exists():
      raise FileNotFoundError(
        f'{path}: not found, and slm is not installed: its requirements are unknown'
      ) from None
    lines = (line.partition('#')[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def closure(requirements: Sequence[str]) -> list[str]:
  """Return the installed packages that requirements need directly or not, by name, no extras."""
  names: dict[str, str] = {}
  queue = list(requirements)
  while queue:
    requirement = Requirement(queue.pop())
    key = canonicalize_name(requirement.name)
    if key in names or (requirement.marker and not requirement.marker.evaluate({'extra': ''})):
      continue
    try:
      distribution = importlib.metadata.distribution(requirement.name)
    except importlib.metadata.PackageNotFoundError:
      continue
    names[key] = distribution.metadata['Name']
    queue += distribution.requires or []
  return [names[key] for key in sorted(names)]


def _package(name: str, limit: float) -> list[str]:
  texts, size = [], 0
  for text in _standard_library() if name == _PYTHON else _distribution(name):
    if len(text) >= _SHORTEST:
      # Lone surrogates are legal in Python literals and illegal in UTF-8.
      texts.append(text.encode('utf-8', 'replace').decode())
      size += len(text)
    if size > limit:
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
  """Join the docstrings of a module; '' if it has none or cannot be parsed."""
  try:
    source = path.read_bytes()
    if len(source) > _LARGEST_FILE:
      return ''
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # invalid escapes in strings
      tree = ast.parse(source)
  except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
    return ''  # installed .py files include templates and old syntax
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
  texts = list(filter(None, map(ast.get_docstring, nodes)))
  parts = relative.with_suffix('').parts
  name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
  return '\n\n'.join([name, *texts]) if texts else ''


def _licences() -> Iterator[str]:
  seen: set[str] = set()
  for path in _licence_files():
    yield from _join(_new_paragraphs(path, seen))


def _licence_files() -> Iterator[pathlib.Path]:
  # The place of Python's own licence depends on how Python was built.
  stdlib = pathlib.Path(sysconfig.get_paths()['stdlib'])
  for path in (stdlib / 'LICENSE.txt', pathlib.Path(sys.base_prefix) / 'LICENSE.txt'):
    if path.is_file():
      yield path
      break
  for name in _distributions():
    distribution = importlib.metadata.distribution(name)
    for file in sorted(distribution.files or (), key=str):
      inside = {'licenses', 'licences'}.intersection(part.lower() for part in file.parts[:-1])
      named = inside or _LICENCE_NAMES.match(file.name)
      if named and file.suffix not in ('.py', '.pyc', '.so'):
        path = pathlib.Path(distribution.locate_file(file))
        if path.is_file():
          yield path


def _new_paragraphs(path: pathlib.Path, seen: set[str]) -> list[str]:
  """Return the paragraphs of a licence that are not in `seen`, ignoring case and white space."""
  new = []
  for paragraph in re.split(r'\n[ \t]*\n', path.read_text('utf-8', 'replace')):
    key = ' '.join(paragraph.lower().split())
    if key and key not in seen:
      seen.add(key)
      new.append(paragraph.strip('\n'))
  return new


def _join(paragraphs: Sequence[str]) -> Iterator[str]:
  """Join paragraphs into documents of about _LICENCE characters."""
  document: list[str] = []
  for paragraph in [*paragraphs, '']:
    if document and (not paragraph or sum(map(len, document)) + len(paragraph) > _LICENCE):
      text = '\n\n'.join(document)
      if len(text) >= _SHORTEST:
        yield text
      document = []
    document.append(paragraph)
