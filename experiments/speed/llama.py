"""Decoding of one model by slm and by llama.cpp, beside each other.

    python -m experiments.speed.llama --run=models/smollm2-135m-instruct --gguf=FILE.gguf

FILE.gguf is what `make model` reads; one with other types of weights may be given too, by another
`--gguf`. Needs the Python package xllamacpp, which is llama.cpp's own server (the extra slm[test]).
"""

import json
import statistics
import urllib.request
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import xllamacpp
from absl import flags

from slm import models
from slm.base import console, files
from slm.inference import latency
from slm.reporting import tables
from slm.runs import config

_THREADS = 2


def server(path: str, prompt: int, new_tokens: int) -> tuple[Callable[[], None], list[float]]:
  """Return a function that decodes one row, and the list to which it adds tokens/s of decoding."""
  p = xllamacpp.CommonParams()
  p.model.path, p.n_ctx, p.verbosity = path, prompt + new_tokens + 8, 0
  p.cpuparams.n_threads = p.cpuparams_batch.n_threads = _THREADS
  started = xllamacpp.Server(p)
  speeds: list[float] = []
  body = {'prompt': list(range(100, 100 + prompt)), 'n_predict': new_tokens, 'temperature': 0}
  data = json.dumps(body | {'ignore_eos': True, 'cache_prompt': False}).encode()

  def run() -> None:
    url = started.listening_address + '/completion'
    request = urllib.request.Request(url, data, {'Content-Type': 'application/json'})
    with urllib.request.urlopen(request) as answer:
      timings = json.load(answer)['timings']
    if timings['predicted_n'] != new_tokens:
      raise ValueError(f'{path}: expected {new_tokens} tokens, found {timings["predicted_n"]}')
    speeds.append(timings['predicted_per_second'])

  return run, speeds


def main(_: list[str]) -> None:
  """Measure, print the table, and write it with --out."""
  f = flags.FLAGS
  console.required('run')
  model = models.build(config.of(f.run).model)
  params = jax.jit(model.init)(jax.random.key(0))  # the speed does not depend on their values
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  contestants = {
    'read': latency.prefill(model, params, 1, f.prompt),
    'slm': latency.decode(model, params, 1, f.prompt, f.new_tokens),
  }
  served = {path: server(path, f.prompt, f.new_tokens) for path in f.gguf}
  times = latency.interleave(
    contestants | {path: run for path, (run, _) in served.items()}, f.rounds
  )
  spent = [whole - read for whole, read in zip(times['slm'], times['read'], strict=True)]
  speeds = {'slm, float32': [(f.new_tokens - 1) / s for s in spent]}
  speeds |= {f'llama.cpp, {Path(path).name}': rates[1:] for path, (_, rates) in served.items()}
  rows = [
    [name, f'{statistics.median(x):.1f}', f'{min(x):.1f}', f'{max(x):.1f}']
    for name, x in speeds.items()
  ]
  table = tables.markdown((['decoding, one row', 'tokens/s, median', 'min', 'max'], rows))
  print(table)
  if f.out:
    files.write_text(Path(f.out), table + '\n')


if __name__ == '__main__':
  flags.DEFINE_string('run', '', 'Run directory whose shape slm decodes.')
  flags.DEFINE_multi_string('gguf', [], 'Files of llama.cpp; repeat to compare several.')
  flags.DEFINE_integer('prompt', 32, 'Tokens of the prompt.', lower_bound=1)
  flags.DEFINE_integer('new_tokens', 128, 'Tokens to decode.', lower_bound=2)
  flags.DEFINE_integer('rounds', 10, 'Repeats of each.', lower_bound=1)
  flags.DEFINE_string('out', '', 'File for the table.')
  console.run(main)
