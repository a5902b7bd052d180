"""Signals: a teacher's predictions on disk, computed once and read by any run on the same rows."""

import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.base import artifact, console, files, stage
from slm.data import loader, rows
from slm.models.decoder import head, logits
from slm.objectives import losses
from slm.runs import ledger, load, rundir
from slm.weights import sharding, tree
from slm.weights.count import forward_flops

TARGETS = 'targets'
MODES = ('topk', 'sampled', TARGETS)
ABOUT = 'signals.json'
_VERIFIED = 16  # number of rows that `verify` computes again


def row_keys(columns: rows.Rows) -> np.ndarray:
  """Hash the tokens and segments [n,context] of rows: [n] of 16 bytes."""
  both = np.stack([columns['tokens'], columns['segments']], axis=1).astype('<i4')
  digest = lambda row: hashlib.blake2b(row.tobytes(), digest_size=16).digest()
  return np.array([digest(row) for row in both], 'S16')


def layout(facts: Mapping[str, Any]) -> np.dtype:
  """Return the record of a row in a shard: its key, ids [t,k], their probabilities or entropy.

  Of targets it is the log-probability of each, [t].
  """
  shape = (facts['context'], facts['k'])
  if facts['mode'] == TARGETS:
    return np.dtype([('row', 'S16'), ('logprobs', '<f4', shape[:1])])
  fields = [('row', 'S16'), ('ids', '<u2' if facts['vocab'] <= 2**16 else '<i4', shape)]
  if facts['mode'] == 'sampled':
    return np.dtype([*fields, ('entropy', '<f4', shape[:1])])
  # The rest is stored: a small one would be lost in the rounding of 1 - sum(probs).
  return np.dtype([*fields, ('probs', '<f2', shape), ('rest', '<f4', shape[:1])])


class Signals:
  """A directory of signals, callable from rows to batch leaves."""

  def __init__(self, folder: str | Path):
    """Open a directory; raise ValueError if it lacks signals or is of another version."""
    self.path = Path(folder)
    if not (self.path / ABOUT).exists():
      raise ValueError(f'{folder}: holds no {ABOUT}: make it with slm.signals')
    self.facts = files.read_json(self.path / ABOUT)
    paths = shards(self.path, self.facts)
    if missing := [p.name for p in paths if not p.exists()]:
      raise ValueError(f'{folder}: lacks {missing[0]}: the command that started it continues it')
    self._shards = [files.read_npy(p, mmap='r') for p in paths]
    if any(s.dtype != layout(self.facts) for s in self._shards):
      raise ValueError(f'{folder}: was written by another version: make it again with slm.signals')
    keys = np.concatenate([s['row'] for s in self._shards])
    self._order = np.argsort(keys, kind='stable')
    self._keys = keys[self._order]

  def __call__(self, columns: rows.Rows) -> dict[str, np.ndarray]:
    """Return the signals of rows [...,context]: 'teacher_ids' [...,t,k], probs and rest or entropy.

    Those of targets are 'teacher_logprobs' [...,t]. A row with tokens but without signals raises
    ValueError.
    """
    lead = columns['tokens'].shape[:-1]
    flat = {name: x.reshape(-1, *x.shape[len(lead) :]) for name, x in columns.items()}
    records = np.zeros(len(flat['tokens']), layout(self.facts))
    keys = row_keys(flat)
    places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
    for i, place in enumerate(places.tolist()):
      if self._keys[place] == keys[i]:
        shard, row = divmod(int(self._order[place]), self.facts['shard_rows'])
        records[i] = self._shards[shard][row]
      elif flat['segments'][i].any():
        raise ValueError(
          f'{self.path}: holds no signals of a training row; its rows are {self.facts["on"]} of '
          f'{self.facts["data"]}'
        )
    leaves = {}
    for name in records.dtype.names[1:]:  # all but the key
      values = records[name].astype(np.int32 if name == 'ids' else np.float32)
      leaves[f'teacher_{name}'] = values.reshape(*lead, *values.shape[1:])
    return leaves


