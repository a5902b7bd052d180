"""Smaller tokenizers: the same cuts of what stays, and every text still comes back."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
import toy
from test_tokenizer import TEXTS, huggingface_file

from slm.data import tokenizer, vocabulary

DOMAIN = toy.documents(['law'], 30, 1)


def unigram_file(path):
  """Train a SentencePiece Unigram with bytes; newlines and all are text."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(toy.documents(list(toy.TOPICS), 100, 0)), model_writer=model,
    model_type='unigram', vocab_size=400, byte_fallback=True, normalization_rule_name='identity',
    add_dummy_prefix=False, remove_extra_whitespaces=False, pad_id=0, unk_id=1, bos_id=2, eos_id=3,
    minloglevel=2, hard_vocab_limit=False,
  )  # fmt: skip
  path.write_bytes(model.getvalue())


def made(kind, folder):
  """Make a tokenizer of a kind, with what any text needs: 256 bytes or so, and words."""
  folder.mkdir()
  if kind == 'sentencepiece-bpe':
    sample = toy.documents(list(toy.TOPICS), 200, 0)
    return tokenizer.build('sentencepiece', 400, '', sample, folder)
  if kind == 'sentencepiece-unigram':
    unigram_file(folder / 'tokenizer.model')
  elif kind == 'bpe':
    huggingface_file(folder / 'tokenizer.json', ['<s>', '</s>'])
    file = json.loads((folder / 'tokenizer.json').read_text())
    ids = {t['content']: t['id'] for t in file['added_tokens']}
    special = {t: {'id': t, 'ids': [i], 'tokens': [t]} for t, i in ids.items()}
    single = [{'SpecialToken': {'id': t, 'type_id': 0}} for t in ids]
    single.insert(1, {'Sequence': {'id': 'A', 'type_id': 0}})
    file['post_processor'] = {
      'type': 'TemplateProcessing', 'single': single, 'pair': single, 'special_tokens': special
    }  # fmt: skip
    (folder / 'tokenizer.json').write_text(json.dumps(file))
  else:
    byte = [(f'<0x{b:02X}>', -20.0) for b in range(256)]
    words = sorted({w for t in toy.TOPICS.values() for w in t.split()})
    vocab = [('<unk>', -30.0), *byte, *((w[:4], -5.0) for w in words), *((w, -4.0) for w in words)]
    vocab = list(dict(vocab).items())
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, 0, byte_fallback=True))
    model.decoder = tokenizers.decoders.Sequence(
      [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    model.add_special_tokens(['<s>', '</s>'])
    model.save(str(folder / 'tokenizer.json'))
  return tokenizer.load(folder)


KINDS = {'sentencepiece-bpe': 320, 'sentencepiece-unigram': 300, 'bpe': 280, 'unigram': 280}


@pytest.mark.parametrize('kind', KINDS)
def test_what_stays_is_cut_as_before_and_all_comes_back(kind, tmp_path):
  old, size = made(kind, tmp_path / 'old'), KINDS[kind]
  counts = np.bincount([i for t in DOMAIN for i in old.encode(t)], minlength=old.vocab + 5)
  name, content, kept = vocabulary.reduce(tmp_path / 'old', counts, size)
  (tmp_path / name).write_bytes(content)
  new = tokenizer.load(tmp_path)
  assert len(kept) == size == new.vocab < old.vocab and (np.diff(kept) > 0).all()
  assert new.fingerprint != old.fingerprint
  same = lambda i: i if i is None else kept[i]
  assert [same(i) for i in vars(new.ids).values()] == list(vars(old.ids).values())
  order = np.argsort(-counts, kind='stable')
  assert set(order[: (size - 262) // 4].tolist()) <= set(kept.tolist())
  place = {old_id: i for i, old_id in enumerate(kept.tolist())}
  words = [w for topic in toy.TOPICS.values() for w in topic.split()]
  texts = words + [f' {w}' for w in words] + [f'{a} {b}' for a in words for b in words] + DOMAIN
  same = [t for t in texts if set(old.encode(t)) <= place.keys()]
  # Enough of them, and enough that have more than one token, to say something.
  assert len(same) > 20 and max(len(old.encode(t)) for t in same) > 1 and len(same) < len(texts)
  for text in same:
    assert new.encode(text) == [place[i] for i in old.encode(text)], text
  for text in TEXTS[:6] + texts[::50]:
    if old.decode(old.encode(text)) == text:
      assert new.decode(new.encode(text)) == text
    assert max(new.encode(text), default=0) < size
  if kind == 'bpe':
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / name)).encode('contract')
    assert [whole.ids[0], whole.ids[-1]] == [new.ids.bos, new.ids.eos]
    model = json.loads(content)['model']
    assert all({a, b, a + b} <= model['vocab'].keys() for a, b in model['merges'])


def test_every_size_can_be_made(tmp_path):
  old = made('sentencepiece-bpe', tmp_path / 'old')
  rng = np.random.default_rng(0)
  for size in (261, 263, 300, 399, 400):
    _, _, kept = vocabulary.reduce(tmp_path / 'old', rng.random(old.vocab), size)
    assert len(kept) == size


def test_refusals(tmp_path):
  old = made('sentencepiece-bpe', tmp_path / 'old')
  for size in (100, 401):
    with pytest.raises(ValueError, match=f'vocab={size}: expected 260 .* to 400'):
      vocabulary.reduce(tmp_path / 'old', np.ones(old.vocab), size)
  tokenizer.build('bytes', 0, '', [], tmp_path / 'bytes')
  with pytest.raises(ValueError, match='nothing to drop'):
    vocabulary.reduce(tmp_path / 'bytes', np.ones(259), 200)
  word = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<s>': 0, '</s>': 1}, unk_token='<s>'))
  (tmp_path / 'word').mkdir()
  word.save(str(tmp_path / 'word' / 'tokenizer.json'))
  with pytest.raises(ValueError, match='found WordLevel'):
    vocabulary.reduce(tmp_path / 'word', np.ones(2), 2)
