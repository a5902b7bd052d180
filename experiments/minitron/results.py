"""What the study's run directories say: losses, and what each student cost."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy.stats

from experiments.minitron.scales import Scale
from experiments.minitron.students import LENGTHS, SEARCHED, STUDENTS, cut_run
from slm.base import files
from slm.data import loader
from slm.models.config import DecoderConfig
from slm.reporting import stats
from slm.reporting.stats import Cost, Difference, Loss
from slm.runs import config, rundir
from slm.weights.count import forward_flops, num_params

TEACHER = 'teacher'
# Students of about equal size that are distilled alike, and so compete.
CANDIDATES = tuple(
  s.name
  for s in STUDENTS
  if (s.seeds, s.steps, s.parent, s.guide, s.domain) == (3, 1.0, '', TEACHER, False)
  and s.shape not in ('quarter', SEARCHED)
  and s.cut is not None
  and not s.set
)


@dataclasses.dataclass(frozen=True)
class Found:
  """Everything that was run: by student, its losses as cut and as trained, and its costs.

  `curves` are the validation losses while a seed trained: (tokens, nats per token).
  """

  root: Path
  scale: Scale
  cut: dict[str, Loss]
  trained: dict[str, Loss]
  curves: dict[str, dict[int, list[tuple[float, float]]]] = dataclasses.field(default_factory=dict)

  def gap(self, a: str, b: str, cut: bool = False) -> Difference | None:
    """Return the difference in loss of two students, a minus b; None if one was not run."""
    of = self.cut if cut else self.trained
    if a not in of or b not in of:
      return None
    pair = [of[a], of[b]]
    if cut:  # a scored cut is the same whatever the seed
      seeds = pair[0].seeds | pair[1].seeds
      pair = [_repeated(x, seeds) if len(x.seeds) == 1 else x for x in pair]
    return stats.difference(*pair)

  def runs(self, name: str) -> list[Path]:
    """List the finished runs of a student or teacher."""
    paths = [self.root / 'runs' / name] if name == TEACHER else []
    paths += [self.root / 'runs' / f'{name}-{seed}' for seed in self.scale.seeds]
    return [p for p in paths if (p / 'result.json').exists()]

  @functools.cached_property
  def shapes(self) -> dict[str, DecoderConfig]:
    """Return the shape of every student that was run, and of the teacher."""
    names = (TEACHER, *self.trained)
    return {n: shape(self.runs(n)[0]) for n in names if self.runs(n)}

  def stability(self) -> list[float]:
    """Return Kendall's tau, by seed, of CANDIDATES' ranks at 3/4 of their recovery and at its end.

    By the loss on validation rows, of seeds that all of them have.
    """
    curves = [self.curves.get(name, {}) for name in CANDIDATES]
    found = []
    for seed in sorted(set.intersection(*(set(c) for c in curves))):
      mine = [c[seed] for c in curves]
      middle = [np.interp(0.75 * c[-1][0], *np.transpose(c)) for c in mine]
      found.append(float(scipy.stats.kendalltau(middle, [c[-1][1] for c in mine])[0]))
    return found

  def params(self, name: str) -> int:
    """Count a student's parameters."""
    return sum(num_params(self.shapes[name]).values())

  def training(self, name: str) -> Cost:
    """Return what a student's own training took, its teacher's forward passes included."""
    costs = [stats.training_cost(p) or Cost() for p in self.runs(name)]
    return sum(costs, Cost()) * (1 / max(len(costs), 1))

  def total(self, name: str) -> Cost:
    """Add what the students that it was cut from and the calibrations took; not the teacher's own.

    A teacher that was corrected for it counts too, and the search for its shape.
    """
    student = next(s for s in STUDENTS if s.name == name)
    found, before = self.training(name), {student.guide}
    start = Path(config.of(self.runs(name)[0]).init).name
    while start not in ('', TEACHER):  # by name: the study's directory may have moved
      before.add(start)
      start = Path(config.of(self.root / 'runs' / start).init).name
    for run in before - {'', TEACHER}:
      found += stats.training_cost(self.root / 'runs' / run) or Cost()
    if student.shape == SEARCHED:
      found += search_cost(self.root / 'search')
    return found


def shape(run: Path) -> DecoderConfig:
  """Read a run's shape."""
  return config.of(run).model


def _repeated(loss: Loss, seeds: Iterable[int]) -> Loss:
  """Give every seed the one loss there is."""
  every = lambda values: dict.fromkeys(seeds, next(iter(values.values())))
  return Loss(every(loss.seeds), every(loss.bits), every(loss.replicates))


def search_cost(folder: Path) -> Cost:
  """Return what a search took, its calibration apart."""
  found = files.read_json(folder / 'search.json')
  runs = [folder / f'{s}-{i}' for i, rung in enumerate(found['rungs'], 1) for s in rung['loss']]
  spent = sum((stats.training_cost(run) or Cost() for run in runs), Cost())
  return spent + Cost(flops=found['zero_shot_flops'])


