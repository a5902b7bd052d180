r"""Text that a model goes on with itself: as a corpus, or in place of the rows of a batch.

    python -m slm.continuations --run=RUN --on=generic/train --rows=10000 --out=TEXT
    python -m slm.data.prepare --out=DATA --config='configs/data.py:generic=TEXT/*.jsonl' ...

Rows begin, the model continues: a corpus in the teacher's own words, to distil on where the text it
was trained on is not at hand. With objective.on_policy it is the student that continues, while it
trains, and the teacher that judges (GKD, Agarwal et al. 2023, arXiv 2306.13649). Killed at any
moment, the same command continues.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from slm import cli, data, files, load, models, record, reparam, rundir, sharding
from slm.data import tokenizer
from slm.generate import Completions, generate, sampled
from slm.models.decoder import forward_flops

Params = dict[str, Any]
_ABOUT = 'continuations.json'
_SHARD = 256  # rows


@functools.lru_cache
def _sampler(temperature: float, vocab: int) -> Any:
  """Draw of the ids that the tokenizer has: those that pad a vocabulary mean nothing."""
  return lambda logits, key: sampled(logits[:, :vocab], key, temperature, 0, 1.0)


def prompts(tokens: Any, segments: Any, length: int) -> tuple[Any, Any]:
  """Take the window that is open after `length` tokens of rows [b,t]: ids and mask [b,length].

  The mask is all zero where padding has begun.
  """
  last = segments[:, length - 1 : length]
  return tokens[:, :length], (segments[:, :length] == last) & (last > 0)


def rewrite(
  model: models.Model, params: Params, batch: data.Batch, key: jax.Array, prompt: int,
  tok: tokenizer.Tokenizer,
) -> data.Batch:  # fmt: skip
  """Keep the first `prompt` tokens of rows [b,t] and let the model continue at temperature 1.

  What it predicts after `prompt` tokens, up to the end of a text, has weight 1, all else 0.
  """
  t = batch['inputs'].shape[1]
  ids, mask = prompts(batch['inputs'], batch['segments'], prompt)
  out = generate(
    model, params, ids, mask, key, max_tokens=t - prompt + 1, sampler=_sampler(1.0, tok.vocab),
    end=tok.ids.eos,
  )  # fmt: skip
  whole = jnp.concatenate([ids, out.tokens], axis=1)
  real = mask[:, -1:]
  made = (jnp.arange(t) - (prompt - 1))[None]
  segments = jnp.where(made > 0, real, jnp.pad(mask, ((0, 0), (0, t - prompt)))).astype(jnp.int32)
  return {
    'inputs': whole[:, :t],
    'targets': whole[:, 1:],
    'weights': ((made >= 0) & (made < out.lengths[:, None]) & real).astype(jnp.float32),
    'segments': segments,
    'positions': jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0) * segments,
  }


def make_rewrite(
  model: models.Model, rep: reparam.Reparam, cfg: dict[str, Any], mesh: jax.sharding.Mesh
) -> Callable[..., data.Batch]:
  """Make jitted f(theta, frozen, batch [accum,groups,rows,t], step) -> batch of the student's text.

  Raises:
    ValueError: if the run holds several models, or its rows are no longer than the prompt.
  """
  prompt = cfg['objective']['prompt']
  if rep.clusters or not 1 <= prompt < cfg['context']:
    raise ValueError(
      f'objective.on_policy: expected one dense model and a prompt of 1 to {cfg["context"] - 1} '
      f'tokens, found {rep.clusters or 1} and objective.prompt={prompt}'
    )
  tok = tokenizer.load(f'{cfg["data"]["path"]}/tokenizer')
  key = jax.random.fold_in(jax.random.key(cfg['seed']), 2)

  where = sharding.batch_sharding(mesh, axis=1)

  @functools.partial(jax.jit, out_shardings=where)
  def own(theta, frozen, batch, step):
    params = reparam.cast(rep.materialize(theta, frozen, None), jnp.dtype(cfg['dtype']))
    flat = {n: x.reshape(-1, x.shape[-1]) for n, x in batch.items() if n != 'condition'}
    made = rewrite(model, params, flat, jax.random.fold_in(key, step), prompt, tok)
    return batch | {name: x.reshape(batch[name].shape) for name, x in made.items()}

  return own


def turn(cfg: Mapping[str, Any], step: int) -> bool:
  """Say whether a step is on the student's own text, by (seed, step) alone.

  A share `on_policy` of those after the share `on_policy_from` of all steps are.
  """
  objective = cfg['objective']
  began = step > objective.get('on_policy_from', 0.0) * cfg['steps']
  drawn = np.random.default_rng([cfg['seed'], step, 1]).random()
  return bool(began and drawn < objective['on_policy'])


def write(
  run: str, path: str, on: str, out: str, *, count: int, prompt: int, max_tokens: int,
  temperature: float, seed: int, batch_size: int,
) -> int:  # fmt: skip
  """Write a run's continuations of rows, evenly spaced, as .jsonl files; returns how many.

  Rows that end within the prompt are left out. Started again it continues.

  Raises:
    ValueError: if the run is unfinished or holds several models, its tokenizer is another, a number
      is impossible, or the directory was made by another command.
  """
  mesh, folder = load.mesh_for(run), Path(out)
  loaded = load.load(run, mesh, finished=True)
  path = path or loaded.cfg['data']['path']
  facts = data.manifest(path)
  load.same_tokenizer(loaded, facts['tokenizer']['fingerprint'])
  if not 1 <= prompt <= facts['context'] or min(count, max_tokens) < 1 or temperature <= 0:
    raise ValueError(
      f'expected --prompt of 1 to {facts["context"]} tokens, --rows and --max_tokens of at least '
      '1 and --temperature above 0'
    )
  split = data.Split(path, *on.partition('/')[::2])
  about = {
    'run': str(Path(run).resolve()), 'step': loaded.step, 'on': on, 'rows_sha256': split.sha256,
    'rows': count, 'prompt': prompt, 'max_tokens': max_tokens, 'temperature': temperature,
    'seed': seed, 'batch_size': batch_size,
  }  # fmt: skip
  if (folder / _ABOUT).exists():
    rundir.check_same(folder, files.read_json(folder / _ABOUT), about, 'other continuations')
  files.write_json(folder / _ABOUT, about)
  tok = tokenizer.load(f'{path}/tokenizer')
  params = reparam.cast(loaded.params(), jnp.dtype(loaded.cfg['dtype']))
  count = min(count, len(split.ids))
  ids = data.spaced(split.ids, count)
  devices, written = sharding.batch_devices(mesh), 0
  flops = forward_flops(loaded.model.cfg, prompt + max_tokens)
  size = -(-batch_size // devices) * devices
  with jax.set_mesh(mesh), cli.progress('continue', len(ids), 'rows') as progress:
    for start in range(0, len(ids), _SHARD):
      shard, part = folder / f'text-{start:08d}.jsonl', ids[start : start + _SHARD]
      if not shard.exists():
        lines, made, heard, began = [], 0, 0, time.monotonic()
        for i in range(0, len(part), size):
          rows = np.pad(part[i : i + size], (0, max(i + size - len(part), 0)), constant_values=-1)
          read = split.read(rows)
          begun, mask = prompts(read[:, 0], read[:, 1], prompt)
          key = jax.random.fold_in(jax.random.key(seed), start + i)
          place = lambda x: jax.device_put(x, sharding.batch_sharding(mesh))
          found = generate(
            loaded.model, params, place(begun), place(mask), key, max_tokens=max_tokens,
            sampler=_sampler(temperature, tok.vocab), end=tok.ids.eos,
          )  # fmt: skip
          lines += _lines(tok, rows, begun, mask, found)
          made += int((np.asarray(found.lengths) * mask.any(1)).sum())
          heard += int(mask.sum())  # prompts take a forward pass too
        files.write_text(shard, ''.join(lines))
        took = (time.monotonic() - began) * jax.device_count()
        cost = made, (made + heard) * flops, took
        record.spend(folder, 'continue', *cost, ancestors=[about['run']])
      written += len(shard.read_text().splitlines())
      progress.update(len(part))
  return written


def _lines(
  tok: tokenizer.Tokenizer, rows: np.ndarray, begun: np.ndarray, mask: np.ndarray, out: Completions
) -> list[str]:
  """Lay out a batch's texts, prompt and continuation, as lines of JSON."""
  texts = zip(rows.tolist(), begun, mask, np.asarray(out.tokens), out.lengths, strict=True)
  special, lines = {tok.ids.bos, tok.ids.eos, tok.ids.pad}, []
  for row, ids, own, more, length in texts:
    if own.any():
      kept = [i for i in [*ids[own].tolist(), *more[:length].tolist()] if i not in special]
      lines.append(json.dumps({'id': str(row), 'text': tok.decode(kept)}) + '\n')
  return lines


