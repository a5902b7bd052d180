"""Advice for a budget: the nearest cells, which of them fit, certainty, limits."""

import csv
import math
import re
import subprocess
import sys

import pytest
import toy

from slm.data import histograms, loader
from slm.reporting import advise
from slm.reporting.advise import Cell, Question

P = 1e6  # parameters of the plain SLM
FLOPS = 6 * P**2  # of a token per parameter


def cell(method='slm', pretrain=100.0, specialise=1.0, tokens=1e5, loss=3.0, **more):
  rest = dict(study='s', label=method, params=P, half=0.01, seeds=3, better=3, domains=3)
  costs = dict(generic_flops=pretrain * FLOPS, specialise_flops=specialise * FLOPS)
  return Cell(method=method, domain_tokens=tokens, loss=loss, **costs, **rest | more)


def grid(method, above=0.0, once=True, **more):
  """Measure a method at 10 and 1000 tokens of training and 1e4 and 1e6 of text."""
  return [
    cell(method, *((b, 0.1) if once else (0.0, b)), tokens, above - math.log(b * tokens), **more)
    for b in (10.0, 1000.0)
    for tokens in (1e4, 1e6)
  ]


def ask(pretrain=1000.0, specialise=1.0, tokens=1e6, domains=1, large=0.0, params=P):
  unit = 6 * params**2
  return Question(params, pretrain * unit, specialise * unit, tokens, domains, large)


def test_the_nearest_set_size_and_the_largest_budget_that_fits():
  place = lambda **q: advise.place(grid('slm'), ask(**q))[0]
  assert place().cell == grid('slm')[3] and not place().out
  assert place(pretrain=500, tokens=9e4).cell == grid('slm')[0]
  assert place(pretrain=9.6).cell.generic_flops == 10 * FLOPS  # within a twentieth
  out = place(pretrain=9.4)
  assert out.cell == grid('slm')[1] and out.out == 'needs 6.00e13 FLOPs once, the budget is 5.64e13'
  assert place(specialise=0.01).out == 'needs 6.00e11 FLOPs per domain, the budget is 6.00e10'


def test_cells_scale_with_the_parameters():
  """Cells scale by tokens of text and of training per parameter."""
  (small,), (large,) = (
    advise.place(grid('slm'), ask(params=k * P, tokens=k * 1e6)) for k in (1, 7)
  )
  assert large.cell.params == 7 * P and large.cell.domain_tokens == 7e6
  assert large.cell.generic_flops == pytest.approx(49 * small.cell.generic_flops)
  assert large.cell.loss == small.cell.loss


def test_a_method_spends_the_budget_of_its_kind():
  cells = grid('slm') + grid('importance', -0.1, once=False)
  fits = lambda **q: {p.cell.method for p in advise.place(cells, ask(**q)) if not p.out}
  assert fits() == {'slm'} and fits(specialise=1000) == {'slm', 'importance'}
  assert fits(pretrain=0, specialise=1000) == {'importance'} and fits(pretrain=0) == set()
  costs = {p.cell.method: p.cell.cost(50) for p in advise.place(cells, ask(specialise=1000))}
  assert costs == pytest.approx({'slm': 1005 * FLOPS, 'importance': 50_000 * FLOPS})


def test_every_method_is_listed_and_why_it_is_out():
  some = [c for c in grid('dsir') if c.domain_tokens == 1e4]
  cells = grid('slm') + some + grid('llm', -0.3, params=6 * P)
  placed = {p.cell.method: p.out for p in advise.place(cells, ask())}
  assert placed == {
    'slm': '',
    'dsir': 'not measured with 1M tokens of domain text',
    'llm': 'serves 6M parameters',
  }
  out = lambda large: {p.cell.method for p in advise.place(cells, ask(large=large)) if p.out}
  assert out(5 * P) == {'dsir'} and out(3 * P) == {'dsir', 'llm'}
  _, (_, rows) = advise.advise(cells, ask())
  assert [row[0] for row in rows] == ['slm', 'dsir', 'llm']
  assert [row[1] for row in rows] == ['loss -20.723', '–', '-0.300 ± 0.010']


def choose(*groups, domains=1, **q):
  cells = [*grid('slm'), *(c for group in groups for c in group)]
  chosen, how = advise.choose(advise.place(cells, ask(domains=domains, **q)), domains)
  return chosen and chosen.method, how


def test_the_plain_slm_where_nothing_is_clearly_better():
  assert choose()[0] == choose(grid('project', -0.015))[0] == 'slm'
  sure = 'better on every domain and in every seed measured'
  assert choose(grid('project', -0.1)) == ('project', sure)
  method, how = choose(grid('project', -0.1, better=1, seeds=1))
  assert method == 'project' and how == 'likely: clearly better on 1 of 3 domains, 1 seed'
  assert choose(grid('project', -0.1, half=0.0, seeds=1))[1].startswith('likely: measured without')
  # A noisy lowest loss does not hide a clear gain.
  assert choose(grid('project', -0.1), grid('mixture', -0.12, half=0.2))[0] == 'project'


def test_a_cheaper_method_that_cannot_be_told_apart_is_advised():
  rivals = grid('project', -0.1), grid('importance', -0.105, once=False)
  method, how = choose(*rivals, domains=50, specialise=1000)
  assert method == 'project' and 'importance may be a little better at 50× its cost' in how


def test_without_the_plain_slm_the_lowest_loss_that_fits():
  assert choose(grid('importance', once=False), pretrain=0, specialise=1000) == (
    'importance',
    'the lowest loss that fits',
  )
  assert choose(pretrain=0) == (None, 'no measured cell fits the budget')


