"""The 8-gram rule: its boundaries, and that it agrees with the definition on random texts."""

import fractions

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from slm.data import overlap

WORDS = [f'w{i}' for i in range(200)]
ITEM = ' '.join(WORDS[:40])


def scores(items, *documents, **named):
  """Return {(document, item): score} of what is matched."""
  found = overlap.Index([[x] if isinstance(x, str) else x for x in items], **named).match(documents)
  return {(match.document, match.item): match.score for match in found}


def test_tokens_are_lower_case_and_split_at_the_characters_of_the_rule():
  text = 'Say: "A-b", (c); d!\nE\\f? g.h  i\'s x_y z/2 É\tj'
  assert overlap.tokens(text) == [
    'say', *'abcdefgh', "i's", 'x_y', 'z/2', 'é\tj',
  ]  # fmt: skip
  assert overlap.tokens('') == overlap.tokens(' ?!\n') == []
  assert overlap.tokens('$1,200.50 for 3 of x9', mask_numbers=True) == [
    '$0',
    'for',
    '0',
    'of',
    'x0',
  ]


def test_a_copy_scores_one_whatever_stands_around_and_between_the_words():
  copy = f'before. {ITEM.upper().replace(" ", ", ")}! after'
  assert scores([ITEM], 'nothing here', copy) == {(1, 0): 1.0}


def test_every_seventh_word_replaced_scores_zero():
  words = ['other' if i % 7 == 3 else word for i, word in enumerate(WORDS[:40])]
  assert scores([ITEM], ' '.join(words)) == {}
  # With one word fewer replaced a run of 13 remains, which covers 13 of 20.
  assert scores([' '.join(WORDS[:20])], ' '.join([*WORDS[:3], 'other', *WORDS[4:17]])) == {
    (0, 0): 13 / 20
  }


def test_one_document_must_supply_the_coverage():
  first, second = ' '.join(WORDS[:20]), ' '.join(WORDS[20:40])
  assert scores([ITEM], first, second) == {}
  assert scores([ITEM], f'{first} apart {second}') == {(0, 0): 1.0}


def test_more_than_half_is_strict():
  assert scores([ITEM], ' '.join(WORDS[:20])) == {}
  assert scores([ITEM], ' '.join(WORDS[:21])) == {(0, 0): 21 / 40}
  assert scores([' '.join(WORDS[:8])], ' '.join(WORDS[:8])) == {(0, 0): 1.0}


def test_a_repeated_gram_covers_every_place_where_it_stands_in_the_item():
  run = ' '.join(WORDS[:8])
  assert scores([f'{run} x {run} y'], run) == {(0, 0): 16 / 18}


def test_short_items_equal_a_whole_document():
  short = 'What is GRAVITY?'
  index = overlap.Index([[short], ['What is'], ['?'], ['one two', 'three']])
  found = index.match(['what, is: gravity', 'So what is gravity', '!', '', 'one two three'])
  assert [(m.document, m.item, m.short) for m in found] == [(0, 0, True), (4, 3, True)]
  assert found[1].spans == (overlap.Span(0, 0, 2, 0), overlap.Span(1, 0, 1, 2))
  seven, eight = ' '.join(WORDS[:7]), ' '.join(WORDS[:8])
  assert scores([seven, eight], f'{seven} x', f'{eight} x') == {(1, 1): 1.0}


def test_unicode():
  text = 'Die Straße «grün», naïve café 東京 は 大きい Ünïcode ΑΒΓ 😀 — done'
  assert scores([text], text.upper().replace('SS', 'ß')) == {(0, 0): 1.0}
  index = overlap.Index([['İstanbul ' + text]])
  (match,) = index.match(['vor ' + 'İstanbul ' + text])
  ((_, start, end, at),) = match.spans
  assert (at, overlap.excerpt('İstanbul ' + text, start, end)) == (1, 'İstanbul ' + text)


def test_fields_are_averaged_or_the_highest_counts():
  passage, question = ' '.join(WORDS[:30]), ' '.join(WORDS[50:60])
  item = [passage, question]
  assert scores([item], passage) == {}  # (1 + 0) / 2 is not more than half
  assert scores([item], passage, combine='max') == {(0, 0): 1.0}
  assert scores([item], f'{passage} and {" ".join(WORDS[50:58])}') == {(0, 0): 0.9}
  # A field that is too short to be found does not halve the score of the other.
  assert scores([[passage, 'a short one']], passage) == {(0, 0): 1.0}


