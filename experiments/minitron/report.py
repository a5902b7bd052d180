"""The study's tables, plots and page, from what `results` reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import common
from experiments.minitron import claims, results
from experiments.minitron.results import TEACHER, Found
from experiments.minitron.scales import Scale
from experiments.minitron.students import LENGTHS, SERVED, STUDENTS, cut_run
from slm.base import files, schema
from slm.inference import latency
from slm.models.config import DecoderConfig
from slm.pruning import commands, importance, slicing
from slm.reporting import figures
from slm.reporting.tables import Table, count, duration, interval, number
from slm.runs import rundir

COLOURS = {TEACHER: '#000000', 'width': '#0072b2', 'depth': '#d55e00', 'both': '#009e73'}
BATCHES = (1, 8)
PROMPT, NEW_TOKENS = 128, 64


def main_table(f: Found) -> Table:
  """Build a line per student."""
  head = ['student', 'parameters', 'loss as cut', 'loss', 'to width', '95 %', 'seeds', 'tokens']
  rows = []
  for name in (TEACHER, *(s.name for s in STUDENTS)):
    if name not in f.trained and name not in f.cut:
      rows.append([name, *['not run'] * 10])
      continue
    cut = f'{f.cut[name].value:.3f}' if name in f.cut else '–'
    if name not in f.trained:
      rows.append([name, '–', cut, *['–'] * 8])
      continue
    loss, d = f.trained[name], f.gap(name, 'width') if name != 'width' else None
    spread = max(loss.seeds.values()) - min(loss.seeds.values())
    seeds = f'{len(loss.seeds)}' + (f' (±{spread / 2:.3f})' if len(loss.seeds) > 1 else '')
    comparable = d and not next((s.domain for s in STUDENTS if s.name == name), False)
    mine = f.training(name)
    whole = f.total(name) if name != TEACHER else mine
    rows.append([
      name, f'{f.params(name):,}', cut, f'{loss.value:.3f}',
      d.verdict if comparable else 'reference' if name == 'width' else '–',
      interval(d) if comparable else '–', seeds, count(whole.tokens), number(mine.flops),
      number(whole.flops), duration(whole.seconds),
    ])  # fmt: skip
  return [*head, 'FLOPs', 'with cuts and parents', 'device time'], rows


def headline(f: Found) -> Table:
  """Build the cost of reaching the pruned student's loss by training its shape from nothing."""
  head = ['student', 'tokens', 'loss', 'to width', 'FLOPs', 'with the teacher']
  rows, teacher = [], f.training(TEACHER).flops
  for name in ('width', 'scratch_lm', *(f'scratch_lm_{n}' for n in LENGTHS)):
    if name not in f.trained:
      rows.append([name, *['not run'] * 5])
      continue
    mine, d = f.total(name), f.gap(name, 'width')
    whole = mine.flops + teacher * (name == 'width')
    rows.append([
      name, count(f.training(name).tokens), f'{f.trained[name].value:.3f}',
      'reference' if name == 'width' else interval(d), number(mine.flops), number(whole),
    ])  # fmt: skip
  return head, rows


