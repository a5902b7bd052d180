"""A directory of `transformers` to a run directory, and a run to a directory of `transformers`."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from slm import models
from slm.base import artifact, files
from slm.data import tokenizer
from slm.interchange import families, weights
from slm.models.config import DecoderConfig
from slm.objectives import signals
from slm.runs import ledger, load, rundir
from slm.weights import sharding

DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
LINEAGE = 'slm_lineage.json'
# What belongs to the tokenizer and to decoding: carried over as it is. The first three name tokens
# by their text, and so hold for a tokenizer that was cut to fewer tokens too.
_BY_TEXT = ('tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')
_TOKENIZER = (
  *_BY_TEXT,
  'tokenizer.json', 'tokenizer.model', 'added_tokens.json', 'vocab.json', 'merges.txt',
  'generation_config.json',
)  # fmt: skip


def read_config(path: Path) -> tuple[dict[str, Any], DecoderConfig]:
  """Read config.json: what it holds, and the shape.

  Raises:
    ValueError: naming the file, if it is damaged or describes something not computed here.
  """
  file = path / 'config.json'
  if not file.exists():
    raise ValueError(f'{path}: holds no config.json')
  hf = files.read_json(file)
  if not isinstance(hf, dict):
    raise ValueError(f'{file}: expected an object, found {str(hf)[:40]}')
  try:
    return hf, DecoderConfig(**families.read(hf))
  except (ValueError, TypeError, AttributeError) as e:
    raise ValueError(f'{file}: {e}') from None


def read(
  path: str | Path, mesh: jax.sharding.Mesh, dtype: str = ''
) -> tuple[models.Model, dict[str, Any], dict[str, Any], str]:
  """Read a model of transformers onto a mesh: (model, weights, config.json, type of its tensors).

  Weights have that type, or `dtype`. Each device's part is read tensor by tensor.

  Raises:
    ValueError: naming the file or tensor that is missing, damaged, left over or of another shape.
  """
  path = Path(path)
  hf, shape = read_config(path)
  model = models.build({'name': 'decoder', **dataclasses.asdict(shape)})
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  with contextlib.ExitStack() as stack:
    tensors = weights.Tensors(path, stack)
    found = {tensors.dtype(name) for name in tensors.files}
    if found - set(DTYPES):
      raise ValueError(f'{path}: tensors of type {sorted(found)}, expected one of {list(DTYPES)}')
    # The widest, if they differ; of the two of 16 bits neither holds the other's numbers.
    own = 'float32' if {'BF16', 'F16'} <= found else DTYPES[min(found, key=list(DTYPES).index)]
    try:
      params = weights.load(
        tensors, shape, hf['model_type'], shapes, sharding.shardings(shapes, mesh),
        np.dtype(getattr(ml_dtypes, dtype or own, dtype or own)),
      )  # fmt: skip
    except ValueError as e:
      raise ValueError(f'{path}: {e}') from None
  return model, params, hf, own


@artifact.writes('workdir')
def import_model(path: str | Path, workdir: str | Path) -> dict[str, Any]:
  """Write a model of transformers as a run directory that everything else takes.

  Raises:
    ValueError: as `read` does, or if the directory holds something else.
  """
  path, workdir = Path(path), Path(workdir)
  hf, shape = read_config(path)
  mesh = sharding.fit_mesh(shape.embed)
  config = {
    'phase': 'import',
    'steps': 0,
    'seed': 0,
    'dtype': 'float32',
    'context': hf.get('max_position_embeddings', 2048),
    'model': {'name': 'decoder', **dataclasses.asdict(shape)},
    'reparam': {'name': 'full'},
    'objective': {'name': 'next_token', 'chunk': 512},
    'eval': {'patience': 0, 'batch_size': 32},
    'data': {'path': '', 'set': '', 'level': 0},
    'init': '',
    'teacher': '',
    'clustering': '',
    'tokenizer': _fingerprint(path),
    'hf': {'path': str(path.resolve()), 'config': hf, 'files': _stamps(path, workdir)},
  }
  rundir.check_run(workdir, config)
  if (workdir / 'result.json').exists():
    return files.read_json(workdir / 'config.json')
  with jax.set_mesh(mesh):
    _, params, _, own = read(path, mesh)
    rundir.write_run(workdir, config)
    for name in _TOKENIZER:
      if (path / name).exists():
        with files.replacing(workdir / 'tokenizer' / name) as temporary:
          shutil.copyfile(path / name, temporary)
  load.write_dense(workdir, config, params, [], dtype=own)
  return config


def _stamps(path: Path, workdir: Path) -> dict[str, list[Any]]:
  """Return size, time of change and hash of every file of weights: other weights, another run."""
  known = {}
  if (workdir / 'config.json').exists():
    known = files.read_json(workdir / 'config.json').get('hf', {}).get('files', {})
  before = {str(path / name): stamp for name, stamp in known.items()}
  found = artifact.contents(sorted(path.glob('*.safetensors')), before)
  return {Path(name).name: stamp for name, stamp in found.items()}


def _fingerprint(path: Path) -> str:
  if not any((path / name).exists() for name in ('tokenizer.json', 'tokenizer.model')):
    return ''
  return tokenizer.load(path).fingerprint


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
  if dtype not in ('', *DTYPES.values()):
    raise ValueError(f'--dtype={dtype}: expected one of {", ".join(DTYPES.values())}')
  loaded = load.load(run, load.mesh_for(run), finished=True)
  if loaded.reparam.clusters:
    raise ValueError(f'{run} holds several specialists: take one out with slm.specialise first')
  if artifact.occupied(out) and not (out / LINEAGE).exists():
    raise ValueError(f'{out}: is not empty and was not exported here: choose another directory')
  history = lineage(run)
  mine = Path(history[0]['run']).name
  if (out / LINEAGE).exists():
    before = files.read_json(out / LINEAGE).get('history', [{'run': mine}])[0]['run']
    if before != mine:
      raise ValueError(f'{out}: holds the export of {before}, not of {mine}: choose another one')
  line = _line(history)
  origin = next((x['hf'] for x in line if 'hf' in x), {})
  known = origin.get('config', {'max_position_embeddings': loaded.cfg['context']})
  family, hf = families.find(loaded.model.cfg, known)
  dtype = dtype or origin.get('dtype', 'float32')
  hf |= {'torch_dtype': dtype, 'dtype': dtype}
  # The directory is marked first, so that an export cut short can be begun again; and it does not
  # load before its config is there, last.
  files.write_json(out / LINEAGE, {'unfinished': True})
  for name in ('config.json', 'README.md'):  # the card is of the weights that were there
    (out / name).unlink(missing_ok=True)
  carried = carry_tokenizer(line, out, hf)
  sizes = weights.save(
    loaded.params(), loaded.model.cfg, family, out, np.dtype(getattr(ml_dtypes, dtype, dtype)),
    shard_bytes,
  )  # fmt: skip
  for name in set(_TOKENIZER) - set(carried):  # of an earlier export
    (out / name).unlink(missing_ok=True)
  files.write_json(out / 'config.json', hf)
  about = {'family': family, 'dtype': dtype, **sizes, 'tokenizer': carried}
  steps = [Path(x['hf']['path'] if 'hf' in x else x['run']).name for x in line[1:]]
  about['made_from'] = steps if origin else [*steps, 'random weights']
  about['history'] = [_public(entry) for entry in history]
  files.write_json(out / LINEAGE, about)
  return about


def carry_tokenizer(line: list[dict[str, Any]], out: Path, hf: dict[str, Any]) -> list[str]:
  """Copy the newest tokenizer's files; write what transformers needs beside one that has none.

  Its token ids go into config.json (`hf`), as do those of a vocabulary that was cut. A text with
  U+2581 itself, SentencePiece's sign for a space, has other ids in transformers; all others have
  the same.
  """
  places = [Path(x['run']) / 'tokenizer' for x in line]
  places += [Path(x['data']) / 'tokenizer' for x in line if x['data']]
  there = next((p for p in places if p.is_dir()), None)
  if there is None:
    return []
  found = {name: there / name for name in _TOKENIZER if (there / name).exists()}
  if renumbered := _renumbered(line):
    for place, name in itertools.product(places, _BY_TEXT):
      if name not in found and (place / name).exists():
        found[name] = place / name
  for name, file in found.items():
    with files.replacing(out / name) as temporary:
      shutil.copyfile(file, temporary)
  if not {'tokenizer.json', 'tokenizer.model'} & found.keys():
    return [*found]
  tok, settings = tokenizer.load(there), out / 'tokenizer_config.json'
  ids = {'bos_token_id': tok.ids.bos, 'eos_token_id': tok.ids.eos, 'pad_token_id': tok.ids.pad}
  if settings.name in found:
    if renumbered:  # what these say of ids is of the whole vocabulary
      about = files.read_json(settings)
      files.write_json(settings, {k: v for k, v in about.items() if k != 'added_tokens_decoder'})
      for key in ids.keys() & hf.keys():  # an id, several, or none
        old = hf[key]
        hf[key] = [renumbered[i] for i in old] if isinstance(old, list) else renumbered.get(old)
    return [*found]
  hf |= ids
  kind = 'LlamaTokenizer' if 'tokenizer.model' in found else 'PreTrainedTokenizerFast'
  # As the model was trained: every row begins with it, and no space is cleaned away.
  about = {'tokenizer_class': kind, 'add_bos_token': True, 'add_eos_token': False}
  about |= {'add_prefix_space': tok.prefix_space, 'clean_up_tokenization_spaces': False}
  about |= {f'{name}_token': token for name, token in tok.special().items()}
  files.write_json(settings, about)
  return [*found, settings.name]


def _renumbered(line: list[dict[str, Any]]) -> dict[int, int]:
  """Return the new id of each old one, if the vocabulary was cut on the way to the newest run."""
  found: dict[int, int] = {}
  for here in line:
    if 'vocab' in here.get('prune', {}).get('shape', {}):
      kept = safetensors.numpy.load_file(Path(here['run']) / 'kept.safetensors')['vocab'].tolist()
      last = found or {i: i for i in range(len(kept))}
      found = {old: last[new] for new, old in enumerate(kept) if new in last}
  return found


def _line(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
  found, todo, seen = [], [Path(run)], set()
  while todo:
    here = todo.pop(0)
    path, step = rundir.split_ref(here)
    known = (path / 'config.json').exists() or (path / signals.ABOUT).exists()
    if path.resolve() in seen or not known:
      continue
    seen.add(path.resolve())
    cfg, cost = _config(path), ledger.read_ledger(path)
    entry: dict[str, Any] = {
      'run': str(path.resolve()),
      'step': step,
      'phase': cfg['phase'],
      'objective': cfg['objective'],
      'data': cfg['data']['path'],
      'set': cfg['data']['set'],
      'rows_sha256': cfg.get('rows', ''),
      'tokenizer_sha256': cfg['tokenizer'],
      'config_sha256': hashlib.sha256(json.dumps(cfg, sort_keys=True).encode()).hexdigest(),
      'cost': cost['phases'],
    }
    for key in ('teacher', 'prune'):
      if cfg.get(key):
        entry[key] = cfg[key]
    if cfg.get('teacher_cache'):
      about = Path(cfg['teacher_cache']) / signals.ABOUT
      entry['teacher'] = files.read_json(about)['teacher'] if about.exists() else str(about.parent)
    source = cfg.get('init') or (cfg.get('specialist') or {}).get('of')
    if source and not (rundir.split_ref(Path(source))[0] / 'config.json').exists():
      raise ValueError(
        f'{source}: gone, and {path} was made from it: it has its tokenizer and type'
      )
    entry |= {'init': source} if source else {}
    if (path / 'result.json').exists():
      entry['result'] = files.read_json(path / 'result.json')
    if 'hf' in cfg:
      entry['hf'] = {**cfg['hf'], 'dtype': entry['result']['dtype']}
    found.append(entry)
    todo += [Path(s) for s in (source, cfg.get('teacher'), *cost['ancestors']) if s]
  return found


def _config(path: Path) -> dict[str, Any]:
  """Return a run's config, or what stands for it of a teacher's signals."""
  if (path / 'config.json').exists():
    return rundir.read_config(path)
  about = files.read_json(path / signals.ABOUT)
  return {
    'phase': 'signals',
    'objective': {'name': about['mode']},
    'data': {'path': about['data'], 'set': about['on'].partition('/')[0]},
    'rows': about['rows_sha256'],
    'tokenizer': about['tokenizer'],
  }


def _public(entry: Mapping[str, Any]) -> dict[str, Any]:
  """Keep names of directories, not where they lay on the machine that exported."""
  found = dict(entry)
  for key in ('run', 'data', 'init', 'teacher'):
    if found.get(key):
      found[key] = Path(found[key]).name
  if 'hf' in found:
    found['hf'] = {'name': Path(found['hf']['path']).name, 'dtype': found['hf']['dtype']}
  return found
