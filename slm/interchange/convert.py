"""A directory of `transformers` to a run directory, and a run to a directory of `transformers`."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from slm import models
from slm.base import artifact, files, schema
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
  """Read config.json: what it holds, and the shape.

  Raises:
    ValueError: naming the file, if it is damaged or describes something not computed here.
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


class Read(NamedTuple):
  """A model of transformers: weights, config.json, and what its files say of the tensors."""

  model: models.Model
  params: Params
  hf: dict[str, Any]
  dtype: str  # the widest type of the weights' tensors
  buffers: list[str]  # tensors that are not weights, and were left out


def read(path: str | Path, mesh: jax.sharding.Mesh, dtype: str = '', gguf: Any = None) -> Read:
  """Read a model of transformers onto a mesh.

  Weights have that type, or `dtype`. Each device's part is read tensor by tensor, from `gguf` if
  an open GGUF file holds the directory's weights.

  Raises:
    ValueError: naming the file or tensor that is missing, damaged, left over or of another shape.
  """
  path = Path(path)
  hf, shape = read_config(path)
  model = models.build(shape)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  with contextlib.ExitStack() as stack:
    tensors = gguf or weights.Tensors(path, stack)
    try:
      planned, buffers = weights.plan(tensors, shape, hf['model_type'], shapes)
      own = weights.dtype_of(tensors, planned)
      dtype = dtype or own
      params = weights.load(
        tensors, planned, shapes, sharding.shardings(shapes, mesh),
        np.dtype(getattr(ml_dtypes, dtype, dtype)),
      )  # fmt: skip
    except ValueError as e:
      raise ValueError(f'{path}: {e}') from None
  return Read(model, params, hf, own, buffers)


@artifact.writes('workdir')
def import_model(path: str | Path, workdir: str | Path, gguf: Any = None) -> RunConfig:
  """Write a model of transformers as a run directory that everything else takes.

  `gguf` is an open GGUF file of which `path` holds the config and the tokenizer.

  Raises:
    ValueError: as `read` does, or if the directory holds something else.
  """
  path, workdir = Path(path), Path(workdir)
  hf, shape = read_config(path)
  content = tokenizer_files.read(path)
  tok = tokenizer.load(path) if tokenizer_files.is_there(content) else None
  tokenizer_files.check_ids(path, shape.vocab, tok)
  origin = gguf.path if gguf else path
  mesh = sharding.fit_mesh(shape.embed)
  cfg = RunConfig(
    phase='import',
    steps=0,
    context=families.resolve(hf)['max_position_embeddings'],
    model=shape,
    data=DataConfig(set=''),
    tokenizer=tok.fingerprint if tok else '',
    hf={
      'path': str(origin.resolve()),
      'config': hf,
      'files': _stamps(origin, workdir),
      **_ancestors(path),
    },
  )
  config.check_run(workdir, cfg)
  if (workdir / 'result.json').exists():
    return cfg
  with jax.set_mesh(mesh):
    found = read(path, mesh, gguf=gguf)
    config.write_run(workdir, cfg)
    tokenizer_files.write(workdir / 'tokenizer', content)
  load.write_dense(workdir, cfg, found.params, [], dtype=found.dtype, left_out=found.buffers)
  return cfg


def remarks(run: str | Path) -> list[str]:
  """Say what an imported model's files held that is of no use, in a line each."""
  run, said = Path(run), []
  if unused := files.read_json(run / 'result.json').get('left_out', []):
    more = ', ...' if len(unused) > 1 else ''
    said.append(f'left out: {len(unused)} tensors that are not weights ({unused[0]}{more})')
  cfg = config.of(run)
  rows, ids = cfg.model.vocab, 0
  if cfg.tokenizer and (ids := tokenizer.load(run / 'tokenizer').vocab) < rows:
    said.append(f'{rows:,} embeddings, {ids:,} ids of tokens: the last {rows - ids:,} have none')
  return said


