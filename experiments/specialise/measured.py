"""The measured cells that slm.advise goes by, from the results.csv of studies.

    python -m experiments.specialise.measured

writes slm/reporting/measured.csv, which ships with the package, from the committed studies that are
large enough to go by; with --results=FILE and --out=FILE those of any study.
"""

import csv
import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from experiments.specialise.study import BASELINE
from slm.base import console, files
from slm.reporting import advise
from slm.reporting.advise import Cell

RESULTS = tuple(Path(__file__).with_name('results') / n / 'results.csv' for n in ('cpu', 'long'))
_DIGITS = 6  # of every number that is written


def read(path: Path) -> list[Cell]:
  """Read a study's cells from its results.csv.

  Raises:
    ValueError: if there is no such file, or it is not such a table.
  """
  if not path.is_file():
    raise ValueError(f'{path}: no such file; expected a results.csv of experiments.specialise')
  with path.open(newline='') as f:
    return cells(list(csv.DictReader(f)), path)


def cells(lines: list[dict[str, str]], path: Path) -> list[Cell]:
  """Turn the lines of a results.csv into cells, named by the directory that it lies in."""
  needed = {'method', 'size', 'on', 'loss', 'params', 'generic_flops', 'specialise_flops'}
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
  if not any(x['method'] == BASELINE for x in lines):
    raise ValueError(f'{path}: holds no finished plain SLM to compare with')
  known = {key(x): x for x in lines}
  other = lambda x, method: known.get((method, x.get('budget'), x['size']), {})
  # A method that was run on fewer domains than the plain SLM averages over other text.
  alike = lambda x: x.get('domains') == other(x, BASELINE).get('domains', x.get('domains'))
  return [
    _cell(path, x, other(x, x['reference']), tests.get(key(x), [])) for x in lines if alike(x)
  ]


def _cell(path: Path, x: dict[str, str], reference: dict[str, str], verdicts: list[str]) -> Cell:
  # Another method may have other seeds: the difference is over those that both have.
  paired = bool(reference and x['difference'])
  return Cell(
    study=path.parent.name,
    method=x['method'],
    label=x['label'],
    params=float(x['params']),
    domain_tokens=float(x['size']),
    generic_flops=float(x['generic_flops']),
    specialise_flops=float(x['specialise_flops']),
    loss=float(reference['loss']) + float(x['difference']) if paired else float(x['loss']),
    half=(float(x['high']) - float(x['low'])) / 2 if paired else 0.0,
    seeds=int(x['seeds']),
    better=verdicts.count('better') * (reference.get('method') == BASELINE),
    domains=len(verdicts),
  )


def write(found: Iterable[Cell]) -> str:
  """Format cells as the text of a measured.csv."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(f.name for f in dataclasses.fields(Cell))
  for cell in found:
    values = dataclasses.astuple(cell)
    writer.writerow(f'{v:.{_DIGITS}g}' if isinstance(v, float) else v for v in values)
  return out.getvalue()


def main(_: list[str]) -> None:
  """Write the cells of --results."""
  paths = [Path(p) for p in flags.FLAGS.results] or RESULTS
  files.write_text(Path(flags.FLAGS.out), write(c for path in paths for c in read(path)))


if __name__ == '__main__':
  flags.DEFINE_multi_string('results', [], 'results.csv of a study; default: the committed ones.')
  flags.DEFINE_string('out', str(advise.FILES[0]), 'The file to write.')
  console.run(main)
