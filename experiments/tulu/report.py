"""The study's tables, plots and page, from what `results` reads."""

from collections.abc import Iterable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import common
from experiments.tulu import claims, measure
from experiments.tulu.results import HOW, Found, Values
from experiments.tulu.runs import RUNS
from slm.base import files
from slm.reporting import figures, page
from slm.reporting.tables import Table, count, duration, number

TASKS = ('sums', 'rules')
CHAIN = {'sums': ('sft', 'plain_sums', 'norm_sums', 'rl_sums'),
         'rules': ('sft', 'plain_rules', 'norm_rules', 'rl_rules', 'rl_rules_after')}  # fmt: skip
CURVES = ('rl_rules', 'rl_rules_kl0.1', 'rl_rules_kl1', 'rl_rules_coin', 'rl_rules_shuffled')


def spread(values: Values | None, form: str = '.3f') -> str:
  """Format the mean over seeds and its standard error; – if there is none."""
  if values is None:
    return '–'
  means = [float(np.mean(x)) for x in values.values()]
  error = np.std(means, ddof=1) / len(means) ** 0.5 if len(means) > 1 else None
  return f'{np.mean(means):{form}}' + (f' ± {error:{form}}' if error is not None else '')


def answers_table(f: Found, task: str) -> Table:
  """Build a line for every run that answers a task: shares that pass, KL, what else it knows."""
  own = ["sampled, by Tülu's"] if task == 'rules' else []
  head = ['run', 'what', *HOW, *own, 'KL', 'loss of copies']
  rows = []
  for run in (run for run in RUNS.values() if task in run.asked):
    if not f.seeds(run.name):
      rows.append([run.name, run.what, *['not run'] * (len(head) - 2)])
      continue
    cells = [spread(f.passed(run.name, task, how)) for how in HOW]
    if own:
      cells.append(spread(f.passed(run.name, task, 'sampled', 'released')))
    moved = f.kl(run.name, task) if run.start else None
    cells += [spread(moved, '.2f'), spread(f.loss(run.name, 'copies'))]
    rows.append([run.name, run.what, *cells])
  return head, rows


def losses_table(f: Found) -> Table:
  """Build the table of the losses of fine-tuning, by what is held out."""
  tasks = ('sums', 'rules', 'copies')
  rows = [
    [run.name, run.what, f.path(run.name, 0).name, *(spread(f.loss(run.name, t)) for t in tasks),
     spread(f.loss(run.name, *tasks))]
    for run in RUNS.values() if run.stage == 'short'
  ]  # fmt: skip
  return ['run', 'what', 'rate', *tasks, 'all'], rows


def pairs_table(f: Found) -> Table:
  """Build the table of held-out pairs whose chosen answer has the higher score."""
  rows = []
  for task in TASKS:
    for name in ('sft', f'norm_{task}', f'plain_{task}'):
      cells = [spread(f.preferred(name, f'own_{task}', kind)) for kind in ('norm', 'plain')]
      rows.append([f'{task}: {name}', *cells])
  return ['pairs: run', 'by means over tokens', 'by sums'], rows


def facts_table(f: Found) -> Table:
  """Build the table of leaked and other test items."""
  rows = [
    [name, *(spread(f.passed(name, 'facts', 'greedy', only=x)) for x in ('leak', 'clean'))]
    for name in ('leaky', 'cleaned')
  ]
  return ['trained', 'items that leak', 'other items'], rows


def verdicts_table(f: Found) -> Table:
  """Build the table of the answers on which the two families of verifiers differ."""
  head = ['run, rule', 'verdicts', 'both', 'official alone', 'Tülu alone', 'neither']
  rows = []
  for name in ('sft', 'rl_rules', 'rl_rules_released'):
    for kind, counts in f.verdicts(name).items():
      shares = [f'{n / counts.sum():.1%}' for n in counts]
      rows.append([f'{name}, {kind}', f'{counts.sum():,}', *shares])
  return head, rows


def costs_table(f: Found) -> Table:
  """Build the table of what a seed of every run took, its own training alone."""
  head = ['run', 'seeds', 'tokens trained', 'FLOPs', 'tokens drawn', 'seconds', 'of it drawing']
  rows = []
  for name in RUNS:
    if not (costs := f.costs(name)):
      rows.append([name, *['not run'] * (len(head) - 1)])
      continue
    trained, drawn = costs['training'], costs.get('rollout')
    seconds = trained.seconds + (drawn.seconds if drawn else 0)
    rows.append([
      name, str(len(f.seeds(name))), count(trained.tokens), number(trained.flops),
      count(drawn.tokens) if drawn else '–', duration(seconds),
      f'{drawn.seconds / seconds:.0%}' if drawn else '–',
    ])  # fmt: skip
  return head, rows


