"""The lm-evaluation-harness on a run, against its own transformers model on the exported one."""

import json
import shutil

import numpy as np
import pytest
import toy

lm_eval = pytest.importorskip('lm_eval')
pytest.importorskip('torch')
pytest.importorskip('transformers')
pytest.importorskip('accelerate')  # the harness's transformers model needs it

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from slm import harness  # noqa: E402
from slm.inference import tasks  # noqa: E402
from slm.interchange import convert  # noqa: E402
from slm.weights import sharding  # noqa: E402

LONG = ' '.join(toy.documents(['sea', 'law'], 3, 7))
PAIRS = [
  ('The captain drops the', ' anchor'),
  ('The captain drops the', ' anchor in the harbour'),
  ('', 'contract party clause'),
  ('The tenant owes the court ', 'a notice'),
  (LONG, ' rope'),
  ('é 漢字', ' 😀 tide'),
  ('a', 'b'),
]
PROMPTS = ['The captain', 'ship sail harbour wave', LONG, 'x']
TASKS = {
  'choices': {
    'output_type': 'multiple_choice', 'doc_to_text': '{{question}}', 'doc_to_target': 'gold',
    'doc_to_choice': 'choices',
    'metric_list': [{'metric': m} for m in ('acc', 'acc_norm', 'acc_bytes')],
  },
  'letters': {
    'output_type': 'multiple_choice', 'doc_to_target': 'gold', 'doc_to_choice': ['A', 'B', 'C'],
    'doc_to_text': '{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:',
    'num_fewshot': 2, 'fewshot_split': 'test', 'fewshot_config': {'sampler': 'first_n'},
    'metric_list': [{'metric': 'acc'}],
  },
  'text': {
    'output_type': 'loglikelihood_rolling', 'doc_to_text': '', 'doc_to_target': '{{question}}',
    'metric_list': [{'metric': 'bits_per_byte'}],
  },
  'answers': {
    'output_type': 'generate_until', 'doc_to_text': '{{question}}',
    'doc_to_target': '{{choices[0]}}', 'metric_list': [{'metric': 'exact_match'}],
    'generation_kwargs': {'until': ['\n'], 'max_gen_toks': 12},
  },
}  # fmt: skip


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  path = tmp_path_factory.mktemp('harness') / 'hf'
  convert.export_model(toy.random_run(), path)
  return path


def both(exported, begin):
  ours = harness.SLM(str(toy.random_run()), batch_size=8, add_bos_token=begin)
  how = {'device': 'cpu', 'dtype': 'float32', 'batch_size': 4, 'max_length': 64}
  return ours, HFLM(pretrained=str(exported), add_bos_token=begin, **how)


def requests(kind, arguments):
  return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


@pytest.mark.parametrize('begin', [None, False])  # None: as its tokenizer says, with one
def test_answers_are_those_of_the_harness_on_the_exported_model(exported, begin):
  ours, theirs = both(exported, begin)
  got, want = (m.loglikelihood(requests('loglikelihood', PAIRS)) for m in (ours, theirs))
  np.testing.assert_allclose([g[0] for g in got], [w[0] for w in want], atol=1e-3)
  assert [g[1] for g in got] == [w[1] for w in want]
  # What the model itself would write is greedy.
  how = {'until': [' the'], 'max_gen_toks': 6}
  written = [
    m.generate_until(requests('generate_until', [(p, how) for p in PROMPTS]))
    for m in (ours, theirs)
  ]
  assert written[0] == written[1] and len(set(written[0])) > 1
  own = requests('loglikelihood', [(PROMPTS[1], written[0][1])])
  assert ours.loglikelihood(own)[0][1] == theirs.loglikelihood(own)[0][1] is True
  texts = [(p,) for p in (*PROMPTS, 2 * LONG)]
  found = [m.loglikelihood_rolling(requests('rolling', texts)) for m in (ours, theirs)]
  np.testing.assert_allclose(*found, atol=1e-3, rtol=1e-5)


def test_a_directory_of_transformers_answers_alike(exported):
  run, other = (harness.SLM(str(p), max_length=64, add_bos_token=True)
                for p in (toy.random_run(), exported))  # fmt: skip
  got, want = (m.loglikelihood(requests('loglikelihood', PAIRS)) for m in (other, run))
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_continuation_that_merges_into_the_context_is_scored_by_the_merged_token():
  """The harness's own model has no token left of it, and fails."""
  ours = harness.SLM(str(toy.random_run()))
  before, after = ours.scorer.pair('the sh', 'ip')
  whole = ours.scorer.encode('the ship')
  assert before + after == whole and len(ours.scorer.encode('the sh')) >= len(whole)
  (got,) = ours.loglikelihood(requests('loglikelihood', [('the sh', 'ip')]))
  (want,) = ours._loglikelihood_tokens([(('the sh', 'ip'), before, after)])
  assert got == want and got[0] < -0.1
  with pytest.raises(ValueError, match='continuation: expected text with a token'):
    ours.loglikelihood(requests('loglikelihood', [('the ship', '')]))


