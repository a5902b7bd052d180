r"""Prepare text for training: duplicates out, split, tokenise, cluster, pack into rows.

  python -m slm.data.prepare --out=DIR                       installed Python text
  python -m slm.data.prepare --out=DIR \
    --config='configs/data.py:generic=/corpus/*.jsonl.gz,law.train=law/a.txt,law.test=law/b.txt'

Can be killed at any moment and run again: what is complete is kept, and what is missing or has
another size (--verify: another hash) is made again. A directory is of its settings and of the
names, sizes and hashes of its sources and tokenizer: with others it is refused. DIR/windows holds
intermediates and may be deleted afterwards. Exact copies of a document are dropped, from training
first: no training document of any set is, word for word, a held-out document of this or another
set. Near-duplicates are looked for with near_duplicates (slm/data/near.py).
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from slm.base import artifact, console, files, schema
from slm.data import (
  cluster,
  documents,
  histograms,
  importance,
  installed,
  loader,
  near,
  rows,
  sources,
  tfds,
  tokenizer,
  work,
)
from slm.data.settings import ALL, PrepareConfig, TokenizerConfig

Path = pathlib.Path
_SAMPLE = 10 << 20  # characters a tokenizer is trained on
_SHARDS_PER_ROWS = 16  # document shards (8 MB of text each) whose windows share a row shard


def prepare(cfg: PrepareConfig, verify: bool = False) -> dict[str, Any]:
  """Make or complete a prepared data directory and return its manifest.

  What is missing or has another size is made again; with `verify` what has another hash is, too.

  Raises:
    ValueError: if the directory was made of other text or by another config, or another process is
      writing it.
  """
  out = Path(cfg.out)
  with artifact.hold(out):
    work.sweep(out)
    paths = _sources(cfg, out)
    if verify:
      _remove_damaged(out)
    before = _readable_manifest(out)
    if not _complete(out, before):
      with work.Pool(cfg.workers, documents.use_tokenizer, out / 'tokenizer') as pool:
        _make(cfg, out, paths, pool, before)
    if not (out / 'clusters' / 'histograms.json').exists():
      histograms.write(out)
    print((out / 'clusters' / 'histograms.md').read_text())
    _nested(cfg)
  return loader.manifest(out)


def _readable_manifest(out: Path) -> dict[str, Any]:
  try:
    return loader.manifest(out)
  except (FileNotFoundError, ValueError):
    return {}  # absent or cut short: the stages that are complete are not run again


def _splits(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
  for name, splits in manifest.get('sets', {}).items():
    yield from ((f'{name}/{split}', facts) for split, facts in splits.items())


def _complete(out: Path, manifest: dict[str, Any]) -> bool:
  """Say whether all that a manifest promises is there, and as long as it was."""
  stages = [out / 'tokenizer/stage.json', out / 'clusters/stage.json', *out.glob('*/*/rows-*.json')]
  return (
    bool(manifest)
    and all(map(work.complete, stages))
    and not any(
      problem
      for split, facts in _splits(manifest)
      for problem in work.damages(out / split / 'rows', facts.get('files', {}), content=False)
    )
  )


def _remove_damaged(out: Path) -> None:
  """Remove the files that are not as they were written, and name them; nothing reads them again."""
  stamps = [
    (out / split / 'rows', facts.get('files', {}))
    for split, facts in _splits(_readable_manifest(out))
  ]
  summaries = ((path, files.read_json(path)) for path in out.rglob('*.json'))
  stamps += [(p, s['files']) for p, s in summaries if isinstance(s, dict) and 'seconds' in s]
  for problem in sorted({p for beside, known in stamps for p in work.damages(beside, known)}):
    print(f'{problem}: it is made again', file=sys.stderr)
    Path(problem.partition(': ')[0]).unlink(missing_ok=True)


def _sources(cfg: PrepareConfig, out: Path) -> dict[str, dict[str, dict[str, int]]]:
  """List source files; refuse an output directory made of other text or with another config."""
  record = out / 'prepare.json'
  wanted = artifact.plain(dataclasses.asdict(cfg)) | {'version': loader.VERSION}
  for key in ('out', 'workers'):
    del wanted[key]
  old = files.read_json(record) if record.exists() else {}
  if old:
    artifact.check_same(out, old['config'], wanted, 'what another config made')
  elif artifact.occupied(out):
    raise ValueError(f'{out}: is not empty and holds no {record.name}: choose another --out')
  paths = {s: {k: sources.expand(v) for k, v in splits.items()} for s, splits in cfg.sets.items()}
  flat = lambda listed: {p: n for splits in listed.values() for v in splits.values()
                         for p, n in v.items()}  # fmt: skip
  # Earlier versions kept the sizes of the texts alone.
  known = old.get('contents', {p: [n] for p, n in flat(old.get('sources', {})).items()})
  now = _contents(cfg, flat(paths), known)
  if old:
    compared = now if 'contents' in old else {p: now[p] for p in flat(paths)}
    _same_contents(out, known, compared)
  else:
    files.write_json(record, {'config': wanted, 'sources': paths, 'contents': now})
  return paths


def _contents(
  cfg: PrepareConfig, listed: dict[str, int], known: dict[str, list[Any]]
) -> dict[str, list[Any]]:
  """Say what is in all that a directory is made of: texts, a tokenizer, an embedding model."""
  found, paths = {}, []
  for path, size in listed.items():
    if path.startswith('python:'):
      before = known.get(path, [])
      found[path] = before if len(before) == 1 else [size, 0, installed.fingerprint()]
    elif path.startswith(tfds.PREFIX):
      found[path] = [size]
    else:
      paths.append(Path(path))
  for path in filter(None, (cfg.tokenizer.path, cfg.sbert)):
    inside = [p for p in Path(path).rglob('*') if p.is_file()]
    paths += sorted(inside) or [Path(path)]
  return found | artifact.contents(paths, known)


def _same_contents(out: Path, old: dict[str, list[Any]], new: dict[str, list[Any]]) -> None:
  for path in sorted(old.keys() | new.keys()):
    if old.get(path) != new.get(path):
      how = 'is new' if path not in old else 'is gone' if path not in new else 'has other content'
      raise ValueError(
        f'{out}: {path} {how} since it was prepared: choose another --out, or delete that '
        'directory to prepare all of it again'
      )


def _make(
  cfg: PrepareConfig, out: Path, paths: dict[str, Any], pool: work.Pool, before: dict[str, Any]
) -> None:
  """Run the stages that are not complete, and write the manifest.

  Raises:
    ValueError: if a split is not what it was `before`.
  """
  cost: dict[str, Any] = {}
  read = {}
  for name in cfg.sets:
    read[name], summaries = _read(cfg, out, name, paths[name], pool)
    _add(cost, 'documents', summaries)
  shards = _cuts(cfg, out, read, pool)
  _add(cost, 'tokenizer', _tokenizer(cfg, out, shards['generic']))
  tasks = {c.out / f'{c.shard}.json': c for cuts in shards.values() for c in cuts}
  done = work.run(pool, 'tokens and windows', documents.cut, tasks)
  _add(cost, 'windows', done)
  summaries = dict(zip((c for cuts in shards.values() for c in cuts), done, strict=True))
  facts = _facts(cfg, shards, summaries)
  _add(cost, 'clusters', _clusters(cfg, out, shards, summaries, pool))
  _add(cost, 'rows', _rows(cfg, out, shards, summaries, facts, pool))
  made = dict(_splits({'sets': facts}))
  for split, was in _splits(before):
    if was['sha256'] != made[split]['sha256']:
      raise ValueError(
        f'{out / split}: was damaged, and this version of slm makes other rows of its text: '
        'delete the directory to prepare all of it again'
      )
  tok = documents.get_tokenizer()
  files.write_json(
    out / 'manifest.json',
    {
      'version': loader.VERSION,
      'columns': rows.columns(cfg.context),
      'context': cfg.context,
      'tokenizer': {key: getattr(tok, key) for key in ('name', 'vocab', 'fingerprint', 'begins')},
      'levels': sorted(cfg.levels),
      'seed': cfg.seed,
      'sets': facts,
      'cost': cost,
    },
  )


def _add(cost: dict[str, Any], stage: str, summaries: list[dict[str, Any]]) -> None:
  """Add up the seconds (of all workers) and operations of a stage's tasks."""
  entry = cost.setdefault(stage, {'seconds': 0.0, 'flops': 0.0})
  for summary in summaries:
    entry['seconds'] += summary['seconds']
    entry['flops'] += summary.get('flops', 0.0)


