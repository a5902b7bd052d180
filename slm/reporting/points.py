"""What studies measured, and what somebody wants, in the same units: per served parameter."""

import csv
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

BASELINE = 'slm'  # the method that every other is compared with


@dataclasses.dataclass(frozen=True)
class Budget:
  """What somebody has."""

  params: float  # that may be served
  pretrain_flops: float  # once
  specialise_flops: float  # for every domain
  domain_tokens: float
  domains: int
  large_params: float = 0.0  # of a larger model that could be served too

  def want(self, per_token: float = 6.0) -> 'Want':
    """Count per served parameter; `per_token` is what training on a token takes, in FLOPs."""
    unit = per_token * self.params**2
    return Want(
      self.pretrain_flops / unit, self.specialise_flops / unit, self.domain_tokens / self.params,
      self.domains, self.large_params / self.params,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Want:
  """A Budget per served parameter, see the module."""

  pretrain: float  # FLOPs once, in tokens of training the served model
  specialise: float  # FLOPs for every domain, likewise
  text: float  # tokens of domain text per parameter
  domains: int
  large: float = 0.0  # parameters of a larger model that could be served too, as a multiple


@dataclasses.dataclass(frozen=True)
class Point:
  """A measured average over domains: a method at one budget and set size, in a Want's units."""

  study: str
  method: str
  label: str
  text: float
  pretrain: float
  specialise: float
  params: float  # served, as a multiple of the SLM's
  loss: float
  low: float  # of the difference to the SLM, 95 %; nan for the SLM
  high: float
  seeds: int
  size: int
  better: int  # domains on which it clearly beats the SLM
  domains: int
  slm_params: float
  per_token: float  # FLOPs of training the SLM on a token, per parameter

  @property
  def budget(self) -> float:
    """Return what was paid in all for one domain."""
    return self.pretrain + self.specialise


def read(path: Path) -> list[Point]:
  """Read the measured points of a study from its results.csv.

  Raises:
    ValueError: if there is no such file, or it is not such a table.
  """
  if not path.is_file():
    raise ValueError(f'{path}: no such file; expected a results.csv of experiments.specialise')
  with path.open(newline='') as f:
    return parse(list(csv.DictReader(f)), path)


def parse(lines: list[dict[str, str]], path: Path) -> list[Point]:
  """Turn the lines of a results.csv into points."""
  needed = {
    'method', 'size', 'on', 'loss', 'params', 'generic_tokens', 'generic_flops', 'specialise_flops'
  }  # fmt: skip
  if not lines or not needed <= set(lines[0]):
    raise ValueError(
      f'{path}: expected a results.csv of experiments.specialise with columns {sorted(needed)}'
    )
  key = lambda x: (x['method'], x.get('budget'), x['size'])
  tests: dict[tuple, list[str]] = {}
  for x in lines:
    if x['on'].endswith('/test') and x['size'] and x['loss']:
      tests.setdefault(key(x), []).append(x['verdict'])
  lines = [x for x in lines if x['on'] == 'average' and x['loss'] and x['generic_flops']]
  plain = {(x.get('budget'), x['size']): x for x in lines if x['method'] == BASELINE}
  if not plain:
    raise ValueError(f'{path}: holds no finished plain SLM to compare with')
  base = lambda x: plain.get((x.get('budget'), x['size']), {})
  # A method that was run on fewer domains than the plain SLM averages over other text.
  lines = [x for x in lines if x.get('domains') == base(x).get('domains', x.get('domains'))]
  for x in lines:
    # Another method may have other seeds: the difference is over those that both have.
    if base(x) and x.get('difference') and x.get('reference', BASELINE) == BASELINE:
      x['loss'] = float(base(x)['loss']) + float(x['difference'])
  first = next(iter(plain.values()))
  params = float(first['params'])
  per_token = float(first['generic_flops']) / float(first['generic_tokens']) / params
  return [_point(path, x, params, per_token, tests.get(key(x), [])) for x in lines]


def _point(
  path: Path, x: Mapping[str, str], base: float, per_token: float, verdicts: list[str]
) -> Point:
  unit = per_token * base**2
  number = lambda key: float(x[key]) if x.get(key) else math.nan
  return Point(
    study=path.parent.name,
    method=x['method'],
    label=x['label'],
    text=number('size') / base,
    pretrain=number('generic_flops') / unit,
    specialise=number('specialise_flops') / unit,
    params=number('params') / base,
    loss=number('loss'),
    low=number('low'),
    high=number('high'),
    seeds=int(x['seeds']),
    size=int(x['size']),
    better=verdicts.count('better'),
    domains=len(verdicts),
    slm_params=base,
    per_token=per_token,
  )
