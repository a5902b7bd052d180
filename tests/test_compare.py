"""Comparisons of runs: paired differences, errors, kept evaluations, and the report."""

import csv
import fcntl
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import studies

from slm.objectives import heldout
from slm.reporting import comparison, page, report, stats
from slm.runs import config, load
from slm.weights import sharding

RNG = np.random.default_rng(1)
TOKENS = RNG.integers(20, 256, 300).astype(float)
HARD = RNG.normal(0, 0.4, 300)  # how much harder a row is than others, for every model


def make(path, loss, seed=0, tokens=TOKENS, on=('law/test',), ancestors=(), **changes):
  """Write a finished run whose loss on its rows is known."""
  noise = np.random.default_rng(seed + 7).normal(0, 0.02, len(tokens))
  rows = np.stack([(loss + HARD[: len(tokens)] + noise) * tokens, tokens], axis=1)
  studies.write_run(path, 'pretrain', 1e14, dict.fromkeys(on, rows))
  settings = config.defaults() | {'tokenizer': 'abc', 'seed': seed} | changes
  settings['model']['vocab'] = 256
  settings['data']['path'] = str(path.parent / 'data')
  studies.write(path / 'config.json', settings)
  ledger = json.loads((path / 'ledger.json').read_text())
  studies.write(path / 'ledger.json', ledger | {'ancestors': list(map(str, ancestors))})
  return str(path)


def two(tmp_path, gap=-0.05, runs=1):
  """Write two models of some seeds each; return the values of --run."""
  names = [[make(tmp_path / f'{m}-{s}', 3.0 + above + 0.002 * s, s) for s in range(runs)]
           for m, above in (('a', 0.0), ('b', gap))]  # fmt: skip
  return [','.join(group) for group in names]


def test_differences_are_paired_over_documents(tmp_path):
  documents = np.repeat(np.arange(30), 10)
  folder = tmp_path / 'data/law/test'
  folder.mkdir(parents=True)
  np.save(folder / 'documents.npy', documents)
  models = comparison.models(two(tmp_path, gap=-0.004))
  first, second = comparison.compare(models, 'law/test')
  a, b = (np.load(Path(m.refs[0]) / 'eval/law-test.npy') for m in models)
  assert first.loss.value == a[:, 0].sum() / TOKENS.sum() and first.difference is None
  d = second.difference
  assert d.value == pytest.approx((b - a)[:, 0].sum() / TOKENS.sum())
  # Half the interval against the standard error of a ratio of sums over documents.
  sums = np.stack([np.bincount(documents, x) for x in ((b - a)[:, 0], TOKENS)], axis=1)
  spread = np.sqrt(((sums[:, 0] - d.value * sums[:, 1]) ** 2).sum() * 30 / 29) / TOKENS.sum()
  assert (d.high - d.low) / 2 == pytest.approx(1.96 * spread, rel=0.15)
  # Each loss by itself is known ten times worse: the difficulty of the text is in it.
  assert heldout.summary(b, 0)['loss_stderr'] > 5 * spread
  assert second.documents == 30 and 'over its 30 documents; with one run' in comparison.note(
    [first]
  )


def test_several_runs_add_how_much_training_varies(tmp_path):
  models = comparison.models(two(tmp_path, runs=3))
  assert [m.label for m in models] == [f'{tmp_path}/a-*', f'{tmp_path}/b-*']
  lines = comparison.compare(models, 'law/test')
  d = lines[1].difference
  assert len(d.seeds) == 3 and d.value == pytest.approx(np.mean(d.seeds)) and d.verdict == 'better'
  pair = [lines[i].loss.replicates for i in (1, 0)]
  text = np.percentile(sum(pair[0][s] - pair[1][s] for s in range(3)) / 3, [2.5, 97.5])
  runs = scipy.stats.ttest_1samp(d.seeds, 0).confidence_interval(0.95)
  assert d.value - d.low == pytest.approx(math.hypot(d.value - text[0], d.value - runs.low))
  note = comparison.note(lines)
  assert 'its rows (too narrow' in note and 'over 3 runs each' in note
  (line, _) = csv.DictReader(comparison.results_csv(lines[::-1]).splitlines())
  assert float(line['low']) == d.low and line['loss_by_run'].count('.') == 3


