"""Tokenizers: exact round trips, determinism, refusals."""

import json
import pathlib

import pytest
import tokenizers
import toy

from slm.data import tokenizer

TEXTS = [
  '',
  ' ',
  'plain words',
  '  two  spaces \t tab\nnewline\r\n\n\n end ',
  'é ñ 漢字 🙂 \u2028 \u00a0 \x00 \x07 e\u0301 ﬁ',
  '▁ literal ▁▁ marker ▁',
  '<s> </s> <unk> <0x0A>',
]


@pytest.fixture(scope='module')
def sentencepiece(tmp_path_factory) -> tokenizer.Tokenizer:
  sample = toy.documents(list(toy.TOPICS), 200, 0)
  return tokenizer.build('sentencepiece', 400, '', sample, tmp_path_factory.mktemp('sp'))


def huggingface_file(path: pathlib.Path, special: list[str]) -> pathlib.Path:
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
  )
  model.train_from_iterator(toy.documents(['sea'], 20, 0), trainer)
  model.save(str(path))
  return path


@pytest.mark.parametrize('text', TEXTS)
def test_sentencepiece_round_trip(sentencepiece, text):
  assert sentencepiece.decode(sentencepiece.encode(text)) == text


@pytest.mark.parametrize('text', TEXTS)
def test_bytes_round_trip(tmp_path, text):
  tok = tokenizer.build('bytes', 0, '', [], tmp_path)
  assert tok.decode([tok.ids.bos, *tok.encode(text), tok.ids.eos]) == text
  assert tok.vocab == 259 and max(tok.encode(text), default=0) < tok.vocab


@pytest.mark.parametrize('text', TEXTS[:6])
def test_huggingface_round_trip(tmp_path, text):
  source = huggingface_file(tmp_path / 'x.json', ['<s>', '</s>'])
  tok = tokenizer.build('huggingface', 0, str(source), [], tmp_path / 'out')
  assert tok.decode([tok.ids.bos, *tok.encode(text), tok.ids.eos]) == text
  assert tokenizer.load(tmp_path / 'out').fingerprint == tokenizer.load(source).fingerprint


def test_huggingface_ids_with_a_gap_fit_the_vocabulary(tmp_path):
  words = {'<s>': 0, 'sea': 1, '</s>': 10}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='sea'))
  model.save(str(tmp_path / 'gap.json'))
  tok = tokenizer.load(tmp_path / 'gap.json')
  assert (tok.vocab, tok.ids.eos) == (11, 10)


def test_sentencepiece_properties(sentencepiece):
  ids = sentencepiece.ids
  assert len({ids.pad, ids.bos, ids.eos}) == 3
  assert sentencepiece.vocab == 400
  assert ids.bos not in sentencepiece.encode('<s>')
  assert len(sentencepiece.encode('contract party')) < len('contract party')
  assert sentencepiece.decode([ids.bos, *sentencepiece.encode('a'), ids.eos]) == 'a'


def test_training_is_deterministic():
  sample = toy.documents(list(toy.TOPICS), 50, 0)
  assert tokenizer.train(sample, 350) == tokenizer.train(sample, 350)


def test_a_model_can_be_reused(sentencepiece, tmp_path):
  sample = toy.documents(list(toy.TOPICS), 200, 0)
  (tmp_path / 'mine.model').write_bytes(tokenizer.train(sample, 400))
  tok = tokenizer.build('sentencepiece', 1, str(tmp_path / 'mine.model'), [], tmp_path / 'out')
  assert tok.fingerprint == sentencepiece.fingerprint


def test_refusals(tmp_path):
  with pytest.raises(ValueError, match='tokenizer.vocab=100000 does not fit'):
    tokenizer.train(['few words'], 100_000)
  with pytest.raises(ValueError, match='no text to train on'):
    tokenizer.train([], 400)
  with pytest.raises(FileNotFoundError, match='expected one of tokenizer.model'):
    tokenizer.load(tmp_path)
  (tmp_path / 'tokenizer.model').write_bytes(b'junk')
  with pytest.raises(ValueError, match='not a SentencePiece model'):
    tokenizer.load(tmp_path)
  (tmp_path / 'x.json').write_text('{}')
  with pytest.raises(ValueError, match='not a tokenizer.json'):
    tokenizer.load(tmp_path / 'x.json')
  with pytest.raises(ValueError, match='none of the tokens'):
    tokenizer.load(huggingface_file(tmp_path / 'y.json', ['<weird>']))


@pytest.mark.parametrize(
  ('settings', 'ends'),
  [
    (None, ('<|im_start|>', '<|im_end|>')),
    ({'bos_token': None, 'eos_token': '<|endoftext|>'}, ('<|endoftext|>', '<|endoftext|>')),
    ({'eos_token': {'content': '<|im_end|>'}}, ('<|im_end|>', '<|im_end|>')),
    (
      {'bos_token': '<|im_start|>', 'eos_token': '<|endoftext|>'},
      ('<|im_start|>', '<|endoftext|>'),
    ),
  ],
)
def test_the_settings_beside_a_tokenizer_say_how_texts_begin_and_end(tmp_path, settings, ends):
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  source = huggingface_file(tmp_path / 'tokenizer.json', special)
  if settings:
    (tmp_path / tokenizer.SETTINGS).write_text(json.dumps(settings))
  built = tokenizer.build('huggingface', 0, str(source), [], tmp_path / 'out')
  for tok in (tokenizer.load(tmp_path), tokenizer.load(source), built):
    assert (tok.special()['bos'], tok.special()['eos']) == ends
  (tmp_path / tokenizer.SETTINGS).write_text('{"eos_token": "<gone>"}')
  with pytest.raises(ValueError, match='tokenizer_config.json: the vocabulary has none of'):
    tokenizer.load(tmp_path)