def main(_: list[str]) -> None:
  """Write the continuations that the flags ask for."""
  f = flags.FLAGS
  if not (f.run and f.out):
    raise ValueError('expected --run and --out')
  found = write(
    f.run, f.data, f.on, f.out, count=f.rows, prompt=f.prompt, max_tokens=f.max_tokens,
    temperature=f.temperature, seed=f.seed, batch_size=f.batch_size,
  )  # fmt: skip
  print(f'{f.out}: {found:,} texts')


if __name__ == '__main__':
  flags.DEFINE_string('run', '', 'Run (or RUN@STEP) of a dense model.')
  flags.DEFINE_string('data', '', "Data directory; default: the run's own.")
  flags.DEFINE_string('on', 'generic/train', 'set/split whose rows are continued.')
  flags.DEFINE_integer('rows', 1024, 'Rows, evenly spaced.')
  flags.DEFINE_integer('prompt', 16, 'Tokens at the start of a row that are kept.')
  flags.DEFINE_integer('max_tokens', 128, 'Tokens to generate.')
  flags.DEFINE_float('temperature', 1.0, 'Of sampling.')
  flags.DEFINE_integer('seed', 0, 'Of sampling.')
  flags.DEFINE_integer('batch_size', 32, 'Rows at a time.')
  flags.DEFINE_string('out', '', 'Directory to write.')
  cli.run(main)