def speeds(path: Path, shapes: Mapping[str, DecoderConfig], rounds: int) -> dict[str, Any]:
  """Measure models on this machine, and what bytes and FLOPs predict; kept in a file.

  Returns {'asked': ..., 'models': {name: {batch size: seconds, bytes, FLOPs}}}.
  """
  shown = {name: schema.plain(shape) for name, shape in shapes.items()}
  asked = {'rounds': rounds, 'machine': rundir.environment(), 'shapes': shown}
  asked = json.loads(json.dumps(asked))
  if path.exists() and (known := files.read_json(path)).get('asked') == asked:
    return known
  models: dict[str, Any] = {name: {} for name in shapes}
  for batch in BATCHES:
    times = latency.measure(shapes, 'float32', batch, PROMPT, NEW_TOKENS, rounds)
    for name, measured in times.items():
      predicted = latency.predicted(shapes[name], PROMPT + NEW_TOKENS // 2, 'float32')
      models[name][str(batch)] = measured | predicted
  files.write_json(path, {'asked': asked, 'models': models})
  return files.read_json(path)


def deployment_table(f: Found, speed: dict[str, Any]) -> Table:
  """Build the table of what is served: size, speed, loss before and after."""
  head = ['model', 'parameters', 'MB', 'loss as cut', 'loss', 'bits per byte']
  head += [f'{what}, {b} row{"s" * (b > 1)}' for b in BATCHES for what in ('prefill', 'decode')]
  head += ['speed-up', 'by bytes', 'by FLOPs']
  rows, whole = [], speed['models'][TEACHER]['1']
  for name, mine in speed['models'].items():
    loss, cells = f.trained[name], []
    for batch in BATCHES:
      m = mine[str(batch)]
      cells += [f'{batch * PROMPT / m["prefill"]:,.0f}', f'{batch / m["token"]:,.0f}']
    one = mine['1']
    moved = lambda m: m['weight_bytes'] + m['cache_bytes']
    rows.append([
      name, f'{f.params(name):,}', f'{one["weight_bytes"] / 1e6:.1f}',
      f'{f.cut[name].value:.3f}' if name in f.cut else '–', f'{loss.value:.3f}',
      f'{loss.bpb:.3f}', *cells, f'{whole["token"] / one["token"]:.2f}',
      f'{moved(whole) / moved(one):.2f}', f'{whole["flops"] / one["flops"]:.2f}',
    ])  # fmt: skip
  return head, rows


def answering(f: Found) -> dict[str, list[Path]]:
  """Return the runs of the models that tasks are put to: as cut and as trained."""
  runs = {TEACHER: f.runs(TEACHER)}
  for name in SERVED:
    student = next(s for s in STUDENTS if s.name == name)
    runs[f'{name}, as cut'] = [f.root / 'runs' / cut_run(student, f.scale.seeds[0])]
    runs[name] = f.runs(name)
  return runs


def tasks_table(runs: Mapping[str, list[Path]], tasks: Sequence[str]) -> Table:
  """Build the table of what models, each the runs of its seeds, answer in task files."""
  names, rows = [Path(task).name.partition('.')[0] for task in tasks], []
  head = ['model', *(f'{task}, {what}' for task in names for what in ('accuracy', 'bits per byte'))]
  for model, paths in runs.items():
    there = [rundir.evaluations(p, 'tasks').with_suffix('.json') for p in paths]
    found = [files.read_json(p) for p in there if p.exists()]
    cells = []
    for task in names if found else ():
      for score, form in (('acc', '.1%'), ('bpb', '.3f')):
        pair = [np.mean([x[task][k] for x in found]) for k in (score, f'{score}_stderr')]
        cells.append(f'{pair[0]:{form}} ± {pair[1]:{form}}')
    rows.append([model, *(cells or ['not run'] * (len(head) - 1))])
  return head, rows


def overlap_table(f: Found) -> Table:
  """Build the table of what calibrations on the two texts would both keep of the teacher."""
  stats = [f.root / 'stats' / f'{TEACHER}-{on}' for on in ('generic', f.scale.domain)]
  head = ['kept', 'of both', 'by chance']
  if not all(path.exists() for path in stats):
    return head, [['not run'] * 3]
  shapes = (slicing.read_sizes(f.scale.shapes[name]) for name in ('heads', 'width'))
  sizes = {axis: n for shape in shapes for axis, n in shape.items()}
  scores = [importance.activation_scores(commands.read(s, finished=True)[1]) for s in stats]
  kept = [importance.keep(x, sizes, f.shapes[TEACHER].num_kv_heads) for x in scores]
  chance = lambda axis: sizes[axis] / scores[0][axis].shape[-1]
  return head, [
    [f'{axis}={n}', f'{importance.overlap(*(k[axis] for k in kept)):.0%}', f'{chance(axis):.0%}']
    for axis, n in sizes.items()
  ]


def search_table(f: Found) -> Table:
  """Build the table of the shapes that the search tried, best first."""
  path = f.root / 'search' / 'search.json'
  found = files.read_json(path) if path.exists() else {'rungs': []}
  head = ['shape', 'parameters', 'as cut', *(f'{r["steps"]} steps' for r in found['rungs'])]
  if 'best' not in found:
    return head, [['not run'] * len(head)]
  losses = [found['zero_shot'], *(rung['loss'] for rung in found['rungs'])]
  reached = lambda shape: max(i for i, x in enumerate(losses) if shape in x)
  best = sorted(losses[0], key=lambda s: (-reached(s), losses[reached(s)][s]))
  cell = lambda x, shape: f'{x[shape]:.3f}' if shape in x else '–'
  rows = [[s, f'{found["parameters"][s]:,}', *(cell(x, s) for x in losses)] for s in best]
  taus = ('–' if r['stability'] is None else f'{r["stability"]:.2f}' for r in found['rungs'])
  return head, [*rows, ["Kendall's tau with the ranks before", '', '', *taus]]


def draw(f: Found, speed: dict[str, Any]) -> list[figures.Plot]:
  """Draw what the study has data for."""
  with matplotlib.rc_context(figures.RC):
    return [p for p in (_recovery(f), _tokens(f), _latency(f, speed)) if p is not None]


def _recovery(f: Found) -> figures.Plot | None:
  """Draw held-out loss while students of equal size recover."""
  figure = Figure(figsize=(7.6, 4.2), layout='constrained')
  ax, drawn = figure.subplots(), 0
  for name, colour in {**COLOURS, 'mlp': '#cc79a7'}.items():
    if name not in f.curves:
      continue
    tokens, losses = np.array(list(f.curves[name].values())).transpose(2, 0, 1)
    # As cut on the test rows, of the same text.
    tokens = np.append(0, tokens.mean(0))
    losses = np.insert(losses, 0, f.cut[name].value, axis=1)
    ax.plot(tokens, losses.mean(0), color=colour, label=name)
    ax.fill_between(tokens, losses.min(0), losses.max(0), color=colour, alpha=0.2, linewidth=0)
    drawn += 1
  if not drawn:
    return None
  ax.set(xlabel='tokens of recovery', ylabel='held-out loss, nats per token')
  ax.legend(frameon=False)
  caption = (
    'Held-out loss while students of about equal size learn from the whole model: the mean and '
    'the range over seeds, on validation rows; as cut, at the left end, on test rows.'
  )
  return figures.save(figure, 'recovery', 'Width, depth, both', caption)


def _tokens(f: Found) -> figures.Plot | None:
  """Draw the loss of the student's shape trained from nothing against tokens."""
  names = [n for n in ('scratch_lm', *(f'scratch_lm_{n}' for n in LENGTHS)) if n in f.trained]
  if len(names) < 2 or 'width' not in f.trained:
    return None
  figure = Figure(figsize=(7.6, 4.2), layout='constrained')
  ax = figure.subplots()
  points = [(f.training(n).tokens, f.trained[n].value) for n in names]
  ax.plot(*zip(*points, strict=True), 'o-', color='#555555', label='trained from nothing')
  mine = f.training('width').tokens, f.trained['width'].value
  ax.plot(*mine, 'D', color=COLOURS['width'], label='cut in width and distilled')
  ax.axhline(mine[1], color=COLOURS['width'], linewidth=0.8, linestyle=':')
  ax.axhline(f.trained[TEACHER].value, color='#000000', linewidth=0.8, linestyle='--')
  ax.annotate('teacher', (points[-1][0], f.trained[TEACHER].value), va='bottom', ha='right')
  ax.set(xscale='log', xlabel='tokens', ylabel='held-out loss, nats per token')
  ax.legend(frameon=False)
  caption = _answer(f)
  return figures.save(figure, 'tokens', 'Tokens to the same loss', caption)


def _answer(f: Found) -> str:
  parts = ', '.join(f'{times} the {what}' for what, times in results.crossing(f).items())
  return f'Training from nothing to the loss of the cut and distilled model takes {parts}.'


def _latency(f: Found, speed: dict[str, Any]) -> figures.Plot | None:
  """Draw quality against measured time per token."""
  figure = Figure(figsize=(7.6, 4.2), layout='constrained')
  ax = figure.subplots()
  for name, mine in speed['models'].items():
    one, loss = mine['1'], f.trained[name]
    x, dx = 1e3 * one['token'], 1e3 * one['token_spread']
    ax.errorbar(x, loss.value, xerr=dx, fmt='o', color=COLOURS[name])
    ax.annotate(f' {name}', (x, loss.value), va='bottom', color=COLOURS[name])
  ax.set(xlabel='milliseconds per token, one row', ylabel='held-out loss, nats per token')
  caption = 'Held-out loss against the measured time of a decoding step on this machine.'
  return figures.save(figure, 'latency', 'Quality against speed', caption)


def write(scale: Scale, root: Path, rounds: int) -> None:
  """Write report.html, table.md and plots/ of what has been run."""
  found = results.read(scale, root)
  shapes = {n: found.shapes[n] for n in (TEACHER, *SERVED) if n in found.shapes}
  speed = speeds(root / 'speed.json', shapes, rounds)
  drawn = draw(found, speed)
  asked = ('What is answered', TASKS, tasks_table(answering(found), scale.tasks))
  sections = [
    ('The claims of the papers', claims.NOTE, claims.table(found)),
    ('Tokens to the same loss', _HEADLINE, headline(found)),
    ('What is served', DEPLOYMENT, deployment_table(found, speed)),
    *([asked] if scale.tasks else []),
    ('What the search tried', _SEARCH, search_table(found)),
    ('What another text would keep', _OVERLAP, overlap_table(found)),
    ('Every student', _STUDENTS, main_table(found)),
  ]
  common.publish(root, scale.title, _answer(found), sections, drawn)


_STUDENTS = (
  'Held-out losses in nats per token, on the same text for all of a set, averaged over seeds (± '
  'half their range), with paired bootstrap 95 % intervals. FLOPs of training count the '
  'forward passes of the teacher; the next column adds calibration, the students it was cut from '
  'and the correction of its teacher, as do tokens and time. The teacher itself was there before. '
  "Students of the domain are measured on the domain's text and not compared with the others."
)
_SEARCH = (
  'The largest shapes of no more parameters than `width`: validation loss as cut, then of the best '
  'after a short recovery each, the better half for twice as long (successive halving).'
)
_OVERLAP = (
  'The share of units of the teacher that calibrations on generic and on domain text would both '
  'keep, beside what two random sets of that size share.'
)
_HEADLINE = (
  'The shape of the student `width`, trained from nothing for 1 to 16 times its tokens, each run '
  "with a schedule of its own. The last column adds the teacher's whole training to the student's."
)
TASKS = (
  'The first 300 questions of public tasks without examples: the share answered right and the '
  'bits per byte of the right answer (of the last word, for LAMBADA), averaged over seeds; ± is '
  'the standard error over questions. Where accuracy is at chance, bits still tell models apart.'
)
DEPLOYMENT = (
  f'Tokens per second on this machine in float32: prompts of {PROMPT} tokens, then {NEW_TOKENS} '
  'decoded ones, all models interleaved, medians. The speed-up is of decoding one row, beside '
  'what the bytes and the FLOPs of a step predict.'
)
