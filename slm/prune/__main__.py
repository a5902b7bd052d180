r"""Score a run's channels, neurons, heads, experts and layers, and cut it to a smaller shape.

    python -m slm.prune calibrate --run=RUN --data=DATA --out=STATS
    python -m slm.prune cut --run=RUN --stats=STATS --sizes=embed=768,mlp=2048 --workdir=SMALL
    python -m slm.prune compare --stats=STATS --stats=OTHER --sizes=embed=768,mlp=2048

STATS is a calibration: what cut needs beyond it (--by=taylor, --depth, --norm_gain=calibrated) it
measures on the same rows and keeps there. With two, --mix interpolates their scores; compare says
how far they agree, against chance. All can be killed at any moment and continued. SMALL is a run
like any other: distil into it with configs/recover.py, --config.init=SMALL --config.teacher=RUN.
"""

from absl import flags

from slm import cli
from slm.prune import commands, importance, slicing


def main(argv: list[str]) -> None:
  """Run the command."""
  f = flags.FLAGS
  if argv[1:] == ['calibrate'] and f.run and f.out:
    stats = commands.calibrate(f.run, f.data, f.out, f.set, f.split, f.index, f.rows, f.batch_size)
    print(f'{f.out}: {stats["count"]:,} sequences, {stats["tokens"]:,} tokens')
  elif argv[1:] == ['cut'] and f.run and f.stats and f.workdir:
    wanted = slicing.read_sizes(f.sizes)
    if len(f.stats) == 2 and not f.mix:
      raise ValueError('--mix: with two --stats expected the share of the second, found 0')
    cfg, counts = commands.cut(
      f.run, f.stats, wanted, f.workdir, norm_gain=f.norm_gain, by=f.by, depth=f.depth, mix=f.mix,
      tokens=f.tokens, sequences=f.sequences, align=f.align, seed=f.seed,
      task=f.task, limit=f.limit,
    )  # fmt: skip
    shape = ', '.join(f'{axis} {getattr(cfg, slicing.SIZES[axis])}' for axis in wanted)
    print(f'{f.workdir}: {shape}; {counts[1]:,} parameters of {counts[0]:,}')
  elif argv[1:] == ['compare'] and f.stats:
    found = commands.compare(
      f.stats, slicing.read_sizes(f.sizes), tokens=f.tokens, sequences=f.sequences
    )
    for axis, (share, chance) in found.items():
      print(f'{axis}: {share:.3f} in common, {chance:.3f} by chance')
  else:
    raise ValueError(
      'expected: calibrate --run=RUN --out=STATS, cut --run=RUN --stats=STATS --sizes=... '
      '--workdir=SMALL, or compare --stats=A --stats=B --sizes=...; found '
      f'{" ".join(argv[1:]) or "nothing"}'
    )


if __name__ == '__main__':
  flags.DEFINE_string('run', '', 'Run (or RUN@STEP) of a dense model.')
  flags.DEFINE_string('data', '', "calibrate: data directory; default: the run's own.")
  flags.DEFINE_string('out', '', 'calibrate: directory to write.')
  flags.DEFINE_string('set', 'generic', 'calibrate: set of the data.')
  flags.DEFINE_string('split', 'train', 'calibrate: its split.')
  flags.DEFINE_string('index', '', 'calibrate: an index of it; default: all rows.')
  flags.DEFINE_integer('rows', 1024, 'calibrate: rows, evenly spaced.')
  flags.DEFINE_integer('batch_size', 16, 'calibrate: rows per forward pass.')
  flags.DEFINE_multi_string('stats', [], 'cut, compare: what calibrate wrote; two to mix.')
  flags.DEFINE_float('mix', 0.0, 'cut: share of the second --stats in the scores.')
  flags.DEFINE_string('sizes', '', f'cut, compare: axis=size,... of {", ".join(slicing.SIZES)}.')
  flags.DEFINE_string('workdir', '', 'cut: run directory to write.')
  flags.DEFINE_enum('norm_gain', 'none', slicing.GAINS, 'cut: see slm.prune.slicing.cut.')
  flags.DEFINE_enum('by', 'activations', commands.BY, 'cut: what widths are scored by.')
  flags.DEFINE_enum(
    'depth', 'influence', commands.DEPTH,
    'cut: layers by block influence, by the loss without each, or a window by the loss without it.',
  )  # fmt: skip
  flags.DEFINE_string(
    'task', '', 'cut: choose the window of layers by the items of this task file.'
  )
  flags.DEFINE_integer('limit', 0, 'cut: of its items, the first so many; 0: all.')
  flags.DEFINE_integer('seed', 0, 'cut: of --by=random.')
  flags.DEFINE_enum('tokens', 'mean', importance.AGGREGATORS, 'cut: aggregator over tokens.')
  flags.DEFINE_enum('sequences', 'l2', importance.AGGREGATORS, 'cut: aggregator over sequences.')
  flags.DEFINE_integer(
    'align', 0, 'cut: what widths must be multiples of; 0: 128 of at least 1024, otherwise 8.'
  )
  cli.run(main, positional=True)
