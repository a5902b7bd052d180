"""The Minitron study: its rows, its claims, the published recipes' shapes, the whole recipe."""

import dataclasses
import json

import numpy as np
import pytest
import studies
import toy

from configs import minitron as config_of_recipe
from configs import minitron_published as recipes
from experiments import common, compiled
from experiments.minitron import claims, report, results, run, smollm2
from experiments.minitron.run import BY_NAME, Study
from experiments.minitron.scales import SCALES
from experiments.minitron.students import CORRECTED, SEARCHED, STUDENTS
from slm.base import files, schema
from slm.data import loader, prepare
from slm.data.loader import DataConfig
from slm.models.config import DecoderConfig
from slm.pruning import recipe, slicing
from slm.reporting import verdicts
from slm.reporting.stats import Loss
from slm.runs import config, rundir
from slm.runs.config import RunConfig, section
from slm.training import optim
from slm.weights.count import num_params

total = lambda cfg: sum(num_params(cfg).values())


# In billions, the last as printed in arXiv 2408.11796; Qwen3's is said to be of 6.
@pytest.mark.parametrize(
  'name, before, after, non_embedding',
  [
    ('llama31_4b_width', 8.03, 4.51, 3.7),
    ('llama31_4b_depth', 8.03, 4.54, 3.5),
    ('nemo_8b', 12.25, 8.41, 7.3),
    ('qwen3_6b', 8.19, 5.99, None),
  ],
)
def test_published_recipes_have_the_published_counts(name, before, after, non_embedding):
  config = recipes.get_config(name).to_dict()
  teacher, student, text = recipe.dry_run(config, 128, 'h100', 0.4)
  billions = lambda n: round(n / 1e9, 2)
  assert (billions(total(teacher)), billions(total(student))) == (before, after)
  rest = total(student) - num_params(student)['embedding']
  assert non_embedding in (None, round(rest / 1e9, 1))
  assert 'does not fit' not in text and f'{total(teacher):,}' in text
  config['probe']['steps'], config['correct']['steps'] = 500, 1000
  planned = recipe.dry_run(config, 128, 'h100', 0.4)[-1]
  assert 'does not fit' not in planned and planned.startswith(text)
  assert 'correction of the teacher' in planned and '1,500' in planned


def test_students_of_smollm2_have_three_fifths_of_its_parameters():
  whole = DecoderConfig(
    vocab=49_152, embed=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, mlp=1536
  )
  for student in smollm2.STUDENTS:
    kept = {axis: np.arange(n) for axis, n in slicing.read_sizes(student.sizes).items()}
    vocab = smollm2.VOCABULARY if student.whole == smollm2.SMALL_VOCABULARY else whole.vocab
    shape = slicing.shape(dataclasses.replace(whole, vocab=vocab), kept)
    assert total(shape) / total(whole) == pytest.approx(0.6, abs=0.01), student.name


@pytest.mark.parametrize('scale', ['cpu', 'gpu'])
def test_students_compared_at_equal_size_are_of_equal_size(scale):
  s = SCALES[scale]
  whole = DecoderConfig(vocab=s.prepare['tokenizer.vocab'], **s.teacher)
  shape = lambda n: slicing.shape(
    whole, {a: np.arange(k) for a, k in slicing.read_sizes(s.shapes[n]).items()}
  )
  counts = [total(shape(n)) for n in ('width', 'depth', 'both', 'mlp', 'heads')]
  assert max(counts) < 1.04 * min(counts) and max(counts) < 0.6 * total(whole)
  assert total(shape('quarter')) < 0.3 * total(whole)
  depths = [shape(f'minus_{i}').num_layers for i in (1, 2)]
  assert [whole.num_layers, *depths, shape('depth').num_layers] == sorted(
    {whole.num_layers, *depths, shape('depth').num_layers}, reverse=True
  )


def test_rows_refer_to_rows():
  assert len(BY_NAME) == len(STUDENTS)
  for s in STUDENTS:
    assert not s.parent or s.parent in BY_NAME
    assert s.guide in ('', 'teacher', *CORRECTED)
    assert not s.equal or BY_NAME[s.equal].shape == s.shape
    assert all(s.shape in (SEARCHED, *scale.shapes) for scale in SCALES.values())
    assert s.whole in ('teacher', *CORRECTED)


