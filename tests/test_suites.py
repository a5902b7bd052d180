"""Suites: prompts to the letter, scores counted by hand, the seal, differences between runs."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import toy

from slm.base import files
from slm.data import tokenizer
from slm.inference import kinds, suites, tasks
from slm.inference.tasks import Task
from slm.reporting import comparison, scores
from slm.weights import sharding

MESH = lambda: sharding.make_mesh({'data': -1})
PLAIN = (
  '{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}'
  '{% if add_generation_prompt %}<assistant>{% endif %}'
)
MC = {'type': 'mc', 'query': 'Question: what sails?', 'choices': ['a ship', 'flour'], 'gold': 0}


@pytest.fixture(scope='module')
def template(tmp_path_factory):
  """Give a random model a chat template."""
  return toy.talking_run(tmp_path_factory.mktemp('suites') / 'run', PLAIN, context=64)


@pytest.fixture
def run(template, tmp_path):
  return shutil.copytree(template, tmp_path / 'run')


@pytest.fixture(scope='module')
def tok(template):
  return tokenizer.load(template / 'tokenizer')


def write(path, items):
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps({'id': f'{path.stem}-{i}', **item}) for i, item in enumerate(items)]
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


def prompts(task, item, shown, tok):
  kind = {'type': task.kind}
  return tasks.ask(task, {**item, **kind}, [{**x, **kind} for x in shown], tok)


def test_prompts_of_choices(tok):
  other = {**MC, 'query': 'Question: what bakes?', 'gold': 1}
  cloze = 'Question: what bakes?\nAnswer: flour\n\nQuestion: what sails?\nAnswer:'
  assert prompts(Task('', '', 'mc'), MC, [other], tok) == [(cloze, ' a ship'), (cloze, ' flour')]
  letter = (
    'Question: what bakes?\nA. a ship\nB. flour\nAnswer: B\n\n'
    'Question: what sails?\nA. a ship\nB. flour\nAnswer:'
  )
  assert prompts(Task('', '', 'letter'), MC, [other], tok) == [(letter, ' A'), (letter, ' B')]
  one = [(f'<user>{letter}</><assistant>', x) for x in 'AB']  # the answer is all that follows
  assert prompts(Task('', '', 'letter', chat=True), MC, [other], tok) == one
  turns = (
    '<user>Question: what bakes?\nA. a ship\nB. flour\nAnswer:</><assistant>B</>'
    '<user>Question: what sails?\nA. a ship\nB. flour\nAnswer:</><assistant>'
  )
  asked = prompts(Task('', '', 'letter', chat=True, turns=True), MC, [other], tok)
  assert asked == [(turns, 'A'), (turns, 'B')]
  listed = {**MC, 'query': 'Question: x\nChoices:\nA. a\nB. b\nAnswer:', 'choices': ['A', 'B']}
  asked = prompts(Task('', '', 'reasoned', template='{}\n\nSay {X}.'), listed, [], tok)
  assert asked[0] == ('Question: x\nChoices:\nA. a\nB. b\n\nSay {X}.', ' A')


def test_prompts_of_solutions_constraints_and_pairs(tok):
  sums = [
    {'question': 'What is {} and 2?', 'final': '3', 'answer': 'It is <<1+2=3>>3.\n#### 3'},
    {'question': 'Why?', 'final': '7'},
  ]
  turns = (
    '<user>What is {} and 2?</><assistant>It is 3.\nSo the answer is 3.</><user>Why?</><assistant>'
  )
  asked = prompts(Task('', '', 'solution', chat=True, turns=True), sums[1], sums[:1], tok)
  assert asked == [(turns, 'So the answer is 7.')]
  ifeval = {'prompt': 'No commas.', 'instruction_id_list': ['x'], 'kwargs': [{}]}
  chat = Task('', '', 'ifeval', chat=True)
  assert prompts(chat, ifeval, [], tok) == [('<user>No commas.</><assistant>', '')]
  pair = {'prompt': 'Human: a\n\nAssistant: b\n\nHuman: c', 'chosen': 'd', 'rejected': 'e'}
  before = '<user>a</><assistant>b</><user>c</><assistant>'
  asked = prompts(Task('', '', 'preference', chat=True), pair, [], tok)
  assert asked == [(before, 'd'), (before, 'e')]
  bare = tokenizer.load(toy.random_run().parent / 'data' / 'tokenizer')
  with pytest.raises(ValueError, match='is asked as a chat, and the tokenizer holds no chat'):
    prompts(chat, ifeval, [], bare)


def test_scores_of_generated_answers_by_hand():
  item = {**MC, 'type': 'reasoned', 'phrase': 'My choice is', 'choices': ['x', 'y', 'z'], 'gold': 2}
  for text, right, rule in (
    ('(A) no. My choice is: C', 1, 'phrase'),
    ('The answer is B, not C', 0, 'answer is'),
    ('(A) or (C)', 1, 'parentheses'),
    ('C', 1, 'letter'),
    ('D', 0, 'none'),  # there are three choices
  ):
    assert kinds.KINDS['reasoned'].score(item, text) == {'exact_match': right}
    assert kinds.KINDS['reasoned'].rule(item, text) == rule
  ifeval = {
    'instruction_id_list': ['punctuation:no_comma', 'startend:quotation'], 'kwargs': [{}, {}],
  }  # fmt: skip
  for text, strict, loose, shares in (
    ('"no"', 1, 1, (1, 1)),
    ('a, b', 0, 0, (0, 0)),
    ('Sure, here:\n"no"', 0, 1, (0, 1)),
    ('no', 0, 0, (0.5, 0.5)),
  ):
    assert kinds.follow(ifeval, text) == {
      'strict': strict, 'loose': loose, 'strict_parts': shares[0], 'loose_parts': shares[1],
    }  # fmt: skip
  pair = {'chosen': 'abcd', 'rejected': 'ab'}
  likelihoods = lambda a, b: [(a, False), (b, False)]
  assert kinds.prefer(pair, likelihoods(-3.0, -2.0)) == {'acc': 0.0, 'acc_norm': 1.0}
  assert kinds.prefer(pair, likelihoods(-2.0, -2.0)) == {'acc': 0.5, 'acc_norm': 1.0}
  assert kinds.prefer(pair, likelihoods(-2.0, -1.0)) == {'acc': 0.0, 'acc_norm': 0.5}


def record(name, value, **more):
  costs = {'tokens': 1, 'truncated': False, 'device_seconds': 0.0}
  return {'id': 'x', 'scores': {name: value}, **costs, **more}


def test_averages_over_groups_parts_and_rules():
  by_subject = {'a': [1, 1, 0, 1], 'b': [0], 'c': [1, 0]}
  records = [record('acc', v, group=k) for k, values in by_subject.items() for v in values]
  got = tasks.summary(records)
  means = [0.75, 0.0, 0.5]
  assert got['n'] == 7 and got['acc'] == pytest.approx(np.mean(means))
  assert got['acc_stderr'] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
  # 1 of 1, 0 of 3, 1 of 2 constraints: 2 of 6, and prompts are the clusters.
  shares = [(1.0, 1), (0.0, 3), (0.5, 2)]
  got = tasks.summary([record('loose_parts', v, parts=n) for v, n in shares])
  assert got['loose_parts'] == pytest.approx(2 / 6)
  squares = sum((n * (v - 2 / 6)) ** 2 for v, n in shares)
  assert got['loose_parts_stderr'] == pytest.approx(math.sqrt(3 / 2 * squares) / 6)
  got = tasks.summary([record('exact_match', 1, rule=r) for r in ('letter', 'none', 'letter')])
  assert got['rules'] == {'letter': 2, 'none': 1}
  assert tasks.line(got) == 'exact_match 1 ± 0  found by: letter 2, none 1'


def mmlu(count=6):
  item = lambda i, subject, split: {
    **MC, 'query': f'Question: {subject} {split} {i}', 'subject': subject, 'split': split,
  }  # fmt: skip
  return [
    item(i, subject, split)
    for subject in ('law', 'sea')
    for split, n in (('dev', 3), ('test', count), ('fewshot', 2))
    for i in range(n)
  ]


def test_examples_come_from_their_own_split_and_subject(run, tmp_path, tok):
  path = write(tmp_path / 'mmlu.jsonl', mmlu())
  how = {'split': 'test', 'shots': 2, 'shots_from': 'fewshot', 'group': 'subject'}
  task = Task('mmlu', path, 'letter', **how)
  items, pool = tasks._items(task)
  assert {x['split'] for x in pool} == {'fewshot'}
  asked = tasks.choice(task, items)
  assert len(asked) == 12 and {x['split'] for x in asked} == {'test'}
  for item in asked:
    ((text, _), _) = tasks.ask(task, item, tasks.first(task, pool, item), tok)
    subject, questions = item['subject'], [x for x in text.split('\n') if 'Question' in x]
    shown = [f'Question: {subject} fewshot {i}' for i in range(2)]
    assert questions == [*shown, item['query']]
  with pytest.raises(ValueError, match=r"expected 3 examples for mmlu-3 from 'fewshot', found 2"):
    tasks.first(Task('mmlu', path, **{**how, 'shots': 3}), pool, items[3])
  # A sample is of all subjects, and says that it is one.
  (got,) = tasks.perform(run, [Task('mmlu', path, 'letter', limit=5, **how)], MESH(), 8).values()
  ids = [json.loads(x)['id'] for x in (run / 'tasks/mmlu.jsonl').read_text().splitlines()[1:]]
  taken = [x for x in items if x['id'] in ids]
  assert sorted(x['subject'] for x in taken) == ['law', 'law', 'law', 'sea', 'sea']
  assert (got['n'], got['of'], got['main']) == (5, 12, 'acc')
  task = Task('mmlu', path, 'letter', limit=5, **how)
  assert suites.table([task], {'mmlu': got})[1][0][1] == '5 of 12'


def folder(path, count=4):
  """Write the files of the sealed suite in small."""
  choice = {**MC, 'split': 'test'}
  for name in ('openbookqa', 'commonsense_qa', 'strategyqa'):
    write(path / f'eval/{name}.jsonl', [choice] * count)
  sums = [{'question': f'{i} and 1?', 'final': str(i + 1)} for i in range(count)]
  write(path / 'posttrain/svamp_test.jsonl', sums)
  return str(path)


def sealed(run, directory, **how):
  return suites.run(run, 'tulu_unseen', directory, MESH(), 8, **how)


def test_a_sealed_suite_runs_once_on_what_was_frozen(run, tmp_path, monkeypatch):
  directory = folder(tmp_path / 'files')
  with pytest.raises(ValueError, match='tulu_unseen is sealed: decide for the model first'):
    sealed(run, directory)
  assert not (run / 'tasks').exists() and not (run / 'sealed.jsonl').exists()
  freeze = lambda **how: suites.freeze(run, 'tulu_unseen', directory, MESH(), **how)
  digest = freeze()
  config = (run / 'config.json').read_text()
  (run / 'config.json').write_text(config.replace('{', '{ ', 1))
  with pytest.raises(ValueError, match='was frozen with another config: evaluate'):
    sealed(run, directory)
  (run / 'config.json').write_text(config)
  changed = folder(tmp_path / 'changed', 5)
  with pytest.raises(ValueError, match='was frozen with another suite: evaluate'):
    sealed(run, changed)

  answer = tasks.answer
  monkeypatch.setattr(tasks, 'answer', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    sealed(run, directory)
  monkeypatch.setattr(tasks, 'answer', answer)
  ran, results = sealed(run, directory)  # what was stopped goes on
  values = [results[t.name]['exact_match'] for t in ran]
  assert [t.name for t in ran][0] == 'tulu_unseen.svamp' and len(values) == 4
  kept = files.read_json(run / 'suites.json')['tulu_unseen']
  assert kept['mean'] == pytest.approx(np.mean(values)) and len(kept['scores']) == 4
  for again in (lambda: sealed(run, directory), lambda: sealed(run, directory, limit=1), freeze):
    with pytest.raises(ValueError, match='a final model is run once; --again=REASON'):
      again()
  sealed(run, directory, again='the scorer was wrong')
  log = [json.loads(line) for line in (run / 'sealed.jsonl').read_text().splitlines()]
  assert [e['event'] for e in log] == ['frozen', 'begun', 'begun', 'done', 'begun', 'done']
  assert [e['continues'] for e in log if e['event'] == 'begun'] == [False, True, False]
  assert log[4]['again'] == 'the scorer was wrong' and log[0]['hash'] == log[1]['hash'] == digest


def test_a_mean_takes_the_better_form_of_each_evaluation():
  forms = [Task('a-cloze', '', form_of='a'), Task('a-letter', '', form_of='a'), Task('b', '')]
  values = {'a-cloze': 0.2, 'a-letter': 0.6, 'b': 0.4}
  results = {name: {'main': 'acc', 'acc': value} for name, value in values.items()}
  assert suites.headline(forms, results) == {'a': 0.6, 'b': 0.4}
  assert suites.mean({'a': 0.6, 'b': 0.4}) == 0.5


def test_suites_that_do_not_fit_are_refused(tmp_path):
  with pytest.raises(ValueError, match="--suite: expected one of .* found 'tulu'"):
    suites.load('tulu', str(tmp_path))
  with pytest.raises(ValueError, match='expected one file posttrain/svamp_test.jsonl.* found 0'):
    suites.load('tulu_unseen', str(tmp_path))
  with pytest.raises(ValueError, match='--freeze: expected a sealed suite'):
    suites.freeze('run', 'tulu_dev', str(tmp_path), MESH())
  prompt = {'prompt': 'x', 'instruction_id_list': ['punctuation:no_comma'], 'kwargs': [{}]}
  path = write(tmp_path / 'ifeval.jsonl', [{**prompt, 'id': '1'}, {**prompt, 'id': '2'}])
  assert [x['type'] for x in tasks.read(path)] == ['ifeval', 'ifeval']
  with pytest.raises(ValueError, match='shots=1: its items hold no answer to show'):
    tasks._items(Task('ifeval', path, shots=1))


def test_tasks_of_suites_name_known_kinds_and_scores():
  for name, suite in suites.SUITES.items():
    assert len({t.name for t in suite}) == len(suite), name
    for task in suite:
      assert not task.kind or task.kind in kinds.KINDS
      assert '{}' in task.template and (task.phrase in task.template)


def answered(path, values, **settings):
  """Write the records of a run on a task."""
  facts = {'main': 'acc', 'sha256': 'x', 'of': 9, 'shots': 0, **settings}
  ids = [{**record('acc', v), 'id': f'i{n}'} for n, v in enumerate(values)]
  (path / 'tasks').mkdir(parents=True)
  lines = [json.dumps(x) for x in [facts, *ids]]
  (path / 'tasks/t.jsonl').write_text('\n'.join(lines) + '\n')
  (path / 'tasks.json').write_text(json.dumps({'t': facts}))
  return str(path)


def test_differences_are_those_of_the_same_items(tmp_path):
  a, b = [1, 0, 0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 1, 0, 1, 1, 1]
  runs = [answered(tmp_path / 'a', a), answered(tmp_path / 'b', b)]
  first, second = scores.compare(comparison.models(runs), 't')
  gaps = np.subtract(b[:8], a)
  half = scipy.stats.t.ppf(0.975, 7) * np.std(gaps, ddof=1) / math.sqrt(8)
  assert first.difference is None and first.value == 3 / 8 and second.value == 6 / 8
  assert second.difference == pytest.approx((3 / 8, 3 / 8 - half, 3 / 8 + half))
  assert (second.items, second.of, second.verdict) == (8, 9, 'within noise')
  assert scores.table([first, second])[1][1][2] == '8 of 9'
  answered(tmp_path / 'c', b, shots=5)
  with pytest.raises(ValueError, match='t was asked in two ways: shots is 0 and 5'):
    scores.compare(comparison.models([runs[0], str(tmp_path / 'c')]), 't')
  with pytest.raises(ValueError, match='was not evaluated on the task u; evaluated: t'):
    scores.compare(comparison.models(runs), 'u')
  command = [sys.executable, '-m', 'slm.compare', *(f'--run={r}' for r in runs), '--task=t']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert 'within noise' in done.stdout and '+0.3750 [' in done.stdout


def test_the_command_freezes_and_runs(run, tmp_path):
  command = [sys.executable, '-m', 'slm.evaluate', f'--run={run}', '--suite=tulu_unseen']
  command += [f'--tasks={folder(tmp_path / "files")}', '--limit=2']
  for more, expected in ((['--freeze'], 'tulu_unseen frozen: '), ([], '2 of 4')):
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
  assert 'the mean over 4 evaluations, of samples of at most 2 items' in done.stdout
  assert 'found by: ' in done.stdout
