"""The recipe of post-training: interrupted after every stage, its report, plans of its configs."""

import importlib
import json
import re

import jax
import pytest

from configs import tulu, tulu3, tulu_quick, tulu_smollm2
from slm.base import files
from slm.inference import tasks
from slm.posttraining import planning, recipe, settings
from slm.reporting import posttraining as report
from slm.reporting import scores
from slm.runs import config, rundir
from slm.training import loop
from slm.weights import sharding
from slm.weights.count import num_params

STAGES = ('sft', 'dpo', 'rlvr', 'control')


def tiny():
  """Return the quick recipe with a few rows and steps."""
  c = tulu_quick.get_config()
  c.made.marks.update(rows=120, heldout=24)
  shape = {
    'embed': 16,
    'num_layers': 1,
    'num_heads': 2,
    'num_kv_heads': 2,
    'head_dim': 8,
    'mlp': 32,
  }
  for section in (c.model, c.sft.model):
    section.update(shape)
  c.sft.update(steps=8)
  c.answers.update(count=4, max_tokens=4, batch_size=64)
  c.dpo.update(epochs=0.0, steps=2)
  c.rlvr.update(steps=2)
  c.rlvr.schedule.warmup = 1
  c.rlvr.data.batch_size = 4
  c.rlvr.objective.update(samples=2, max_tokens=4)
  for name in ('sft', 'dpo', 'rlvr'):
    c[name].eval.update(every=0, batch_size=8, max_rows=8)
    c[name].log_every = 1
  # Answers of a model that has learnt nothing yet pass when they need not be a whole answer.
  c.pairs.train = '{made}/marks.jsonl'
  c.evaluate.update(prompts=10, samples=4, max_tokens=4, batch_size=64, examples=2, ended=False)
  c.evaluate.tasks.preference.limit = 16
  return c


