"""The study of kills: what it sends and notes, its table, and that it goes on where it stopped."""

import json
import os
import subprocess
import sys

import pytest

from experiments.faults import run, stages


def line(number, stage, kinds, same=True, sent=True):
  kills = [{'kind': kind, 'sent': sent, 'in_a_save': kind == 'SIGKILL'} for kind in kinds]
  return {'trial': number, 'stage': stage, 'kills': kills, 'same': same}


def test_the_table_counts_what_was_sent_and_what_became_of_it():
  lines = [
    line(0, 'train', ['SIGKILL', 'SIGTERM twice']),
    line(1, 'train', ['SIGKILL'], same=False),
    line(2, 'evaluate', ['SIGKILL'], sent=False),
    line(3, 'evaluate', ['SIGTERM at a write']),
  ]
  assert run.table(lines).splitlines()[2:] == [
    '| train | 2 | 3 | 2 | 0 | 0 | 0 | 1 | 0 | 2 | 1 |',
    '| evaluate | 2 | 1 | 0 | 1 | 0 | 0 | 0 | 0 | 0 | 2 |',
    '| all | 4 | 4 | 2 | 1 | 0 | 0 | 1 | 0 | 2 | 3 |',
  ]


def test_trials_that_are_recorded_are_not_done_again(tmp_path, monkeypatch):
  done = []
  monkeypatch.setattr(run.Study, 'undisturbed', lambda self, stage, place: None)
  study = run.Study(run.SCALES['smoke'], tmp_path, 0)

  def trial(self, number):
    if number == 2 and 2 not in done:
      done.append(2)
      raise KeyboardInterrupt
    done.append(number)
    return line(number, 'train', ['SIGKILL'])

  monkeypatch.setattr(run.Study, 'trial', trial)
  with pytest.raises(KeyboardInterrupt):
    study.run()
  assert len(study.run()) == 4
  assert done == [0, 1, 2, 2, 3]


@pytest.mark.parametrize('number', [0, run.KILL, run.TERM])
def test_a_watched_command_ends_before_the_drawn_write(number, tmp_path):
  folder, notes = tmp_path / 'here', tmp_path / 'notes'
  folder.mkdir(), notes.mkdir()
  writing = [f"open('{folder}/a', 'w')", f"open('{tmp_path}/elsewhere', 'w')"]
  writing += [f"os.rename('{folder}/a', '{folder}/b')", f"os.mkdir('{folder}/c')"]
  (tmp_path / 'writes_twice.py').write_text('\n'.join(['import os', *writing]))
  words = [folder, notes, 2 if number else 0, number, '-m', 'writes_twice']
  command = [sys.executable, '-m', 'experiments.faults.watched', *map(str, words)]
  env = os.environ | {'PYTHONPATH': f'{tmp_path}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'}
  assert subprocess.run(command, env=env).returncode == -number
  assert sorted(p.name for p in folder.iterdir()) == (['a'] if number else ['b', 'c'])
  assert (notes / 'sent').exists() == bool(number)
  assert [path.read_text() for path in notes.glob('writes.*')] == ([] if number else ['3'])


def test_processes_that_a_command_leaves_are_found(tmp_path):
  """Also those whose parent has ended, as what it started to verify answers."""
  command = ['sh', '-c', 'sleep 60 &']
  with run.Start(command, dict(os.environ), tmp_path / 'errors') as started:
    assert started.wait(10) == 0
    (left,) = started.running()
    assert started.outlive(0.1) > 0.1 and 'left processes' in ' '.join(started.problems([0]))
    os.kill(left, run.KILL)
    assert started.outlive(10) < 10 and started.problems([0]) == []


def test_every_stage_has_what_it_needs_and_a_command(tmp_path):
  run.write_text(tmp_path, 4)
  assert {path.stem for path in tmp_path.glob('*.jsonl')} == {'text', 'pairs', 'prompts'}
  made = stages.stages(5)
  for name, stage in made.items():
    assert set(stage.needs) <= made.keys() and (stage.like or name) in made
    words = stage.command(tmp_path / 'here', tmp_path / 'base')
    assert words[0].startswith('slm.') and all(word.startswith('--') for word in words[1:])
  assert {*stages.TURNS, *stages.POSTTRAIN} <= made.keys()


def test_batches_of_several_processes_are_joined_and_a_line_cut_short_is_none(tmp_path):
  write = lambda step, groups: json.dumps({'step': step, 'groups': groups}) + '\n'
  for start, process, text in [
    (0, 0, write(0, ['a', 'b']) + write(1, ['e', 'f'])),
    (0, 1, write(0, ['c', 'd']) + write(1, ['g', 'h'])[:-5]),
    (1, 0, write(0, ['a', 'b', 'c', 'x'])),
  ]:
    (tmp_path / f'start-{start}').mkdir(exist_ok=True)
    (tmp_path / f'start-{start}/batches.{process}.jsonl').write_text(text)
  assert stages.batches(tmp_path) == {0: [['a', 'b', 'c', 'd'], ['a', 'b', 'c', 'x']]}
