"""Searching shapes: what is listed, what is scored, halving, resumption; and measuring speed."""

import dataclasses
import itertools

import jax
import pytest
import toy

from configs import base, distill
from slm.base import files
from slm.inference import latency
from slm.models.config import DecoderConfig
from slm.objectives import heldout
from slm.pruning import commands, search
from slm.runs import load, rundir
from slm.training import loop
from slm.weights import sharding
from slm.weights.count import num_params

WHOLE = DecoderConfig(
  vocab=320, embed=16, num_layers=4, num_heads=2, num_kv_heads=2, head_dim=8, mlp=32
)
count = lambda cfg: sum(num_params(cfg).values())


def test_shapes_are_all_those_within_the_bounds():
  grid = {'embed': (16, 12), 'mlp': (32, 24, 16), 'layers': (4, 3)}
  limit = 0.8 * count(WHOLE)
  expected = set()
  for e, m, n in itertools.product(*grid.values()):
    cfg = dataclasses.replace(WHOLE, embed=e, mlp=m, num_layers=n)
    if count(cfg) <= limit and (e, m, n) != (16, 32, 4):
      expected.add((e, m, n))
  found = search.shapes(WHOLE, grid, search.Bounds(params=limit))
  assert {(c.embed, c.mlp, c.num_layers) for _, c in found} == expected and len(expected) > 3
  sizes = [count(c) for _, c in found]
  assert sizes == sorted(sizes, reverse=True)
  with pytest.raises(ValueError, match='no shape of'):
    search.shapes(WHOLE, grid, search.Bounds(params=10))


def test_memory_counts_weights_and_cache():
  grid = {'layers': (4, 3)}
  three = dataclasses.replace(WHOLE, num_layers=3)
  cache = 2 * 3 * 2 * 8 * 5 * 100  # keys and values, layers, heads, head_dim, rows, tokens
  need = 2 * (count(three) + cache)
  within = lambda memory: search.shapes(
    WHOLE, grid, search.Bounds(memory=memory, batch=5, context=100, dtype='bfloat16')
  )
  assert [c.num_layers for _, c in within(need)] == [3]
  with pytest.raises(ValueError, match='no shape'):
    within(need - 1)


def test_active_parameters_bound_a_mixture():
  moe = dataclasses.replace(WHOLE, num_experts=8, experts_per_token=2)
  few = search.shapes(moe, {'experts': (8, 4), 'mlp': (32, 16)}, search.Bounds(active=17_000))
  assert {(c.num_experts, c.mlp) for _, c in few} == {(8, 16), (4, 16)}


def test_grids():
  whole = dataclasses.replace(WHOLE, embed=640, mlp=1000, num_layers=10)
  assert search.default_grid(whole, 128) == {
    'embed': (640, 512, 384),
    'mlp': (1000, 896, 768, 640),
    'layers': (10, 9, 8),
  }
  assert search.read_grid('mlp=16:32,layers=2', WHOLE) == {'mlp': (32, 16), 'layers': (2,)}
  for bad in ('mlp=33', 'width=3', 'mlp=a', 'mlp', 'vocab=8'):
    with pytest.raises(ValueError, match='--grid'):
      search.read_grid(bad, WHOLE)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  root = tmp_path_factory.mktemp('search')
  c = settings(base.get_config())
  c.model.update({k: v for k, v in dataclasses.asdict(WHOLE).items() if k in c.model})
  loop.train(c.to_dict(), root / 'teacher')
  commands.calibrate(
    str(root / 'teacher'), '', str(root / 'stats'), 'generic/train', rows=32, batch_size=8
  )
  return root / 'teacher', root / 'stats'


def settings(c):
  c.steps, c.tensorboard, c.log_every = 3, False, 0
  c.data.update(path=toy.prepared(), batch_size=8)
  c.schedule.warmup, c.eval.every, c.eval.batch_size, c.eval.max_rows = 1, 0, 8, 32
  return c


