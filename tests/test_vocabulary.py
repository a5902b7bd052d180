"""Reduced tokenizers: encodings of kept tokens, lossless round trips, renumbered files."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
import toy
from test_tokenizer import TEXTS, huggingface_file

from slm.data import tokenizer, vocabulary
from slm.interchange import tokenizer_files

DOMAIN = toy.documents(['law'], 30, 1)


def unigram_file(path):
  """Train a SentencePiece Unigram model with byte fallback, which keeps newlines."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(toy.documents(list(toy.TOPICS), 100, 0)), model_writer=model,
    model_type='unigram', vocab_size=400, byte_fallback=True, normalization_rule_name='identity',
    add_dummy_prefix=False, remove_extra_whitespaces=False, pad_id=0, unk_id=1, bos_id=2, eos_id=3,
    minloglevel=2, hard_vocab_limit=False,
  )  # fmt: skip
  path.write_bytes(model.getvalue())


def made(kind, folder):
  """Make a tokenizer of a kind, with 256 bytes and words."""
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
  smaller, kept = vocabulary.reduce(tokenizer_files.read(tmp_path / 'old'), counts, size)
  (name, content), *_ = smaller.items()
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
  # Enough texts for the test to mean something, some of them with several tokens.
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
  rng, files = np.random.default_rng(0), tokenizer_files.read(tmp_path / 'old')
  for size in (261, 263, 300, 399, 400):
    _, kept = vocabulary.reduce(files, rng.random(old.vocab), size)
    assert len(kept) == size


def test_refusals(tmp_path):
  old = made('sentencepiece-bpe', tmp_path / 'old')
  for size in (100, 401):
    with pytest.raises(ValueError, match=f'vocab={size}: expected 260 .* to 400'):
      vocabulary.reduce(tokenizer_files.read(tmp_path / 'old'), np.ones(old.vocab), size)
  with pytest.raises(ValueError, match='nothing to drop'):
    vocabulary.reduce({'bytes.json': b'{}'}, np.ones(259), 200)
  word = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<s>': 0, '</s>': 1}, unk_token='<s>'))
  (tmp_path / 'word').mkdir()
  word.save(str(tmp_path / 'word' / 'tokenizer.json'))
  with pytest.raises(ValueError, match='found WordLevel'):
    vocabulary.reduce(tokenizer_files.read(tmp_path / 'word'), np.ones(2), 2)


SPECIAL = ['<s>', '</s>', '<|turn|>', '<pad>']


def test_ids_that_files_beside_a_tokenizer_name_stay_and_are_renumbered(tmp_path):
  """End tokens that only the model has, tokens in settings and chat templates, added tokens."""
  huggingface_file(tmp_path / 'tokenizer.json', SPECIAL[:2])
  model = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  model.add_special_tokens(SPECIAL[2:])
  model.enable_padding(pad_id=model.token_to_id('<pad>'), pad_token='<pad>')
  model.save(str(tmp_path / 'tokenizer.json'))
  ids = model.get_vocab()
  word, other = sorted((t for t in ids if len(t) > 4 and t not in SPECIAL), key=ids.get)[-2:]
  rows = len(ids) + 9  # the model has 9 more; the files name 3 of them
  reserved = [rows - 1, rows - 4, rows - 2]
  beside = {
    'config.json': {'eos_token_id': [ids['</s>'], reserved[0]], 'pad_token_id': -1,
                    'vocab_size': rows, 'hidden_size': ids[word], 'bos_token_id': None},
    'generation_config.json': {'eos_token_id': reserved[1], 'suppress_tokens': [reserved[2]],
                               'bad_words_ids': [[ids[other], 0]], 'top_k': 50},
    'tokenizer_config.json': {
      'added_tokens_decoder': {str(ids['<|turn|>']): {'content': '<|turn|>'}},
      'eos_token': {'content': '</s>'}, 'additional_special_tokens': [word], 'padding_side': 'left',
    },
    'added_tokens.json': {'<|turn|>': ids['<|turn|>']},
  }  # fmt: skip
  for name, value in beside.items():
    (tmp_path / name).write_text(json.dumps(value))
  mark = next(t for t in sorted(ids) if len(t) == 2 and t not in SPECIAL)
  (tmp_path / 'chat_template.jinja').write_text("{{ '<|turn|>' + message['role'] }}")
  whole = tokenizer_files.read(tmp_path)
  counts = np.zeros(rows)
  counts[ids[mark]] = 5
  needs = pytest.raises(ValueError, match=r'vocab=9: expected (\d+) ')
  with needs as caught:
    vocabulary.reduce(whole, counts, 9)
  least = int(caught.value.args[0].split('expected ')[1].split()[0])
  smaller, kept = vocabulary.reduce(whole, counts, least)
  new = {old: i for i, old in enumerate(kept.tolist())}
  assert {*reserved, *(ids[t] for t in (*SPECIAL, word, other))} <= new.keys()
  read = {name: json.loads(smaller[name]) for name in (*beside, 'tokenizer.json')}
  config, decoding, settings, added = (read[name] for name in beside)
  assert config['eos_token_id'] == [new[ids['</s>']], new[reserved[0]]]
  assert config['pad_token_id'] == -1 and config['bos_token_id'] is None
  assert (config['vocab_size'], config['hidden_size']) == (least, ids[word])
  assert decoding['eos_token_id'] == new[reserved[1]] and decoding['top_k'] == 50
  assert decoding['suppress_tokens'] == [new[reserved[2]]]
  assert decoding['bad_words_ids'] == [[new[ids[other]], new[0]]]
  assert [*settings['added_tokens_decoder']] == [str(new[ids['<|turn|>']])]
  assert added == {'<|turn|>': new[ids['<|turn|>']]}
  assert read['tokenizer.json']['padding']['pad_id'] == new[ids['<pad>']]
  assert smaller['chat_template.jinja'] == whole['chat_template.jinja']
  smaller_ids = tokenizers.Tokenizer.from_str(smaller['tokenizer.json'].decode()).get_vocab()
  assert all(new[ids[token]] == i for token, i in smaller_ids.items())
  assert len(smaller_ids) == least - len(reserved)
  counts = counts[: rows - 2]
  with pytest.raises(ValueError, match='the settings beside it name the id .*, the model has'):
    vocabulary.reduce(whole, counts, least)


