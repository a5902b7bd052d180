"""Import models of `transformers` as run directories; export runs as models of `transformers`."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slm import models
from slm.base import artifact, files, schema, stage
from slm.data import tokenizer
from slm.data.loader import DataConfig
from slm.interchange import card, families, tokenizer_files, weights
from slm.models.config import DecoderConfig
from slm.objectives import signals
from slm.runs import config, ledger, load, rundir
from slm.runs.config import RunConfig
from slm.runs.rundir import LINEAGE
from slm.weights import sharding
from slm.weights.axes import Params


def read_config(path: Path) -> tuple[dict[str, Any], DecoderConfig]:
  """Read the config.json of a directory: its content, and the shape that it describes.

  Raises:
    ValueError: naming the file, if it is missing, damaged or of an unsupported model.
  """
  file = path / 'config.json'
  rundir.refuse_unfinished(path)
  if not file.exists():
    raise ValueError(f'{path}: holds no config.json')
  hf = files.read_json(file)
  if not isinstance(hf, dict):
    raise ValueError(f'{file}: expected an object, found {str(hf)[:40]}')
  with files.reading(file):
    try:
      return hf, DecoderConfig(**families.read(hf))
    except ValueError as e:
      raise ValueError(f'{file}: {e}') from None


class Imported(NamedTuple):
  """A model of transformers in memory."""

  model: models.Model
  params: Params
  hf: dict[str, Any]  # config.json
  dtype: str  # the widest type of the tensors that are weights
  buffers: list[str]  # names of the tensors that are not weights


def read(path: str | Path, mesh: jax.sharding.Mesh, dtype: str = '', gguf: Any = None) -> Imported:
  """Load a model of transformers onto a mesh, in its own type or in `dtype`.

  The weights are read from `gguf`, an open GGUF file, if one is given.

  Raises:
    ValueError: naming the file or tensor that is missing, damaged, unknown or of the wrong shape.
  """
  path = Path(path)
  hf, shape = read_config(path)
  model = models.build(shape)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  with contextlib.ExitStack() as stack:
    tensors = gguf or weights.Tensors(path, stack)
    try:
      plan, buffers = weights.plan(tensors, shape, hf['model_type'], shapes)
      own_dtype = weights.dtype_of(tensors, plan)
      target, places = np.dtype(dtype or own_dtype), sharding.shardings(shapes, mesh)
      params = weights.load(tensors, plan, shapes, places, target)
    except ValueError as e:
      raise ValueError(f'{path}: {e}') from None
  return Imported(model, params, hf, own_dtype, buffers)


@artifact.writes('workdir', addresses=True)
def import_model(path: str | Path, workdir: str | Path, gguf: Any = None) -> RunConfig:
  """Import a model of transformers as a run directory.

  With an open GGUF file `gguf`, `path` provides only the config and the tokenizer.

  Raises:
    ValueError: as `read` does, or if `workdir` holds something else.
  """
  path, workdir = Path(path), Path(workdir)
  hf, shape = read_config(path)
  content = tokenizer_files.read(path)
  tok = tokenizer.load(path) if tokenizer_files.has_tokenizer(content) else None
  tokenizer_files.check_ids(path, shape.vocab, tok)
  source = gguf.path if gguf else path
  mesh = sharding.fit_mesh(shape.embed)
  cfg = RunConfig(
    phase='import',
    steps=0,
    context=families.resolve(hf)['max_position_embeddings'],
    model=shape,
    data=DataConfig(set=''),
    tokenizer=tok.fingerprint if tok else '',
    hf={
      'path': str(source.resolve()),
      'config': hf,
      'files': _stamps(source, workdir),
      **_earlier_lineage(path),
    },
  )
  config.check_run(workdir, cfg)
  if (workdir / 'result.json').exists():
    return cfg
  with jax.set_mesh(mesh):
    imported = read(path, mesh, gguf=gguf)
    config.write_run(workdir, cfg)
    tokenizer_files.write(workdir / 'tokenizer', content)
  load.write_dense(
    workdir, cfg, imported.params, [], dtype=imported.dtype, left_out=imported.buffers
  )
  return cfg


def remarks(run: str | Path) -> list[str]:
  """Describe the tensors and embeddings of an imported model that nothing uses, a line each."""
  run, lines = rundir.split_ref(run)[0], []
  if buffers := files.read_json(run / 'result.json').get('left_out', []):
    more = ', ...' if len(buffers) > 1 else ''
    lines.append(f'left out: {len(buffers)} tensors that are not weights ({buffers[0]}{more})')
  cfg = config.of(run)
  rows, tokens = cfg.model.vocab, 0
  if cfg.tokenizer and (tokens := tokenizer.load(run / 'tokenizer').vocab) < rows:
    unused = rows - tokens
    lines.append(f'{rows:,} embeddings for {tokens:,} tokens: the last {unused:,} are unused')
  return lines


def _earlier_lineage(path: Path) -> dict[str, Any]:
  """Return `made_from` and `history` of a directory that slm exported, {} for any other.

  Raises:
    ValueError: naming the file, if an export would not have written it.
  """
  if not (path / LINEAGE).exists():
    return {}
  lineage = files.read_json(path / LINEAGE)
  with files.reading(path / LINEAGE, 'the lineage of an export'):
    for entry in lineage['history']:
      card.row(entry)
    return {'made_from': list(map(str, lineage['made_from'])), 'history': lineage['history']}


def _stamps(path: Path, workdir: Path) -> dict[str, list[Any]]:
  """Return size, modification time and hash of each weight file, by name."""
  folder, paths = (path.parent, [path]) if path.is_file() else (path, path.glob('*.safetensors'))
  imported = (workdir / 'config.json').exists()
  known = (config.of(workdir).hf or {}).get('files', {}) if imported else {}
  stamps = artifact.contents(sorted(paths), {str(folder / n): stamp for n, stamp in known.items()})
  return {Path(name).name: stamp for name, stamp in stamps.items()}


@artifact.writes('out')
def export_model(
  run: str | Path, out: str | Path, dtype: str = '', shard_bytes: int = weights.SHARD_BYTES
) -> dict[str, Any]:
  """Export a run's dense model as a directory that transformers loads; return its lineage.

  With `dtype` '' weights keep the type that they were imported in, or are float32. The tokenizer,
  chat template and token ids of the run or of the runs that it was initialised from go with them.

  Raises:
    ValueError: if the type is unknown, the run is unfinished or holds several specialists, no
      family of transformers can have its shape, a run that it was made from is missing, or `out`
      holds something else.
  """
  run, out = Path(run), Path(out)
  if dtype not in ('', *weights.DTYPES.values()):
    raise ValueError(f'--dtype={dtype}: expected one of {", ".join(weights.DTYPES.values())}')
  loaded = load.load(run, load.mesh_for(run), finished=True)
  if loaded.reparam.clusters:
    raise ValueError(f'{run} holds several specialists: take one out with slm.specialise first')
  history = lineage(run)
  _check_out(out, _public(history[0]))
  ancestors = ancestry(history)
  origin = next((entry['hf'] for entry in ancestors if 'hf' in entry), {})
  content, hf = _settings(loaded, ancestors, bool(origin))
  family, hf = families.find(loaded.model.cfg, hf)
  dtype = dtype or origin.get('dtype', 'float32')
  hf |= {'torch_dtype': dtype, 'dtype': dtype}
  history = [_public(entry) for entry in history]
  # The lineage comes first, to mark an unfinished export as one, and config.json last: without it
  # the directory does not load.
  files.write_json(out / LINEAGE, {'unfinished': True, 'history': history[:1]})
  for path in (out / 'config.json', out / 'README.md', *out.glob('*.tmp')):
    path.unlink(missing_ok=True)  # README.md describes the previous weights
  tokenizer_files.write(out, content)
  sizes = weights.save(loaded.params(), loaded.model.cfg, family, out, np.dtype(dtype), shard_bytes)
  files.write_json(out / 'config.json', hf)
  sources = ancestors if 'hf' in ancestors[0] else ancestors[1:]
  names = [Path(x['hf']['path'] if 'hf' in x else x['run']).name for x in sources]
  names += origin.get('made_from', []) if origin else ['random weights']
  result = {'family': family, 'dtype': dtype, **sizes, 'tokenizer': [*content]}
  result |= {'made_from': names, 'history': history}
  files.write_json(out / LINEAGE, result)
  return result


def _check_out(out: Path, entry: Mapping[str, Any]) -> None:
  """Refuse a directory that holds anything but a complete or partial export of a lineage's run."""
  if not (out / LINEAGE).exists():
    if artifact.occupied(out):
      raise ValueError(f'{out}: is not empty and was not exported here: choose another directory')
    return
  exported, run = files.read_json(out / LINEAGE).get('history', [entry])[0], entry['run']
  if exported['run'] != run:
    raise ValueError(
      f'{out}: holds the export of {exported["run"]}, not of {run}: choose another one'
    )
  for key in ('step', 'config_sha256'):  # runs of one name
    if (was := exported.get(key, entry[key])) != entry[key]:
      raise ValueError(
        f'{out}: holds the export of {run} with {key} {was}, not {entry[key]}: choose another one'
      )


