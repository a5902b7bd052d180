"""Speed of prefill and decoding on this machine, all models interleaved.

python -m slm.latency --run=RUN --run=OTHER [--batch=8 --prompt=512 --new_tokens=128]
"""

from absl import flags

from slm.base import console
from slm.inference.latency import measure
from slm.reporting import tables
from slm.runs import config
from slm.weights.count import num_params


def main(_: list[str]) -> None:
  """Print a table with a row per run."""
  f = flags.FLAGS
  console.required('run')
  shapes = {path: config.of(path).model for path in f.run}
  times = measure(shapes, f.dtype, f.batch, f.prompt, f.new_tokens, f.rounds)
  head = ['run', 'parameters', 'prefill tok/s', 'decode tok/s', 'ms/step']
  rows = [
    [
      path,
      f'{sum(num_params(shapes[path]).values()):,}',
      f'{f.batch * f.prompt / seconds["prefill"]:,.0f}',
      f'{f.batch / seconds["token"]:,.0f}',
      f'{1e3 * seconds["token"]:.2f}',
    ]
    for path, seconds in times.items()
  ]
  print(tables.text((head, rows)))


if __name__ == '__main__':
  flags.DEFINE_multi_string('run', [], 'Run directory; repeat to compare several.')
  flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'Type of weights and cache.')
  flags.DEFINE_integer('batch', 1, 'Rows decoded together.', lower_bound=1)
  flags.DEFINE_integer('prompt', 128, 'Tokens per prompt.', lower_bound=1)
  flags.DEFINE_integer('new_tokens', 64, 'Tokens decoded after it.', lower_bound=1)
  flags.DEFINE_integer('rounds', 5, 'Interleaved repeats.', lower_bound=1)
  console.run(main)
