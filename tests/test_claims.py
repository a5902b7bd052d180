"""Verdicts on the paper's claims, and methods compared as pretraining goes on."""

import functools
import pathlib
import re
import tempfile

import pytest
import studies

from experiments.specialise import budgets, claims, report, sweeps
from experiments.specialise.cells import compare
from experiments.specialise.study import load_study
from slm.reporting.verdicts import NO, NOISE, UNTESTED, YES

# Loss above the plain SLM's, as the paper finds it; 'generic': before any specialisation.
PAPER = {
  'slm': 0.0, 'slm_noft': 0.6, 'slm_nopt': 2.5, 'llm': -0.2, 'importance': -0.25, 'distill': 0.05,
  'mixture': -0.05, 'project': -0.1,
}  # fmt: skip
FURTHER = {
  'importance_noft': -0.1, 'mixture_noft': 0.75, 'project_noft': 0.4, 'llm_noft': 0.5,
  'project_64': -0.15, 'importance_16': -0.12, 'importance_64': -0.2, 'importance_top': -0.05,
  'mixture_best': -0.05, 'project_best': -0.1,
}  # fmt: skip
GENERIC = {'slm': 0.3, 'project': 0.2, 'mixture': 0.1, 'llm': 0.0}
# By budget: SLM-mix needs it, and SLM-is with an eighth of it is no better than SLM-pn with all.
EARLIER = {0.125: {'mixture': 0.08, 'importance': -0.13}, 0.5: {'mixture': -0.03}}
SHRINK = {'importance': 0.3}  # its gain is for little text
METHODS = [
  {'name': n, 'label': studies.LABELS.get(n, n), 'describe': n, 'group': 'More' * (n in FURTHER)}
  for n in (*PAPER, *FURTHER)
]
# So that all of the pretraining is 2,880 tokens per parameter, an eighth of it 360.
PARAMS = {n['name']: 3472 for n in METHODS}


@functools.cache
def store():
  return tempfile.TemporaryDirectory(prefix='slm-claims-')


def maker(path, offsets=PAPER, generic=GENERIC, earlier=EARLIER, further=FURTHER, shrink=None):
  m = studies.Maker(
    path, ('law', 'news'), (10_000, 80_000), (0, 1, 2), store=pathlib.Path(store().name)
  )
  for method, offset in {**offsets, **further}.items():
    m.add(method, offset, shrink=(shrink or SHRINK).get(method, 0.6))
  for budget, changes in earlier.items():
    for method, offset in {**offsets, **changes}.items():
      m.add(method, offset + 0.1 * (1 - budget), budget=budget)
  for method, offset in generic.items():
    m.add_generic(method, offset)
  return m


def verdicts(m, **changes):
  path = m.save(**{'methods': METHODS, 'params': PARAMS, **changes})
  rows = claims.table(load_study(path))['rows']
  return {int(number): (verdict, numbers) for number, _, verdict, numbers in rows}


def test_the_papers_own_results_reproduce_the_claims(tmp_path):
  found = verdicts(maker(tmp_path))
  wrong = {n: v for n, v in found.items() if v[0] != YES}
  assert [*wrong] == [15], wrong  # which no study here can test
  assert (
    '[SLM-is, importance sampling](report.html#importance-10000-1) − '
    '[SLM](report.html#slm-10000-1), 10k tokens: −0.250'
  ) in found[3][1]
  assert '0.125 of the pretraining' in found[5][1] and '3 seeds' in found[5][1]


