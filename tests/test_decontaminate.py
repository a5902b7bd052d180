"""slm.data.decontaminate: planted leaks are found, clean text is silent, and rows are dropped."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from slm.data import contamination, decontaminate, sources, work

ROOT = Path(__file__).parent.parent
WORDS = [f'w{i}' for i in range(400)]


def write(path, rows):
  """Write rows as JSON lines, in the compression of the name."""
  data = '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b'\n'
  pack = {'.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(pack.get(path.suffix, bytes)(data))
  return str(path)


def text(rng, count):
  return ' '.join(rng.choice(WORDS, count))


@pytest.fixture
def corpus(tmp_path):
  """Write two evaluations, and training files with leaks at known rows."""
  rng = np.random.default_rng(0)
  questions = [text(rng, 20) for _ in range(100)]
  prompts = ['what is gravity?', *(text(rng, 30) for _ in range(49))]
  write(tmp_path / 'exam.jsonl', [{'id': f'e{i}', 'question': q} for i, q in enumerate(questions)])
  write(tmp_path / 'ask.jsonl.gz', [{'key': i, 'prompt': p} for i, p in enumerate(prompts)])
  turn = lambda role, content: {'role': role, 'content': content}
  chats = [
    {'messages': [turn('user', text(rng, 50)), turn('assistant', text(rng, 50))]} for _ in range(40)
  ]
  chats[3]['messages'] += [turn('user', f'Please: {questions[5].upper()}!')]
  chats[7]['messages'][1]['content'] = questions[6]  # in an answer
  chats[9]['messages'][0]['content'] = 'What is gravity'
  chats[11]['messages'] += [turn('user', f'{questions[7]}, and {questions[8]}')]
  pairs = [{'prompt': text(rng, 40), 'response': text(rng, 9)} for _ in range(30)]
  half = questions[9].split()
  pairs[1]['prompt'], pairs[2]['prompt'] = ' '.join(half[:10]), ' '.join(half[10:])
  pairs[4]['prompt'] = prompts[20]
  pairs[5]['response'] = prompts[21]
  write(tmp_path / 'chat/a.jsonl.zst', chats[:10])
  write(tmp_path / 'chat/b.jsonl.gz', chats[10:])
  write(tmp_path / 'pairs.jsonl', pairs)
  return tmp_path, questions, prompts


def request(root, **changes):
  named = {
    'train': (f'chat={root}/chat/*', f'{root}/pairs.jsonl'), 'out': f'{root}/out',
    'eval': (f'{root}/exam.jsonl', f'ask={root}/ask.jsonl.gz'), 'workers': 1,
  }  # fmt: skip
  return decontaminate.Request(**named | changes)


def hits(root, out='out'):
  """Return (evaluation, item, file, line, kind) of all matches."""
  found = [json.loads(line) for path in sorted((root / out / 'hits').glob('*.jsonl'))
           for line in path.read_text().splitlines()]  # fmt: skip
  return {(m['evaluation'], m['item'], Path(m['file']).name, m['line'], m['kind']) for m in found}


FOUND = {
  ('exam', 'e5', 'a.jsonl.zst', 4, 'overlap'), ('ask', '0', 'a.jsonl.zst', 10, 'equal'),
  ('exam', 'e7', 'b.jsonl.gz', 2, 'overlap'), ('exam', 'e8', 'b.jsonl.gz', 2, 'overlap'),
  ('ask', '20', 'pairs.jsonl', 5, 'overlap'),
}  # fmt: skip


def test_planted_leaks_are_found_and_nothing_else(corpus):
  root, questions, _ = corpus
  report = decontaminate.decontaminate(request(root))
  assert hits(root) == FOUND
  exam, ask = report['evaluations']['exam'], report['evaluations']['ask']
  assert (exam['items'], exam['overlapped'], exam['share'], exam['short']) == (100, 3, 0.03, 0)
  assert (ask['overlapped'], ask['short'], ask['equal']) == (1, 1, 1)
  assert exam['files'] == {f'{root}/chat/a.jsonl.zst': 1, f'{root}/chat/b.jsonl.gz': 2}
  assert exam['contaminated'] and ask['contaminated']  # 3 of 100, and 1 + 1 of 50
  training = report['training']
  assert training['chat'].items() >= {'rows': 40, 'documents': 42, 'matching_rows': 3}.items()
  assert training['chat']['contaminated'] == ['exam']
  assert training[f'{root}/pairs.jsonl']['contaminated'] == []  # 1 of 50 is not more than 2 %
  assert (report['rows'][0]['line'], report['rows'][0]['items']) == (2, 2)
  (match,) = (m for m in report['examples']['exam'] if m['item'] == 'e5')
  assert match['field'] == 'messages[2]' and match['score'] == 1.0
  assert match['spans'] == [
    {'item_field': 'question', 'item_tokens': [0, 20], 'training_token': 1, 'text': questions[5]}
  ]
  table = (root / 'out/report.md').read_text()
  assert (
    '| exam, contaminated | 100 | 3 | 3.00 % | 0 | 0 | chat/b.jsonl.gz (2), chat/a.json' in table
  )
  assert '| chat/b.jsonl.gz:2 | 2 | exam | e7 | 1.00 |' in table


def test_all_turns_and_named_fields(corpus):
  root, _, _ = corpus
  train = (f'{root}/chat/*', f'{root}/pairs.jsonl:prompt+response')
  decontaminate.decontaminate(request(root, train=train, rule=contamination.Rule(turns='all')))
  more = {
    ('exam', 'e6', 'a.jsonl.zst', 8, 'overlap'), ('ask', '21', 'pairs.jsonl', 6, 'overlap'),
  }  # fmt: skip
  assert hits(root) == FOUND | more


@pytest.mark.parametrize('copies, contaminated', [(2, False), (3, True)])
def test_two_percent_are_not_too_much_and_locked_evaluations_end_with_status_1(
  copies, contaminated, tmp_path
):
  rng = np.random.default_rng(1)
  questions = [text(rng, 12) for _ in range(100)]
  exam = write(tmp_path / 'exam.jsonl', [{'question': q} for q in questions])
  train = write(tmp_path / 'train.jsonl', [{'text': q} for q in questions[:copies]])
  command = [sys.executable, '-m', 'slm.data.decontaminate', f'--train={train}', '--workers=1']
  command += [f'--eval={exam}', f'--out={tmp_path}/out', '--locked=exam']
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert f'exam: {copies} of 100 items overlapped ({copies}.00 %), 0 of 0' in done.stdout
  assert done.returncode == contaminated
  assert (
    json.loads((tmp_path / 'out/report.json').read_text())['evaluations']['exam']['contaminated']
    is contaminated
  )
  if contaminated:
    assert done.stderr.splitlines()[-1] == (
      'error: --locked=exam: 3 of 100 items are in the training text, over 2 %; see '
      f'{tmp_path}/out/report.md'
    )


def lines(path):
  return [*sources.raw_lines(str(path))]


def test_rows_that_match_are_dropped_and_the_others_kept_byte_for_byte(corpus):
  root, _, _ = corpus
  odd = b'\xef\xbb\xbf{"prompt":  "\xc3\xa9 x",\t"response": 1.50}\r\n\n'  # kept as it is
  pairs = root / 'pairs.jsonl'
  pairs.write_bytes(odd + pairs.read_bytes().rstrip(b'\n'))
  report = decontaminate.decontaminate(request(root, action='drop-rows'))
  before = {path: lines(path) for path in (*(root / 'chat').iterdir(), pairs)}
  gone = {'a.jsonl.zst': {4, 10}, 'b.jsonl.gz': {2}, 'pairs.jsonl': {7}}
  for path, old in before.items():
    clean = root / 'out/clean' / path.relative_to(root)
    kept = [line for i, line in enumerate(old, 1) if i not in gone[path.name]]
    assert lines(clean) == kept
    blank = sum(not line.strip() for line in kept)
    counts = {'kept': len(kept) - blank, 'dropped': len(gone[path.name])}
    assert report['clean'][str(path)] == counts
  assert lines(root / 'out/clean/pairs.jsonl')[0] + b'\n' == odd
  clean = (f'{root}/out/clean/chat/*', f'{root}/out/clean/pairs.jsonl')
  decontaminate.decontaminate(request(root, train=clean, out=f'{root}/again'))
  assert hits(root, 'again') == set()


def test_contaminated_sets_are_named(corpus):
  root, _, _ = corpus
  report = decontaminate.decontaminate(request(root, action='drop-set'))
  assert report['dropped'] == ['chat']
  assert (root / 'out/dropped.txt').read_text() == 'chat\n'
  assert (root / 'out/kept.txt').read_text() == f'{root}/pairs.jsonl\n'


def test_numbers_masked_are_counted_apart_and_drop_nothing(tmp_path):
  ask = 'Tom has {} apples and he buys {} more so how many has he'
  exam = write(tmp_path / 'exam.jsonl', [{'question': ask.format(3, 12)}, {'question': 'x'}])
  train = write(tmp_path / 'train.jsonl', [{'text': ask.format(5, '1,000')}, {'text': 'y'}])
  rule = contamination.Rule(mask_numbers=True)
  done = decontaminate.decontaminate(
    request(tmp_path, train=(train,), eval=(exam,), rule=rule, action='drop-rows')
  )
  facts = done['evaluations']['exam']
  assert (facts['overlapped'], facts['masked'], facts['contaminated']) == (0, 1, False)
  assert hits(tmp_path) == {('exam', '1', 'train.jsonl', 1, 'masked')}
  assert done['clean'][train] == {'kept': 2, 'dropped': 0}
  assert '| exam | 2 | 0 | 0.00 % | 1 | 0 | 1 |' in (tmp_path / 'out/report.md').read_text()


def test_words_around_a_question_are_stripped(tmp_path):
  question = 'one two three four five six seven'
  items = [{'query': f'Question: {question}?\nAnswer:'}, {'context_options': [question, question]}]
  exam = write(tmp_path / 'exam.jsonl', items)
  train = write(tmp_path / 'train.jsonl', [{'text': question}])
  rule = contamination.Rule(strip=r'^Question: |\nAnswer:$')
  make = lambda out, **more: decontaminate.decontaminate(
    request(tmp_path, train=(train,), eval=(exam,), out=f'{tmp_path}/{out}', **more)
  )['evaluations']['exam']
  assert (make('a')['equal'], make('b', rule=rule)['equal']) == (0, 1)


def test_text_files_are_read_with_their_lines(tmp_path, monkeypatch):
  rng = np.random.default_rng(2)
  question = text(rng, 12)
  exam = write(tmp_path / 'exam.jsonl', [{'question': question}])
  monkeypatch.setattr(sources, '_TEXT_DOCUMENT', 100)
  (tmp_path / 'a.txt').write_text(f'{text(rng, 60)}\n\nhere\n{question}\n')
  decontaminate.decontaminate(request(tmp_path, train=(f'{tmp_path}/a.txt',), eval=(exam,)))
  assert hits(tmp_path) == {('exam', '1', 'a.txt', 3, 'overlap')}


def test_it_continues_by_file_and_refuses_other_inputs(corpus, monkeypatch):
  root, _, _ = corpus
  scan, read = contamination.scan, []

  def counted(task):
    if len(read) == 2:
      raise OSError('killed')
    read.append(task.source.path)
    return scan(task)

  monkeypatch.setattr(contamination, 'scan', counted)
  with pytest.raises(OSError, match='killed'):
    decontaminate.decontaminate(request(root))
  monkeypatch.setattr(contamination, 'scan', scan)
  stamps = {path: path.stat().st_mtime_ns for path in (root / 'out/hits').iterdir()}
  assert len(stamps) == 4
  decontaminate.decontaminate(request(root))
  assert hits(root) == FOUND
  decontaminate.decontaminate(request(root, action='drop-rows'))  # reads nothing again
  assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
  with pytest.raises(
    ValueError, match=r"out holds what other .*: rule.turns was 'user', now 'all'"
  ):
    decontaminate.decontaminate(request(root, rule=contamination.Rule(turns='all')))
  with (root / 'exam.jsonl').open('a') as f:
    f.write('{"question": "more"}\n')
  with pytest.raises(ValueError, match=r'holds what other files or settings gave: contents\.'):
    decontaminate.decontaminate(request(root))


def test_damaged_matches_are_refused(corpus):
  root, _, _ = corpus
  decontaminate.decontaminate(request(root))
  path = root / 'out/hits/00000.jsonl'
  path.write_bytes(path.read_bytes().replace(b'overlap', b'overlaq'))
  with pytest.raises(ValueError, match='is not as it was written: delete .*00000.json and run'):
    decontaminate.decontaminate(request(root))


def test_several_workers_find_the_same(corpus):
  root, _, _ = corpus
  decontaminate.decontaminate(request(root))
  decontaminate.decontaminate(request(root, workers=2, out=f'{root}/two'))
  names = [path.name for path in sorted((root / 'out/hits').glob('*.jsonl'))]
  for name in [f'hits/{name}' for name in names] + ['report.md']:
    assert (root / 'out' / name).read_bytes() == (root / 'two' / name).read_bytes()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'train': ('{root}/none/*',)}, r'none/\*: no file matches'),
    ({'train': ('tfds:c4/en?split=train',)}, 'expected files of JSON lines or text'),
    ({'train': ('{root}/pairs.jsonl:body',)}, r"pairs.jsonl:1: no field 'body'; the line has pro"),
    ({'train': ('{root}/odd.jsonl',)}, r'odd.jsonl:1: no field with text; name it, as FILE:FIELD'),
    ({'train': ('{root}/odd.jsonl:body',)}, "odd.jsonl:1: field 'body' is int, expected text"),
    ({'train': ('{root}/odd.jsonl:list',)}, r'odd.jsonl:1: list\[0\]: expected text, or a'),
    ({'train': ('{root}/pairs.jsonl', '{root}/p*')}, 'pairs.jsonl: is named twice'),
    ({'eval': ('{root}/exam.jsonl', '{root}/chat/../exam.jsonl')}, 'two evaluations are called'),
    ({'eval': ('{root}/empty.jsonl',)}, 'empty.jsonl: expected items of empty, found none'),
    ({'locked': ('exams',)}, '--locked=exams: no such evaluation; did you mean exam?'),
    ({'train': ('{root}/a.txt',), 'action': 'drop-rows'}, 'a.txt: rows are dropped from JSON'),
  ],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_it(changes, message, corpus):
  root, _, _ = corpus
  write(root / 'odd.jsonl', [{'body': 1, 'list': [2]}])
  (root / 'empty.jsonl').write_text('\n')
  (root / 'a.txt').write_text('text')
  filled = {
    key: tuple(x.format(root=root) for x in value) if isinstance(value, tuple) else value
    for key, value in changes.items()
  }
  with pytest.raises((ValueError, OSError), match=message):
    decontaminate.decontaminate(request(root, **filled))


def test_a_wrong_expression_is_refused():
  with pytest.raises(ValueError, match=re.escape('--strip=(: not a regular expression')):
    contamination.Rule(strip='(')


def test_complete_copies_are_known(corpus):
  root, _, _ = corpus
  decontaminate.decontaminate(request(root, action='drop-rows'))
  (root / 'out/clean/pairs.jsonl').unlink()
  assert not work.complete(root / 'out/hits/00002-clean.json')
  decontaminate.decontaminate(request(root, action='drop-rows'))
  assert (root / 'out/clean/pairs.jsonl').exists()