@pytest.mark.parametrize(
  ('named', 'message'),
  [
    (['a,b', 'c'], r"as many runs of 'c' as of the first model, 2, found 1"),
    (['a', 'b', 'a/'], 'a is named twice'),
  ],
)
def test_runs_are_named_once_and_in_pairs(named, message):
  with pytest.raises(ValueError, match=message):
    comparison.models(named)


def test_models_have_names_of_their_own():
  labels = lambda *named: [m.label for m in comparison.models(named)]
  assert labels('runs/a-0,runs/a-1', 'runs/b-0,runs/b-1') == ['runs/a-*', 'runs/b-*']
  assert labels('a-0,a-1', 'a-2,a-3') == ['a-0,a-1', 'a-2,a-3']


def test_what_cannot_be_compared_is_refused(tmp_path):
  good = make(tmp_path / 'a', 3.0)
  pair = lambda other: comparison.models([good, other])
  with pytest.raises(ValueError, match='have different tokenizers.*bits per byte'):
    comparison.check_tokenizers(pair(make(tmp_path / 'b', 3.0, tokenizer='def')))
  fewer = make(tmp_path / 'c', 3.0, tokens=TOKENS[:200])
  with pytest.raises(
    ValueError, match=r'a and .*/c were evaluated on different rows .*300 and 200'
  ):
    comparison.compare(pair(fewer), 'law/test')
  other = Path(make(tmp_path / 'd', 3.0))
  about = json.loads((other / 'eval.json').read_text())
  studies.write(other / 'eval.json', {'law/test': about['law/test'] | {'rows_sha256': 'f'}})
  with pytest.raises(ValueError, match='different rows of law/test'):
    comparison.compare(pair(str(other)), 'law/test')
  with pytest.raises(ValueError, match='a: not evaluated on news/test; python -m slm.evaluate'):
    comparison.compare(pair(str(other)), 'news/test')
  studies.write(other / 'eval.json', {})
  assert comparison.shared_sets(pair(str(other))) == []


def test_the_report_of_runs_is_of_their_directories_alone(tmp_path):
  start = make(tmp_path / 'start', 3.2)
  names = [make(tmp_path / 'a', 3.0, on=('law/test', 'law/ood')), make(
    tmp_path / 'b', 2.9, 1, ancestors=[start, tmp_path / 'gone'])]  # fmt: skip
  models, out = comparison.models(names), tmp_path / 'out'
  assert comparison.shared_sets(models) == ['law/test']
  (sentence,) = report.report(models, ['law/test'], out)
  assert re.search(r'b is better \(−0\.(09|10)', sentence)
  html = (out / 'report.html').read_text()
  assert not re.search(r'(?:src|href|url)\s*[=(]\s*["\']?\s*(?:https?:)?//', html)
  assert all(f'id="plot-{name}"' in html for name in ('differences', 'training'))
  plots = {p.stem for p in (out / 'plots').glob('*.svg')}
  assert plots == {'differences', 'training', 'phases'}
  text = (out / 'table.md').read_text()
  assert re.search(r'b is better \(−0\.(09|10)', text) and '| device kind | cpu |' in text
  _, rows = report.ledger_table(models)
  costs = {(row[0].rpartition('/')[2], row[1].split()[0]): row[2:] for row in rows}
  assert costs['a', 'with'] == costs['a', 'run'] == ['10M', '1.00e14', '16.7 min']
  assert costs['start', 'made'] == costs['a', 'run'] and costs['gone', 'made'] == ['–'] * 3
  assert costs['b', 'with'] == ['–'] * 3  # a part of it is not known
  lines = list(csv.DictReader((out / 'results.csv').open()))
  assert [x['verdict'] for x in lines] == ['', 'better']
  report.report(models[:1], ['law/test', 'law/ood'], out)
  assert 'law/ood' in (out / 'report.html').read_text()
  with (out / 'writer.lock').open('w') as lock:  # as another process that writes holds it
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match='out: is being written by another process'):
      report.report(models, ['law/test'], out)


