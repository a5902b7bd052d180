"""Change a tokenizer: drop tokens, or change what every text begins with.

A reduced tokenizer keeps the tokens that any text needs and the most frequent others, in their
order. A text whose tokens were all kept is encoded as before: byte-pair encoding keeps a token with
everything that it is merged from, and the best path of a Unigram model is still there. Other texts
become more tokens, down to bytes.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from slm.base import files
from slm.data import sidecars, tokenizer

# Files beside a tokenizer that name ids, and the keys that hold ids.
_NAMING = (*sidecars.MODEL, sidecars.SETTINGS, sidecars.ADDED)
_IDS = re.compile(r'_token_ids?$|^(begin_)?suppress_tokens$|_words_ids$|^(ids|pad_id|sep|cls)$')
_MARK = re.compile(r'<[^<>\s]+>|\[[^\[\]\s]+\]')  # special tokens as chat templates write them
WHOLE = ('vocab.json', 'merges.txt')  # the whole vocabulary in other files


class _Vocabulary(NamedTuple):
  """The tokens of a tokenizer, and a function that writes its file with fewer."""

  ids: dict[str, int]  # every token
  required: set[int]  # ids that any text may need
  optional: dict[int, str]  # the other ids that a text may have, and their tokens
  rank: Callable[[str, str], float | None] | None  # of a merge, the lowest first; None: no merges
  write: Callable[[dict[int, int]], bytes]  # from old ids -> new ids

  def needs(self, i: int) -> set[int]:
    """Return an id with the ids of the tokens that it is merged from."""
    merged = _merged(self.optional[i], self.rank) if self.rank and i in self.optional else ()
    return {i, *(self.ids[token] for token in merged if token in self.ids)}


def reduce(
  content: Mapping[str, bytes], counts: np.ndarray, size: int
) -> tuple[dict[str, bytes], np.ndarray]:
  """Reduce a tokenizer to `size` ids; return its files and the ids that it keeps, ascending.

  `content` holds the files of the tokenizer. Kept are special tokens, bytes, single characters
  (where rare text does not fall back to bytes), and every id or token that a file beside the
  tokenizer names: begin, end and padding, added tokens, tokens of chat templates, ids that only
  the model has. Other tokens are added in the order of counts [v], with all that they are merged
  from, while they fit.

  Raises:
    ValueError: if the tokenizer cannot be reduced, or not to that size.
  """
  name = next((name for name in _READERS if name in content), '')
  if not name:
    raise ValueError(
      f'sizes: vocab={size}: expected {" or ".join(_READERS)}; bytes have nothing to drop'
    )
  with files.reading(name):
    vocabulary = _READERS[name](content[name])
  named = _named(content, vocabulary.ids)
  if unknown := [i for i in named if i >= len(counts)]:
    raise ValueError(
      f'{name}: the settings beside it name the id {unknown[0]}, the model has {len(counts)} rows'
    )
  kept = vocabulary.required.union(*map(vocabulary.needs, named))
  most = len(kept | vocabulary.optional.keys())
  if not len(kept) <= size <= most:
    raise ValueError(f'sizes: vocab={size}: expected {len(kept)} (what any text needs) to {most}')
  order = [i for i in np.argsort(-counts, kind='stable').tolist() if i in vocabulary.optional]
  while len(kept) < size:  # a token that did not fit may fit once its parts are kept
    before = len(kept)
    for i in order:
      more = set() if i in kept else vocabulary.needs(i) - kept
      if len(kept) + len(more) <= size:
        kept |= more
      if len(kept) == size:
        break
    if len(kept) == before:
      raise ValueError(f'sizes: vocab={size}: no further token fits after {before}')
  new_ids = {old: new for new, old in enumerate(sorted(kept))}
  smaller = {name: vocabulary.write(new_ids)}
  for other in content.keys() - {*tokenizer.KINDS, *WHOLE}:
    smaller[other] = content[other]
    if other in _NAMING:
      settings = _renumber(json.loads(content[other]), new_ids.__getitem__, other == sidecars.ADDED)
      settings |= {'vocab_size': size} if other == 'config.json' else {}
      smaller[other] = json.dumps(settings, ensure_ascii=False, indent=2).encode()
  return smaller, np.array(sorted(kept))


def ids_in(name: str, content: bytes) -> set[int]:
  """Return the ids that a file beside a tokenizer names."""
  ids: set[int] = set()
  if name in _NAMING:
    _renumber(json.loads(content), lambda i: ids.add(i) or i, name == sidecars.ADDED)
  return ids


def _named(content: Mapping[str, bytes], ids: Mapping[str, int]) -> set[int]:
  """Return the ids that files beside a tokenizer name, as numbers or as tokens."""
  named: set[int] = set()
  tokens: list[str] = []
  templates: list[str] = []
  for name, text in content.items():
    with files.reading(name):
      named |= ids_in(name, text)
      if name.endswith('.jinja'):
        templates.append(text.decode())
      if name in (sidecars.SETTINGS, sidecars.MAP):
        for key, value in json.loads(text).items():
          if key.endswith(('_token', '_tokens')):
            tokens += _strings(value)
          if key == 'chat_template':
            templates += _strings(value)
  tokens += itertools.chain.from_iterable(map(_MARK.findall, templates))
  return named | {ids[token] for token in tokens if token in ids}


def _strings(node: Any) -> Iterator[str]:
  """Yield every string of a JSON document."""
  if isinstance(node, str):
    yield node
  for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
    yield from _strings(child)


def _merged(text: str, rank: Callable[[str, str], float | None]) -> set[str]:
  """Return every symbol of a text's byte-pair encoding, from characters to final tokens."""
  symbols = list(text)
  made = set(symbols)
  while True:
    ranks = ((rank(a, b), i) for i, (a, b) in enumerate(itertools.pairwise(symbols)))
    _, i = min(((r, i) for r, i in ranks if r is not None), default=(None, None))
    if i is None:
      return made
    symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    made.add(symbols[i])


