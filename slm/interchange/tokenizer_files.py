"""The files of a tokenizer: read, checked, written, and completed for transformers."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slm.base import files
from slm.data import sidecars, tokenizer, vocabulary

Files = dict[str, bytes]  # path relative to the tokenizer's folder -> content
_VOCABULARIES = ('tokenizer.json', 'tokenizer.model')
_NAMES = (*_VOCABULARIES, *vocabulary.WHOLE, *sidecars.FILES)
_TEMPLATES = 'additional_chat_templates'


def read(folder: Path) -> Files:
  """Read the files of a folder that describe a tokenizer and decoding with it."""
  paths = [*(folder / name for name in _NAMES), *sorted((folder / _TEMPLATES).glob('*.jinja'))]
  return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


def write(folder: Path, content: Mapping[str, bytes]) -> None:
  """Write the files of a tokenizer; remove those of a previous one."""
  for name in read(folder).keys() - content.keys():
    (folder / name).unlink()
  for name, data in content.items():
    with files.replacing(folder / name) as temporary:
      temporary.write_bytes(data)


def has_tokenizer(content: Iterable[str]) -> bool:
  """Return whether files include a tokenizer, not only settings."""
  return not set(_VOCABULARIES).isdisjoint(content)


def check_ids(path: Path, rows: int, tok: tokenizer.Tokenizer | None) -> None:
  """Refuse tokens, and ids in the files beside them, without a row of the embedding [rows,embed].

  Raises:
    ValueError: naming the file, the id and the number of rows.
  """
  if tok and tok.vocab > rows:
    raise ValueError(f'{path}: the tokenizer has {tok.vocab:,} ids, the model {rows:,} embeddings')
  for name, data in read(path).items():
    with files.reading(path / name):
      last = max(vocabulary.ids_in(name, data), default=-1)
    if last >= rows:
      raise ValueError(f'{path / name}: names the id {last:,}, the model has {rows:,} embeddings')


def special(folder: Path) -> list[str]:
  """List the special and added tokens that a tokenizer recognises within a text.

  SentencePiece has none of its own: it reads its control pieces as characters.
  """
  content = read(folder)
  if 'tokenizer.json' in content:
    return [token['content'] for token in parse(content, 'tokenizer.json').get('added_tokens', [])]
  return sorted(parse(content, 'added_tokens.json'))


def fingerprint(content: Mapping[str, bytes]) -> str:
  """Return the fingerprint of the tokenizer that consists of these files."""
  with tempfile.TemporaryDirectory() as folder:
    write(Path(folder), content)
    return tokenizer.load(folder).fingerprint


def newest(ancestors: Sequence[Mapping[str, Any]], data: str = '') -> tuple[Path | None, Files]:
  """Return the newest tokenizer of a run's ancestors: its folder, and its files with config.json.

  A tokenizer of the runs takes precedence over one of their data directories or of `data`.

  Raises:
    ValueError: if the vocabulary was cut and the new ids of its config.json were not recorded.
  """
  data_directories = [*(run['data'] for run in ancestors), data]
  folders = [Path(run['run']) / 'tokenizer' for run in ancestors]
  folders += [Path(directory) / 'tokenizer' for directory in data_directories if directory]
  folders = [folder for folder in folders if folder.is_dir()]
  whole = (folder for folder in folders if has_tokenizer(path.name for path in folder.iterdir()))
  folder = next(whole, folders[0] if folders else None)
  content = read(folder) if folder else {}
  origin = next((run['hf']['config'] for run in ancestors if 'hf' in run), None)
  if origin and 'config.json' not in content:  # imported by an earlier version
    for run in ancestors:
      if 'vocab' in run.get('prune', {}).get('shape', {}):
        raise ValueError(
          f'{run["run"]}: an earlier version cut it and lost its end tokens: cut it again'
        )
    content['config.json'] = json.dumps(origin).encode()
  return folder, content


def token_ids(tok: tokenizer.Tokenizer) -> dict[str, int]:
  """Return the bos_token_id, eos_token_id and pad_token_id that a tokenizer has."""
  ids = {'bos': tok.ids.bos, 'eos': tok.ids.eos, 'pad': tok.ids.pad}
  return {f'{name}_token_id': i for name, i in ids.items() if name in tok.special()}


def exported(
  content: Files, tok: tokenizer.Tokenizer, begin: Sequence[int], hf: Mapping[str, Any]
) -> Files:
  """Return files by which transformers begins and ends texts as the model does here.

  Texts begin with the ids `begin`; decoding stops at every end token that a file or config.json
  (`hf`) names. Files that already say so keep their bytes. Texts with U+2581, SentencePiece's space
  symbol, have other ids in transformers.
  """
  exported, settings = dict(content), parse(content, sidecars.SETTINGS)
  changes: dict[str, Any] = {}
  if 'tokenizer.json' in content:
    data = vocabulary.begin_with(content['tokenizer.json'].decode(), begin).encode()
    if data != content['tokenizer.json']:
      exported['tokenizer.json'] = data
      changes['add_bos_token'] = bool(begin)
  elif settings.get('add_bos_token') != bool(begin):
    changes['add_bos_token'] = bool(begin)
  if not settings:
    fast = 'tokenizer.json' in content
    changes |= {
      'tokenizer_class': 'PreTrainedTokenizerFast' if fast else 'LlamaTokenizer',
      'add_bos_token': bool(begin),
      'add_eos_token': False,
      'add_prefix_space': tok.prefix_space,
      'clean_up_tokenization_spaces': False,  # the model was trained on all of them
      **{f'{name}_token': token for name, token in tok.special().items()},
    }
  if changes:
    exported[sidecars.SETTINGS] = _json({**settings, **changes})
  decoding = parse(content, 'generation_config.json')
  ends = list(dict.fromkeys([*_end_ids(decoding), *_end_ids(hf), tok.ids.eos]))
  if ends != _end_ids(decoding):
    ids = {key: hf[key] for key in ('bos_token_id', 'pad_token_id') if hf.get(key) is not None}
    decoding = {**ids, **decoding, 'eos_token_id': ends if len(ends) > 1 else ends[0]}
    exported['generation_config.json'] = _json(decoding)
  return exported


def _end_ids(settings: Mapping[str, Any]) -> list[int]:
  ids = settings.get('eos_token_id')
  return ids if isinstance(ids, list) else [] if ids is None else [ids]


def parse(content: Mapping[str, bytes], name: str) -> dict[str, Any]:
  """Parse one of the files as a JSON object; {} if it is absent."""
  with files.reading(name):
    return dict(json.loads(content.get(name, b'{}')))


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + '\n').encode()
