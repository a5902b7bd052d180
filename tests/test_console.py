"""The console: a signal ends a command with one line, progress counts only this process's work."""

import pathlib
import signal
import subprocess
import sys

import pytest

from slm.base import console

SCRIPT = """
import os, pathlib, signal, sys
from slm.base import artifact, console

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def main(_):
  print('started', flush=True)
  if os.environ.get('FOLDER'):
    with artifact.hold(pathlib.Path(os.environ['FOLDER'])):
      print('held', flush=True)
      signal.pause()
  signal.pause()

console.run(main)
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('folder', ['', 'out'])
def test_a_signal_ends_a_command_in_one_line(number, folder, tmp_path):
  root = pathlib.Path(__file__).parent.parent
  process = subprocess.Popen(
    [sys.executable, '-c', SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    cwd=tmp_path, env={'PYTHONPATH': str(root), 'FOLDER': folder},
  )  # fmt: skip
  assert process.stdout.readline() == 'started\n'
  if folder:
    assert process.stdout.readline() == 'held\n' and (tmp_path / 'out/writer.lock').exists()
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert err == ('interrupted; the same command continues out\n' if folder else 'interrupted\n')
  assert not out and not list(tmp_path.iterdir())


def test_progress_leaves_out_what_comes_before_the_first_unit(monkeypatch, capsys):
  clock = [0.0]
  monkeypatch.setattr(console.time, 'monotonic', lambda: clock[0])
  with console.Progress('train', 1000, 'rows') as bar:
    bar.skip(500)
    bar.say('compiling')
    for at in (60, 61, 62, 75, 76):
      clock[0] = at
      bar.update(100, loss=1.5)
  lines = capsys.readouterr().err.splitlines()
  assert lines == [
    'train: compiling',
    'train: 60%  loss 1.5',  # a minute of compilation is no rate
    'train: 90%  20 rows/s  5 s left  loss 1.5',
    'train: 100%  25 rows/s  0 s left  loss 1.5',
  ]


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0, '0 s'),
    (0.4, '400 ms'),
    (0.00123, '1.23 ms'),
    (0.6, '1 s'),
    (59.4, '59 s'),
    (65, '1 min 05 s'),
    (3599.7, '1 h 00 min'),
    (7e6, '1,944 h 26 min'),
  ],
)
def test_a_duration_has_the_units_that_a_reader_needs(seconds, text):
  assert console.duration(seconds) == text


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ([], "expected one of cut, verify, check; found 'nothing'"),
    (['ctu'], "expected one of cut, verify, check; found 'ctu'; did you mean cut?"),
    (['cut', 'runs/a'], 'cut: expected flags alone; found runs/a'),
    (['verify'], r'verify: expected HF_DIR \[OTHER\]; found nothing'),
    (['verify', 'a', 'b', 'c'], r'verify: expected HF_DIR \[OTHER\]; found a b c'),
    (['check'], r'check: expected RUN\.\.\.; found nothing'),
  ],
)
def test_a_wrong_subcommand_is_refused(argv, message):
  with pytest.raises(ValueError, match=message):
    usages = {'cut': '', 'verify': 'HF_DIR [OTHER]', 'check': 'RUN...'}
    console.subcommand(['slm.x', *argv], usages)


def test_a_subcommand_comes_with_its_arguments():
  usages = {'cut': '', 'verify': 'HF_DIR [OTHER]', 'check': 'RUN...'}
  assert console.subcommand(['slm.x', 'cut'], usages) == ('cut', [])
  assert console.subcommand(['slm.x', 'verify', 'a'], usages) == ('verify', ['a'])
  assert console.subcommand(['slm.x', 'check', *'abc'], usages) == ('check', [*'abc'])


def test_output_that_nobody_reads_ends_a_command_quietly():
  root = pathlib.Path(__file__).parent.parent
  script = 'from slm.base import console\nconsole.run(lambda _: print("x" * 9**7))'
  process = subprocess.Popen(
    [sys.executable, '-c', script],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={'PYTHONPATH': str(root)},
  )  # fmt: skip
  process.stdout.close()
  assert process.stderr.read() == '' and process.wait(timeout=60) == 1
