"""Settings and tokens from the files beside a tokenizer, as transformers 5 reads them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from slm.base import files

SETTINGS = 'tokenizer_config.json'
TEMPLATE = 'chat_template.jinja'
MAP, ADDED = 'special_tokens_map.json', 'added_tokens.json'
MODEL = ('generation_config.json', 'config.json')  # configs of the tokenizer's model
FILES = (SETTINGS, MAP, ADDED, TEMPLATE, *MODEL)
_ROLES = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')
_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')


@dataclasses.dataclass(frozen=True)
class Sidecars:
  """Contents of the files beside a tokenizer; a key that no file holds is absent."""

  settings: Mapping[str, Any]  # tokenizer_config.json merged with special_tokens_map.json
  named: Mapping[str, str | None]  # role ('bos', 'eos', 'unk', ...) -> token; None if null
  added: tuple[tuple[int | None, tokenizers.AddedToken], ...]  # by id; None: the next free id
  ids: Mapping[str, tuple[int, ...]]  # 'bos', 'eos', 'pad' -> ids in the configs of the model
  chat_template: str | None


def read(folder: Path) -> Sidecars:
  """Read the files beside a tokenizer; any of them may be missing.

  Raises:
    ValueError: if a file is damaged or does not have the expected structure; names the file.
  """
  content = {name: _read_object(folder / name) for name in FILES if name != TEMPLATE}
  config, tokens = content[SETTINGS], content[MAP]
  # A tokenizer_config.json that lists added tokens is the newer of the two files.
  settings = {**tokens, **config} if 'added_tokens_decoder' in config else {**config, **tokens}
  with files.reading(folder / SETTINGS, 'the settings of a tokenizer'):
    named = {r: _text(settings[f'{r}_token']) for r in _ROLES if f'{r}_token' in settings}
    extra: list[str] = []
    for key in ('additional_special_tokens', 'extra_special_tokens'):
      listed = settings.get(key) or []
      extra += map(_text, listed.values() if isinstance(listed, dict) else listed)
    special = {*named.values(), *extra}
    texts = [*extra, *filter(None, named.values())]
    if not all(isinstance(text, str) for text in texts):
      raise ValueError(f'special tokens: expected texts, found {texts}')
    ''.join(texts).encode()  # raises ValueError at half of a surrogate pair
    decoder = config.get('added_tokens_decoder', {}).items()
    added = {token['content']: (int(i), _token(**token)) for i, token in decoder}
    template = settings.get('chat_template')
    if isinstance(template, list):
      template = {x['name']: x['template'] for x in template}.get('default')
  with files.reading(folder / ADDED, 'a table of tokens and ids'):
    for text, i in content[ADDED].items():
      added.setdefault(text, (int(i), _token(text, special=text in special)))
  for text in extra:
    added.setdefault(text, (None, _token(text, special=True)))
  if (folder / TEMPLATE).exists():
    template = (folder / TEMPLATE).read_text()
  ids = {}
  for role in ('bos', 'eos', 'pad'):
    values = [i for name in MODEL for i in _ids(folder / name, content[name], role)]
    ids[role] = tuple(dict.fromkeys(values))
  by_id = sorted(added.values(), key=lambda x: (x[0] is None, x[0] or 0))
  return Sidecars(settings, named, tuple(by_id), ids, template)


def _read_object(path: Path) -> dict[str, Any]:
  content = files.read_json(path) if path.exists() else {}
  if not isinstance(content, dict):
    raise ValueError(f'{path}: expected an object, found {str(content)[:40]}')
  return content


def _text(token: Any) -> str | None:
  """Return the text of a token, which is stored alone or as an object with its flags."""
  return token['content'] if isinstance(token, dict) else token


def _token(content: str, **flags: Any) -> tokenizers.AddedToken:
  return tokenizers.AddedToken(content, **{k: v for k, v in flags.items() if k in _FLAGS})


def _ids(path: Path, config: Mapping[str, Any], role: str) -> list[int]:
  """Return the ids that a model's config names for a role; negative values mean no token."""
  value = ({**(config.get('text_config') or {}), **config}).get(f'{role}_token_id')
  values = value if isinstance(value, list) else [] if value is None else [value]
  if not all(isinstance(i, int) for i in values):
    raise ValueError(f'{path}: {role}_token_id: expected an id or a list of ids, found {value}')
  return [i for i in values if i >= 0]
