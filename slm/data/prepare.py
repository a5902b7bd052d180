r"""Prepare text for training: drop duplicates, split, tokenise, cluster, pack into rows.

  python -m slm.data.prepare --out=DIR                       installed Python text
  python -m slm.data.prepare --out=DIR \
    --config='configs/data.py:generic=/corpus/*.jsonl.gz,law.train=law/a.txt,law.test=law/b.txt'
  python -m slm.data.prepare --runner=dataflow --out=gs://BUCKET/DATA \
    --config='configs/data.py:generic=gs://BUCKET/*.jsonl.gz' -- --project=NAME --region=REGION ...

The command can be killed at any moment and run again: complete files are kept, and those that are
missing or have another size (--verify: another hash) are made again. A directory belongs to its
settings and to the names, sizes and hashes of its sources and tokenizer; others are refused.
DIR/windows holds intermediate files and may be deleted afterwards. Exact copies of a document are
dropped, from training first: no training document of any set is, word for word, a held-out document
of this or another set. near_duplicates also drops near-duplicates (slm/data/near.py).

With --config.chat.kind the sets are conversations, preference pairs or prompts instead of text, and
their rows say which tokens are trained (docs/posttraining.md).

With --runner=direct, flink, spark or dataflow, the extra slm[beam], Apache Beam makes the same rows
on many machines; after -- stand its options. A pipeline that was killed begins again.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from slm.base import artifact, console, files, schema
from slm.data import (
  chat,
  cluster,
  conversations,
  documents,
  histograms,
  importance,
  installed,
  loader,
  masking,
  mix,
  near,
  rows,
  show,
  sidecars,
  sources,
  tfds,
  tokenizer,
  work,
)
from slm.data.settings import RUNNERS, PrepareConfig, TokenizerConfig

Path = pathlib.Path
Counts = dict[str, list[dict[str, Any]]]  # set -> shard -> what it holds of each split


def prepare(
  cfg: PrepareConfig, verify: bool = False, runner: str = '', options: Sequence[str] = ()
) -> dict[str, Any]:
  """Make or complete a prepared data directory and return its manifest.

  Files that are missing or have another size are made again, with `verify` also those with another
  hash. With a `runner` of Apache Beam, which takes `options`, the rows are the same; what a killed
  pipeline made is made again, and an address (gs://...) as cfg.out gets no indexes and histograms:
  called for a copy or a mount of it, the same makes these.

  Raises:
    ValueError: if the directory was made from other text or with another config, or another process
      is writing it.
  """
  _check_runner(cfg, verify, runner, options)
  if sources.is_address(cfg.out):
    return _prepare_address(cfg, runner, options)
  out = Path(cfg.out)
  with artifact.hold(out):
    work.sweep(out)
    paths = _sources(cfg, out, runner)
    if verify:
      _remove_damaged(out)
    previous = _readable_manifest(out)
    if not _complete(out, previous):
      _write_manifest(cfg, out, *_make(cfg, paths, runner, options), previous)
    if cfg.chat:
      _draw_mix(out)
    else:
      if not all((out / 'clusters' / name).exists() for name in histograms.FILES):
        histograms.write(out)
      print((out / 'clusters' / 'histograms.md').read_text())
      _nested(cfg)
  return loader.manifest(out)


def _draw_mix(out: Path) -> None:
  """Write and print the realised mix of every split."""
  manifest = loader.manifest(out)
  if not all((out / name).exists() for name in mix.FILES):
    mixes = {name: facts['mix'] for name, facts in _splits(manifest)}
    mix.write(out, manifest['chat']['kind'], mixes)
  print((out / mix.FILES[0]).read_text())


def _make(
  cfg: PrepareConfig, paths: documents.Sources, runner: str, options: Sequence[str]
) -> tuple[Counts, dict[str, dict[str, float]]]:
  """Make a directory but for its manifest; return what every shard holds, and costs by stage."""
  if runner:
    from slm.data import distributed

    return distributed.run(cfg, paths, runner, options)
  with work.Pool(cfg.workers) as pool:
    return _Preparation(cfg, pool).run(paths)


def _prepare_address(cfg: PrepareConfig, runner: str, options: Sequence[str]) -> dict[str, Any]:
  """Make a directory at an address, by way of a copy of its small files; return its manifest."""
  from slm.data import remote

  with tempfile.TemporaryDirectory() as folder:
    here, out = dataclasses.replace(cfg, out=folder), Path(folder)
    remote.fetch(cfg.out, out, 'prepare.json', 'manifest.json')
    paths = _sources(here, out, runner)
    if not (out / 'manifest.json').exists():
      remote.publish(out, cfg.out)  # the record of what it is made from, before anything is
      made = _make(cfg, paths, runner, options)
      remote.fetch(cfg.out, out, 'tokenizer/*', '*/*/rows-*.json', '*/*/rows-*.npy')
      _write_manifest(here, out, *made, {})
      remote.publish(out, cfg.out, last='manifest.json')
    return loader.manifest(out)


def _check_runner(cfg: PrepareConfig, verify: bool, runner: str, options: Sequence[str]) -> None:
  """Raise ValueError if Beam is missing, or something needs a runner or does not go with it."""
  if not runner:
    if sources.is_address(cfg.out):
      raise ValueError(f'--out={cfg.out}: is written through Apache Beam: give a --runner')
    return
  if cfg.chat:
    raise ValueError(f'--runner={runner}: chat.kind={cfg.chat.kind} is prepared on one machine')
  if not importlib.util.find_spec('apache_beam'):
    raise ValueError(f'--runner={runner}: needs apache-beam, pip install slm[beam]')
  if verify:
    raise ValueError(f'--verify compares the files on this machine: not with --runner={runner}')
  if cfg.workers:
    raise ValueError(
      f'workers={cfg.workers}: with --runner={runner} its own options, after --, say how many'
    )
  for name, splits in cfg.sets.items():
    for spec in splits.values():
      if spec.startswith('python:') and runner != 'direct':
        raise ValueError(
          f'sets.{name}: {spec} is the packages of one machine: not with --runner={runner}'
        )
  shared = [cfg.out, *(spec for splits in cfg.sets.values() for spec in splits.values()), cfg.sbert]
  for path in shared if runner == 'dataflow' else ():
    if path and not sources.is_address(path) and not path.startswith(tfds.PREFIX):
      raise ValueError(f'{path}: workers of Dataflow do not see this machine: expected gs://...')
  from slm.data import distributed

  distributed.parse(runner, options)


def _readable_manifest(out: Path) -> dict[str, Any]:
  try:
    return loader.manifest(out)
  except (FileNotFoundError, ValueError):
    return {}  # absent or cut short: the stages that are complete are not run again


def _splits(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
  for name, splits in manifest.get('sets', {}).items():
    yield from ((f'{name}/{split}', facts) for split, facts in splits.items())


def _stamps(out: Path, manifest: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
  """Return a path in the folder of every split, and the stamps of its files."""
  return [(out / split / 'rows', facts.get('files', {})) for split, facts in _splits(manifest)]


def _complete(out: Path, manifest: dict[str, Any]) -> bool:
  """Return whether everything that a manifest lists exists with its recorded size."""
  stages = [out / 'tokenizer/stage.json', *out.glob('*/*/rows-*.json')]
  stages += [] if 'chat' in manifest else [out / 'clusters/stage.json']
  damaged = (any(work.damages(*stamps, content=False)) for stamps in _stamps(out, manifest))
  return bool(manifest) and all(map(work.complete, stages)) and not any(damaged)


def _remove_damaged(out: Path) -> None:
  """Remove and name the files that are not as they were written, so that they are made again."""
  stamps, damaged = _stamps(out, _readable_manifest(out)), {}
  for path in set(out.rglob('*.json')) - set((out / 'index').glob('*.json')):
    try:
      summary = files.read_json(path)
    except ValueError as e:
      damaged[path] = str(e)
    else:
      if isinstance(summary, dict) and 'seconds' in summary:
        stamps.append((path, summary['files']))
  for path, recorded in stamps:
    damaged |= work.damages(path, recorded)
  for path, problem in sorted(damaged.items()):
    print(f'{problem}: it is made again', file=sys.stderr)
    path.unlink(missing_ok=True)


def _sources(cfg: PrepareConfig, out: Path, runner: str = '') -> documents.Sources:
  """List the source files; refuse a directory made from other text or with another config."""
  expand = sources.expand
  if cfg.chat:
    expand = functools.partial(conversations.expand, chat=cfg.chat)
  if runner:
    from slm.data import remote

    expand = remote.expand
  record = out / 'prepare.json'
  config = artifact.plain(dataclasses.asdict(cfg)) | {'version': loader.VERSION}
  for key in ('out', 'workers', *(() if cfg.chat else ('chat',))):
    del config[key]
  old = files.read_json(record) if record.exists() else {}
  if old:
    artifact.check_same(out, old['config'], config, 'what another config made')
  elif artifact.occupied(out):
    raise ValueError(f'{out}: is not empty and holds no {record.name}: choose another --out')
  paths = {s: {k: expand(v) for k, v in splits.items()} for s, splits in cfg.sets.items()}
  # Earlier versions recorded only the sizes of the texts.
  known = old.get('contents', {p: [size] for p, size in _flat(old.get('sources', {})).items()})
  contents = _contents(cfg, _flat(paths), known)
  known = {p: stamp for p, stamp in known.items() if p in contents or not _unread(cfg, p)}
  if not old:
    files.write_json(record, {'config': config, 'sources': paths, 'contents': contents})
  elif 'contents' in old:
    _same_contents(out, known, contents)
  else:
    _same_contents(out, known, {path: contents[path] for path in _flat(paths)})
  return paths


def _flat(paths: documents.Sources) -> dict[str, int]:
  """Return the size of every source file of all sets."""
  return {p: n for splits in paths.values() for group in splits.values() for p, n in group.items()}


def _contents(
  cfg: PrepareConfig, sizes: dict[str, int], known: dict[str, list[Any]]
) -> dict[str, list[Any]]:
  """Return size, time and hash of all inputs: texts, a tokenizer, an embedding model."""
  contents, paths = {}, []
  for path, size in sizes.items():
    if cfg.chat:
      paths.append(Path(conversations.file(path)))
    elif path.startswith('python:'):
      recorded = known.get(path, [])
      contents[path] = recorded if len(recorded) == 1 else [size, 0, installed.fingerprint()]
    elif path.startswith(tfds.PREFIX) or sources.is_address(path):
      contents[path] = [size]
    else:
      paths.append(Path(path))
  if cfg.tokenizer.path:
    inside = [Path(cfg.tokenizer.path) / name for name in sorted(tokenizer.FILES)]
    paths += [p for p in inside if p.is_file()] or [Path(cfg.tokenizer.path)]
  if cfg.sbert:
    inside = [p for p in Path(cfg.sbert).rglob('*') if p.is_file()]
    paths += sorted(inside) or [Path(cfg.sbert)]
  return contents | artifact.contents(paths, known)


def _unread(cfg: PrepareConfig, path: str) -> bool:
  """Return whether a path is in the tokenizer's folder, but no file that a tokenizer is read from.

  Earlier versions recorded every file in that folder.
  """
  folder = Path(cfg.tokenizer.path)
  inside = bool(cfg.tokenizer.path) and folder in Path(path).parents
  return inside and Path(path) not in [folder / name for name in tokenizer.FILES]


def _same_contents(out: Path, old: dict[str, list[Any]], new: dict[str, list[Any]]) -> None:
  for path in sorted(old.keys() | new.keys()):
    if old.get(path) != new.get(path):
      how = 'is new' if path not in old else 'is gone' if path not in new else 'has other content'
      raise ValueError(
        f'{out}: {path} {how} since it was prepared: choose another --out, or delete that '
        'directory to prepare all of it again'
      )


class _Preparation:
  """The stages of a preparation; each runs the tasks whose files are not complete."""

  def __init__(self, cfg: PrepareConfig, pool: work.Pool):
    self._cfg, self._pool, self._out = cfg, pool, Path(cfg.out)
    self._cost: dict[str, dict[str, float]] = {}
    self._sources: dict[Path, int] = {}  # shard of conversations -> number of its source

  def run(self, paths: documents.Sources) -> tuple[Counts, dict[str, dict[str, float]]]:
    """Run all stages; return what every shard holds, and the cost of every stage."""
    cfg = self._cfg
    documents.load_tokenizer.cache_clear()
    shards = {name: self._read(name, paths[name]) for name in cfg.sets}
    self._mark_duplicates(shards)
    cuts = {name: self._cuts(name, sizes) for name, sizes in shards.items()}
    if cfg.chat:
      for name, group in cuts.items():
        files.write_npy(self._folder(name) / 'copies.npy', mix.copies(cfg, name, group))
    self._tokenizer(cuts.get('generic', []))
    tasks = {c.out.with_suffix('.json'): c for group in cuts.values() for c in group}
    function = masking.cut if cfg.chat else documents.cut
    done = self._run('windows', 'tokens and windows', function, tasks)
    summaries = {c.out: summary for c, summary in zip(tasks.values(), done, strict=True)}
    counts = {name: [summaries[c.out] for c in group] for name, group in cuts.items()}
    for name in cfg.sets:
      _facts(cfg, name, counts[name])  # a split that holds nothing is refused before clusters
    if not cfg.chat:
      self._clusters(cuts, [shard['windows'][0] for shard in counts['generic']])
    self._rows(cuts, counts)
    return counts, self._cost

  def _run(
    self,
    stage: str,
    description: str,
    function: Callable[[Any], dict[str, Any]],
    tasks: dict[Path, Any],
    pool: work.Pool | None = None,
  ) -> list[dict[str, Any]]:
    """Run tasks and add their seconds (of all workers) and operations to the cost of a stage."""
    summaries = work.run(pool or self._pool, description, function, tasks)
    cost = self._cost.setdefault(stage, {'seconds': 0.0, 'flops': 0.0})
    for summary in summaries:
      cost['seconds'] += summary['seconds']
      cost['flops'] += summary.get('flops', 0.0)
    return summaries

  def _read(self, name: str, paths: dict[str, dict[str, int]]) -> dict[Path, int]:
    """Read a set's documents; return the number of documents of every shard."""
    cfg, folder = self._cfg, self._folder(name)
    tasks = {
      folder / f'{task.name}.json': task for task in documents.tasks(cfg, name, paths, folder)
    }
    function, pool = documents.read, self._pool
    if any(path.startswith('python:') for sizes in paths.values() for path in sizes):
      # The pool scans the installed packages, so the task itself runs in this process.
      function, pool = functools.partial(function, parallel_map=pool.map), work.Pool(1)
    summaries = self._run('documents', f'documents of {name}', function, tasks, pool)
    shards = {}
    for task, summary in zip(tasks.values(), summaries, strict=True):
      for shard, count in zip(summary['shards'], summary['documents'], strict=True):
        shards[folder / shard] = count
        if cfg.chat:
          self._sources[folder / shard] = conversations.number(task.paths[0])
    if not shards:
      raise ValueError(f'sets.{name}: no document in {", ".join(cfg.sets[name].values())}')
    return shards

  def _folder(self, name: str) -> Path:
    return self._out / 'windows' / 'documents' / name

  def _mark_duplicates(self, shards: dict[str, dict[Path, int]]) -> None:
    """Write which documents of every set are kept, once all sets are read."""
    threshold = self._cfg.near_duplicates
    paths = {name: self._folder(name) / 'keep.npy' for name in shards}
    missing = [
      name
      for name, sizes in shards.items()
      if not paths[name].exists() or len(files.read_npy(paths[name], 'r')) != sum(sizes.values())
    ]
    if threshold and missing:  # documents are compared across sets
      missing = list(shards)
    for name in missing:
      others = {s: n for other in shards if other != name for s, n in shards[other].items()}
      exact = self._folder(name) / 'exact.npy' if threshold else paths[name]
      documents.duplicates(shards[name], others, exact)
    if threshold and missing:
      tasks = {s.with_name(f'{s.name}.minhash.json'): s for sizes in shards.values() for s in sizes}
      work.run(self._pool, 'signatures', near.sign, tasks)
      keep = {name: files.read_npy(self._folder(name) / 'exact.npy') for name in shards}
      near.mark(shards, keep, threshold)
      for name, path in paths.items():
        files.write_npy(path, keep[name])

  def _cuts(self, name: str, shards: dict[Path, int]) -> list[documents.Cut]:
    """Return the tokenising tasks of a set."""
    cfg, folder = self._cfg, self._out / 'windows' / 'tokens' / name
    starts, num_splits = np.cumsum([0, *shards.values()]).tolist(), len(cfg.splits(name))
    return [
      documents.Cut(
        folder / f'{shard.name}.npz', shard, start, num_splits, cfg, self._sources.get(shard, 0)
      )
      for shard, start in zip(shards, starts, strict=False)
    ]

  def _tokenizer(self, cuts: list[documents.Cut]) -> None:
    """Make the tokenizer, trained on the generic training documents or copied."""
    folder, template = self._out / 'tokenizer', self._cfg.chat.template

    def build(cfg: TokenizerConfig) -> dict[str, Any]:
      sample = documents.sample(cuts, documents.SAMPLE, self._cfg.seed)
      tok = tokenizer.build(cfg.name, cfg.vocab, cfg.path, sample, folder)
      if template:
        files.write_text(folder / sidecars.TEMPLATE, chat.named(template, tok))
      if self._cfg.chat:
        masking.Masker(tokenizer.load(folder), template)  # refuses what cannot be proved
      return {'files': [p.name for p in folder.iterdir() if p.name in tokenizer.FILES]}

    tasks = {folder / 'stage.json': self._cfg.tokenizer}
    self._run('tokenizer', 'tokenizer', build, tasks, work.Pool(1))

  def _clusters(self, cuts: dict[str, list[documents.Cut]], counts: list[int]) -> None:
    """Fit clusters on the training windows of generic, `counts` per shard; assign all windows."""
    cfg, path = self._cfg, self._out / 'clusters' / cluster.FILE

    def fit(cuts: list[documents.Cut]) -> dict[str, Any]:
      sbert = cfg.sbert and str(Path(cfg.sbert).resolve())
      texts = documents.sample_windows(cuts, counts, cfg.fit_windows, cfg.seed)
      model, flops = cluster.fit(texts, cfg.levels, cfg.dims, cfg.seed, sbert)
      cluster.save(model, path)
      return {'files': [path.name], 'flops': flops}

    tasks = {path.with_name('stage.json'): cuts['generic']}
    self._run('clusters', 'clusters', fit, tasks, work.Pool(1))
    every = [c for group in cuts.values() for c in group]
    tasks = {c.out.with_suffix('.clusters.json'): (path, c) for c in every}
    self._run('clusters', 'windows to clusters', cluster.assign_shard, tasks)

  def _rows(self, cuts: dict[str, list[documents.Cut]], counts: Counts) -> None:
    """Pack the rows of every split."""
    tasks: dict[Path, rows.Pack] = {}
    for name, group in cuts.items():
      for number, split in self._cfg.made(name):
        starts = np.cumsum([0, *(shard['documents'][number] for shard in counts[name])]).tolist()
        folder = self._out / name / split
        for i, stem in enumerate(rows.names(len(group))):
          part = slice(i * rows.BLOCK, (i + 1) * rows.BLOCK)
          windows = tuple(c.out for c in group[part])
          tasks[folder / f'{stem}.json'] = rows.Pack(
            folder, stem, windows, tuple(starts[:-1][part]), number, self._cfg.context,
            self._cfg.chat,
          )  # fmt: skip
    self._run('rows', 'rows', rows.write, tasks)


def _facts(
  cfg: PrepareConfig, name: str, shards: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
  """Add up what the shards of a set hold of each split; refuse a split that holds nothing."""
  facts = {}
  for i, split in cfg.made(name):
    keys = ('documents', 'duplicates', 'windows', 'tokens', 'bytes')
    total = {key: sum(shard[key][i] for shard in shards) for key in keys}
    if cfg.chat:
      facts[split] = _chat_facts(cfg, name, i, split, shards) | total
      continue
    if not total['documents']:
      raise ValueError(
        f'{name}/{split}: no documents left (duplicates removed: {total["duplicates"]}); give '
        f'more text, other heldout shares, or sources per split ({name}.{split}=...)'
      )
    if split == 'train' and total['tokens'] < cfg.context - 1:
      raise ValueError(
        f'{name}/{split}: {total["tokens"]} tokens, less than one window of {cfg.context}'
      )
    facts[split] = total | {'bytes_per_token': total['bytes'] / total['tokens']}
  return facts


def _chat_facts(
  cfg: PrepareConfig, name: str, i: int, split: str, shards: list[dict[str, Any]]
) -> dict[str, Any]:
  """Add up what shards of conversations hold of a split, with the realised mix.

  Raises:
    ValueError: if the split holds nothing, saying why.
  """
  count = lambda key: {name: sum(s[key][name][i] for s in shards) for name in shards[0][key]}
  why = {reason: s['why'][reason] for s in reversed(shards) for reason in s['why']}
  dropped = {reason: n for reason, n in count('dropped').items() if n}
  total = {key: sum(shard[key][i] for shard in shards) for key in ('documents', 'tokens', 'bytes')}
  if not total['tokens']:
    reasons = '; '.join(f'{n:,} {why.get(r, masking.REASONS[r])}' for r, n in dropped.items())
    raise ValueError(f'{name}/{split}: no {cfg.chat.kind} left ({reasons or "all are duplicates"})')
  return {
    'bytes_per_token': total['bytes'] / total['tokens'],
    'positions': sum(shard['positions'][i] for shard in shards),
    'dropped': dropped,
    'why': {reason: why[reason] for reason in dropped if reason in why},
    'notes': {note: n for note, n in count('notes').items() if n},
    'mix': mix.realised(cfg, name, i, split, shards),
  }


def _write_manifest(
  cfg: PrepareConfig,
  out: Path,
  counts: Counts,
  cost: dict[str, dict[str, float]],
  previous: dict[str, Any],
) -> None:
  """Join the rows of every split and write the manifest.

  Raises:
    ValueError: if a split's rows differ from those in the `previous` manifest.
  """
  sets = {name: _facts(cfg, name, shards) for name, shards in counts.items()}
  for name, splits in sets.items():
    for split, facts in splits.items():
      folder = out / name / split
      stems = rows.names(len(counts[name]))
      facts |= rows.join(folder, {stem: files.read_json(folder / f'{stem}.json') for stem in stems})
      if cfg.chat.kind == 'pairs':
        facts['pairs_per_row'] = int(files.read_npy(folder / 'counts.npy')[:, 0].max())
  made = dict(_splits({'sets': sets}))
  for split, facts in _splits(previous):
    if facts['sha256'] != made[split]['sha256']:
      raise ValueError(
        f'{out / split}: was damaged, and this version of slm makes other rows of its '
        'text: delete the directory to prepare all of it again'
      )
  tok = tokenizer.load(out / 'tokenizer')
  manifest = {
    'version': loader.VERSION,
    'columns': rows.columns(cfg.context, cfg.chat),
    'context': cfg.context,
    'tokenizer': {key: getattr(tok, key) for key in ('name', 'vocab', 'fingerprint', 'begins')},
    'levels': [] if cfg.chat else sorted(cfg.levels),
    'seed': cfg.seed,
    'sets': sets,
    'cost': cost,
  }
  if cfg.chat:
    manifest['chat'] = _chat_record(cfg, tok)
    manifest['pairs'] = cfg.chat.kind == 'pairs'
  files.write_json(out / 'manifest.json', manifest)


def _chat_record(cfg: PrepareConfig, tok: tokenizer.Tokenizer) -> dict[str, Any]:
  """Return the manifest's entry about conversations."""
  masker = masking.Masker(tok, cfg.chat.template)
  return {
    'kind': cfg.chat.kind,
    'template': cfg.chat.template or 'own',
    'template_sha256': hashlib.sha256(tok.chat_template.encode()).hexdigest(),
    'stop': [masker.stop, tok.written([masker.stop])],
    'pad_is_end': tok.ids.pad == masker.stop,
  }


def _nested(cfg: PrepareConfig) -> None:
  """Write an index for every size of every domain's specialisation sets."""
  for name in cfg.sets:
    if name == 'generic':
      continue
    data = loader.Split(cfg.out, name, 'train')
    for size in sorted(cfg.sizes):
      if _intact(data.path / 'index' / f'{name}-{size}.json'):
        continue
      if size > data.facts['tokens']:
        print(f'{name}-{size}: not made, {name}/train has {data.facts["tokens"]:,} tokens')
        continue
      ids = importance.nested(data.counts[:, 1], size, cfg.seed)
      made = {'how': 'prefix of one seeded permutation', 'size': size, 'seed': cfg.seed}
      index = importance.write_index(data, f'{name}-{size}', ids, made)
      print(f'index {name}-{size}: {index["rows"]:,} rows, {index["tokens"]:,} tokens')


def _intact(record: Path) -> bool:
  """Return whether an index matches the hash in its record; delete a record that is damaged."""
  array = record.with_suffix('.npy')
  try:
    return files.read_json(record, {'sha256': str})['sha256'] == files.sha256(array)
  except FileNotFoundError:
    return False
  except ValueError:
    record.unlink()
    return False


def _main(argv: list[str]) -> None:
  config, runner = flags.FLAGS.config, flags.FLAGS.runner
  if argv[1:] and not runner:
    raise ValueError(f'unexpected argument {argv[1]!r}; flags are --name=value')
  if flags.FLAGS.out:
    config.out = flags.FLAGS.out
  cfg = schema.read(PrepareConfig, config.to_dict())
  manifest = prepare(cfg, flags.FLAGS.verify, runner or '', argv[1:])
  for split, facts in _splits(manifest):
    if cfg.chat:
      print(show.summary(manifest, split, facts))
    else:
      print(
        f'{split}: {facts["documents"]:,} documents ({facts["duplicates"]:,} duplicates dropped), '
        f'{facts["tokens"]:,} tokens, {facts["rows"]:,} rows, '
        f'{facts["bytes_per_token"]:.2f} bytes per token'
      )
  if cfg.chat:
    first = next(iter(cfg.sets))
    show.row(cfg.out, f'{first}/train', 0, documents=2 if cfg.chat.kind == 'pairs' else 1)
  compared = '; every file compared with its hash' if flags.FLAGS.verify else ''
  print(f'prepared: {config.out}{compared}')


if __name__ == '__main__':
  flags.DEFINE_string('out', '', 'Directory to write to.')
  flags.DEFINE_bool('verify', False, 'Compare hashes too, and make damaged files again.')
  runners = 'Prepare with Apache Beam, whose options stand after --; default: without it.'
  flags.DEFINE_enum('runner', None, list(RUNNERS), runners)
  console.run(_main, config='data', keys=PrepareConfig, positional=True)
