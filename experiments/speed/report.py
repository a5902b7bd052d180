"""The tables and the plot of what was measured."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Entries = Mapping[str, Mapping[str, Any]]
OURS = 'slm'


def ratios(entries: Entries, bars: Mapping[str, str]) -> list[dict[str, Any]]:
  """Return the ratios of medians, and of fastest rounds, of every row to slm's of its group.

  A matrix product is compared with every training step of slm, by FLOP/s; others by seconds.
  """
  found = []
  for name, entry in entries.items():
    group, _, who = name.rpartition(': ')
    if group and who != OURS and f'{group}: {OURS}' in entries:
      found.append((f'seconds, {name} / {OURS}', name, entry, entries[f'{group}: {OURS}'], 1.0))
    if not group:
      for step in (n for n in entries if n.startswith('train') and n.endswith(f': {OURS}')):
        flops = entries[step]['flops'] / entry['flops']
        found.append((f'FLOP/s, {step} / {name}', name, entry, entries[step], flops))
  return [
    {
      'ratio': what,
      'bar': bars.get(name, ''),
      'median': scale * statistics.median(a['seconds']) / statistics.median(b['seconds']),
      'fastest': scale * min(a['seconds']) / min(b['seconds']),
    }
    for what, name, a, b, scale in found
  ]


def _rate(entry: Mapping[str, Any]) -> float:
  return entry.get('flops', 0.0) / statistics.median(entry['seconds'])


def table(result: Mapping[str, Any]) -> str:
  """Write the markdown of a result."""
  entries = result['entries']
  lines = [f'# Speed, {result["scale"]} scale', '']
  lines += ['| ratio | of medians | of fastest rounds | bar |', '| --- | --- | --- | --- |']
  for r in result['ratios']:
    lines.append(f'| {r["ratio"]} | {r["median"]:.2f} | {r["fastest"]:.2f} | {r["bar"]} |')
  columns = ('', 'median s', 'min s', 'max s', 'tokens/s', 'GFLOP/s', 'of the fastest product')
  lines += ['', f'| {" | ".join(columns)} |', '| --- ' * len(columns) + '|']
  peak = max((_rate(e) for n, e in entries.items() if n.startswith('gemm')), default=0.0)
  for name, e in entries.items():
    s, rate = statistics.median(e['seconds']), _rate(e)
    cells = [name, *(f'{x:.4f}' for x in (s, min(e['seconds']), max(e['seconds'])))]
    cells.append(f'{e["tokens"] / s:,.0f}' if 'tokens' in e else '')
    cells.append(f'{rate / 1e9:,.1f}' if rate else '')
    cells.append(f'{rate / peak:.0%}' if rate and peak else '')
    lines.append(f'| {" | ".join(cells)} |')
  lines += ['', *(f'- {name}: not measured: {why}' for name, why in result['missing'].items())]
  lines += [*(f'- {name}: {value}' for name, value in result['machine'].items()), '']
  return '\n'.join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
  """Draw every contestant's seconds, a dot per round and a line at the median."""
  names = [n for n in result['entries'] if not n.startswith('gemm')]
  figure = Figure(figsize=(8, 0.5 * len(names) + 1), layout='constrained')
  ax = figure.subplots()
  for y, name in enumerate(names):
    seconds = result['entries'][name]['seconds']
    colour = '#0072b2' if name.rpartition(': ')[2].startswith(OURS) else '#d55e00'
    ax.plot(seconds, [y] * len(seconds), 'o', color=colour, alpha=0.5)
    ax.plot([statistics.median(seconds)], [y], '|', color=colour, markersize=22)
  ax.set(yticks=range(len(names)), yticklabels=names, xlabel='seconds', xscale='log')
  ax.invert_yaxis()
  figure.savefig(path.with_suffix('.tmp'), format='png', dpi=150)
  path.with_suffix('.tmp').rename(path)
