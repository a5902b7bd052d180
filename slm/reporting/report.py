"""The report of arbitrary runs: losses, training curves, costs and environments on one page."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context

from slm.base import artifact, files
from slm.reporting import comparison, course, figures, page
from slm.reporting.comparison import Line, Model
from slm.reporting.course import Course
from slm.reporting.stats import Cost, training_cost
from slm.reporting.tables import Table, cost, interval, markdown
from slm.runs import config, ledger, rundir

_TRAINING_NOTE = (
  'Speeds are means over all steps, without compiling, evaluating and saving; MFU counts the '
  'FLOPs of the cost ledger against the bfloat16 peak of the chip, where that is known.'
)
_LEDGER_NOTE = (
  'What training took: of every run, of the runs it was made from, and of both together for a '
  'model (the mean over its runs). Device time is devices × time; evaluations are left out.'
)


@artifact.writes('out')
def report(models: Sequence[Model], sets: Sequence[str], out: Path) -> list[str]:
  """Write report.html, table.md, results.csv and plots/ from run directories; return the answer.

  Raises:
    ValueError: if a file is damaged, naming it.
  """
  by_set = {name: comparison.compare(models, name) for name in sets}
  refs = [ref for model in models for ref in model.refs]
  courses = {ref: course.read(rundir.split_ref(ref)[0]) for ref in refs}
  title, answer = ', '.join(m.label for m in models), [sentence(x) for x in by_set.values()]
  answer += remarks(by_set, courses)
  sections = [
    (f'Held-out loss on {name}', comparison.note(lines), comparison.table(lines))
    for name, lines in by_set.items()
  ]
  trained = course.table(courses, {ref: config.of(ref).steps for ref in refs})
  sections.append(('Training', _TRAINING_NOTE, trained))
  sections.append(('Cost ledger', _LEDGER_NOTE, ledger_table(models)))
  environments = page.environment(Path(ref) for model in models for ref in model.refs)
  sections.append(('Environment', 'Each distinct one of the runs.', environments))
  plots = [comparison.plot(by_set)] if by_set and len(models) > 1 else []
  plots += _training(models, courses)
  for plot in plots:
    files.write_text(out / 'plots' / f'{plot.name}.svg', plot.file)
  every = [line for lines in by_set.values() for line in lines]
  files.write_text(out / 'results.csv', comparison.results_csv(every))
  parts = [f'# {title}', *answer]
  parts += [f'## {name}\n\n{note}\n\n{markdown(table)}' for name, note, table in sections]
  files.write_text(out / 'table.md', '\n\n'.join(part.rstrip() for part in parts) + '\n')
  files.write_text(out / 'report.html', page.document(title, answer, sections, plots))
  return answer


def sentence(lines: Sequence[Line]) -> str:
  """Describe which models differ from the first on a set."""
  first, *others = lines
  parts = [f'On {first.on} {first.model.label} has a loss of {first.loss.value:.4f} nats/token']
  for line in others:
    verdict = line.difference.verdict.replace('noise', 'noise of it')
    parts.append(f'{line.model.label} is {verdict} ({interval(line.difference)})')
  return '; '.join(parts) + '.'


def remarks(by_set: Collection[str], courses: Mapping[str, Course]) -> list[str]:
  """Say that no losses can be compared, and which runs have recorded no step yet."""
  lines = []
  if not by_set:
    lines.append(
      'No set that all of these runs were evaluated on: slm.compare --on=set/split evaluates them.'
    )
  for ref, run in courses.items():
    path = rundir.split_ref(ref)[0] / 'metrics.jsonl'
    if path.exists() and not run.lines:
      lines.append(f'{path}: is empty: no step was recorded yet.')
  return lines


def lineage(ref: str | Path) -> list[Path]:
  """List a run and, without repetition, the runs and directories that it was made from."""
  refs = [Path(ref)]
  for ref in refs:  # the list grows as ancestors are found
    ancestors = ledger.read_ledger(rundir.split_ref(ref)[0])['ancestors']
    refs += [path for path in map(Path, ancestors) if path not in refs]
  return refs


def ledger_table(models: Sequence[Model]) -> Table:
  """Build the costs of every run and its ancestors, and of each model including them."""
  rows = []
  for model in models:
    totals: list[Cost | None] = []
    for ref in model.refs:
      costs = {path: training_cost(path) for path in lineage(ref)}
      for path, value in costs.items():
        rows.append([str(path), 'run' if path == Path(ref) else f'made {ref}', *cost(value)])
      totals.append(None if None in costs.values() else sum(costs.values(), Cost()))
    mean = None if None in totals else sum(totals, Cost()) * (1 / len(totals))
    rows.append([model.label, 'with what it was made from', *cost(mean)])
  return ['run', 'what', 'tokens', 'FLOPs', 'device time'], rows


def _training(models: Sequence[Model], courses: Mapping[str, Course]) -> list[figures.Plot]:
  """Draw the losses, the course and the time by phase of every run that has some."""
  style = {ref: figures.style(i) for i, m in enumerate(models) for ref in m.refs}
  drawn = {ref: figures.curves(rundir.split_ref(ref)[0]) for ref in style}
  drawn = {ref: curve for ref, curve in drawn.items() if curve}
  if not drawn:
    return []
  labels = {m.label: style[m.refs[0]] for m in models if any(ref in drawn for ref in m.refs)}
  with rc_context(figures.RC):
    figure = figures.training(drawn, style, {ref: courses[ref].restarts for ref in drawn})
    figures.legend(figure, labels)
    caption = (
      'Look for curves that still fall at their end: those runs would gain from more tokens. Each '
      'run is evaluated on its own `eval.set`: levels compare only where that is the same.'
    )
    losses = figures.save(figure, 'training', 'Training curves', caption)
    return [losses, *course.plots(courses, style, labels)]
