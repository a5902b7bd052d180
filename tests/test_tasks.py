"""Tasks: likelihoods against full logits one by one, scores by hand, resumption, refusals."""

import dataclasses
import fcntl
import functools
import gzip
import json
import math
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import toy

from slm import models
from slm.base import files
from slm.data import tokenizer
from slm.inference import kinds, scoring, tasks
from slm.interchange import convert
from slm.models.decoder import unembed
from slm.runs import config
from slm.weights import sharding

MESH = lambda: sharding.make_mesh({'data': -1})
MC = {'type': 'mc', 'query': 'Question: what sails?', 'choices': ['a ship', 'the flour'], 'gold': 0}


@pytest.fixture(scope='module')
def scorer():
  return scoring.open_model(toy.random_run(), MESH(), 8)


@pytest.fixture
def run(tmp_path):
  shutil.copytree(toy.random_run(), tmp_path / 'run')
  return tmp_path / 'run'


def write(path, items):
  text = ''.join(json.dumps({'id': f'x-{i}', **item}) + '\n' for i, item in enumerate(items))
  path.write_bytes(gzip.compress(text.encode()) if path.suffix == '.gz' else text.encode())
  return str(path)


def questions(count=30, choices=3):
  rng = np.random.default_rng(4)
  text = lambda n: ' '.join(rng.choice(toy.TOPICS['sea'].split(), n))
  return [
    {
      'type': 'mc', 'query': text(int(rng.integers(1, 40))), 'gold': i % choices,
      'choices': [text(int(rng.integers(1, 6))) for _ in range(choices)],
      'split': 'dev' if i % 5 == 0 else 'test',
    }
    for i in range(count)
  ]  # fmt: skip


@functools.cache
def full():
  model = models.build(config.of(toy.random_run()).model)
  return jax.jit(lambda p, batch: jax.nn.log_softmax(unembed(p, model.forward(p, batch))))


def logprobs(scorer, ids):
  """Recompute the log-probabilities [t,v] after each of ids [t]."""
  row = jnp.array([ids + [0] * (64 - len(ids))])
  segments = (jnp.arange(64)[None] < len(ids)).astype(jnp.int32)
  batch = {'inputs': row, 'positions': jnp.arange(64)[None], 'segments': segments}
  return np.asarray(full()(scorer.params, batch))[0, : len(ids)]


def one_by_one(scorer, before, after):
  """Score by full logits, as many ids at a time as the model reads."""
  ids, start = [*before, *after], len(before)
  total, greedy = 0.0, True
  while start < len(ids):
    end = min(start + 64, len(ids))
    logp = logprobs(scorer, ids[max(0, end - 65) : end - 1])
    for target, row in zip(ids[start:end], logp[start - end :], strict=True):
      total += float(row[target])
      greedy &= int(row.argmax()) == target
    start = end
  return total, greedy


def written(scorer, ids, n):
  """Continue ids by the most probable id, n times."""
  ids = list(ids)
  for _ in range(n):
    ids.append(int(logprobs(scorer, ids)[-1].argmax()))
  return ids[-n:]


def test_likelihoods_are_those_of_each_request_alone(scorer):
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(4, 400, n).tolist()
  # The third is cut off its left, the fourth is longer than the model reads.
  sizes = [(1, 1), (5, 9), (90, 7), (3, 150), (64, 1), (63, 1), (1, 64), (1, 65), (40, 3)]
  requests = [(draw(a), draw(b)) for a, b in sizes] + [([2], draw(n)) for n in range(1, 12)]
  requests.append((requests[0][0], written(scorer, requests[0][0], 5)))
  found = scoring.loglikelihoods(scorer, requests)
  want = [one_by_one(scorer, *r) for r in requests]
  np.testing.assert_allclose([f[0] for f in found], [w[0] for w in want], atol=1e-4, rtol=1e-6)
  assert [f[1] for f in found] == [w[1] for w in want] == [False] * 20 + [True]
  other = scoring.open_model(toy.random_run(), MESH(), 24)
  alike = scoring.loglikelihoods(other, requests[::-1])[::-1]
  np.testing.assert_allclose([f[0] for f in found], [a[0] for a in alike], atol=1e-4, rtol=1e-6)


