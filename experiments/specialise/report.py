"""The report of a study: tables, plots and advice as HTML, Markdown and CSV.

    python -m experiments.specialise.report --study=STUDY

reads STUDY/study.json and the run directories it lists; writes report.html, table.md, results.csv
and plots/*.svg.
"""

import csv
import io
import math
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table
from absl import flags

from experiments.specialise import budgets, cells, page, plots, sweeps
from experiments.specialise.advice import NUM_DOMAINS, advise, listed_cells, unfinished
from experiments.specialise.cells import Cell, Comparison
from experiments.specialise.study import BASELINE, Study, load_study
from slm.base import console, files
from slm.reporting.stats import Difference, Loss
from slm.reporting.tables import Table, cost, count, interval, markdown, number, perplexity

Section = tuple[str, str, Table]  # title, note, table
_NOT_RUN, _NONE = 'not run', '–'
_CSV = (
  'method', 'label', 'kind', 'budget', 'size', 'on', 'domains', 'status', 'loss', 'ppl', 'bpb',
  'reference', 'difference', 'low', 'high', 'verdict', 'seeds', 'loss_by_seed', 'params',
  'generic_tokens', 'generic_flops', 'generic_seconds', 'specialise_tokens', 'specialise_flops',
  'specialise_seconds',
  *(f'total_flops_{n}' for n in NUM_DOMAINS),
)  # fmt: skip


def _average(cell: Cell) -> str:
  """Format a cell's average perplexity, or why there is none."""
  if cell.complete:
    return perplexity(cell.average)
  done = sum(t in cell.losses for t in cell.tests)
  if 0 < done == len(cell.tests):
    return f'no seed on every domain: {_NOT_RUN}'
  return f'{done} of {len(cell.tests)} domains run' if done else _NOT_RUN


def _spread(loss: Loss) -> str:
  values = loss.seeds.values()
  return f'{len(values)}' if len(values) < 2 else f'{len(values)} (±{_half(values):.3f})'


def _half(values: Any) -> float:
  return (max(values) - min(values)) / 2


def main_table(c: Comparison, size: int) -> Table:
  """Build the comparison at one set size, one row per method."""
  above = f'nats/token above {c.study.label(c.study.baseline)}'
  head = ['method', 'perplexity', 'bits/byte', above, 'verdict', 'seeds']
  head += ['served parameters', 'generic FLOPs', 'FLOPs/domain', 'time/domain']
  rows, early = [], unfinished(c)
  for method in c.study.methods:
    cell = c.cells[method, size]
    found, done = c.to_baseline(cell), cell.complete
    bpb = f'{cell.average.bpb:.3f}' if done and not math.isnan(cell.average.bpb) else _NONE
    verdict = 'reference' if method == c.study.baseline else found.verdict if found else _NONE
    params = c.study.params
    rows.append(
      [c.study.label(method), _average(cell) + (' †' if done and (method, size) in early else '')]
      + [bpb, interval(found), verdict if done else _NONE]
      + [_spread(cell.average) if done else _NONE]
      + [count(params[method]) if method in params else _NONE]
      + [cost(cell.generic)[1], *cost(cell.specialise)[1:]]
    )
  return head, rows


def domain_table(c: Comparison, size: int) -> Table | None:
  """Build perplexity and bits per byte on every test set; None if that repeats the main table."""
  names = [*c.tests, *c.others]
  if len(names) < 2:
    return None
  rows = []
  for method in c.study.methods:
    cell, row = c.cells[method, size], [c.study.label(method)]
    for name in names:
      loss, found = cell.losses.get(name), c.to_baseline(cell, name)
      row.append(
        _NOT_RUN if loss is None else f'{perplexity(loss)} ({loss.bpb:.3f})' + _mark(found)
      )
    rows.append(row)
  return ['method', *names], rows


def _mark(d: Difference | None) -> str:
  return '' if d is None else {'better': ' ▼', 'worse': ' ▲', 'within noise': ' ≈'}[d.verdict]


