"""Preference and RL runs on bad labels and bad disks: one line that names the thing."""

import shutil

import pytest
from test_conversations import fields, write
from test_disk import at_step, disk, fill  # noqa: F401 (fixtures)
from test_policy import config_of, one_device, start  # noqa: F401

from slm.data import prepare
from slm.data.settings import TokenizerConfig
from slm.inference import rewards
from slm.runs import checkpoint, rundir
from slm.training import loop

SHORT = {'steps': 4, 'objective.max_tokens': 3, 'eval.max_rows': 4}


def prompts(root, record):
  """Prepare prompts like one of them; return the data."""
  path = write(root / 'prompts.jsonl', [{'prompt': f'{i}?', **record} for i in range(12)])
  cfg = fields({'prompts': {'all': path}}, root, TokenizerConfig('bytes'), context=48,
               chat={'kind': 'prompts', 'template': 'tulu'}, heldout=(0.3, 0.0))  # fmt: skip
  prepare.prepare(cfg)
  return cfg.out


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'label': 'x'}, "prompts.jsonl:1: no field 'verifier'; the line has label, prompt"),
    ({'verifier': 'exact'}, "prompts.jsonl:1: no field 'label'; the line has prompt, verifier"),
    ({'label': ['x'], 'verifier': ['exact', 'regex']}, 'or as many of both in lists'),
  ],
)
def test_labels_that_are_missing_are_named_by_their_line(record, message, tmp_path):
  with pytest.raises(ValueError, match=message) as e:
    prompts(tmp_path, record)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'label': 'x', 'verifier': 'exct'}, "the label of prompt 0: there is no verifier 'exct': did"),
    ({'label': {}, 'verifier': 'exact'}, "the label of prompt 0: exact: lacks the argument 'answ"),
    ({'label': '(', 'verifier': 'regex'}, 'the label of prompt 0: regex: pattern: expected a reg'),
    ({'label': 3, 'verifier': 'exact'}, 'the label of prompt 0: exact: answer: expected'),
  ],
)
def test_labels_that_cannot_be_checked_end_a_run_before_it_begins(record, message, start, tmp_path):  # noqa: F811
  data = prompts(tmp_path, record)
  with pytest.raises(ValueError, match=message) as e:
    loop.train(config_of((start[0], data), **SHORT), tmp_path / 'run', reward=rewards.reward)
  assert '\n' not in str(e.value)
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_labels_that_change_below_a_run_are_refused(start, tmp_path):  # noqa: F811
  data = prompts(tmp_path, {'label': 'aye', 'verifier': 'exact'})
  given = config_of((start[0], data), **SHORT | {'steps': 1, 'schedule.warmup': 0})
  loop.train(given, tmp_path / 'run', reward=rewards.reward)
  (tmp_path / 'again').mkdir()
  prompts(tmp_path / 'again', {'label': 'nay', 'verifier': 'exact'})
  shutil.rmtree(data)
  shutil.copytree(tmp_path / 'again/out', data)
  with pytest.raises(ValueError, match='rows was .*, now'):
    loop.train(given | {'steps': 4}, tmp_path / 'run', reward=rewards.reward)


def test_an_rl_run_on_a_full_and_a_read_only_disk(disk, start, tmp_path, monkeypatch):  # noqa: F811
  given, folder = config_of(start, **SHORT), disk('size=4m')
  with monkeypatch.context() as m:
    at_step(m, 3, lambda: fill(folder))
    with pytest.raises(OSError, match='no space on .*disk/run') as e:
      loop.train(given, folder / 'run', reward=rewards.reward)
  assert '\n' not in str(e.value)
  assert not checkpoint.damage(folder / 'run/checkpoints/2')
  disk('ro')
  with pytest.raises(OSError, match='Read-only file system'):
    loop.train(given, folder / 'run', reward=rewards.reward)
  disk('rw')
  (folder / 'filler').unlink()
  loop.train(given, folder / 'run', reward=rewards.reward)
  loop.train(given, tmp_path / 'undisturbed', reward=rewards.reward)
  figures = lambda run: [
    [x.get(k) for k in ('loss', 'reward', 'eval_reward')] for x in rundir.read_metrics(run)
  ]
  assert figures(folder / 'run') == figures(tmp_path / 'undisturbed')
