"""Conversations as rows: templates, masks and their proofs, packing, what is dropped."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import toy
from test_chat import CHATML  # of SmolLM2: a system message where there is none

from slm import models
from slm.data import chat, loader, masking, prepare, rows, show, tokenizer
from slm.data.settings import ChatConfig, TokenizerConfig
from slm.models.config import DecoderConfig
from slm.models.decoder import unembed

MARKS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|start_header_id|>', '<|end_header_id|>',
         '<|eot_id|>', '<|begin|>']  # fmt: skip
# As models bring them: a default system message, tools, a turn for what a tool returns.
TOOLS = """{%- if tools %}<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' else 'Be kind.' }} Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% elif messages[0].role != 'system' %}<|im_start|>system
Be kind.<|im_end|>
{% endif %}{%- for m in messages %}{% if not (loop.first and m.role == 'system' and tools) %}
<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for call in m.tool_calls or [] -%}
<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
SAY = lambda role, text, **more: {'role': role, 'content': text, **more}
CALL = [{'type': 'function', 'function': {'name': 'sum', 'arguments': {'x': [1, 'é <']}}}]
TALKS = {
  'plain': [SAY('user', 'What is 2 < 3?\n'), SAY('assistant', 'True – ja.')],
  'turns': [
    SAY('user', 'a'), SAY('assistant', ' the tide\n\nthe rope '), SAY('user', 'More?'),
    SAY('assistant', 'No 漢字 🙂'),
  ],
  'system': [SAY('system', 'Short.'), SAY('user', 'the tide'), SAY('assistant', 'ship')],
  'empty': [SAY('user', ''), SAY('assistant', ''), SAY('user', '.'), SAY('assistant', 'x')],
  'tools': [
    SAY('user', 'add'), SAY('assistant', '', tool_calls=CALL), SAY('tool', '3'),
    SAY('assistant', 'It is 3.'),
  ],
}  # fmt: skip
SCHEMA = [{'type': 'function', 'function': {'name': 'sum', 'parameters': {'x': 'é <'}}}]


def bpe(folder: Path, template: str = '', eos: str = '<|im_end|>', **settings) -> Path:
  """Write a byte-level tokenizer with the marks of all templates into a folder."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=500, special_tokens=MARKS, show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  text = 'assistant\nuser\nsystem\n\n\n\n' * 9
  made.train_from_iterator([text, *toy.documents(list(toy.TOPICS), 60, 0)], trainer)
  folder.mkdir(parents=True)
  made.save(str(folder / 'tokenizer.json'))
  config = {'eos_token': eos, 'bos_token': '<|begin|>', **settings}
  config |= {'chat_template': template} if template else {}
  config['tokenizer_class'] = 'PreTrainedTokenizerFast'
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Write a tokenizer with each template; return the folders by name."""
  root = tmp_path_factory.mktemp('templates')
  eos = {'llama3': '<|eot_id|>'}
  made = {name: bpe(root / name, text, eos.get(name, '<|im_end|>'))
          for name, text in chat.TEMPLATES.items()}  # fmt: skip
  return made | {'own': bpe(root / 'own', TOOLS), 'default': bpe(root / 'default', CHATML)}


def fields(sets, out, tok, **changes):
  """Return the config of a preparation of conversations."""
  chat_keys = {'kind': 'conversations'} | changes.pop('chat', {})
  root = Path(out)
  return toy.config(
    root, sets, chat=ChatConfig(**chat_keys), tokenizer=tok, context=changes.pop('context', 96),
    **changes,
  )  # fmt: skip


def write(path: Path, records: list[dict]) -> str:
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


