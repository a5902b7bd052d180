"""Advice for a budget: interpolation, what fits, how sure, the paper's table, and its check."""

import dataclasses
import math
import re
import subprocess
import sys

import pytest
import studies
import toy

from experiments.specialise import check, report
from experiments.specialise.study import load_study
from slm.data import histograms, loader
from slm.reporting import advise
from slm.reporting.points import Budget, Point, Want, read

SLM_PARAMS = 126_000_000
UNIT = SLM_PARAMS * 1e7  # FLOPs of a token per parameter in the synthetic runs
PER_TUNE = studies.TUNE_FLOPS / UNIT


def point(method='slm', pretrain=100.0, specialise=1.0, text=0.1, loss=3.0, **more):
  rest = dict(
    study='s', label=method, params=1.0, low=-0.01, high=0.01, seeds=3, size=int(text * 1000),
    better=3, domains=3, slm_params=SLM_PARAMS, per_token=6.0,
  )  # fmt: skip
  return Point(method=method, pretrain=pretrain, specialise=specialise, text=text,
                      loss=loss, **rest | more)  # fmt: skip


def grid(method, loss, once=True, **more):
  """Measure a method at budgets 10 and 1000 and 0.01 and 1 tokens of text per parameter."""
  return [
    point(method, *((b, 0.1) if once else (0.0, b)), text=t, loss=loss(b, t), **more)
    for b in (10.0, 1000.0)
    for t in (0.01, 1.0)
  ]


def budget(pretrain, specialise, text, domains, large=0.0, params=SLM_PARAMS, per_token=6.0):
  """Turn a Want's numbers back into what somebody would say."""
  unit = per_token * params**2
  flops = pretrain * unit, specialise * unit
  return Budget(params, *flops, text * params, domains, large * params)


PLANE = lambda b, t: 5 - 0.2 * math.log(b) - 0.1 * math.log(t)


@pytest.mark.parametrize(('budget', 'text'), [(10, 0.01), (100, 0.1), (37, 0.6), (1000, 1.0)])
def test_interpolation_is_exact_on_a_plane_in_logarithms(budget, text):
  (found,) = advise.options(grid('slm', PLANE), Want(budget, 1.0, text, 1))
  assert found.loss == pytest.approx(PLANE(budget, text), abs=1e-9)
  assert 1 <= len(found.points) <= 4


def test_a_method_spends_the_budget_of_its_kind():
  """What is paid per domain follows the money after, and is out of reach without it."""
  points = grid('slm', PLANE) + grid('importance', PLANE, once=False)
  names = lambda want: [o.method for o in advise.options(points, want)]
  assert names(Want(100, 1.0, 0.1, 1)) == ['slm']
  rich = advise.options(points, Want(100, 1000, 0.1, 1))
  losses = {o.method: o.loss for o in rich}
  assert losses['importance'] == pytest.approx(PLANE(1000, 0.1))
  assert losses['slm'] == pytest.approx(PLANE(100, 0.1))
  costs = {o.method: o.cost for o in advise.options(points, Want(100, 1000, 0.1, 50))}
  assert costs['importance'] == pytest.approx(50 * 1000)
  assert costs['slm'] == pytest.approx(100 + 50 * 0.1)


def test_beyond_what_was_measured_there_is_no_option():
  points = grid('slm', PLANE)
  for want in ((100, 1.0, 9.0, 1), (100, 1.0, 0.001, 1), (1, 1.0, 0.1, 1), (100, 0.01, 0.1, 1)):
    assert not advise.options(points, Want(*want))
  # More money than was measured gives what the most measured gave, unless far more.
  (found,) = advise.options(points, Want(1400, 1.0, 0.1, 1))
  assert found.loss == pytest.approx(PLANE(1000, 0.1))
  assert advise.nearest({'a': points}, budget(1400, 1.0, 0.1, 1)) == 'a'
  assert any(
    'No more than 1e+03' in x for x in advise.advise({'a': points}, budget(1400, 1, 0.1, 1))
  )
  assert advise.nearest({'a': points}, budget(1600, 1.0, 0.1, 1)) is None
  # Nor does a study speak for models of quite another size.
  assert advise.nearest({'a': points}, budget(100, 1.0, 0.1, 1, params=2 * SLM_PARAMS)) == 'a'
  assert advise.nearest({'a': points}, budget(100, 1.0, 0.1, 1, params=20 * SLM_PARAMS)) is None