def _read(
  cfg: PrepareConfig, out: Path, name: str, paths: dict[str, Any], pool: work.Pool
) -> tuple[dict[Path, int], list[dict[str, Any]]]:
  """Read a set's documents; return the size of every shard, and the summaries."""
  folder = out / 'windows' / 'documents' / name
  tasks = {}
  for split, found in paths.items():
    number = -1 if split == ALL else cfg.splits(name).index(split)
    for i, group in enumerate(documents.plan(found)):
      task = documents.Read(
        folder, f'{split}-{i:05d}', group, number, cfg.heldout, cfg.text_field, cfg.id_field
      )
      tasks[folder / f'{task.name}.json'] = task
  # The installed packages are scanned by the pool itself, so that task runs in this process.
  python = any(p.startswith('python:') for found in paths.values() for p in found)
  read = functools.partial(documents.read, parallel_map=pool.map) if python else documents.read
  done = work.run(work.Pool(1) if python else pool, f'documents of {name}', read, tasks)
  shards = {
    folder / shard: n
    for summary in done
    for shard, n in zip(summary['shards'], summary['documents'], strict=True)
  }
  if not shards:
    raise ValueError(f'sets.{name}: no document in {", ".join(cfg.sets[name].values())}')
  return shards, done


def _cuts(
  cfg: PrepareConfig, out: Path, read: dict[str, dict[Path, int]], pool: work.Pool
) -> dict[str, list[documents.Cut]]:
  """Mark every set's duplicates, once all sets are read; return the tokenising tasks."""
  if cfg.near_duplicates:
    _near_duplicates(cfg, out, read, pool)
  cuts: dict[str, list[documents.Cut]] = {}
  for name, shards in read.items():
    folder = out / 'windows' / 'documents' / name
    keep = folder / 'keep.npy'
    if not keep.exists() or len(files.read_npy(keep, 'r')) != sum(shards.values()):
      others = {s: n for other in read if other != name for s, n in read[other].items()}
      documents.duplicates(shards, others, keep)
    starts = np.cumsum([0, *shards.values()]).tolist()
    to, num_splits = out / 'windows' / 'tokens' / name, len(cfg.splits(name))
    cuts[name] = [
      documents.Cut(to, folder, shard.name, start, keep, num_splits, cfg.context)
      for shard, start in zip(shards, starts, strict=False)
    ]
  return cuts


