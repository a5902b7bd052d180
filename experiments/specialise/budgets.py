"""How methods compare as pretraining goes on: checkpoints of one run are specialised each."""

from matplotlib import rc_context, ticker
from matplotlib.figure import Figure

from experiments.specialise import plots
from experiments.specialise.cells import Comparison, compare
from experiments.specialise.study import BASELINE, Study
from slm.reporting import figures
from slm.reporting.stats import Difference
from slm.reporting.tables import Table, count, interval


def by_budget(study: Study) -> dict[float, Comparison]:
  """Compare the main methods at every share of the pretraining, smallest first."""
  return {budget: compare(study.only(budget=budget)) for budget in study.budgets}


def sizes(found: dict[float, Comparison]) -> list[int]:
  """List the set sizes that more than one budget was specialised with."""
  (first, *_) = found.values()
  held = lambda c, size: any(cell.complete for (_, s), cell in c.cells.items() if s == size)
  return [s for s in first.study.sizes if sum(held(c, s) for c in found.values()) > 1]


def table(found: dict[float, Comparison]) -> Table:
  """Build the difference to the SLM at the same budget."""
  (last, *_) = reversed(found.values())
  head = ['method', 'tokens of domain text', *(f'{b:.3g} of the pretraining' for b in found)]
  rows = []
  for size in sizes(found):
    for method in last.study.methods:
      cells = [c.cells[method, size] for c in found.values()]
      if sum(cell.complete for cell in cells) < 2:
        continue
      row = [last.study.label(method), count(size)]
      for c, cell in zip(found.values(), cells, strict=True):
        if method == BASELINE:
          row.append(f'loss {cell.average.value:.3f}' if cell.complete else '–')
        else:
          row.append(interval(c.to_baseline(cell)))
      rows.append(row)
  return head, rows


def gap(found: dict[float, Comparison], method: str, size: int) -> dict[float, Difference]:
  """Return a method's difference to the SLM at every budget that has both."""
  pairs = {b: c.to_baseline(c.cells[method, size]) for b, c in found.items()}
  return {b: d for b, d in pairs.items() if d is not None}


def plot(found: dict[float, Comparison]) -> figures.Plot | None:
  """Draw loss against the cost of pretraining: on generic text, and for each set size."""
  if len(found) < 2 or not sizes(found):
    return None
  (last, *_) = reversed(found.values())
  style = plots.styles(last.study.methods)
  panels: list[str | int] = ['generic text, no fine-tuning'] if any(
    len(_points(found, m, '')) > 1 for m in last.study.methods
  ) else []  # fmt: skip
  panels += sizes(found)
  with rc_context(figures.RC):
    figure = Figure((0.8 + 3.0 * len(panels), 3.6), layout='constrained')
    drawn: dict[str, None] = {}
    for panel, ax in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
      lines = {m: _points(found, m, panel) for m in last.study.methods}
      lines = {m: points for m, points in lines.items() if len(points) > 1}
      drawn |= dict.fromkeys(lines)
      for method, points in lines.items():
        color, marker = style[method]
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=color, marker=marker, lw=1.3, **plots.marks(method))
      ax.set_xscale('log')
      if lines:
        ax.set_ylim(*plots.window(y for points in lines.values() for _, y in points))
      ax.set_title(panel if isinstance(panel, str) else f'{count(panel)} tokens of domain text')
      what = 'pretraining' if isinstance(panel, str) else 'training cost for one domain'
      ax.set_xlabel(f'{what}, FLOPs')
      ax.xaxis.set_minor_formatter(ticker.NullFormatter())
      ax.grid()
    figure.axes[0].set_ylabel('loss, nats/token')
    plots.legend(figure, last.study, list(drawn))
    return figures.save(
      figure,
      'loss-by-budget',
      'Loss against the pretraining budget',
      'Down is better. Each line is one pretraining, specialised at several of its checkpoints. '
      'Look for lines that cross: a method that needs a long pretraining starts above the plain '
      'SLM and ends below it.',
    )


def _points(
  found: dict[float, Comparison], method: str, panel: str | int
) -> list[tuple[float, float]]:
  points = []
  for c in found.values():
    if isinstance(panel, str):
      loss, cost = c.generic.get(method), c.generic_costs.get(method)
      points += [(cost.flops, loss.value)] if loss and cost else []
    elif c.cells[method, panel].complete and (cost := c.cells[method, panel].total(1)):
      points.append((cost.flops, c.cells[method, panel].average.value))
  return points
