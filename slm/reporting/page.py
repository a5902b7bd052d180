"""The HTML of a report: one file, no external resource, light and dark."""

import html
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slm.reporting.advice import count
from slm.reporting.comparison import Comparison
from slm.reporting.plots import INK, Plot, styles
from slm.reporting.study import Study
from slm.runs import rundir

Table = tuple[list[str], list[list[str]]]
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


def render(
  c: Comparison,
  whole: Study,
  advice: list[str],
  notes: list[str],
  main_tables: list[tuple[str, Table, Table | None]],
  domain_note: str,
  plots: list[Plot],
  sections: list[tuple[str, str, Table]],
  out: Path,
) -> str:
  """Build the page: the answer, the main tables, plots, then everything behind them.

  `c` is of the main methods, `whole` the study with every method and budget.
  """
  study = c.study
  keys = {study.label(m): color for m, (color, _) in styles(study.methods).items()}
  main = ''.join(f'<p class="note">{_text(note)}</p>' for note in notes)
  for size, first, second in main_tables:
    main += f'<h3>{_text(size)} tokens of domain text</h3>{table(first, keys)}'
    if second is not None:
      main += f'<p class="note">{_text(domain_note)}</p>{table(second, keys)}'
  figures = ''.join(map(_figure, plots))
  described = ''.join(
    f'<dt>{_key(keys[m["label"]])}{_text(m["label"])}</dt><dd>{_text(m["describe"])}</dd>'
    for m in study.methods.values()
  )
  behind = _sections(sections, keys)
  body = (
    f'<p class="soft">{_text(_subtitle(c))}</p><h1>{_text(study.title)}</h1>'
    f'<div class="answer">{"".join(f"<p>{_text(line)}</p>" for line in advice)}</div>'
    f'<h2>Comparison</h2>{main}'
    f'<h2>Plots</h2>{figures}<h2>How each method works</h2><dl>{described}</dl>{behind}'
    f'<h2>Environment</h2>{table(_environment(whole), {}, "text")}'
    f'<h2>What differs from the paper</h2>{_list(study.notes)}'
    f'<h2>Runs</h2>{table(_runs(whole, out), {}, "text", raw=True)}'
  )
  return _page(study.title, body)


def document(
  title: str, answer: list[str], sections: list[tuple[str, str, Table]], plots: list[Plot]
) -> str:
  """Build a page of an answer, tables with their titles and notes, and plots."""
  body = f'<h1>{_text(title)}</h1><div class="answer">'
  body += ''.join(f'<p>{_text(line)}</p>' for line in answer) + '</div>'
  body += _sections(sections[:1], {}) + f'<h2>Plots</h2>{"".join(map(_figure, plots))}'
  return _page(title, body + _sections(sections[1:], {}))


def _page(title: str, body: str) -> str:
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{_text(title)}</title><style>{_CSS}</style></head>\n<body>{body}</body></html>\n'
  )


def _figure(p: Plot) -> str:
  return (
    f'<figure id="plot-{p.name}"><h3>{_text(p.title)}</h3><div class="scroll">{p.inline}</div>'
    f'<figcaption>{_text(p.caption)}</figcaption></figure>'
  )


def _sections(sections: Iterable[tuple[str, str, Table]], keys: dict[str, str]) -> str:
  return ''.join(
    f'<h2>{_text(title)}</h2><p class="note">{_text(note)}</p>{table(found, keys, kind(found))}'
    for title, note, found in sections
    if found[1]
  )


def _subtitle(c: Comparison) -> str:
  named = ', '.join(t.partition('/')[0] for t in c.tests) or 'none yet'
  absent = [d for d in c.study.domains if not any(t.startswith(f'{d}/') for t in c.tests)]
  text = f'Scale: {c.study.scale}. Domains: {named}.'
  return text + (f' Not run: {", ".join(absent)}.' if absent else '')