def equal_steps(steps: int, student: DecoderConfig, teacher: DecoderConfig, context: int) -> int:
  """Return the steps of next-token training that cost what those of a distillation cost."""
  mine, theirs = (forward_flops(model, context) for model in (student, teacher))
  return round(steps * (3 * mine + theirs) / (3 * mine))


def read(scale: Scale, root: Path) -> Found:
  """Read every evaluation; students of one set are resampled alike.

  Raises:
    ValueError: if some were tested on other rows than the rest.
  """
  rows: dict[str, dict[tuple[str, str, int], np.ndarray]] = {'generic': {}, scale.domain: {}}
  curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
  for student in STUDENTS:
    on = scale.domain if student.domain else 'generic'
    for seed in scale.seeds[: max(student.seeds, 1)]:
      path = root / 'runs' / f'{student.name}-{seed}'
      if (path / 'result.json').exists():
        rows[on]['trained', student.name, seed] = _rows(path, on)
        lines = [line for line in rundir.read_metrics(path) if 'eval_loss' in line]
        curves.setdefault(student.name, {})[seed] = [(x['tokens'], x['eval_loss']) for x in lines]
      cut = root / 'runs' / cut_run(student, seed)
      measured = seed != scale.seeds[0] and cut.name == cut_run(student, scale.seeds[0])
      if student.cut is not None and not measured and (cut / 'result.json').exists():
        rows[on]['cut', student.name, seed] = _rows(cut, on)
  teacher = root / 'runs' / TEACHER
  rows['generic']['trained', TEACHER, 0] = _rows(teacher, 'generic')
  found: dict[str, dict[str, Loss]] = {'cut': {}, 'trained': {}}
  for on, mine in rows.items():
    if not mine:
      continue
    tokens = next(iter(mine.values()))[:, 1]
    for (_, name, seed), values in mine.items():
      if not np.array_equal(values[:, 1], tokens):
        raise ValueError(f'{root}/runs: {name}, seed {seed}, was tested on other rows of {on}')
    facts = loader.manifest(root / 'data')['sets'][on]['test']
    num_bytes = tokens.sum() * facts['bytes_per_token']  # of the whole split: of rows nobody counts
    documents = files.read_npy(root / 'data' / on / 'test' / 'documents.npy')
    documents = loader.spaced(documents, scale.test_rows)
    many = documents if len(np.unique(documents)) > 1 else ()
    by_stage = {((stage, name), seed): values for (stage, name, seed), values in mine.items()}
    for (stage, name), loss in stats.losses(by_stage, num_bytes, on, many).items():
      found[stage][name] = loss
  return Found(root, scale, found['cut'], found['trained'], curves)


def _rows(run: Path, on: str) -> np.ndarray:
  return files.read_npy(rundir.evaluations(run) / f'{on}-test.npy')


def crossing(f: Found) -> dict[str, str]:
  """Say how many times what `width` took training from nothing takes to its loss, by what is paid.

  By tokens of training, FLOPs with the calibration, and FLOPs with the teacher's own training too;
  seeds that all have. Between the two lengths around it the loss is linear in the logarithm. The
  95 % interval is over held-out text.
  """
  names = [n for n in ('scratch_lm', *(f'scratch_lm_{n}' for n in LENGTHS)) if n in f.trained]
  if 'width' not in f.trained or len(names) < 2:
    return dict.fromkeys(PAID, 'not run')
  seeds = set.intersection(*(set(f.trained[n].seeds) for n in ('width', *names)))
  mean = lambda values: np.mean([values[s] for s in seeds], axis=0)
  target, *curve = (
    np.append(mean(f.trained[n].replicates), mean(f.trained[n].seeds)) for n in ('width', *names)
  )
  teacher = f.training(TEACHER).flops
  paid = (
    lambda n: f.training(n).tokens,
    lambda n: f.total(n).flops,
    lambda n: f.total(n).flops + teacher * (n == 'width'),
  )
  found = {}
  for what, of in zip(PAID, paid, strict=True):
    costs = np.array([of(n) for n in names]) / of('width')
    pairs = zip(np.stack(curve, axis=1), target, strict=True)
    *drawn, value = (_times(costs, losses, loss) for losses, loss in pairs)
    low, high = np.percentile(drawn, [2.5, 97.5], method='nearest')
    say = lambda x, costs=costs: (
      f'< {costs[0]:.2g}' if x == 0 else f'> {costs[-1]:.2g}' if x == np.inf else f'{x:.2g}'
    )
    found[what] = f'{say(value)} times [{say(low)}, {say(high)}]'
  return found


PAID = ('tokens', 'FLOPs', 'FLOPs with the teacher')


def _times(costs: np.ndarray, losses: np.ndarray, target: float) -> float:
  """Return the cost at which a falling curve reaches a loss; 0 before it, infinity after it."""
  if losses[0] < target:
    return 0.0
  for i in range(len(costs) - 1):
    if losses[i + 1] <= target <= losses[i]:
      share = (losses[i] - target) / (losses[i] - losses[i + 1])
      return float(costs[i] * (costs[i + 1] / costs[i]) ** share)
  return math.inf
