"""Calibrating and cutting from the command line: resumption, lineage, refusals."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from slm import models
from slm.base import files
from slm.data import loader, prepare, settings, tokenizer
from slm.inference import scoring, tasks
from slm.interchange import convert
from slm.models.config import DecoderConfig
from slm.objectives import heldout
from slm.pruning import commands, importance, measure, slicing
from slm.runs import config, ledger, load
from slm.training import loop
from slm.weights import sharding

ONE = lambda: sharding.make_mesh({'data': 1}, jax.devices()[:1])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  import toy

  from configs import base

  c = base.get_config()
  c.steps, c.tensorboard, c.log_every = 6, False, 0
  c.model.update(embed=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp=24)
  c.data.update(path=toy.prepared(), batch_size=8)
  c.schedule.warmup, c.eval.every, c.eval.batch_size = 2, 6, 8
  path = tmp_path_factory.mktemp('prune') / 'run'
  loop.train(c.to_dict(), path)
  return path, toy.prepared()


def calibrate(run, out, rows=40, **more):
  how = {'on': 'generic/train', 'batch_size': 8, **more}
  return commands.calibrate(str(run), '', str(out), rows=rows, **how)


def kept_of(run):
  return safetensors.numpy.load_file(run / 'kept.safetensors')


def test_calibration_continues_where_it_stopped(trained, tmp_path, monkeypatch):
  run, _ = trained
  whole = calibrate(run, tmp_path / 'whole')
  merge, calls = measure.merge, []

  def failing(*args):
    calls.append(1)
    if len(calls) == 4:
      raise KeyboardInterrupt
    return merge(*args)

  monkeypatch.setattr(measure, 'merge', failing)
  monkeypatch.setattr(commands, '_SAVE_EVERY', 0.0)
  with pytest.raises(KeyboardInterrupt):
    calibrate(run, tmp_path / 'halves')
  about, _ = commands.read(tmp_path / 'halves')
  assert about['batches'] == 3 and 'finished' not in about
  with pytest.raises(ValueError, match='is unfinished'):
    commands.cut(str(run), [str(tmp_path / 'halves')], {'mlp': 8}, str(tmp_path / 'x'))
  again = calibrate(run, tmp_path / 'halves')
  assert len(calls) == 4 + 2  # 40 rows are five batches of eight
  assert (again['count'], again['tokens']) == (40, whole['tokens'])
  jax.tree.map(np.testing.assert_array_equal, again['sums'], whole['sums'])
  assert calibrate(run, tmp_path / 'halves')['count'] == 40 and len(calls) == 6
  with pytest.raises(ValueError, match='other sums: rows was 40, now 41'):
    calibrate(run, tmp_path / 'halves', rows=41)
  file = tmp_path / 'halves' / 'stats.safetensors'
  file.write_bytes(file.read_bytes()[:50])
  with pytest.raises(ValueError, match='stats.safetensors: damaged'):
    commands.read(tmp_path / 'halves')


def test_a_pass_that_another_process_finished_meanwhile_is_not_added_to(
  trained, tmp_path, monkeypatch
):
  stats = calibrate(trained[0], tmp_path / 'stats', rows=16)
  begun, calls = commands._begun, []

  def late(folder, name, request):
    calls.append(name)
    return begun(folder, name, request) if len(calls) > 1 else ({'asked': request}, {})

  monkeypatch.setattr(commands, '_begun', late)
  again = calibrate(trained[0], tmp_path / 'stats', rows=16)
  assert len(calls) == 2
  jax.tree.map(np.testing.assert_array_equal, again, stats)


def test_weights_are_split_over_the_devices_that_divide_them(trained, tmp_path):
  """Of 8 devices a model of 16 channels is on all, one of 12 on groups of 4; sums are the same."""
  assert dict(load.mesh_for(trained[0]).shape)['fsdp'] == 8
  assert {k: v for k, v in sharding.fit_mesh(12).shape.items() if v > 1} == {'data': 2, 'fsdp': 4}
  whole = calibrate(trained[0], tmp_path / 'split')
  loaded = load.load(trained[0], ONE(), finished=True)
  alone = measure.summing(measure.activations(loaded.model, 'float32'))
  batches = loader.evaluation_batches(trained[1], 'generic', 'train', 8, max_rows=40)
  parts = [alone(loaded.params(), batch) for _, _, batch in batches]
  sums = functools.reduce(measure.merge, parts, {})
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
  jax.tree.map(close, whole['sums'], sums['sums'])


def test_another_number_of_devices_continues(trained, tmp_path, monkeypatch):
  """Batches are rounded up to fill the devices: what was asked for stays the same."""
  run, _ = trained
  eight = calibrate(run, tmp_path / 'stats', batch_size=3)
  cut = lambda name: commands.cut(
    str(run), [str(tmp_path / 'stats')], {'layers': 2}, str(tmp_path / name), depth='perplexity'
  )
  monkeypatch.setattr(sharding, 'fit_mesh', lambda width: ONE())
  assert calibrate(run, tmp_path / 'stats', batch_size=3)['count'] == eight['count']
  cut('one')
  one = calibrate(run, tmp_path / 'other', batch_size=3)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
  jax.tree.map(close, one['sums'], eight['sums'])


def test_a_cut_run_is_a_run_like_any_other(trained, tmp_path):
  run, path = trained
  stats = calibrate(run, tmp_path / 'stats')
  wanted = {'embed': 12, 'mlp': 16, 'heads': 2, 'layers': 2}
  cfg, (before, after) = commands.cut(
    str(run), [str(tmp_path / 'stats')], wanted, str(tmp_path / 'small'), align=4
  )
  assert (cfg.embed, cfg.mlp, cfg.num_heads, cfg.num_layers) == (12, 16, 2, 2) and after < before
  loaded = load.load(tmp_path / 'small', ONE())
  teacher = load.load(run, ONE())
  scores = importance.activation_scores(stats)
  kept = importance.keep(scores, wanted, 2)
  want, _ = slicing.cut(teacher.params(), teacher.model.cfg, kept)
  jax.tree.map(np.testing.assert_array_equal, loaded.params(), want)
  found = heldout.run(tmp_path / 'small', path, ['generic/test'], ONE(), 8)['generic/test']
  assert np.isfinite(found['loss'])
  spent = ledger.read_ledger(tmp_path / 'small')
  assert spent['ancestors'] == [str(run)] and spent['phases'][0]['tokens'] == stats['tokens']
  cfg = files.read_json(tmp_path / 'small' / 'config.json')
  assert cfg['prune']['shape'] == wanted and len(cfg['prune']['sha256']) == 64
  for by in ('weights', 'random'):
    how = {'by': by, 'align': 4}
    commands.cut(str(run), [str(tmp_path / 'stats')], {'mlp': 16}, str(tmp_path / by), **how)
    other = load.load(tmp_path / by, ONE()).params()['blocks']['mlp']['w_up']
    mine = {n: teacher.params()['blocks']['mlp']['w_up'][..., n] for n in range(24)}
    assert all(any((c == w[0]).all() for w in mine.values()) for c in other[0].T)
  for seed in range(3):  # widths are drawn, layers are not
    drawn = tmp_path / f'drawn-{seed}'
    how = {'by': 'random', 'seed': seed, 'align': 4}
    commands.cut(str(run), [str(tmp_path / 'stats')], {'mlp': 16, 'layers': 2}, str(drawn), **how)
    np.testing.assert_array_equal(kept_of(drawn)['layers'], kept['layers'])
  assert (
    cfg['rows'] == loader.Split(path, 'generic', 'train').sha256 and cfg['data']['set'] == 'generic'
  )
  groups = {'kv_heads': 1, 'heads': 2}
  cfg, _ = commands.cut(str(run), [str(tmp_path / 'stats')], groups, str(tmp_path / 'groups'))
  assert (cfg.num_heads, cfg.num_kv_heads) == (2, 1)
  for refused, message in (
    ({'embed': 10}, 'embed=10: expected a multiple of 4'),
    ({'mlp': 28}, 'mlp=28: expected 1 to 24'),
    ({}, 'name at least one axis'),
  ):
    with pytest.raises(ValueError, match=message):
      commands.cut(str(run), [str(tmp_path / 'stats')], refused, str(tmp_path / 'x'), align=4)
  with pytest.raises(ValueError, match='expected a calibration of run'):
    small = str(tmp_path / 'small')
    commands.cut(small, [str(tmp_path / 'stats')], {'mlp': 8}, str(tmp_path / 'x'), align=4)
  assert not (tmp_path / 'x').exists()


def test_what_a_cut_needs_is_measured_on_the_same_rows(trained, tmp_path, monkeypatch):
  run, _ = trained
  stats = calibrate(run, tmp_path / 'a', rows=16)
  other = calibrate(run, tmp_path / 'b', rows=16, on='law/train')
  a, b = (str(tmp_path / name) for name in 'ab')
  wanted = {'embed': 8, 'mlp': 16, 'layers': 2}
  how = {'by': 'taylor', 'depth': 'window', 'norm_gain': 'calibrated'}
  commands.cut(str(run), [a], wanted, str(tmp_path / 'small'), **how)
  found = sorted(p.name.partition('.')[0].partition('-')[0] for p in (tmp_path / 'a').iterdir())
  assert found == ['depth', 'gain', 'stats', 'taylor']
  (phase,) = ledger.read_ledger(tmp_path / 'small')['phases']
  assert phase['tokens'] == 4 * stats['tokens']  # stats 1, taylor 3, depth 3 + 1, gain 1 pass
  passes = phase['flops'] / commands.read(tmp_path / 'a')[0]['flops']
  assert passes == pytest.approx(1 + 3 + 4 + 1)
  rise = importance.deletion_scores(commands.read(tmp_path / 'a', 'depth-1')[1]['sums'])
  kept = kept_of(tmp_path / 'small')
  np.testing.assert_array_equal(kept['layers'], np.delete(np.arange(3), np.argmin(rise)))
  loaded = load.load(run, ONE())
  gradients = commands.read(tmp_path / 'a', 'taylor')[1]['sums']
  scores = importance.taylor_scores(loaded.params(), gradients)
  want = importance.keep(scores, {'embed': 8, 'mlp': 16}, 2)
  assert all((kept[axis] == want[axis]).all() for axis in want)
  small = load.load(tmp_path / 'small', ONE())
  assert small.model.cfg.norm_eps == pytest.approx(loaded.model.cfg.norm_eps * 2)
  monkeypatch.setattr(measure, 'summing', None)  # nothing is measured twice
  how['depth'] = 'perplexity'
  commands.cut(str(run), [a], wanted, str(tmp_path / 'again'), **how)
  both = importance.mix(*map(importance.activation_scores, (stats, other)), 0.3)
  commands.cut(str(run), [a, b], {'mlp': 8}, str(tmp_path / 'mixed'), mix=0.3)
  want = importance.keep(both, {'mlp': 8}, 2)['mlp']
  np.testing.assert_array_equal(kept_of(tmp_path / 'mixed')['mlp'], want)
  share, chance = commands.compare([a, b], {'vocab': 24, 'embed': 4})['vocab']
  mine = (set(np.argsort(-s['sums']['vocab'], kind='stable')[:24]) for s in (stats, other))
  assert chance == 24 / 259 and share == len(set.intersection(*mine)) / 24 < 1
  assert commands.compare([a, a], {'heads': 2})['heads'] == (1.0, 0.5)
  for args, message in (
    (([a], {'mlp': 8}, {'mix': 0.3}), 'or two and a share from 0 to 1; found 1 and 0.3'),
    (([a], {'mlp': 12}, {}), 'mlp=12: expected a multiple of 8'),
  ):
    with pytest.raises(ValueError, match=message):
      commands.cut(str(run), *args[:2], str(tmp_path / 'x'), **args[2])
  with pytest.raises(ValueError, match='compare takes two calibrations, found 1'):
    commands.compare([a], {'mlp': 8})


def test_a_smaller_vocabulary_has_its_own_tokenizer_and_data(trained, tmp_path):
  import toy

  (tmp_path / 'root').mkdir()
  sets = toy.corpus(tmp_path / 'root')
  prepared = lambda out, path: prepare.prepare(
    toy.config(
      tmp_path / 'root',
      sets,
      out=str(tmp_path / out),
      levels=(2,),
      fit_windows=200,
      tokenizer=settings.TokenizerConfig('sentencepiece', 384, str(path or '')),
    )  # fmt: skip
  )
  prepared('data', '')
  cfg = config.of(trained[0])
  cfg = dataclasses.replace(
    cfg,
    model=dataclasses.replace(cfg.model, vocab=392),  # padded
    data=dataclasses.replace(cfg.data, path=str(tmp_path / 'data')),
    tokenizer=tokenizer.load(tmp_path / 'data' / 'tokenizer').fingerprint,
  )
  run = tmp_path / 'run'
  load.write_dense(run, cfg, load.build(cfg)[0].init(jax.random.key(0)), [])
  stats = calibrate(run, tmp_path / 'a', rows=16, on='law/train')
  cut = lambda size: commands.cut(
    str(run), [str(tmp_path / 'a')], {'vocab': size, 'mlp': 16}, str(tmp_path / 'small')
  )
  with pytest.raises(ValueError, match='vocab=200: expected 260'):
    cut(200)
  new, _ = cut(320)
  kept = kept_of(tmp_path / 'small')['vocab']
  counts = stats['sums']['vocab']
  assert new.vocab == 320 == len(kept) and counts[kept].sum() > 0.9 * counts.sum()
  assert counts.sum() == stats['tokens']
  small, whole = load.load(tmp_path / 'small', ONE()), load.load(run, ONE())
  np.testing.assert_array_equal(small.params()['embedding'], whole.params()['embedding'][kept])
  folder = tmp_path / 'small' / 'tokenizer'
  assert tokenizer.load(folder).fingerprint == small.cfg.tokenizer != cfg.tokenizer
  with pytest.raises(ValueError, match='was trained with tokenizer'):
    heldout.run(tmp_path / 'small', tmp_path / 'data', ['law/test'], ONE(), 8)
  prepared('smaller', folder / 'tokenizer.model')
  # A teacher cut to the same vocabulary alone has the same tokenizer, and reads the same rows.
  commands.cut(str(run), [str(tmp_path / 'a')], {'vocab': 320}, str(tmp_path / 'teacher'))
  teacher = load.load(tmp_path / 'teacher', ONE())
  load.same_tokenizer(teacher, small.cfg.tokenizer)
  found = heldout.run(tmp_path / 'small', tmp_path / 'smaller', ['law/test'], ONE(), 8)
  assert np.isfinite(found['law/test']['loss'])
  convert.export_model(tmp_path / 'small', tmp_path / 'home')
  said, tok = files.read_json(tmp_path / 'home' / 'tokenizer_config.json'), tokenizer.load(folder)
  assert (said['bos_token'], said['pad_token']) == ('<s>', '<pad>') and not said['add_prefix_space']
  assert files.read_json(tmp_path / 'home' / 'config.json')['eos_token_id'] == tok.ids.eos


def test_layers_can_be_chosen_by_a_task(trained, tmp_path, monkeypatch):
  """The window goes without which most items are right; the evaluations are paid for."""
  run, path = trained
  calibrate(run, tmp_path / 'stats', rows=16)
  items = [
    {'id': str(i), 'type': 'mc', 'query': 'a', 'choices': [f'b{i}', 'ccc'], 'gold': i % 2}
    for i in range(6)
  ]
  (tmp_path / 'quiz.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in items))
  cut = lambda name, **how: commands.cut(
    str(run), [str(tmp_path / 'stats')], {'layers': 2}, str(tmp_path / name), align=4, **how
  )
  cut('plain')
  cut('asked', task=str(tmp_path / 'quiz.jsonl'), limit=4)
  tok, items = tokenizer.load(f'{path}/tokenizer'), tasks.read(tmp_path / 'quiz.jsonl')[:4]

  def score(layers):
    params, cfg = slicing.cut(whole.params(), whole.model.cfg, {'layers': layers})
    settings = {'context': 64, 'begin': tok.begin, 'batch_size': 8}
    scorer = scoring.make(models.build(cfg), params, tok, ONE(), **settings)
    return tasks.evaluate(scorer, items)['score']

  whole = load.load(run, ONE())
  kept = [np.delete(np.arange(3), gone) for gone in range(3)]
  found = [score(k) for k in kept]
  best = kept_of(tmp_path / 'asked')['layers']
  np.testing.assert_array_equal(best, kept[int(np.argmax(found))])
  spent = lambda name: ledger.read_ledger(tmp_path / name)['phases'][0]
  assert spent('asked')['tokens'] > spent('plain')['tokens']
  assert spent('asked')['flops'] > spent('plain')['flops']
  # Nothing is evaluated twice, neither for the same cut nor for another; both have cost as much.
  monkeypatch.setattr(tasks, 'evaluate', lambda *a: pytest.fail('evaluated again'))
  how = {'task': str(tmp_path / 'quiz.jsonl'), 'limit': 4}
  cut('asked', **how)
  cut('again', **how)
  assert spent('again')['tokens'] == spent('asked')['tokens']
  with pytest.raises(ValueError, match='plain holds another run: prune.limit was 0, now 4'):
    cut('plain', **how)
  older = files.read_json(tmp_path / 'again/config.json')
  del older['prune']['task_sha256']
  files.write_json(tmp_path / 'again/config.json', older)
  (tmp_path / 'quiz.jsonl').write_text(json.dumps(items[0]) + '\n')
  cut('again', **how)  # of an earlier version, which recorded the task by name
  with pytest.raises(ValueError, match='asked holds another run: prune.task_sha256 was'):
    cut('asked', **how)
  (tmp_path / 'foreign').mkdir()
  (tmp_path / 'foreign/notes.txt').write_text('of somebody')
  monkeypatch.setattr(commands, '_choose', lambda *a: pytest.fail('computed before it was refused'))
  with pytest.raises(ValueError, match='foreign is not empty and holds no config.json'):
    cut('foreign')


def test_sizes_are_multiples_unless_told_otherwise():
  cfg = DecoderConfig(4096, 512, 2, 2, 2, 8, 2048)
  slicing.check_sizes(cfg, {'mlp': 1152, 'embed': 264, 'layers': 1}, 0)
  for wanted, by in (({'mlp': 1160}, 128), ({'embed': 260}, 8), ({'vocab': 4000}, 128)):
    with pytest.raises(ValueError, match=f'expected a multiple of {by},'):
      slicing.check_sizes(cfg, wanted, 0)
    slicing.check_sizes(cfg, wanted, 4)


def test_heads_share_the_key_value_heads():
  grouped, alone = (DecoderConfig(64, 64, 2, 8, kv, 8, 64) for kv in (4, 8))
  slicing.check_sizes(grouped, {'heads': 4}, 0)
  slicing.check_sizes(alone, {'heads': 4, 'kv_heads': 4}, 0)
  for cfg, heads, message in (
    (alone, 4, 'heads=4: expected a multiple of the 8 key-value heads, or kv_heads=4 beside it'),
    (grouped, 6, 'heads=6: expected a multiple of the 4 key-value heads, or kv_heads=3 beside'),
    (grouped, 3, 'heads=3: expected a multiple of the 4 key-value heads$'),
  ):
    with pytest.raises(ValueError, match=message):
      slicing.check_sizes(cfg, {'heads': heads}, 0)


def test_the_command_line(trained, tmp_path):
  run, _ = trained
  prune = lambda *a: subprocess.run(
    [sys.executable, '-m', 'slm.prune', *map(str, a)], capture_output=True, text=True, check=False
  )
  done = prune('calibrate', f'--run={run}', f'--out={tmp_path}/stats', '--rows=16')
  assert done.returncode == 0 and '16 sequences' in done.stdout, done.stderr
  cut = ('cut', f'--run={run}', f'--stats={tmp_path}/stats', f'--workdir={tmp_path}/small')
  done = prune(*cut, '--sizes=mlp=16', '--align=8')
  assert done.returncode == 0 and 'mlp 16; ' in done.stdout, done.stderr
  assert 'error: sizes: expected axis=size' in prune(*cut, '--sizes=width=3').stderr
  assert 'mlp=17: expected a multiple of 8' in prune(*cut, '--sizes=mlp=17').stderr
  assert 'sizes: mlp is named twice' in prune(*cut, '--sizes=mlp=16,mlp=8').stderr
  two = prune(*cut, f'--stats={tmp_path}/stats', '--sizes=mlp=16')
  assert '--mix: with two --stats expected the share of the second' in two.stderr
  both = ('compare', f'--stats={tmp_path}/stats', f'--stats={tmp_path}/stats')
  assert 'mlp: 1.000 in common, 0.333 by chance' in prune(*both, '--sizes=mlp=8').stdout
  assert 'expected one of calibrate, cut' in prune().stderr
  assert 'expected --stats and --sizes' in prune('cut', f'--run={run}', '--workdir=x').stderr
