"""The report of a recipe, from its run directories alone: what each stage changed and cost."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from slm.base import files
from slm.objectives import heldout
from slm.reporting import course, figures, page, scores, stats
from slm.reporting.comparison import Model
from slm.reporting.stats import Difference
from slm.reporting.tables import Table, count, duration, markdown, number
from slm.runs import config, ledger, rundir

GREEDY, SAMPLED, TEXT = 'heldout', 'heldout-sampled', 'generic/train'
_LABELS = {
  'start': 'start', 'sft': 'SFT', 'reward': 'reward model', 'dpo': 'DPO', 'rlvr': 'RLVR',
  'control': 'random rewards',
}  # fmt: skip
_SCORES_NOTE = (
  'Scores ± standard errors over items. Held-out prompts: the share of answers that pass all '
  'checks, of the likeliest answers, of drawn ones, and of the best of {k} drawn ones (pass@{k}, '
  'unbiased). '
  'Loss: nats per token of general text; higher is forgetting.'
)
_CHANGES_NOTE = (
  'Paired differences on the same items (rows of text for the loss) with 95 % intervals: of each '
  'stage to the one that it starts from, and of RLVR to the same training on random rewards. They '
  'cover the choice of items, not that of the training run, of which there is one.'
)
_COST_NOTE = (
  'Device time is devices × time. Rollouts are the answers that RLVR draws and checks while it '
  'trains; evaluations are those in training and those of this report.'
)
_CURVES_CAPTION = (
  'Left: the mean reward of the answers that a step draws; the control gets a coin. Middle: of '
  'drawn answers to held-out prompts, by the verifiers for both. Right: how far the answers are '
  'from the start. A reward that only the left curve of the control shares is no gain.'
)


class Column(NamedTuple):
  """A score that stages are compared by."""

  title: str
  task: str  # '': the loss on text
  metric: str = ''


class Recipe(NamedTuple):
  """What a recipe's directory says of itself."""

  folder: Path
  runs: dict[str, str]  # stage -> run
  parents: dict[str, str]
  tasks: list[str]
  text: str
  examples: int

  def evaluated(self) -> dict[str, str]:
    """Return the runs that write text, by stage."""
    return {stage: run for stage, run in self.runs.items() if stage != 'reward'}


def read(folder: Path) -> Recipe:
  """Read what a recipe has made.

  Raises:
    ValueError: if the directory holds no finished recipe.
  """
  record = folder / 'recipe.json'
  if not record.exists():
    raise ValueError(f'{folder}: holds no finished recipe of slm.tulu')
  like = {
    'runs': {str: str}, 'parents': {str: str}, 'tasks': [str], 'text': str, 'examples': int
  }  # fmt: skip
  about = files.read_json(record, like)
  runs = about['runs']  # sorted by name in the file
  about['runs'] = {stage: str(folder / runs[stage]) for stage in _LABELS if stage in runs}
  return Recipe(folder, **about)


def write(folder: Path) -> str:
  """Write report.html, report.md and plots/ of a recipe; returns the tables as Markdown."""
  made = read(folder)
  columns = _columns(made)
  answer, sections = _findings(made, columns), _sections(made, columns)
  plots = [plot for plot in (_by_stage(made, columns), _curves(made)) if plot]
  title = f'From {", ".join(_LABELS[s] for s in made.runs)}'.replace('From ', 'Post-training: ')
  for plot in plots:
    files.write_text(folder / 'plots' / f'{plot.name}.svg', plot.file)
  parts = [f'# {title}', *answer]
  parts += [f'## {name}\n\n{note}\n\n{markdown(x)}' for name, note, x in sections if x[1]]
  text = '\n\n'.join(part.rstrip() for part in parts) + '\n'
  files.write_text(folder / 'report.md', text)
  files.write_text(folder / 'report.html', page.document(title, answer, sections, plots))
  return text


def _sections(made: Recipe, columns: Sequence[Column]) -> list[tuple[str, str, Table]]:
  courses = {_LABELS[s]: course.read(Path(run)) for s, run in made.runs.items() if s != 'start'}
  steps = {_LABELS[s]: config.of(run).steps for s, run in made.runs.items()}
  k = max((int(c.metric[5:]) for c in columns if c.metric.startswith('pass@')), default=1)
  environment = page.environment(Path(run) for run in made.runs.values())
  return [
    ('Stages', _SCORES_NOTE.format(k=k), _scores(made, columns)),
    ('What each stage changed', _CHANGES_NOTE, _changes(made, columns)),
    ('The same prompts, answered by each stage', 'The first held-out prompts, the likeliest '
     'answers.', _examples(made)),
    ('Cost by phase', _COST_NOTE, _costs(made)),
    ('Training', 'Losses of different objectives do not compare.', course.table(courses, steps)),
    ('Environment', 'Each distinct one of the runs.', environment),
  ]  # fmt: skip


