"""Generate text: prefill once, then one token at a time from a key-value cache.

python -m slm.generate --run=RUN --prompt='The licence' [--run=OTHER] [--temperature=0.8]
python -m slm.generate --run=RUN --chat [--system='Be brief.'] [--prompt='What is gravity?']

With --chat a prompt is what a user says to the model by its own chat template; without one, lines
are read until Ctrl-D, and every answer follows from all that was said before.
"""

import contextlib
import functools
import math
import sys

import jax
from absl import flags

from slm.base import console
from slm.inference.chat import Chat
from slm.inference.completion import complete
from slm.models.decode import Sampler, greedy, sampled
from slm.runs import load
from slm.weights import sharding


def main(_: list[str]) -> None:
  """Print every run's continuation of, or answer to, every prompt."""
  f = flags.FLAGS
  if not f.run or not (f.prompt or f.chat):
    raise ValueError('--run and --prompt: name at least one of each')
  if f.system and not f.chat:
    raise ValueError('--system: goes with --chat')
  if not f.prompt and len(f.run) > 1:
    raise ValueError('--chat without --prompt: expected one --run')
  if not 0 <= f.temperature < math.inf or not 0 < f.top_p <= 1:
    raise ValueError('expected a --temperature of at least 0 and 0 < --top_p <= 1')
  sampler = greedy
  if f.temperature:
    sampler = functools.partial(sampled, temperature=f.temperature, top_k=f.top_k, top_p=f.top_p)
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  for path in f.run:
    loaded = load.load(path, mesh)
    if f.chat:
      _chat(loaded, sampler)
    else:
      _continue(loaded, sampler)


def _continue(loaded: load.Loaded, sampler: Sampler) -> None:
  f = flags.FLAGS
  tok, begin = load.reads(loaded, f.data)
  texts = complete(
    loaded, loaded.params(f.cluster), tok, begin, f.prompt, f.max_tokens or 64, sampler, f.seed
  )
  print(f'== {loaded.path} (step {loaded.step})')
  for prompt, text in zip(f.prompt, texts, strict=True):
    print(f'{prompt}\033[1m{text}\033[0m\n' if sys.stdout.isatty() else f'{prompt}{text}\n')


def _chat(loaded: load.Loaded, sampler: Sampler) -> None:
  """Answer every prompt alone, or the lines that are typed as one conversation."""
  f = flags.FLAGS
  tok, _ = load.reads(loaded, f.data)
  talk = Chat(loaded, loaded.params(f.cluster), tok, sampler, f.seed)
  system = [{'role': 'system', 'content': f.system}] if f.system else []

  def say(messages: list[dict[str, str]]) -> str:
    said = ''
    with contextlib.suppress(KeyboardInterrupt):  # enough of this answer
      for piece in talk.answer(messages, f.max_tokens or 512):
        print(piece, end='', flush=True)
        said += piece
    print()
    return said

  if f.prompt:
    print(f'== {loaded.path} (step {loaded.step})')
    for prompt in f.prompt:
      say([*system, {'role': 'user', 'content': prompt}])
    return
  messages = system
  with contextlib.suppress(EOFError, KeyboardInterrupt):
    while True:
      if line := input('> ' if sys.stdin.isatty() else '').strip():
        messages = [*messages, {'role': 'user', 'content': line}]
        messages = [*messages, {'role': 'assistant', 'content': say(messages)}]


if __name__ == '__main__':
  flags.DEFINE_multi_string('run', [], 'Run directory; repeat to see several models.')
  flags.DEFINE_string('data', '', 'Where tokenizer/ is; default: the run, or its data.')
  flags.DEFINE_integer('cluster', None, 'Specialist to use, if the run holds several.')
  flags.DEFINE_multi_string('prompt', [], 'Prompt; repeat for several.')
  flags.DEFINE_bool('chat', False, "Talk by the model's own chat template.")
  flags.DEFINE_string('system', '', 'With --chat: what the system says first; default: what the '
                      'template says.')  # fmt: skip
  flags.DEFINE_integer('max_tokens', None, 'Tokens to generate; default: 64, with --chat 512.',
                       lower_bound=1)  # fmt: skip
  flags.DEFINE_float('temperature', 0.0, '0 is greedy.')
  flags.DEFINE_integer('top_k', 0, 'Sample among this many ids; 0: all.', lower_bound=0)
  flags.DEFINE_float('top_p', 1.0, 'Sample within this probability mass.')
  flags.DEFINE_integer('seed', 0, 'Sampling seed.')
  console.run(main)