@pytest.mark.parametrize(
  ('asked', 'limit'),
  [
    ({'params': 20 * P, 'tokens': 2e7}, '--params=2e+07 (measured: 1M).'),
    ({'tokens': 2e6}, '--domain_tokens=2e+06 (measured at 1M parameters: 10k to 1M).'),
    ({'tokens': 5e3}, '--domain_tokens=5000'),
    (
      {'pretrain': 1600},
      '--pretrain_flops=9.6e+15 (measured at 1M parameters: 6.00e13 to 6.00e15).',
    ),
    ({'pretrain': 9}, '--pretrain_flops=5.4e+13'),
  ],
)
def test_outside_names_the_limit_in_the_units_of_the_question(asked, limit):
  text, (_, rows) = advise.advise(grid('slm'), ask(**asked))
  assert text.startswith(f'Outside the measured range: {limit}') and '; --' not in text
  assert rows  # the nearest cells are shown all the same
  assert not advise.advise(grid('slm'), ask())[0].startswith('Outside')


def test_the_study_with_the_fewest_limits_then_the_nearest():
  tenth = [c.scaled(0.1) for c in grid('slm')]
  nearest = lambda **q: advise.nearest({'whole': grid('slm'), 'tenth': tenth}, ask(**q))
  assert nearest(params=0.2 * P, tokens=2e5) == 'tenth' and nearest(params=0.7 * P) == 'whole'
  assert nearest(params=2 * P) == 'whole'
  short = {'short': grid('slm')[:2], 'long': grid('slm')}
  assert advise.nearest(short, ask(pretrain=12)) == 'short'
  assert advise.nearest(short, ask(pretrain=500)) == 'long'


def test_a_wide_domain_is_warned_of_where_one_cluster_is_chosen():
  text = lambda method, spread: advise.advise(grid('slm') + grid(method, -0.1), ask(), spread)[0]
  assert 'spread 40% as widely as generic text' in text('project', 0.4)
  assert 'spread' not in text('project', 0.2) + text('importance', 0.4)


def test_the_papers_own_cells():
  """Table 8 of arXiv 2402.01093: gaps to the SLM at equal cost; Table 4 beside its longest."""
  cells = advise.read(advise.FILES[1])
  gaps = {}
  for hours in (100, 200, 400, 600):
    q = Question(126e6, hours * 3.4293e17, 1e17, 1e6)
    placed = {p.cell.method: p.cell.loss for p in advise.place(cells, q)}
    gaps[hours] = [placed[m] - placed['slm'] for m in ('mixture', 'project', 'llm')]
  printed = {
    100: [0.026, -0.039, -0.121], 200: [-0.005, -0.045, -0.174],
    400: [-0.037, -0.059, -0.192], 600: [-0.058, -0.071, -0.227],
  }  # fmt: skip
  assert gaps == {hours: pytest.approx(x, abs=6e-4) for hours, x in printed.items()}
  use = lambda hours, tokens: advise.advise(
    cells, Question(126e6, hours * 3.4293e17, 3e17, tokens, 50)
  )[0].partition(' (')[0]
  assert use(100, 1e6) == 'Use SLM-pn, projected network' and use(200, 64e6) == 'Use SLM'
  assert use(400, 8e6) == 'Use SLM-mix, hard mixture'


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda lines: [{**x, 'loss': 'x'} for x in lines], "line 2: could not convert .* 'x'"),
    (lambda lines: [{**x, 'more': '1'} for x in lines], 'expected the columns study, method'),
    (lambda lines: [{**x, 'method': 'llm'} for x in lines], 'has no plain SLM'),
  ],
)
def test_damaged_cells_are_refused(tmp_path, damage, message):
  with advise.FILES[1].open(newline='') as f:
    lines = damage(list(csv.DictReader(f)))
  with (tmp_path / 'cells.csv').open('w', newline='') as f:
    writer = csv.DictWriter(f, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
  with pytest.raises(ValueError, match=message):
    advise.read(tmp_path / 'cells.csv')


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
  assert 'Use SLM-pn' in done.stdout and 'The domain is spread' in done.stdout
  counts = loader.window_counts(path, 'generic', 'train', 8)
  assert len(counts) == 8
  refused = run(*budget, '--domain_tokens=1e6', f'--domain_text={file}')
  assert refused.returncode == 1 and '--domain_text needs --data' in refused.stderr
  assert 'expected finite numbers' in run(*budget[1:], '--params=nan', '--domain_tokens=1').stderr


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--params=1e200'], '--params=1e+200: expected from 1e3 to 1e13'),
    (['--params=1e6', '--results=gone/measured.csv'], 'gone/measured.csv: no such file'),
    (['--params=1e6', '--data=D', '--domain_text=gone.txt'], '--domain_text: gone.txt: no such'),
  ],
)
def test_bad_input_is_one_line(flags, message):
  done = run('--pretrain_flops=1e15', '--specialise_flops=1e12', '--domain_tokens=1e5', *flags)
  assert done.returncode == 1 and message in done.stderr and not done.stdout
  assert len(done.stderr.strip().split('\n')) == 1


def test_spread_is_beside_as_much_generic_text(tmp_path):
  """The spread relative to generic text does not depend on how much text there is."""
  path, shares = toy.prepared(), []
  for topics, number in ((list(toy.TOPICS), 8), (list(toy.TOPICS), 80), (['law'], 80)):
    file = toy.write_jsonl(tmp_path / 'text.jsonl', toy.documents(topics, number, 11))
    windows, held, generic = histograms.spread(path, [file])
    assert windows >= number and 1 <= held <= 8
    shares.append(held / generic)
  assert shares[:2] == pytest.approx([1, 1], abs=0.25) and shares[2] < 0.6