def shards(folder: Path, facts: Mapping[str, Any]) -> list[Path]:
  """Return the paths of the shards of a complete directory."""
  count = -(-facts['rows'] // facts['shard_rows'])
  return [folder / f'shard-{i:05d}-of-{count:05d}.npy' for i in range(count)]


def best(logits: jax.Array, k: int) -> dict[str, jax.Array]:
  """Reduce logits [...,v] to their k most probable ids [...,k] and the mass of the rest [...]."""
  probs, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), k)
  return {'ids': ids, 'probs': probs, 'rest': jnp.maximum(1 - probs.sum(-1), 0)}


def drawn(logits: jax.Array, uniform: jax.Array) -> dict[str, jax.Array]:
  """Draw ids [...,k] from logits [...,v] by uniform numbers [...,k]; the entropy is [...]."""
  log_p = jax.nn.log_softmax(logits, axis=-1)
  cumulative = jnp.cumsum(jnp.exp(log_p), axis=-1)
  search = lambda c, u: jnp.searchsorted(c, u * c[-1], side='right')
  ids = jnp.vectorize(search, signature='(v),(k)->(k)')(cumulative, uniform)
  entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
  return {'ids': jnp.minimum(ids, logits.shape[-1] - 1), 'entropy': entropy}


def make_signal(loaded: load.Loaded, facts: Mapping[str, Any]) -> Callable[..., dict[str, Any]]:
  """Make jitted f(params, batch [b,t], keys uint32 [b,4]) -> the fields of `layout` but the key.

  Draws depend on the seed and the row alone.
  """
  cfg, k, vocab = loaded.cfg, facts['k'], facts['vocab']
  seed, context = jax.random.key(facts['seed']), facts['context']
  sampled = facts['mode'] == 'sampled'
  reduce = drawn if sampled else lambda z, _: best(z, k)

  def uniform(key):
    return jax.random.uniform(functools.reduce(jax.random.fold_in, list(key), seed), (context, k))

  @jax.jit
  def signal(params, batch, keys):
    params = tree.cast(params, jnp.dtype(cfg.dtype))
    if facts['mode'] == TARGETS:
      of_targets = losses.target_logprobs(loaded.model.forward, params, batch, cfg.objective.chunk)
      return {'logprobs': of_targets}
    out = loaded.model.forward(params, batch)
    # Modes without draws ignore this array [b,t].
    uniforms = jax.vmap(uniform)(keys) if sampled else batch['inputs']
    split = lambda x: losses.split(cfg.objective.chunk, x)
    one = lambda x: reduce(logits(head(params), x[0], out.cap)[..., :vocab], x[1])
    fields = jax.lax.map(one, (split(out.hidden), split(uniforms)))
    return jax.tree.map(lambda x: losses.join(x, context), fields)

  return signal


def _compute(signal, params, columns, dtype, batch_size, mesh) -> np.ndarray:
  """Compute the records of rows [n,context] in batches."""
  split, records = sharding.batch_sharding(mesh), np.zeros(len(columns['tokens']), dtype)
  records['row'] = row_keys(columns)
  for start in range(0, len(records), batch_size):
    part = {name: x[start : start + batch_size] for name, x in columns.items()}
    count = len(part['tokens'])
    padding = batch_size - count
    part = {n: np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for n, x in part.items()}
    batch = jax.device_put(rows.batch(part), split)
    keys = jax.device_put(row_keys(part).view('<u4').reshape(batch_size, 4), split)
    for name, values in signal(params, batch, keys).items():
      records[name][start : start + count] = np.asarray(values)[:count]
  return records