def _columns(made: Recipe) -> list[Column]:
  """Return the scores that all stages have."""
  first, found = next(iter(made.evaluated().values())), []
  for task in made.tasks:
    facts = scores.read(first, task)[0]
    if task == GREEDY:
      found.append(Column('held-out, greedy', task, 'pass'))
    elif task == SAMPLED:
      best = max((x for x in facts if x.startswith('pass@') and 'stderr' not in x), key=_size)
      found += [Column('held-out, sampled', task, 'pass'), Column(f'held-out, {best}', task, best)]
    else:
      found.append(Column(task, task, facts['main']))
  return found + [Column('loss', '')] * bool(made.text)


def _size(metric: str) -> int:
  return int(metric.partition('@')[2])


def _value(run: str, column: Column) -> tuple[float, float]:
  """Return a score of a run and its standard error (0 of one item)."""
  if not column.task:
    facts = heldout.summaries(run)[TEXT]
    return facts['loss'], facts['loss_stderr']
  facts = scores.read(run, column.task)[0]
  return facts[column.metric], facts.get(f'{column.metric}_stderr', 0.0)


def _change(run: str, base: str, column: Column) -> Difference:
  """Return the paired difference of two runs with its 95 % interval."""
  if not column.task:
    rows = {(ref, 0): heldout.kept(ref, TEXT)[0] for ref in (base, run)}
    losses = stats.losses(rows, 0, TEXT)
    return stats.difference(losses[run], losses[base])
  models = [Model('base', (base,)), Model('run', (run,))]
  value, low, high = scores.compare(models, column.task, column.metric)[1].difference
  return Difference(value, low, high, (value,))


def _pairs(made: Recipe) -> list[tuple[str, str]]:
  """Return (stage, the one that it is compared with)."""
  found = [(s, made.parents.get(s, '')) for s in made.evaluated()]
  found = [(stage, base) for stage, base in found if base]
  return found + [('rlvr', 'control')] * ({'rlvr', 'control'} <= made.runs.keys())


def _scores(made: Recipe, columns: Sequence[Column]) -> Table:
  """Build a row per stage, a column per score."""
  rows = []
  for stage, run in made.evaluated().items():
    cells = [_value(run, column) for column in columns]
    rows.append([_LABELS[stage], *(f'{x:.3f} ± {error:.3f}' for x, error in cells)])
  return ['stage', *(column.title for column in columns)], rows


def _changes(made: Recipe, columns: Sequence[Column]) -> Table:
  """Build a row per stage and score: the difference and what it says."""
  rows = []
  for stage, base in _pairs(made):
    for column in columns:
      d = _change(made.runs[stage], made.runs[base], column)
      shown = f'{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]'.replace('-', '−')
      rows.append([f'{_LABELS[stage]} − {_LABELS[base]}', column.title, shown, _verdict(d, column)])
  return ['stages', 'score', 'difference', 'verdict'], rows


def _verdict(d: Difference, column: Column) -> str:
  """Return better or worse if the interval excludes zero, else within noise."""
  if d.low <= 0 <= d.high:
    return 'within noise'
  return 'better' if (d.value > 0) == bool(column.task) else 'worse'


def _findings(made: Recipe, columns: Sequence[Column]) -> list[str]:
  """Say in sentences what each stage changed beyond its interval."""
  lines = []
  for stage, base in _pairs(made):
    parts = []
    for column in columns:
      d = _change(made.runs[stage], made.runs[base], column)
      if _verdict(d, column) != 'within noise':
        parts.append(f'{column.title} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]')
    shown = '; '.join(parts).replace('-0', '−0') or 'nothing beyond noise'
    lines.append(f'{_LABELS[stage]} beside {_LABELS[base]}: {shown}.')
  return lines or ['One stage alone: there is nothing to compare it with.']


def _examples(made: Recipe) -> Table:
  """Build a row per held-out prompt: the answer of every stage and whether it passes."""
  path = made.folder / 'data' / 'made' / 'heldout_prompts.jsonl'
  if GREEDY not in made.tasks:
    return ['prompt'], []
  told = {stage: scores.read(run, GREEDY)[1] for stage, run in made.evaluated().items()}
  items = [json.loads(line) for line in path.read_text().split('\n') if line]
  items = [x for x in items if all(x['id'] in records for records in told.values())]
  shown = lambda r: f'{"passes" if r["scores"]["pass"] else "fails"}: {_text(r)}'
  rows = [
    [_cell(item['prompt']), *(shown(records[item['id']]) for records in told.values())]
    for item in items[: made.examples]
  ]
  return ['prompt', *(_LABELS[stage] for stage in told)], rows


