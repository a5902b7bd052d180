"""HTML reports: one file without external resources, for light and dark displays."""

import html
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slm.reporting.figures import INK, Plot
from slm.reporting.tables import Table, kind
from slm.runs import rundir

_LINK = re.compile(r'\[([^][]+)\]\(report\.html(#[\w.-]+)\)')
_VERDICTS = {'better': 'better', 'worse': 'worse', 'within noise': 'noise'}
_CSS = """
:root { color-scheme: light dark; --ink: #1d2027; --soft: #5c6370; --line: #d9dce2;
  --page: #fff; --panel: #f5f6f8; --better: #00704f; --worse: #b34700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #a2a9b6; --line: #3a3f49;
  --page: #16181d; --panel: #1f2229; --better: #3ecb9b; --worse: #ff9657; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .2rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p, li, dd { max-width: 46rem; }
.soft, figcaption, .note { color: var(--soft); font-size: .92rem; }
.answer { background: var(--panel); border-left: 4px solid var(--ink); padding: .9rem 1.1rem;
  max-width: 52rem; }
.answer p { margin: .4rem 0; max-width: none; }
.answer p:first-child { font-size: 1.15rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .45rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--page); }
.text td, .text th { text-align: left; white-space: normal; vertical-align: top; }
tr.reference { background: var(--panel); } tr.reference td:first-child { background: var(--panel); }
.better { color: var(--better); font-weight: 600; } .worse { color: var(--worse); }
.noise, .missing { color: var(--soft); }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
figure { margin: 1.2rem 0 2rem; }
figure svg { max-width: 100%; min-width: 30rem; height: auto; }
dt { font-weight: 600; margin-top: .7rem; } dd { margin: 0; }
a { color: inherit; } code { font-size: .9em; }
"""


def document(
  title: str, answer: list[str], parts: list[tuple[str, str, Table]], plots: list[Plot]
) -> str:
  """Build a page from an answer, (title, note, table) parts, and plots."""
  body = f'<h1>{escape(title)}</h1><div class="answer">'
  body += ''.join(f'<p>{escape(line)}</p>' for line in answer) + '</div>'
  body += sections(parts[:1], {}) + f'<h2>Plots</h2>{"".join(map(figure, plots))}'
  return skeleton(title, body + sections(parts[1:], {}))


def skeleton(title: str, body: str) -> str:
  """Wrap a body as a complete HTML file."""
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body>{body}</body></html>\n'
  )


def figure(p: Plot) -> str:
  """Build a plot with its title and caption."""
  return (
    f'<figure id="plot-{p.name}"><h3>{escape(p.title)}</h3><div class="scroll">{p.inline}</div>'
    f'<figcaption>{escape(p.caption)}</figcaption></figure>'
  )


def sections(parts: Iterable[tuple[str, str, Table]], keys: dict[str, str]) -> str:
  """Build every table that has rows, under its title and note."""
  return ''.join(
    f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{table(value, keys, kind(value))}'
    for title, note, value in parts
    if value[1]
  )


def table(value: Table, keys: dict[str, str], kind: str = '', raw: bool = False) -> str:
  """Build a table that scrolls sideways; `keys` gives row labels their colours.

  raw: cells are HTML already.
  """
  head, rows = value
  names = ''.join(f'<th>{escape(name)}</th>' for name in head)
  lines = ''.join(_row(row, keys, raw) for row in rows)
  return (
    f'<div class="scroll"><table class="{kind}"><thead><tr>{names}</tr></thead>'
    f'<tbody>{lines}</tbody></table></div>'
  )


def _row(row: list[str], keys: dict[str, str], raw: bool) -> str:
  cells = []
  for i, value in enumerate(row):
    style = _VERDICTS[value] if value in _VERDICTS else 'missing' * value.endswith('run')
    shown = value if raw else _rich(value)
    key = dot(keys[value]) if i == 0 and value in keys else ''
    cells.append(f'<td class="{style}">{key}{shown}</td>' if style else f'<td>{key}{shown}</td>')
  start = '<tr class="reference">' if 'reference' in row else '<tr>'
  return f'{start}{"".join(cells)}</tr>'


def dot(color: str) -> str:
  """Build the coloured dot before a label."""
  shown = 'currentColor' if color == INK else color
  return f'<span class="key" style="background:{shown}"></span>'


def _rich(value: str) -> str:
  """Escape text, except for line breaks and links to the page's own anchors."""
  return _LINK.sub(r'<a href="\2">\1</a>', escape(value)).replace('&lt;br&gt;', '<br>')


def escape(value: str) -> str:
  """Escape text."""
  return html.escape(str(value))


def bullets(items: Iterable[str]) -> str:
  """Build a list of sentences."""
  return f'<ul>{"".join(f"<li>{escape(x)}</li>" for x in items)}</ul>'


def environment(runs: Iterable[Path]) -> Table:
  """Build a table of the distinct environments that runs were made in."""
  known: list[dict[str, Any]] = []
  for path in dict.fromkeys(runs):
    for start in rundir.read_starts(rundir.split_ref(path)[0]):
      if start['environment'] not in known:
        known.append(start['environment'])
  rows = []
  for key, value in itertools.chain.from_iterable(x.items() for x in known):
    if isinstance(value, dict):
      value = ', '.join(f'{name} {version}' for name, version in value.items())
    rows.append([key.replace('_', ' '), str(value)])
  return ['what', 'value'], rows