def test_likelihoods_that_are_no_numbers_are_refused(scorer):
  broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), scorer.params['final_norm'])
  params = {**scorer.params, 'final_norm': broken}
  with pytest.raises(FloatingPointError, match='likelihoods of 2 of 2 texts are not finite'):
    scoring.loglikelihoods(dataclasses.replace(scorer, params=params), [([5], [6]), ([7], [8, 9])])


def test_nothing_to_score_is_refused(scorer):
  for empty in (([5], []), ([], [5])):
    with pytest.raises(ValueError, match='request 1 of 2: expected a context and a continuation'):
      scoring.loglikelihoods(scorer, [([5], [6]), empty])


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tmp_path):
  path = tmp_path / 'hf'
  convert.export_model(toy.random_run(), path)
  files.write_json(path / 'added_tokens.json', {'<new>': 400})
  with pytest.raises(ValueError, match='the tokenizer has 401 ids, the model 400 embeddings'):
    scoring.open_model(path, MESH(), 8)


def test_few_lengths_are_compiled(scorer):
  sizes = {size for size, _ in scoring.batches(range(1, 65), 8, 64)}
  assert sizes == {32, 64}
  assert {size for size, _ in scoring.batches([3, 33, 40, 50], 8, 50)} == {32, 50}
  members = [i for _, m in scoring.batches([5, 60, 7, 40] * 9, 8, 64) for i in m]
  assert sorted(members) == list(range(36))


def test_what_it_writes_is_greedy_and_stops(scorer):
  prompts = [scorer.encode(t) for t in ('ship', 'the contract of the court', 'rope ' * 60)]
  texts = scoring.continuations(scorer, prompts, 6, [])
  for prompt, text in zip(prompts, texts, strict=True):
    assert text == scorer.tok.decode(written(scorer, prompt[-58:], 6))
  assert len(set(texts)) == 3
  stop = texts[1][2:4]
  assert scoring.continuations(scorer, prompts[1:2], 6, ['#', stop]) == [texts[1].split(stop)[0]]
  with pytest.raises(ValueError, match='max_tokens=64: expected 1 to 63'):
    scoring.continuations(scorer, prompts, 64, [])


def test_pairs_are_encoded_whole_and_cut_where_the_context_ends(scorer):
  tok = scorer.tok
  before, after = scorer.pair('the ship', ' sail')
  assert before == [tok.ids.bos, *tok.encode('the ship')] and tok.decode(after) == ' sail'
  assert scorer.pair('', 'ship') == ([tok.ids.bos], tok.encode('ship'))
  # 'ship' is one token: the boundary inside it vanishes, and what is left of it is predicted.
  assert len(tok.encode('ship')) < len(tok.encode('sh')) + len(tok.encode('ip'))
  before, after = scorer.pair('sh', 'ip')
  assert before + after == [tok.ids.bos, *tok.encode('ship')] and after
  with pytest.raises(ValueError, match='continuation: expected text'):
    scorer.pair('ship', '')
  assert tasks.joined(('a', 'b')) == ('a', ' b')
  assert tasks.joined(('a \n', 'b')) == ('a', ' \nb')
  assert tasks.joined(('', 'b')) == ('', 'b')


