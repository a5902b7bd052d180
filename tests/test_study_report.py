"""The report of a study: golden table, costs, advice, the page, and what broken studies say."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from studies import (
  GENERIC_FLOPS,
  LABELS,
  TUNE_FLOPS,
  Maker,
  full_study,
  one,
  run_main,
  write,
  write_run,
)

from experiments.specialise import cells, page, plots, report
from experiments.specialise.advice import advise, crossing, unfinished
from experiments.specialise.cells import compare
from experiments.specialise.study import load_study
from slm.reporting.stats import Cost
from slm.reporting.tables import markdown


def test_golden_table(tmp_path: Path):
  maker = Maker(tmp_path, rows=2)
  maker.tokens['law'], base = np.array([10, 30]), np.array([[20.0, 10], [90, 30]])
  for method, rows in (('slm', base), ('importance', base - [[0, 0], [10, 0]])):
    write_run(tmp_path / 'runs' / method, 'finetune', 2e12, {'law/test': rows})
    maker.runs.append({
      'method': method, 'domain': 'law', 'size': 20_000, 'seed': 0, 'run': f'runs/{method}',
      'kind': 'small', 'generic_runs': [], 'specialise_runs': [f'runs/{method}'],
    })  # fmt: skip
  c = compare(load_study(maker.save()))
  head, rows = report.main_table(c, 20_000)
  assert markdown((head, rows[:1] + rows[3:5])) == (
    '| method | perplexity | bits/byte | nats/token above SLM | verdict | seeds | '
    'served parameters | generic FLOPs | FLOPs/domain | time/domain |\n'
    '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n'
    # exp(110 / 40) = 15.64; 110 / ln 2 / 160 bytes = 0.992
    '| SLM | 15.64 | 0.992 | – | reference | 1 | 126M | 0 | 2.00e12 | 20 s |\n'
    '| LLM | not run | – | – | – | – | 771M | – | – | – |\n'
    # Drawing only the first row leaves no difference, only the second 10 / 30.
    '| SLM-is, importance sampling | 12.18 | 0.902 | −0.250 [−0.333, +0.000] | within noise | '
    '1 | 126M | 5.00e11 | 2.00e12 | 20 s |\n'
  )


def test_perplexity_is_macro_average(tmp_path: Path):
  maker = Maker(tmp_path, domains=('law', 'news'))
  maker.tokens['news'] = maker.tokens['news'] * 50  # a large domain counts no more than a small one
  maker.add('slm', 0.0)
  cell = compare(load_study(maker.save())).cells['slm', 20_000]
  rows = {d: np.load(tmp_path / f'runs/slm-{d}-20000-0/eval/{d}-test.npy') for d in maker.domains}
  losses = [r[:, 0].sum() / r[:, 1].sum() for r in rows.values()]
  np.testing.assert_allclose(math.exp(cell.average.value), math.exp(np.mean(losses)), rtol=1e-12)
  assert cell.average.bpb == pytest.approx(np.mean(losses) / math.log(2) / 4)


def test_intervals_resample_documents_where_the_data_name_them(tmp_path: Path):
  maker = Maker(tmp_path, domains=('law', 'news'), rows=400)
  documents = np.repeat(np.arange(40), 10)
  shift = np.random.default_rng(6).normal(0, 0.3, 40)[documents]  # shared by a document's rows
  maker.add('slm', 0.0)
  for domain in maker.domains:
    rows = maker.rows(domain, 3.0, 0)
    rows[:, 0] += shift * rows[:, 1]
    write_run(tmp_path / f'runs/other-{domain}', 'finetune', 1e12, {f'{domain}/test': rows})
    first = next(r for r in maker.runs if r['domain'] == domain)
    maker.runs.append({**first, 'method': 'project', 'run': f'runs/other-{domain}'})
  folder = maker.save() / 'data/law/test'
  folder.mkdir(parents=True)
  np.save(folder / 'documents.npy', documents.astype(np.int32))
  c = compare(load_study(tmp_path))
  law, news = (c.to_baseline(c.cells['project', 20_000], f'{d}/test') for d in maker.domains)
  assert law.high - law.low > 2 * (news.high - news.low)
  notes = ' '.join(report.notes(c))
  assert 'resample whole documents' in notes and 'law/test 40 documents.' in notes
  assert 'resample single rows on news/test, where' in notes
  np.save(folder / 'documents.npy', documents[1:])
  with pytest.raises(ValueError, match=r'law/test: documents.npy has 399 rows, expected 400'):
    compare(load_study(tmp_path))
  np.save(folder / 'documents.npy', np.zeros(400, np.int32))  # one document: nothing to resample
  assert compare(load_study(tmp_path)).documents['law/test'] == 0


def test_intervals_hold_text_and_training_runs(tmp_path: Path):
  c = one(tmp_path, {'slm': 0.0, 'project': -0.05}, seeds=(0, 1, 2))
  found = c.to_baseline(c.cells['project', 20_000])
  assert len(found.seeds) == 3
  assert found.value == pytest.approx(np.mean(found.seeds))
  assert found.verdict == 'better'
  a, b = (c.cells[m, 20_000].average for m in ('project', 'slm'))
  text = np.percentile(sum(a.replicates[s] - b.replicates[s] for s in range(3)) / 3, [2.5, 97.5])
  runs = scipy.stats.ttest_1samp(found.seeds, 0).confidence_interval(0.95)
  assert found.value - found.low == pytest.approx(
    math.hypot(found.value - text[0], found.value - runs.low)
  )
  assert found.high - found.value == pytest.approx(
    math.hypot(text[1] - found.value, runs.high - found.value)
  )


def test_methods_of_one_domain_are_compared_on_that_domain(tmp_path: Path):
  """What a group lacks on purpose does not hide it: its averages are of the domains it shares."""
  maker = Maker(tmp_path, ('law', 'news'))
  for method, offset in {'slm': 0.0, 'project': -0.05, 'importance': -0.08}.items():
    maker.add(method, offset)
  maker.domains = ('law',)
  maker.add('distill', {'law': -0.2})
  maker.domains = ('law', 'news')
  methods = [
    {'name': m, 'label': m, 'describe': m, 'group': 'Some' * (m == 'distill')}
    for m in ('slm', 'project', 'importance', 'distill')
  ]
  study = load_study(maker.save(methods=methods))
  c = compare(study.only('Some'))
  assert c.tests == ('law/test',)
  assert c.to_baseline(c.cells['distill', 20_000]).value == pytest.approx(-0.2, abs=0.01)
  main = compare(study.only())
  assert main.tests == ('law/test', 'news/test')
  # And against a cell of the main table, on what both have.
  apart = cells.between(c.cells['distill', 20_000], main.cells['project', 20_000])
  assert apart.value == pytest.approx(-0.15, abs=0.01)
  report.report(study.path)
  assert 'Averages are over law alone.' in (study.path / 'table.md').read_text()
  lines = list(csv.DictReader((study.path / 'results.csv').open()))
  domains = {x['method']: x['domains'] for x in lines if x['on'] == 'average'}
  assert domains == {'slm': '2', 'project': '2', 'importance': '2', 'distill': '1'}


def test_a_group_may_have_a_reference_of_its_own(tmp_path: Path):
  maker = Maker(tmp_path)
  for method, offset in {'slm': 0.0, 'slm_noft': 0.6, 'project': 0.4}.items():
    maker.add(method, offset)
  methods = [{'name': m, 'label': m, 'describe': m} for m in ('slm', 'slm_noft', 'project')]
  methods[2] |= {'group': 'Before', 'reference': 'slm_noft'}
  study = load_study(maker.save(methods=methods))
  c = compare(study.only('Before'))
  assert list(study.only('Before').methods) == ['slm_noft', 'project']
  assert c.to_baseline(c.cells['project', 20_000]).value == pytest.approx(-0.2, abs=0.01)
  head, rows = report.main_table(c, 20_000)
  assert head[3] == 'nats/token above slm_noft' and [r[4] for r in rows] == ['reference', 'better']


def test_only_shared_seeds_are_compared(tmp_path: Path):
  maker = Maker(tmp_path, domains=('law', 'news'), seeds=(0, 1, 2))
  maker.add('slm', 0.0)
  maker.add('project', -0.05)
  kept = {('law', 0), ('law', 1), ('news', 1), ('news', 2)}
  maker.runs = [r for r in maker.runs if r['method'] == 'slm' or (r['domain'], r['seed']) in kept]
  c = compare(load_study(maker.save()))
  slm, cell = c.cells['slm', 20_000], c.cells['project', 20_000]
  assert list(cell.average.seeds) == [1] and len(slm.average.seeds) == 3
  found = c.to_baseline(cell)
  assert found.value == pytest.approx(cell.average.seeds[1] - slm.average.seeds[1], rel=1e-12)
  assert found.low <= found.value <= found.high and len(found.seeds) == 1


@pytest.mark.parametrize('method', ['project', 'slm', 'llm'])
def test_domains_without_a_shared_seed_are_not_averaged(tmp_path: Path, method: str):
  maker = Maker(tmp_path, domains=('law', 'news'), seeds=(0, 1))
  for name, offset in (('slm', 0.0), ('project', -0.05), ('llm', -0.1)):
    maker.add(name, offset)
  kept = {('law', 0), ('news', 1)}
  maker.runs = [r for r in maker.runs if r['method'] != method or (r['domain'], r['seed']) in kept]
  report.report(maker.save())
  c = compare(load_study(tmp_path))
  rows = {r[0]: r for r in report.main_table(c, 20_000)[1]}
  assert rows[LABELS[method]][1:6] == ['no seed on every domain: not run', *'––––']
  assert not c.cells[method, 20_000].complete


@pytest.mark.parametrize('method', ['project', 'llm'])
def test_models_without_a_shared_seed_have_no_difference(tmp_path: Path, method: str):
  maker = Maker(tmp_path)
  maker.add('slm', 0.0)
  maker.seeds = (3,)
  maker.add(method, -0.05)
  report.report(maker.save())
  c = compare(load_study(tmp_path))
  assert c.to_baseline(c.cells[method, 20_000]) is None
  rows = {r[0]: r for r in report.main_table(c, 20_000)[1]}
  assert rows[LABELS[method]][3:5] == ['–', '–']
  start = 'No other small model was run with a seed of' if method == 'project' else 'Only the plain'
  assert advise(c)[0].startswith(start)


def test_costs(tmp_path: Path):
  maker = Maker(tmp_path, domains=('law', 'news'), seeds=(0, 1))
  for method in ('slm', 'importance', 'distill', 'slm_nopt', 'slm_noft'):
    maker.add(method, 0.0)
  cells = compare(load_study(maker.save())).cells
  get = lambda m: cells[m, 20_000]
  slm, selected = get('slm'), get('importance')
  # Shared by domains, averaged over seeds; held-out evaluations do not count.
  assert slm.generic == Cost(1e7, GENERIC_FLOPS, 1000)
  assert slm.specialise == Cost(2e5, TUNE_FLOPS, 20)
  assert selected.generic == Cost(0, 5e11, 50)  # clustering only
  assert selected.specialise.flops == GENERIC_FLOPS + TUNE_FLOPS
  assert get('distill').generic.flops == 2 * GENERIC_FLOPS
  assert get('slm_nopt').generic == Cost() == get('slm_noft').specialise
  for n in (1, 7, 50):
    assert slm.total(n).flops == GENERIC_FLOPS + n * TUNE_FLOPS
    assert selected.total(n).flops == 5e11 + n * (GENERIC_FLOPS + TUNE_FLOPS)
  at = crossing(selected, slm)
  assert selected.total(at).flops > slm.total(at).flops
  assert selected.total(at - 1).flops <= slm.total(at - 1).flops


def test_cost_is_unknown_without_the_paid_run(tmp_path: Path):
  maker = Maker(tmp_path)
  maker.add('slm', 0.0)
  (tmp_path / 'runs/slm-0/ledger.json').unlink()
  cell = compare(load_study(maker.save())).cells['slm', 20_000]
  assert cell.generic is None and cell.total(7) is None and cell.specialise is not None


def test_advice_plain_slm(tmp_path: Path):
  c = one(tmp_path, {'slm': 0.0, 'project': 0.001, 'mixture': -0.001, 'distill': 0.0007})
  advice = advise(c)
  assert advice[0] == (
    'No small model was shown to be better than the plain SLM; it is the cheapest, so ship it.'
  )
  assert 'no small model was shown to beat the plain SLM' in advice[1]
  assert 'not excluded' not in advice[1] and 'as good as' not in ' '.join(advice)
  assert 'with one seed how much a training run varies is not in them' in advice[-1]
  assert 'The best of 4 small models is picked after looking' in advice[-1]


def test_advice_plain_slm_among_worse(tmp_path: Path):
  advice = advise(one(tmp_path, {'slm': 0.0, 'slm_nopt': 1.0, 'project': 0.1}))
  assert advice[0].endswith('it is the cheapest of those not shown to be worse, so ship it.')


def test_advice_names_what_is_cheaper_than_the_plain_slm(tmp_path: Path):
  advice = advise(one(tmp_path, {'slm': 0.0, 'slm_nopt': 0.0, 'project': 0.1}))
  assert 'it is the simplest, so ship it. Not shown to be worse and cheaper' in advice[0]
  assert 'SLM, no pretraining (20k tokens), N = 1; ' in advice[0]
  assert 'cheapest' not in advice[0] and 'projected' not in advice[0]


def test_advice_gives_costs_for_the_sizes_it_names(tmp_path: Path):
  maker = Maker(tmp_path, sizes=(20_000, 160_000))
  for method, offset in (('slm', 0.0), ('llm', -0.2)):
    maker.add(method, offset)
  for run in maker.runs:
    if run['method'] == 'llm' and run['size'] == 160_000:
      write_run(tmp_path / 'runs/more', 'finetune', 6e14, {})
      run['specialise_runs'].append('runs/more')
  text = ' '.join(advise(compare(load_study(maker.save()))))
  # (6e14 + 2e12) / 1.02e14 and (6e14 + 4e12 + 6e14) / 1.04e14
  assert 'training it for one domain 5.9× to 12× the FLOPs, depending on the set size' in text
  assert 'For 1, 7 and 50 domains (20k tokens each) the plain SLM costs 1.0e14 FLOPs' in text


def test_runs_that_ended_while_improving_are_flagged(tmp_path: Path):
  maker = Maker(tmp_path, sizes=(20_000, 160_000))
  for method in ('slm', 'project', 'slm_noft'):
    maker.add(method, 0.0)
  ends = {'slm-law-20000': (100, 100), 'slm-law-160000': (90, 90), 'project-law-20000': (100, 80)}
  for name, (last, best) in ends.items():
    run = tmp_path / f'runs/{name}-0'
    settings = json.loads((run / 'config.json').read_text())
    changes = {'phase': 'finetune', 'steps': 100, 'eval': {'patience': 4}}
    write(run / 'config.json', settings | changes)
    write(run / 'result.json', {'steps': last, 'best_step': best})
    known = json.loads((run / 'eval.json').read_text())
    write(run / 'eval.json', {key: {**about, 'step': best} for key, about in known.items()})
  write(tmp_path / 'runs/slm-0/result.json', {'steps': 100, 'best_step': 100})  # pretraining
  c = compare(load_study(maker.save()))
  assert unfinished(c) == [('slm', 20_000)]
  assert [row[1].endswith(' †') for row in report.main_table(c, 20_000)[1]][:2] == [True, False]
  assert '†' not in markdown(report.main_table(c, 160_000))
  flag = '† Still improving when it ended (its best step is its last): SLM (20k tokens).'
  assert report.notes(c)[-1] == flag
  assert 'how they compare: SLM (20k tokens).' in ' '.join(advise(c))


def test_advice_importance(tmp_path: Path):
  c = one(tmp_path, {'slm': 0.0, 'project': -0.05, 'importance': -0.08, 'slm_nopt': 1.0},
          seeds=(0, 1, 2))  # fmt: skip
  text = ' '.join(advise(c))
  label = LABELS['importance']
  what = 'of the small models shown to beat the plain SLM it is the best with 20k tokens'
  assert text.startswith(f'Use {label}: {what}')
  assert re.search(r'0\.08\d nats/token lower, 95 % interval 0\.07\d to 0\.08\d', text)
  assert f'{label} 1.0×, 6.3×, 26×; {LABELS["project"]} 1.6×' in text
  assert f'but {LABELS["project"]} is cheaper from N = 2' in text
  assert re.search(r'keeps 6\d% of the best gain', text)
  assert 'over several seeds, how much training runs vary.' in text and 'LLM' not in text


def test_advice_says_when_little_text_leaves_it_open(tmp_path: Path):
  maker = Maker(tmp_path, rows=8)
  maker.add('slm', 0.0)
  rows = maker.rows('law', 2.97, 0)
  rows[:, 0] += np.tile([0.2, -0.2], 4) * rows[:, 1]
  write_run(tmp_path / 'runs/other', 'finetune', 1e12, {'law/test': rows})
  maker.runs.append({**maker.runs[0], 'method': 'project', 'run': 'runs/other'})
  advice = advise(compare(load_study(maker.save())))
  assert 'was shown to be better' in advice[0]
  assert re.search(r'A gain of up to 0\.[12]\d+ nats/token is not excluded', advice[1])


def test_advice_tie(tmp_path: Path):
  text = ' '.join(advise(one(tmp_path, {'slm': 0.0, 'mixture': -0.0803, 'importance': -0.08})))
  assert 'no small model was shown to be better with 20k tokens of domain text' in text
  assert 'cannot be told from it: the difference is within its interval' in text


def test_advice_depends_on_size_and_large_model(tmp_path: Path):
  maker = Maker(tmp_path, sizes=(20_000, 160_000))
  for method, offset in (('slm', 0.0), ('project', -0.05), ('llm', -0.2)):
    maker.add(method, offset, shrink=0.0 if method == 'project' else 0.6)
  text = ' '.join(advise(compare(load_study(maker.save(scale='quick')))))
  assert 'depends on how much domain text there is' in text
  assert 'with 160k tokens none' in text
  assert 'LLM is better than the best small model with 20k tokens (0.1' in text
  assert 'Serving it takes 6.1× the parameters (771M instead of 126M)' in text
  assert 'quick scale' in text


def test_advice_exception_and_worse_large_model(tmp_path: Path):
  maker = Maker(tmp_path, domains=('law', 'news'))
  for method, offset in (('slm', 0.0), ('project', -0.1), ('llm', 0.3)):
    maker.add(method, offset)
  run = next(r for r in maker.runs if r['method'] == 'project' and r['domain'] == 'news')
  write_run(tmp_path / run['run'], 'finetune', 1e12, {'news/test': maker.rows('news', 3.13, 0)})
  text = ' '.join(advise(compare(load_study(maker.save()))))
  assert 'the plain SLM is better on news (20k tokens)' in text
  assert 'LLM is worse than the best small model' in text


def test_page_is_self_contained_and_whole(tmp_path: Path):
  study = full_study(tmp_path, domains=('law', 'news'), sizes=(20_000, 160_000), rows=60)
  out = tmp_path / 'elsewhere'
  report.report(study, out)
  html = (out / 'report.html').read_text()
  assert not re.search(r'(?:src|href|url)\s*[=(]\s*["\']?\s*(?:https?:)?//', html)
  assert not re.search(r'<(?:script|link|img|iframe)|@import', html)
  names = {p.stem for p in (out / 'plots').glob('*.svg')}
  assert names == {'perplexity', 'loss-by-size', 'loss-by-cost', 'training', 'clusters'}
  assert all(f'id="plot-{name}"' in html for name in names)
  assert html.count('<svg') == len(names)
  for part in (
    'class="answer"',
    'Comparison',
    'Cost ledger',
    'Environment',
    'What differs',
    'Runs',
  ):
    assert part in html
  for label in LABELS.values():
    assert label in html
  links = lambda html: re.findall(r'<a href="([^#"]+)"', html)
  assert not links(html)  # a page that lies elsewhere goes without the runs
  report.report(study)
  found = links((study / 'report.html').read_text())
  assert found and all((study / link).is_dir() for link in found)


def test_csv_and_markdown(tmp_path: Path):
  study = full_study(tmp_path, sizes=(20_000, 160_000), rows=60)
  report.report(study)
  rows = list(csv.DictReader((study / 'results.csv').open()))
  assert len(rows) == len(LABELS) * 2 * 2  # methods, sizes, average and law
  average = {r['method']: r for r in rows if r['on'] == 'average' and r['size'] == '20000'}
  assert float(average['llm']['ppl']) == pytest.approx(math.exp(float(average['llm']['loss'])))
  assert average['importance']['verdict'] == 'better'
  assert float(average['slm']['total_flops_7']) == GENERIC_FLOPS + 7 * TUNE_FLOPS
  text = (study / 'table.md').read_text()
  assert '### 160k tokens of domain text' in text and '## Clusters' in text
  assert '| law/test' not in text  # with one domain it would repeat the main table
  behind = text.split('## Cost ledger')[1]
  assert {line.count('|') for line in behind.split('\n') if '|' in line} == {12, 8}
  for part in (
    report.MAIN_NOTE,
    'Served parameters are those of',
    'FLOPs/domain and time/domain',
    'Effective sample = the share',
    '- SLM: What SLM does.',
    'Held-out evaluations (phase evaluate of ledger.json) are left out of every cost.',
    '- Models are smaller than in the paper.',
  ):
    assert part in text
  html = (study / 'report.html').read_text()
  assert html.count('>law/test<') == 0 and 'Served parameters are those of' in html
  training = next(p for p in plots.plots(compare(load_study(study))) if p.name == 'training')
  assert 'its held-out loss is of generic validation text' in training.caption


def test_generic_and_other_splits(tmp_path: Path):
  maker = Maker(tmp_path)
  for method in ('slm', 'project'):
    maker.add(method, 0.0)
    run = tmp_path / maker.runs[-1]['run']
    rows = maker.rows('law', 3.5, 0)
    write_run(run, 'finetune', 1e12, {'law/test': rows, 'law/test_ood': rows + [0.5, 0]})
    write_run(tmp_path / f'runs/{method}-0', 'pretrain', 1e14, {'generic/test': rows})
    maker.runs.append({**maker.runs[-1], 'domain': None, 'size': None, 'run': f'runs/{method}-0'})
  c = compare(load_study(maker.save()))
  assert c.tests == ('law/test',) and c.others == ('law/test_ood',)
  assert list(c.generic) == ['slm', 'project']
  assert c.generic['slm'].value == pytest.approx(c.cells['slm', 20_000].average.value)
  assert report.generic_table(c)[1][0][0] == 'SLM'
  assert report.domain_table(c, 20_000)[0] == ['method', 'law/test', 'law/test_ood']


def test_missing_runs_say_so(tmp_path: Path):
  maker = Maker(tmp_path, domains=('law', 'news'))
  maker.add('slm', 0.0)
  maker.add('project', -0.05)
  for run in maker.runs:
    if run['method'] == 'project' and run['domain'] == 'news':
      run['run'] = 'runs/nowhere'
  study = maker.save()
  report.report(study)
  c = compare(load_study(study))
  rows = {r[0]: r for r in report.main_table(c, 20_000)[1]}
  assert rows[LABELS['project']][1] == '1 of 2 domains run'
  assert rows['LLM'][1] == 'not run'
  assert report.domain_table(c, 20_000)[1][-1][2] == 'not run'
  assert 'not run' in (study / 'report.html').read_text()


@pytest.mark.parametrize('offsets', [{'slm': 0.0}, {'project': 0.0}, {}])
def test_any_subset_makes_a_report(tmp_path: Path, offsets: dict[str, float]):
  c = one(tmp_path, offsets)
  report.report(tmp_path)
  assert (tmp_path / 'report.html').exists()
  if 'slm' not in offsets:
    assert advise(c) == ['There is nothing to compare yet: the plain SLM has not been run and '
                         'evaluated.']  # fmt: skip


def test_a_run_without_size_stands_at_every_size(tmp_path: Path):
  maker = Maker(tmp_path, sizes=(20_000, 160_000))
  maker.add('slm', 0.0)
  maker.runs.append({**maker.runs[0], 'method': 'slm_noft', 'size': None})
  cells = compare(load_study(maker.save())).cells
  assert cells['slm_noft', 20_000].average.value == cells['slm_noft', 160_000].average.value


def test_colors_are_fixed_and_distinct():
  found = plots.styles([*LABELS, 'new', 'newer'])
  assert found['project'] == plots.styles(['project'])['project']
  assert len(set(found.values())) == len(found)


def test_page_escapes_text(tmp_path: Path):
  maker = Maker(tmp_path)
  maker.add('slm', 0.0)
  study = load_study(maker.save(title='<b>A & B</b>', notes=['1 < 2']))
  html = page.render(compare(study), study, ['x < y'], [], [], '', [], [], tmp_path)
  assert '&lt;b&gt;A &amp; B' in html and '1 &lt; 2' in html and 'x &lt; y' in html


def _change(key: str, value: object):
  def change(study: Path) -> None:
    raw = json.loads((study / 'study.json').read_text())
    raw[key] = value
    (study / 'study.json').write_text(json.dumps(raw))

  return change


def _first_run(**changes: object):
  def change(study: Path) -> None:
    runs = json.loads((study / 'study.json').read_text())['runs']
    _change('runs', [{**runs[0], **changes}, *runs[1:]])(study)

  return change


def _evaluated(**changes: object):
  def change(study: Path) -> None:
    file = next(study.glob('runs/llm-law*/eval.json'))
    write(file, {name: about | changes for name, about in json.loads(file.read_text()).items()})

  return change


def _rows_cut(study: Path) -> None:
  file = next(study.glob('runs/llm-law*/eval/law-test.npy'))
  np.save(file, np.load(file)[:-1])


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda s: (s / 'study.json').unlink(), 'study.json: no such file'),
    (lambda s: (s / 'study.json').write_text('{"title"'), 'study.json: truncated or damaged'),
    (lambda s: (s / 'study.json').write_text('[]'), 'expected an object, found list'),
    (lambda s: (s / 'study.json').write_text('{}'), "study.json: no key 'title'"),
    (_change('methods', [{'name': 'slm'}]), "methods[0]: no key 'label'"),
    (_change('sizes', []), 'sizes is []'),
    (_change('runs', None), 'runs is None, expected a list'),
    (_change('params', None), 'params is None, expected a dict'),
    (_first_run(generic_runs=None), 'runs[0]: generic_runs is None, expected a list of runs'),
    (_first_run(budget='x'), "runs[0]: budget is 'x', expected a share"),
    (_first_run(method='slim'), "runs[0]: method is 'slim', expected one of"),
    (_first_run(domain='lore'), "runs[0]: domain is 'lore'"),
    (lambda s: next(s.glob('runs/llm-law*/eval.json')).unlink(), 'not evaluated on law/test'),
    (_evaluated(step=80), 'evaluated on law/test at step 80 and serves 100'),
    (_evaluated(rows_sha256='def'), 'law/test was evaluated on other rows than'),
    (lambda s: next(s.glob('runs/llm-law*/eval/*.npy')).write_bytes(b''), 'truncated or damaged'),
    (_rows_cut, 'law/test was evaluated on other rows than'),
  ],
)
def test_errors_name_the_thing(tmp_path: Path, damage, message: str):
  maker = Maker(tmp_path, rows=20)
  maker.add('slm', 0.0)
  maker.add('llm', -0.1)
  study = maker.save()
  damage(study)
  with pytest.raises(ValueError) as e:
    compare(load_study(study))
  assert message in str(e.value)


def test_command_line(tmp_path: Path):
  found = run_main(tmp_path / 'none')
  assert found.returncode == 1 and found.stderr.count('\n') == 1
  assert found.stderr.startswith('error: ') and 'study.json: no such file' in found.stderr
  one(tmp_path / 'study', {'slm': 0.0, 'importance': -0.1}, rows=50)
  found = run_main(tmp_path / 'study', f'--out={tmp_path / "out"}')
  assert found.returncode == 0, found.stderr
  assert 'perplexity' in found.stdout and 'Use SLM-is' in found.stdout
  assert (tmp_path / 'out' / 'report.html').exists()