class Stopped(Exception):
  """Raised where a command is killed."""


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Run the recipe, stopped after every stage; return its directory, and what was trained when."""
  folder, train, trained = tmp_path_factory.mktemp('recipe') / 'work', loop.train, []
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])

  def stopping(given, workdir, **options):
    new = not (workdir / 'result.json').exists()
    result = train(given, workdir, **options)
    if new:
      trained.append(workdir.name)
      raise Stopped
    return result

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda *_: mesh)
    patch.setattr(loop, 'train', stopping)
    for _ in STAGES:
      with pytest.raises(Stopped):
        recipe.tulu(tiny().to_dict(), folder)
    recipe.tulu(tiny().to_dict(), folder)
  return folder, trained


def test_a_recipe_goes_on_after_every_stage(made):
  folder, trained = made
  assert trained == list(STAGES)
  inits = {s: config.of(folder / s).init for s in STAGES}
  after = {'sft': '', 'dpo': 'sft', 'rlvr': 'dpo', 'control': 'dpo'}
  assert inits == {s: str(folder / run) if run else '' for s, run in after.items()}
  assert config.of(folder / 'control').objective.reward == 'random'
  assert config.of(folder / 'rlvr').objective.reward == 'verifiers'
  assert files.read_json(folder / 'answers' / 'summary.json')['counts']['answers'] == 480


def test_a_finished_stage_is_not_changed(made):
  folder, _ = made
  c = tiny()
  c.dpo.objective.beta = 1.0
  with pytest.raises(ValueError, match=r'dpo holds another run: objective.beta was 0.0, now 1.0'):
    recipe.tulu(c.to_dict(), folder)


def test_every_stage_answers_the_same_prompts_and_none_that_were_trained_on(made):
  folder, _ = made
  prompts = {s: set(scores.read(folder / s, report.GREEDY)[1]) for s in STAGES}
  assert len(set(map(frozenset, prompts.values()))) == 1 and len(prompts['sft']) == 10
  read = lambda name: [json.loads(x) for x in (folder / 'data/made' / name).open()]
  trained = {x['prompt'] for x in read('marks.jsonl')}
  assert len(trained) == 120 and not trained & {x['prompt'] for x in read('heldout_prompts.jsonl')}
  for item in read('marks.jsonl'):
    grade = lambda text, item=item: tasks.KINDS['labelled'].score(
      {
        'verifiers': [
          {'id': i, 'args': a} for i, a in zip(item['verifier'], item['label'], strict=True)
        ]
      },
      text,
    )['pass']
    assert grade(item['chosen']) and not grade(item['rejected'])


def test_the_report_is_made_from_the_directories(made):
  folder, _ = made
  before = (folder / 'report.md').read_text()
  for name in ('report.md', 'report.html'):
    (folder / name).unlink()
  assert report.write(folder) == before == (folder / 'report.md').read_text()
  for words in ('| SFT |', '| random rewards |', 'RLVR − random rewards', 'rollout', 'pass@4'):
    assert words in before
  html = (folder / 'report.html').read_text()
  assert 'src=' not in html and 'href="http' not in html
  drawn = scores.read(folder / 'rlvr', report.SAMPLED)[0]
  assert f'{drawn["pass@4"]:.3f} ± {drawn["pass@4_stderr"]:.3f}' in before
  assert drawn['pass@1'] == pytest.approx(drawn['pass'])
  first = json.loads((folder / 'data/made/heldout_prompts.jsonl').read_text().split('\n')[0])
  assert first['prompt'] in before
  kl = [m['kl'] for m in rundir.read_metrics(folder / 'control') if 'kl' in m]
  assert kl and 'KL from the start' in html


def test_dry_runs_of_the_configs():
  eight = planning.dry_run(tulu3.get_config('8b').to_dict(), 64, 'tpu-v5p', 0.4)
  assert '8,030,261,248' in eight and 'does not fit' not in eight
  assert '14,678' in eight and '2,121' in eight  # steps of SFT and DPO, as in the paper
  large = planning.dry_run(tulu3.get_config('70b').to_dict(), 64, 'tpu-v5p', 0.4)
  assert '70,553,706,496' in large
  hours = lambda text: float(re.search(r'^([\d,.]+) chip-hours', text, re.M)[1].replace(',', ''))
  assert 5 < hours(large) / hours(eight) < 15
  c = tulu_smollm2.get_config()
  c.start, c.model = '', {'vocab': 49_152, 'embed': 576, 'num_layers': 30, 'num_heads': 9,
                          'num_kv_heads': 3, 'head_dim': 64, 'mlp': 1536}  # fmt: skip
  assert '134,515,008' in planning.dry_run(c.to_dict(), 1, 'h100', 0.4)
  quick = planning.dry_run(tulu_quick.get_config().to_dict(), 1, 'h100', 0.4)
  assert [x for x in STAGES if re.search(f'^{x} ', quick, re.M)] == list(STAGES)
  assert num_params(planning.shape(settings.read(tulu_quick.get_config().to_dict())))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'sft.steps': 0}, 'start: dpo starts from a model: name one, or set sft.steps'),
    ({'pairs.context': 0}, 'pairs.context: expected at least 1, found 0'),
    ({'made.marks.kind': 'poems'}, 'made.marks.kind: expected one of arithmetic'),
    ({'evaluate.tasks.preference.limits': 3}, 'evaluate.tasks.preference: has no key .limits.'),
    ({'conversations.validation': ''}, 'conversations.train, conversations.validation: expected'),
    ({'conversations.train': '{corpus}/talks.jsonl'}, 'corpus: expected the directory'),
    ({'sft.steps': 0, 'dpo.steps': 0, 'rlvr.steps': 0}, 'expected steps of at least one stage'),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(changes, message, tmp_path):
  c = tiny()
  with c.unlocked():
    c.update_from_flattened_dict(changes)
    for key, value in changes.items():
      if key.endswith('limits'):
        c.evaluate.tasks.preference.limits = value
  with pytest.raises(ValueError, match=message):
    recipe.tulu(c.to_dict(), tmp_path / 'work')
  assert not list(tmp_path.glob('work/*/config.json'))


@pytest.mark.parametrize('name', ['tulu', 'tulu_quick', 'tulu_smollm2', 'tulu3'])
def test_configs_have_the_keys_of_recipes(name):
  c = importlib.import_module(f'configs.{name}').get_config().to_dict()
  assert set(c) == set(tulu.get_config().to_dict())
  for stage in ('sft', 'reward', 'dpo', 'rlvr'):
    assert set(c[stage]) == set(config.defaults())
