"""Overlap of training documents with evaluation items, by 8-grams of words, exactly.

The rule of Tülu 3 (Lambert et al. 2024, arXiv 2411.15124, section 3.2): a token of an item is
covered by a document if it lies in 8 consecutive tokens of the item that are consecutive in the
document too; an item is overlapped if one document covers more than half of its tokens. An item
under 8 tokens has no 8-gram: it is compared as a whole with whole documents.

Tokens of both sides are what remains of lower-cased text split at spaces, newlines, backslashes and
, . ? ! : ; ( ) " - as in the analyzer of the released code; no other normalisation is made.
"""

import array
import fractions
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

NGRAM = 8
THRESHOLD = 0.5  # share of an item's tokens that one document covers in more than this
COMBINE = ('mean', 'max')  # how the scores of several fields become the item's
_TOKEN = re.compile(r'[^ ,.?!:;()"\-\n\\]+')
_NUMBER = re.compile(r'\d+(?:[.,]\d+)*')
_PAIRS = 1 << 22  # (8-gram of a document, place in an item) looked at once
_ROUNDING = 1e-9  # of a mean of scores, which are compared exactly where they come that near


def tokens(text: str, mask_numbers: bool = False) -> list[str]:
  """Return the tokens of a text; `mask_numbers` makes 0 of every number: 1,200.50 and 7 alike."""
  return _TOKEN.findall((_NUMBER.sub('0', text) if mask_numbers else text).lower())


def excerpt(text: str, start: int, end: int, mask_numbers: bool = False) -> str:
  """Return the part of a text from its token `start` to the one before `end`."""
  text = _NUMBER.sub('0', text) if mask_numbers else text
  places = [match.span() for match in itertools.islice(_TOKEN.finditer(text), end)]
  return text[places[start][0] : places[-1][1]]


class Span(NamedTuple):
  """Consecutive tokens of an item that a document covers."""

  field: int  # number of the item's field
  start: int  # token of the field
  end: int  # the token after the last
  at: int  # token of the document where the first 8 of them stand


class Match(NamedTuple):
  """A document that covers more than half of an item, or equals a short one."""

  document: int
  item: int
  score: float
  short: bool = False  # an item under 8 tokens that the document equals
  spans: tuple[Span, ...] = ()