def generic_table(c: Comparison) -> Table:
  """Build the losses on generic text, before any specialisation."""
  rows = [
    [c.study.label(m), perplexity(loss), f'{loss.value:.4f}', f'{loss.bpb:.3f}', _spread(loss)]
    for m, loss in c.generic.items()
  ]
  return ['method', 'perplexity', 'loss, nats/token', 'bits/byte', 'seeds'], rows


def ledger_table(c: Comparison) -> Table:
  """Build what every method cost: once, per domain, and for N domains."""
  head = ['method', 'set size']
  head += [f'{when}: {x}' for when in ('generic', 'per domain') for x in _COST]
  head += [f'FLOPs for N = {n}' for n in NUM_DOMAINS]
  rows = []
  for method in c.study.methods:
    for size in c.study.sizes:
      cell = c.cells[method, size]
      totals = [cell.total(n) for n in NUM_DOMAINS]
      rows.append(
        [c.study.label(method), count(size), *cost(cell.generic), *cost(cell.specialise)]
        + [_NONE if t is None else number(t.flops) for t in totals]
      )
  return head, rows


_COST = ('tokens', 'FLOPs', 'device time')


def cluster_table(c: Comparison) -> Table:
  """Build how concentrated each set is, from the data directory's histograms."""
  head = ['clusters', 'set', 'windows', 'entropy, nats', 'effective clusters', 'effective sample']
  rows = [
    [level, name, count(sum(x['windows'])), f'{x["entropy"]:.2f}']
    + [f'{x["effective_clusters"]:.1f}', f'{x["ess_fraction"]:.3f}', f'{x["top_cluster"]:.1%}']
    for level, sets in plots.histograms(c).items()
    for name, x in sets.items()
  ]
  return [*head, 'share of the most frequent'], rows


def table_md(c: Comparison, advice: list[str], behind: list[Section]) -> str:
  """Write table.md: advice, every table with its notes, and what the methods are."""
  parts = [f'# {c.study.title}', *advice, '## Comparison', *notes(c)]
  for size in c.study.sizes:
    parts += [f'### {count(size)} tokens of domain text', markdown(main_table(c, size))]
    if (second := domain_table(c, size)) is not None:
      parts += [DOMAIN_NOTE, markdown(second)]
  parts += ['## How each method works']
  parts += [''.join(f'- {m["label"]}: {m["describe"]}\n' for m in c.study.methods.values())]
  for title, note, table in behind:
    if table[1]:
      parts += [f'## {title}', note, markdown(table)]
  if c.study.notes:
    parts += ['## What differs from the paper', ''.join(f'- {x}\n' for x in c.study.notes)]
  return '\n\n'.join(part.rstrip() for part in parts) + '\n'


def _written(path: Path) -> list[Section]:
  """Read the tables that the experiment itself wrote to STUDY/sections, if it did."""
  found = [files.read_json(file) for file in sorted((path / 'sections').glob('*.json'))]
  return [(x['title'], x['note'], (x['head'], x['rows'])) for x in found]


def _groups(further: list[Comparison]) -> list[Section]:
  """Build the tables of methods beside the main ones."""
  found = []
  for c in further:
    methods = [m for m in c.study.methods.values() if m.get('group')]
    described = ' '.join(f'{m["label"]}: {m["describe"]}' for m in methods)
    if len(c.tests) < len(c.study.domains):
      described += f' Averages are over {", ".join(t.partition("/")[0] for t in c.tests)} alone.'
    known: list[list[str]] = []
    for size in c.study.sizes:
      head, rows = main_table(c, size)
      rows = [row for row in rows if row[1] != _NOT_RUN]
      # More than the baseline; models that are not tuned are the same at every size.
      if len(rows) > 1 and not all(row in known for row in rows):
        on = f', {count(size)} tokens of domain text' * (c.study.baseline == BASELINE)
        found.append((methods[0]['group'] + on, described, (head, rows)))
        known += rows
  return found


def _budget_sections(found: dict[float, Comparison]) -> list[Section]:
  if len(found) < 2 or not budgets.sizes(found):
    return []
  return [('As pretraining goes on', BUDGET_NOTE, budgets.table(found))]


def sections(c: Comparison) -> list[Section]:
  """List the tables behind the comparison: title, note, table."""
  return [
    ('Cost ledger', LEDGER_NOTE, ledger_table(c)),
    ('Generic text', 'Held-out generic text, before any specialisation.', generic_table(c)),
    ('Clusters', CLUSTER_NOTE, cluster_table(c)),
  ]


