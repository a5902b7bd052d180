"""Directories that commands write: locks, also of dead processes, and records of settings."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from slm.base import artifact, files

HOLDER = """
import pathlib, sys, time
from slm.base import artifact
with artifact.hold(pathlib.Path(sys.argv[1])):
  print('holding', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """Start a process that holds tmp_path/run."""
  command = [sys.executable, '-c', HOLDER, str(tmp_path / 'run')]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, cwd=pathlib.Path(__file__).parent.parent
  )
  assert process.stdout.readline() == 'holding\n'
  yield process
  process.kill()
  process.wait()


def test_a_second_writer_is_refused_and_told_who_the_first_is(holder, tmp_path):
  who = f'process {holder.pid} on {socket.gethostname()} since 2'
  for _ in range(2):
    with pytest.raises(artifact.HeldError, match=who), artifact.hold(tmp_path / 'run'):
      pass
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert [p.name for p in (tmp_path / 'run').iterdir()] == ['writer.lock']
  with artifact.hold(tmp_path / 'run'):
    assert json.loads((tmp_path / 'run/writer.lock').read_text())['pid'] == os.getpid()
  assert not (tmp_path / 'run/writer.lock').exists()


def test_names_in_one_directory_are_held_apart_and_a_process_may_hold_twice(tmp_path):
  with artifact.hold(tmp_path / 'a/b', 'x'), artifact.hold(tmp_path / 'a/b', 'y'):
    with artifact.hold(tmp_path / 'a/b', 'x'):
      pass
    assert {p.name for p in (tmp_path / 'a/b').iterdir()} == {'x.lock', 'y.lock'}
  assert not (tmp_path / 'a').exists()  # nothing came of it


@pytest.mark.parametrize(
  ('holder', 'refused'),
  [
    ({'pid': 2**22 + 1, 'started': '1'}, ''),
    ({'started': 'another process had this number'}, ''),
    ({}, 'process {pid} on {host} since then'),
    ({'host': 'elsewhere'}, 'on elsewhere since then.* if that process is gone, delete .*lock'),
  ],
)
def test_without_locks_in_the_file_system_the_holder_named_in_the_file_counts(
  holder, refused, tmp_path, monkeypatch
):
  def lockless(*_):
    raise OSError(errno.ENOSYS, 'Function not implemented')

  monkeypatch.setattr(fcntl, 'flock', lockless)
  me = {'host': socket.gethostname(), 'pid': os.getpid(), 'since': 'then'}
  me['started'] = artifact._started(os.getpid())
  (tmp_path / 'writer.lock').write_text(json.dumps(me | holder))
  if refused:
    refused = refused.format(**me).replace(' if', '.*if')
    with pytest.raises(ValueError, match=refused):
      artifact.hold(tmp_path).__enter__()
  else:
    with artifact.hold(tmp_path):
      pass


def test_what_is_asked_again_goes_on_and_something_else_is_refused(tmp_path):
  record = tmp_path / 'out/asked.json'
  asked = {'rows': 3, 'shape': (1, 2), 'of': {'a': 'x'}}
  for _ in range(2):
    artifact.claim(record, asked, 'other rows')
  assert files.read_json(record) == {'rows': 3, 'shape': [1, 2], 'of': {'a': 'x'}}
  with pytest.raises(ValueError, match=r"out holds other rows: of.a was 'x', now 'y'; choose"):
    artifact.claim(record, asked | {'of': {'a': 'y'}}, 'other rows')
  artifact.check(record, {'rows': 3}, 'other rows', read=lambda path: {'rows': 3})
  record.rename(tmp_path / 'out/precious.txt')
  with pytest.raises(ValueError, match='out is not empty and holds no asked.json'):
    artifact.claim(record, asked, 'other rows')
