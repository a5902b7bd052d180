"""How the number of clusters matters: variants of a method that differ in nothing else."""

from collections.abc import Iterable

from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.specialise import plots
from experiments.specialise.cells import Cell, Comparison
from experiments.specialise.study import BASELINE, Study
from slm.reporting import figures
from slm.reporting.stats import Difference, difference
from slm.reporting.tables import count


def by_clusters(
  study: Study, found: Iterable[Comparison], size: int
) -> dict[str, tuple[tuple[str, ...], dict[int, Difference]]]:
  """Return each series' test sets and its differences to the plain SLM by number of clusters.

  A method's 'sweep' in study.json, [series, clusters], names its series by the method that it is a
  variant of. Averages are over the test sets that all of a series share. Series of one number are
  left out.
  """
  main, *further = found
  if not (base := main.cells[BASELINE, size]).complete:
    return {}
  cells = {m: cell for c in (*further, main) for (m, s), cell in c.cells.items() if s == size}
  series: dict[str, dict[int, Cell]] = {}
  for method, about in study.methods.items():
    if about.get('sweep') and method in cells and cells[method].complete:
      name, clusters = about['sweep']
      series.setdefault(name, {})[clusters] = cells[method]
  drawn = {}
  for name, points in series.items():
    tests = tuple(t for t in base.tests if all(t in cell.tests for cell in points.values()))
    pairs = {k: (cell.over(tests), base.over(tests)) for k, cell in sorted(points.items())}
    if len(pairs) > 1 and all(map(all, pairs.values())):
      gaps = {k: d for k, (a, b) in pairs.items() if (d := difference(a, b)) is not None}
      drawn[name] = tests, gaps
  return drawn


def plot(study: Study, found: list[Comparison]) -> figures.Plot | None:
  """Draw the difference to the plain SLM against the number of clusters, a panel per set size."""
  drawn = {s: x for s in study.sizes if (x := by_clusters(study, found, s))}
  if not drawn:
    return None
  style = plots.styles(study.methods)
  with rc_context(figures.RC):
    figure = Figure((1.0 + 3.0 * len(drawn), 3.5), layout='constrained')
    axes = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for (size, series), ax in zip(drawn.items(), axes, strict=True):
      for name, (_, points) in series.items():
        color, marker = style[name]
        d = list(points.values())
        below, above = [x.value - x.low for x in d], [x.high - x.value for x in d]
        values = [x.value for x in d]
        ax.errorbar(list(points), values, (below, above), color=color, marker=marker, capsize=2)
      ax.axhline(0, color=figures.INK, lw=0.9, ls=(0, (4, 3)))
      ax.set_xscale('log', base=2)
      ticks = sorted({k for _, points in series.values() for k in points})
      ax.set_xticks(ticks, [str(k) for k in ticks])
      ax.set_title(f'{count(size)} tokens of domain text')
      ax.set_xlabel('clusters')
      ax.grid(axis='y')
    axes[0].set_ylabel('nats/token above the SLM')
    names = {name: tests for series in drawn.values() for name, (tests, _) in series.items()}
    plots.legend(figure, study, list(names))
    fewer = [
      f' {study.label(name)}: on {", ".join(t.partition("/")[0] for t in tests)} alone.'
      for name, tests in names.items()
      if len(tests) < len(study.domains)
    ]
    return figures.save(
      figure,
      'clusters-sweep',
      'Number of clusters',
      'Below the dashed line is better than the plain SLM. Look at whether the lines fall to the '
      'right: then finer clusters pay. Bars are 95 % intervals, of held-out text and, over several '
      'seeds, of training runs.' + ''.join(fewer),
    )
