"""Text that a model goes on with itself, written as a corpus."""

import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slm.base import artifact, console, files
from slm.data import loader, tokenizer
from slm.models.decode import Completions, generate, sampled
from slm.objectives.rollout import prompts
from slm.runs import ledger, load
from slm.weights import sharding, tree
from slm.weights.count import forward_flops

_ABOUT = 'continuations.json'
_SHARD = 256  # rows


@artifact.writes('out')
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
  path = load.data_path(run, path)
  facts = loader.manifest(path)
  load.same_tokenizer(loaded, facts['tokenizer']['fingerprint'])
  possible = 1 <= prompt <= facts['context'] and min(count, max_tokens) >= 1
  if not possible or not 0 < temperature < math.inf:
    raise ValueError(
      f'expected --prompt of 1 to {facts["context"]} tokens, --rows and --max_tokens of at least '
      '1 and --temperature above 0'
    )
  split = loader.Split(path, *loader.parse_on(path, on))
  about = {
    'run': str(Path(run).resolve()), 'step': loaded.step,
    'weights': tree.weights_hash(loaded.params()), 'on': on, 'rows_sha256': split.sha256,
    'rows': count, 'prompt': prompt, 'max_tokens': max_tokens, 'temperature': temperature,
    'seed': seed, 'batch_size': batch_size,
  }  # fmt: skip
  artifact.claim(folder / _ABOUT, about, 'other continuations')
  tok = tokenizer.load(f'{path}/tokenizer')
  params = tree.cast(loaded.params(), jnp.dtype(loaded.cfg.dtype))
  go_on = functools.partial(
    generate, loaded.model, params, max_tokens=max_tokens, end=tok.ends, known=tok.known,
    sampler=functools.partial(sampled, temperature=temperature, top_k=0, top_p=1.0),
  )  # fmt: skip
  ids = loader.spaced(split.ids, min(count, len(split.ids)))
  flops_per_token = forward_flops(loaded.model.cfg, prompt + max_tokens)
  written, devices = 0, sharding.batch_devices(mesh)
  size = -(-batch_size // devices) * devices
  with jax.set_mesh(mesh), console.progress('continue', len(ids), 'rows') as progress:
    for start in range(0, len(ids), _SHARD):
      shard, part = folder / f'text-{start:08d}.jsonl', ids[start : start + _SHARD]
      if not shard.exists():
        lines, made, processed, began = [], 0, 0, time.monotonic()
        for i in range(0, len(part), size):
          rows = np.pad(part[i : i + size], (0, max(i + size - len(part), 0)), constant_values=-1)
          key = jax.random.fold_in(jax.random.key(seed), start + i)
          begun, mask, completions = _continue(split, rows, prompt, go_on, key, mesh)
          lines += _lines(tok, rows, begun, mask, completions)
          made += int((np.asarray(completions.lengths) * mask.any(1)).sum())
          processed += int(mask.sum())  # prompts take a forward pass too
        files.write_text(shard, ''.join(lines))
        seconds = (time.monotonic() - began) * jax.device_count()
        cost = made, (made + processed) * flops_per_token, seconds
        ledger.spend(folder, 'continue', *cost, ancestors=[about['run']])
      written += len(shard.read_text().splitlines())
      progress.update(len(part))
  return written


def _continue(
  split: loader.Split, rows: np.ndarray, prompt: int, go_on: Callable[..., Completions],
  key: jax.Array, mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, np.ndarray, Completions]:  # fmt: skip
  """Return the beginnings of a batch of rows, the mask of their tokens and what follows them."""
  read = split.read(rows)
  begun, mask = prompts(read['tokens'], read['segments'], prompt)
  return begun, mask, go_on(*jax.device_put((begun, mask), sharding.batch_sharding(mesh)), key)


def _lines(
  tok: tokenizer.Tokenizer, rows: np.ndarray, begun: np.ndarray, mask: np.ndarray, out: Completions
) -> list[str]:
  """Lay out a batch's texts, prompt and continuation, as lines of JSON."""
  texts = zip(rows.tolist(), begun, mask, np.asarray(out.tokens), out.lengths, strict=True)
  lines = []
  for row, ids, own, more, length in texts:
    if own.any():
      text = tok.decode([*ids[own].tolist(), *more[:length].tolist()])
      lines.append(json.dumps({'id': str(row), 'text': text}) + '\n')
  return lines
