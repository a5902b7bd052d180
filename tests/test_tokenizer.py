"""Tokenizers: exact round trips, determinism, refusals."""

import io
import json
import pathlib

import numpy as np
import pytest
import sentencepiece as spm
import tokenizers
import toy

from slm.base import files
from slm.data import sidecars, tokenizer

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
  assert np.flatnonzero(tok.known).tolist() == [0, 1, 10]


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
  with pytest.raises(FileNotFoundError, match='expected one of tokenizer.json'):
    tokenizer.load(tmp_path)
  (tmp_path / 'tokenizer.model').write_bytes(b'junk')
  with pytest.raises(ValueError, match='not a SentencePiece model'):
    tokenizer.load(tmp_path)
  (tmp_path / 'x.json').write_text('{}')
  with pytest.raises(ValueError, match='not a tokenizer.json'):
    tokenizer.load(tmp_path / 'x.json')
  with pytest.raises(ValueError, match='the vocabulary has none of'):
    tokenizer.load(huggingface_file(tmp_path / 'y.json', ['<weird>']))


@pytest.mark.parametrize(
  ('settings', 'ends'),
  [
    (None, ('<|im_start|>', '<|im_end|>')),
    ({'bos_token': None, 'eos_token': '<|endoftext|>'}, (None, '<|endoftext|>')),
    ({'eos_token': {'content': '<|im_end|>'}}, (None, '<|im_end|>')),
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
    (tmp_path / sidecars.SETTINGS).write_text(json.dumps(settings))
  built = tokenizer.build('huggingface', 0, str(source), [], tmp_path / 'out')
  for tok in (tokenizer.load(tmp_path), tokenizer.load(source), built):
    assert (tok.special().get('bos'), tok.special()['eos']) == ends
    assert tok.start == tok.ids.eos if ends[0] is None else tok.ids.bos
  (tmp_path / sidecars.SETTINGS).write_text('{"eos_token": "<gone>"}')
  with pytest.raises(
    ValueError, match='tokenizer_config.json: eos_token is .<gone>., which is not in'
  ):
    tokenizer.load(tmp_path)


CHAT = (
  '<|im_start|>user\nred boat<|im_end|>', 'red boat', ' two  spaces', 'a<s>b</s> c', '<|im_end|>',
  'né <|im_start|> x', '',
)  # fmt: skip


def llama(path: pathlib.Path, **settings) -> int:
  """Write a tokenizer.model of Llama 2's kind, settings beside it; return its number of pieces."""
  content = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(toy.documents(list(toy.TOPICS), 200, 0)), model_writer=content,
    model_type='bpe', vocab_size=400, byte_fallback=True, normalization_rule_name='identity',
    remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
  )  # fmt: skip
  (path / 'tokenizer.model').write_bytes(content.getvalue())
  if settings:
    write(path, tokenizer_class='LlamaTokenizer', unk_token='<unk>', **settings)
  return 400


def write(path: pathlib.Path, name: str = sidecars.SETTINGS, **content) -> None:
  (path / name).write_text(json.dumps(content))


def flags(text: str) -> dict[str, object]:
  return {'content': text, 'special': True, 'normalized': False}


BESIDE = {
  'none': lambda path, n: None,
  'added_tokens': lambda path, n: [
    write(path, 'added_tokens.json', **{'<|im_end|>': n + 1, '<|im_start|>': n}),
    write(path, 'special_tokens_map.json', eos_token='<|im_end|>', bos_token={'content': '<s>'}),
  ],
  'decoder': lambda path, n: llama(
    path, eos_token='<|im_end|>', bos_token='<s>', add_bos_token=True, legacy=True,
    added_tokens_decoder={
      str(n): flags('<|im_start|>'), str(n + 1): {**flags('<|im_end|>'), 'rstrip': True},
    },
  ),
  'extra': lambda path, n: llama(
    path, eos_token='</s>', bos_token='<s>', add_bos_token=True, add_prefix_space=False,
    additional_special_tokens=['<|im_start|>', '<|im_end|>'],
  ),
}  # fmt: skip


@pytest.mark.parametrize('kind', BESIDE)
@pytest.mark.parametrize('form', ['tokenizer.model', 'tokenizer.json', 'both'])
def test_files_beside_a_tokenizer_are_read_as_transformers_reads_them(tmp_path, kind, form):
  """Added tokens, begin and end tokens: from a model, from a tokenizer.json, from both."""
  transformers = pytest.importorskip('transformers')
  n = llama(tmp_path, eos_token='</s>', bos_token='<s>', add_bos_token=True)
  BESIDE[kind](tmp_path, n)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  if form != 'tokenizer.model':
    theirs.save_pretrained(tmp_path)
  if form == 'tokenizer.json':
    (tmp_path / 'tokenizer.model').unlink()
  built = tokenizer.build('', 0, str(tmp_path), [], tmp_path / 'built')
  for tok in (tokenizer.load(tmp_path), built):
    for text in CHAT:
      if not text.startswith(' '):  # SentencePiece keeps a first space that transformers drops
        assert [*tok.begin, *tok.encode(text)] == theirs(text).input_ids, text
      assert tok.decode(theirs(text).input_ids) == theirs.decode(
        theirs(text).input_ids, skip_special_tokens=True
      )
    assert (tok.vocab, tok.ids.bos, tok.ids.eos) == (len(theirs), 1, theirs.eos_token_id)
    assert tok.known.all() and tok.ids.pad is None
  assert built.fingerprint == tokenizer.load(tmp_path).fingerprint


def chatml(path: pathlib.Path, **settings) -> pathlib.Path:
  path.mkdir(exist_ok=True)
  huggingface_file(path / 'tokenizer.json', ['<|endoftext|>', '<|im_start|>', '<|im_end|>'])
  if settings:
    write(path, **settings)
  return path


@pytest.mark.parametrize('state', ['truncation', 'padding', 'dropout'])
def test_state_saved_in_a_tokenizer_is_no_intent(tmp_path, state):
  plain = tokenizer.load(chatml(tmp_path / 'plain'))
  text = 'ship ' * 200
  model = tokenizers.Tokenizer.from_file(str(tmp_path / 'plain' / 'tokenizer.json'))
  if state == 'truncation':
    model.enable_truncation(16)
  elif state == 'dropout':
    model.model.dropout = 0.5
    assert model.encode(text).ids != plain.encode(text)
  else:
    model.enable_padding(length=512, pad_id=0, pad_token='<|endoftext|>')
  model.save(str(tmp_path / 'tokenizer.json'))
  tok = tokenizer.load(tmp_path)
  assert tok.encode(text) == plain.encode(text) and 16 < len(tok.encode(text)) < 512
  assert tok.begins == plain.begins and tok.ids == plain.ids


def test_absent_stays_absent(tmp_path):
  """No id is padding or a begin token unless a file says so; id 0 may be text."""
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel({'!': 0, 'go': 1}, unk_token='!'))
  model.add_special_tokens(['<|end_of_text|>'])
  model.save(str(tmp_path / 'tokenizer.json'))
  tok = tokenizer.load(tmp_path)
  assert tok.ids == tokenizer.Ids(pad=None, bos=None, eos=2) and tok.begin == ()
  assert tok.start == 2 and tok.special() == {'eos': '<|end_of_text|>'}
  assert tok.decode([0, 1, 2]) == '! go' and tok.continued([1], [0, 2]) == ' !'
  (tmp_path / 'm').mkdir()
  llama(tmp_path / 'm', eos_token='</s>', bos_token='<s>')
  assert tokenizer.load(tmp_path / 'm').ids == tokenizer.Ids(pad=None, bos=1, eos=2)