def _near_duplicates(
  cfg: PrepareConfig, out: Path, read: dict[str, dict[Path, int]], pool: work.Pool
) -> None:
  """Write every set's keep.npy without exact and near duplicates."""
  folder = out / 'windows' / 'documents'
  paths = {name: folder / name / 'keep.npy' for name in read}
  if all(path.exists() for path in paths.values()):
    return
  tasks = {s.with_name(f'{s.name}.minhash.json'): s for shards in read.values() for s in shards}
  work.run(pool, 'signatures', near.sign, tasks)
  keep = {}
  for name, shards in read.items():
    others = {s: n for other in read if other != name for s, n in read[other].items()}
    exact = folder / name / 'exact.npy'
    documents.duplicates(shards, others, exact)
    keep[name] = files.read_npy(exact).copy()
  near.mark(read, keep, cfg.near_duplicates)
  for name, path in paths.items():
    files.write_npy(path, keep[name])


def _tokenizer(cfg: PrepareConfig, out: Path, cuts: list[documents.Cut]) -> list[dict[str, Any]]:
  folder = out / 'tokenizer'

  def build(c: TokenizerConfig) -> dict[str, Any]:
    sample = documents.sample(cuts, _SAMPLE, cfg.seed)
    tokenizer.build(c.name, c.vocab, c.path, sample, folder)
    return {'files': [p.name for p in folder.iterdir() if p.name in tokenizer.FILES]}

  return work.run(work.Pool(1), 'tokenizer', build, {folder / 'stage.json': cfg.tokenizer})


def _facts(
  cfg: PrepareConfig,
  shards: dict[str, list[documents.Cut]],
  summaries: dict[documents.Cut, dict[str, Any]],
) -> dict[str, dict[str, dict[str, Any]]]:
  """Add up what each split holds; refuse a split that holds nothing."""
  facts: dict[str, dict[str, dict[str, Any]]] = {}
  for name, cuts in shards.items():
    facts[name] = {}
    for i, split in cfg.made(name):
      keys = ('documents', 'duplicates', 'windows', 'tokens', 'bytes')
      about = {key: sum(summaries[c][key][i] for c in cuts) for key in keys}
      if not about['documents']:
        raise ValueError(
          f'{name}/{split}: no documents left (duplicates removed: {about["duplicates"]}); give '
          f'more text, other heldout shares, or sources per split ({name}.{split}=...)'
        )
      if split == 'train' and about['tokens'] < cfg.context - 1:
        raise ValueError(
          f'{name}/{split}: {about["tokens"]} tokens, less than one window of {cfg.context}'
        )
      facts[name][split] = about | {'bytes_per_token': about['bytes'] / about['tokens']}
  return facts


