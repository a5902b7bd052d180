"""Text that a model goes on with itself, written as a corpus."""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slm.base import artifact, console, files
from slm.data import loader, tokenizer
from slm.models.decode import Completions, generate
from slm.models.decoder import forward_flops
from slm.objectives.rollout import prompts, sampler_of
from slm.runs import ledger, load
from slm.weights import sharding, tree

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
  path = path or loaded.cfg['data']['path']
  facts = loader.manifest(path)
  load.same_tokenizer(loaded, facts['tokenizer']['fingerprint'])
  if not 1 <= prompt <= facts['context'] or min(count, max_tokens) < 1 or temperature <= 0:
    raise ValueError(
      f'expected --prompt of 1 to {facts["context"]} tokens, --rows and --max_tokens of at least '
      '1 and --temperature above 0'
    )
  split = loader.Split(path, *on.partition('/')[::2])
  about = {
    'run': str(Path(run).resolve()), 'step': loaded.step,
    'weights': tree.weights_hash(loaded.params()), 'on': on, 'rows_sha256': split.sha256,
    'rows': count, 'prompt': prompt, 'max_tokens': max_tokens, 'temperature': temperature,
    'seed': seed, 'batch_size': batch_size,
  }  # fmt: skip
  artifact.claim(folder / _ABOUT, about, 'other continuations')
  tok = tokenizer.load(f'{path}/tokenizer')
  params = tree.cast(loaded.params(), jnp.dtype(loaded.cfg['dtype']))
  count = min(count, len(split.ids))
  ids = loader.spaced(split.ids, count)
  devices, written = sharding.batch_devices(mesh), 0
  flops = forward_flops(loaded.model.cfg, prompt + max_tokens)
  size = -(-batch_size // devices) * devices
  with jax.set_mesh(mesh), console.progress('continue', len(ids), 'rows') as progress:
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
            sampler=sampler_of(temperature, tok.vocab), end=tok.ids.eos,
          )  # fmt: skip
          lines += _lines(tok, rows, begun, mask, found)
          made += int((np.asarray(found.lengths) * mask.any(1)).sum())
          heard += int(mask.sum())  # prompts take a forward pass too
        files.write_text(shard, ''.join(lines))
        took = (time.monotonic() - began) * jax.device_count()
        cost = made, (made + heard) * flops, took
        ledger.spend(folder, 'continue', *cost, ancestors=[about['run']])
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