def test_the_begin_token_is_there_if_the_model_read_it(tmp_path):
  """Trained here: always, and once. Imported: if its tokenizer puts it there."""
  convert.export_model(toy.random_run(), tmp_path / 'hf')
  (tmp_path / 'hf' / 'tokenizer.model').unlink()
  for name in ('with', 'without'):
    shutil.copytree(tmp_path / 'hf', tmp_path / name)
    words = {w: i for i, w in enumerate(['<unk>', '<s>', '</s>', 'ship', 'sail'])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, '<unk>'))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(['<s>', '</s>'])
    if name == 'with':
      first = tokenizers.processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 1)])
      made.post_processor = first
    made.save(str(tmp_path / name / 'tokenizer.json'))
    assert tokenizer.load(tmp_path / name).begins == (name == 'with')
  opened = lambda name, **how: scoring.open_model(tmp_path / name, MESH(), 8, **how)
  assert opened('with').encode('ship') == [1, 3] == opened('with').encode('<s> ship')
  assert opened('without').encode('ship') == [3] == opened('with', begin=False).encode('ship')
  assert opened('without').pair('', 'sail') == ([1], [4])
  convert.import_model(tmp_path / 'without', tmp_path / 'run')
  assert opened('run').encode('ship') == [3] and opened('run').context == 64
  about = files.read_json(tmp_path / 'without' / 'tokenizer_config.json')
  files.write_json(tmp_path / 'without' / 'tokenizer_config.json', {**about, 'bos_token': None})
  assert opened('without').pair('', 'sail') == ([2], [4])  # after the end of the text before
  with pytest.raises(ValueError, match='without: its tokenizer has no begin token'):
    opened('without', begin=True)


def test_scores_by_hand():
  item = {'type': 'mc', 'query': 'q', 'choices': ['ab', 'é', 'abcdefgh'], 'gold': 2}
  answers = [(-3.0, False), (-3.0, False), (-8.0, True)]
  # -1.5, -1.5 (é is two bytes) and -1 a byte; of equal ones the first is taken.
  assert kinds.choose(item, answers) == {
    'acc': 0.0, 'acc_norm': 1.0, 'bpb': pytest.approx(1 / math.log(2)),
  }  # fmt: skip
  assert kinds.choose({**item, 'gold': 0}, answers)['acc'] == 1.0
  assert kinds.choose({**item, 'gold': 1}, answers)['acc'] == 0.0
  schema = {'type': 'schema', 'context_options': ['x', 'y'], 'continuation': 'zz', 'gold': 1}
  assert kinds.choose_context(schema, [(-2.0, False), (-1.0, False)]) == {
    'acc': 1.0, 'bpb': pytest.approx(0.5 / math.log(2)),
  }  # fmt: skip
  word = {'type': 'lm', 'context': 'x', 'continuation': 'four'}
  assert kinds.last_word(word, [(-2.0, True)]) == {
    'acc': 1.0, 'nll': 2.0, 'bpb': pytest.approx(0.5 / math.log(2)),
  }  # fmt: skip
  answer = {'answer': 'Onion', 'aliases': ['The Allium cepa!', '?']}
  for text, right in (
    (' onion.', 1),
    (' an  Onion ', 1),
    ('allium cepa', 1),
    ('onions', 0),
    ('', 0),
  ):
    assert kinds.short_answer(answer, text) == {'exact_match': right}


@pytest.mark.parametrize(
  ('final', 'text', 'right'),
  [
    ('18', '9 * 2 = $<<9*2=18>>18 a day.\n#### 18', 1),
    ('18', 'It is 18.', 1),
    ('18', '18 and then 19', 0),
    ('18', 'none', 0),
    ('70,000', 'so 70000', 1),
    ('$78.20', '= 78.2', 1),
    ('-5', '3-8=-5', 1),
    ('5', '10-5', 1),
    ('0.1', '.1', 1),
    ('36 minutes', ' 36 minutes.', 1),
    ('36 minutes', '4 times 9 is 36', 1),
    ('Rs. 750', 'so 751', 0),
    ('2 : 3', 'the ratio is 2 : 3', 0),  # two numbers: as text
    ('2 : 3', '2:3', 0),
    ('2 : 3', ' 2 : 3', 1),
    ('none', 'None.', 1),
  ],
)
def test_the_last_number_counts(final, text, right):
  assert kinds.final_number({'final': final}, text) == {'exact_match': right}