def _clusters(
  cfg: PrepareConfig,
  out: Path,
  shards: dict[str, list[documents.Cut]],
  summaries: dict[documents.Cut, dict[str, Any]],
  pool: work.Pool,
) -> list[dict[str, Any]]:

  path = out / 'clusters' / 'model.safetensors'

  def fit(cuts: list[documents.Cut]) -> dict[str, Any]:
    sbert = cfg.sbert and str(Path(cfg.sbert).resolve())
    texts = documents.sample_windows(
      cuts, [summaries[c]['windows'][0] for c in cuts], cfg.fit_windows, cfg.seed
    )
    model, flops = cluster.fit(texts, cfg.levels, cfg.dims, cfg.seed, sbert)
    cluster.save(model, path)
    return {'files': [path.name], 'flops': flops}

  done = work.run(work.Pool(1), 'clusters', fit, {path.with_name('stage.json'): shards['generic']})
  windows = [c.out / f'{c.shard}.npz' for cuts in shards.values() for c in cuts]
  tasks = {p.with_suffix('.clusters.json'): (path, p) for p in windows}
  return done + work.run(pool, 'windows to clusters', cluster.assign_shard, tasks)


def _rows(
  cfg: PrepareConfig,
  out: Path,
  shards: dict[str, list[documents.Cut]],
  summaries: dict[documents.Cut, dict[str, Any]],
  facts: dict[str, Any],
  pool: work.Pool,
) -> list[dict[str, Any]]:
  """Pack every split's rows and complete its facts."""
  tasks: dict[Path, rows.Pack] = {}
  for name, cuts in shards.items():
    windows = [c.out / f'{c.shard}.npz' for c in cuts]
    groups = [slice(i, i + _SHARDS_PER_ROWS) for i in range(0, len(cuts), _SHARDS_PER_ROWS)]
    for number, split in cfg.made(name):
      starts = np.cumsum([0, *(summaries[c]['documents'][number] for c in cuts)]).tolist()
      for i, group in enumerate(groups):
        stem, mine = f'rows-{i:05d}-of-{len(groups):05d}', tuple(windows[group])
        to = out / name / split
        task = rows.Pack(to, stem, mine, tuple(starts[:-1][group]), number, cfg.context)
        tasks[task.out / f'{stem}.json'] = task
  done = work.run(pool, 'rows', rows.write, tasks)
  for name in shards:
    for _, split in cfg.made(name):
      mine = [
        (t, s) for t, s in zip(tasks.values(), done, strict=True) if t.out == out / name / split
      ]
      facts[name][split] |= rows.join(mine)
  return done


def _nested(cfg: PrepareConfig) -> None:
  """Write the index of every specialisation set of the sizes asked for."""
  for name in cfg.sets:
    if name == 'generic':
      continue
    data = loader.Split(cfg.out, name, 'train')
    for size in sorted(cfg.sizes):
      if (data.path / 'index' / f'{name}-{size}.json').exists():
        continue
      if size > data.facts['tokens']:
        print(f'{name}-{size}: not made, {name}/train has {data.facts["tokens"]:,} tokens')
        continue
      ids = importance.nested(data.counts[:, 1], size, cfg.seed)
      made = {'how': 'prefix of one seeded permutation', 'size': size, 'seed': cfg.seed}
      about = importance.write_index(data, f'{name}-{size}', ids, made)
      print(f'index {name}-{size}: {about["rows"]:,} rows, {about["tokens"]:,} tokens')


def _main(_: list[str]) -> None:
  config = flags.FLAGS.config
  if flags.FLAGS.out:
    config.out = flags.FLAGS.out
  found = prepare(schema.read(PrepareConfig, config.to_dict()), flags.FLAGS.verify)
  for name, splits in found['sets'].items():
    for split, s in splits.items():
      print(
        f'{name}/{split}: {s["documents"]:,} documents ({s["duplicates"]:,} duplicates out), '
        f'{s["tokens"]:,} tokens, {s["rows"]:,} rows, {s["bytes_per_token"]:.2f} bytes per token'
      )
  print(f'prepared: {config.out}')


if __name__ == '__main__':
  flags.DEFINE_string('out', '', 'Directory to write to.')
  flags.DEFINE_bool('verify', False, 'Compare hashes too, and make again what is damaged.')
  console.run(_main, config='data', keys=PrepareConfig)