def test_messages_are_written_by_the_models_own_template(exported, tmp_path):
  template = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}"
    '{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}'
  )
  path = shutil.copytree(exported, tmp_path / 'chat')
  (path / 'chat_template.jinja').write_text(template)
  ours, theirs = harness.SLM(str(path)), HFLM(pretrained=str(path), device='cpu')
  messages = [{'role': 'user', 'content': 'ship sail'}, {'role': 'assistant', 'content': 'tide'}]
  for prompt in (True, False):
    text = ours.apply_chat_template(messages, add_generation_prompt=prompt)
    assert text == theirs.apply_chat_template(messages, add_generation_prompt=prompt)
    assert ours.tok_encode(text) == theirs.tok_encode(text)  # one begin token, not two
  assert ours.chat_template(True) == template and ours.chat_template(False) is None
  with pytest.raises(ValueError, match='the tokenizer has no chat template'):
    harness.SLM(str(toy.random_run())).apply_chat_template(messages)


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(2)
  words = toy.TOPICS['sea'].split()
  text = lambda n: ' '.join(rng.choice(words, n))
  items = [
    {'question': text(8), 'choices': [text(int(n)) for n in rng.integers(1, 5, 3)], 'gold': i % 3}
    for i in range(12)
  ]
  (tmp_path / 'items.json').write_text(''.join(json.dumps(x) + '\n' for x in items))
  for name, how in TASKS.items():
    files = {'test': str(tmp_path / 'items.json')}
    data = {'task': name, 'dataset_path': 'json', 'dataset_kwargs': {'data_files': files}}
    # JSON is YAML.
    (tmp_path / f'{name}.yaml').write_text(json.dumps({**data, 'test_split': 'test', **how}))
  return tmp_path


def test_task_scores_are_those_of_the_harness(exported, folder, monkeypatch):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  _, theirs = both(exported, begin=False)
  ours = f'pretrained={toy.random_run()},add_bos_token=False'  # by name, as its command does
  results = [
    lm_eval.simple_evaluate(
      model=model, model_args=arguments, batch_size=8, tasks=list(TASKS), bootstrap_iters=0,
      task_manager=TaskManager(include_path=str(folder), include_defaults=False),
      device='cuda:0',  # what its command passes
    )['results']
    for model, arguments in (('slm', ours), (theirs, None))
  ]  # fmt: skip
  for name in TASKS:
    got, want = ({k: v for k, v in r[name].items() if isinstance(v, float)} for r in results)
    assert got.keys() == want.keys() and got
    for key in got:
      np.testing.assert_allclose(got[key], want[key], rtol=1e-4, err_msg=f'{name} {key}')
  assert 0 < results[0]['choices']['acc,none'] < 1


def test_scores_of_the_same_questions_are_those_of_slm_evaluate(folder, tmp_path):
  items = [json.loads(line) for line in (folder / 'items.json').read_text().splitlines()]
  lines = [{'id': str(i), 'type': 'mc', 'query': x['question'], **x} for i, x in enumerate(items)]
  path = tmp_path / 'sea.jsonl'
  path.write_text(''.join(json.dumps(x) + '\n' for x in lines))
  run, mesh = shutil.copytree(toy.random_run(), tmp_path / 'run'), sharding.make_mesh({'data': -1})
  got = tasks.run(run, [str(path)], mesh, 8)['sea']
  results = lm_eval.simple_evaluate(
    model=harness.SLM(str(run)), tasks=['choices', 'letters'], log_samples=True,
    task_manager=TaskManager(include_path=str(folder), include_defaults=False),
  )  # fmt: skip
  want = results['results']['choices']
  for mine, theirs in (('acc', 'acc'), ('acc_norm', 'acc_bytes')):
    assert got[mine] == pytest.approx(want[f'{theirs},none'])
    assert got[f'{mine}_stderr'] == pytest.approx(want[f'{theirs}_stderr,none'])
  path.write_text(''.join(json.dumps({**x, 'split': 'test'}) + '\n' for x in lines))
  letters = tasks.Task('letters', str(path), 'letter', shots=2, shots_from='test')
  tasks.perform(run, [letters], mesh, 8)
  _, *kept = map(json.loads, (run / 'tasks/letters.jsonl').read_text().splitlines())
  theirs = {str(x['doc_id']): x['filtered_resps'] for x in results['samples']['letters']}
  for record in kept:
    expected = [float(logprob) for logprob, _ in theirs[record['id']]]
    np.testing.assert_allclose([x for x, _ in record['answer']], expected, atol=1e-4)


def test_what_it_cannot_do_is_refused():
  ours = harness.SLM(str(toy.random_run()))
  with pytest.raises(ValueError, match='expected greedy decoding'):
    ours.generate_until(requests('generate_until', [('x', {'do_sample': True})]))
  with pytest.raises(ValueError, match='max_tokens=256: expected 1 to 63'):
    ours.generate_until(requests('generate_until', [('x', {'until': ['.']})]))
  with pytest.raises(ValueError, match="batch_size: expected a number, found 'auto'"):
    harness.SLM(str(toy.random_run()), batch_size='auto')