LATE = {'shrink': {**SHRINK, 'project': 1.6, 'mixture': 1.6}}
OPPOSITES = {
  1: {'offsets': {**PAPER, 'slm_noft': -0.3}},
  2: {'offsets': {**PAPER, 'distill': -0.9}},
  3: {'offsets': {**PAPER, 'mixture': -0.3}},
  4: {'earlier': {**EARLIER, 0.125: {'mixture': 0.08, 'importance': -0.5}}},
  5: {'earlier': {**EARLIER, 0.5: {'project': 0.05}}},
  6: {'earlier': {**EARLIER, 0.125: {'mixture': -0.3}}},
  7: {'offsets': {**PAPER, 'mixture': -0.15}},
  8: LATE,
  9: {'generic': {**GENERIC, 'mixture': 0.25}},
  10: {'further': {**FURTHER, 'importance_noft': 0.4, 'llm_noft': 0.45, 'project_noft': 0.5,
                   'mixture_noft': 0.55}, 'shrink': {'slm': 1.0}},
  11: {'earlier': {**EARLIER, 0.5: {'distill': -0.3}}},
  12: {'further': {**FURTHER, 'project_64': -0.02}},
  13: {'further': {**FURTHER, 'importance_16': 0.1}},
  14: {'further': {**FURTHER, 'project_best': -0.2}},
  16: {'further': {**FURTHER, 'importance_64': -0.4}},
}  # fmt: skip


@pytest.mark.parametrize('number', OPPOSITES)
def test_the_opposite_does_not_reproduce_a_claim(tmp_path, number):
  assert verdicts(maker(tmp_path, **OPPOSITES[number]))[number][0] == NO


ASKED = {
  1: 'slm_noft', 2: 'importance', 3: 'distill', 4: 'project', 5: 'project', 6: 'mixture',
  7: 'mixture', 8: 'mixture', 9: 'llm', 11: 'distill', 12: 'project_64', 13: 'importance_top',
  14: 'mixture_best', 16: 'importance_16',
}  # fmt: skip


@pytest.mark.parametrize('number', ASKED)
def test_a_part_that_was_not_run_is_no_agreement(tmp_path, number):
  without = lambda values: {m: x for m, x in values.items() if m != ASKED[number]}
  parts = {'offsets': without(PAPER), 'further': without(FURTHER), 'generic': without(GENERIC)}
  early = {budget: without(values) for budget, values in EARLIER.items()}
  found = verdicts(maker(tmp_path, **parts, earlier=early))[number]
  assert found[0] == UNTESTED and 'not run' in found[1]


def test_a_study_of_the_main_methods_alone_is_judged(tmp_path):
  m = maker(tmp_path, earlier={}, further={})
  rows = claims.table(load_study(m.save()))['rows']
  assert rows[11][2] == UNTESTED and rows[11][3].startswith('SLM-pn, 64 clusters − [SLM-pn')
  assert rows[6][2] == YES and rows[5][3].endswith('at 1,440 tokens per parameter: not run')


def test_one_budget_is_not_every_budget(tmp_path):
  found = verdicts(maker(tmp_path, earlier={}))
  assert {n: v[0] for n, v in found.items() if n in (4, 5, 6, 11)} == dict.fromkeys(
    (4, 5, 6, 11), UNTESTED
  )


def test_budgets_are_the_papers_own(tmp_path):
  m = maker(tmp_path, {**PAPER, 'mixture': 0.1}, earlier={0.125: {'mixture': 0.3, 'project': 0.2}})
  found = verdicts(m, params=dict.fromkeys(PARAMS, 25_000))  # 50 and 400 tokens per parameter
  assert found[5][0] == found[6][0] == UNTESTED
  assert '0.125' not in found[5][1] and '10k tokens: −0.' in found[5][1]
  assert found[6][1].count('tokens: +0.') == found[6][1].count('of the pretraining: +0.') == 1
  for number in (5, 6):
    assert found[number][1].endswith('at 1,440 tokens per parameter: not run')


def test_a_gain_that_is_not_there_cannot_shrink(tmp_path):
  verdict, numbers = verdicts(maker(tmp_path, {**PAPER, 'mixture': 0.1}))[8]
  assert verdict == UNTESTED and numbers.endswith(', no gain')


def test_what_rests_on_one_seed_says_so(tmp_path):
  m = maker(tmp_path, earlier={})
  m.runs = [r for r in m.runs if r['method'] != 'project_64' or r['seed'] == 0]
  found = verdicts(m)
  assert found[12][0] == f'{YES}, one seed' and found[7][0] == YES
  m.runs = [r for r in m.runs if r['seed'] == 0]
  found = verdicts(m)
  assert found[7][0] == f'{YES}, one seed' and 'one seed' in found[7][1]