def test_standard_errors_are_binomial():
  values = [1, 0, 0, 1, 1, 0, 1]
  records = [
    {'scores': {'acc': v, 'nll': 1.0 + v}, 'tokens': 3, 'truncated': v > 0, 'device_seconds': 0.5}
    for v in values
  ]
  got = tasks.summary(records)
  p = 4 / 7
  assert got['acc'] == pytest.approx(p) and got['n'] == 7
  assert got['acc_stderr'] == pytest.approx(math.sqrt(p * (1 - p) / 6))
  assert got['ppl'] == pytest.approx(math.exp(1 + p))
  assert got['ppl_stderr'] == pytest.approx(got['ppl'] * got['acc_stderr'])
  assert (got['tokens'], got['truncated'], got['device_seconds']) == (21, 4, 3.5)
  assert 'acc_stderr' not in tasks.summary(records[:1])


def test_examples_are_other_items_with_their_answers(scorer):
  items = [{'id': f'x-{i}', **q} for i, q in enumerate(questions())]
  ids = lambda *how, **seed: [x['id'] for x in tasks.drawn(items, *how, **seed)]
  found = ids(items[5], 2, seed=0)
  assert found == ids(items[5], 2, seed=0)
  assert found != ids(items[5], 2, seed=1)
  assert found != ids(items[6], 2, seed=0)
  assert len(found) == 2 and set(found) <= {f'x-{i}' for i in range(0, 30, 5)} - {'x-5'}
  asked = tasks.ask(tasks.Task('', ''), items[5], [items[0], items[10]], scorer.tok)
  shown = [f'{x["query"]} {x["choices"][x["gold"]]}\n\n' for x in (items[0], items[10])]
  assert asked == [(''.join(shown) + items[5]['query'], f' {c}') for c in items[5]['choices']]
  assert ids(items[5], 0, seed=0) == []
  with pytest.raises(ValueError, match='shots=30: expected fewer than the items of the file, 30'):
    ids(items[5], 30, seed=0)


def test_every_kind_runs_and_few_shots_change_the_question(run, tmp_path):
  made = {
    'mc': [MC, {**MC, 'choices': ['rope', 'x'], 'gold': 1}],
    'schema': [
      {'type': 'schema', 'context_options': ['the ship', 'a tide'], 'continuation': 'x', 'gold': g}
      for g in (0, 1)
    ],
    'lm': [{'type': 'lm', 'context': c, 'continuation': 'sail'} for c in ('ship', 'wave')],
    'qa': [{'type': 'qa', 'query': 'Question: x', 'answer': 'y', 'aliases': []}] * 2,
    'numeric': [{'question': f'What is {i}?', 'final': '3', 'type': 'Sum'} for i in range(2)],
  }
  paths = [write(tmp_path / f'{kind}.jsonl.gz', items) for kind, items in made.items()]
  found = tasks.run(run, paths, MESH(), 8)
  assert {k: v['type'] for k, v in found.items()} == {k: k for k in made}
  assert all(v['n'] == 2 for v in found.values())
  scorer = scoring.open_model(run, MESH(), 8)
  want = scorer.pair('Question: what sails?\nAnswer:', ' a ship')
  record = json.loads((run / 'tasks' / 'mc.jsonl').read_text().split('\n')[1])
  assert record['answer'][0][0] == pytest.approx(one_by_one(scorer, *want)[0], abs=1e-4)
  shots = tasks.run(run, paths[:1], MESH(), 8, shots=1)['mc-1shot']
  assert shots['tokens'] > found['mc']['tokens'] and shots['shots'] == 1
  assert {*files.read_json(run / 'tasks.json')} == {*made, 'mc-1shot'}
  assert tasks.run(f'{run}@0', paths[:1], MESH(), 8)['mc']['acc'] == found['mc']['acc']
  assert {*files.read_json(run / 'tasks-0.json')} == {'mc'}