@pytest.mark.parametrize('name', [*chat.TEMPLATES, 'own', 'default'])
def test_text_and_ids_are_those_of_transformers(folders, name):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoTokenizer.from_pretrained(folders[name])
  masker = masking.Masker(tokenizer.load(folders[name]))
  for kind, talk in TALKS.items():
    tools = SCHEMA if kind == 'tools' else None
    if tools and name != 'own':
      with pytest.raises(masking.Dropped, match='no place for tools'):
        masker.conversation(talk, tools)
      with pytest.raises(masking.Dropped, match='no place for tools|leaves out the calls'):
        masker.conversation(talk)
      continue
    for prompt, part in ((False, talk), (True, talk[:-1])):
      text = theirs.apply_chat_template(
        part, tools, tokenize=False, add_generation_prompt=prompt
      )  # fmt: skip
      ids = theirs.apply_chat_template(
        part, tools, tokenize=True, add_generation_prompt=prompt, return_dict=False
      )
      assert masker.render(part, tools, prompt) == text
      made = masker.prompt(part, tools) if prompt else masker.conversation(part, tools)[0]
      assert made.tolist() == list(ids)


@pytest.mark.parametrize('name', [*chat.TEMPLATES, 'own', 'default'])
def test_what_is_trained_is_the_answers_with_their_end(folders, name):
  tok = tokenizer.load(folders[name])
  masker = masking.Masker(tok)
  for kind, talk in TALKS.items():
    if kind == 'tools' and name != 'own':
      continue
    ids, trained = masker.conversation(talk, SCHEMA if kind == 'tools' else None)
    runs = [
      [*group] for mark, group in itertools.groupby(range(len(ids)), trained.__getitem__) if mark
    ]
    trims = str.strip if name == 'llama3' else str
    answers = [trims(m['content']) for m in talk if m['role'] == 'assistant']
    if kind == 'tools':
      answers[0] = '<call>{"name": "sum", "arguments": {"x": [1, "é <"]}}</call>'
    end = tok.written([masker.stop])
    assert [tok.written(ids[run]) for run in runs] == [answer + end for answer in answers]
    assert all(ids[run[-1]] == masker.stop for run in runs)


@pytest.mark.parametrize('system', [[], [SAY('system', 'Short.')]])
@pytest.mark.parametrize('turns', [1, 2, 3])
def test_what_is_trained_is_the_answers_wherever_the_context_ends(folders, turns, system):
  tok = tokenizer.load(folders['chatml'])
  masker, asked = masking.Masker(tok), ChatConfig('conversations')
  said = ['ship and rope', '', 'the tide, 2 < 3'][:turns]
  talk = [m for text in said for m in (SAY('user', f'about {text}?'), SAY('assistant', text))]
  document = {'messages': [*system, *talk]}
  expected = ''.join(f'{text}<|im_end|>' for text in said)
  size = len(masker.conversation(document['messages'])[0])
  seen = set()
  for context in range(1, size + 2):
    try:
      tokens, notes = masking.window(document, masker, asked, context)
    except masking.Dropped as e:
      assert e.reason == 'untrained'
      seen.add('')
      continue
    found = tok.written(tokens['tokens'][tokens['trained'] > 0])
    assert expected.startswith(found) and found and len(tokens) == min(context, size)
    assert ('truncated' in notes) == (context < size)
    assert ('cut_answers' in notes) == (found != expected)
    seen.add(found)
  assert {'', expected} < seen  # before an answer, in the middle of one, after the last


def test_spans_are_those_of_the_text(folders, tmp_path):
  """What `encode_spans` says of the characters of a token, for every kind of tokenizer."""
  sample = toy.documents(list(toy.TOPICS), 200, 0)
  toks = [
    tokenizer.load(folders['own']),
    tokenizer.build('bytes', 0, '', [], tmp_path / 'bytes'),
    tokenizer.build('sentencepiece', 400, '', sample, tmp_path / 'sp'),
  ]
  (tmp_path / 'sp' / 'tokenizer_config.json').write_text(
    json.dumps({'add_bos_token': True, 'add_prefix_space': True, 'eos_token': '</s>'})
  )
  toks.append(tokenizer.load(tmp_path / 'sp'))
  for tok in toks:
    for text in ('', 'the tide ▁ rope</s>ship é 漢字 🙂\n\n x', '<|im_end|> two  spaces '):
      ids, spans = tok.encode_spans(text)
      assert ids == tok.encode(text) and spans.shape == (len(ids), 2)
      covered = {i for start, end in spans.tolist() for i in range(start, end)}
      assert covered == set(range(len(text)))
      for i, (start, end) in zip(ids, spans.tolist(), strict=True):
        if (alone := tok.decode([i]).strip()) and '\ufffd' not in alone and end > start:
          assert text[start:end].strip() == alone