class Index:
  """The 8-grams of evaluation items, which documents are compared with.

  Its memory grows with the items alone. An 8-gram is found by a hash, which no other 8-gram of the
  items has, and then compared token by token.
  """

  def __init__(
    self, items: Iterable[Sequence[str]], combine: str = 'mean', mask_numbers: bool = False
  ):
    """Index the texts of the fields of every item.

    The score of an item is the mean of its fields' scores, or the highest. Fields under 8 tokens
    count only in items whose fields are all that short, as one text.
    """
    self._tokens = functools.partial(tokens, mask_numbers=mask_numbers)
    self._combine = combine
    self._vocabulary: dict[str, int] = {}  # token -> number from 1; 0 stands for all others
    # The tokens of all fields -> items, with the tokens of each field.
    self._short: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
    flat, fields, counts = array.array('i'), [], []
    for item, texts in enumerate(items):
      encoded = [self._add(text) for text in texts]
      long = [i for i, ids in enumerate(encoded) if len(ids) >= NGRAM]
      for i in long:
        fields.append((len(flat), len(encoded[i]), item, i))
        flat.extend(encoded[i])
        flat.append(0)
      counts.append(len(long))
      if not long and any(encoded):
        lengths = [len(ids) for ids in encoded]
        self._short[tuple(itertools.chain(*encoded))].append((item, lengths))
    self._longest_short = max(map(len, self._short), default=0)
    self._num_fields = np.array(counts, np.int64)  # [items], those of at least 8 tokens
    columns = np.array(fields, np.int64).reshape(-1, 4).T
    self._starts, self._lengths, self._items, self._numbers = columns  # [fields]
    self._flat = np.array(flat, np.int32)
    self._build(self._flat)

  def _add(self, text: str) -> list[int]:
    known = self._vocabulary
    return [known.setdefault(token, len(known) + 1) for token in self._tokens(text)]

  def _build(self, flat: np.ndarray) -> None:
    """Sort the 8-grams of the fields, `flat` [tokens and a 0 after each field], by their hashes."""
    places = np.flatnonzero(_grams(flat).all(axis=1)) if len(flat) >= NGRAM else np.zeros(0, int)
    for seed in itertools.count():
      self._seed = seed
      hashes = _hashes(flat, seed)[places]
      order = np.argsort(hashes, kind='stable')
      first = np.diff(hashes[order], prepend=~hashes[order[:1]]) != 0
      numbers = np.cumsum(first) - 1  # of the distinct 8-grams, in that order
      self._places = places[order]  # in flat, by number
      distinct = self._places[first]
      if all((flat[self._places + i] == flat[distinct[numbers] + i]).all() for i in range(NGRAM)):
        break  # 8-grams that differ have different hashes
    self._hashes = hashes[order][first]  # [distinct 8-grams], ascending
    self._offsets = np.append(np.flatnonzero(first), len(order))
    # Most 8-grams of a document are not here, and are told apart by the first bits of their hashes.
    self._shift = np.uint64(64 - max((8 * len(self._hashes)).bit_length(), 8))
    self._seen = np.zeros(1 << (64 - int(self._shift)), bool)
    self._seen[self._hashes >> self._shift] = True

  def match(self, texts: Sequence[str]) -> list[Match]:
    """Return all matches of documents, at least one, in the order of documents and items."""
    ids, starts = self._encode(texts)
    matches = self._equal(ids, starts)
    place, gram = self._find(ids)
    if len(place):
      document = np.searchsorted(starts, place, 'right') - 1
      # Of every document each 8-gram once, where it stands first.
      key, first = np.unique(document * len(self._hashes) + gram, return_index=True)
      document, gram = key // len(self._hashes), key % len(self._hashes)
      at = place[first] - starts[document]
      for part in _parts(document, np.diff(self._offsets)[gram]):
        matches += self._scored(document[part], gram[part], at[part])
    return sorted(matches)

  def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of all documents, with a 0 after each, and where each begins [texts]."""
    ids, starts, number = array.array('i'), [], self._vocabulary.get
    for text in texts:
      starts.append(len(ids))
      ids.extend(map(number, self._tokens(text), itertools.repeat(0)))
      ids.append(0)
    return np.frombuffer(ids, np.int32), np.array(starts, np.int64)

  def _equal(self, ids: np.ndarray, starts: np.ndarray) -> list[Match]:
    """Return the documents that equal a short item."""
    matches, ends = [], np.append(starts[1:], len(ids)) - 1
    for document in np.flatnonzero(ends - starts <= self._longest_short).tolist():
      key = tuple(ids[starts[document] : ends[document]].tolist())
      for item, lengths in self._short.get(key, ()):
        begins = np.cumsum([0, *lengths]).tolist()
        spans = tuple(
          Span(field, 0, length, begins[field]) for field, length in enumerate(lengths) if length
        )
        matches.append(Match(document, item, 1.0, True, spans))
    return matches

  def _find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where 8-grams of the items begin in `ids`, and their numbers."""
    hashes = _hashes(ids, self._seed)
    place = np.flatnonzero(self._seen[hashes >> self._shift])
    gram = np.searchsorted(self._hashes, hashes[place])
    gram[gram == len(self._hashes)] = 0
    same = self._hashes[gram] == hashes[place]
    place, gram = place[same], gram[same]
    if not len(place):
      return place, gram
    known = _grams(self._flat)[self._places[self._offsets[gram]]]
    same = (_grams(ids)[place] == known).all(axis=1)
    return place[same], gram[same]

  def _scored(self, document: np.ndarray, gram: np.ndarray, at: np.ndarray) -> list[Match]:
    """Return the matches of documents, given their distinct 8-grams and where each stands first."""
    counts = np.diff(self._offsets)[gram]
    row = np.repeat(np.arange(len(gram)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = self._places[self._offsets[gram][row] + within]
    order = np.lexsort((place, document[row]))
    row, place = row[order], place[order]
    owner, field = document[row], np.searchsorted(self._starts, place, 'right') - 1
    same = (np.diff(owner) == 0) & (np.diff(field) == 0)
    # An 8-gram adds what it covers up to the next one of the same field and document.
    adds = np.full(len(place), NGRAM)
    adds[:-1][same] = np.minimum(np.diff(place)[same], NGRAM)
    first = np.flatnonzero(np.append(True, ~same))  # of each document and field
    covered, ends = np.add.reduceat(adds, first), np.append(first[1:], len(place))
    owner, field = owner[first], field[first]
    item, score = self._items[field], covered / self._lengths[field]
    pairs = np.flatnonzero(np.append(True, (np.diff(owner) != 0) | (np.diff(item) != 0)))
    if self._combine == 'max':
      total = np.maximum.reduceat(score, pairs)
    else:
      total = np.add.reduceat(score, pairs) / self._num_fields[item[pairs]]
    matches, after = [], np.append(pairs[1:], len(first))
    for i in np.flatnonzero(total > THRESHOLD - _ROUNDING).tolist():
      groups = range(pairs[i], after[i])
      parts = [(int(covered[g]), int(self._lengths[field[g]])) for g in groups]
      if (exact := self._score(int(item[pairs[i]]), parts)) > THRESHOLD:
        where = [(field[g], place[first[g] : ends[g]], at[row[first[g] : ends[g]]]) for g in groups]
        spans = tuple(span for found in where for span in self._spans(*found))
        matches.append(Match(int(owner[pairs[i]]), int(item[pairs[i]]), float(exact), False, spans))
    return matches

  def _score(self, item: int, parts: Sequence[tuple[int, int]]) -> fractions.Fraction:
    """Return an item's score from the covered tokens, and all tokens, of the fields with any."""
    scores = [fractions.Fraction(*part) for part in parts]
    return max(scores) if self._combine == 'max' else sum(scores) / int(self._num_fields[item])

  def _spans(self, field: int, place: np.ndarray, at: np.ndarray) -> Iterator[Span]:
    """Join the 8-grams of a field that touch each other, at ascending places."""
    begins = np.flatnonzero(np.append(True, np.diff(place) > NGRAM)).tolist()
    offset = int(self._starts[field])
    for begin, end in itertools.pairwise([*begins, len(place)]):
      start, last = int(place[begin]) - offset, int(place[end - 1]) - offset
      yield Span(int(self._numbers[field]), start, last + NGRAM, int(at[begin]))


def _grams(ids: np.ndarray) -> np.ndarray:
  """Return all 8-grams of at least 8 tokens, a view [tokens - 7, 8]."""
  return np.lib.stride_tricks.sliding_window_view(ids, NGRAM)


def _hashes(ids: np.ndarray, seed: int) -> np.ndarray:
  """Return a hash of every 8-gram of some tokens, uint64 [tokens - 7]."""
  count = max(len(ids) - NGRAM + 1, 0)
  factor = np.uint64(int(np.random.default_rng(seed).integers(1 << 62)) * 4 + 1)
  ids, total = ids.astype(np.uint64), np.zeros(count, np.uint64)
  for i in range(NGRAM):
    total = (total + ids[i : i + count]) * factor
  total ^= total >> np.uint64(32)
  return total * factor


def _parts(document: np.ndarray, counts: np.ndarray) -> Iterator[slice]:
  """Cut rows, sorted by document, between documents where their counts add up to _PAIRS."""
  begins = np.flatnonzero(np.append(True, np.diff(document) != 0))
  chunk = np.cumsum(counts)[begins] // _PAIRS
  edges = begins[np.append(True, np.diff(chunk) != 0)].tolist()
  yield from itertools.starmap(slice, itertools.pairwise([*edges, len(document)]))
