"""Make a tokenizer smaller: the most frequent tokens, and all that any text needs.

What stays keeps its order. A text that was made of tokens that stay is cut into the same ones: of
byte-pair encoding every token stays with those that it is merged from, and a Unigram's best path
is still there. Other texts are cut into more, down to bytes.
"""

import itertools
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from slm.data import tokenizer

# Ids that must stay, those that an id needs (itself included), and the file of those kept.
Parts = tuple[set[int], dict[int, Callable[[], set[int]]], Callable[[list[int]], bytes]]


def reduce(folder: Path, counts: np.ndarray, size: int) -> tuple[str, bytes, np.ndarray]:
  """Return the name and content of a tokenizer of `size` ids, and which it keeps, ascending.

  Special tokens, bytes and (where rare text does not fall back to bytes) single characters stay.
  Others follow in the order of counts [v], each with what it is merged from, while there is room.

  Raises:
    ValueError: if the tokenizer cannot be reduced, or not to that size.
  """
  tokenizer.load(folder)  # refuses a damaged one
  name = next(name for name in tokenizer.FILES if (folder / name).exists())
  if name not in _READERS:
    raise ValueError(f'{folder / name}: a tokenizer of bytes has nothing to drop')
  kept, needs, write = _READERS[name](folder / name)
  if not len(kept) <= size <= len(needs):
    raise ValueError(
      f'sizes: vocab={size}: expected {len(kept)} (what any text needs) to {len(needs)}'
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
      raise ValueError(f'sizes: vocab={size}: {folder / name} fits {before}, no more')
  found = sorted(kept)
  return name, write(found), np.array(found)


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


def _sentencepiece(path: Path) -> Parts:
  model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  pieces, spec = list(model.pieces), model.trainer_spec
  kinds = type(pieces[0])
  ids = {p.piece: i for i, p in enumerate(pieces) if p.type in (kinds.NORMAL, kinds.BYTE)}
  always = {i for i, p in enumerate(pieces) if p.type not in (kinds.NORMAL, kinds.UNUSED)}
  score = {p.piece: -p.score for p in pieces if p.type == kinds.NORMAL}
  rank = lambda a, b: score.get(a + b)
  bpe = spec.model_type == spec.BPE
  needs = _needs(ids, rank if bpe else None) | {i: lambda i=i: {i} for i in always}

  def write(kept: list[int]) -> bytes:
    del model.pieces[:]
    model.pieces.extend(pieces[i] for i in kept)
    spec.vocab_size = len(kept)
    for field in ('unk_id', 'bos_id', 'eos_id', 'pad_id'):
      if (old := getattr(spec, field)) in kept:
        setattr(spec, field, kept.index(old))
    return model.SerializeToString(deterministic=True)

  return always | _base(ids, spec.byte_fallback), needs, write


def _huggingface(path: Path) -> Parts:
  file = json.loads(path.read_text())
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
    raise ValueError(f'{path}: expected BPE without affixes or Unigram, found {kind}')
  special = {token['id']: token['content'] for token in added}
  always = set(special) | _base(ids, model.get('byte_fallback', False))
  always |= {ids[unknown]} if unknown in ids else set()
  needs = _needs(ids, rank) | {i: lambda i=i: {i} for i in special}

  def write(kept: list[int]) -> bytes:
    new = {old: i for i, old in enumerate(kept)}
    if kind == 'BPE':
      vocab = {t: new[i] for t, i in ids.items() if i in new}
      merged = [[a, b] for a, b in merges if {a, b, a + b} <= vocab.keys()]
      file['model'] |= {'vocab': vocab, 'merges': merged}
    else:
      vocab = [entry for i, entry in enumerate(model['vocab']) if i in new]
      file['model'] |= {'vocab': vocab, 'unk_id': new.get(model['unk_id'])}
    file['added_tokens'] = [token | {'id': new[token['id']]} for token in added]
    file['post_processor'] = _renumbered(file.get('post_processor'), new)
    if file.get('padding'):
      file['padding']['pad_id'] = new.get(file['padding']['pad_id'], 0)
    text = json.dumps(file, ensure_ascii=False)
    want = {t: new[i] for t, i in [*ids.items(), *((t, i) for i, t in special.items())] if i in new}
    if tokenizers.Tokenizer.from_str(text).get_vocab() != want:
      raise ValueError(f'{path}: its added tokens lie between others: it cannot be renumbered')
    return text.encode()

  return always, needs, write


def _renumbered(node: Any, new: dict[int, int], inside: Collection[str] = ()) -> Any:
  """Renumber the ids of a post-processor: those in 'ids', and in pairs of a token and its id."""
  if isinstance(node, dict):
    return {key: _renumbered(value, new, key) for key, value in node.items()}
  if isinstance(node, list) and inside == 'ids':
    return [new[i] for i in node]
  if isinstance(node, list) and inside in ('sep', 'cls'):
    return [node[0], new[node[1]]]
  return [_renumbered(x, new) for x in node] if isinstance(node, list) else node


_READERS = {'tokenizer.model': _sentencepiece, 'tokenizer.json': _huggingface}