def test_a_run_and_its_ancestors_are_counted_once(tmp_path):
  base = make(tmp_path / 'base', 3.0)
  teacher = make(tmp_path / 'teacher', 3.0, ancestors=[base])
  run = make(tmp_path / 'run', 3.0, ancestors=[base, teacher])
  assert report.lineage(run) == [Path(p) for p in (run, base, teacher)]
  _, rows = report.ledger_table(comparison.models([run]))
  assert rows[-1][2:] == ['30M', '3.00e14', '50.0 min']


MESH = lambda: sharding.make_mesh({'data': 8})


def test_runs_are_evaluated_once_and_compared(tiny_config, train_once, tiny_data, tmp_path):
  refs = [tmp_path / name for name in ('a', 'b')]
  for seed, ref in enumerate(refs):
    tiny_config.seed = seed
    train_once(tiny_config.to_dict(), ref)
  heldout.run(refs[0], tiny_data, ['court/test'], MESH(), 8)
  kept = refs[0] / 'eval/court-test.npy'
  before = kept.stat().st_mtime_ns
  out = tmp_path / 'out'
  flags = ['--on=court/test', f'--out={out}', *(f'--run={ref}' for ref in refs)]
  command = [sys.executable, '-m', 'slm.compare', *flags]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert kept.stat().st_mtime_ns == before and (out / 'differences.svg').exists()
  rows = [np.load(ref / 'eval/court-test.npy') for ref in refs]
  gap = (rows[1] - rows[0])[:, 0].sum() / rows[0][:, 1].sum()
  _, line = csv.DictReader((out / 'results.csv').open())
  assert float(line['difference']) == pytest.approx(gap, rel=1e-9)
  assert f'{gap:+.3f}'.replace('-', '−') in done.stdout


def test_an_evaluation_is_kept_until_weights_or_rows_change(
  tiny_config, train_once, tiny_data, tmp_path, monkeypatch
):
  run = tmp_path / 'run'
  train_once(tiny_config.to_dict(), run)
  first = heldout.run(run, tiny_data, ['court/test'], MESH(), 8)
  assert heldout.missing(run, tiny_data, ['court/test', 'generic/test']) == ['generic/test']
  assert heldout.missing(f'{run}@2', tiny_data, ['court/test']) == ['court/test']
  assert heldout.missing(run, tiny_data, ['court/test'], max_rows=3) == ['court/test']
  with monkeypatch.context() as m:
    m.setattr(load, 'load', None)  # not called: weights are not read for what is kept
    assert heldout.run(run, tiny_data, ['court/test'], MESH(), 8) == first
  known = json.loads((run / 'eval.json').read_text())
  known['court/test']['rows_sha256'] = 'other'
  studies.write(run / 'eval.json', known)
  assert heldout.missing(run, tiny_data, ['court/test']) == ['court/test']
  with pytest.raises(ValueError, match='court: expected SET.SPLIT'):
    heldout.missing(run, tiny_data, ['court'])
  with pytest.raises(ValueError, match='court/nope: expected SET/SPLIT'):
    heldout.missing(run, tiny_data, ['court/nope'])
  nan = lambda *_: lambda params, batch: np.full((len(batch['weights']), 2), np.nan)
  monkeypatch.setattr(heldout, 'make_row_losses', nan)
  with pytest.raises(
    FloatingPointError, match=r'run: the loss on court/test is not finite in \d+ of'
  ):
    heldout.run(run, tiny_data, ['court/test'], MESH(), 8)
  assert json.loads((run / 'eval.json').read_text()) == known


def test_losses_of_other_documents_are_refused():
  rows = {('a', 0): np.ones((5, 2))}
  with pytest.raises(ValueError, match='law/test: documents.npy has 4 rows, expected 5'):
    stats.losses(rows, 0, 'law/test', np.arange(4))


def test_an_environment_is_listed_once(tmp_path):
  one, two = (Path(make(tmp_path / name, 3.0)) for name in 'ab')
  starts = json.loads((one / 'starts.json').read_text())
  studies.write(one / 'starts.json', [*starts, {**starts[0], 'step': 5, 'code': 'other'}])
  assert page.environment([one]) == page.environment([two, one])