def test_nothing_over_the_budget_fits():
  points = grid('slm', PLANE) + grid('importance', PLANE, once=False)
  names = lambda *want: [o.method for o in advise.options(points, Want(*want))]
  assert names(100, 10.1, 0.1, 1) == ['slm', 'importance']
  assert names(100, 9.0, 0.1, 1) == ['slm']
  assert names(9.0, 1.0, 0.1, 1) == [] and names(100, 0.09, 0.1, 1) == []
  found = advise.options(points, Want(50, 20, 0.1, 1))
  assert {o.method: o.cost for o in found} == pytest.approx({'slm': 50.1, 'importance': 20})


def test_what_a_study_paid_is_what_it_is_asked_for_that_money(tmp_path):
  """FLOPs are counted as the study counted them: attention and head are in its tokens' cost."""
  m = studies.Maker(tmp_path / 'a', ('law',), (1_000_000,), (0,))
  m.add('slm', 0.0)
  report.report(m.save())
  points = read(tmp_path / 'a' / 'results.csv')
  assert points[0].per_token == pytest.approx(1e7 / SLM_PARAMS)
  own = Budget(SLM_PARAMS, studies.GENERIC_FLOPS, studies.TUNE_FLOPS, 1_000_000, 1)
  want = own.want(points[0].per_token)
  assert (want.pretrain, want.specialise) == (points[0].pretrain, points[0].specialise)
  assert any(
    x.startswith('  SLM') and 'cost   1.0×' in x for x in advise.advise({'a': points}, own)
  )


def lower(by):
  return lambda b, t: PLANE(b, t) - by


def test_the_plain_slm_where_nothing_is_clearly_better():
  want = Want(100, 1.0, 0.1, 1)
  for points in (grid('slm', PLANE), grid('slm', PLANE) + grid('project', lower(0.015))):
    _, chosen, _ = advise.measured(points, want)
    assert chosen.method == 'slm'
  _, chosen, how = advise.measured(grid('slm', PLANE) + grid('project', lower(0.1)), want)
  assert chosen.method == 'project' and how == 'better on every domain and in every seed measured'
  some = grid('project', lower(0.1), better=1, seeds=1)
  _, chosen, how = advise.measured(grid('slm', PLANE) + some, want)
  assert chosen.method == 'project' and how.startswith('likely: clearly better on 33%')


def test_a_cheaper_method_that_cannot_be_told_apart_is_advised():
  points = grid('slm', PLANE) + grid('project', lower(0.1))
  points += grid('importance', lambda b, t: PLANE(100, t) - 0.105, once=False)
  _, chosen, how = advise.measured(points, Want(100, 1000, 0.1, 50))
  assert chosen.method == 'project' and 'importance may be a little better' in how


def test_a_larger_model_only_where_it_may_be_served():
  points = grid('slm', PLANE) + grid('llm', lower(0.3), params=6.0)
  want = lambda large: Want(100, 1, 0.1, 1, large)
  names = lambda large: {o.method for o in advise.options(points, want(large))}
  assert names(0.0) == {'slm'} and names(6.2) == {'slm', 'llm'} and names(60.0) == {'slm'}


@pytest.mark.parametrize(
  ('want', 'spread', 'start'),
  [
    ((500, 0.1, 0.01, 50), 0.0, 'SLM-pn'),
    ((1440, 0.1, 0.06, 50), 0.0, 'SLM-mix'),
    ((2160, 0.1, 0.01, 50), 0.0, 'SLM-pn'),
    ((722, 0.1, 0.5, 50), 0.0, 'The plain SLM: nothing shared gains'),
    ((500, 0.1, 0.01, 50), 0.4, 'The plain SLM: the domain is spread 40%'),
    ((500, 400, 0.01, 1), 0.0, 'SLM-is'),
    ((100, 0.1, 0.01, 50), 0.0, 'The plain SLM'),
    ((500, 0.1, 0.5, 50), 0.0, 'The plain SLM'),
    ((500, 0.1, 0.01, 50, 6.0), 0.0, 'The LLM'),
    ((500, 0.1, 5.0, 1), 0.0, 'I do not know'),
    ((0.1, 0.1, 0.01, 1), 0.0, 'I do not know'),
    ((52, 0.1, 0.01, 7), 0.0, 'I do not know'),
    ((1e9, 1e9, 0.01, 7), 0.0, 'I do not know'),
    ((0.0, 150, 0.01, 20), 0.0, 'SLM-is'),
    ((500, 400, 0.008, 1, 6.0), 0.0, 'SLM-is'),
    ((500, 400, 0.1, 1, 6.0), 0.0, 'The LLM'),
  ],
)
def test_the_papers_table(want, spread, start):
  lines = advise.advise({}, budget(*want), spread)
  assert lines[0].startswith('Outside of what was measured') and lines[1].startswith(start)


