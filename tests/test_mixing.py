"""Mixes of conversations, preference pairs and prompts with labels."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_conversations import SAY, bpe, fields, write

from slm.data import chat, conversations, loader, masking, mix, prepare, rows, show, tokenizer
from slm.data.settings import ChatConfig, TokenizerConfig


@pytest.fixture(scope='module')
def tok(tmp_path_factory) -> TokenizerConfig:
  folder = bpe(tmp_path_factory.mktemp('mix') / 'tok', chat.TEMPLATES['chatml'])
  return TokenizerConfig('huggingface', path=str(folder))


def say(count: int, name: str) -> list[dict]:
  return [{'q': f'{name} {i}?', 'a': 'ship ' * (1 + i % 3)} for i in range(count)]


FIELDS = 'prompt=q&response=a'


def texts(out: str, name: str = 's', split: str = 'train') -> list[str]:
  """Return the text of every segment of a split."""
  data, made = loader.Split(out, name, split), tokenizer.load(Path(out) / 'tokenizer')
  columns = data.read(data.ids)
  return [
    made.written(tokens[segments == i])
    for tokens, segments in zip(columns['tokens'], columns['segments'], strict=True)
    for i in range(1, segments.max() + 1)
  ]


def test_a_mix_takes_whole_copies_and_then_a_seeded_sample(tok, tmp_path, capsys):
  sizes = {'a': 10, 'b': 7, 'c': 20}
  paths = {name: write(tmp_path / f'{name}.jsonl', say(n, name)) for name, n in sizes.items()}
  spec = f'{paths["a"]}?{FIELDS}&fraction=2.5; {paths["b"]}?{FIELDS}&rows=16;'
  spec += f'{paths["c"]}?{FIELDS}&fraction=0.25'
  held_out = write(tmp_path / 'held-out.jsonl', say(3, 'd'))
  sets = {'s': {'train': spec, 'validation': f'{held_out}?{FIELDS}'}}
  taken = []
  for seed in (0, 0, 1):
    cfg = fields(sets, tmp_path / str(len(taken)), tok, seed=seed, workers=1 + len(taken) % 2)
    facts = prepare.prepare(cfg)['sets']['s']
    made = texts(cfg.out)
    counts = {
      name: [sum(f'{name} {i}?' in text for text in made) for i in range(n)]
      for name, n in sizes.items()
    }
    assert sorted(counts['a']) == [2] * 5 + [3] * 5 and sum(counts['b']) == 16
    assert sorted(counts['b']) == [2] * 5 + [3] * 2 and sorted(counts['c']) == [0] * 15 + [1] * 5
    mixed = facts['train']['mix']
    assert [part['source'] for part in mixed] == list(paths.values())
    assert [part['documents'] for part in mixed] == [10, 7, 20]
    assert [part['taken'] for part in mixed] == [part['prepared'] for part in mixed] == [25, 16, 5]
    assert sum(part['tokens'] for part in mixed) == facts['train']['tokens']
    assert facts['validation']['documents'] == 3
    taken.append(counts)
  assert taken[0] == taken[1] != taken[2]
  table = (Path(cfg.out) / 'mix.md').read_text()
  assert table in capsys.readouterr().out
  assert f'| s/train | `{paths["a"]}` | 10 | 25 | 2.50 | 54.3% | 25 | ' in table
  svg = (Path(cfg.out) / 'mix.svg').read_text()
  assert 'c.jsonl' in svg and 'trained tokens' in svg
  mix.write(tmp_path, 'conversations', {f's/{split}': facts[split]['mix'] for split in facts})
  assert (tmp_path / 'mix.svg').read_text() == svg


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('A?fraction=1;B', 'B: expected fraction or rows, .* found neither'),
    ('A;B?rows=3', 'A: expected fraction or rows, .* found neither'),
    ('A?fraction=1&rows=3', 'A: expected fraction or rows, .* found both'),
    ('A?rows=1.5', "A: expected fraction, a number above 0, or rows, a whole.*found '1.5'"),
    ('A?fraction=0', "found '0'"),
    ('A?fraction=nan', "found 'nan'"),
    ('A?share=1', "A: has no key 'share'; expected one of fraction, rows, "),
    ('A?kind=pairs', "has no key 'kind'"),
  ],
)
def test_amounts_that_say_nothing_or_two_things_are_refused(spec, message):
  with pytest.raises(ValueError, match=message):
    conversations.parse(spec, ChatConfig('conversations'))


def test_one_source_is_taken_whole_and_a_glob_may_have_a_question_mark():
  (source,) = conversations.parse('dir/part-?.jsonl', ChatConfig('conversations'))
  assert source.path == 'dir/part-?.jsonl' and source.rows is source.fraction is None


PAIRS = [
  {'prompt': f'the tide {i}', 'chosen': 'ship ' * (1 + i % 4), 'rejected': 'rope and anchor'}
  for i in range(12)
]


def test_a_pair_is_two_segments_of_one_row(tok, tmp_path):
  prompt = [SAY('system', 'Short.'), SAY('user', 'sail?')]
  more = [
    {'chosen': [*prompt, SAY('assistant', 'yes')], 'rejected': [*prompt, SAY('assistant', 'no')]},
    {'prompt': 'sail', 'chosen': [SAY('user', 'sail'), SAY('assistant', 'a')], 'rejected': 'b'},
    {'prompt': 'x', 'chosen': 'same', 'rejected': 'same'},
    {'prompt': 'anchor ' * 80, 'chosen': 'late', 'rejected': 'later'},
    {'prompt': 'x', 'chosen': 'rope ' * 200, 'rejected': 'short'},
  ]
  path = write(tmp_path / 'pairs.jsonl', [*PAIRS, *more])
  cfg = fields({'s': {'train': path}}, tmp_path, tok, chat={'kind': 'pairs'})
  manifest = prepare.prepare(cfg)
  facts = manifest['sets']['s']['train']
  assert manifest['pairs'] is True
  assert facts['dropped'] == {'untrained': 1, 'tied': 1}
  assert facts['documents'] == 15 and facts['notes'] == {'truncated': 1, 'cut_answers': 1}
  data, made = loader.Split(cfg.out, 's', 'train'), tokenizer.load(Path(cfg.out) / 'tokenizer')
  columns, seen = data.read(data.ids), []
  pairs = columns['segments'].max(axis=1) / 2
  assert facts['pairs_per_row'] == pairs.max() > 1 and (data.counts[:, 0] == pairs).all()
  for row, number in ((r, n) for r, count in enumerate(pairs.astype(int)) for n in range(count)):
    sides = []
    for segment in (2 * number + 1, 2 * number + 2):
      (place,) = np.nonzero(columns['segments'][row] == segment)
      assert (np.diff(place) == 1).all()
      mask = columns['trained'][row, place] > 0
      answer = made.written(columns['tokens'][row, place[mask]])
      sides.append((made.written(columns['tokens'][row, place[~mask]]), answer))
    if sides[0][0].startswith('<|im_start|>user\nx'):  # a cut answer
      assert sides[0][1].startswith('rope ') and not sides[0][1].endswith('<|im_end|>')
      assert len(np.nonzero(columns['segments'][row])[0]) == 96
      continue
    assert sides[0][0] == sides[1][0] and sides[0][1] != sides[1][1]
    seen.append((sides[0][1], sides[1][1]))
  for pair in (('yes', 'no'), ('a', 'b'), ('ship ship ', 'rope and anchor')):
    assert tuple(f'{answer}<|im_end|>' for answer in pair) in seen
  dropped = fields({'s': {'train': path}}, tmp_path / 'd', tok,
                   chat={'kind': 'pairs', 'too_long': 'drop'})  # fmt: skip
  facts = prepare.prepare(dropped)['sets']['s']['train']
  assert facts['dropped']['too_long'] == 2 and facts['documents'] == 14 and not facts['notes']


def test_pairs_that_would_train_nothing_or_repeat_the_prompt_are_dropped(tok, tmp_path):
  """Answers that are one once they are cut; an answer that has the prompt in other words."""
  rope = 'rope ' * 200
  again = [SAY('user', 'The tide?'), SAY('assistant', 'ship')]
  lines = [
    {'prompt': 'x', 'chosen': f'{rope}ship', 'rejected': f'{rope}anchor'},
    {'prompt': 'the tide?', 'chosen': again, 'rejected': 'rope'},
    *PAIRS[:2],
  ]
  path = write(tmp_path / 'pairs.jsonl', lines)
  cfg = fields({'s': {'train': path}}, tmp_path, tok, chat={'kind': 'pairs'})
  facts = prepare.prepare(cfg)['sets']['s']['train']
  assert facts['documents'] == 2 and facts['dropped'] == {'tied': 1, 'unproved': 1}
  assert "the chosen answer begins with a turn of 'user'" in facts['why']['unproved']


@pytest.mark.parametrize('kind', ['conversations', 'pairs'])
def test_lines_that_ask_the_same_are_held_out_together(tok, tmp_path, kind):
  """Else what is held out is asked in training, with another answer."""
  answers = {'conversations': lambda i: {'response': f'ship {i}'},
             'pairs': lambda i: {'chosen': f'ship {i}', 'rejected': 'rope'}}[kind]  # fmt: skip
  lines = [{'prompt': f'the tide {n}?', **answers(i)} for n in range(30) for i in range(3)]
  path = write(tmp_path / 'a.jsonl', lines)
  cfg = fields({'s': {'all': path}}, tmp_path, tok, chat={'kind': kind}, heldout=(0.4, 0.0))
  prepare.prepare(cfg)
  made, found = tokenizer.load(Path(cfg.out) / 'tokenizer'), {}
  for split in ('train', 'validation'):
    data = loader.Split(cfg.out, 's', split)
    text = ''.join(made.written(row) for row in data.read(data.ids)['tokens'])
    found[split] = set(re.findall(r'the tide \d+', text))
  assert min(map(len, found.values())) > 5 and len(found['train'] | found['validation']) == 30
  assert not found['train'] & found['validation']


def test_a_run_knows_the_labels_of_its_prompts(tok, tmp_path):
  """Prompts with other labels are other rows, on which a run does not continue."""
  hashes = []
  for name, label in (('one', '1'), ('same', '1'), ('other', '2')):
    path = write(tmp_path / f'{name}.jsonl', [{'prompt': 'sail', 'label': label, 'verifier': 'x'}])
    cfg = fields({'s': {'train': path}}, tmp_path / name, tok, chat={'kind': 'prompts'})
    prepare.prepare(cfg)
    hashes.append(loader.Split(cfg.out, 's', 'train').sha256)
  assert hashes[0] == hashes[1] != hashes[2]
  path = Path(cfg.out) / 's/train/labels.jsonl'
  path.write_text(path.read_text().replace('"2"', '"3"'))
  with pytest.raises(ValueError, match='labels.jsonl: is not as it was written: slm.data.prepare'):
    loader.Split(cfg.out, 's', 'train').labels()


PROMPTS = [
  *({'q': f'{i} + {i}?', 'final': str(2 * i), 'instruction': 'x'} for i in range(9)),
  {'q': 'anchor ' * 200, 'final': '0'},
]


def test_prompts_have_a_row_each_and_labels_beside_them(tok, tmp_path, capsys):
  sums = write(tmp_path / 'sums.jsonl', PROMPTS)
  limits = [{'id': 'words', 'kwargs': {'most': 3}}, {'id': 'é', 'kwargs': {}}]
  other = write(tmp_path / 'if.jsonl', [
    {'messages': [SAY('system', 'Short.'), SAY('user', 'sail')],
     'ids': [x['id'] for x in limits], 'kwargs': [x['kwargs'] for x in limits]},
  ])  # fmt: skip
  spec = f'{sums}?prompt=q&label=final&verifier_id=gsm8k&fraction=1;'
  spec += f'{other}?label=kwargs&verifier=ids&rows=2'
  cfg = fields({'s': {'train': spec}}, tmp_path, tok, chat={'kind': 'prompts'}, context=32)
  manifest = prepare.prepare(cfg)
  facts = manifest['sets']['s']['train']
  assert facts['documents'] == facts['rows'] == 11 and facts['dropped'] == {'too_long': 1}
  assert not manifest['pairs'] and 'labels.jsonl' in facts['files']
  data, made = loader.Split(cfg.out, 's', 'train'), tokenizer.load(Path(cfg.out) / 'tokenizer')
  columns, labels = data.read(data.ids), data.labels()
  assert [label['row'] for label in labels] == list(range(11))
  for i in range(11):
    (length,) = columns['length'][i]
    text = made.written(columns['tokens'][i, :length])
    assert text.endswith('<|im_start|>assistant\n') and not columns['tokens'][i, length:].any()
    (first, *others) = labels[i]['verifiers']
    if 'Short.' in text:
      assert first == {'id': 'words', 'args': {'most': 3}}
      assert others == [{'id': 'é', 'args': {}}]
    else:
      number = text.partition('user\n')[2].partition(' ')[0]
      assert first == {'id': 'gsm8k', 'args': str(2 * int(number))} and not others
  batches = loader.build(
    loader.DataConfig(cfg.out, 's', batch_size=4, accum=2), tokenizer=made.fingerprint
  )
  batch = next(batches)
  assert batch['row'].shape == (2, 2, 1) and batch['length'].shape == (2, 2, 1, 1)
  tokens = data.read(batch['row'].ravel())['tokens']
  assert (tokens == batch['inputs'].reshape(4, -1)).all()
  show.row(cfg.out, 's/train', 0)
  assert json.dumps(labels[0]['verifiers'], ensure_ascii=False) in capsys.readouterr().out
  (data.path / 's/train/labels.jsonl').write_text('')
  with pytest.raises(ValueError, match='labels.jsonl: has 0 bytes'):
    loader.Split(cfg.out, 's', 'train')
  prepare.prepare(cfg)
  assert loader.Split(cfg.out, 's', 'train').labels() == labels
  path = next((Path(cfg.out) / 'windows').rglob('*.labels.jsonl'))
  path.write_bytes(path.read_bytes()[::-1])  # of the same size
  prepare.prepare(cfg, verify=True)
  assert f'{path}: is not as it was written: it is made again' in capsys.readouterr().err
  assert loader.Split(cfg.out, 's', 'train').labels() == labels


@pytest.mark.parametrize(
  ('kind', 'record', 'message'),
  [
    ('pairs', {'chosen': 'a', 'rejected': 'b'}, "expected the field 'prompt', or answers that"),
    ('pairs', {'prompt': 'a', 'chosen': 'b'}, "no field 'rejected'; the line has chosen, prompt"),
    ('prompts', {'prompt': 'a'}, "no field 'label'"),
    ('prompts', {'prompt': 'a', 'label': 1}, "no field 'verifier'"),
    ('prompts', {'prompt': 'a', 'label': 1, 'verifier': ['x']}, 'expected the id of a verifier in'),
    ('prompts', {'label': '1', 'verifier': 'x'}, "no field 'prompt'"),
  ],
)
def test_lines_that_lack_something_are_named(tok, tmp_path, kind, record, message):
  path = write(tmp_path / 'a.jsonl', [record])
  with pytest.raises(ValueError, match=f'a.jsonl:1: {message}'):
    prepare.prepare(fields({'s': {'train': path}}, tmp_path, tok, chat={'kind': kind}))


def test_weights_are_checked_and_scale_the_loss(tok, tmp_path):
  path = write(tmp_path / 'a.jsonl', [{'prompt': 'x', 'response': 'y', 'w': 0.25}])
  cfg = fields({'s': {'train': path}}, tmp_path / '1', tok, chat={'weight': 'w'})
  prepare.prepare(cfg)
  batch = rows.batch(loader.Split(cfg.out, 's', 'train').read(np.array([0])))
  assert sorted(np.unique(batch['weights'])) == [0, 0.25]
  for i, wrong in enumerate((-1, 'x', None, True)):
    path = write(tmp_path / f'{i}.jsonl', [{'prompt': 'x', 'response': 'y', 'w': wrong}])
    with pytest.raises(ValueError, match="field 'w': expected a weight of at least 0"):
      prepare.prepare(fields({'s': {'train': path}}, tmp_path / f'o{i}', tok, chat={'weight': 'w'}))


def test_reasons_have_words():
  assert all(str(masking.Dropped(reason)) for reason in masking.REASONS)