def table(found: Table, keys: dict[str, str], kind: str = '', raw: bool = False) -> str:
  """Build a table that scrolls sideways; `keys` gives row labels their colours.

  `raw` cells are HTML already.
  """
  head, rows = found
  names = ''.join(f'<th>{_text(name)}</th>' for name in head)
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
    key = _key(keys[value]) if i == 0 and value in keys else ''
    cells.append(f'<td class="{style}">{key}{shown}</td>' if style else f'<td>{key}{shown}</td>')
  start = '<tr class="reference">' if 'reference' in row else '<tr>'
  return f'{start}{"".join(cells)}</tr>'


def kind(found: Table) -> str:
  """Say 'text' if a table holds sentences rather than numbers, '' if not."""
  return 'text' if any(len(cell) > 60 for row in found[1] for cell in row) else ''


def _key(color: str) -> str:
  # Ink stands for the page's text colour, which depends on light or dark.
  shown = 'currentColor' if color == INK else color
  return f'<span class="key" style="background:{shown}"></span>'


def _rich(value: str) -> str:
  """Escape text, but for line breaks and links to the page's own anchors."""
  return _LINK.sub(r'<a href="\2">\1</a>', _text(value)).replace('&lt;br&gt;', '<br>')


def _text(value: str) -> str:
  return html.escape(str(value))


def _list(items: Iterable[str]) -> str:
  return f'<ul>{"".join(f"<li>{_text(x)}</li>" for x in items)}</ul>'


def evidence(label: str, method: str, on: int | str, budget: float = 1) -> str:
  """Link text to a method's runs on a set size or the generic set, on the page and in table.md."""
  return f'[{label}](report.html#{_anchor(method, on, budget)})'


def _anchor(method: str, on: int | str, budget: float) -> str:
  return f'{method}-{on}-{budget:g}'.replace(' ', '-')


ANY = 'any size'  # where a model that is not fine-tuned stands


def cells(study: Study) -> dict[tuple[str, int | str, float], list[dict[str, Any]]]:
  """Group a study's rows by method, set size (or the generic set) and budget."""
  found: dict[tuple, list[dict[str, Any]]] = {}
  for run in study.planned:
    on = study.generic if run['domain'] is None else run['size'] or ANY
    found.setdefault((run['method'], on, run.get('budget', 1)), []).append(run)
  return found


def _environment(study: Study) -> Table:
  """Show each distinct environment the runs were made in."""
  found: dict[str, dict[str, Any]] = {}
  paid = ([*r['generic_runs'], *r['specialise_runs'], r['run']] for r in study.planned)
  for path in dict.fromkeys(path for paths in paid for path in paths):
    for start in rundir.read_starts(rundir.split_ref(study.path / path)[0]):
      environment = start['environment']
      found[repr(sorted(environment.items()))] = environment
  rows = []
  for environment in found.values():
    for key, value in environment.items():
      shown = ', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value
      rows.append([key.replace('_', ' '), str(shown)])
  return ['what', 'value'], rows


def _runs(study: Study, out: Path) -> Table:
  """List the run directories behind every cell; linked where the page lies in the study itself.

  A copy of the page elsewhere goes without the runs, so it only names them.
  """

  def link(path: str, name: str) -> str:
    run, _ = rundir.split_ref(study.path / path)
    if not run.exists():
      return f'{_text(name)} (not run)'
    if out.resolve() != study.path.resolve():
      return _text(name)
    return f'<a href="{html.escape(os.path.relpath(run, out), quote=True)}/">{_text(name)}</a>'

  rows = []
  for (method, on, budget), runs in cells(study).items():
    what = on if isinstance(on, str) else f'{count(on)} tokens'
    at = '' if budget == 1 else f', {budget:.3g} of the pretraining'
    served = [link(r['run'], f'{r["domain"] or study.generic} {r["seed"]}') for r in runs]
    every = [p for r in runs for p in (*r['generic_runs'], *r['specialise_runs'])]
    paid = [link(p, p.removeprefix('runs/')) for p in dict.fromkeys(every)]
    name = f'<span id="{_anchor(method, on, budget)}">{_text(study.label(method))}</span>'
    rows.append([name, _text(what + at), ', '.join(served), ', '.join(paid)])
  return ['method', 'set', 'serves (domain, seed)', 'paid for'], rows