def test_the_paper_is_stretched_to_other_sizes_with_a_word_on_it():
  lines = advise.advise({}, budget(500, 0.1, 0.01, 50, params=7e9))
  assert lines[0].startswith('I do not know') and 'near 7B parameters' in lines[0]


def test_reads_what_a_report_wrote(tmp_path):
  m = studies.Maker(tmp_path / 'study', ('law', 'news'), (1_000_000, 8_000_000), (0, 1, 2))
  for method, offset in {'slm': 0.0, 'mixture': -0.1, 'llm': -0.3, 'importance': 0.0}.items():
    m.add(method, offset)
  report.report(m.save())
  points = read(tmp_path / 'study' / 'results.csv')
  first = next(p for p in points if p.method == 'mixture')
  assert (first.study, first.size, first.seeds, first.domains) == ('study', 1_000_000, 3, 2)
  assert first.text == pytest.approx(1 / 126) and first.params == 1
  assert first.better == 2
  own = Budget(SLM_PARAMS, studies.GENERIC_FLOPS, studies.TUNE_FLOPS, 1_000_000, 1)
  lines = advise.advise({'study': points}, own)
  assert lines[0] == (
    'Use SLM-mix, hard mixture (better on every domain and in every seed measured).'
  )
  assert not any('LLM' in line for line in lines)
  broken = tmp_path / 'results.csv'
  broken.write_text('a,b\n1,2\n')
  with pytest.raises(ValueError, match='expected a results.csv of experiments.specialise'):
    read(broken)


def test_a_noisy_lowest_loss_does_not_hide_a_clear_gain():
  points = grid('slm', PLANE) + grid('project', lower(0.1))
  points += grid('mixture', lower(0.12), low=-0.32, high=0.08)
  _, chosen, _ = advise.measured(points, Want(100, 1.0, 0.1, 1))
  assert chosen.method == 'project'


def test_gains_are_over_the_seeds_that_both_have(tmp_path):
  """Seed 0 alone is easy; a method that only it ran must not look better for that."""
  m = studies.Maker(tmp_path / 'a', ('law',), (1_000_000,), (0,))
  for method, offset in (('slm', -0.3), ('project', -0.31)):
    m.add(method, offset)
  m.seeds = (1, 2)
  m.add('slm', 0.0)
  report.report(m.save())
  points = read(tmp_path / 'a' / 'results.csv')
  (found,) = (o for o in advise.options(points, Want(1e9, 1e9, points[0].text, 1))
              if o.method == 'project')  # fmt: skip
  base = next(p.loss for p in points if p.method == 'slm')
  assert found.loss - base == pytest.approx(-0.01, abs=0.005)


def test_check_leaves_each_domain_out(tmp_path):
  """One domain is unlike the others: its own answer must not be known to the advice on it."""
  m = studies.Maker(tmp_path, ('law', 'news', 'bio'), (10_000, 80_000), (0,))
  usual = {'slm': 0.0, 'mixture': -0.1, 'project': -0.3, 'importance': -0.05}
  for method, offset in usual.items():  # the projected network costs too much
    m.add(method, {d: offset if d != 'bio' else 0.1 * (method != 'slm') for d in m.domains})
  study = load_study(m.save())
  found = check.cases(study)
  assert {c.domain for c in found} == {'law', 'news', 'bio'}
  assert {'importance' in c.options for c in found} == {True, False}  # as the money allows
  bio, others = ([c for c in found if (c.domain == 'bio') == unlike] for unlike in (True, False))
  # Two usual domains, or a usual one and the other, say the same of the third.
  assert {c.chosen for c in bio} == {'mixture'} and not any(c.close('mixture') for c in bio)
  assert all(c.regret('mixture') == pytest.approx(0.1, abs=0.05) for c in bio)
  assert all(c.close('mixture') and c.regret('slm') > 0.02 for c in others)
  rows = {row[0].split(' (')[0]: row for row in check.table(study)['rows']}
  assert [*rows] == [
    'as advised', 'always SLM', 'always SLM-is, importance sampling',
    'always SLM-pn, projected network', 'always SLM-mix, hard mixture',
  ]  # fmt: skip
  share = sum(c.close('importance') if 'importance' in c.options else c.close('slm') for c in found)
  assert rows['always SLM-is, importance sampling'][1].startswith(f'{share / len(found):.0%} of')
  assert f'not affordable in {len(found)}' in check.table(study)['rows'][3][0]
  alone = dataclasses.replace(study, domains=('law',))
  assert check.table(alone)['rows'] == []
  only = [run for run in study.planned if run['domain'] == 'law']  # the others are not run yet
  assert check.table(dataclasses.replace(study, planned=tuple(only)))['rows'] == []