def _alphabet(ids: Mapping[str, int], byte_fallback: bool) -> set[int]:
  """Return the ids from which any text can be encoded: bytes, or single characters."""
  byte = {f'<0x{b:02X}>' for b in range(256)}
  return {i for t, i in ids.items() if t in byte or (len(t) == 1 and not byte_fallback)}


def _sentencepiece(content: bytes) -> _Vocabulary:
  from google.protobuf import runtime_version

  try:
    from sentencepiece import sentencepiece_model_pb2
  except runtime_version.VersionError as e:  # Apache Beam requires a protobuf before 7
    raise ValueError(f'cutting a SentencePiece vocabulary needs another protobuf: {e}') from None
  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  pieces, spec = list(model.pieces), model.trainer_spec
  kind = type(pieces[0])
  ids = {p.piece: i for i, p in enumerate(pieces)}
  text = {p.piece: i for i, p in enumerate(pieces) if p.type in (kind.NORMAL, kind.BYTE)}
  required = {i for i, p in enumerate(pieces) if p.type not in (kind.NORMAL, kind.UNUSED)}
  required |= _alphabet(text, spec.byte_fallback)
  scores = {p.piece: -p.score for p in pieces if p.type == kind.NORMAL}
  rank = (lambda a, b: scores.get(a + b)) if spec.model_type == spec.BPE else None

  def write(new_ids: dict[int, int]) -> bytes:
    del model.pieces[:]
    model.pieces.extend(pieces[i] for i in new_ids if i < len(pieces))
    spec.vocab_size = len(model.pieces)
    for field in ('unk_id', 'bos_id', 'eos_id', 'pad_id'):
      if (old := getattr(spec, field)) in new_ids:
        setattr(spec, field, new_ids[old])
    return model.SerializeToString(deterministic=True)

  optional = {i: token for token, i in text.items() if i not in required}
  return _Vocabulary(ids, required, optional, rank, write)