def test_the_best_half_is_trained_on_and_a_second_call_continues(teacher, tmp_path, monkeypatch):
  run, stats = teacher
  config = settings(distill.get_config())
  config.data.set, config.data.index, config.eval.patience = 'generic', '', 0
  grid = {'mlp': (32, 16), 'layers': (4, 3)}
  bounds = search.Bounds(params=0.97 * count(WHOLE))
  go = lambda: search.search(
    str(run), str(stats), tmp_path / 'found', config.to_dict(), grid, bounds, survivors=3
  )
  trained, inner = [], loop.train

  def killed(cfg, workdir):
    trained.append(workdir.name)
    if len(trained) == 3:
      raise KeyboardInterrupt
    return inner(cfg, workdir)

  monkeypatch.setattr(loop, 'train', killed)
  with pytest.raises(KeyboardInterrupt):
    go()
  half = files.read_json(tmp_path / 'found' / 'search.json')
  assert len(half['zero_shot']) == 3 and not half['rungs']
  found = go()
  assert found['zero_shot'] == half['zero_shot']
  first, second = found['rungs']
  assert len(first['loss']) == 3 and len(second['loss']) == 2
  assert [r['steps'] for r in found['rungs']] == [3, 6]
  best = sorted(found['zero_shot'], key=found['zero_shot'].get)[:3]
  assert set(first['loss']) == set(best)
  assert set(second['loss']) == set(sorted(best, key=first['loss'].get)[:2])
  assert found['best'] == min(second['loss'], key=second['loss'].get)
  chain = rundir.read_config(tmp_path / 'found' / f'{found["best"]}-2')
  assert chain['init'].endswith(f'{found["best"]}-1') and chain['teacher'] == str(run.resolve())
  # The loss of a shape as cut is that of the run that was cut to it.
  mesh = sharding.make_mesh({'data': -1})
  cut = tmp_path / 'found' / best[0]
  loaded = load.load(cut, mesh)
  with jax.set_mesh(mesh):
    row_losses = heldout.make_row_losses(loaded.model.forward, 'float32', 512, mesh)
    values = heldout.rows(
      row_losses, lambda c: loaded.params(), mesh, toy.prepared(), 'generic', 'validation', 8,
      max_rows=32,
    )  # fmt: skip
  assert heldout.summary(values, 0)['loss'] == pytest.approx(found['zero_shot'][best[0]], 1e-6)
  assert len(search.table(found).splitlines()) == 1 + 3 + 1
  assert found['flops'] > found['zero_shot_flops'] > 0
  assert search.name(found['sizes']) == found['best']
  with pytest.raises(ValueError, match='holds another search: survivors was 3, now 2'):
    search.search(
      str(run), str(stats), tmp_path / 'found', config.to_dict(), grid, bounds, survivors=2
    )


def test_a_bound_on_speed_takes_the_first_that_are_fast_enough(monkeypatch):
  took = {4: 0.004, 3: 0.003, 2: 0.002, 1: 0.001}
  asked = []

  def measured(shapes, *_):
    asked.append(sorted(c.num_layers for c in shapes.values()))
    return {name: {'token': took[c.num_layers]} for name, c in shapes.items()}

  monkeypatch.setattr(latency, 'measure', measured)
  monkeypatch.setattr(search, '_TOGETHER', 2)
  listed = search.shapes(WHOLE, {'layers': (3, 2, 1)}, search.Bounds(params=1e9))
  bounds, known = search.Bounds(token_ms=2.5), {}
  chosen = search._fast_enough(listed, bounds, 1, 3, known, lambda: None)
  assert [c.num_layers for _, c in chosen] == [2] and asked == [[2, 3]]
  search._fast_enough(listed, bounds, 1, 3, known, lambda: None)
  assert len(asked) == 1  # what was measured is not measured again
  with pytest.raises(ValueError, match='of 3 shapes the fastest takes 1 ms'):
    search._fast_enough(listed, search.Bounds(token_ms=0.5), 1, 3, known, lambda: None)


def test_a_step_of_decoding_is_what_the_prefill_leaves():
  small, large = WHOLE, dataclasses.replace(WHOLE, mlp=4096, num_layers=8)
  found = latency.measure({'a': small, 'b': large}, 'float32', 1, 8, 8, 3)
  assert found['a'].keys() == {'prefill', 'token', 'prefill_spread', 'token_spread'}
  assert found['b']['token'] > found['a']['token'] > 0  # 150 times the weights
  moved = latency.predicted(large, 100, 'bfloat16')
  assert moved['weight_bytes'] == 2 * count(large)
  untied = dataclasses.replace(large, tied=False)
  assert latency.predicted(untied, 100, 'bfloat16')['weight_bytes'] == 2 * count(large)
  assert moved['cache_bytes'] == 2 * 2 * 8 * 2 * 8 * 100
  with pytest.raises(ValueError, match='2 new tokens'):
    latency.measure({'a': small}, 'float32', 1, 8, 1, 3)
