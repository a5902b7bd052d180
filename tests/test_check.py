"""The check of advice by leaving out domains, and the measured cells that advice uses."""

import dataclasses

import pytest
import studies

from experiments.specialise import check, measured, report
from experiments.specialise.study import load_study
from slm.reporting import advise

SLM_PARAMS = 126_000_000


def test_the_shipped_cells_are_those_of_the_committed_results():
  cells = [c for path in measured.RESULTS for c in measured.read(path)]
  assert advise.FILES[0].read_text() == measured.write(cells)
  losses = [c.loss for c in advise.read(advise.FILES[0])]
  assert losses == pytest.approx([c.loss for c in cells], rel=1e-5)


def test_reads_what_a_report_wrote(tmp_path):
  m = studies.Maker(tmp_path / 'study', ('law', 'news'), (1_000_000, 8_000_000), (0, 1, 2))
  for method, offset in {'slm': 0.0, 'mixture': -0.1, 'llm': -0.3, 'importance': 0.0}.items():
    m.add(method, offset)
  report.report(m.save())
  cells = measured.read(tmp_path / 'study' / 'results.csv')
  first = next(c for c in cells if c.method == 'mixture')
  assert (first.study, first.domain_tokens, first.seeds, first.domains) == ('study', 1e6, 3, 2)
  assert first.params == SLM_PARAMS and first.better == 2
  assert first.generic_flops == studies.GENERIC_FLOPS + 5e11  # clustering
  file = tmp_path / 'measured.csv'
  file.write_text(measured.write(cells))
  own = advise.Question(SLM_PARAMS, 1.01e14, studies.TUNE_FLOPS, 1_000_000)
  text, (_, rows) = advise.advise(advise.read(file), own)
  assert text.startswith('Use SLM-mix, hard mixture (better on every domain and in every seed')
  assert rows[-1][-1] == 'serves 771M parameters; needs 6.00e14 FLOPs once, the budget is 1.01e14'
  broken = tmp_path / 'results.csv'
  broken.write_text('a,b\n1,2\n')
  with pytest.raises(ValueError, match='expected a results.csv of experiments.specialise'):
    measured.read(broken)
  with pytest.raises(ValueError, match='gone: no such file'):
    measured.read(tmp_path / 'gone')


def test_gains_are_over_the_seeds_that_both_have(tmp_path):
  """Seed 0 is easy: a method that ran only that seed must not look better for it."""
  m = studies.Maker(tmp_path / 'a', ('law',), (1_000_000,), (0,))
  for method, offset in (('slm', -0.3), ('project', -0.31)):
    m.add(method, offset)
  m.seeds = (1, 2)
  m.add('slm', 0.0)
  report.report(m.save())
  losses = {c.method: c.loss for c in measured.read(tmp_path / 'a' / 'results.csv')}
  assert losses['project'] - losses['slm'] == pytest.approx(-0.01, abs=0.005)


def test_check_leaves_each_domain_out(tmp_path):
  """One domain is unlike the others: advice on it must not use its own results."""
  m = studies.Maker(tmp_path, ('law', 'news', 'bio'), (10_000, 80_000), (0,))
  usual = {'slm': 0.0, 'mixture': -0.1, 'project': -0.3, 'importance': -0.05}
  for method, offset in usual.items():  # the projected network costs too much
    m.add(method, {d: offset if d != 'bio' else 0.1 * (method != 'slm') for d in m.domains})
  study = load_study(m.save())
  cases = check.cases(study)
  assert {c.domain for c in cases} == {'law', 'news', 'bio'}
  assert {'importance' in c.options for c in cases} == {True, False}  # as the money allows
  bio, others = ([c for c in cases if (c.domain == 'bio') == unlike] for unlike in (True, False))
  # Two usual domains, or a usual one and the other, say the same of the third.
  assert {c.chosen for c in bio} == {'mixture'} and not any(c.close('mixture') for c in bio)
  assert all(c.regret('mixture') == pytest.approx(0.1, abs=0.05) for c in bio)
  assert all(c.close('mixture') and c.regret('slm') > 0.02 for c in others)
  rows = {row[0].split(' (')[0]: row for row in check.table(study)['rows']}
  assert [*rows] == [
    'as advised', 'always SLM', 'always SLM-is, importance sampling',
    'always SLM-pn, projected network', 'always SLM-mix, hard mixture',
  ]  # fmt: skip
  share = sum(c.close('importance') if 'importance' in c.options else c.close('slm') for c in cases)
  assert rows['always SLM-is, importance sampling'][1].startswith(f'{share / len(cases):.0%} of')
  assert f'not affordable in {len(cases)}' in check.table(study)['rows'][3][0]
  alone = dataclasses.replace(study, domains=('law',))
  assert check.table(alone)['rows'] == []
  only = [run for run in study.planned if run['domain'] == 'law']  # the others are not run yet
  assert check.table(dataclasses.replace(study, planned=tuple(only)))['rows'] == []


def test_the_answer_left_out_is_at_the_money_that_was_asked_about(tmp_path):
  """A method of twice the cost is judged by its run of half the length, not by its longest."""
  m = studies.Maker(tmp_path, ('law', 'news'), (10_000,), (0,))
  for budget in (0.5, 1):
    for method, offset in (('slm', 0.0), ('project', -0.5 if budget == 1 else 0.4)):
      m.add(method, offset, budget=budget)
  cases = check.cases(load_study(m.save()))
  (case, *_) = [c for c in cases if c.question.pretrain_flops == studies.GENERIC_FLOPS]
  # The projected network costs 1.6 of the SLM, so that half of its pretraining is what fits.
  gap = case.options['project'].loss - case.options['slm'].loss
  assert gap == pytest.approx(0.4, abs=0.02)
