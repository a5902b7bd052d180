"""The pool: workers end with their parent, killed workers are reported, leftovers deleted."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from configs import data as data_config
from slm.data import work

SCRIPT = """
import pathlib, sys, time
from slm.data import work
import test_data_work

if __name__ == '__main__':
  with work.Pool(2) as pool:
    list(pool.map(test_data_work.sleep, [sys.argv[1]] * 2))
"""


def sleep(folder: str) -> None:
  (pathlib.Path(folder) / f'{os.getpid()}.pid').touch()
  time.sleep(60)


def die(item: int) -> int:
  if item == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  return item


def until(condition, seconds: float = 40) -> bool:
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.1)
  return condition()


def running(pid: int) -> bool:
  try:
    text = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except (FileNotFoundError, ProcessLookupError):
    return False
  return text.rpartition(')')[2].split()[0] not in 'ZX'  # a zombie only waits for its new parent


@pytest.mark.skipif(not pathlib.Path('/proc/self/stat').exists(), reason='needs /proc')
def test_workers_end_with_a_killed_parent(tmp_path):
  (tmp_path / 'script.py').write_text(SCRIPT)
  tests = pathlib.Path(__file__).parent
  environment = os.environ | {'PYTHONPATH': f'{tests.parent}{os.pathsep}{tests}'}
  parent = subprocess.Popen([sys.executable, tmp_path / 'script.py', tmp_path], env=environment)
  try:
    workers = lambda: [int(p.stem) for p in tmp_path.glob('*.pid')]  # noqa: E731
    assert until(lambda: len(workers()) == 2)
    assert all(map(running, workers()))
  finally:
    parent.kill()
    parent.wait()
  ended = until(lambda: not any(map(running, workers())), 10)
  for pid in filter(running, workers()):
    os.kill(pid, signal.SIGKILL)
  assert ended


def test_killed_worker_is_one_line():
  with work.Pool(2) as pool, pytest.raises(OSError, match='a worker process was killed') as e:
    list(pool.map(die, [0, 1, 2]))
  assert '\n' not in str(e.value)


def test_an_error_ends_the_workers_of_the_pool_alone():
  other = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(60,))
  other.start()
  try:
    with pytest.raises(KeyError), work.Pool(2) as pool:
      assert list(pool.map(abs, [-1, 2])) == [1, 2]
      raise KeyError
    assert other.is_alive() and multiprocessing.active_children() == [other]
  finally:
    other.kill()
    other.join()


def test_sweep_takes_what_dead_processes_left(tmp_path):
  dead = subprocess.Popen([sys.executable, '-c', ''])
  dead.wait()
  (tmp_path / 'a').mkdir()
  gone = [tmp_path / f'a/x.npy.{pid}.tmp' for pid in (dead.pid, os.getpid(), 2**70)]
  kept = [tmp_path / f'a/x.npy.{os.getppid()}.tmp', tmp_path / 'a/notes.tmp', tmp_path / 'x.npy']
  for path in [*gone, *kept]:
    path.touch()
  work.sweep(tmp_path)
  assert not any(p.exists() for p in gone) and all(p.exists() for p in kept)


def test_default_workers_are_the_usable_cores(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 5, 7}, raising=False)
  assert work.Pool(0)._workers == 3 and work.Pool(2)._workers == 2


def test_default_levels_suit_the_method_configs():
  from configs import mixture, project

  for config in (mixture.get_config(), project.get_config()):
    assert config.data.level in data_config.get_config().levels