def _ancestors(path: Path) -> dict[str, Any]:
  """Return what an export of slm says it was made from; nothing of other directories.

  Raises:
    ValueError: naming the file, if it is not what an export writes.
  """
  if not (path / LINEAGE).exists():
    return {}
  about = files.read_json(path / LINEAGE)
  with files.reading(path / LINEAGE, 'the lineage of an export'):
    for entry in about['history']:
      card.row(entry)
    return {'made_from': list(map(str, about['made_from'])), 'history': about['history']}


def _stamps(path: Path, workdir: Path) -> dict[str, list[Any]]:
  """Return size, time of change and hash of every file of weights: other weights, another run."""
  folder, paths = (path.parent, [path]) if path.is_file() else (path, path.glob('*.safetensors'))
  there = (workdir / 'config.json').exists()
  known = (config.of(workdir).hf or {}).get('files', {}) if there else {}
  stamps = artifact.contents(sorted(paths), {str(folder / n): stamp for n, stamp in known.items()})
  return {Path(name).name: stamp for name, stamp in stamps.items()}


@artifact.writes('out')
def export_model(
  run: str | Path, out: str | Path, dtype: str = '', shard_bytes: int = weights.SHARD_BYTES
) -> dict[str, Any]:
  """Write a run's dense model as a directory that transformers loads unchanged.

  `dtype` '' is the type that the weights were imported with, float32 for others. What came with
  the model it was made from (tokenizer, chat template, token ids) is carried over; a teacher's is
  not.

  Raises:
    ValueError: if weights cannot have that type, the run is unfinished or holds several
      specialists, no architecture of transformers has its shape, a run it was made from is gone, or
      the directory holds something else.
  """
  run, out = Path(run), Path(out)
  if dtype not in ('', *weights.DTYPES.values()):
    raise ValueError(f'--dtype={dtype}: expected one of {", ".join(weights.DTYPES.values())}')
  loaded = load.load(run, load.mesh_for(run), finished=True)
  if loaded.reparam.clusters:
    raise ValueError(f'{run} holds several specialists: take one out with slm.specialise first')
  history = lineage(run)
  _check_place(out, Path(history[0]['run']).name)
  ancestry = line(history)
  origin = next((x['hf'] for x in ancestry if 'hf' in x), {})
  content, hf = _settings(loaded, ancestry, bool(origin))
  family, hf = families.find(loaded.model.cfg, hf)
  dtype = dtype or origin.get('dtype', 'float32')
  hf |= {'torch_dtype': dtype, 'dtype': dtype}
  history = [_public(entry) for entry in history]
  # The directory is marked first, so that an export cut short can be begun again; and it does not
  # load before its config is there, last.
  files.write_json(out / LINEAGE, {'unfinished': True, 'history': history[:1]})
  for path in (out / 'config.json', out / 'README.md', *out.glob('*.tmp')):
    path.unlink(missing_ok=True)  # the card is of the weights that were there
  tokenizer_files.write(out, content)
  sizes = weights.save(
    loaded.params(), loaded.model.cfg, family, out, np.dtype(getattr(ml_dtypes, dtype, dtype)),
    shard_bytes,
  )  # fmt: skip
  files.write_json(out / 'config.json', hf)
  about = {'family': family, 'dtype': dtype, **sizes, 'tokenizer': [*content]}
  before = ancestry if 'hf' in ancestry[0] else ancestry[1:]
  steps = [Path(x['hf']['path'] if 'hf' in x else x['run']).name for x in before]
  about['made_from'] = [*steps, *(origin.get('made_from', []) if origin else ['random weights'])]
  about['history'] = history
  files.write_json(out / LINEAGE, about)
  return about


def _check_place(out: Path, run: str) -> None:
  """Refuse a directory that holds something else than an export, whole or begun, of a run."""
  if artifact.occupied(out) and not (out / LINEAGE).exists():
    raise ValueError(f'{out}: is not empty and was not exported here: choose another directory')
  if (out / LINEAGE).exists():
    before = files.read_json(out / LINEAGE).get('history', [{'run': run}])[0]['run']
    if before != run:
      raise ValueError(f'{out}: holds the export of {before}, not of {run}: choose another one')


