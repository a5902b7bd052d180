"""Data without a judge: constraints, arithmetic, tasks of reasoning-gym, and answers checked."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from slm.base import artifact
from slm.data import constraints, conversations, settings, synthesis
from slm.inference import answering, verifiers
from slm.inference.verifiers import words
from slm.runs import ledger

WORDS = ('a', 'big', 'cow', 'had', 'jumped', 'very', 'kind', 'fox', 'quite', 'lazy', 'moon', 'up')
PROMPT = 'Name a ship'


def write_lines(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def satisfying(chosen, labels):
  """Write a text that satisfies constraints without a language, whatever their combination."""
  args = {x.id.partition(':')[2]: x.args for x in chosen}
  get = lambda kind, name, default=0: args.get(kind, {}).get(name, default)
  more = lambda kind, relation: get(kind, relation, '') in ('at least', 'exactly')
  avoid = [*get('forbidden_words', 'forbidden_words', []), get('letter_frequency', 'letter', '-')]
  fill = [w for w in WORDS if not any(x in w or w in x for x in avoid)]
  kept = list(get('existence', 'keywords', []))
  if more('frequency', 'relation'):
    kept += [get('frequency', 'keyword')] * get('frequency', 'frequency')
  title = f' <<{fill[0]}>>' * ('title' in args)
  whole = {
    'constrained_response': constraints.OPTIONS[0],
    'json_format': json.dumps({'words': ' '.join(kept)}),
    'repeat_prompt': ' '.join([PROMPT, *kept]) + title,
    'two_responses': ' '.join(['one', *kept]) + title + '\n******\nother',
  }
  for kind in whole.keys() & args:
    return whole[kind]
  if more('letter_frequency', 'let_relation'):
    kept += [get('letter_frequency', 'letter')] * get('letter_frequency', 'let_frequency')
  if more('capital_word_frequency', 'capital_relation'):
    kept += [fill[1].upper()] * get('capital_word_frequency', 'capital_frequency')
  if more('number_words', 'relation'):
    kept += [fill[0]] * get('number_words', 'num_words')
  kept += [f'[{fill[0]}]'] * get('number_placeholders', 'num_placeholders')
  kept += [f'*{fill[0]}*'] * get('number_highlighted_sections', 'num_highlights')
  text = ' '.join([fill[0], *kept])
  if more('number_sentences', 'relation'):
    text += '?' + f' {fill[1].capitalize()} {fill[2]}?' * get('number_sentences', 'num_sentences')
  text += title + f'\n* {fill[0]}' * get('number_bullet_lists', 'num_bullets')
  if 'postscript' in args:  # what follows it is a sentence of its own in the evaluation
    after = fill[0] if labels in constraints.TRAINED or 'number_sentences' not in args else ''
    text += f'\n{get("postscript", "postscript_marker")} {after}'
  return _arranged(text, args, fill[0], '* * *' if labels in constraints.TRAINED else '***')


def _arranged(text, args, word, divider):
  """Put a text into sections, paragraphs, quotation marks and capitals."""
  get = lambda kind, name, default=0: args.get(kind, {}).get(name, default)
  text += '\n' + get('end_checker', 'end_phrase', '')
  if 'number_paragraphs' in args:
    text = f'{word}\n{divider}\n' * (get('number_paragraphs', 'num_paragraphs') - 1) + text
  splitter = get('multiple_sections', 'section_spliter')
  size = get('multiple_sections', 'num_sections')
  sections = ''.join(f'{splitter} {i + 1}\n{word}\n' for i in range(size))
  if 'nth_paragraph_first_word' in args:
    parts = [word] * get('nth_paragraph_first_word', 'num_paragraphs')
    i = get('nth_paragraph_first_word', 'nth_paragraph') - 1
    parts[i] = get('nth_paragraph_first_word', 'first_word')
    parts[0] = f'{parts[0]} {sections}' if i == 0 else f'{sections} {parts[0]}'
    text = '\n\n'.join(x.strip() for x in parts) + ' ' + text
  else:
    text = sections + text
  text = f'"{text}"' if 'quotation' in args else text
  text = text.upper() if 'english_capital' in args else text
  return text.strip().lower() if 'english_lowercase' in args else text.strip()


@pytest.mark.parametrize('labels', constraints.LABELS)
def test_a_text_satisfies_every_prompt_and_not_without_effort(labels, monkeypatch):
  """That one can be written proves that no constraints of a prompt contradict each other."""
  monkeypatch.setattr(words, 'language', lambda text: 'en')
  rng, failed = random.Random(0), 0
  for _ in range(800):
    _, chosen = constraints.attach(rng, PROMPT, rng.randint(1, 3), labels=labels)
    ids = [x.id for x in chosen]
    assert not any(constraints.conflict(a, b) for a in ids for b in ids if a is not b)
    checks = verifiers.read([constraints.labelled(x, labels) for x in chosen])
    if 'language:response_language' in ids:
      continue
    text = satisfying(chosen, labels)
    verdicts = verifiers.score(text, checks).verdicts
    assert all(v.value == 1 for v in verdicts), (chosen, text, verdicts)
    failed += any(v.value == 0 for v in verifiers.score('Hm, well, Ok', checks).verdicts)
  assert failed > 400


@pytest.mark.parametrize(
  ('a', 'b'),
  [
    (('keywords:existence', {'keywords': ['amber', 'stone']}),
     ('keywords:forbidden_words', {'forbidden_words': ['stone', 'zebra']})),
    (('keywords:letter_frequency',
      {'letter': 'q', 'let_frequency': 2, 'let_relation': 'less than'}),
     ('startend:end_checker', {'end_phrase': 'Any other questions?'})),
    (('change_case:english_lowercase', {}),
     ('detectable_format:multiple_sections', {'section_spliter': 'Section', 'num_sections': 2})),
    (('punctuation:no_comma', {}), ('combination:repeat_prompt', {'prompt_to_repeat': 'A, B'})),
    (('change_case:capital_word_frequency',
      {'capital_frequency': 1, 'capital_relation': 'less than'}),
     ('detectable_content:postscript', {'postscript_marker': 'P.S.'})),
  ],
)  # fmt: skip
def test_contradicting_arguments_are_found_in_either_order(a, b):
  a, b = constraints.Constraint(*a, ''), constraints.Constraint(*b, '')
  assert constraints.contradict(a, b) and constraints.contradict(b, a)


def test_sentences_say_what_trained_labels_check():
  said = {}
  for seed in range(40):
    for kind in constraints.KINDS:
      drawn = constraints.draw(random.Random(seed), PROMPT, kind, 'tulu3_fixed')
      said.setdefault(kind, []).append(drawn)
  assert all('exactly' in x.sentence for x in said['keywords:frequency'])
  assert all('* * *' in x.sentence for x in said['length_constraints:number_paragraphs'])
  assert not any('less than' in x.sentence for found in said.values() for x in found)
  for x in said['length_constraints:number_words']:
    check = constraints.labelled(x, 'tulu3_fixed')['args']
    assert f'{check["quantifier"]} {check["N"]} words' in x.sentence


def test_constrained_prompts_are_rows_that_prepare_reads(tmp_path, monkeypatch):
  monkeypatch.setattr(words, 'language', lambda text: '')  # may not be installed
  asked = [{'question': f'Tell me about ship {i}.', 'answer': 'No.'} for i in range(40)]
  said = (('user', 'Hi'), ('assistant', 'Hello.'), ('user', 'A ship?'), ('assistant', 'No.'))
  talk = [{'role': role, 'content': text} for role, text in said]
  file = write_lines(tmp_path / 'asked.jsonl', [*asked, {'messages': talk}])
  make = lambda **more: list(
    synthesis.constrained(
      f'{file}?prompt=question',
      **{'rows': 0, 'seed': 0, 'labels': 'official', 'least': 2, 'most': 3, **more},
    )
  )
  rows = make()
  assert rows == make() != make(seed=1) and len(rows) == 41 and len(make(rows=7)) == 7
  quoted = make(kinds=['startend:quotation'], least=1, most=1)
  assert {*map(str, (row['verifier'] for row in quoted))} == {
    "['ifeval.official.startend:quotation']"
  }
  for row in rows:
    text = row['prompt'] if isinstance(row['prompt'], str) else row['prompt'][-1]['content']
    assert text == ' '.join([row['request'], *row['sentences']])
    assert len(row['verifier']) == len(row['label']) == len(row['sentences'])
  (whole,) = [row['prompt'] for row in rows if isinstance(row['prompt'], list)]
  assert whole[:-1] == talk[:2] and whole[-1]['content'].startswith('A ship? ')
  out = str(tmp_path / 'rows.jsonl')
  assert synthesis.write(iter(rows), out) == 41
  first = Path(out).read_bytes()
  assert synthesis.write(iter(rows), out) == 41 and Path(out).read_bytes() == first
  with pytest.raises(ValueError, match='holds other rows'):
    synthesis.write(iter(make(seed=1)), out)
  found = answering.read(out, 0, relax=True)
  assert any(p.relaxed for p in found) and all(p.checks for p in found)
  for row, p in zip(rows, found, strict=True):
    if p.relaxed:  # all but the sentence that was dropped
      kept = [x for i, x in enumerate(row['sentences']) if i != p.dropped]
      assert p.relaxed[-1]['content'] == ' '.join([row['request'], *kept])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'labels': 'tulu'}, '--labels=tulu: expected one of official'),
    ({'least': 3, 'most': 2}, 'expected 1 <= least <= most <= 25'),
    ({'kinds': ['punctuation:no_comma']}, 'expected 1 <= least <= most <= 1'),
    ({'kinds': ['no_comma']}, '--task=no_comma: expected one of keywords:existence'),
    ({'rows': 9}, '--rows=9: .* has 1 prompts'),
    ({'spec': '?fraction=0.5'}, 'expected one source of prompts, without fraction'),
    ({'spec': '?prompt=x'}, "no field 'x'"),
  ],
)  # fmt: skip
def test_bad_requests_for_constraints_are_one_line(change, message, tmp_path):
  file = write_lines(tmp_path / 'asked.jsonl', [{'prompt': 'A ship?'}])
  spec = file + change.pop('spec', '')
  options = {'rows': 0, 'seed': 0, 'labels': 'official', 'least': 1, 'most': 3, **change}
  with pytest.raises(ValueError, match=message):
    list(synthesis.constrained(spec, **options))


def solve(prompt):
  """Work out a problem in numbers, and some in words, from its text."""
  n = list(map(int, re.findall(r'\d+', prompt)))
  if found := re.search(r'What is (.+)\?', prompt.replace('times', '*').replace('divided by', '/')):
    return eval(found[1])  # noqa: S307 (of digits and operators)
  rules = {
    'Add': lambda: n[0] + n[1], 'Subtract': lambda: n[1] - n[0], 'Multiply': lambda: n[0] * n[1],
    'Divide': lambda: n[0] // n[1], 'Work out': lambda: eval(prompt[9:-1]),  # noqa: S307
    'give': lambda: n[0] + n[1] - n[2], 'boxes': lambda: n[0] * n[1] - n[2],
    'share': lambda: n[1] // n[0], 'change': lambda: n[2] - n[0] * n[1],
    'together': lambda: n[0] * (n[1] + 1), 'book has': lambda: n[0] - n[1] * n[2],
  }  # fmt: skip
  return next(rule for word, rule in rules.items() if word in prompt)()


def test_arithmetic_has_the_right_answers():
  rows = list(synthesis.arithmetic(660, 3))
  assert rows == list(synthesis.arithmetic(660, 3)) != list(synthesis.arithmetic(660, 4))
  assert len({row['prompt'] for row in rows}) == 660
  assert {row['source'] for row in rows} == {f'arithmetic/{k}' for k in synthesis.ARITHMETIC}
  for row in rows:
    (check,) = verifiers.read([{'id': row['verifier'], 'args': row['label']}])
    text = f'So we get {solve(row["prompt"])}.'
    assert verifiers.score(text, [check]).reward == 1, (row, text)
    assert verifiers.score(text.replace('.', '1.'), [check]).reward == 0
  with pytest.raises(ValueError, match='--task=roots: expected one of sum'):
    list(synthesis.arithmetic(1, 0, ['roots']))
  with pytest.raises(ValueError, match='hardly more problems'):
    list(synthesis.arithmetic(9000, 0, ['quotient']))


def test_tasks_of_reasoning_gym_are_answered_by_their_answers():
  pytest.importorskip('reasoning_gym')
  make = lambda seed: list(synthesis.gym(6, seed, ['gcd', 'syllogism']))
  rows = make(0)
  assert rows == make(0) != make(1)
  assert [row['verifier'] for row in rows] == ['gsm8k.numeric', 'exact'] * 3
  for row in rows:
    (check,) = verifiers.read([{'id': row['verifier'], 'args': row['label']}])
    answer = row['label'] if isinstance(row['label'], str) else row['label']['answer']
    assert verifiers.score(answer, [check]).reward == 1
    assert verifiers.score('neither', [check]).reward == 0
  for tasks, message in (([], 'no --task'), (['rubiks_cube'], '--task=rubiks_cube')):
    with pytest.raises(ValueError, match=f'{message}: expected tasks that are checked by'):
      list(synthesis.gym(1, 0, tasks))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Give a random model a chat template and a context of 600 tokens."""
  return str(toy.talking_run(tmp_path_factory.mktemp('answers') / 'run'))


