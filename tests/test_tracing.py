"""Traces: the steps that are in them, and that they change nothing."""

import jax
import pytest
from test_train import equal, theta

from slm.runs import rundir
from slm.training import loop, tracing


def traced(run):
  """Return the steps in the traces of a run, in order of the traces."""
  found = []
  for path in sorted(run.glob('profile/plugins/profile/*/*.xplane.pb')):
    events = [e for plane in jax.profiler.ProfileData.from_file(str(path)).planes
              for line in plane.lines for e in line.events if e.name == 'train']  # fmt: skip
    found.append(sorted(dict(e.stats)['step_num'] for e in events))
  return found


def test_a_trace_has_its_steps_and_changes_none(tiny_config, train_once, tmp_path):
  plain, run = tmp_path / 'plain', tmp_path / 'run'
  train_once(tiny_config.to_dict(), plain)
  assert not (plain / 'profile').exists()
  loop.train(tiny_config.to_dict(), run, profile='2:3')
  assert traced(run) == [[2, 3]]
  for key in ('loss', 'grad_norm', 'tokens'):
    values = [[line[key] for line in rundir.read_metrics(x)] for x in (plain, run)]
    assert values[0] == values[1]
  assert equal(theta(plain), theta(run))


def test_a_trace_ends_where_training_fails(tiny_config, tmp_path, monkeypatch):
  def fail(*_):
    raise FloatingPointError('step 3')

  tiny_config.eval.every = 3
  with monkeypatch.context() as m:
    m.setattr(loop._Run, 'evaluate', fail)
    with pytest.raises(FloatingPointError):
      loop.train(tiny_config.to_dict(), tmp_path / 'run', profile='3:4')
  assert traced(tmp_path / 'run') == [[3]]


@pytest.mark.parametrize('text', ['3', '3:', '0:2', '3:2', '2:5', 'a:b', '-1:2', '1:2:3'])
def test_bad_steps_are_one_line(text, tiny_config, tmp_path):
  message = f'^--profile={text}: expected START:STOP, the first and the last step .* of 1 to 4$'
  with pytest.raises(ValueError, match=message):
    loop.train(tiny_config.to_dict(), tmp_path / 'run', profile=text)
  assert not (tmp_path / 'run').exists()
  assert list(tracing.steps('2:3', 4)) == [2, 3] and not tracing.steps('', 4)
