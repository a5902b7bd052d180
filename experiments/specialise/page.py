"""The page of a study: the answer, the main tables, plots, then everything behind them."""

import os
from pathlib import Path
from typing import Any

from experiments.specialise.cells import Comparison
from experiments.specialise.plots import styles
from experiments.specialise.study import Study
from slm.reporting import page
from slm.reporting.figures import Plot
from slm.reporting.tables import Table, count
from slm.runs import rundir


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
  main = ''.join(f'<p class="note">{page.escape(note)}</p>' for note in notes)
  for size, first, second in main_tables:
    main += f'<h3>{page.escape(size)} tokens of domain text</h3>{page.table(first, keys)}'
    if second is not None:
      main += f'<p class="note">{page.escape(domain_note)}</p>{page.table(second, keys)}'
  figures = ''.join(map(page.figure, plots))
  described = ''.join(
    f'<dt>{page.dot(keys[m["label"]])}{page.escape(m["label"])}</dt><dd>{page.escape(m["describe"])}</dd>'
    for m in study.methods.values()
  )
  paid = ([*r['generic_runs'], *r['specialise_runs'], r['run']] for r in whole.planned)
  environment = page.environment(whole.path / path for paths in paid for path in paths)
  behind = page.sections(sections, keys)
  body = (
    f'<p class="soft">{page.escape(_subtitle(c))}</p><h1>{page.escape(study.title)}</h1>'
    f'<div class="answer">{"".join(f"<p>{page.escape(line)}</p>" for line in advice)}</div>'
    f'<h2>Comparison</h2>{main}'
    f'<h2>Plots</h2>{figures}<h2>How each method works</h2><dl>{described}</dl>{behind}'
    f'<h2>Environment</h2>{page.table(environment, {}, "text")}'
    f'<h2>What differs from the paper</h2>{page.bullets(study.notes)}'
    f'<h2>Runs</h2>{page.table(_runs(whole, out), {}, "text", raw=True)}'
  )
  return page.skeleton(study.title, body)


def _subtitle(c: Comparison) -> str:
  named = ', '.join(t.partition('/')[0] for t in c.tests) or 'none yet'
  absent = [d for d in c.study.domains if not any(t.startswith(f'{d}/') for t in c.tests)]
  text = f'Scale: {c.study.scale}. Domains: {named}.'
  return text + (f' Not run: {", ".join(absent)}.' if absent else '')


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


def _runs(study: Study, out: Path) -> Table:
  """List the run directories behind every cell; linked where the page lies in the study itself.

  A copy of the page elsewhere goes without the runs, so it only names them.
  """

  def link(path: str, name: str) -> str:
    run, _ = rundir.split_ref(study.path / path)
    if not run.exists():
      return f'{page.escape(name)} (not run)'
    if out.resolve() != study.path.resolve():
      return page.escape(name)
    return f'<a href="{page.escape(os.path.relpath(run, out))}/">{page.escape(name)}</a>'

  rows = []
  for (method, on, budget), runs in cells(study).items():
    what = on if isinstance(on, str) else f'{count(on)} tokens'
    at = '' if budget == 1 else f', {budget:.3g} of the pretraining'
    served = [link(r['run'], f'{r["domain"] or study.generic} {r["seed"]}') for r in runs]
    every = [p for r in runs for p in (*r['generic_runs'], *r['specialise_runs'])]
    paid = [link(p, p.removeprefix('runs/')) for p in dict.fromkeys(every)]
    name = f'<span id="{_anchor(method, on, budget)}">{page.escape(study.label(method))}</span>'
    rows.append([name, page.escape(what + at), ', '.join(served), ', '.join(paid)])
  return ['method', 'set', 'serves (domain, seed)', 'paid for'], rows