def _huggingface(content: bytes) -> _Vocabulary:
  file = json.loads(content)
  model, added = file['model'], file.get('added_tokens', [])
  rank, kind = None, model.get('type')
  affixes = model.get('continuing_subword_prefix') or model.get('end_of_word_suffix')
  if kind == 'BPE' and not affixes:
    text, unknown = dict(model['vocab']), model.get('unk_token')
    merges = [tuple(m.split(' ') if isinstance(m, str) else m) for m in model['merges']]
    ranks = {pair: i for i, pair in enumerate(merges)}
    rank = lambda a, b: ranks.get((a, b))
  elif kind == 'Unigram':
    text = {piece: i for i, (piece, _) in enumerate(model['vocab'])}
    unknown = None if model['unk_id'] is None else model['vocab'][model['unk_id']][0]
  else:
    raise ValueError(f'tokenizer.json: expected BPE without affixes or Unigram, found {kind}')
  special = {token['content']: token['id'] for token in added}
  required = {*special.values(), *_alphabet(text, model.get('byte_fallback', False))}
  required |= {text[unknown]} if unknown in text else set()
  state = {key: file.get(key) for key in ('post_processor', 'padding')}
  _renumber(state, lambda i: required.add(i) or i)
  ids = text | special

  def write(new_ids: dict[int, int]) -> bytes:
    if kind == 'BPE':
      vocab = {t: new_ids[i] for t, i in text.items() if i in new_ids}
      kept = [[a, b] for a, b in merges if {a, b, a + b} <= vocab.keys()]
      file['model'] |= {'vocab': vocab, 'merges': kept}
    else:
      vocab = [entry for i, entry in enumerate(model['vocab']) if i in new_ids]
      file['model'] |= {'vocab': vocab, 'unk_id': new_ids.get(model['unk_id'])}
    file['added_tokens'] = [token | {'id': new_ids[token['id']]} for token in added]
    file.update(_renumber(state, new_ids.__getitem__))
    reduced = json.dumps(file, ensure_ascii=False)
    expected = {t: new_ids[i] for t, i in ids.items() if i in new_ids}
    if tokenizers.Tokenizer.from_str(reduced).get_vocab() != expected:
      raise ValueError(
        'tokenizer.json: cannot be renumbered: ids of added tokens lie between those of others'
      )
    return reduced.encode()

  optional = {i: token for token, i in text.items() if i not in required}
  return _Vocabulary(ids, required, optional, rank, write)


def begin_with(text: str, begin: Sequence[int]) -> str:
  """Return a tokenizer.json that puts the ids `begin` before every text.

  What it puts after a text stays.
  """
  model = tokenizer.parse(text)
  before, after = tokenizer.affixes(model)
  if before == list(begin):
    return text
  tokens = {i: model.id_to_token(i) for i in (*begin, *after)}

  def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
    special = lambda i: {'SpecialToken': {'id': tokens[i], 'type_id': type_id}}
    content = {'Sequence': {'id': name, 'type_id': type_id}}
    return [*map(special, begin), content, *map(special, after)]

  template = {
    'type': 'TemplateProcessing',
    'single': sequence('A', 0),
    'pair': [*sequence('A', 0), *sequence('B', 1)],
    'special_tokens': {t: {'id': t, 'ids': [i], 'tokens': [t]} for i, t in tokens.items()},
  }
  file = json.loads(text)
  old = file.get('post_processor') or {}
  # ByteLevel's processor trims offsets and adds no token.
  kept = [p for p in old.get('processors', [old]) if p.get('type') == 'ByteLevel']
  file['post_processor'] = {'type': 'Sequence', 'processors': [*kept, template]}
  return json.dumps(file, ensure_ascii=False, indent=2)


def _renumber(node: Any, new_id: Callable[[int], int], ids: bool = False) -> Any:
  """Return a JSON document with new_id(id) for every id under a key that holds ids.

  With `ids`, the numbers of the node itself are ids. Negative numbers mean no token.
  """
  if isinstance(node, dict):
    return {
      key: {str(new_id(int(i))): token for i, token in value.items()}
      if key == 'added_tokens_decoder'
      else _renumber(value, new_id, ids or bool(_IDS.search(key)))
      for key, value in node.items()
    }
  if isinstance(node, list):
    return [_renumber(x, new_id, ids) for x in node]
  is_id = ids and isinstance(node, int) and not isinstance(node, bool) and node >= 0
  return new_id(node) if is_id else node


_READERS = {'tokenizer.json': _huggingface, 'tokenizer.model': _sentencepiece}