def _settings(
  loaded: load.Loaded, ancestors: list[dict[str, Any]], imported: bool
) -> tuple[tokenizer_files.Files, dict[str, Any]]:
  """Return the tokenizer files of an export, and the keys that its config.json carries over."""
  folder, content = tokenizer_files.newest(ancestors)
  hf = tokenizer_files.parse(content, 'config.json')
  content.pop('config.json', None)
  if not imported:  # the tokenizer's config.json, not the model's
    ids = {key: hf[key] for key in families.TOKEN_IDS if hf.get(key) is not None}
    hf = {'max_position_embeddings': loaded.cfg.context, **ids}
  if folder and tokenizer_files.has_tokenizer(content):
    tok, begin = load.reads(loaded, folder.parent)
    hf = hf if imported else tokenizer_files.token_ids(tok) | hf
    content = tokenizer_files.exported(content, tok, begin, hf)
  return content, hf


def ancestry(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Select from a lineage its first run and the runs whose weights it started from, in turn."""
  by_run = {entry['run']: entry for entry in history}
  ancestors = [history[0]]
  while source := ancestors[-1].get('init'):
    ancestors.append(by_run[stage.absolute(rundir.split_ref(source)[0])])
  return ancestors


def lineage(run: str | Path) -> list[dict[str, Any]]:
  """List a run and all runs and signals that it was made from, newest first, with their costs.

  Raises:
    ValueError: naming a run that another was initialised from and that is missing.
  """
  entries, pending, seen = [], [Path(run)], set()
  while pending:
    path, step = rundir.split_ref(pending.pop(0))
    is_run = (path / 'config.json').exists()
    if path.resolve() in seen or not (is_run or (path / signals.ABOUT).exists()):
      continue
    seen.add(path.resolve())
    cost = ledger.read_ledger(path)
    entry, sources = _run_entry(path) if is_run else (_signals_entry(path), [])
    entry |= {'run': stage.absolute(path), 'step': step, 'cost': cost['phases']}
    entries += [entry, *entry.get('hf', {}).get('history', [])]
    pending += [Path(source) for source in (*sources, *cost['ancestors'])]
  return entries


def _run_entry(path: Path) -> tuple[dict[str, Any], list[str]]:
  """Return a run's entry in a lineage, and the runs that it was made from."""
  cfg = config.of(path)
  values = schema.plain(cfg)
  entry = {
    'phase': cfg.phase,
    'objective': values['objective'],
    'data': cfg.data.path,
    'set': cfg.data.set,
    'rows_sha256': cfg.rows,
    'tokenizer_sha256': cfg.tokenizer,
    'config_sha256': _sha256(values),
  }
  entry |= {key: values[key] for key in ('teacher', 'prune') if values.get(key)}
  if cfg.teacher_cache:
    file = Path(cfg.teacher_cache) / signals.ABOUT
    entry['teacher'] = files.read_json(file)['teacher'] if file.exists() else str(file.parent)
  if source := cfg.init or (cfg.specialist or {}).get('of', ''):
    if not (rundir.split_ref(Path(source))[0] / 'config.json').exists():
      raise ValueError(f'{source}: is missing; {path} was made from it and needs its tokenizer')
    entry['init'] = source
  if (path / 'result.json').exists():
    entry['result'] = files.read_json(path / 'result.json')
  if cfg.hf:
    entry['hf'] = {**cfg.hf, 'dtype': entry['result']['dtype']}
  return entry, [name for name in (source, cfg.teacher) if name]


def _signals_entry(path: Path) -> dict[str, Any]:
  """Return the entry in a lineage of a directory of teacher signals."""
  manifest = files.read_json(path / signals.ABOUT)
  return {
    'phase': 'signals',
    'objective': {'name': manifest['mode']},
    'data': manifest['data'],
    'set': manifest['on'].partition('/')[0],
    'rows_sha256': manifest['rows_sha256'],
    'tokenizer_sha256': manifest['tokenizer'],
    'config_sha256': _sha256(manifest),
  }


def _sha256(values: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _public(entry: Mapping[str, Any]) -> dict[str, Any]:
  """Reduce the paths in an entry of a lineage to names."""
  names = {k: Path(entry[k]).name for k in ('run', 'data', 'init', 'teacher') if entry.get(k)}
  if hf := entry.get('hf'):
    names['hf'] = {'name': Path(hf.get('path') or hf['name']).name, 'dtype': hf['dtype']}
  return {**entry, **names}
