"""The tokenizer that a GGUF file holds, as the files that transformers would have.

llama.cpp keeps tokens, their kinds, merges or scores, and names the rule by which text is split.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Fields = Mapping[str, Any]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MADE_UP = re.compile(r'\[PAD\d+\]')  # by the converter, for rows of the embedding without a token
_SPACE = '\u2581'
# Theirs -> that of transformers; the ends of a turn and of a message, which those have no name for.
_SPECIAL = {'bos': 'bos', 'eos': 'eos', 'unknown': 'unk', 'padding': 'pad'}
_MORE_ENDS = ('eot', 'eom')


def _split(pattern: str) -> dict[str, Any]:
  return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def _byte_level(use_regex: bool) -> dict[str, Any]:
  return {
    'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': use_regex
  }  # fmt: skip


def _words(digits: str) -> list[dict[str, Any]]:
  """Split as Llama 3 and Qwen 2 do, which differ in how many digits stay together."""
  return [
    _split(
      r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r'|'
      r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
    ),
    _byte_level(False),
  ]  # fmt: skip


# Name in the file -> how text is split, as the tokenizer.json of the models has it.
_GPT2 = [_byte_level(True)]
_LLAMA3 = _words(r'\p{N}{1,3}')
_QWEN2 = _words(r'\p{N}')
_SMOLLM = [{'type': 'Digits', 'individual_digits': True}, _byte_level(True)]
_SPLITS: dict[str, list[dict[str, Any]]] = {
  'gpt-2': _GPT2,
  'smollm': _SMOLLM,
  'llama-bpe': _LLAMA3,
  'llama3': _LLAMA3,
  'llama-v3': _LLAMA3,
  'qwen2': _QWEN2,
  'deepseek-r1-qwen': _QWEN2,
}


def special_ids(fields: Fields) -> dict[str, int]:
  """Return those of bos_token_id, eos_token_id and pad_token_id that the file names."""
  named = {ours: fields.get(f'tokenizer.ggml.{key}_token_id') for key, ours in _SPECIAL.items()}
  return {f'{name}_token_id': i for name, i in named.items() if i is not None and name != 'unk'}


def rebuild(path: Path, fields: Fields) -> dict[str, Any]:
  """Make tokenizer.json, tokenizer_config.json and generation_config.json; nothing of no tokenizer.

  Raises:
    ValueError: naming the file, if it splits text in a way that is not known here.
  """
  get = lambda key, default=None: fields.get(f'tokenizer.ggml.{key}', default)
  kind, tokens = get('model'), get('tokens')
  if kind in (None, 'none', 'no_vocab') or not tokens:
    return {}
  makers = {'gpt2': _byte_pairs, 'llama': _sentencepiece}
  if kind not in makers:
    raise ValueError(f'{path}: tokenizer {kind!r}: expected one of {", ".join(makers)}')
  kinds = get('token_type') or [_NORMAL] * len(tokens)
  if len(kinds) != len(tokens):
    raise ValueError(f'{path}: {len(tokens)} tokens, but {len(kinds)} values of token_type')
  ids = {key: i for key in _SPECIAL if (i := get(f'{key}_token_id')) is not None}
  ids |= {key: i for key in _MORE_ENDS if (i := get(f'{key}_token_id')) is not None}
  for key, i in ids.items():
    if i >= len(tokens):
      raise ValueError(f'{path}: {key}_token_id={i}: there are {len(tokens)} tokens')
  vocab = {t: i for i, t in enumerate(tokens) if kinds[i] != _UNUSED or not _MADE_UP.fullmatch(t)}
  parts = makers[kind](path, get, vocab, kinds)
  begins = get('add_bos_token', kind == 'llama' or parts['model']['ignore_merges'])
  begins = [ids['bos']] if begins and 'bos' in ids else []
  ends = [ids['eos']] if get('add_eos_token', False) and 'eos' in ids else []
  parts['post_processor'] = _template(tokens, begins, ends) if begins or ends else None
  parts['added_tokens'] = [
    _added(i, tokens[i], kinds[i] != _USER_DEFINED)
    for i in range(len(tokens)) if kinds[i] in (_CONTROL, _UNKNOWN, _USER_DEFINED)
  ]  # fmt: skip
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
    'add_bos_token': bool(begins), 'add_eos_token': bool(ends),
  }  # fmt: skip
  settings |= {f'{name}_token': tokens[ids[key]] for key, name in _SPECIAL.items() if key in ids}
  if template := fields.get('tokenizer.chat_template'):
    settings['chat_template'] = template
  stops = [*dict.fromkeys(ids[key] for key in ('eos', *_MORE_ENDS) if key in ids)]
  return {
    'tokenizer.json': {'version': '1.0', 'truncation': None, 'padding': None, **parts},
    'tokenizer_config.json': settings,
    'generation_config.json': special_ids(fields) | ({'eos_token_id': stops} if stops else {}),
  }


def _added(i: int, token: str, special: bool) -> dict[str, Any]:
  strips = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
  return {'id': i, 'content': token, 'special': special, **strips}


def _template(tokens: Sequence[str], begins: list[int], ends: list[int]) -> dict[str, Any]:
  """Put the begin and end tokens around every text."""
  special = lambda ids, kind: [{'SpecialToken': {'id': tokens[i], 'type_id': kind}} for i in ids]
  text = lambda name, kind: [
    *special(begins, kind), {'Sequence': {'id': name, 'type_id': kind}}, *special(ends, kind)
  ]  # fmt: skip
  return {
    'type': 'TemplateProcessing',
    'single': text('A', 0),
    'pair': [*text('A', 0), *text('B', 1)],
    'special_tokens': {
      tokens[i]: {'id': tokens[i], 'ids': [i], 'tokens': [tokens[i]]} for i in {*begins, *ends}
    },
  }


def _model(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], **options: Any) -> dict:
  plain = {
    'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
    'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
  }  # fmt: skip
  return {**plain, **options, 'vocab': dict(vocab), 'merges': [list(pair) for pair in merges]}


def _byte_pairs(
  path: Path, get: Callable, vocab: Mapping[str, int], kinds: Sequence[int]
) -> dict[str, Any]:
  """Byte-pair encoding of bytes written as characters, as GPT-2 has it."""
  name = get('pre')
  if name not in _SPLITS:
    raise ValueError(f'{path}: pre-tokenizer {name!r}: expected one of {", ".join(_SPLITS)}')
  merges = [merge.split(' ') for merge in get('merges', [])]
  for pair in merges:
    if len(pair) != 2 or ''.join(pair) not in vocab or not set(pair) <= vocab.keys():
      raise ValueError(f'{path}: merge {" ".join(pair)!r}: expected two tokens that make a third')
  return {
    # Qwen's own tokenizer composes characters first; llama.cpp does not.
    'normalizer': {'type': 'NFC'} if _SPLITS[name] is _QWEN2 else None,
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': _SPLITS[name]},
    'decoder': _byte_level(True),
    'model': _model(vocab, merges, ignore_merges=_SPLITS[name] is _LLAMA3),
  }


def _sentencepiece(
  path: Path, get: Callable, vocab: Mapping[str, int], kinds: Sequence[int]
) -> dict[str, Any]:
  """SentencePiece's pieces: the pair that makes the piece of the highest score is merged first."""
  scores = get('scores')
  if not scores or len(scores) != len(kinds):
    raise ValueError(f'{path}: expected a score for each token, found {len(scores or [])}')
  pieces = {t: i for t, i in vocab.items() if kinds[i] in (_NORMAL, _UNUSED)}
  ranked = sorted(pieces, key=lambda t: (-scores[pieces[t]], pieces[t]))
  merges = [
    (t[:n], t[n:])
    for t in ranked for n in range(1, len(t)) if t[:n] in pieces and t[n:] in pieces
  ]  # fmt: skip
  unknown = next((t for t, i in vocab.items() if kinds[i] == _UNKNOWN), None)
  prefix = get('add_space_prefix', True)
  before = [{'type': 'Prepend', 'prepend': _SPACE}] if prefix else []
  after = [{'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}] if prefix else []
  return {
    'normalizer': {'type': 'Sequence', 'normalizers': [
      *before, {'type': 'Replace', 'pattern': {'String': ' '}, 'content': _SPACE},
    ]},
    'pre_tokenizer': None,
    'decoder': {'type': 'Sequence', 'decoders': [
      {'type': 'Replace', 'pattern': {'String': _SPACE}, 'content': ' '},
      {'type': 'ByteFallback'}, {'type': 'Fuse'}, *after,
    ]},
    'model': _model(
      vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in kinds
    ),
  }  # fmt: skip
