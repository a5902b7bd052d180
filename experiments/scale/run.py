"""Compile published models for slices of TPUs that are not here, and tabulate what they take.

    python -m experiments.scale.run --out=runs/scale
    python -m experiments.scale.run --out=runs/scale --only=slm,moe --slices=v5e-256

Needs libtpu (pip install -e '.[tpu]'); all of them take an hour of one core. What a
compilation says is kept in OUT/<slice>/<model>.json and .txt and not asked for again, unless cells,
compiler or code have changed; OUT/table.md is written after each. Nothing runs on a chip: times are
bounds, as those of slm.compile.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import compiled
from experiments.scale import cells
from slm.base import artifact, console, files
from slm.reporting import tables
from slm.training import aot, program


def table(out: Path) -> tables.Table:
  """Return a row per compilation that is there."""
  head = [
    'model', 'slice', 'parameters', 'memory, GB', 'of the chip', 'copies of the state', 'sent, GB',
    'FLOPs', 'step at least', 'limit', 'tokens/s at most', 'MFU at most', 'chip-hours at least',
  ]  # fmt: skip
  rows = []
  for name, cell in cells.CELLS.items():
    for slice_name in cells.SLICES:
      path = out / slice_name / f'{name}.json'
      if path.exists():
        found = files.read_json(path)
        rows.append([cell.title, slice_name, *_row(found), _cost(cell, found)])
  return head, rows


def _cost(cell: cells.Cell, found: dict[str, Any]) -> str:
  """Return the least chip-hours of all steps of a cell; decoding alone has none."""
  if 'error' in found or cell.decode and cell.job not in cells.STAGES:
    return '–'
  cfg, seconds = cells.training(cell, found['chips'])[0], max(found['seconds'].values())
  return f'{program.run_cost(cfg, seconds, found["chips"])["chip-hours"]:,.3g}'


def _row(found: dict[str, Any]) -> list[str]:
  trained = tables.count(found['trained'])
  if 'error' in found:
    return [trained, found['error'], *['–'] * 8]
  memory, seconds = found['memory'], found['seconds']
  state = memory.get('optimiser moments', 0) * found['chips'] / (8 * found['trained'])
  limit = max(seconds, key=seconds.get)
  sent = sum(c['bytes'] for c in found['collectives'])
  return [
    trained,
    f'{sum(memory.values()) / 1e9:.2f}',
    f'{found["memory share"]:.0%}',
    f'{state:.2f}' if state else '–',
    f'{sent / 1e9:,.0f}' if sent >= 1e11 else f'{sent / 1e9:.3g}',
    f'{found["flops"]:.2e}'.replace('e+', 'e'),
    f'{seconds[limit]:.3g} s' if seconds[limit] >= 1 else f'{1e3 * seconds[limit]:.3g} ms',
    limit,
    f'{found["tokens"] / seconds[limit]:.3g}'.replace('e+0', 'e'),
    f'{found["mfu"]:.0%}',
  ]


def main(_: list[str]) -> None:
  """Compile what is not there yet, each in a process of its own, and write the table."""
  f = flags.FLAGS
  console.required('out')
  out = Path(f.out)
  only, slices = f.only or list(cells.CELLS), f.slices or list(cells.SLICES)
  for given, known in ((only, cells.CELLS), (slices, cells.SLICES)):
    if unknown := set(given) - set(known):
      raise ValueError(f'expected some of {", ".join(known)}; found {", ".join(sorted(unknown))}')
  aot.devices(cells.SLICES[slices[0]])  # says what is missing before a process is started
  fits = lambda name, s: s in cells.CELLS[name].slices
  todo = [(n, s, out / s / f'{n}.json') for n in only for s in slices if fits(n, s)]
  with artifact.hold(out), console.Progress('compile', len(todo), 'programs') as progress:
    for name, slice_name, path in todo:
      progress.say(f'{name} for {slice_name}')
      cell, topology = cells.CELLS[name], cells.SLICES[slice_name]
      count = len(aot.devices(topology))
      run = compiled.Run(name, *cells.training(cell, count))
      compiled.keep(path, topology, run, cell.decode * count)
      files.write_text(out / 'table.md', tables.markdown(table(out)))
      progress.update(1)
  print(tables.text(table(out)))


if __name__ == '__main__':
  flags.DEFINE_string('out', '', 'Directory of the results.')
  flags.DEFINE_list('only', [], 'Models, of experiments/scale/cells.py; none: all.')
  flags.DEFINE_list('slices', [], 'Slices, of experiments/scale/cells.py; none: all.')
  console.run(main)