def test_a_mean_at_the_threshold_is_exact():
  """8/10, 8/20 and 9/30 are 1/2 on average, and in binary fractions a little more."""
  assert (8 / 10 + 8 / 20 + 9 / 30) / 3 > 0.5
  words = {'a': (10, 8), 'b': (20, 8), 'c': (30, 9)}
  item = [' '.join(f'{name}{i}' for i in range(length)) for name, (length, _) in words.items()]
  runs = [f'{name}{i}' for name, (_, run) in words.items() for i in range(run)]
  assert scores([item], ' '.join(runs)) == {}
  assert scores([item], ' '.join([*runs, 'c9'])) == {(0, 0): pytest.approx(0.5 + 1 / 90)}


def test_spans_say_where_the_words_stand():
  item = ' '.join(WORDS[:30])
  document = ' '.join(['x', *WORDS[:10], 'y', 'z', *WORDS[12:24], *WORDS[:10]])
  (match,) = overlap.Index([[item]]).match(['', document])
  assert match.spans == (overlap.Span(0, 0, 10, 1), overlap.Span(0, 12, 24, 13))
  assert match.score == 22 / 30
  assert overlap.excerpt('One, (two) three: FOUR!', 1, 4) == 'two) three: FOUR'


def test_numbers_masked():
  item = 'Tom has 3 apples and buys 12 more for $1,000 so how many has he'
  other = 'Tom has 75 apples and buys 4.5 more for $20 so how many has he'
  assert scores([item], other) == {}
  assert scores([item], other, mask_numbers=True) == {(0, 0): 1.0}


def naive(items, documents, combine):
  """Return the scores over the threshold, by the definition and in fractions."""
  found = {}
  for d, document in enumerate(documents):
    there = overlap.tokens(document)
    grams = {tuple(there[i : i + 8]) for i in range(len(there) - 7)}
    for e, fields in enumerate(items):
      shares = []
      for text in fields:
        field = overlap.tokens(text)
        covered = {
          t
          for i in range(len(field) - 7)
          if tuple(field[i : i + 8]) in grams
          for t in range(i, i + 8)
        }
        shares += [fractions.Fraction(len(covered), len(field))] if len(field) >= 8 else []
      whole = [token for text in fields for token in overlap.tokens(text)]
      if not shares:
        score = fractions.Fraction(int(bool(whole) and whole == there))
      else:
        score = max(shares) if combine == 'max' else sum(shares) / len(shares)
      if score > fractions.Fraction(1, 2):
        found[d, e] = float(score)
  return found


def texts(longest):
  return st.lists(st.sampled_from('abc'), max_size=longest).map(' '.join)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(
  items=st.lists(st.lists(texts(24), min_size=1, max_size=2), max_size=4),
  documents=st.lists(texts(60), min_size=1, max_size=4),
  combine=st.sampled_from(overlap.COMBINE),
  pairs=st.sampled_from([1, 7, 1 << 22]),
)
def test_random_texts_score_as_by_the_definition(items, documents, combine, pairs):
  copies = [' '.join(fields) for fields in items]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(overlap, '_PAIRS', pairs)
    found = scores(items, *documents, *copies, combine=combine)
  assert found == naive(items, [*documents, *copies], combine)


def test_equal_hashes_are_told_apart(monkeypatch):
  """With seed 0 the hash does not see the order of the words."""
  whole = overlap._hashes

  def sums(ids, seed):
    windows = np.lib.stride_tricks.sliding_window_view(ids, 8)
    return whole(ids, seed) if seed else windows.sum(axis=1, dtype=np.uint64) << np.uint64(48)

  monkeypatch.setattr(overlap, '_hashes', sums)
  words, turned = ' '.join(WORDS[:9]), ' '.join(WORDS[:9][::-1])
  assert scores([words], turned, words) == {(1, 0): 1.0}
  assert scores([words, turned], turned, words) == {(0, 1): 1.0, (1, 0): 1.0}


def test_clean_text_is_silent():
  rng = np.random.default_rng(0)
  make = lambda n: ' '.join(rng.choice(WORDS, n))
  items = [make(30) for _ in range(200)]
  assert scores(items, *(make(400) for _ in range(100))) == {}