@pytest.mark.parametrize('number', [3, 5, 7, 8, 12, 16])
def test_what_cannot_be_told_is_within_noise(tmp_path, number):
  same = {'slm': 0.0, 'slm_noft': 0.6, 'slm_nopt': 2.5}
  flat = {**dict.fromkeys(PAPER, 0.0), **same}
  early = {0.125: {}, 0.5: {}}
  found = verdicts(maker(tmp_path, flat, earlier=early, further=dict.fromkeys(FURTHER, 0.0)))
  assert found[number][0] == NOISE and '(?)' in found[number][1]


def test_groups_and_budgets_have_their_own_tables(tmp_path):
  m = maker(tmp_path, further={'project_best': -0.12}, earlier={0.25: {}})
  path = m.save(methods=METHODS)
  study = load_study(path)
  assert study.groups == ('More',) and study.budgets == (0.25, 1)
  assert 'project_best' in study.only('More').methods
  assert 'project_best' not in study.only().methods
  found = budgets.by_budget(study)
  assert budgets.gap(found, 'project', 10_000)[1].value == pytest.approx(-0.1, abs=0.01)
  head, rows = budgets.table(found)
  assert head[2:] == ['0.25 of the pretraining', '1 of the pretraining'] and len(rows) == 16
  report.report(path)
  text = (path / 'table.md').read_text()
  assert '## More, 10k tokens of domain text' in text and '## As pretraining goes on' in text
  assert (path / 'plots' / 'loss-by-budget.svg').exists()
  assert 'project_best' not in text.split('## More')[0]


def test_evidence_links_to_the_runs_it_stands_on(tmp_path):
  path = maker(tmp_path).save(methods=METHODS, params=PARAMS)
  studies.write(path / 'sections' / '1-claims.json', claims.table(load_study(path)))
  report.report(path)
  html = (path / 'report.html').read_text()
  linked, anchors = (set(re.findall(p, html)) for p in (r'href="#([^"]*)"', r' id="([^"]*)"'))
  assert {'importance-10000-1', 'project-10000-0.5', 'slm_nopt-80000-1'} <= linked <= anchors
  line = next(x for x in html.split('<tr>') if 'id="project-10000-0.5"' in x)
  served = [f'runs/project-{d}-10000-{s}-budget0.5/' for d in ('law', 'news') for s in (0, 1, 2)]
  assert all(f'href="{run}"' in line for run in served)
  assert 'href="runs/project-2-budget0.5/"' in line  # what was paid for


def test_sweep_of_clusters(tmp_path):
  offsets = {'importance_16': -0.05, 'importance_64': -0.15}
  m = maker(tmp_path, further=offsets, earlier={})
  about = lambda name, **more: {'name': name, 'label': name, 'describe': name, **more}
  swept = {'importance': 256, 'importance_16': 16, 'importance_64': 64, 'project': 16}
  methods = [
    about(n, sweep=[n.split('_')[0], swept[n]] if n in swept else [], group='More' * (n in offsets))
    for n in (*PAPER, *offsets)
  ]
  path = m.save(methods=methods)
  study = load_study(path)
  found = sweeps.by_clusters(study, [compare(study.only(g)) for g in ('', 'More')], 10_000)
  tests, points = found.pop('importance')
  assert not found and list(points) == [16, 64, 256] and tests == ('law/test', 'news/test')
  values = [d.value for d in points.values()]
  assert values == pytest.approx([-0.05, -0.15, -0.25], abs=0.01)
  report.report(path)
  assert (path / 'plots' / 'clusters-sweep.svg').exists()


def test_every_claim_asks_for_methods_that_exist(tmp_path, monkeypatch):
  from experiments.specialise.methods import EVERY

  asked, cell = set(), claims.Found.cell
  record = lambda self, method, *where: asked.add(method) or cell(self, method, *where)
  monkeypatch.setattr(claims.Found, 'cell', record)
  verdicts(maker(tmp_path))
  assert len(asked) > 15 and asked <= set(EVERY)
  assert len(claims.CLAIMS) == 16
