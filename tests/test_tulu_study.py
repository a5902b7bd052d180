"""The Tülu study: its tasks, its measures, its claims on known results, and a part of it run."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
from test_sharpening import one_device

from experiments.tulu import claims, measure, report, results, tasks
from experiments.tulu.results import Found
from experiments.tulu.run import Study
from experiments.tulu.runs import CPU, RUNS, SCALES, SMOKE
from slm.base import files
from slm.data import loader
from slm.inference import verifiers
from slm.reporting import verdicts

pytestmark = pytest.mark.long


def test_rules_are_obeyed_by_both_families_and_split_by_combination():
  pairs = tasks.ruled()
  rng = random.Random(0)
  for rules in rng.sample(pairs, 30):
    made = tasks.obeying(rng, rules)
    for rule, how in itertools.product(rules, ('official', 'released')):
      assert measure.passes([getattr(rule, how)], made)
    assert len(made) < tasks.MAX_RULES
  parts = tasks.split(pairs, 0, *CPU.heldout_rules)
  asked = {name: {frozenset(x['prompt'][:-1].split()) for x in tasks.asked(part, 'official')}
           for name, part in parts.items()}  # fmt: skip
  for a, b in itertools.combinations(asked.values(), 2):
    assert not a & b
  # The two families read one prompt in two ways: at least, and exactly.
  (rule,) = (rule for rule in tasks.all_rules() if rule.said == 'La2')
  verdict = lambda how: measure.passes([getattr(rule, how)], 'a a a')
  assert verdict('official') and not verdict('released')


def test_corruption_changes_one_digit():
  rng = random.Random(0)
  for answer in ('20', '198', '55'):
    changed = tasks.corrupted(rng, answer)
    assert sum(a != b for a, b in zip(answer, changed, strict=True)) == 1


def test_pass_at_k_is_the_mean_over_all_choices():
  passed = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], float)
  for k in range(1, 6):
    every = [[max(c) for c in itertools.combinations(row, k)] for row in passed]
    np.testing.assert_allclose(measure.pass_at(k, passed), np.mean(every, axis=1))


def test_differences_are_paired_by_seed_and_item():
  rng = np.random.default_rng(0)
  items = rng.normal(0, 5, 400)  # vary far more than the two runs differ
  a = {s: items + 0.2 + 0.01 * s + rng.normal(0, 0.1, 400) for s in (0, 1, 2)}
  b = {s: items for s in (0, 1, 2, 3)}
  found = results.paired(a, b)
  assert found.seeds == pytest.approx((0.2, 0.21, 0.22), abs=0.02)
  assert found.low > 0.15 and found.high < 0.27
  assert results.paired(a, {7: items}) is None and results.paired(None, b) is None
  # One seed that differs from the others widens the interval over zero.
  assert results.paired({**a, 2: items - 0.3}, b).low < 0


def _kept(root, name, seed, **passed):
  path = Found(SMOKE, root).path(name, seed)
  files.write_json(path / 'result.json', {})
  measure.keep(path / 'measured' / 'rules-test.npz', lambda: {**passed, 'kl': np.zeros((40, 4))})


def test_claims_follow_what_was_measured(tmp_path):
  scale = dataclasses.replace(SMOKE, seeds=(0, 1, 2))
  rng = np.random.default_rng(0)
  share = lambda p: (rng.random((40, 5)) < p).astype(float)
  for seed in scale.seeds:
    _kept(tmp_path, 'sft', seed, official=share(0.2), released=share(0.2))
    _kept(tmp_path, 'rl_rules', seed, official=share(0.9), released=share(0.2))
    _kept(tmp_path, 'rl_rules_released', seed, official=share(0.9), released=share(0.2))
  found = Found(scale, tmp_path)
  verdict = lambda claim: verdicts.verdict(claim(found))
  assert verdict(claims.rewards_teach) == verdicts.YES
  assert verdict(claims.verifiers_differ) == verdicts.NOISE
  assert verdict(claims.kl_holds_back) == verdicts.UNTESTED
  _kept(tmp_path, 'rl_rules_coin', 0, official=share(0.95), released=share(0.9))
  assert verdict(claims.a_coin_does_not_help).startswith(verdicts.NO)
  lower = Found(scale, tmp_path / 'other')
  for seed in scale.seeds:
    _kept(lower.root, 'sft', seed, official=share(0.9), released=share(0.2))
    _kept(lower.root, 'rl_rules', seed, official=share(0.2), released=share(0.2))
  assert verdicts.verdict(claims.rewards_teach(lower)) == verdicts.NO


def test_runs_start_from_runs_before_them_and_equal_grids_are_compared():
  names = list(RUNS)
  for run in RUNS.values():
    assert not run.start or names.index(run.start) < names.index(run.name)
    assert len(run.cells(whole=False)) == 1 <= len(run.cells(whole=True))
  size = lambda name: len(RUNS[name].cells(whole=True))
  assert size('mean') == size('sum') == size('mean_free') == size('sum_free') == size('prompts') > 1
  assert size('norm_rules') == size('plain_rules') == size('weak_rules') == size('made_rules') > 1
  assert all(scale.steps.keys() == CPU.steps.keys() for scale in SCALES.values())


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  """Run a part of the smallest scale: fine-tuning, rewards, and what leaks."""
  root = tmp_path_factory.mktemp('tulu')
  steps = {**SMOKE.steps, 'sft': 60}
  with one_device():
    made = Study(dataclasses.replace(SMOKE, steps=steps), root)
    made.prepare()
    for name in ('sft', 'rl_rules', 'leaky'):
      made.trained(RUNS[name], 0)
  return made


def test_trained_prompts_are_the_same_tokens(study):
  """The two sets differ in what is trained, in nothing else."""
  answers, everything = (
    loader.Split(str(study.root / 'data' / x), 'sft', 'train') for x in ('talks', 'whole')
  )
  a, b = (x.read(x.ids) for x in (answers, everything))
  np.testing.assert_array_equal(a['tokens'], b['tokens'])
  assert (a['trained'] <= b['trained']).all() and a['trained'].sum() < b['trained'].sum()


def test_exactly_the_leaks_are_dropped(study):
  counts = Found(study.scale, study.root).leaks
  assert counts == {'planted': 4, 'dropped': 4, 'right': 4}


def test_answers_are_those_of_the_verifiers_and_a_start_has_no_divergence(study):
  path = study.path('sft', 0) / 'measured' / 'rules-test'
  kept, texts = measure.read(path.with_suffix('.npz')), files.read_json(path.with_suffix('.json'))
  assert kept['official'].shape == (32, 1 + SMOKE.samples)
  labels = loader.Split(str(study.root / 'data' / 'prompts'), 'rules', 'test').labels()
  for i, j in ((0, 0), (3, 2), (31, 4)):
    score = verifiers.score(texts[i][j], verifiers.read(labels[i]['verifiers']))
    assert kept['official'][i, j] == all(v.value for v in score.verdicts)
  np.testing.assert_allclose(kept['kl'], 0, atol=1e-3)
  moved = measure.read(study.path('rl_rules', 0) / 'measured' / 'rules-test.npz')['kl']
  assert np.abs(moved).max() > 1e-3


def test_the_report_says_what_was_not_run(study):
  report.write(Found(study.scale, study.root))
  text = (study.root / 'table.md').read_text()
  assert 'not run' in text and '| leaky |' in text and 'Decontamination finds exactly' in text
  before = {p: p.stat().st_mtime_ns for p in (study.root / 'runs').rglob('*') if p.is_file()}
  with one_device():  # a second call makes nothing again
    study.trained(RUNS['sft'], 0)
  after = {p: p.stat().st_mtime_ns for p in (study.root / 'runs').rglob('*') if p.is_file()}
  assert before == after