@pytest.mark.parametrize('scale', SCALES)
def test_every_student_has_a_schedule(scale, tmp_path):
  s = SCALES[scale]
  for student in STUDENTS:
    steps = max(round(s.steps * student.steps), 1)
    settings = Study(s, tmp_path).settings(0, steps, s.peak, 'generic')
    config = common.config('recover' if student.guide else 'pretrain', settings | dict(student.set))
    assert optim.schedule(section('schedule', config['schedule']), steps)(steps) >= 0


# Loss above that of the student `width`, as the papers find it; 'cut': before any training.
TRAINED = {
  'width': 0.0, 'both': 0.02, 'depth': 0.05, 'mlp': 0.03, 'heads': 0.06, 'weights': 0.1,
  'taylor': 0.05, 'random': 0.2, 'scored_twice': 0.02, 'in_thirds': 0.1, 'quarter': 0.6,
  'ladder': 0.5, 'width_lm': 0.05, 'width_lm_equal': 0.03, 'cosine': 0.05, 'reverse': 0.1,
  'mse': 0.2, 'wsl': 0.02, 'kl_and_lm': 0.02, 'depth_reverse': 0.5, 'temperature_0.5': 0.1,
  'temperature_2': 0.1, 'top_16': 0.1, 'top_256': 0.001, 'scratch': 0.5, 'random_lm': 0.3,
  'scratch_lm': 0.8, 'domain': 0.2, 'domain_corrected': 0.1, 'domain_together': 0.05,
  'control_corrected': 0.02,
  'depth_window': 0.04, 'depth_perplexity': 0.06, 'gain_calibrated': -0.02, 'gain_sqrt': -0.02,
  'width_states': 0.02, 'depth_states': 0.04, 'own_text': -0.02, 'domain_last': 0.05,
  'searched': -0.02,
}  # fmt: skip
CUT = {'width': 1.0, 'mlp': 0.5, 'both': 0.6, 'random': 3.0} | {
  s.name: 1.0 if s.name.startswith('mean') else 2.0
  for s in STUDENTS
  if s.name.split('_')[0] in ('mean', 'l2', 'var')
}
# While they train, candidates keep the order that they will end in.
CURVES = {
  n: {seed: [(t, 4 + TRAINED[n] - t / 8) for t in (1, 6, 8)] for seed in range(3)}
  for n in results.CANDIDATES
}


def found(trained=TRAINED, cut=CUT, curves=CURVES):
  rng = np.random.default_rng(0)
  noise = {seed: 0.002 * rng.normal(size=500) for seed in range(3)}

  def loss(value):
    seeds = {seed: 3 + value for seed in range(3)}
    jitter = {seed: 0.0005 * rng.normal(size=500) for seed in range(3)}
    return Loss(seeds, seeds, {s: 3 + value + noise[s] + jitter[s] for s in range(3)})

  make = lambda of: {name: loss(value) for name, value in of.items()}
  return results.Found(None, SCALES['cpu'], make(cut), make(trained), curves)


def verdicts_of(f):
  return [row[2] for row in claims.table(f)[1]]


def test_the_papers_own_results_reproduce_the_claims():
  assert set(verdicts_of(found())) == {verdicts.YES}


def test_opposite_results_refute_them():
  flip = lambda of: {name: -value for name, value in of.items()}
  turned = flip(TRAINED) | {'scored_twice': -0.2, 'top_256': 0.1, 'control_corrected': -0.1}
  turned |= {'domain_together': 0.2, 'width_states': -0.2, 'domain_last': 0.3}
  crossed = {
    n: {s: [(1, 4.0), (6, 5 - c[-1][1]), c[-1]] for s, c in curves.items()}
    for n, curves in CURVES.items()
  }
  assert set(verdicts_of(found(turned, flip(CUT), crossed))) == {verdicts.NO}


def test_what_was_not_run_is_not_tested():
  names = {s.name for s in STUDENTS}
  assert names >= {*TRAINED, *CUT}
  for number, (_, judge) in enumerate(claims.CLAIMS):
    if judge is claims.ranks:
      row = claims.table(found(curves={}))[1][number]
      assert row[2] == verdicts.UNTESTED and 'not run' in row[3]
      continue
    parts = judge(found())
    first = parts[0].what.split(' as cut')[0].split(' − ')
    name = next(n for n in first if n != 'width')
    less = lambda of, name=name: {n: v for n, v in of.items() if n != name}
    row = claims.table(found(less(TRAINED), less(CUT)))[1][number]
    assert row[2] == verdicts.UNTESTED and 'not run' in row[3]