HEADER = "{{ '<|im_start|>' + m.role + '\\n' }}"
BODY = "{{ m.content + '<|im_end|>\\n' }}"
LOOP = '{% for m in messages %}%s{% endfor %}'
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    (LOOP.replace('%s', HEADER + BODY), 'before the answer .*generation prompt'),
    (LOOP.replace('%s', HEADER + '{{ m.content }}') + PROMPT, "ends with '', expected the text of"),
    (LOOP.replace('%s', HEADER + "{{ m.content + ' THE END\\n' }}") + PROMPT, 'end-of-turn token'),
    (LOOP.replace('%s', HEADER + "{{ m.content + '<|eot_id|>' }}") + PROMPT,
     'at which generation does not stop'),
    # forgets the user once two messages have followed
    (LOOP.replace('%s', HEADER + BODY.replace('m.content', "(m.content if loop.revindex < 3 or "
     "m.role == 'assistant' else '')")) + PROMPT, 'is rendered as .* once messages follow'),
    (LOOP.replace('%s', HEADER + BODY.replace('m.content', '(m.content | upper)')) + PROMPT,
     'before the answer .* goes on with .YES'),
    (LOOP.replace('%s', "{% if m.role == 'assistant' %}" + BODY + '{% endif %}'), 'every token'),
    ("{{ '<|begin|><|begin|>' }}" + LOOP.replace('%s', HEADER + BODY) + PROMPT, 'two begin tokens'),
    ("{{ raise_exception('never') }}", 'refuses the messages.*never'),
    ('', 'has no chat template'),
  ],
)  # fmt: skip
def test_templates_without_a_proof_are_refused_by_name(tmp_path, template, message):
  tok = tokenizer.load(bpe(tmp_path / 'tok', template))
  with pytest.raises(ValueError, match=message) as e:
    masking.Masker(tok, 'mine')
  assert 'the template mine' in str(e.value) or not template


SOURCE = [
  {'messages': TALKS['turns']},
  {'prompt': 'the tide', 'response': 'ship and rope'},
  {'messages': TALKS['turns']},  # a copy
  {'messages': [SAY('user', 'no answer')]},
  {'messages': [SAY('user', 'x'), SAY('assistant', 'forged <|im_end|> end')]},
  {'messages': [SAY('user', 'x'), SAY('assistant', '\n\nbegins with a line end')]},
  {'messages': [SAY('tool', 'x'), SAY('assistant', 'y')]},
  {'messages': [SAY('user', 'anchor ' * 200), SAY('assistant', 'too late')]},
  {'messages': [SAY('user', 'short'), SAY('assistant', 'rope ' * 200)]},
]


def test_what_is_dropped_or_cut_is_counted(folders, tmp_path, capsys):
  path = write(tmp_path / 'a.jsonl', SOURCE)
  tok = TokenizerConfig('huggingface', path=str(folders['chatml']))
  sets = {'sft': {'train': path}}
  cfg = fields(sets, tmp_path / '1', tok)
  manifest = prepare.prepare(cfg)
  facts = manifest['sets']['sft']['train']
  assert facts['documents'] == 3 and facts['duplicates'] == 1
  assert facts['dropped'] == {'refused': 1, 'unproved': 2, 'untrained': 2}
  assert facts['notes'] == {'truncated': 1, 'cut_answers': 1}
  assert 'no role tool' in facts['why']['refused'] and 'forged' in facts['why']['unproved']
  text = show.summary(manifest, 'sft/train', facts)
  for part in ('dropped 2: ', 'no role tool', '1: cut at the context', '1: of them an answer lost'):
    assert part in text
  cut = fields(sets, tmp_path / '2', tok, chat={'too_long': 'drop'})
  facts = prepare.prepare(cut)['sets']['sft']['train']
  assert facts['documents'] == 2 and facts['dropped']['too_long'] == 2 and not facts['notes']
  only = write(tmp_path / 'b.jsonl', SOURCE[3:4])
  with pytest.raises(ValueError, match='sft/train: no conversations left .1 no token would be'):
    prepare.prepare(fields({'sft': {'train': only}}, tmp_path / '3', tok))


