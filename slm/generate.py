"""Generate text with a key-value cache: continue prompts, or chat.

python -m slm.generate --run=RUN --prompt='The licence' [--run=OTHER] [--temperature=0.8]
python -m slm.generate --run=RUN --chat [--system='Be brief.'] [--prompt='What is gravity?']

With --chat every prompt is a user's message, rendered by the model's own chat template; without
prompts, lines are read until Ctrl-D as one conversation.
"""

import contextlib
import functools
import math
import sys

import jax
from absl import flags

from slm.base import console, stage
from slm.inference.chat import Chat
from slm.inference.completion import complete
from slm.models.decode import greedy, sampled
from slm.runs import load
from slm.weights import sharding


def main(_: list[str]) -> None:
  """Print the continuation of, or the answer to, every prompt by every run."""
  f = flags.FLAGS
  if not f.run or not (f.prompt or f.chat):
    raise ValueError('expected at least one --run, and a --prompt or --chat')
  if f.system and not f.chat:
    raise ValueError('--system needs --chat')
  if not f.prompt and len(f.run) > 1:
    raise ValueError(f'--chat without --prompt: expected one --run, found {len(f.run)}')
  if not 0 <= f.temperature < math.inf or not 0 < f.top_p <= 1:
    raise ValueError('expected a --temperature of at least 0, and 0 < --top_p <= 1')
  sampler = greedy
  if f.temperature:
    sampler = functools.partial(sampled, temperature=f.temperature, top_k=f.top_k, top_p=f.top_p)
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  for path in f.run:
    loaded = load.load(path, mesh)
    params, (tok, begin) = loaded.params(f.cluster), load.reads(loaded, f.data)
    if f.chat:
      _chat(Chat(loaded, params, tok, sampler, f.seed), loaded)
      continue
    texts = complete(loaded, params, tok, begin, f.prompt, f.max_tokens or 64, sampler, f.seed)
    print(f'== {stage.named(str(loaded.path))} (step {loaded.step})')
    for prompt, text in zip(f.prompt, texts, strict=True):
      print(f'{prompt}\033[1m{text}\033[0m\n' if sys.stdout.isatty() else f'{prompt}{text}\n')


def _chat(chat: Chat, loaded: load.Loaded) -> None:
  """Answer every prompt by itself, or the lines that are typed as one conversation."""
  f = flags.FLAGS
  messages = [{'role': 'system', 'content': f.system}] if f.system else []

  def answer(text: str) -> list[dict[str, str]]:
    """Print the answer to a user's message; returns the conversation with both."""
    asked, reply = [*messages, {'role': 'user', 'content': text}], ''
    with contextlib.suppress(KeyboardInterrupt):  # ends this answer alone
      for piece in chat.answer(asked, f.max_tokens or 512):
        print(piece, end='', flush=True)
        reply += piece
    print()
    return [*asked, {'role': 'assistant', 'content': reply}]

  if f.prompt:
    print(f'== {stage.named(str(loaded.path))} (step {loaded.step})')
    for prompt in f.prompt:
      answer(prompt)
    return
  with contextlib.suppress(EOFError, KeyboardInterrupt):
    while True:
      if line := input('> ' if sys.stdin.isatty() else '').strip():
        messages = answer(line)


if __name__ == '__main__':
  flags.DEFINE_multi_string('run', [], 'Run directory; repeat to see several models.')
  flags.DEFINE_string('data', '', 'Directory of tokenizer/; default: the run, or its data.')
  flags.DEFINE_integer('cluster', None, 'Specialist to use, if the run holds several.')
  flags.DEFINE_multi_string('prompt', [], 'Prompt; repeat for several.')
  flags.DEFINE_bool('chat', False, "Chat by the model's own template.")
  flags.DEFINE_string('system', '', "--chat: the system's message; default: that of the template.")
  flags.DEFINE_integer('max_tokens', None, 'Most new tokens; default: 64, with --chat 512.', 1)
  flags.DEFINE_float('temperature', 0.0, '0 is greedy.')
  flags.DEFINE_integer('top_k', 0, 'Sample among this many ids; 0: all.', 0)
  flags.DEFINE_float('top_p', 1.0, 'Sample within this probability mass.')
  flags.DEFINE_integer('seed', 0, 'Sampling seed.')
  console.run(main)
