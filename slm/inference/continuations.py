"""A model's own continuations of rows, written as a corpus."""

import functools
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slm.base import artifact, console, files, stage
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
  """Continue `count` evenly spaced rows and write the texts as .jsonl files; returns their number.

  Rows that end within the first `prompt` tokens are left out. A second call continues.

  Raises:
    ValueError: if the run is unfinished or holds several models, its tokenizer is not that of the
      data, a number is out of range, or the directory holds other continuations.
  """
  mesh, folder = load.mesh_for(run), Path(out)
  loaded = load.load(run, mesh, finished=True)
  path = load.data_path(run, path)
  facts = loader.manifest(path)
  load.same_tokenizer(loaded, facts['tokenizer']['fingerprint'])
  valid = 1 <= prompt <= facts['context'] and min(count, max_tokens, batch_size) >= 1
  if not valid or not 0 < temperature < math.inf:
    raise ValueError(
      f'expected --prompt of 1 to {facts["context"]} tokens, --rows, --max_tokens and --batch_size '
      'of at least 1 and --temperature above 0'
    )
  split = loader.Split(path, *loader.parse_on(path, on))
  about = {
    'run': stage.absolute(run), 'step': loaded.step,
    'weights': tree.weights_hash(loaded.params()), 'on': on, 'rows_sha256': split.sha256,
    'rows': count, 'prompt': prompt, 'max_tokens': max_tokens, 'temperature': temperature,
    'seed': seed, 'batch_size': batch_size,
  }  # fmt: skip
  artifact.claim(folder / _ABOUT, about, 'other continuations')
  tok = tokenizer.load(f'{path}/tokenizer')
  params = tree.cast(loaded.params(), jnp.dtype(loaded.cfg.dtype))
  sampler = functools.partial(sampled, temperature=temperature, top_k=0, top_p=1.0)
  options = {'max_tokens': max_tokens, 'sampler': sampler, 'end': tok.ends, 'known': tok.known}
  ids = loader.spaced(split.ids, min(count, len(split.ids)))
  flops_per_token = forward_flops(loaded.model.cfg, prompt + max_tokens)
  devices = sharding.batch_devices(mesh)
  size, where = -(-batch_size // devices) * devices, sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh), console.Progress('continue', len(ids), 'rows') as progress:
    for start in range(0, len(ids), _SHARD):
      shard, part = folder / f'text-{start:08d}.jsonl', ids[start : start + _SHARD]
      if not shard.exists():
        lines, prompted, generated, began = [], 0, 0, time.monotonic()
        for i in range(0, len(part), size):
          rows = np.pad(part[i : i + size], (0, max(i + size - len(part), 0)), constant_values=-1)
          key = jax.random.fold_in(jax.random.key(seed), start + i)
          read = split.read(rows)
          begun, mask = prompts(read['tokens'], read['segments'], prompt)
          placed = jax.device_put((begun, mask), where)
          out = generate(loaded.model, params, *placed, key, **options)
          lines += _lines(tok, rows, begun, mask, out)
          generated += int((np.asarray(out.lengths) * mask.any(1)).sum())
          prompted += int(mask.sum())  # prompts take a forward pass too
        files.write_text(shard, ''.join(lines))
        seconds = (time.monotonic() - began) * jax.device_count()
        cost = generated, (generated + prompted) * flops_per_token, seconds
        ledger.spend(folder, 'continue', *cost, ancestors=[about['run']])
      progress.update(len(part))
  return sum(len(shard.read_text().splitlines()) for shard in folder.glob('text-*.jsonl'))


def _lines(
  tok: tokenizer.Tokenizer, rows: np.ndarray, begun: np.ndarray, mask: np.ndarray, out: Completions
) -> list[str]:
  """Format a batch's texts, each a prompt and its continuation, as lines of JSON."""
  lines = []
  texts = zip(rows.tolist(), begun, mask, np.asarray(out.tokens), out.lengths, strict=True)
  for row, ids, own, continuation, length in texts:
    if own.any():
      text = tok.decode([*ids[own].tolist(), *continuation[:length].tolist()])
      lines.append(json.dumps({'id': str(row), 'text': text}) + '\n')
  return lines