def test_tokens_that_only_a_chat_template_names_stay(tmp_path):
  """The mark of a role may be an ordinary token."""
  files = {'tokenizer.json': made_with_mark(tmp_path)}
  ids = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode()).get_vocab()
  counts = np.zeros(len(ids))
  size = len(ids) - 1
  assert ids['<u>'] not in vocabulary.reduce(files, counts - np.eye(len(ids))[ids['<u>']], size)[1]
  template = {'chat_template': [{'name': 'default', 'template': '{{ "<u>" + text }}'}]}
  files['tokenizer_config.json'] = json.dumps(template).encode()
  assert ids['<u>'] in vocabulary.reduce(files, counts - np.eye(len(ids))[ids['<u>']], size)[1]


def made_with_mark(folder):
  """Return the file of a Unigram model with bytes and `<u>` as an ordinary token."""
  byte = [(f'<0x{b:02X}>', -20.0) for b in range(256)]
  vocab = [('<unk>', -30.0), *byte, ('<u>', -4.0), ('law', -4.0)]
  model = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, 0, byte_fallback=True))
  model.save(str(folder / 'tokenizer.json'))
  return (folder / 'tokenizer.json').read_bytes()


@pytest.mark.parametrize('old', ['none', 'ByteLevel', 'template', 'sequence'])
def test_another_beginning_of_texts(old, tmp_path):
  """Offsets are trimmed as before, and texts end as before."""
  huggingface_file(tmp_path / 'tokenizer.json', ['<s>', '</s>'])
  model = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  begin, end = (model.token_to_id(t) for t in ('<s>', '</s>'))
  trim = tokenizers.processors.ByteLevel(trim_offsets=False)
  ends = tokenizers.processors.TemplateProcessing('$A </s>', special_tokens=[('</s>', end)])
  both = tokenizers.processors.Sequence([trim, ends])
  processor = {'none': None, 'ByteLevel': trim, 'template': ends, 'sequence': both}[old]
  if processor:
    model.post_processor = processor
  model.enable_truncation(2)
  model.save(str(tmp_path / 'tokenizer.json'))
  text = (tmp_path / 'tokenizer.json').read_text()
  after = [end] if old in ('template', 'sequence') else []
  assert vocabulary.begin_with(text, []) == text
  new = vocabulary.begin_with(text, [begin])
  assert vocabulary.begin_with(new, [begin]) == new
  back = vocabulary.begin_with(new, [])
  for changed, before in ((new, [begin]), (back, [])):
    model_with = tokenizers.Tokenizer.from_str(changed)
    model_with.no_truncation()
    for sample in ('', 'a', ' two words', 'é <s>'):
      bare = model_with.encode(sample, add_special_tokens=False).ids
      assert model_with.encode(sample).ids == [*before, *bare, *after]
      assert model_with.encode(sample, 'a').ids == [*before, *bare, *after, *before,
        *model_with.encode('a', add_special_tokens=False).ids, *after]  # fmt: skip