def test_it_continues_where_it_stopped(run, tmp_path, monkeypatch, capsys):
  path = write(tmp_path / 'sea.jsonl', questions())
  whole = tasks.run(toy_copy(run), [path], MESH(), 8)['sea']
  assert 0 < whole['truncated'] < 30
  monkeypatch.setattr(tasks, '_GROUP', 1)
  answer, asked = tasks.answer, []

  def stopping(scorer, items, *rest):
    asked.extend(x['id'] for x in items)
    if len(asked) > 6:
      raise KeyboardInterrupt
    return answer(scorer, items, *rest)

  monkeypatch.setattr(tasks, 'answer', stopping)
  with pytest.raises(KeyboardInterrupt):
    tasks.run(run, [path], MESH(), 8)
  monkeypatch.setattr(tasks, 'answer', answer)
  log = run / 'tasks' / 'sea.jsonl'
  assert log.read_text().count('\n') == 1 + 6  # three groups of two items were whole
  log.write_bytes(log.read_bytes()[:-9])  # the last line was cut short
  tried = []
  monkeypatch.setattr(
    tasks, 'answer', lambda s, items, *r: tried.extend(items) or answer(s, items, *r)
  )
  again = tasks.run(run, [path], MESH(), 8)['sea']
  assert len(tried) == 30 - 5
  same = lambda r: {k: v for k, v in r.items() if k != 'device_seconds'}
  assert same(again) == {k: pytest.approx(v, abs=1e-5) for k, v in same(whole).items()}
  # The first ones, or those of a split, are among what is there.
  tried.clear()
  part = tasks.run(run, [path], MESH(), 8, limit=4, split='dev')['sea']
  assert not tried and part['n'] == 4
  assert capsys.readouterr().err == ''
  # Another file of that name: what is there is of no use.
  write(tmp_path / 'sea.jsonl', questions(12))
  assert tasks.run(run, [path], MESH(), 8)['sea']['n'] == 12
  assert (
    len(tried) == 12 and 'sea.jsonl: evaluated again, as sha256 was ' in capsys.readouterr().err
  )
  log.write_text(log.read_text().replace('"scores"', '"scores', 1))
  with pytest.raises(ValueError, match='sea.jsonl: damaged'):
    tasks.run(run, [path], MESH(), 8)


def test_two_processes_do_not_write_one_runs_answers(run, tmp_path):
  path = write(tmp_path / 'good.jsonl', [MC, MC])
  with (run / 'tasks.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # of another open file, as another process's is
    with pytest.raises(ValueError, match='run: is being written by another process'):
      tasks.run(run, [path], MESH(), 8)
    assert not (run / 'tasks').exists() and not (run / 'tasks.json').exists()
  tasks.run(run, [path], MESH(), 8)
  assert not (run / 'tasks.lock').exists()


def toy_copy(run):
  return shutil.copytree(run, run.with_name('copy'))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'gold': 2}, ':1: gold: expected 0 to 1, found 2'),
    ({'gold': 'A'}, ":1: gold: expected a whole number, found 'A'"),
    ({'choices': ['a', 3]}, ':1: choices: expected a list of texts'),
    ({'choices': ['a', ' ']}, ':1: an answer is empty or no text'),
    ({'type': ['mc']}, r":1: type: expected one of .* found \['mc'\]"),
    (
      {'type': 'lm', 'context': 'x', 'continuation': 'y', 'gold': 'Paris'},
      ":1: gold: expected 0 to 0, found 'Paris'",
    ),
    ({'type': 'numeric', 'question': 'x', 'final': '42', 'answer': 42}, ':1: an answer is .* text'),
    ({'type': 'essay'}, ":1: type: expected one of .* found 'essay'"),
    ({'id': 7}, ':1: expected an object with an id'),
    ({'id': 'x-1'}, ":2: id 'x-1' was used before"),
  ],
)
def test_items_that_are_not_whole_are_refused(change, message, tmp_path):
  path = write(tmp_path / 'bad.jsonl', [{**MC, **change}, MC])
  with pytest.raises(ValueError, match=message):
    tasks.read(path)


def test_blank_lines_are_skipped(tmp_path):
  path = tmp_path / 'good.jsonl'
  write(path, [MC, MC])
  path.write_text(path.read_text().replace('\n', '\n\n') + ' \n')
  assert [item['id'] for item in tasks.read(path)] == ['x-0', 'x-1']


