"""What the files beside a tokenizer say of it, as transformers 5 reads them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from slm.base import files

SETTINGS = 'tokenizer_config.json'
TEMPLATE = 'chat_template.jinja'
_MAP, _ADDED = 'special_tokens_map.json', 'added_tokens.json'
_GENERATION, _CONFIG = 'generation_config.json', 'config.json'
FILES = (SETTINGS, _MAP, _ADDED, TEMPLATE, _GENERATION, _CONFIG)
_NAMED = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')
_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')


@dataclasses.dataclass(frozen=True)
class Beside:
  """Settings, tokens and ids; what no file says is absent."""

  folder: Path
  settings: Mapping[str, Any]  # of tokenizer_config.json and special_tokens_map.json
  named: Mapping[str, str | None]  # 'bos', 'eos', 'unk', ...: the token's text, None if null
  added: tuple[tuple[int | None, tokenizers.AddedToken], ...]  # by id; None: the next free one
  ids: Mapping[str, tuple[int, ...]]  # 'bos', 'eos', 'pad' of generation_config.json, config.json
  chat_template: str | None


def read(folder: Path) -> Beside:
  """Read the files beside a tokenizer; any of them may be missing.

  Raises:
    ValueError: naming the file that is damaged or does not hold what its name says.
  """
  say = {name: _object(folder / name) for name in FILES if name != TEMPLATE}
  config, tokens = say[SETTINGS], say[_MAP]
  # Where tokenizer_config.json lists added tokens it is the newer of the two.
  settings = {**tokens, **config} if 'added_tokens_decoder' in config else {**config, **tokens}
  with files.reading(folder / SETTINGS, 'the settings of a tokenizer'):
    named = {n: _text(settings[f'{n}_token']) for n in _NAMED if f'{n}_token' in settings}
    extra = [_text(x) for key in ('additional', 'extra') for x in _extra(settings, key)]
    special = {*named.values(), *extra}
    listed = config.get('added_tokens_decoder', {}).items()
    added = {x['content']: (int(i), _token(**x)) for i, x in listed}
    template = _default(settings.get('chat_template'))
  with files.reading(folder / _ADDED, 'a table of tokens and ids'):
    for text, i in say[_ADDED].items():
      added.setdefault(text, (int(i), _token(text, special=text in special)))
  for text in extra:
    added.setdefault(text, (None, _token(text, special=True)))
  if (folder / TEMPLATE).exists():
    template = (folder / TEMPLATE).read_text()
  ids = {}
  for which in ('bos', 'eos', 'pad'):
    found = [x for name in (_GENERATION, _CONFIG) for x in _ids(folder / name, say[name], which)]
    ids[which] = tuple(dict.fromkeys(found))
  by_id = sorted(added.values(), key=lambda x: (x[0] is None, x[0] or 0))
  return Beside(folder, settings, named, tuple(by_id), ids, template)


def _object(path: Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  found = files.read_json(path)
  if not isinstance(found, dict):
    raise ValueError(f'{path}: expected an object, found {str(found)[:40]}')
  return found


def _text(token: Any) -> str | None:
  """Return a token's text; files hold it alone or with its flags."""
  return token['content'] if isinstance(token, dict) else token


def _extra(settings: Mapping[str, Any], key: str) -> list[Any]:
  """Return further special tokens, a list or a table by name; None where a file says null."""
  tokens = settings.get(f'{key}_special_tokens') or []
  return [*tokens.values()] if isinstance(tokens, dict) else tokens


def _token(content: str, **flags: Any) -> tokenizers.AddedToken:
  return tokenizers.AddedToken(content, **{k: v for k, v in flags.items() if k in _FLAGS})


def _default(template: Any) -> str | None:
  """Return the chat template, of several the one named default."""
  if isinstance(template, list):
    return {x['name']: x['template'] for x in template}.get('default')
  return template


def _ids(path: Path, config: Mapping[str, Any], which: str) -> list[int]:
  """Return the ids that a config names, one or several; some write -1 for none."""
  about = {**(config.get('text_config') or {}), **config}
  value = about.get(f'{which}_token_id')
  values = value if isinstance(value, list) else [] if value is None else [value]
  if not all(isinstance(x, int) for x in values):
    raise ValueError(f'{path}: {which}_token_id: expected an id or several, found {value}')
  return [x for x in values if x >= 0]
