"""Change a tokenizer: fewer tokens, or another beginning of texts.

A smaller one has the most frequent tokens, and all that any text needs. What stays keeps its order.
A text that was made of tokens that stay is cut into the same ones: of byte-pair encoding every
token stays with those that it is merged from, and a Unigram's best path is still there. Other texts
are cut into more, down to bytes.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from slm.base import files
from slm.data import tokenizer

# Every token's id, those that must stay, those that an id needs (itself included), and the file of
# the ids kept, old -> new.
Parts = tuple[
  dict[str, int], set[int], dict[int, Callable[[], set[int]]], Callable[[dict[int, int]], bytes]
]
# Files beside a tokenizer that name ids, and the keys that hold them.
SETTINGS = ('config.json', 'generation_config.json', tokenizer.SETTINGS, 'added_tokens.json')
_IDS = re.compile(r'_token_ids?$|^(begin_)?suppress_tokens$|_words_ids$|^(ids|pad_id|sep|cls)$')
_MARK = re.compile(r'<[^<>\s]+>|\[[^\[\]\s]+\]')  # how chat templates write special tokens
_OF_THE_WHOLE = (*tokenizer.FILES, 'vocab.json', 'merges.txt')


def reduce(
  content: Mapping[str, bytes], counts: np.ndarray, size: int
) -> tuple[dict[str, bytes], np.ndarray]:
  """Return the files of a tokenizer of `size` ids, and which it keeps, ascending.

  `content` holds the files of the whole one. Special tokens, bytes and (where rare text does not
  fall back to bytes) single characters stay, and every id or token that a file beside the tokenizer
  names: begin, end and padding, added tokens, those of chat templates; also ids that only the model
  has. Others follow in the order of counts [v], each with what it is merged from, while there is
  room.

  Raises:
    ValueError: if the tokenizer cannot be reduced, or not to that size.
  """
  name = next((name for name in tokenizer.FILES if name in content), '')
  if name not in _READERS:
    raise ValueError(f'sizes: vocab={size}: a tokenizer of bytes, or none, has nothing to drop')
  with files.reading(name):
    ids, kept, needs, write = _READERS[name](name, content[name])
  named = _named(content, ids)
  if beyond := [i for i in named if i >= len(counts)]:
    raise ValueError(f'{name}: the settings beside it name the id {beyond[0]}, which no row has')
  kept = kept.union(named, *(needs[i]() for i in named if i in needs))
  if not len(kept) <= size <= len(needs.keys() | kept):
    raise ValueError(
      f'sizes: vocab={size}: expected {len(kept)} (what any text needs) to '
      f'{len(needs.keys() | kept)}'
    )
  order = [i for i in np.argsort(-counts, kind='stable').tolist() if i in needs]
  while len(kept) < size:  # a token that did not fit may once its parts are there
    before = len(kept)
    for i in order:
      more = set() if i in kept else needs[i]() - kept
      if len(kept) + len(more) <= size:
        kept = kept | more if more else kept
      if len(kept) == size:
        break
    if len(kept) == before:
      raise ValueError(f'sizes: vocab={size}: {name} fits {before}, no more')
  new = {old: i for i, old in enumerate(sorted(kept))}
  smaller = {name: write(new)}
  for other in content.keys() - _OF_THE_WHOLE:
    smaller[other] = content[other]
    if other in SETTINGS:
      changed = _renumbered(json.loads(content[other]), new.__getitem__, other == SETTINGS[-1])
      changed |= {'vocab_size': size} if other == 'config.json' else {}
      smaller[other] = json.dumps(changed, ensure_ascii=False, indent=2).encode()
  return smaller, np.array(sorted(kept))


def ids_in(name: str, content: bytes) -> set[int]:
  """Return the ids that a file of `SETTINGS` names; other files name none."""
  found: set[int] = set()
  if name in SETTINGS:
    _renumbered(json.loads(content), lambda i: found.add(i) or i, name == SETTINGS[-1])
  return found


def _named(content: Mapping[str, bytes], ids: Mapping[str, int]) -> set[int]:
  """Return the ids that files beside a tokenizer name, as numbers or as tokens."""
  found: set[int] = set()
  tokens: list[str] = []
  templates: list[str] = []
  for name, text in content.items():
    with files.reading(name):
      found |= ids_in(name, text)
      if name.endswith('.jinja'):
        templates.append(text.decode())
      if name in (tokenizer.SETTINGS, 'special_tokens_map.json'):
        for key, value in json.loads(text).items():
          if key.endswith(('_token', '_tokens')):
            tokens += _strings(value)
          if key == 'chat_template':
            templates += _strings(value)
  tokens += [mark for template in templates for mark in _MARK.findall(template)]
  return found | {ids[token] for token in tokens if token in ids}


def _strings(node: Any) -> Iterator[str]:
  """Yield every string of a JSON document."""
  if isinstance(node, str):
    yield node
  for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
    yield from _strings(child)


def _merged(text: str, rank: Callable[[str, str], float | None]) -> set[str]:
  """Return every string on the way from characters to tokens; the lowest rank merges first."""
  symbols = list(text)
  made = set(symbols)
  while True:
    ranks = ((rank(a, b), i) for i, (a, b) in enumerate(itertools.pairwise(symbols)))
    found = min(((r, i) for r, i in ranks if r is not None), default=None)
    if found is None:
      return made
    i = found[1]
    symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    made.add(symbols[i])


def _needs(
  ids: dict[str, int], rank: Callable[[str, str], float | None] | None
) -> dict[int, Callable[[], set[int]]]:
  """Map each id to a function that says what it needs: nothing else without merges."""
  parts = lambda text: _merged(text, rank) if rank else set()
  return {i: lambda t=t, i=i: {i} | {ids[p] for p in parts(t) if p in ids} for t, i in ids.items()}


def _base(ids: dict[str, int], byte_fallback: bool) -> set[int]:
  """Return the ids that cut up any text: bytes, or single characters."""
  byte = {f'<0x{b:02X}>' for b in range(256)}
  return {i for t, i in ids.items() if t in byte or (len(t) == 1 and not byte_fallback)}


def _sentencepiece(name: str, content: bytes) -> Parts:
  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  pieces, spec = list(model.pieces), model.trainer_spec
  kinds = type(pieces[0])
  ids = {p.piece: i for i, p in enumerate(pieces) if p.type in (kinds.NORMAL, kinds.BYTE)}
  always = {i for i, p in enumerate(pieces) if p.type not in (kinds.NORMAL, kinds.UNUSED)}
  score = {p.piece: -p.score for p in pieces if p.type == kinds.NORMAL}
  rank = lambda a, b: score.get(a + b)
  bpe = spec.model_type == spec.BPE
  needs = _needs(ids, rank if bpe else None) | {i: lambda i=i: {i} for i in always}

  def write(new: dict[int, int]) -> bytes:
    del model.pieces[:]
    model.pieces.extend(pieces[i] for i in new if i < len(pieces))
    spec.vocab_size = len(model.pieces)
    for field in ('unk_id', 'bos_id', 'eos_id', 'pad_id'):
      if (old := getattr(spec, field)) in new:
        setattr(spec, field, new[old])
    return model.SerializeToString(deterministic=True)

  every = {p.piece: i for i, p in enumerate(pieces)}
  return every, always | _base(ids, spec.byte_fallback), needs, write


def _huggingface(name: str, content: bytes) -> Parts:
  file = json.loads(content)
  model, added = file['model'], file.get('added_tokens', [])
  rank, kind = None, model.get('type')
  if kind == 'BPE' and not (
    model.get('continuing_subword_prefix') or model.get('end_of_word_suffix')
  ):
    ids, unknown = dict(model['vocab']), model.get('unk_token')
    merges = [tuple(m.split(' ') if isinstance(m, str) else m) for m in model['merges']]
    ranks = {pair: i for i, pair in enumerate(merges)}
    rank = lambda a, b: ranks.get((a, b))
  elif kind == 'Unigram':
    ids = {piece: i for i, (piece, _) in enumerate(model['vocab'])}
    unknown = None if model['unk_id'] is None else model['vocab'][model['unk_id']][0]
  else:
    raise ValueError(f'{name}: expected BPE without affixes or Unigram, found {kind}')
  special = {token['id']: token['content'] for token in added}
  always = set(special) | _base(ids, model.get('byte_fallback', False))
  always |= {ids[unknown]} if unknown in ids else set()
  state = {key: file.get(key) for key in ('post_processor', 'padding')}
  _renumbered(state, lambda i: always.add(i) or i)
  needs = _needs(ids, rank) | {i: lambda i=i: {i} for i in special}
  every = ids | {token: i for i, token in special.items()}

  def write(new: dict[int, int]) -> bytes:
    if kind == 'BPE':
      vocab = {t: new[i] for t, i in ids.items() if i in new}
      merged = [[a, b] for a, b in merges if {a, b, a + b} <= vocab.keys()]
      file['model'] |= {'vocab': vocab, 'merges': merged}
    else:
      vocab = [entry for i, entry in enumerate(model['vocab']) if i in new]
      file['model'] |= {'vocab': vocab, 'unk_id': new.get(model['unk_id'])}
    file['added_tokens'] = [token | {'id': new[token['id']]} for token in added]
    file.update(_renumbered(state, new.__getitem__))
    text = json.dumps(file, ensure_ascii=False)
    want = {t: new[i] for t, i in every.items() if i in new}
    if tokenizers.Tokenizer.from_str(text).get_vocab() != want:
      raise ValueError(f'{name}: its added tokens lie between others: it cannot be renumbered')
    return text.encode()

  return every, always, needs, write


def begin_with(text: str, begin: Sequence[int]) -> str:
  """Return a tokenizer.json that puts the ids `begin` before texts, and after them what it did."""
  model = tokenizers.Tokenizer.from_str(text)
  model.no_truncation()
  model.no_padding()
  whole = model.encode('a')
  added = list(zip(whole.ids, whole.special_tokens_mask, strict=True))
  before, after = (
    [i for i, _ in itertools.takewhile(lambda x: x[1], ids)] for ids in (added, added[::-1])
  )
  if before == list(begin):
    return text
  after = [] if len(after) == len(added) else after[::-1]
  pieces = {i: model.id_to_token(i) for i in (*begin, *after)}
  special = lambda ids, kind: [{'SpecialToken': {'id': pieces[i], 'type_id': kind}} for i in ids]
  one = lambda name, kind: [
    *special(begin, kind), {'Sequence': {'id': name, 'type_id': kind}}, *special(after, kind)
  ]  # fmt: skip
  template = {
    'type': 'TemplateProcessing', 'single': one('A', 0), 'pair': [*one('A', 0), *one('B', 1)],
    'special_tokens': {t: {'id': t, 'ids': [i], 'tokens': [t]} for i, t in pieces.items()},
  }  # fmt: skip
  file = json.loads(text)
  old = file.get('post_processor') or {}
  # ByteLevel's trims offsets and adds nothing.
  kept = [p for p in old.get('processors', [old]) if p.get('type') == 'ByteLevel']
  file['post_processor'] = {'type': 'Sequence', 'processors': [*kept, template]}
  return json.dumps(file, ensure_ascii=False, indent=2)


def _renumbered(node: Any, new: Callable[[int], int], ids: bool = False) -> Any:
  """Return a JSON document with new(id) for every id that a key of it names.

  `ids` says that the numbers of the node itself are ids. Negative ones stand for none.
  """
  if isinstance(node, dict):
    return {
      key: {str(new(int(i))): token for i, token in value.items()}
      if key == 'added_tokens_decoder'
      else _renumbered(value, new, ids or bool(_IDS.search(key)))
      for key, value in node.items()
    }
  if isinstance(node, list):
    return [_renumbered(x, new, ids) for x in node]
  is_id = ids and isinstance(node, int) and not isinstance(node, bool) and node >= 0
  return new(node) if is_id else node


_READERS = {'tokenizer.model': _sentencepiece, 'tokenizer.json': _huggingface}