def test_a_kind_names_its_main_score(scorer, monkeypatch):
  kind = kinds.KINDS['lm']._replace(score=lambda item, answers: {'rank': 2.0}, main='rank')
  monkeypatch.setitem(kinds.KINDS, 'ranked', kind)
  items = [{'id': 'x', 'type': 'ranked', 'context': 'the', 'continuation': 'ship'}]
  result = tasks.evaluate(scorer, items)
  assert result['score'] == 2.0 and tasks.line(result) == 'rank 2'


def test_files_and_options_that_do_not_fit_are_refused(run, tmp_path):
  good = write(tmp_path / 'good.jsonl', [MC, MC])
  mixed = write(tmp_path / 'mixed.jsonl', [MC, {'question': 'x', 'final': '1'}])
  with pytest.raises(ValueError, match=r"mixed.jsonl:2: type 'numeric', the first item has 'mc'"):
    tasks.read(mixed)
  (tmp_path / 'no.jsonl').write_text('')
  with pytest.raises(ValueError, match='no.jsonl: holds no items'):
    tasks.read(tmp_path / 'no.jsonl')
  with pytest.raises(ValueError, match='two files have one name'):
    tasks.run(run, [good, good], MESH(), 8)
  with pytest.raises(ValueError, match="no item has split 'dev'"):
    tasks.run(run, [good], MESH(), 8, split='dev')
  with pytest.raises(ValueError, match='--limit=-1'):
    tasks.run(run, [good], MESH(), 8, limit=-1)


def test_the_entry_point_prints_a_table(run, tmp_path):
  path = write(tmp_path / 'good.jsonl.gz', [MC, MC])
  command = [sys.executable, '-m', 'slm.evaluate', f'--run={run}', f'--task={path}', '--limit=1']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  head, row = done.stdout.splitlines()
  assert 'items' in head and row.split()[1:4] == ['good', '1', 'acc'] and 'acc_norm' in row
  assert 'nan' not in row and '±' not in row  # one item has no spread


def test_pass_at_k_is_the_share_of_the_subsets_with_a_passing_one():
  assert tasks.passes(4, 0) == {'pass@1': 0, 'pass@2': 0, 'pass@4': 0}
  assert tasks.passes(4, 1) == pytest.approx({'pass@1': 0.25, 'pass@2': 0.5, 'pass@4': 1})
  assert tasks.passes(5, 2) == pytest.approx({'pass@1': 0.4, 'pass@2': 0.7, 'pass@4': 1})


def test_answers_are_drawn_and_counted(run, tmp_path):
  label = [{'id': 'regex', 'args': {'pattern': '[aeiou]'}}]
  file = write(tmp_path / 'asked.jsonl', [{'prompt': 'ship', 'verifiers': label}] * 6)
  ask = lambda name, **how: tasks.Task(name, file, max_tokens=4, **how)
  drawing = {'samples': 4, 'temperature': 20.0}  # the toy is very sure
  asked = [ask('greedy'), ask('drawn', **drawing), ask('whole', **drawing, ended=True)]
  found = tasks.perform(run, asked, MESH(), 8)
  records = {t.name: [json.loads(x) for x in (run / f'tasks/{t.name}.jsonl').open()][1:]
             for t in asked}  # fmt: skip
  drawn = records['drawn']
  assert len({x['answer'] for x in records['greedy']}) == 1
  assert len({text for x in drawn for text in x['answer']}) > 4
  passing = [sum(any(c in 'aeiou' for c in text) for text in x['answer']) for x in drawn]
  assert [x['scores']['pass'] for x in drawn] == [n / 4 for n in passing]
  assert [x['scores']['pass@4'] for x in drawn] == [float(n > 0) for n in passing]
  assert found['drawn']['pass'] == pytest.approx(found['drawn']['pass@1'])
  assert all(a['scores']['pass'] <= a['ended'] for a in records['whole'])
  assert records['whole'][0]['answer'] == drawn[0]['answer']
  again = tasks.perform(run, asked, MESH(), 8)
  assert again == found
  with pytest.raises(ValueError, match='samples=2, temperature=1: expected items'):
    choice = write(tmp_path / 'mc.jsonl', [MC])
    tasks.perform(run, [tasks.Task('mc', choice, samples=2)], MESH(), 8)
