"""Format tables as Markdown or text, and the numbers in them."""

import math

from slm.reporting.stats import Cost, Difference, Loss

Table = tuple[list[str], list[list[str]]]


def markdown(table: Table) -> str:
  """Format a table as Markdown: numbers right-aligned, sentences left-aligned."""
  head, rows = table
  rule = '---' if kind(table) else '---:'
  lines = [head, ['---', *[rule] * (len(head) - 1)], *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def text(table: Table) -> str:
  """Format a table for a terminal: numbers right-aligned, sentences left-aligned."""
  head, rows = table
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  last = len(head) - 1
  sides = ['<' if i == 0 or (i == last and kind(table)) else '>' for i in range(len(head))]
  cell = lambda value, i: f'{value:{sides[i]}{widths[i]}}'
  lines = ('  '.join(cell(v, i) for i, v in enumerate(line)).rstrip() for line in (head, *rows))
  return '\n'.join(lines)


def kind(table: Table) -> str:
  """Return 'text' if a table holds sentences rather than numbers, '' if not."""
  return 'text' if any(len(cell) > 60 for row in table[1] for cell in row) else ''


def interval(d: Difference | None) -> str:
  """Format a difference with its interval, '–' if there is none."""
  return f'{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]'.replace('-', '−') if d else '–'


def number(value: float) -> str:
  """Format a large number: 3.10e15, or 0."""
  return f'{value:.2e}'.replace('e+', 'e') if value else '0'


def duration(seconds: float) -> str:
  """Format device-seconds: 12 s, 3.4 min, 2.1 h."""
  for size, unit in ((3600, 'h'), (60, 'min')):
    if seconds >= 2 * size:
      return f'{seconds / size:.1f} {unit}'
  return f'{seconds:.0f} s'


def cost(value: Cost | None) -> list[str]:
  """Format a cost as tokens, FLOPs, device time."""
  if value is None:
    return ['–'] * 3
  return [count(value.tokens), number(value.flops), duration(value.seconds)]


def count(n: float) -> str:
  """Format a count: 20k, 1.3M."""
  for size, suffix in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if n >= size:
      return f'{n / size:.3g}{suffix}'
  return f'{n:.0f}'


def perplexity(loss: Loss) -> str:
  """Format a perplexity: 14.42, 227."""
  value = math.exp(loss.value)
  return f'{value:.2f}' if value < 100 else f'{value:.0f}'


def times(ratio: float) -> str:
  """Format a ratio: 6.1×, 25×."""
  return f'{ratio:.1f}×' if ratio < 10 else f'{ratio:.0f}×'
