"""Near-duplicates: the estimate against exact sets, dropped and kept documents, restarts."""

import random

import numpy as np
import pytest
import toy

from slm.data import near, prepare

WORDS = [f'word{i}' for i in range(400)]


def text(seed: int, changed: int = 0, words: int = 200) -> str:
  """Make a text of random words, the last `changed` of them drawn by another seed."""
  rng, other = random.Random(seed), random.Random(10_000 + seed)
  chosen = [rng.choice(WORDS) for _ in range(words)]
  return ' '.join(chosen[: words - changed] + [other.choice(WORDS) for _ in range(changed)])


def grams(value: str) -> set:
  words = value.split()
  return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.mark.parametrize('changed', [0, 10, 60, 150])
def test_signatures_estimate_the_jaccard_similarity(changed):
  pairs = [(text(s), text(s, changed)) for s in range(20)]
  exact = [len(grams(a) & grams(b)) / len(grams(a) | grams(b)) for a, b in pairs]
  estimate = [np.mean(near.signature(a) == near.signature(b)) for a, b in pairs]
  assert np.mean(estimate) == pytest.approx(np.mean(exact), abs=0.03)


def test_case_and_punctuation_do_not_matter_and_short_texts_have_a_signature():
  a, b = 'The quick, brown fox jumps: over!', 'the quick brown fox jumps over'
  np.testing.assert_array_equal(near.signature(a), near.signature(b))
  for short in ('', 'one', 'one two'):
    assert near.signature(short).shape == (128,)


def corpus(tmp_path):
  generic = [text(s) for s in range(30)]
  near_own = [text(s, 4) for s in range(5)]  # near the generic set's own training documents
  near_test = [text(100 + s, 4) for s in range(3)]  # near the domain's test documents
  far = [text(200 + s, 120) for s in range(3)] + [text(200 + s) for s in range(3)]
  path = lambda name, texts: str(toy.write_jsonl(tmp_path / f'{name}.jsonl', texts))
  return {
    'generic': {'train': path('generic', generic + near_own + near_test + far)},
    'law': {
      'train': path('train', [text(300 + s) for s in range(9)] + [text(100, 4)]),
      'test': path('test', [text(100 + s) for s in range(3)] + [text(100, 4)]),
    },
  }


def test_training_documents_near_others_go_and_held_out_ones_stay(tmp_path):
  sets = corpus(tmp_path)
  counts = {}
  for name, threshold in (('exact', 0.0), ('near', 0.8)):
    out = str(tmp_path / name)
    cfg = toy.config(tmp_path, sets, out=out, sizes=(), near_duplicates=threshold, levels=(2,))
    manifest = prepare.prepare(cfg)
    assert prepare.prepare(cfg) == manifest  # a restart keeps it
    counts[name] = {
      (s, split): facts['documents']
      for s, splits in manifest['sets'].items()
      for split, facts in splits.items()
    }
  # text(100, 4) is held out, so its exact copy is dropped from training in both.
  assert counts['exact'] == {('generic', 'train'): 43, ('law', 'train'): 9, ('law', 'test'): 4}
  assert counts['near'] == {('generic', 'train'): 36, ('law', 'train'): 9, ('law', 'test'): 4}


def test_only_what_shares_a_band_is_compared_and_nothing_near_is_missed(tmp_path, monkeypatch):
  compared, masks = near._compared, []
  make = lambda name: prepare.prepare(
    toy.config(
      tmp_path,
      corpus(tmp_path),
      out=str(tmp_path / name),
      sizes=(),
      near_duplicates=0.8,
      levels=(2,),
    )
  )['sets']

  def recorded(sets, keep, threshold):
    masks.append(compared(sets, keep, threshold))
    return masks[-1]

  monkeypatch.setattr(near, '_compared', recorded)
  some = make('some')
  monkeypatch.setattr(near, '_compared', lambda sets, keep, threshold: keep)
  assert make('all') == some
  (mask,) = masks
  assert {name: int(kept.sum()) for name, kept in mask.items()} == {'generic': 12, 'law': 4}


def test_a_similarity_is_a_share(tmp_path):
  with pytest.raises(ValueError, match='near_duplicates=1.5: expected a similarity'):
    toy.config(tmp_path, {'generic': {'all': 'x.txt'}}, near_duplicates=1.5)