def notes(c: Comparison) -> list[str]:
  """Say how to read the main table, what was resampled, and which runs ended too early."""
  found = [MAIN_NOTE, COST_NOTE]
  by_document = [f'{name} {n:,} documents' for name, n in c.documents.items() if n]
  by_row = [name for name, n in c.documents.items() if not n]
  if by_document:
    found.append(
      f'Intervals resample whole documents, since rows of one are alike: {", ".join(by_document)}. '
      'With fewer than about 20 documents they are too narrow.'
    )
  if by_row:
    found.append(
      f'Intervals resample single rows on {", ".join(by_row)}, where the data do not say which of '
      'several documents a row is from: rows of one document are alike, so they are too narrow.'
    )
  if early := listed_cells(c, unfinished(c)):
    found.append(f'† Still improving when it ended (its best step is its last): {early}.')
  return found


MAIN_NOTE = (
  'SLM stands for small language model, the size that may be served, and the plain SLM is one '
  'trained on generic text and fine-tuned; LLM is the larger model beside it. '
  'Perplexity is exp of the loss averaged over domains with equal weight; lower is better. The '
  'difference is to the plain SLM with the same domain text, in nats per token, over the seeds '
  'both have, with its 95 % interval: a paired bootstrap over held-out text and, with two seeds or '
  "more, Student's interval over training runs, added in squares. Better and worse mean that the "
  'interval excludes zero; everything else is within noise. '
  'Seeds: their number and half the range of their losses.'
)
COST_NOTE = (
  'Served parameters are those of the one model that answers. Generic FLOPs are paid once, before '
  'the domain is known; FLOPs/domain and time/domain (devices × time) again for every domain.'
)
DOMAIN_NOTE = (
  'Perplexity (bits per byte) on each test set; ▼ better, ▲ worse, ≈ within noise of the plain SLM '
  'at the same set size.'
)


def results_csv(comparisons: list[Comparison]) -> str:
  """Write every number unrounded: a line per method, size and test set, and for the average."""
  out = io.StringIO()
  writer = csv.DictWriter(out, _CSV, restval='', lineterminator='\n')
  writer.writeheader()
  for c in comparisons:
    budget = {'budget': c.study.budget}
    for cell in c.cells.values():
      if _own(c.study, cell.method):
        writer.writerows(budget | line for line in _lines(c, cell))
    for method, loss in c.generic.items():
      if _own(c.study, method):
        line = _line(c.study, method, '', f'{c.study.generic}/test', loss, None)
        writer.writerow(budget | line)
  return out.getvalue()


def _own(study: Study, method: str) -> bool:
  """Say whether a method stands in a table of its own right, not as the reference of a group."""
  return method != study.baseline or not study.groups


def _lines(c: Comparison, cell: Cell) -> list[dict[str, Any]]:
  """Return a cell's lines: the average, then every test set."""
  average = cell.average if cell.complete else None
  found = [('average', average, c.to_baseline(cell))]
  found += [(t, cell.losses.get(t), c.to_baseline(cell, t)) for t in (*c.tests, *c.others)]
  costs = _cost_keys(cell) | {'domains': len(c.tests)}
  return [_line(c.study, cell.method, cell.size, *x) | costs for x in found]


def _line(
  study: Study, method: str, size: int | str, on: str, loss: Loss | None, d: Difference | None
) -> dict[str, Any]:
  line = {'method': method, 'label': study.label(method), 'kind': study.kind(method) or ''}
  line |= {'size': size, 'on': on, 'status': _NOT_RUN if loss is None else 'run'}
  line |= {'params': study.params[method]} if method in study.params else {}
  if loss is not None:
    line |= {'loss': loss.value, 'ppl': math.exp(loss.value), 'bpb': loss.bpb}
    by_seed = ' '.join(f'{seed}:{x:.4f}' for seed, x in loss.seeds.items())
    line |= {'seeds': len(loss.seeds), 'loss_by_seed': by_seed}
  if d is not None:
    line |= {'reference': study.baseline, 'difference': d.value, 'low': d.low, 'high': d.high}
    line['verdict'] = d.verdict
  return line