def labelled(tmp_path):
  """Write prompts whose constraints random text meets or not, and one that is too long."""
  args = [{'unit': 'words', 'at_most': 4}, {'pattern': 'e', 'ignore_case': True}]
  said = ['Be brief.', 'Use an e.']
  row = lambda text: {
    'prompt': ' '.join([text, *said]), 'request': text, 'sentences': said,
    'verifier': ['length', 'regex'], 'label': args,
  }  # fmt: skip
  rows = [row(f'Ship {"sail " * (i % 3)}{i}') for i in range(9)]
  return write_lines(tmp_path / 'asked.jsonl', [*rows, row('tide ' * 500)])


HOW = {
  'count': 3, 'max_tokens': 24, 'temperature': 1.5, 'top_p': 1.0, 'seed': 0, 'batch_size': 16,
  'relax': True,
}  # fmt: skip


def test_interrupted_answers_continue_to_the_same_files(run, tmp_path, monkeypatch):
  monkeypatch.setattr(answering, '_SHARD', 4)
  file, ask = labelled(tmp_path), answering._ask
  counts = answering.write(run, file, str(tmp_path / 'whole'), **HOW)
  read = lambda name: {
    p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.suffix == '.jsonl'
  }
  calls = []

  def killed(*args, **more):
    calls.append(1)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return ask(*args, **more)

  with monkeypatch.context() as m:
    m.setattr(answering, '_ask', killed)
    with pytest.raises(KeyboardInterrupt):
      answering.write(run, file, str(tmp_path / 'halves'), **HOW)
  assert len(read('halves')) == 2
  assert answering.write(run, file, str(tmp_path / 'halves'), **HOW) == counts
  assert read('halves') == read('whole') and len(read('whole')) == 3 + len(answering.KEPT)
  assert counts['prompts'] == 10 and counts['too_long'] == 1 and counts['answers'] == 27
  summary = json.loads((tmp_path / 'whole' / 'summary.json').read_text())
  assert summary['counts'] == counts
  (spent,) = ledger.read_ledger(tmp_path / 'whole')['phases']
  assert summary['cost']['tokens'] == spent['tokens'] > 0 < spent['device_seconds']
  with pytest.raises(ValueError, match='other answers: seed was 0, now 1'):
    answering.write(run, file, str(tmp_path / 'whole'), **{**HOW, 'seed': 1})
  with (
    artifact.hold(tmp_path / 'held'),
    monkeypatch.context() as m,
    pytest.raises(ValueError, match='is being written by'),
  ):
    m.setattr(artifact, '_held', [])
    answering.write(run, file, str(tmp_path / 'held'), **HOW)
  for line in answering._lines(tmp_path / 'whole'):  # verdicts are those of the texts
    for answer in line['answers'] + line['relaxed']:
      score = verifiers.score(answer['text'], verifiers.read(line['verifiers']))
      assert answer['values'] == [v.value for v in score.verdicts]