def _settings(
  loaded: load.Loaded, ancestry: list[dict[str, Any]], imported: bool
) -> tuple[tokenizer_files.Files, dict[str, Any]]:
  """Return the tokenizer's files of an export, and what its config.json takes over."""
  folder, content = tokenizer_files.of_line(ancestry)
  hf = tokenizer_files.parse(content, 'config.json')
  content.pop('config.json', None)
  if not imported:  # what there is of a config came with the tokenizer alone
    ids = {key: hf[key] for key in families.TOKEN_IDS if hf.get(key) is not None}
    hf = {'max_position_embeddings': loaded.cfg.context, **ids}
  if folder and tokenizer_files.is_there(content):
    tok, begin = load.reads(loaded, folder.parent)
    hf = hf if imported else tokenizer_files.token_ids(tok) | hf
    content = tokenizer_files.exported(content, tok, begin, hf)
  return content, hf


def line(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Return those of a lineage whose weights became the newest run's: no teachers."""
  by_run = {x['run']: x for x in history}
  found = [history[0]]
  while source := found[-1].get('init'):
    found.append(by_run[str(rundir.split_ref(Path(source))[0].resolve())])
  return found


def lineage(run: str | Path) -> list[dict[str, Any]]:
  """List a run and what its weights came from, newest first, with their costs and data.

  Raises:
    ValueError: naming a run that weights came from and that is not there any more.
  """
  entries, todo, seen = [], [Path(run)], set()
  while todo:
    path, step = rundir.split_ref(todo.pop(0))
    known = (path / 'config.json').exists() or (path / signals.ABOUT).exists()
    if path.resolve() in seen or not known:
      continue
    seen.add(path.resolve())
    cost = ledger.read_ledger(path)
    about, sources = _of_run(path) if (path / 'config.json').exists() else (_of_signals(path), [])
    about |= {'run': str(path.resolve()), 'step': step, 'cost': cost['phases']}
    entries += [about, *about.get('hf', {}).get('history', [])]
    todo += [Path(source) for source in (*sources, *cost['ancestors'])]
  return entries


def _of_run(path: Path) -> tuple[dict[str, Any], list[str]]:
  """Return what a lineage says of a run, and the runs that it was made from."""
  cfg = config.of(path)
  values = schema.plain(cfg)
  entry = {
    'phase': cfg.phase,
    'objective': values['objective'],
    'data': cfg.data.path,
    'set': cfg.data.set,
    'rows_sha256': cfg.rows,
    'tokenizer_sha256': cfg.tokenizer,
    'config_sha256': hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
  }
  entry |= {key: values[key] for key in ('teacher', 'prune') if values.get(key)}
  if cfg.teacher_cache:
    about = Path(cfg.teacher_cache) / signals.ABOUT
    entry['teacher'] = files.read_json(about)['teacher'] if about.exists() else str(about.parent)
  source = cfg.init or (cfg.specialist or {}).get('of', '')
  if source and not (rundir.split_ref(Path(source))[0] / 'config.json').exists():
    raise ValueError(f'{source}: gone, and {path} was made from it: it has its tokenizer and type')
  if source:
    entry['init'] = source
  if (path / 'result.json').exists():
    entry['result'] = files.read_json(path / 'result.json')
  if cfg.hf:
    entry['hf'] = {**cfg.hf, 'dtype': entry['result']['dtype']}
  return entry, [name for name in (source, cfg.teacher) if name]


def _of_signals(path: Path) -> dict[str, Any]:
  """Return what a lineage says of a teacher's signals."""
  about = files.read_json(path / signals.ABOUT)
  return {
    'phase': 'signals',
    'objective': {'name': about['mode']},
    'data': about['data'],
    'set': about['on'].partition('/')[0],
    'rows_sha256': about['rows_sha256'],
    'tokenizer_sha256': about['tokenizer'],
    'config_sha256': hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest(),
  }


def _public(entry: Mapping[str, Any]) -> dict[str, Any]:
  """Keep names of directories, not where they lay on the machine that exported."""
  found = dict(entry)
  for key in ('run', 'data', 'init', 'teacher'):
    if found.get(key):
      found[key] = Path(found[key]).name
  if 'hf' in found:
    name = found['hf'].get('path', found['hf'].get('name', ''))
    found['hf'] = {'name': Path(name).name, 'dtype': found['hf']['dtype']}
  return found