def test_the_end_of_a_text_is_a_set_from_all_files(tmp_path):
  path = chatml(tmp_path / 'a', eos_token='<|im_end|>')
  tok = tokenizer.load(path)
  assert (tok.ids.eos, tok.ends) == (2, {2})
  write(path, 'config.json', eos_token_id=2, bos_token_id=1, pad_token_id=-1)
  write(path, 'generation_config.json', eos_token_id=[2, 0])
  built = tokenizer.build('', 0, str(path / 'tokenizer.json'), [], tmp_path / 'out')
  for tok in (tokenizer.load(path), built):
    assert (tok.ids.eos, tok.ends, tok.ids.bos, tok.ids.pad) == (2, {0, 2}, None, None)
    assert tok.decode([*tok.encode('ship'), 2, 0]) == 'ship'
  # Without settings of the tokenizer, the configs of the model name the end token.
  (path / sidecars.SETTINGS).unlink()
  tok = tokenizer.load(path)
  assert (tok.ids.eos, tok.ends, tok.ids.bos) == (2, {0, 2}, 1)
  write(path, 'generation_config.json', eos_token_id=[[2]])
  with pytest.raises(ValueError, match='generation_config.json: eos_token_id: expected an id'):
    tokenizer.load(path)


def test_a_model_that_puts_a_space_before_a_text_round_trips(tmp_path):
  llama(tmp_path)
  tok = tokenizer.load(tmp_path)
  model = spm.SentencePieceProcessor(model_file=str(tmp_path / 'tokenizer.model'))
  assert tok.prefix_space
  for text in (*TEXTS, 'the▁cat', '▁cat▁ sat▁'):
    assert tok.decode(tok.encode(text)) == text
    assert '▁' in text or tok.encode(text) == model.encode(text)


def test_special_tokens_are_not_printed(tmp_path):
  tok = tokenizer.load(chatml(tmp_path, eos_token='<|endoftext|>'))
  ids = tok.encode('<|im_start|>ship sail<|im_end|>')
  assert (ids[0], ids[-1]) == (1, 2) and tok.decode(ids) == 'ship sail'
  assert tok.decode([*ids, tok.vocab, tok.vocab + 9]) == 'ship sail'