def answer(text, *values, ended=True):
  return {'text': text, 'tokens': 1, 'ended': ended, 'values': list(values), 'undecided': 0}


def test_what_is_kept_of_answers_and_exhaustive_counts(tmp_path):
  line = lambda answers, relaxed=(), dropped=-1: {
    'prompt': [{'role': 'user', 'content': 'A ship?'}], 'verifiers': [], 'answers': list(answers),
    'dropped': dropped, 'relaxed': list(relaxed),
  }  # fmt: skip
  good, half, bad = answer('good', 1, 1), answer('half', 1, 0), answer('bad', 0, 0)
  cut, blank = answer('good and', 1, 1, ended=False), answer(' ', 1, 1)
  lines = [
    line([bad, half, good, good, cut], [good, answer('lacks it', 0, 1), bad], 0),
    line([bad, half, blank], [bad], 1),  # none passes
    line([good, answer('fine', 1, 1)], [good], 1),  # all pass; the relaxed one violates nothing
    line([cut, blank]),
    line([]),
  ]
  write_lines(tmp_path / 'answers-00000000.jsonl', lines)
  counts = answering.select(tmp_path, 0)
  n = counts.__getitem__
  states = ('too_long', 'unusable', 'none_pass', 'all_pass', 'mixed')
  assert [n(x) for x in states] == [1, 1, 1, 1, 1] and n('prompts') == 5
  kinds = [n(x) for x in ('cut', 'blank', 'passing', 'failing')]
  assert kinds == [2, 2, 4, 4] and sum(kinds) == n('answers') == 12
  assert (
    n('relaxable') == 3 == n('kept_relaxed') + n('relaxed_none_pass') + n('relaxed_none_violates')
  )
  rows = {
    name: [json.loads(x) for x in (tmp_path / f'{name}.jsonl').read_text().splitlines()]
    for name in answering.KEPT
  }
  said = lambda messages: messages[-1]['content']
  assert [said(x['messages']) for x in rows['best']] == ['good', 'half', 'good']
  assert [said(x['messages']) for x in rows['passing']] == ['good', 'good', 'fine']
  ((pair,), (relaxed,)) = rows['pairs'], rows['relaxed']
  assert said(pair['chosen']) == 'good' and said(pair['rejected']) in ('bad', 'half')
  assert (said(relaxed['chosen']), said(relaxed['rejected'])) == ('good', 'lacks it')