@artifact.writes('out')
def write(
  teacher: str, path: str, on: str, out: str, *, mode: str = 'topk', k: int = 64, seed: int = 0,
  batch_size: int = 16, shard_rows: int = 1024,
) -> dict[str, Any]:  # fmt: skip
  """Write the signals of the rows of set/split[@index]; return their description.

  A second call continues an interrupted one.

  Raises:
    ValueError: if the run is unfinished, holds several models or has another tokenizer, a value is
      out of range, or the directory holds other signals.
  """
  mesh, folder = load.mesh_for(teacher), Path(out)
  loaded = load.load(teacher, mesh, finished=True)
  path = load.data_path(teacher, path)
  manifest, params = loader.manifest(path), loaded.params()
  k = 1 if mode == TARGETS else k
  vocab, fingerprint = (manifest['tokenizer'][key] for key in ('vocab', 'fingerprint'))
  load.same_tokenizer(loaded, fingerprint)
  if not 1 <= k <= vocab or mode not in MODES:
    raise ValueError(f'--k={k}, --mode={mode}: expected 1 to {vocab}, one of {", ".join(MODES)}')
  if min(batch_size, shard_rows) < 1:
    raise ValueError(f'batch_size={batch_size}, shard_rows={shard_rows}: expected at least 1')
  data_set, part, index = loader.parse_on(path, on)
  split = loader.Split(path, data_set, part, index)
  facts = {
    'teacher': stage.absolute(teacher), 'step': loaded.step,
    'weights': tree.weights_hash(params),
    'tokenizer': fingerprint, 'vocab': vocab, 'context': manifest['context'],
    'data': str(Path(path).resolve()), 'on': split.name, 'index': index,
    'rows_sha256': split.sha256, 'rows': len(split.ids), 'mode': mode, 'k': k, 'seed': seed,
    'shard_rows': shard_rows,
  }  # fmt: skip
  artifact.claim(folder / ABOUT, facts, 'other signals')
  devices = sharding.batch_devices(mesh)
  batch_size = -(-batch_size // devices) * devices
  signal, flops = make_signal(loaded, facts), forward_flops(loaded.model.cfg, facts['context'])
  with jax.set_mesh(mesh), console.Progress('signals', facts['rows'], 'rows') as progress:
    for i, shard in enumerate(shards(folder, facts)):
      ids = split.ids[i * shard_rows : (i + 1) * shard_rows]
      if shard.exists():
        progress.skip(len(ids))
        continue
      began, columns = time.monotonic(), split.read(ids)
      files.write_npy(shard, _compute(signal, params, columns, layout(facts), batch_size, mesh))
      seconds = (time.monotonic() - began) * jax.device_count()
      cost = int(split.counts[ids, 1].sum()), len(ids) * facts['context'] * flops, seconds
      ledger.spend(folder, 'signals', *cost, ancestors=[facts['teacher']])
      progress.update(len(ids))
  return facts


def verify(out: str) -> str:
  """Compute some rows' signals again and describe how far the directory's differ.

  Raises:
    ValueError: if the teacher has other weights, a probability or log-probability differs by more
      than 0.002, or more than 1 % of the drawn ids differ.
  """
  signals = Signals(out)
  facts = signals.facts
  run = f'{rundir.split_ref(facts["teacher"])[0]}@{facts["step"]}'
  mesh = load.mesh_for(run)
  loaded = load.load(run, mesh)
  params = loaded.params()
  if tree.weights_hash(params) != facts['weights']:
    raise ValueError(f'{out}: {facts["teacher"]} has other weights than those it was made from')
  split = loader.Split(facts['data'], *facts['on'].partition('/')[::2], facts['index'])
  ids = loader.spaced(split.ids, _VERIFIED)
  columns, size = split.read(ids), sharding.batch_devices(mesh)
  with jax.set_mesh(mesh):
    expected = _compute(make_signal(loaded, facts), params, columns, layout(facts), size, mesh)
  stored = signals(columns)
  if facts['mode'] == 'sampled':
    same = float((stored['teacher_ids'] == expected['ids']).mean())
    good, text = same >= 0.99, f'{same:.2%} of the ids are drawn again'
  else:
    names = ('logprobs',) if facts['mode'] == TARGETS else ('probs', 'rest')
    worst = float(max(np.abs(stored[f'teacher_{n}'] - expected[n]).max() for n in names))
    kind = 'log-probabilities' if facts['mode'] == TARGETS else 'probabilities'
    good, text = worst <= 2e-3, f'{kind} differ by {worst:.1e} at most'
  if not good:
    raise ValueError(f'{out}: its signals are not those of {facts["teacher"]}: {text}')
  return f'{out}: {len(ids)} of {facts["rows"]} rows computed again: {text}'