@pytest.fixture(scope='module')
def prepared(folders, tmp_path_factory):
  """Prepare 40 conversations with the template of the tokenizer; return the directory."""
  root, rng = tmp_path_factory.mktemp('sft'), np.random.default_rng(0)
  words = toy.TOPICS['sea'].split()
  talk = lambda n: [
    SAY(role, ' '.join(rng.choice(words, int(rng.integers(1, 6)))))
    for _ in range(n)
    for role in ('user', 'assistant')
  ]
  path = write(
    root / 'talks.jsonl', [{'messages': talk(1 + i % 3), 'w': i % 4 / 2} for i in range(40)]
  )
  tok = TokenizerConfig('huggingface', path=str(folders['own']))
  cfg = fields({'sft': {'all': path}}, root, tok, chat={'weight': 'w'}, heldout=(0.2, 0.0))
  prepare.prepare(cfg)
  return cfg


def test_rows_have_a_column_of_what_is_trained(prepared):
  data = loader.Split(prepared.out, 'sft', 'train')
  assert [c['name'] for c in data.manifest['columns']] == [
    'tokens',
    'segments',
    'trained',
    'weights',
  ]
  columns = data.read(np.arange(len(data.ids)))
  batch = rows.batch(columns)
  assert batch['trained'].dtype == np.uint8 and batch['trained'].shape == batch['inputs'].shape
  trained, segments = columns['trained'], columns['segments']
  for row, t in np.ndindex(trained.shape[0], trained.shape[1] - 1):
    inside = segments[row, t] == segments[row, t + 1] != 0
    wanted = columns['weights'][row, t + 1] if inside and trained[row, t + 1] else 0
    assert batch['weights'][row, t] == wanted
  assert not batch['weights'][:, -1].any()
  # the loss counts the tokens that the manifest counts, and the text of the answers
  masker = masking.Masker(tokenizer.load(Path(prepared.out) / 'tokenizer'))
  facts = data.facts
  assert facts['tokens'] == trained.sum() == data.counts[:, 1].sum()
  assert facts['positions'] == np.count_nonzero(segments)
  ends = np.count_nonzero((columns['tokens'] == masker.stop) & (trained > 0))
  text = masker.tok.decode(columns['tokens'][trained > 0])
  assert facts['bytes'] == len(text.encode()) and ends > facts['documents']
  assert facts['positions'] / facts['rows'] / 96 > 0.8


def test_packed_logits_are_those_of_each_conversation_alone(prepared):
  data = loader.Split(prepared.out, 'sft', 'train')
  columns = data.read(np.arange(4))
  batch = rows.batch(columns)
  shape = DecoderConfig(
    vocab=500, embed=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp=24
  )
  model = models.build(shape)
  params = toy.noisy(model, 0.15)
  logits = jax.jit(lambda b: unembed(params, model.forward(params, b)))
  names = ('inputs', 'segments', 'positions')
  packed = logits({name: batch[name] for name in names})
  checked = 0
  for row in range(4):
    for segment in range(1, columns['segments'][row].max() + 1):
      (place,) = np.nonzero(columns['segments'][row] == segment)
      alone = np.zeros((1, 96), np.int32)
      alone[0, : len(place)] = columns['tokens'][row, place]
      filled = (np.arange(96) < len(place))[None].astype(np.int32)
      one = {'inputs': alone, 'segments': filled, 'positions': np.arange(96)[None] * filled}
      expected = logits(jax.tree.map(jnp.asarray, one))[0, : len(place)]
      np.testing.assert_allclose(packed[row, place], expected, atol=1e-5)
      checked += 1
  assert checked >= 8