def test_what_is_written_is_prepared(tmp_path):
  """Every file is a source of slm.data.prepare."""
  asked = synthesis.constrained(
    write_lines(tmp_path / 'q.jsonl', [{'prompt': f'Ship {i}?'} for i in range(20)]),
    rows=0, seed=0, labels='tulu3_fixed', least=2, most=3,
  )  # fmt: skip
  synthesis.write(asked, str(tmp_path / 'prompts.jsonl.gz'))
  synthesis.write(synthesis.arithmetic(20, 0), str(tmp_path / 'sums.jsonl'))
  user = [{'role': 'user', 'content': 'A ship?'}]
  lines = [
    {'prompt': user, 'verifiers': [], 'dropped': 0, 'relaxed': [answer(f'not {i}', 0)],
     'answers': [answer(f'yes {i}', 1), answer(f'no {i}', 0)]} for i in range(20)
  ]  # fmt: skip
  write_lines(tmp_path / 'answers-00000000.jsonl', lines)
  answering.select(tmp_path, 0)
  kinds = {
    'best': 'conversations', 'passing': 'conversations', 'pairs': 'pairs', 'relaxed': 'pairs',
    'prompts': 'prompts', 'sums': 'prompts',
  }  # fmt: skip
  for name, kind in kinds.items():
    spec = f'{tmp_path}/{name}.jsonl' + '.gz' * (name == 'prompts')
    chat = settings.ChatConfig(kind)
    (path,) = conversations.expand(spec, chat)
    found = list(conversations.read(path, spec, chat, ''))
    assert len(found) == 20


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'count': 0}, 'expected --answers'),
    ({'temperature': 0.0}, 'expected --answers'),
    ({'max_tokens': 600}, r'--max_tokens=600: expected 1 to 599 \(context - 1\)'),
    ({'row': {'prompt': 'A ship?', 'verifier': 'exactly', 'label': 'x'}},
     r"asked.jsonl:1: there is no verifier 'exactly': did you mean"),
    ({'row': {'prompt': 'A ship?', 'verifier': 'exact', 'label': 'x'}, 'relax': True},
     '--relax: no prompt states two constraints or more'),
  ],
)  # fmt: skip
def test_bad_requests_for_answers_are_one_line(change, message, run, tmp_path):
  row = change.pop('row', {'prompt': 'A ship?', 'verifier': 'exact', 'label': 'x'})
  file = write_lines(tmp_path / 'asked.jsonl', [row])
  with pytest.raises(ValueError, match=message):
    answering.write(run, file, str(tmp_path / 'out'), **{**HOW, 'relax': False, **change})
  assert not (tmp_path / 'out').exists()