def test_the_answer_left_out_is_at_the_money_that_was_asked_about(tmp_path):
  """A method of twice the cost is judged by its half as long run, not by its longest."""
  m = studies.Maker(tmp_path, ('law', 'news'), (10_000,), (0,))
  for budget in (0.5, 1):
    for method, offset in (('slm', 0.0), ('project', -0.5 if budget == 1 else 0.4)):
      m.add(method, offset, budget=budget)
  found = check.cases(load_study(m.save()))
  (case, *_) = [c for c in found if c.want.pretrain == pytest.approx(studies.GENERIC_FLOPS / UNIT)]
  # The projected network costs 1.6 of the SLM: 0.8 at half, so 1 lies between its two budgets.
  share = math.log(1 / 0.8) / math.log(2)
  gap = case.options['project'].loss - case.options['slm'].loss
  assert gap == pytest.approx(0.4 - 0.9 * share, abs=0.02)


def run(*arguments):
  command = [sys.executable, '-m', 'slm.advise', *arguments]
  return subprocess.run(command, capture_output=True, text=True)


def test_command_reads_the_spread_of_a_domain(tmp_path):
  path = toy.prepared()
  file = toy.write_jsonl(tmp_path / 'law.jsonl', toy.documents(['law'], 20, 7))
  budget = ['--params=126e6', '--pretrain_flops=5e19', '--specialise_flops=1e16']
  done = run(*budget, '--domain_tokens=1e6', f'--domain_text={file}', f'--data={path}')
  assert done.returncode == 0, done.stderr
  assert re.search(r'text, [\d,]+ windows, lies in about [\d.]+ clusters; as many', done.stdout)
  assert 'The plain SLM: the domain is spread' in done.stdout
  counts = loader.window_counts(path, 'generic', 'train', 8)
  assert len(counts) == 8
  refused = run(*budget, '--domain_tokens=1e6', f'--domain_text={file}')
  assert refused.returncode == 1 and '--domain_text needs --data' in refused.stderr
  assert 'expected finite numbers' in run('--params=1e6').stderr
  assert 'expected finite numbers' in run(*budget[1:], '--params=nan', '--domain_tokens=1').stderr


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--params=1e200'], '--params=1e+200: expected from 1e3 to 1e13'),
    (['--params=1e-300'], 'expected from 1e3 to 1e13'),
    (['--params=1e6', '--results=gone/results.csv'], 'gone/results.csv: no such file'),
    (['--params=1e6', '--data=D', '--domain_text=gone.txt'], '--domain_text: gone.txt: no such'),
  ],
)
def test_bad_input_is_one_line(flags, message):
  done = run('--pretrain_flops=1e15', '--specialise_flops=1e12', '--domain_tokens=1e5', *flags)
  assert done.returncode == 1 and message in done.stderr and not done.stdout
  assert len(done.stderr.strip().split('\n')) == 1


def test_spread_is_beside_as_much_generic_text(tmp_path):
  """Text of every topic is as widely spread as generic text, however little of it there is."""
  path, shares = toy.prepared(), []
  for topics, number in ((list(toy.TOPICS), 8), (list(toy.TOPICS), 80), (['law'], 80)):
    file = toy.write_jsonl(tmp_path / 'text.jsonl', toy.documents(topics, number, 11))
    windows, held, generic = histograms.spread(path, [file])
    assert windows >= number and 1 <= held <= 8
    shares.append(held / generic)
  assert shares[:2] == pytest.approx([1, 1], abs=0.25) and shares[2] < 0.6
