r"""Score a run's channels, neurons, heads, experts and layers, and cut it to a smaller shape.

    python -m slm.prune calibrate --run=RUN --data=DATA --out=STATS
    python -m slm.prune cut --run=RUN --stats=STATS --sizes=embed=768,mlp=2048 --workdir=SMALL
    python -m slm.prune compare --stats=STATS --stats=OTHER --sizes=embed=768,mlp=2048

    python -m slm.prune search --run=RUN --stats=STATS --workdir=DIR --max_params=4.5e9 \
      --config=configs/recover.py --config.data.path=DATA --config.steps=100 \
      --config.schedule.warmup=10

STATS is a calibration; further passes that cut needs (--by=taylor, --depth, --norm_gain=calibrated)
run over the same rows and are kept there. --mix interpolates the scores of two calibrations, and
compare prints how far they agree, against chance. Every command continues when it is run again.
SMALL is an ordinary run: distil into it with configs/recover.py, --config.init=SMALL
--config.teacher=RUN. search trains the best shapes within bounds a little, see
slm/pruning/search.py, and writes DIR/<shape>, the cut to start the recovery from.
"""

from pathlib import Path

from absl import flags

from slm.base import console
from slm.models import observe
from slm.pruning import commands, search, slicing
from slm.runs import config


def main(argv: list[str]) -> None:
  """Run the subcommand that the first argument names."""
  run = {'calibrate': calibrate, 'cut': cut, 'compare': compare, 'search': find}
  run[console.subcommand(argv, dict.fromkeys(run, ''))[0]]()


def calibrate() -> None:
  """Score a run's units and print what was read."""
  console.required('run', 'out')
  f = flags.FLAGS
  stats = commands.calibrate(f.run, f.data, f.out, f.on, f.rows, f.batch_size)
  print(f'{f.out}: {stats["count"]:,} sequences, {stats["tokens"]:,} tokens')


def cut() -> None:
  """Cut a run and print the smaller shape."""
  console.required('run', 'stats', 'sizes', 'workdir')
  f = flags.FLAGS
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


def compare() -> None:
  """Print how far two calibrations agree on what to keep."""
  console.required('stats', 'sizes')
  f = flags.FLAGS
  sizes = slicing.read_sizes(f.sizes)
  shares = commands.compare(f.stats, sizes, tokens=f.tokens, sequences=f.sequences)
  for axis, (share, chance) in shares.items():
    print(f'{axis}: {share:.3f} in common, {chance:.3f} by chance')


def find() -> None:
  """Search the shapes within bounds and print them ranked."""
  console.required('run', 'stats', 'workdir')
  f = flags.FLAGS
  if len(f.stats) != 1:
    raise ValueError(f'--stats: search expects one, found {len(f.stats)}')
  whole = config.of(f.run).model
  grid = search.read_grid(f.grid, whole) or search.default_grid(whole, f.multiple)
  limits = (f.max_params, f.max_active, f.max_memory, f.max_token_ms)
  if not any(limits):
    raise ValueError('expected one of --max_params, --max_active, --max_memory, --max_token_ms')
  result = search.search(
    f.run, f.stats[0], Path(f.workdir), f.config.to_dict(), grid,
    search.Bounds(*limits, f.batch, f.context, f.dtype),
    count=f.count, survivors=f.survivors, rounds=f.rounds,
  )  # fmt: skip
  print(search.table(result))
  print(f'best: {f.workdir}/{result["best"]}; the search took {result["flops"]:.3g} FLOPs')


if __name__ == '__main__':
  flags.DEFINE_string('run', '', 'Run (or RUN@STEP) of a dense model.')
  flags.DEFINE_string('data', '', "calibrate: data directory; default: the run's own.")
  flags.DEFINE_string('out', '', 'calibrate: directory to write.')
  flags.DEFINE_string('on', 'generic/train', 'calibrate: SET/SPLIT[@INDEX] whose rows are read.')
  flags.DEFINE_integer('rows', 1024, 'calibrate: rows, evenly spaced.')
  flags.DEFINE_integer('batch_size', 16, 'calibrate: rows per forward pass.')
  flags.DEFINE_multi_string('stats', [], 'cut, compare, search: calibration; two to mix.')
  flags.DEFINE_float('mix', 0.0, 'cut: share of the second --stats in the scores.')
  flags.DEFINE_string('sizes', '', f'cut, compare: axis=size,... of {", ".join(slicing.SIZES)}.')
  flags.DEFINE_string('workdir', '', 'cut: run directory to write; search: directory to write.')
  flags.DEFINE_enum('norm_gain', 'none', slicing.GAINS, 'cut: see slm.pruning.slicing.cut.')
  flags.DEFINE_enum('by', 'activations', commands.BY, 'cut: criterion of widths.')
  flags.DEFINE_enum(
    'depth', 'influence', commands.DEPTH,
    'cut: layers by block influence, by the loss without each, or a window by the loss without it.',
  )  # fmt: skip
  flags.DEFINE_string('task', '', 'cut: task file whose items choose the window of layers.')
  flags.DEFINE_integer('limit', 0, 'cut: items used of --task, from the first; 0: all.')
  flags.DEFINE_integer('seed', 0, 'cut: seed of --by=random.')
  flags.DEFINE_enum('tokens', 'mean', observe.AGGREGATORS, 'cut: aggregator over tokens.')
  flags.DEFINE_enum('sequences', 'l2', observe.AGGREGATORS, 'cut: aggregator over sequences.')
  flags.DEFINE_integer('align', 0, 'cut: divisor of widths; 0: 128 for 1024 or more, 8 for less.')
  flags.DEFINE_string(
    'grid', '', 'search: axis=size:size,...; default: from 60 % width, 80 % depth.'
  )
  flags.DEFINE_integer('multiple', 128, 'search: divisor of widths in the default grid.', 1)
  flags.DEFINE_float('max_params', 0.0, 'search: most parameters.')
  flags.DEFINE_float('max_active', 0.0, 'search: most parameters used by each token.')
  flags.DEFINE_float('max_memory', 0.0, 'search: most bytes of weights and cache.')
  flags.DEFINE_float('max_token_ms', 0.0, 'search: most milliseconds per decoding step, measured.')
  flags.DEFINE_integer('batch', 1, 'search: rows decoded together, for memory and speed.')
  flags.DEFINE_integer('context', 1024, 'search: tokens in the cache, for memory and speed.')
  flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'search: of weights and cache.')
  flags.DEFINE_integer('count', 10, 'search: shapes that are scored, from the largest.', 1)
  flags.DEFINE_integer('survivors', 4, 'search: shapes that are trained.', 1)
  flags.DEFINE_integer('rounds', 5, 'search: interleaved repeats of the speed measurement.', 1)
  old = dict.fromkeys(('set', 'split', 'index'), '--on=SET/SPLIT[@INDEX]')
  console.run(main, config='recover', keys=config.RunConfig, positional=True, renamed=old)