def test_a_prepared_directory_continues_and_is_shown(prepared, capsys, tmp_path):
  before = loader.manifest(prepared.out)
  (Path(prepared.out) / 'manifest.json').unlink()
  prepare.prepare(prepared)
  after = loader.manifest(prepared.out)
  assert {**before, 'cost': 0} == {**after, 'cost': 0}
  command = [sys.executable, '-m', 'slm.data.show', f'--data={prepared.out}', '--on=sft/train']
  done = subprocess.run([*command, '--row=1'], capture_output=True, text=True, check=True)
  marked = [part.partition('⟧')[0] for part in done.stdout.split('⟦')[1:]]
  data = loader.Split(prepared.out, 'sft', 'train')
  (row,) = data.read(np.array([1]))['trained']
  assert len(marked) == np.count_nonzero(np.diff(np.r_[0, row].astype(int)) == 1)
  assert all(part.endswith('<|im_end|>') for part in marked)
  done = subprocess.run([*command, '--row=999'], capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.startswith(
    'error: --row=999: sft/train has rows 0 to'
  )


def test_tokenizers_whose_end_has_no_text(tmp_path):
  """The byte tokenizer and a SentencePiece model alone, by the template tulu."""
  sets = {'s': {
    name: write(tmp_path / f'{name}.jsonl', [{'messages': TALKS[kind]}])
    for name, kind in (('train', 'system'), ('validation', 'turns'))
  }}  # fmt: skip
  sample = toy.documents(list(toy.TOPICS), 200, 0)
  tokenizer.build('sentencepiece', 400, '', sample, tmp_path / 'sp')
  for name, tok in (
    ('bytes', TokenizerConfig('bytes')),
    ('sp', TokenizerConfig(path=str(tmp_path / 'sp'))),
  ):
    cfg = fields(sets, tmp_path / name, tok, chat={'template': 'tulu'}, context=128)
    facts = prepare.prepare(cfg)['sets']['s']['validation']
    assert facts['documents'] == 1 and not facts['dropped']
    made = tokenizer.load(Path(cfg.out) / 'tokenizer')
    assert made.chat_template == chat.named('tulu', made)
    columns = loader.Split(cfg.out, 's', 'train').read(np.array([0]))
    (place,) = np.nonzero(columns['segments'][0] == 1)
    ids, trained = columns['tokens'][0, place], columns['trained'][0, place]
    assert ids[0] == made.ids.bos and ids[1] != made.ids.bos
    assert ids[-1] == made.ids.eos and made.decode(ids[trained > 0]) == 'ship'
    assert made.decode(ids) == '<|system|>\nShort.\n<|user|>\nthe tide\n<|assistant|>\nship'


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'text': 'x'}, "a.jsonl:1: expected the field 'messages', or 'prompt' and 'response'; the"),
    ({'messages': 'x'}, None),
    ({'messages': []}, "field 'messages': expected text, or messages with a role"),
    ({'messages': [{'role': 'user', 'content': 3}]}, 'expected text, or messages'),
    ({'prompt': 'x', 'response': 3}, "field 'response': expected text"),
  ],
)  # fmt: skip
def test_lines_that_hold_something_else_are_named(folders, tmp_path, record, message):
  path = write(tmp_path / 'a.jsonl', [record])
  tok = TokenizerConfig('huggingface', path=str(folders['chatml']))
  with pytest.raises(ValueError, match=message or 'no conversations left .1 no token would'):
    prepare.prepare(fields({'sft': {'train': path}}, tmp_path, tok))


def test_configs_that_do_not_fit_are_refused(folders, tmp_path):
  path = write(tmp_path / 'a.jsonl', SOURCE)
  tok = TokenizerConfig('huggingface', path=str(folders['chatml']))
  sets = {'sft': {'train': path}}
  for changes, message in (
    (
      {'chat': {'kind': 'talks'}},
      "chat.kind='talks': expected one of conversations, pairs, prompts",
    ),
    ({'chat': {'template': 'zephyr'}}, 'expected one of tulu, chatml, llama3'),
    ({'chat': {'too_long': 'keep'}}, 'expected truncate or drop'),
  ):
    with pytest.raises(ValueError, match=message):
      fields(sets, tmp_path, tok, **changes)
  with pytest.raises(ValueError, match='tokenizer.path is empty: conversations need the tokenizer'):
    fields(sets, tmp_path, TokenizerConfig())
  with pytest.raises(
    ValueError, match='--runner=direct: chat.kind=conversations is prepared on one'
  ):
    prepare.prepare(fields(sets, tmp_path, tok), runner='direct')
