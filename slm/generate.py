"""Generate text: prefill once, then one token at a time from a key-value cache.

python -m slm.generate --run=RUN --prompt='The licence' [--run=OTHER] [--temperature=0.8]
"""

import functools
import math
import sys

import jax
from absl import flags

from slm.base import console
from slm.inference.completion import complete
from slm.models.decode import greedy, sampled
from slm.runs import load
from slm.weights import sharding


def main(_: list[str]) -> None:
  """Print every run's continuation of every prompt."""
  if not flags.FLAGS.run or not flags.FLAGS.prompt:
    raise ValueError('--run and --prompt: name at least one of each')
  sampler = greedy
  if not 0 <= flags.FLAGS.temperature < math.inf or not 0 < flags.FLAGS.top_p <= 1:
    raise ValueError('expected a --temperature of at least 0 and 0 < --top_p <= 1')
  if flags.FLAGS.temperature:
    sampler = functools.partial(
      sampled, temperature=flags.FLAGS.temperature, top_k=flags.FLAGS.top_k, top_p=flags.FLAGS.top_p
    )
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  for path in flags.FLAGS.run:
    loaded = load.load(path, mesh)
    tok, begin = load.reads(loaded, flags.FLAGS.data)
    params = loaded.params(flags.FLAGS.cluster)
    texts = complete(
      loaded, params, tok, begin, flags.FLAGS.prompt, flags.FLAGS.max_tokens, sampler,
      flags.FLAGS.seed,
    )  # fmt: skip
    print(f'== {path} (step {loaded.step})')
    for prompt, text in zip(flags.FLAGS.prompt, texts, strict=True):
      print(f'{prompt}\033[1m{text}\033[0m\n' if sys.stdout.isatty() else f'{prompt}{text}\n')


if __name__ == '__main__':
  flags.DEFINE_multi_string('run', [], 'Run directory; repeat to see several models.')
  flags.DEFINE_string('data', '', 'Where tokenizer/ is; default: the run, or its data.')
  flags.DEFINE_integer('cluster', None, 'Specialist to use, if the run holds several.')
  flags.DEFINE_multi_string('prompt', [], 'Prompt; repeat for several.')
  flags.DEFINE_integer('max_tokens', 64, 'Tokens to generate.', lower_bound=1)
  flags.DEFINE_float('temperature', 0.0, '0 is greedy.')
  flags.DEFINE_integer('top_k', 0, 'Sample among this many ids; 0: all.', lower_bound=0)
  flags.DEFINE_float('top_p', 1.0, 'Sample within this probability mass.')
  flags.DEFINE_integer('seed', 0, 'Sampling seed.')
  console.run(main)