def test_equal_within_noise_is_neither_reproduced_nor_refuted():
  wide = found(TRAINED | {'scored_twice': 0.0})
  loss = wide.trained['scored_twice']
  apart = {s: x + 0.02 * np.random.default_rng(s).normal(size=500) for s, x in
           loss.replicates.items()}  # fmt: skip
  wide.trained['scored_twice'] = dataclasses.replace(loss, replicates=apart)
  assert verdicts_of(wide)[4] == verdicts.NOISE


def written(root, name, init='', teacher='', **spent):
  """Write a run's config and ledger: what it came from, and what its training took."""
  made = {'init': init, 'teacher': teacher, 'model': DecoderConfig(vocab=5), 'data': DataConfig()}
  studies.write(root / 'runs' / name / 'config.json', schema.plain(RunConfig(**made)))
  phases = [{'phase': 'train', 'device_seconds': 0.0, **spent}]
  phases.append({'phase': 'evaluate', 'tokens': 9e9, 'flops': 9e99, 'device_seconds': 0.0})
  studies.write(root / 'runs' / name / 'ledger.json', {'phases': phases, 'ancestors': []})
  studies.write(root / 'runs' / name / 'result.json', {})


def test_a_student_costs_what_it_came_from_too(tmp_path):
  place = lambda name: str(tmp_path / 'runs' / name)
  written(tmp_path, 'teacher', tokens=1e6, flops=1e12)
  written(tmp_path, 'corrected', place('teacher'), tokens=1e3, flops=7e9)
  written(tmp_path, 'cut-width', place('teacher'), tokens=10, flops=1e8)
  written(tmp_path, 'cut-last', place('corrected'), tokens=10, flops=1e8)
  for seed in range(3):
    written(tmp_path, f'width-{seed}', place('cut-width'), place('teacher'), tokens=100, flops=2e9)
    written(tmp_path, f'first_half-{seed}', place('cut-width'), tokens=50, flops=1e9)
    written(tmp_path, f'cut-ladder-{seed}', place(f'first_half-{seed}'), tokens=10, flops=3e7)
    written(tmp_path, f'ladder-{seed}', place(f'cut-ladder-{seed}'), tokens=50, flops=5e8)
    written(tmp_path, f'domain_corrected-{seed}', place('cut-width'), tokens=100, flops=2e9)
    written(tmp_path, f'domain_last-{seed}', place('cut-last'), tokens=100, flops=2e9)
  f = results.Found(tmp_path, SCALES['cpu'], {}, {})
  assert f.training('width').flops == 2e9 and f.training('width').tokens == 100
  assert f.total('width').flops == 2e9 + 1e8
  assert f.total('ladder').flops == 5e8 + 3e7 + 1e9 + 1e8  # a cut of a trained cut
  assert f.total('domain_corrected').flops == 2e9 + 1e8 + 7e9  # and its teacher's correction
  # The corrected teacher counts once, though the student was both cut from it and taught by it.
  assert f.total('domain_last').flops == 2e9 + 1e8 + 7e9
  assert f.training('teacher').flops == 1e12


def test_how_much_longer_training_from_nothing_takes(tmp_path):
  """Half way, in the logarithm, between once and twice the cost; the teacher may count too."""
  written(tmp_path, 'teacher', tokens=1000, flops=900)
  written(tmp_path, 'cut-width', str(tmp_path / 'runs' / 'teacher'), tokens=1, flops=25)
  for seed in range(3):
    written(tmp_path, f'width-{seed}', str(tmp_path / 'runs/cut-width'), tokens=10, flops=75)
    written(tmp_path, f'scratch_lm-{seed}', tokens=10, flops=50)
  written(tmp_path, 'scratch_lm_2-0', tokens=20, flops=100)
  rng = np.random.default_rng(0)
  text = 0.05 * rng.normal(size=2000)  # what the held-out text happens to be moves all of them

  def loss(value, seeds, apart=0.002):
    same = {s: value for s in range(seeds)}
    drawn = {s: value + text + apart * rng.normal(size=2000) for s in range(seeds)}
    return Loss(same, same, drawn)

  losses = {'width': loss(3.0, 3), 'scratch_lm': loss(3.1, 3), 'scratch_lm_2': loss(2.9, 1)}
  found = results.crossing(results.Found(tmp_path, SCALES['cpu'], {}, losses))
  assert found['tokens'] == '1.4 times [1.4, 1.4]'
  assert found['FLOPs'] == '0.71 times [0.7, 0.72]'
  assert found['FLOPs with the teacher'] == '0.071 times [0.07, 0.072]'
  losses['width'] = loss(2.8, 3)
  found = results.crossing(results.Found(tmp_path, SCALES['cpu'], {}, losses))
  assert found['tokens'] == '> 2 times [> 2, > 2]'
  losses['width'] = loss(3.2, 3)
  found = results.crossing(results.Found(tmp_path, SCALES['cpu'], {}, losses))
  assert found['tokens'] == '< 1 times [< 1, < 1]'
  del losses['width']
  found = results.crossing(results.Found(tmp_path, SCALES['cpu'], {}, losses))
  assert found['tokens'] == 'not run'