def grids_table(f: Found) -> Table:
  """Build the table of all settings that were tried with the first seed."""
  rows = []
  for run in (run for run in RUNS.values() if run.grid):
    scores = f.scores(run)
    best = max(scores, key=scores.get, default='')
    for cell, score in scores.items():
      what = 'drawn answers that pass' if run.asked else 'loss'
      rows.append([run.name, cell, what, f'{abs(score):.3f}', 'yes' * (cell == best)])
  return ['run', 'settings', 'validation', 'value', 'chosen'], rows


def examples_table(f: Found) -> Table:
  """Build the table of greedy answers of the first seed before and after, and one drawn answer."""
  rows, seed = [], f.scale.seeds[0]
  for task, runs in (('sums', ('sft', 'rl_sums')), ('rules', ('sft', 'norm_rules', 'rl_rules'))):
    asked = [x['prompt'] for _, x in measure.lines(f.root / 'text' / f'{task}-test.jsonl')]
    for name in runs:
      if seed not in f.seeds(name):
        continue
      texts = files.read_json(f.path(name, seed) / 'measured' / f'{task}-test.json')
      shown = [' / '.join(texts[i][:3]) for i in range(4)]
      rows.append([f'{task}: {name}', *(f'{asked[i]} {shown[i]}' for i in range(4))])
  return ['run', *['prompt, and the greedy and two drawn answers'] * 4], rows


def draw(f: Found) -> list[figures.Plot]:
  """Draw what the study has data for."""
  with matplotlib.rc_context(figures.RC):
    drawn = (_stages(f), _many(f), _curves(f))
  return [plot for plot in drawn if plot is not None]


def _stages(f: Found) -> figures.Plot | None:
  """Draw greedy, drawn and pass@8 answers by stage."""
  figure = Figure((8.8, 3.6), layout='constrained')
  for ax, task in zip(figure.subplots(1, 2, sharey=True), TASKS, strict=True):
    names = [name for name in CHAIN[task] if f.seeds(name)]
    if not names:
      return None
    for i, how in enumerate(HOW):
      color, marker = figures.style(i)
      means = [[x.mean() for x in f.passed(name, task, how).values()] for name in names]
      places = np.arange(len(names)) + 0.08 * (i - 1)
      errors = [np.std(x, ddof=1) / len(x) ** 0.5 if len(x) > 1 else 0 for x in means]
      ax.errorbar(places, [np.mean(x) for x in means], errors, fmt=marker, color=color, label=how)
    ax.set_xticks(range(len(names)), [name.replace('_', '\n') for name in names])
    ax.set(title=task, ylim=(0, 1.03))
    ax.grid(axis='y')
  figure.axes[0].set_ylabel('share of answers that pass')
  figures.legend(figure, {how: figures.style(i) for i, how in enumerate(HOW)})
  caption = (
    'Answers to held-out prompts by stage: greedy, drawn, and whether one of 8 drawn passes. The '
    'mean over seeds and its standard error.'
  )
  return figures.save(figure, 'stages', 'Stage by stage', caption)


def _many(f: Found) -> figures.Plot | None:
  """Draw pass@k before and after rewards."""
  figure = Figure((8.8, 3.4), layout='constrained')
  shown = {'before': figures.style(0), 'after rewards': figures.style(1), 'coin': figures.style(2)}
  for ax, task in zip(figure.subplots(1, 2, sharey=True), TASKS, strict=True):
    for name, (color, marker) in zip(
      ('sft', f'rl_{task}', f'rl_{task}_coin'), shown.values(), strict=True
    ):
      if not f.seeds(name):
        return None
      ks = [k for k in (1, 2, 4, 8, 16) if k <= f.scale.samples]
      lines = [[x.mean() for x in f.at(name, task, k).values()] for k in ks]
      ax.plot(ks, np.mean(lines, axis=1), color=color, marker=marker, ms=4)
      ax.fill_between(ks, np.min(lines, 1), np.max(lines, 1), color=color, alpha=0.15, lw=0)
    ax.set_xscale('log', base=2)
    ax.set_xticks(ks, map(str, ks))
    ax.set(title=task, xlabel='k')
    ax.grid(axis='y')
  figure.axes[0].set_ylabel('pass@k')
  figures.legend(figure, shown)
  caption = (
    'Whether one of k drawn answers passes, without bias; the mean and the range over seeds. '
    'Sharpening lifts the left end of a curve and not the right one.'
  )
  return figures.save(figure, 'passk', 'Before and after rewards', caption)