def test_a_continuation_keeps_its_first_space_and_whole_characters(tmp_path, sentencepiece):
  llama(tmp_path, eos_token='</s>', bos_token='<s>', add_bos_token=True)
  tok = tokenizer.load(tmp_path)
  ids = tok.begun('the ship sail', tok.begin)
  assert ids[0] == 1 and tok.prefix_space and tok.begun('<s>ship', tok.begin)[:2] != [1, 1]
  before, more = ids[:-1], ids[-1:]
  assert tok.decode(more) == 'sail' and tok.decode(before) + tok.continued(before, more) == (
    'the ship sail'
  )
  ids = sentencepiece.encode('ship 漢')  # three byte pieces
  assert sentencepiece.continued(ids[:-1], ids[-1:]) == '漢'


def test_files_that_are_not_of_one_tokenizer(tmp_path):
  """A tokenizer.model of another format beside a tokenizer.json is ignored, a stale one refused."""
  alone = tokenizer.load(chatml(tmp_path))
  for content in (b'IQ== 0\nIg== 1\n', b''):  # as tiktoken writes it
    (tmp_path / 'tokenizer.model').write_bytes(content)
    assert tokenizer.load(tmp_path).fingerprint == alone.fingerprint
  llama(tmp_path)
  with pytest.raises(ValueError, match='tokenizer.json and tokenizer.model are of different'):
    tokenizer.load(tmp_path)
  assert tokenizer.load(tmp_path / 'tokenizer.model').vocab == 400  # loaded by name
  (tmp_path / 'tokenizer.model').unlink()
  write(tmp_path, 'added_tokens.json', **{'<|im_end|>': 7})
  assert tokenizer.load(tmp_path).encode('<|im_end|>') == [2]
  write(tmp_path, 'added_tokens.json', **{'<new>': 7})
  with pytest.raises(ValueError, match=f"'<new>' would get the id {alone.vocab}, the files .* 7"):
    tokenizer.load(tmp_path)


def test_the_fingerprint_is_of_all_that_changes_what_is_read(tmp_path):
  llama(tmp_path)
  alone = tokenizer.load(tmp_path)
  assert alone.begins and alone.fingerprint == files.sha256(tmp_path / 'tokenizer.model')
  same = {'eos_token': '</s>', 'bos_token': '<s>', 'add_bos_token': True}
  fingerprints = [alone.fingerprint]
  for settings in (
    same,
    {**same, 'add_prefix_space': None},
    {**same, 'add_bos_token': False},
    {**same, 'add_prefix_space': False},
    {**same, 'additional_special_tokens': ['<|im_end|>']},
  ):
    llama(tmp_path, **settings)
    fingerprints.append(tokenizer.load(tmp_path).fingerprint)
  assert fingerprints[0] == fingerprints[1] == fingerprints[2] and len(set(fingerprints)) == 4
  path = chatml(tmp_path / 'json', eos_token='<|im_end|>')
  before = tokenizer.load(path).fingerprint
  assert before == files.sha256(path / 'tokenizer.json')
  write(path, 'added_tokens.json', **{'<new>': tokenizer.load(path).vocab})
  assert tokenizer.load(path).fingerprint != before


def test_the_chat_template_is_kept_as_text(tmp_path):
  chatml(tmp_path, eos_token='<|im_end|>', chat_template='{{ one }}')
  assert tokenizer.load(tmp_path).chat_template == '{{ one }}'
  several = [{'name': 'tool_use', 'template': 't'}, {'name': 'default', 'template': '{{ two }}'}]
  write(tmp_path, eos_token='<|im_end|>', chat_template=several)
  assert tokenizer.load(tmp_path).chat_template == '{{ two }}'
  (tmp_path / 'chat_template.jinja').write_text('{{ three }}')
  built = tokenizer.build('', 0, str(tmp_path), [], tmp_path / 'out')
  assert tokenizer.load(tmp_path).chat_template == built.chat_template == '{{ three }}'


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('tokenizer.json', '{"model": {"type": "BPE"}}', 'tokenizer.json: not a tokenizer.json'),
    ('tokenizer.json', '[' * 9999, 'tokenizer.json: not a tokenizer.json'),
    ('tokenizer.json', b'\xff', 'tokenizer.json: not a tokenizer.json'),
    ('tokenizer_config.json', '[' * 99999, 'config.json: truncated or damaged .nested too deeply'),
    ('tokenizer_config.json', '[]', r'tokenizer_config.json: expected an object, found \[\]'),
    ('tokenizer_config.json', '{"eos_token": {}}', 'not the settings of a tokenizer .lacks .cont'),
    (
      'tokenizer_config.json',
      '{"additional_special_tokens": [null]}',
      'not the settings of a tokenizer',
    ),
    ('tokenizer_config.json', '{"added_tokens_decoder": {"x": {"content": "y"}}}', 'invalid lit'),
    ('added_tokens.json', '{"<x>": null}', 'added_tokens.json: not a table of tokens and ids'),
    ('config.json', '{"eos_token_id": "2"}', 'config.json: eos_token_id: expected an id'),
  ],
)
def test_damaged_files_are_one_line(tmp_path, name, content, message):
  chatml(tmp_path)
  (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError, match=message) as caught:
    tokenizer.load(tmp_path)
  assert str(caught.value).startswith(f'{tmp_path / name}: ') and '\n' not in str(caught.value)
