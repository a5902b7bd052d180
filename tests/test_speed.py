"""The speed experiment: what is measured, and what of it can end without taking the rest along."""

import dataclasses
import subprocess
import types

import pytest

from experiments.speed import posttrain, report, run


@pytest.fixture
def table(tmp_path):
  table = run.Table('smoke', tmp_path)
  table.begin(rounds=1, busy=0)
  return table


def test_ratios_are_to_slm_of_the_same_batch_and_shares_of_the_fastest_product(table):
  row = lambda *seconds, **facts: {'seconds': list(seconds), **facts}
  entries = {
    'gemm 2x2x2': row(1.0, 2.0, 4.0, flops=100.0),
    'gemm 4x4x4': row(1.0, flops=80.0),
    'train A: slm': row(2.0, flops=20.0, tokens=8),
    'train A: torch': row(3.0, 5.0, 6.0, flops=20.0, tokens=8),
    'train B: torch': row(9.0, tokens=8),
    'decode 1: slm': row(0.5, tokens=4),
    'decode 1: transformers': row(1.5, tokens=4),
  }
  found = {r['ratio']: r for r in report.ratios(entries, {'train A: torch': '>= 1.3'})}
  torch = found['seconds, train A: torch / slm']
  assert (torch['median'], torch['fastest'], torch['bar']) == (2.5, 1.5, '>= 1.3')
  assert found['seconds, decode 1: transformers / slm']['median'] == 3.0
  assert found['FLOP/s, train A: slm / gemm 2x2x2']['median'] == pytest.approx(10 / 50)
  assert len(found) == 4  # B has nothing of slm to be compared with
  table.add({}, {'decode 1: slm': 'measured at last'})
  table.add(entries, {'train B: slm': 'no memory'})
  text = table.path.with_suffix('.md').read_text()
  assert '| train A: torch | 5.0000 | 3.0000 | 6.0000 | 2 | 0.0 | 5% |' in text  # 4 of 80 FLOP/s
  assert '- train B: slm: not measured: no memory' in text and 'measured at last' not in text


def test_rows_of_slm_are_measured_alone_and_together(table):
  names = ['gemm 64x64x64', 'train toy: slm, distilled', 'decode 2: slm']
  run.here(run.SCALES['smoke'], names[:1], 1, table)
  run.here(dataclasses.replace(run.SCALES['smoke'], alone=False), names[1:], 2, table)
  result = table.read()
  assert list(result['entries']) == names and not result['missing']
  assert [len(e['seconds']) for e in result['entries'].values()] == [1, 2, 2]
  # The teacher is as large as the student, and is not differentiated.
  distilled = result['entries']['train toy: slm, distilled']
  assert distilled['flops'] == pytest.approx(4 / 3 * run.steps.work(run.TINY, 2, 16)['flops'])
  with pytest.raises(ValueError, match="--row: expected some of .*, found 'train: nobody'"):
    run.here(run.SCALES['smoke'], ['train: nobody'], 1, table)


def test_a_row_that_lacks_a_compiler_is_named(table, monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.setenv('CXX', 'no-such-compiler')
  names = ['train toy: torch.compile', 'decode 1: torch.compile', 'gemm 64x64x64']
  run.here(run.SCALES['smoke'], names, 1, table)
  result = table.read()
  assert list(result['entries']) == names[2:]
  assert 'found no no-such-compiler; install it or set CXX' in result['missing'][names[0]]
  assert 'compiles its steps on accelerators' in result['missing'][names[1]]


def test_a_process_that_ends_loses_one_row_and_the_limit_those_that_follow(table, monkeypatch):
  calls, now = [], [0.0]

  def started(command, env, timeout):
    rows = [word.removeprefix('--row=') for word in command if word.startswith('--row=')]
    calls.append((rows, env['XLA_PYTHON_CLIENT_PREALLOCATE']))
    table.add({rows[0]: {'seconds': [1.0], 'flops': 1.0}}, {})
    if rows[0].endswith('torch'):
      now[0] = 101.0
      raise subprocess.TimeoutExpired(command, timeout)
    return subprocess.CompletedProcess(command, -9 if len(calls) == 1 else 0)

  monkeypatch.setattr(run.subprocess, 'run', started)
  monkeypatch.setattr(run, 'time', types.SimpleNamespace(monotonic=lambda: now[0]))
  names = list(run.contestants(run.SCALES['smoke']))
  ours = [name for name in names if ': torch' not in name and 'transformers' not in name]
  run.in_turn(run.SCALES['smoke'], 1, 100.0, table)
  result = table.read()
  assert [preallocated for _, preallocated in calls] == ['true'] * (len(calls) - 1) + ['false']
  assert calls[0][0] == ours and calls[1][0] == ours[2:]
  assert result['missing'][ours[1]] == 'its process ended with status -9'
  left = [name for name in names if name not in ours and name not in result['entries']]
  assert left and all(result['missing'][n] == '--limit=100 seconds were over' for n in left)


@pytest.mark.parametrize('part', posttrain.PARTS)
def test_a_part_of_post_training_is_measured_once(part, tmp_path, monkeypatch):
  if part == 'rollouts':
    pytest.importorskip('torch')
  sizes = posttrain.Sizes(2, 32, 8, 4, 2, 6, (2, 2), run.TINY)
  entry = posttrain.measured('', sizes, part)
  who = {'steps': {'text', 'conversations'}, 'rollouts': {'slots', 'batches', 'transformers'}}
  assert {name: len(s) for name, s in entry['seconds'].items()} == dict.fromkeys(who[part], 2)
  tokens = entry['facts']['tokens']
  assert set(tokens) == who[part] and len(set(tokens.values())) == 1  # the same work
  if part == 'steps':
    share = entry['facts']['trained share']
    assert 0.2 < share['conversations'] < 0.8 < share['text']
  posttrain.write(tmp_path, '', [part], sizes, lambda *_: entry)
  posttrain.write(tmp_path, '', [part], sizes, None)  # would be called
  with pytest.raises(TypeError, match='not callable'):
    posttrain.write(tmp_path, '', [part], dataclasses.replace(sizes, rows=4), None)


def test_ratios_of_post_training_are_of_rounds_and_per_token():
  entry = {
    'part': 'rollouts',
    'seconds': {'slots': [1, 1, 2], 'batches': [2, 2, 2], 'transformers': [4, 3, 4]},
    'facts': {'tokens': {'slots': 10, 'batches': 20, 'transformers': 10}},
  }
  slots, batches = posttrain.ratios(entry)
  assert slots == ['transformers / slots', '3.000', '2 to 4', '>= 2']
  assert batches[:3] == ['transformers / batches', '4.000', '3 to 4']
