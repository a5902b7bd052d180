"""Held-out losses, paired bootstrap intervals of their differences, and what training cost."""

import dataclasses
import math
import zlib
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
import scipy.stats

from slm.base import files
from slm.runs import ledger, rundir

RESAMPLES = 2000
_CHUNK = 1 << 22  # resampled row counts held at once


@dataclasses.dataclass(frozen=True)
class Cost:
  """What training took; seconds count every device for the whole time."""

  tokens: float = 0
  flops: float = 0
  seconds: float = 0

  def __add__(self, other: 'Cost') -> 'Cost':
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
    return Cost(*(a + b for a, b in pairs))

  def __mul__(self, n: float) -> 'Cost':
    return Cost(*(n * a for a in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Loss:
  """One model's held-out loss on one set, by seed.

  seeds are in nats per token, bits per byte of text; replicates [RESAMPLES] are the losses on
  resampled documents, the same ones for every model of a set.
  """

  seeds: dict[int, float]
  bits: dict[int, float]
  replicates: dict[int, np.ndarray]

  @property
  def value(self) -> float:
    """Average over seeds, in nats per token."""
    return float(np.mean(list(self.seeds.values())))

  @property
  def bpb(self) -> float:
    """Average over seeds, in bits per byte."""
    return float(np.mean(list(self.bits.values())))


@dataclasses.dataclass(frozen=True)
class Difference:
  """A difference in nats per token (negative: lower loss) with its 95 % interval.

  The interval is of held-out text, and of training runs too where there are two seeds or more.
  seeds: the difference of each seed both models have.
  """

  value: float
  low: float
  high: float
  seeds: tuple[float, ...]

  @property
  def verdict(self) -> str:
    """Say better or worse only if the interval excludes zero."""
    return 'better' if self.high < 0 else 'worse' if self.low > 0 else 'within noise'


def difference(a: Loss, b: Loss) -> Difference | None:
  """Compare two models on the same text and the seeds both have, a minus b; None if none is."""
  shared = sorted(a.seeds.keys() & b.seeds.keys())
  if not shared:
    return None
  replicates = np.mean([a.replicates[s] - b.replicates[s] for s in shared], axis=0)
  seeds = tuple(a.seeds[s] - b.seeds[s] for s in shared)
  value, runs = float(np.mean(seeds)), _half_interval(seeds)
  # Text and training runs vary independently: what they add to the interval adds in squares.
  low, high = (math.hypot(x - value, runs) for x in np.percentile(replicates, [2.5, 97.5]))
  return Difference(value, value - low, value + high, seeds)


def _half_interval(seeds: tuple[float, ...]) -> float:
  """Return half of Student's 95 % interval of a mean over training runs; 0 for a single one."""
  n = len(seeds)
  return float(scipy.stats.t.ppf(0.975, n - 1) * np.std(seeds, ddof=1) / n**0.5) if n > 1 else 0.0


def resample(
  nll: np.ndarray, tokens: np.ndarray, seed: int, resamples: int = RESAMPLES,
  documents: np.ndarray | tuple = (),
) -> np.ndarray:  # fmt: skip
  """Bootstrap documents: nll [rows,models], tokens [rows] -> losses [resamples,models].

  A loss is a ratio of sums. What is drawn is shared by all models, so that differences are paired.
  Rows of a document (documents [rows]; empty: each row by itself) are drawn together.
  """
  columns = np.column_stack([nll, tokens])
  if len(documents):
    _, row = np.unique(documents, return_inverse=True)
    columns = np.stack([np.bincount(row, column) for column in columns.T], axis=1)
  rng, n = np.random.default_rng(seed), len(columns)
  chunk, sums = max(_CHUNK // n, 1), []
  for start in range(0, resamples, chunk):
    k = min(chunk, resamples - start)
    drawn = rng.integers(n, size=(k, n)) + n * np.arange(k)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=k * n).reshape(k, n)
    sums.append(counts.astype(float) @ columns)
  sums = np.concatenate(sums)
  return sums[:, :-1] / sums[:, -1:]


def losses(
  rows: Mapping[tuple[Hashable, int], np.ndarray], num_bytes: float, name: str,
  documents: np.ndarray | tuple = (),
) -> dict[Hashable, Loss]:  # fmt: skip
  """Turn the rows [rows,2] of every (model, seed) on one set into losses, all resampled alike.

  num_bytes: of the set's text; 0: not known. The set's name seeds what is drawn.
  """
  tokens = next(iter(rows.values()))[:, 1]
  if len(documents) not in (0, len(tokens)):
    raise ValueError(f'{name}: documents.npy is of {len(documents)} rows, not {len(tokens)}')
  nll = np.stack([values[:, 0] for values in rows.values()], axis=1)
  replicates = resample(nll, tokens, zlib.crc32(name.encode()), documents=documents)
  by_model: dict[Hashable, Loss] = {}
  for i, (model, seed) in enumerate(rows):
    nats, loss = float(nll[:, i].sum()), by_model.setdefault(model, Loss({}, {}, {}))
    loss.seeds[seed] = nats / float(tokens.sum())
    loss.bits[seed] = nats / math.log(2) / num_bytes if num_bytes else math.nan
    loss.replicates[seed] = replicates[:, i]
  return by_model


def documents(data: str | Path, name: str) -> np.ndarray:
  """Read the document of each row of 'set/split'; empty if unknown or one for all."""
  file = Path(data) / name / 'documents.npy'
  ids = files.read_npy(file) if file.exists() else np.zeros(0, np.int32)
  return ids if len(np.unique(ids)) > 1 else ids[:0]


def training_cost(ref: Path) -> Cost | None:
  """Add up the training phases of RUN, or of RUN@STEP up to that step. None: no ledger.

  Held-out evaluations are not training.
  """
  path, step = rundir.split_ref(ref)
  if step is not None:
    lines = rundir.read_metrics(path) if (path / 'metrics.jsonl').exists() else []
    line = next((x for x in lines if x['step'] == step), None)
    return line and Cost(line['tokens'], line['flops'], line['device_seconds'])
  if not (path / 'ledger.json').exists():
    return None
  phases = [p for p in ledger.read_ledger(path)['phases'] if p['phase'] != 'evaluate']
  costs = (Cost(p['tokens'], p['flops'], p['device_seconds']) for p in phases)
  return sum(costs, Cost())