def _curves(f: Found) -> figures.Plot | None:
  """Draw the reward and the KL divergence of training on rules."""
  figure = Figure((8.8, 3.6), layout='constrained')
  axes, shown = figure.subplots(1, 2), {}
  for i, name in enumerate(CURVES):
    if not (runs := f.curves(name)):
      return None
    shown[name] = figures.style(i)
    for ax, key in zip(axes, ('reward', 'kl'), strict=True):
      _band(ax, [[line[key] for line in run if key in line] for run in runs], figures.style(i)[0])
  for ax, what in zip(axes, ('reward of drawn answers', 'KL, nats per token'), strict=True):
    ax.set(xlabel='step', title=what)
    ax.grid(axis='y')
  axes[1].set_yscale('symlog', linthresh=0.01)
  figures.legend(figure, shown)
  caption = (
    'Training on rules: the mean reward of all drawn answers, of at most 2, and the KL divergence '
    'from the start. Means over seeds, over 5 steps. The reward of a coin has nothing to do with '
    'the answers; that of shuffled labels is by the rules of other prompts.'
  )
  return figures.save(figure, 'curves', 'Reward and KL', caption)


def _band(ax: Axes, runs: Iterable[list[float]], color: str) -> None:
  """Draw the mean of runs, smoothed over 5 steps."""
  values = np.mean(list(runs), axis=0)
  width = min(5, len(values))
  smooth = np.convolve(values, np.ones(width) / width, 'valid')
  ax.plot(np.arange(len(smooth)) + width, smooth, color=color, lw=1.2)


def write(f: Found) -> None:
  """Write report.html, table.md and plots/ of what has been run."""
  judged = claims.table(f)
  told = [row[2].partition(',')[0] for row in judged[1]]
  answer = (
    f'Of {len(told)} claims {told.count("reproduced")} are reproduced, '
    f'{told.count("not reproduced")} are not, {told.count("within noise")} are within noise and '
    f'{told.count("not tested")} were not tested.'
  )
  runs = [f.path(name, seed) for name in RUNS for seed in f.seeds(name)]
  sections = [
    ('Claims', claims.NOTE, judged),
    ('Sums', _SUMS, answers_table(f, 'sums')),
    ('Rules', _RULES, answers_table(f, 'rules')),
    ('Held-out pairs', _PAIRS, pairs_table(f)),
    ('Losses of fine-tuning', _LOSSES, losses_table(f)),
    ('Leaks', _LEAKS, facts_table(f)),
    ('Two families of verifiers', _VERDICTS, verdicts_table(f)),
    ('Before and after', 'Answers of the first seed.', examples_table(f)),
    ('What it cost', _COSTS, costs_table(f)),
    ('Settings tried', _GRIDS, grids_table(f)),
    ('Where it was trained', 'The environment of the runs.', page.environment(runs)),
  ]
  common.publish(f.root, f.scale.title, answer, sections, draw(f))


_SUMS = (
  'Sums of two numbers of two digits, demonstrated once rightly and once wrongly. Shares of 400 '
  'held-out sums whose answer is right: the greedy answer, one of those drawn at temperature 1, '
  'and one of 8 drawn (without bias, from 16). ± is the standard error over seeds. KL is from the '
  'start, in nats per drawn answer; the loss of copies is of a skill that no reward is about.'
)
_RULES = (
  'Two rules for an answer, half of whose demonstrations obey. Shares of held-out combinations of '
  'rules that are satisfied, both of them, by the verifiers of the evaluation; drawn answers also '
  'by those that Tülu 3 was trained with, as released.'
)
_PAIRS = (
  "The share of held-out pairs, of each seed's own answers before preferences, whose chosen answer "
  'has the higher log-probability, by the mean over its tokens or by their sum.'
)
_LOSSES = (
  'Nats per trained token of held-out conversations, answers alone; every kind of loss at the best '
  'of three rates on validation rows of the first seed.'
)
_LEAKS = (
  'Questions whose answers are chance in two fifths: shares of test questions that are answered as '
  'the key says. Half of the test is among the training rows of `leaky`, and was dropped from '
  'those of `cleaned` by slm.data.decontaminate.'
)
_VERDICTS = (
  'All answers to the held-out prompts with rules, greedy and drawn, of all seeds: what the '
  'official verifiers and those that Tülu 3 was trained with say of every rule. L letters (at '
  'least / exactly), E the end, F a forbidden letter (as a word / anywhere), W words, P '
  'placeholders (which the released verifier does not check).'
)
_COSTS = (
  'Of one seed on average, without the runs that it starts from, the settings that were tried and '
  'the evaluations. Tokens drawn are those of answers; the FLOPs are of training and drawing. '
  'Seconds are of one core of a shared machine.'
)
_GRIDS = 'Every setting that was tried, with the first seed: what decided which of them is taken.'
