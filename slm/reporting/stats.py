"""Held-out losses, paired bootstrap intervals of their differences, and training costs."""

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
  """A cost of training; seconds are device-seconds."""

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

  replicates [RESAMPLES] are the losses on resampled documents, the same for every model of a set.
  """

  seeds: dict[int, float]  # nats per token
  bits: dict[int, float]  # per byte of text
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

  The interval covers the choice of held-out text and, with two seeds or more, of training runs.
  """

  value: float
  low: float
  high: float
  seeds: tuple[float, ...]  # the difference for each seed that both models have

  @property
  def verdict(self) -> str:
    """Return better or worse if the interval excludes zero, else within noise."""
    return 'better' if self.high < 0 else 'worse' if self.low > 0 else 'within noise'


def difference(a: Loss, b: Loss) -> Difference | None:
  """Return a minus b on the same text and the seeds both have; None if they share no seed."""
  shared = sorted(a.seeds.keys() & b.seeds.keys())
  if not shared:
    return None
  replicates = np.mean([a.replicates[s] - b.replicates[s] for s in shared], axis=0)
  seeds = tuple(a.seeds[s] - b.seeds[s] for s in shared)
  value, n, runs = float(np.mean(seeds)), len(seeds), 0.0
  if n > 1:  # Student's 95 % interval of a mean over training runs
    runs = float(scipy.stats.t.ppf(0.975, n - 1) * np.std(seeds, ddof=1) / n**0.5)
  # Text and training runs vary independently: their half-widths add in squares.
  low, high = (math.hypot(x - value, runs) for x in np.percentile(replicates, [2.5, 97.5]))
  return Difference(value, value - low, value + high, seeds)


def resample(
  nll: np.ndarray, tokens: np.ndarray, seed: int, resamples: int = RESAMPLES,
  documents: np.ndarray | tuple = (),
) -> np.ndarray:  # fmt: skip
  """Bootstrap documents: nll [rows,models], tokens [rows] -> losses [resamples,models].

  A loss is a ratio of sums. All models share the draws, so that differences are paired. Rows of one
  document (documents [rows]; empty: each row is its own) are drawn together.
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
  """Return each model's loss from the rows [rows,2] of every (model, seed) on one set.

  num_bytes: of the set's text; 0: unknown. The set's name seeds the bootstrap. `documents` of
  another number of rows raise ValueError.
  """
  tokens = next(iter(rows.values()))[:, 1]
  if len(documents) not in (0, len(tokens)):
    raise ValueError(f'{name}: documents.npy has {len(documents)} rows, expected {len(tokens)}')
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
  """Read the document id of each row of 'set/split'; empty if unknown or the same for all."""
  file = Path(data) / name / 'documents.npy'
  ids = files.read_npy(file) if file.exists() else np.zeros(0, np.int32)
  return ids if len(np.unique(ids)) > 1 else ids[:0]


def training_cost(ref: Path) -> Cost | None:
  """Add up the costs of RUN, or of RUN@STEP so far, without evaluations; None without a ledger."""
  path, step = rundir.split_ref(ref)
  if step is not None:
    lines = [line for line in rundir.read_metrics(path) if line['step'] == step][:1]
    like = {'tokens': float, 'flops': float, 'device_seconds': float}
    files.check(path / 'metrics.jsonl', lines, [like])
    return next((Cost(*(line[name] for name in like)) for line in lines), None)
  if not (path / 'ledger.json').exists():
    return None
  phases = (p for p in ledger.read_ledger(path)['phases'] if p['phase'] != 'evaluate')
  return sum((Cost(p['tokens'], p['flops'], p['device_seconds']) for p in phases), Cost())
