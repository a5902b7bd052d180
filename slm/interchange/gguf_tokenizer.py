"""The tokenizer of a GGUF file, rebuilt as the files that transformers would have.

llama.cpp stores tokens, their types, merges or scores, and the name of a pre-tokenizer.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Fields = Mapping[str, Any]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_PLACEHOLDER = re.compile(r'\[PAD\d+\]')  # the converter's name for an embedding without a token
_SPACE = '\u2581'
# Name in GGUF -> name in transformers.
_SPECIAL = {'bos': 'bos', 'eos': 'eos', 'unknown': 'unk', 'padding': 'pad'}
_ENDS = ('eos', 'eot', 'eom')  # of a text, a turn and a message


def _byte_level(use_regex: bool) -> dict[str, Any]:
  return {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': use_regex,
  }


def _words(digits: str) -> list[dict[str, Any]]:
  """Split as Llama 3 and Qwen 2 do; they differ in the pattern of `digits`."""
  pattern = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r'|'
    r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  )
  split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
  return [split, _byte_level(False)]


_LLAMA3 = _words(r'\p{N}{1,3}')
_QWEN2 = _words(r'\p{N}')
# Name of a pre-tokenizer -> its steps in tokenizer.json.
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
  'gpt-2': [_byte_level(True)],
  'smollm': [{'type': 'Digits', 'individual_digits': True}, _byte_level(True)],
  'llama-bpe': _LLAMA3,
  'llama3': _LLAMA3,
  'llama-v3': _LLAMA3,
  'qwen2': _QWEN2,
  'deepseek-r1-qwen': _QWEN2,
}


def special_ids(fields: Fields) -> dict[str, int]:
  """Return bos_token_id, eos_token_id and pad_token_id, as far as the file has them."""
  ids = {name: fields.get(f'tokenizer.ggml.{key}_token_id') for key, name in _SPECIAL.items()}
  return {f'{name}_token_id': i for name, i in ids.items() if i is not None and name != 'unk'}


def rebuild(path: Path, fields: Fields) -> dict[str, Any]:
  """Return tokenizer.json, tokenizer_config.json and generation_config.json; {} if there is none.

  Raises:
    ValueError: naming the file, if its tokenizer is damaged or of an unsupported kind.
  """
  get = lambda key, default=None: fields.get(f'tokenizer.ggml.{key}', default)
  kind, tokens = get('model'), get('tokens')
  if kind in (None, 'none', 'no_vocab') or not tokens:
    return {}
  makers = {'gpt2': _byte_pairs, 'llama': _sentencepiece}
  if kind not in makers:
    raise ValueError(f'{path}: tokenizer {kind!r}: expected one of {", ".join(makers)}')
  types = get('token_type') or [_NORMAL] * len(tokens)
  if len(types) != len(tokens):
    raise ValueError(f'{path}: {len(tokens)} tokens, but {len(types)} values of token_type')
  ids = {key: get(f'{key}_token_id') for key in (*_SPECIAL, *_ENDS)}
  ids = {key: i for key, i in ids.items() if i is not None}
  for key, i in ids.items():
    if i >= len(tokens):
      raise ValueError(f'{path}: {key}_token_id={i}: there are {len(tokens)} tokens')
  placeholder = lambda i: types[i] == _UNUSED and _PLACEHOLDER.fullmatch(tokens[i])
  vocab = {token: i for i, token in enumerate(tokens) if not placeholder(i)}
  parts = makers[kind](path, get, vocab, types)
  adds_bos = get('add_bos_token', kind == 'llama' or parts['model']['ignore_merges'])
  begin = [ids['bos']] if adds_bos and 'bos' in ids else []
  end = [ids['eos']] if get('add_eos_token', False) and 'eos' in ids else []
  parts['post_processor'] = _template(tokens, begin, end) if begin or end else None
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  parts['added_tokens'] = [
    {'id': i, 'content': token, 'special': types[i] != _USER_DEFINED, **flags}
    for i, token in enumerate(tokens)
    if types[i] in (_CONTROL, _UNKNOWN, _USER_DEFINED)
  ]
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'add_bos_token': bool(begin),
    'add_eos_token': bool(end),
    **{f'{name}_token': tokens[ids[key]] for key, name in _SPECIAL.items() if key in ids},
  }
  if template := fields.get('tokenizer.chat_template'):
    settings['chat_template'] = template
  ends = [*dict.fromkeys(ids[key] for key in _ENDS if key in ids)]
  return {
    'tokenizer.json': {'version': '1.0', 'truncation': None, 'padding': None, **parts},
    'tokenizer_config.json': settings,
    'generation_config.json': special_ids(fields) | ({'eos_token_id': ends} if ends else {}),
  }


def _template(tokens: Sequence[str], begin: list[int], end: list[int]) -> dict[str, Any]:
  """Return the post-processor that puts the begin and end tokens around every text."""

  def around(name: str, number: int) -> list[dict[str, Any]]:
    special = lambda i: {'SpecialToken': {'id': tokens[i], 'type_id': number}}
    text = {'Sequence': {'id': name, 'type_id': number}}
    return [*map(special, begin), text, *map(special, end)]

  return {
    'type': 'TemplateProcessing',
    'single': around('A', 0),
    'pair': [*around('A', 0), *around('B', 1)],
    'special_tokens': {
      tokens[i]: {'id': tokens[i], 'ids': [i], 'tokens': [tokens[i]]} for i in {*begin, *end}
    },
  }


def _model(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], **options: Any) -> dict:
  defaults = {
    'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
    'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
  }  # fmt: skip
  return {**defaults, **options, 'vocab': dict(vocab), 'merges': [list(pair) for pair in merges]}


def _byte_pairs(
  path: Path, get: Callable, vocab: Mapping[str, int], types: Sequence[int]
) -> dict[str, Any]:
  """Return the parts of a byte-level BPE tokenizer, as GPT-2 has it."""
  name = get('pre')
  if name not in _PRE_TOKENIZERS:
    known = ', '.join(_PRE_TOKENIZERS)
    raise ValueError(f'{path}: pre-tokenizer {name!r}: expected one of {known}')
  steps = _PRE_TOKENIZERS[name]
  merges = [merge.split(' ') for merge in get('merges', [])]
  for pair in merges:
    if len(pair) != 2 or ''.join(pair) not in vocab or not set(pair) <= vocab.keys():
      raise ValueError(f'{path}: merge {" ".join(pair)!r}: expected two tokens that make a third')
  return {
    # Qwen's own tokenizer normalises to NFC; llama.cpp does not.
    'normalizer': {'type': 'NFC'} if steps is _QWEN2 else None,
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': steps},
    'decoder': _byte_level(True),
    'model': _model(vocab, merges, ignore_merges=steps is _LLAMA3),
  }


def _sentencepiece(
  path: Path, get: Callable, vocab: Mapping[str, int], types: Sequence[int]
) -> dict[str, Any]:
  """Return the parts of a SentencePiece BPE tokenizer: pieces of higher scores merge first."""
  scores = get('scores')
  if not scores or len(scores) != len(types):
    raise ValueError(f'{path}: expected a score for each token, found {len(scores or [])}')
  pieces = {token: i for token, i in vocab.items() if types[i] in (_NORMAL, _UNUSED)}
  merges = [
    (token[:n], token[n:])
    for token in sorted(pieces, key=lambda token: (-scores[pieces[token]], pieces[token]))
    for n in range(1, len(token))
    if token[:n] in pieces and token[n:] in pieces
  ]
  unknown = next((token for token, i in vocab.items() if types[i] == _UNKNOWN), None)
  normalizers = [{'type': 'Replace', 'pattern': {'String': ' '}, 'content': _SPACE}]
  decoders = [
    {'type': 'Replace', 'pattern': {'String': _SPACE}, 'content': ' '},
    {'type': 'ByteFallback'},
    {'type': 'Fuse'},
  ]
  if get('add_space_prefix', True):
    normalizers.insert(0, {'type': 'Prepend', 'prepend': _SPACE})
    decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
  options = {'unk_token': unknown, 'fuse_unk': True, 'byte_fallback': _BYTE in types}
  return {
    'normalizer': {'type': 'Sequence', 'normalizers': normalizers},
    'pre_tokenizer': None,
    'decoder': {'type': 'Sequence', 'decoders': decoders},
    'model': _model(vocab, merges, **options),
  }
