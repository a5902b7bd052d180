"""How fast models answer on this machine: prefill and decoding, all of them interleaved.

python -m slm.latency --run=RUN --run=OTHER [--batch=8 --prompt=512 --new_tokens=128]
"""

from absl import flags

from slm.base import console
from slm.inference.latency import measure
from slm.runs import config
from slm.weights.count import num_params


def main(_: list[str]) -> None:
  """Print a table: one line per run."""
  f = flags.FLAGS
  console.required('run')
  shapes = {path: config.of(path).model for path in f.run}
  found = measure(shapes, f.dtype, f.batch, f.prompt, f.new_tokens, f.rounds)
  print(
    f'{"run":40s} {"parameters":>12s} {"prefill tok/s":>14s} {"decode tok/s":>13s} {"ms/step":>9s}'
  )
  for path, shape in shapes.items():
    params = sum(num_params(shape).values())
    mine = found[path]
    print(
      f'{path[-40:]:40s} {params:12,} {f.batch * f.prompt / mine["prefill"]:14,.0f} '
      f'{f.batch / mine["token"]:13,.0f} {1e3 * mine["token"]:9.2f}'
    )


if __name__ == '__main__':
  flags.DEFINE_multi_string('run', [], 'Run directory; repeat to compare several.')
  flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'Of weights and cache.')
  flags.DEFINE_integer('batch', 1, 'Rows answered together.', lower_bound=1)
  flags.DEFINE_integer('prompt', 128, 'Tokens of a prompt.', lower_bound=1)
  flags.DEFINE_integer('new_tokens', 64, 'Tokens decoded after it.', lower_bound=1)
  flags.DEFINE_integer('rounds', 5, 'Interleaved repeats.', lower_bound=1)
  console.run(main)