def test_a_model_without_a_template_is_refused(tmp_path):
  file = write_lines(tmp_path / 'q.jsonl', [{'prompt': 'x', 'verifier': 'exact', 'label': 'x'}])
  with pytest.raises(ValueError, match='its tokenizer holds no chat template'):
    how = {**HOW, 'relax': False}
    answering.write(str(toy.random_run()), file, str(tmp_path / 'out'), **how)


def test_the_command_writes_the_same_bytes_every_time(tmp_path):
  command = [sys.executable, '-m', 'slm.synthesise', 'arithmetic', '--seed=5', '--rows=12']
  for name in ('a', 'b'):
    done = subprocess.run(
      [*command, f'--out={tmp_path}/{name}.jsonl'], capture_output=True, text=True, check=True
    )
    assert done.stdout == f'{tmp_path}/{name}.jsonl: 12 prompts\n'
  assert (tmp_path / 'a.jsonl').read_bytes() == (tmp_path / 'b.jsonl').read_bytes()


_BOTH = ('chosen', 'rejected')


def test_strings_of_letters_are_asked_for_once_and_demonstrated():
  rows = list(synthesis.demonstrated(synthesis.formats(300, 1), 1, 0.25))
  assert len({row['prompt'] for row in rows}) == 300
  wrong = 0
  for row in rows:
    label = [{'id': i, 'args': a} for i, a in zip(row['verifier'], row['label'], strict=True)]
    checks = verifiers.read(label)
    values = [[v.value for v in verifiers.score(row[x], checks).verdicts] for x in _BOTH]
    assert [all(found) for found in values] == [True, False]
    assert row['response'] in (row['chosen'], row['rejected'])
    assert row['prompt'].count(',') + 1 == len(label)
    wrong += row['response'] == row['rejected']
  assert 0.15 < wrong / 300 < 0.35
  assert all(x['prompt'][0] in '234567f' for x in synthesis.formats(40, 1, ['first', 'letters']))
  with pytest.raises(ValueError, match='--task=second: expected one of letters, first, last, with'):
    next(synthesis.formats(1, 0, ['second']))
  with pytest.raises(ValueError, match='hardly more prompts than the 6 made'):
    list(synthesis.formats(7, 0, ['letters']))


def test_a_wrong_number_has_one_other_digit():
  for row in synthesis.demonstrated(synthesis.arithmetic(40, 0), 0, 1.0):
    pairs = list(zip(row['chosen'], row['rejected'], strict=True))
    assert sum(a != b for a, b in pairs) == 1 and row['response'] == row['rejected']


def test_lines_of_a_source_are_drawn_and_dialogues_become_messages(tmp_path):
  talk = 'Human: Hi\n\nAssistant: Yes?\n\nHuman: Bye'
  rows = [{'prompt': talk, 'chosen': 'a', 'id': str(i)} for i in range(9)]
  path = write_lines(tmp_path / 'talks.jsonl', rows)
  found = list(synthesis.lines(path, 4, 0, True))
  assert len({row['id'] for row in found}) == 4
  assert [m['role'] for m in found[0]['prompt']] == ['user', 'assistant', 'user']
  assert [row['prompt'] for row in synthesis.lines(path, 0, 0, False)] == [talk] * 9
  with pytest.raises(ValueError, match='rows=10: .* has 9'):
    list(synthesis.lines(path, 10, 0, False))
