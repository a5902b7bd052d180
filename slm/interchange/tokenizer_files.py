"""The files of a tokenizer, in and out: what is carried, checked, and told to transformers."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slm.base import files
from slm.data import tokenizer, vocabulary

Files = dict[str, bytes]  # name, below the folder -> content
_NAMES = (
  'tokenizer.json', 'tokenizer.model', tokenizer.SETTINGS, 'special_tokens_map.json',
  'added_tokens.json', 'vocab.json', 'merges.txt', 'chat_template.jinja', 'generation_config.json',
  'config.json',
)  # fmt: skip
_TEMPLATES = 'additional_chat_templates'


def read(folder: Path) -> Files:
  """Read what belongs to a tokenizer and to decoding with it; empty if nothing is there."""
  paths = [*(folder / name for name in _NAMES), *sorted((folder / _TEMPLATES).glob('*.jinja'))]
  return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


def write(folder: Path, content: Mapping[str, bytes]) -> None:
  """Write the files of a tokenizer, and remove those of another that was there."""
  for name in read(folder).keys() - content.keys():
    (folder / name).unlink()
  for name, text in content.items():
    with files.replacing(folder / name) as temporary:
      temporary.write_bytes(text)


def is_there(content: Iterable[str]) -> bool:
  """Say whether some files hold a tokenizer, not only settings."""
  return not {'tokenizer.json', 'tokenizer.model'}.isdisjoint(content)


def check_ids(path: Path, rows: int, tok: tokenizer.Tokenizer | None) -> None:
  """Refuse tokens, and ids that settings name, that have no row of the embedding [rows, embed].

  Raises:
    ValueError: naming the file, the id and the number of rows.
  """
  if tok and tok.vocab > rows:
    raise ValueError(
      f'{path}: the tokenizer has {tok.vocab:,} ids, the model {rows:,} embeddings: '
      'its last tokens have none'
    )
  for name, content in read(path).items():
    with files.reading(path / name):
      last = max(vocabulary.ids_in(name, content), default=-1)
    if last >= rows:
      raise ValueError(f'{path / name}: names the id {last:,}, the model has {rows:,} embeddings')


def special(folder: Path) -> list[str]:
  """List the special and added tokens of a tokenizer that it reads as one id inside a text.

  SentencePiece reads its own control pieces as characters.
  """
  content = read(folder)
  if 'tokenizer.json' in content:
    return [token['content'] for token in parse(content, 'tokenizer.json').get('added_tokens', [])]
  return sorted(parse(content, 'added_tokens.json'))


def fingerprint(content: Mapping[str, bytes]) -> str:
  """Return the fingerprint of the tokenizer that some files are."""
  with tempfile.TemporaryDirectory() as folder:
    write(Path(folder), content)
    return tokenizer.load(folder).fingerprint


def of_line(line: Sequence[Mapping[str, Any]], data: str = '') -> tuple[Path | None, Files]:
  """Return the newest tokenizer of a line of runs: its folder, and files with config.json's ids.

  One of the data directory `data` will do where the runs have none.

  Raises:
    ValueError: if the vocabulary was cut without a record of the ids that its config names.
  """
  places = [Path(x['run']) / 'tokenizer' for x in line]
  places += [Path(x['data']) / 'tokenizer' for x in (*line, {'data': data}) if x['data']]
  there = [p for p in places if p.is_dir()]
  folder = next((p for p in there if is_there(x.name for x in p.iterdir())), (*there, None)[0])
  found = read(folder) if folder else {}
  origin = next((x['hf']['config'] for x in line if 'hf' in x), None)
  if origin and 'config.json' not in found:  # an import of an earlier version
    cut = next((x['run'] for x in line if 'vocab' in x.get('prune', {}).get('shape', {})), None)
    if cut:
      raise ValueError(f'{cut}: cut by an earlier version, which lost its end tokens: cut it again')
    found['config.json'] = json.dumps(origin).encode()
  return folder, found


def token_ids(tok: tokenizer.Tokenizer) -> dict[str, int]:
  """Return the ids that config.json names, of a tokenizer without one: those that it has."""
  ids = {'bos': tok.ids.bos, 'eos': tok.ids.eos, 'pad': tok.ids.pad}
  return {f'{name}_token_id': i for name, i in ids.items() if name in tok.special()}


def exported(
  content: Files, tok: tokenizer.Tokenizer, begin: Sequence[int], hf: Mapping[str, Any]
) -> Files:
  """Return files by which transformers reads and ends texts as the model does here.

  Every text begins with the ids `begin`; decoding stops at each end token that any of the files, or
  the config (`hf`), names. Files that say so already stay as they are, byte by byte. A text with
  U+2581 itself, SentencePiece's sign for a space, has other ids in transformers.
  """
  found, settings = dict(content), parse(content, tokenizer.SETTINGS)
  changes: dict[str, Any] = {}
  if 'tokenizer.json' in found:
    text = vocabulary.begin_with(found['tokenizer.json'].decode(), begin)
    if text.encode() != found['tokenizer.json']:
      found['tokenizer.json'] = text.encode()
      changes['add_bos_token'] = bool(begin)
  elif settings.get('add_bos_token') != bool(begin):
    changes['add_bos_token'] = bool(begin)
  if not settings:  # as the model was trained: no space is cleaned away
    fast = 'tokenizer.json' in found
    changes['tokenizer_class'] = 'PreTrainedTokenizerFast' if fast else 'LlamaTokenizer'
    changes |= {'add_bos_token': bool(begin), 'add_eos_token': False}
    changes |= {'add_prefix_space': tok.prefix_space, 'clean_up_tokenization_spaces': False}
    changes |= {f'{name}_token': token for name, token in tok.special().items()}
  if changes:
    found[tokenizer.SETTINGS] = _text({**settings, **changes})
  decoding = parse(content, 'generation_config.json')
  ends = list(dict.fromkeys([*_ids(decoding), *_ids(hf), tok.ids.eos]))
  if ends != _ids(decoding):
    own = {key: hf[key] for key in ('bos_token_id', 'pad_token_id') if hf.get(key) is not None}
    ids = ends if len(ends) > 1 else ends[0]
    found['generation_config.json'] = _text({**own, **decoding, 'eos_token_id': ids})
  return found


def _ids(settings: Mapping[str, Any]) -> list[int]:
  """Return the end tokens that settings name: one, several or none."""
  ids = settings.get('eos_token_id')
  return ids if isinstance(ids, list) else [] if ids is None else [ids]


def parse(content: Mapping[str, bytes], name: str) -> dict[str, Any]:
  """Read a file of settings; {} if it is not there."""
  with files.reading(name):
    return dict(json.loads(content.get(name, b'{}')))


def _text(value: Any) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + '\n').encode()
