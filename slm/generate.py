"""Generate text: prefill once, then one token at a time from a key-value cache.

python -m slm.generate --run=RUN --prompt='The licence' [--run=OTHER] [--temperature=0.8]
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from slm import cli, load, models, reparam, sharding
from slm.data import tokenizer
from slm.models.decoder import init_cache, unembed

Params = dict[str, Any]
Sampler = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [b,v], key) -> ids [b]


class Completions(NamedTuple):
  """Generated ids [b,max_tokens], their log-probabilities, and lengths [b] up to the end id."""

  tokens: jax.Array
  logprobs: jax.Array
  lengths: jax.Array


def greedy(logits: jax.Array, key: jax.Array) -> jax.Array:
  """Take the most probable id."""
  return jnp.argmax(logits, axis=-1)


def sampled(
  logits: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
  """Draw from the softmax at a temperature, cut to top_k ids (0: all) and to top_p mass."""
  logits = logits / temperature
  if top_k:
    kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    # Keep the smallest set that reaches top_p: the ids before which less than top_p lies.
    last = jnp.sum(mass - jax.nn.softmax(ordered, axis=-1) < top_p, axis=-1, keepdims=True) - 1
    cut = jnp.take_along_axis(ordered, last, axis=-1)
    logits = jnp.where(logits < cut, -jnp.inf, logits)
  return jax.random.categorical(key, logits, axis=-1)


@functools.partial(jax.jit, static_argnames=('model', 'max_tokens', 'sampler', 'end'))
def generate(
  model: models.Model,
  params: Params,
  prompts: jax.Array,
  prompt_mask: jax.Array,
  key: jax.Array,
  *,
  max_tokens: int,
  sampler: Sampler = greedy,
  end: int = -1,
) -> Completions:
  """Continue prompts [b,t], padded on the left where prompt_mask [b,t] is 0.

  A row stops at the id `end` (-1: never); what follows it in tokens is `end` again.
  """
  b, t = prompts.shape
  mask = prompt_mask.astype(jnp.int32)
  cache = init_cache(model.cfg, b, t + max_tokens, params['embedding'].dtype)
  positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
  batch = {'inputs': prompts, 'positions': positions, 'segments': mask}
  out = model.forward(params, batch, cache)
  cache, logits = out.cache, unembed(params, out.replace(hidden=out.hidden[:, -1]))
  ones = jnp.ones((b, 1), jnp.int32)

  def pick(logits, i, done):
    ids = sampler(logits, jax.random.fold_in(key, i)).astype(jnp.int32)
    ids = jnp.where(done, end, ids) if end >= 0 else ids
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=-1)[:, 0]
    return ids, jnp.where(done, 0.0, picked), done | (ids == end)

  def one(carry, i):
    ids, position, cache, done = carry
    batch = {'inputs': ids[:, None], 'positions': position[:, None], 'segments': ones}
    out = model.forward(params, batch, cache)
    ids, logprob, now_done = pick(unembed(params, out)[:, -1], i, done)
    return (ids, position + 1, out.cache, now_done), (ids, logprob, done)

  start = jnp.zeros((b,), bool)
  ids, logprob, done = pick(logits, 0, start)
  carry = (ids, positions[:, -1] + 1, cache, done)
  _, rest = jax.lax.scan(one, carry, jnp.arange(1, max_tokens))
  first = (ids, logprob, start)
  tokens, logprobs, ended = (
    jnp.concatenate([a[:, None], b.swapaxes(0, 1)], axis=1)
    for a, b in zip(first, rest, strict=True)
  )
  return Completions(tokens, logprobs, jnp.sum(~ended, axis=1))


def complete(
  loaded: load.Loaded,
  params: Params,
  tok: tokenizer.Tokenizer,
  begin: list[int],
  prompts: list[str],
  max_tokens: int,
  sampler: Sampler,
  seed: int,
) -> list[str]:
  """Continue text prompts after the ids `begin`; returns the continuations without the prompts.

  Raises:
    ValueError: if a prompt is empty for a model that reads no begin token.
  """
  ids = [[*begin, *tok.encode(p)] for p in prompts]
  longest = max(map(len, ids))
  if not all(ids):
    raise ValueError('--prompt: expected some text: this model reads no begin token')
  padded = np.array([[0] * (longest - len(i)) + i for i in ids], np.int32)
  mask = np.array([[0] * (longest - len(i)) + [1] * len(i) for i in ids], np.int32)
  params = reparam.cast(params, jnp.dtype(loaded.cfg['dtype']))
  out = generate(
    loaded.model,
    params,
    padded,
    mask,
    jax.random.key(seed),
    max_tokens=max_tokens,
    sampler=sampler,
    end=tok.ids.eos,
  )
  kept = [row[:n].tolist() for row, n in zip(np.asarray(out.tokens), out.lengths, strict=True)]
  return [tok.decode([i for i in row if i != tok.ids.eos]) for row in kept]


def main(_: list[str]) -> None:
  """Print every run's continuation of every prompt."""
  if not flags.FLAGS.run or not flags.FLAGS.prompt:
    raise ValueError('--run and --prompt: name at least one of each')
  sampler = greedy
  if flags.FLAGS.temperature < 0 or not 0 < flags.FLAGS.top_p <= 1:
    raise ValueError('expected --temperature >= 0 and 0 < --top_p <= 1')
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
  flags.DEFINE_integer('top_k', 0, 'Sample among this many ids; 0: all.')
  flags.DEFINE_float('top_p', 1.0, 'Sample within this probability mass.')
  flags.DEFINE_integer('seed', 0, 'Sampling seed.')
  cli.run(main)