def _cost_keys(cell: Cell) -> dict[str, float]:
  found = {}
  for name, value in (('generic', cell.generic), ('specialise', cell.specialise)):
    if value is not None:
      found |= {f'{name}_tokens': value.tokens, f'{name}_flops': value.flops}
      found[f'{name}_seconds'] = value.seconds
  totals = {n: cell.total(n) for n in NUM_DOMAINS}
  return found | {f'total_flops_{n}': t.flops for n, t in totals.items() if t is not None}


def show(c: Comparison, advice: list[str]) -> None:
  """Print the comparison and the advice."""
  terminal = rich.console.Console()
  if not terminal.is_terminal:
    terminal = rich.console.Console(width=120)
  for size in c.study.sizes:
    head, rows = main_table(c, size)
    title = f'{c.study.title}: {count(size)} tokens of domain text'
    table = rich.table.Table(title=title, box=rich.box.SIMPLE, title_justify='left')
    for i in _SHOWN:
      name = head[i].replace('served ', 'served\n')
      table.add_column(name, justify='right' if i else 'left', no_wrap=i > 0)
    for row in rows:
      table.add_row(*(row[i] for i in _SHOWN), style=_RICH.get(row[4]))
    terminal.print(table)
  for sentence in advice:
    terminal.print(sentence, highlight=False, markup=False, soft_wrap=True)


_SHOWN = (0, 1, 3, 4, 6, 7, 8)  # the columns that fit a terminal
_RICH = {'better': 'green', 'worse': 'red', 'reference': 'bold'}


def report(study_path: str | Path, out: str | Path = '') -> list[str]:
  """Write and print the report of a study; returns the advice.

  Raises:
    ValueError: if study.json or a run it lists is broken, naming it.
  """
  whole = load_study(Path(study_path))
  study, out = whole.only(), Path(out) if out else whole.path
  c, found = cells.compare(study), budgets.by_budget(whole)
  advice, drawn = advise(c), plots.plots(c)
  further = [cells.compare(whole.only(group)) for group in whole.groups]
  more = budgets.plot(found), sweeps.plot(whole, [c, *further])
  drawn[2:2] = [p for p in more if p is not None]
  behind = [*_written(whole.path), *_groups(further), *_budget_sections(found), *sections(c)]
  for plot in drawn:
    files.write_text(out / 'plots' / f'{plot.name}.svg', plot.file)
  files.write_text(out / 'results.csv', results_csv([*found.values(), *further]))
  files.write_text(out / 'table.md', table_md(c, advice, behind))
  main_tables = [(count(s), main_table(c, s), domain_table(c, s)) for s in study.sizes]
  html = page.render(c, whole, advice, notes(c), main_tables, DOMAIN_NOTE, drawn, behind, out)
  files.write_text(out / 'report.html', html)
  show(c, advice)
  print(f'wrote {out / "report.html"}, table.md, results.csv and plots/')
  return advice


BUDGET_NOTE = (
  'Difference to the plain SLM at the same share of the pretraining, in nats per token with its '
  '95 % interval: each checkpoint of the pretraining runs is specialised by itself.'
)
LEDGER_NOTE = (
  'Generic costs are paid once, before the domain is known, and include the clustering of the '
  'generic text for methods that use it; costs per domain are paid again for every domain. '
  'C_total(N) = C_generic + N · C_specialise. Held-out evaluations (phase evaluate of ledger.json) '
  'are left out of every cost.'
)
CLUSTER_NOTE = (
  'How concentrated each set is. Effective clusters = exp(entropy). Effective sample = the share '
  'of generic text that still counts when it is resampled to look like the set: small means that '
  'the same text is repeated.'
)


def main(_: list[str]) -> None:
  """Write the report of --study."""
  if not flags.FLAGS.study:
    raise ValueError('--study: name the directory that holds study.json')
  report(flags.FLAGS.study, flags.FLAGS.out)


if __name__ == '__main__':
  flags.DEFINE_string('study', '', 'Directory that holds study.json.')
  flags.DEFINE_string('out', '', 'Where the report is written; default: the study itself.')
  console.run(main)