def _text(record: Mapping[str, Any]) -> str:
  return _cell(record['answer']) + ' […]' * (not record['ended'])


def _cell(text: str) -> str:
  """Write a text on one line without what divides the cells of a table."""
  return json.dumps(text, ensure_ascii=False)[1:-1].replace('|', '¦')


def _costs(made: Recipe) -> Table:
  """Build a row per stage and phase, and the sum."""
  rows, total = [], {'tokens': 0.0, 'flops': 0.0, 'device_seconds': 0.0}
  runs = {**made.runs, 'answers': str(made.folder / 'answers')}
  for stage, run in runs.items():
    for phase, cost in _phases(stage, Path(run), made).items():
      flops = number(cost['flops']) if cost['flops'] else '–'
      shown = [flops, duration(cost['device_seconds'])]
      label = 'answers of SFT' if stage == 'answers' else _LABELS[stage]
      rows.append([label, phase, count(cost['tokens']), *shown])
      total = {name: value + cost[name] for name, value in total.items()}
  shown = [count(total['tokens']), number(total['flops']), duration(total['device_seconds'])]
  return ['stage', 'phase', 'tokens', 'FLOPs', 'device time'], [*rows, ['all', '', *shown]]


def _phases(stage: str, run: Path, made: Recipe) -> dict[str, dict[str, float]]:
  """Return the costs of a run by phase; of the start only its evaluation, which the recipe made."""
  found: dict[str, dict[str, float]] = {}
  if stage != 'start':
    found = {p['phase']: p for p in ledger.read_ledger(run)['phases']}
  totals = rundir.read_totals(run) if stage not in ('start', 'answers') else {}
  for name in ('compile', 'save'):
    if seconds := totals.get(f'{name}_device_seconds'):
      found[name] = {'tokens': 0, 'flops': 0.0, 'device_seconds': seconds}
  path = run / 'tasks.json'
  asked = [files.read_json(path)[name] for name in made.tasks] if path.exists() else []
  if asked:
    costs = {key: sum(x[key] for x in asked) for key in ('tokens', 'device_seconds')}
    found['answer tasks'] = {**costs, 'flops': 0.0}
  return found


def _by_stage(made: Recipe, columns: Sequence[Column]) -> figures.Plot | None:
  """Draw every score by stage with its 95 % interval, a panel per score."""
  if not columns:
    return None
  runs, across = made.evaluated(), min(len(columns), 4)
  down = -(-len(columns) // across)
  with rc_context(figures.RC):
    figure = Figure((2.3 * across, 0.5 + 2.3 * down), layout='constrained')
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, column in zip(axes, columns, strict=False):
      for i, run in enumerate(runs.values()):
        value, error = _value(run, column)
        color, marker = figures.style(i)
        ax.errorbar(i, value, yerr=1.96 * error, color=color, marker=marker, ms=5, capsize=3)
      ax.set_title(column.title)
      ax.set_xticks(range(len(runs)), [_LABELS[s] for s in runs], rotation=40, ha='right')
      ax.grid(axis='y')
    for ax in axes[len(columns) :]:
      ax.set_visible(False)
    caption = 'Bars: 95 % intervals of each score. Two stages compare by paired differences, below.'
    return figures.save(figure, 'stages', 'Scores by stage', caption)


def _curves(made: Recipe) -> figures.Plot | None:
  """Draw reward, held-out reward and KL of RLVR and of the control by step."""
  runs = {s: made.runs[s] for s in ('rlvr', 'control') if s in made.runs}
  if not runs:
    return None
  titles = {'reward': 'reward of drawn answers', 'eval_reward': 'held-out reward',
            'kl': 'KL from the start, nats per token'}  # fmt: skip
  with rc_context(figures.RC):
    figure = Figure((9.4, 3.0), layout='constrained')
    for ax, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
      for i, run in enumerate(runs.values()):
        points = [(m['step'], m[key]) for m in rundir.read_metrics(Path(run)) if key in m]
        color, marker = figures.style(1 - i)
        every = None if key == 'eval_reward' else [-1]
        if points:
          ax.plot(*np.array(points).T, color=color, lw=1.1, marker=marker, ms=4, markevery=every)
      ax.set_title(title)
      ax.set_xlabel('step')
      ax.grid(axis='y')
    figures.legend(figure, {_LABELS[s]: figures.style(1 - i) for i, s in enumerate(runs)})
    return figures.save(figure, 'rewards', 'Rewards and KL', _CURVES_CAPTION)