def test_the_study_cuts_trains_and_measures(tmp_path, monkeypatch):
  monkeypatch.setattr(run, 'CORRECTED', {})
  tiny = {'embed': 16, 'num_layers': 2, 'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 8, 'mlp': 16}
  scale = dataclasses.replace(
    SCALES['smoke'], teacher=tiny, teacher_steps=4, steps=2, batch_size=8, calibration=16,
    shapes={**SCALES['smoke'].shapes, 'width': 'embed=8,mlp=8'}, test_rows=6, tasks=('q.jsonl',),
    grid='embed=16:8,mlp=16:8',
  )  # fmt: skip
  root, sets = tmp_path / 'study', toy.corpus(tmp_path)
  sets['law'] = {'all': str(tmp_path / 'law-*')}
  prepare.prepare(toy.config(tmp_path, sets, out=str(root / 'data'), sizes=(), levels=(2,)))
  study = Study(scale, root)
  names = ('width', 'width_lm_equal', 'random', 'searched')
  study.run([BY_NAME[n] for n in names])
  f = results.read(scale, root)
  assert set(f.trained) == {*names, 'teacher'} and set(f.cut) > {*names}  # many share a cut
  # The two that start from the same cut share it.
  assert f.cut['width'].seeds == f.cut['width_lm_equal'].seeds
  assert f.cut['width'].seeds != f.cut['random'].seeds
  assert f.total('width').flops > f.training('width').flops
  # Trained for the FLOPs of a distillation, to the nearest step.
  a, b = (f.training(n).flops for n in ('width', 'width_lm_equal'))
  taken = rundir.read_config(f.runs('width_lm_equal')[0])['steps']
  step = f.training('width_lm_equal').flops / taken
  assert abs(a - b) <= step / 2 + 1e-6 * a
  assert all(len(files.read_npy(p)) == 6 for p in root.rglob('generic-test.npy'))
  made = loader.manifest(root / 'data')
  prepared = {'tokenizer.vocab': made['tokenizer']['vocab'], 'context': made['context']}
  listed = run.outline(dataclasses.replace(scale, prepare=prepared), [BY_NAME[n] for n in names])
  assert {r.name for r in listed} == {'teacher', *(f'{n}-0' for n in names)}
  programs = {r.name: compiled.digest(r) for r in listed}
  assert len({programs[n] for n in ('teacher', 'width-0', 'width_lm_equal-0')}) == 3
  for planned in listed:  # what would be compiled is what was trained
    trained = config.of(root / 'runs' / planned.name)
    assert planned.cfg.steps == trained.steps and bool(planned.teacher) == bool(trained.teacher)
    real = dataclasses.replace(planned, cfg=trained)
    assert planned.name == 'searched-0' or compiled.digest(planned) == compiled.digest(real)
  item = {'id': '0', 'type': 'mc', 'query': 'Is it?', 'choices': ['yes', 'no'], 'gold': 0}
  questions = tmp_path / 'q.jsonl'
  questions.write_text('\n'.join(json.dumps(item | {'id': i}) for i in 'ab'))
  study.ask([str(questions)])
  report.write(scale, root, 1)
  page, table = (root / 'report.html').read_text(), (root / 'table.md').read_text()
  for plot in ('recovery', 'latency'):
    assert (root / 'plots' / f'{plot}.svg').exists()
  assert page.startswith('<!doctype html>')
  student = f'| width | {f.params("width"):,} | {f.cut["width"].value:.3f} |'
  assert student in table and '| depth | not run |' in table
  section = lambda title: table.split(f'## {title}')[1].split('\n## ')[0].split('\n')
  served = next(x for x in section('What is served') if x.startswith('| width |'))
  assert f'| {f.cut["width"].value:.3f} | {f.trained["width"].value:.3f} |' in served
  answers = [x for x in section('What is answered') if '±' in x and x.startswith('| ')]
  assert [x.split(' | ')[0] for x in answers] == ['| teacher', '| width, as cut', '| width']
  searched = section('What the search tried')
  best = files.read_json(root / 'search' / 'search.json')
  assert any(x.startswith(f'| {best["best"]} | {best["parameters"][best["best"]]:,} |')
             for x in searched)  # fmt: skip
  assert results.search_cost(root / 'search').flops > best['zero_shot_flops'] > 0
  assert f.total('searched').flops > f.total('width').flops
  other = next(root.rglob('width-0/eval/generic-test.npy'))
  kept = files.read_npy(other)
  files.write_npy(other, kept[:3])
  with pytest.raises(ValueError, match='was tested on other rows of generic'):
    results.read(scale, root)
  files.write_npy(other, kept)
  before = {p: p.stat().st_mtime_ns for p in root.rglob('*.jsonl')}
  study.run([BY_NAME[n] for n in names])
  assert before == {p: p.stat().st_mtime_ns for p in root.rglob('*.jsonl')}


@pytest.mark.parametrize(('steps', 'worth'), [(2, -1.0), (0, -1.0), (2, 9.0)])
def test_one_command_from_a_teacher_to_an_export(steps, worth, tiny_config, train_once, tmp_path):
  """With a teacher corrected before, meanwhile, or not at all, as its probe says."""
  train_once(tiny_config.to_dict(), tmp_path / 'whole')
  c = config_of_recipe.get_config()
  c.teacher, c.data, c.sizes = str(tmp_path / 'whole'), tiny_config.data.path, 'mlp=16'
  c.calibrate.update(rows=16, batch_size=8)
  c.cut.align = 8
  for part in (c.recover, c.correct):
    part.update(steps=2, tensorboard=False)
    part.data.batch_size = 8
    part.schedule.warmup = 1
    part.eval.update(every=2, max_rows=8, batch_size=8)
  c.correct.steps, c.probe.steps, c.probe.worth = steps, 2, worth
  assert 'correction of the teacher' in recipe.dry_run(c.to_dict(), 8, 'h100', 0.4)[-1]
  bad = c.to_dict()
  bad['recover'] |= {'teacher_cache': 'x'} if steps else {}
  bad['recover']['objective'] |= {} if steps else {'on_policy': 0.5}
  with pytest.raises(
    ValueError, match='teacher_cache: the recipe distils' if steps else 'needs mixing=1 and'
  ):
    recipe.minitron(bad, tmp_path / 'bad')
  for change, message in (
    ({'data': bad['recover']['data'] | {'set': 'none'}}, 'none'),
    ({'steps': 1}, 'warmup=1: expected less'),
  ):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      recipe.minitron({**c.to_dict(), 'recover': c.recover.to_dict() | change}, tmp_path / 'bad')
  with pytest.raises(ValueError, match='whole: holds a run'):
    recipe.minitron(c.to_dict(), tmp_path / 'whole')
  with pytest.raises(ValueError, match='sizes: vocab: teacher and student need'):
    recipe.dry_run({**c.to_dict(), 'sizes': 'vocab=64'}, 8, 'h100', 0.4)
  assert not (tmp_path / 'bad').exists()
  found = recipe.minitron(c.to_dict(), tmp_path / 'small')
  assert found['probe']['pays'] == (worth < 0)
  low, high = found['probe']['interval']
  assert low <= found['probe']['gain'] <= high
  losses = [
    json.loads((tmp_path / run / 'eval.json').read_text())['generic/validation']['loss']
    for run in ('whole', 'small/probe')
  ]
  np.testing.assert_allclose(found['probe']['gain'], losses[0] - losses[1], rtol=1e-6)
  student = rundir.read_config(tmp_path / 'small' / 'student')
  first, meanwhile = steps and worth < 0, not steps
  guide = 'small/corrected' if first else 'whole'
  assert student['teacher'] == str(tmp_path / guide)
  assert rundir.read_config(tmp_path / 'small' / 'cut')['init'] == str(tmp_path / guide)
  assert student['objective'].get('correct') == pytest.approx(0.2 if meanwhile else 0.0)
  models = {'teacher', 'probe', 'cut', 'student', *(['corrected'] if first else [])}
  assert set(found['models']) == models and 'held-out loss by' in recipe.table(found)
  assert found.get('verified', 0) < 1e-4 and (tmp_path / 'small' / 'export' / 'README.md').exists()
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('metrics.jsonl')}
  again = recipe.minitron(c.to_dict(), tmp_path / 'small')
  assert again['probe'] == found['probe']
  assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('metrics.jsonl')}
