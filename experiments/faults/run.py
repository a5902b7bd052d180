"""Kill commands at random moments, and compare what they make with an undisturbed run, bit by bit.

    python -m experiments.faults.run --scale=smoke --out=runs/faults

Every trial starts a command, ends it by signals at moments drawn from (seed, trial), and starts it
again each time until it has finished before the moment, or was ended often enough and is let
finish. OUT/trials.jsonl gets a line as each trial ends; trials that have one are not done again.
"""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.faults import stages
from experiments.faults.stages import Place, Stage
from slm.base import console, files

WORDS = """ship sail harbour wave anchor tide island storm rope court party clause tenant lease
  statute breach notice butter onion simmer pepper roast flour garlic planet orbit comet nebula
  gravity"""
KILL, TERM = int(signal.SIGKILL), int(signal.SIGTERM)
# What is sent, and whether it is at a drawn write or at a drawn time.
KINDS = {
  'SIGKILL': ((KILL,), False),
  'SIGTERM at a write': ((TERM,), True),
  'SIGTERM': ((TERM,), False),
  'SIGKILL at a write': ((KILL,), True),
  'SIGTERM twice': ((TERM, TERM), False),
  'SIGTERM to all': ((TERM,), False),
}
TO_ALL = 'SIGTERM to all'  # as batch systems do: to the processes that the command started too
LIMIT = 180  # seconds in which every start ends, with all its processes
LOST = (1, 75)  # statuses of a process that has lost another


@dataclasses.dataclass(frozen=True)
class Scale:
  """How much is done: kills in all are at most trials * kills."""

  documents: int
  steps: int  # of 8 rows
  trials: int
  kills: int  # in each trial
  turns: Sequence[str] = stages.TURNS


SCALES = {
  'smoke': Scale(documents=80, steps=20, trials=4, kills=1),
  'full': Scale(documents=80, steps=60, trials=72, kills=4),
  'smoke-posttrain': Scale(80, steps=6, trials=4, kills=1, turns=stages.POSTTRAIN),
  'posttrain': Scale(80, steps=16, trials=20, kills=4, turns=stages.POSTTRAIN),
}


def write_text(folder: Path, documents: int) -> None:
  """Write documents of random words as JSON lines; pairs and prompts of them too."""
  rng, words = np.random.default_rng(0), WORDS.split()
  draw = lambda low, high: ' '.join(rng.choice(words, int(rng.integers(low, high))))
  made = {'text': [{'text': draw(20, 90)} for _ in range(documents)]}
  answers = lambda: dict(zip(('chosen', 'rejected'), rng.permutation(words).tolist(), strict=False))
  made['pairs'] = [{'prompt': draw(1, 3), **answers()} for _ in range(documents)]
  # The first pattern is searched in a process of its own.
  label = {'verifier': ['regex', 'length'], 'label': ['[a-m].*', {'unit': 'words', 'at_least': 3}]}
  made['prompts'] = [{'prompt': f'{i} {draw(1, 3)}', **label} for i in range(documents)]
  for name, records in made.items():
    files.write_text(folder / f'{name}.jsonl', '\n'.join(map(json.dumps, records)))


class Start:
  """A command that runs, with its errors in a file; leaving its context ends it."""

  def __init__(self, command: Sequence[str], env: dict[str, str], errors: Path):
    self._path, self._errors = errors, errors.open('w')
    mark = {'FAULTS_START': str(errors)}  # all processes that it starts inherit it
    self._mark = b'FAULTS_START=' + os.fsencode(errors)
    self.process = subprocess.Popen(
      command, env=env | mark, stdout=subprocess.DEVNULL, stderr=self._errors, text=True
    )

  def __enter__(self) -> 'Start':
    return self

  def __exit__(self, *_: object) -> None:
    if self.process.poll() is None:
      self.process.terminate()  # a launcher ends its processes
      with contextlib.suppress(subprocess.TimeoutExpired):
        self.process.wait(30)
    self.process.kill()
    self.process.wait()
    self._errors.close()

  def children(self) -> list[int]:
    """Return the processes that this one started (on Linux)."""
    path = Path(f'/proc/{self.process.pid}/task/{self.process.pid}/children')
    return [int(word) for word in path.read_text().split()] if path.exists() else []

  def running(self) -> list[int]:
    """Return all processes of the command that run, also those whose parent has ended (Linux)."""
    found = []
    for path in Path('/proc').glob('[0-9]*/environ'):
      with contextlib.suppress(OSError):
        if self._mark in path.read_bytes().split(b'\0') and _runs(int(path.parent.name)):
          found.append(int(path.parent.name))
    return found

  def wait(self, seconds: float = LIMIT) -> int | None:
    """Return the exit status; None if it has not ended within the time."""
    try:
      return self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      return None

  def outlive(self, seconds: float = LIMIT) -> float:
    """Wait until all its processes have ended; return how long that took."""
    began = time.monotonic()
    while self.running() and time.monotonic() < began + seconds:
      time.sleep(0.05)
    return time.monotonic() - began

  def problems(self, expected: Sequence[int]) -> list[str]:
    """Say what is wrong with how the command ended."""
    status, text = self.process.poll(), self._path.read_text()
    found = [] if status is not None else [f'had not ended after {LIMIT} s']
    if self.running():
      found.append(f'left processes that had not ended after {LIMIT} s')
    last = (text.strip().splitlines() or [''])[-1]
    if status is not None and status not in expected:
      found.append(f'status {status}: {last[:300]}')
    return found + ([f'a traceback: {last[:300]}'] if 'Traceback' in text else [])


def _runs(process: int) -> bool:
  """Return whether a process runs; one that has ended may wait for its parent to see it."""
  try:
    return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except OSError:
    return False


class Study:
  """The trials of a scale in a directory."""

  def __init__(self, scale: Scale, out: Path, seed: int):
    self._scale, self._out, self._seed = scale, out.resolve(), seed
    self._base, self._stages = self._out / 'undisturbed', stages.stages(scale.steps)
    cache = {'JAX_COMPILATION_CACHE_DIR': str(self._out / 'cache')}
    self._env = os.environ | cache | {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

  @contextlib.contextmanager
  def _start(
    self, stage: Stage, place: Place, here: Path, notes: Path, write: int = 0, number: int = 0
  ) -> Iterator[Start]:
    """Start a stage's command, which sends itself signal `number` before its write `write`."""
    notes.mkdir(parents=True)
    watched = [sys.executable, '-m', 'experiments.faults.watched', here, notes, write, number]
    watched = [str(word) for word in watched]
    module, *given = [*stage.command(here, self._base), *place.flags]
    command = [*watched, '-m', module, *given]
    if place.processes > 1:
      python = notes / 'python'
      files.write_text(python, '#!/bin/sh\nexec ' + ' '.join(watched) + ' "$@"\n')
      python.chmod(0o755)
      launch = ['slm.launch', '--on=local', f'--nodes={place.processes}', '--submit']
      name = module.removeprefix('slm.')
      command = [sys.executable, '-m', *launch, f'--python={python}', '--', name, *given]
    devices = {'XLA_FLAGS': f'--xla_force_host_platform_device_count={place.devices}'}
    with Start(command, self._env | devices, notes / 'errors.txt') as started:
      yield started

  def _place(self, name: str, here: Path) -> None:
    """Make a stage's directory."""
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    if self._stages[name].trained:
      shutil.copytree(self._base / 'train/run', here / 'run')

  def undisturbed(self, name: str, place: Place = stages.ONE) -> dict[str, Any]:
    """Return the seconds, number of writes and hashes of a stage that nothing disturbs; done once.

    It is done twice, the second time with all programs compiled before, and has to make the same.
    """
    stage = self._stages[name]
    for needed in stage.needs:
      self.undisturbed(needed)
    label = (stage.like or name) + place.name
    record, here = self._base / f'{label}.json', self._base / label
    if not record.exists():
      digests = []
      for number in range(2):
        notes = self._out / 'notes' / label / f'start-{number}'
        shutil.rmtree(notes, ignore_errors=True)
        self._place(name, here)
        began = time.monotonic()
        with self._start(stage, place, here, notes) as started:
          started.wait()
          seconds = time.monotonic() - began
          if problems := started.problems([0]):
            raise ValueError(f'{label}, which nothing disturbed: {"; ".join(problems)}')
        digests.append(stages.digests(here))
      if digests[0] != digests[1]:
        raise ValueError(f'{label}: made something else the second time')
      writes = max(int(path.read_text()) for path in notes.glob('writes.*'))
      value = {'seconds': seconds, 'writes': writes}
      value |= {'digests': digests[0], **self._distances(here, place)}
      files.write_json(record, value)
    return files.read_json(record)

  def _distances(self, here: Path, place: Place) -> dict[str, float]:
    return stages.distances(here, self._base / 'train') if place != stages.ONE else {}

  def _kill(
    self, name: str, place: Place, here: Path, notes: Path, kind: str, rng: np.random.Generator
  ) -> dict[str, Any]:
    """Start a command and end it; return what was sent when, and how it ended."""
    usual, (signals, at_write) = self.undisturbed(name, place), KINDS[kind]
    # Both draws always, so that the moments of later kills do not depend on the kind.
    moment, write = rng.uniform(0, usual['seconds']), int(rng.integers(1, usual['writes'] + 1))
    pause, which = rng.uniform(0, 1), int(rng.integers(place.processes + (place.processes > 1)))
    drawn = (write, signals[0]) if at_write else ()
    with self._start(self._stages[name], place, here, notes, *drawn) as started:
      if not at_write and started.wait(moment) is None:
        self._send(started, kind, place, which, pause)
        (notes / 'sent').touch()
      began = time.monotonic()
      status, left = started.wait(), started.outlive()
      seconds, sent = time.monotonic() - began, (notes / 'sent').exists()
      expected = [0]
      if sent:
        expected += [code for s in signals for code in (-s, 128 + s)]
        expected += LOST if place.processes > 1 else []
      problems = started.problems(expected)
    return {
      'kind': kind, 'at': write if at_write else round(moment, 3), 'sent': sent, 'status': status,
      'in_a_save': sent and stages.in_a_save(here), 'problems': problems, 'place': place.name,
      'ended_after': None if at_write else round(seconds, 2), 'left_for': round(left, 2),
    }  # fmt: skip

  def _send(self, started: Start, kind: str, place: Place, which: int, pause: float) -> None:
    """Send signals: SIGKILL to a launcher or one of its processes, if it has started them."""
    signals, victims = KINDS[kind][0], [started.process.pid]
    if kind == TO_ALL:
      victims = started.running()
    elif signals == (KILL,) and place.processes > 1:
      victims = [*started.children(), *victims][which : which + 1] or victims
    for process in victims:
      with contextlib.suppress(ProcessLookupError):
        os.kill(process, signals[0])
    for number in signals[1:]:
      if started.wait(pause) is None:
        started.process.send_signal(number)

  def trial(self, number: int) -> dict[str, Any]:
    """Run a trial; return its line: its kills, what was wrong, and how far a result was off."""
    rng, turns = np.random.default_rng([self._seed, number]), self._scale.turns
    turn, index = divmod(number, len(turns))
    name, here, notes = turns[index], self._out / 'trial', self._out / 'notes' / str(number)
    stage = self._stages[name]
    first = int(rng.integers(len(stage.places)))
    place = lambda start: stage.places[(first + start) % len(stage.places)]
    shutil.rmtree(notes, ignore_errors=True)
    self._place(name, here)
    kills, problems, off = [], [], {}
    for start in range(self._scale.kills):
      kind = [*KINDS][(index + turn * self._scale.kills + start) % len(KINDS)]
      kills.append(self._kill(name, place(start), here, notes / f'start-{start}', kind, rng))
      if not kills[-1]['sent']:
        break
    else:
      start = self._scale.kills
      with self._start(stage, place(start), here, notes / f'start-{start}') as started:
        started.wait()
        problems = started.problems([0])
    problems += [problem for kill in kills for problem in kill['problems']]
    if not problems:
      problems, off = self._compare(stage, name, here, notes)
    line = {'trial': number, 'stage': name, 'kills': kills, 'problems': problems, **off}
    return line | {'same': not problems}

  def _compare(
    self, stage: Stage, name: str, here: Path, notes: Path
  ) -> tuple[list[str], dict[str, float]]:
    """Say what a trial made otherwise than the undisturbed stage, and how far off the run is."""
    problems, off = stages.damaged(here), {}
    if len(stage.places) > 1:
      off = stages.distances(here, self._base / stage.like)
      problems += [f'{k} differ by {v:.2g}' for k, v in off.items() if v > stages.TOLERANCE[k]]
    else:
      was, now = self.undisturbed(name)['digests'], stages.digests(here)
      other = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
      problems += [f'made something else: {", ".join(other)}'] * bool(other)
    usual = stages.batches(self._out / 'notes' / (stage.like or name))
    taken = stages.batches(notes)
    if usual.keys() != taken.keys() & usual.keys():
      problems.append(f'batches {sorted(usual.keys() - taken.keys())} were not taken')
    wrong = [s for s in usual.keys() & taken.keys() if any(t != usual[s][0] for t in taken[s])]
    return problems + [f'batch {s} was another' for s in wrong], off

  def run(self) -> list[dict[str, Any]]:
    """Run the trials that OUT/trials.jsonl lacks; return the lines of all."""
    write_text(self._base, self._scale.documents)
    for name in dict.fromkeys(self._scale.turns[: self._scale.trials]):
      for place in self._stages[name].places:
        self.undisturbed(name, place)
    record = self._out / 'trials.jsonl'
    texts = record.read_text().splitlines() if record.exists() else []
    lines = {line['trial']: line for line in map(json.loads, texts)}
    with console.Progress('trials', self._scale.trials, 'trial') as bar:
      bar.skip(len(lines))
      for number in range(self._scale.trials):
        if number not in lines:
          lines[number] = self.trial(number)
          texts = [json.dumps(lines[key]) + '\n' for key in sorted(lines)]
          files.write_text(record, ''.join(texts))
          bar.update(1)
    return [lines[number] for number in sorted(lines)]


def table(lines: Sequence[dict[str, Any]]) -> str:
  """Return a table of kills and results by stage."""
  by_stage = collections.defaultdict(list)
  for line in lines:
    by_stage[line['stage']].append(line)
  head = ['stage', 'trials', 'kills', *KINDS, 'inside a save', 'same as undisturbed']
  rows = [head, ['---'] * len(head)]
  for stage, trials in {**by_stage, 'all': lines}.items():
    sent = [kill for line in trials for kill in line['kills'] if kill['sent']]
    kinds = collections.Counter(kill['kind'] for kill in sent)
    saving, same = sum(kill['in_a_save'] for kill in sent), sum(x['same'] for x in trials)
    rows.append([stage, len(trials), len(sent), *(kinds[k] for k in KINDS), saving, same])
  return ''.join(f'| {" | ".join(map(str, row))} |\n' for row in rows)


def main(_: list[str]) -> None:
  """Run the trials and print the table; fail if one made anything else."""
  console.required('out')
  f = flags.FLAGS
  out = Path(f.out)
  lines = Study(SCALES[f.scale], out, f.seed).run()
  files.write_text(out / 'table.md', table(lines))
  print(table(lines), end='')
  if wrong := [line['trial'] for line in lines if not line['same']]:
    raise ValueError(f'{out}/trials.jsonl: trials {wrong} ended otherwise than undisturbed')


if __name__ == '__main__':
  flags.DEFINE_enum('scale', 'smoke', sorted(SCALES), 'How many trials, and of what size.')
  flags.DEFINE_string('out', 'runs/faults', 'Directory of the trials and the table.')
  flags.DEFINE_integer('seed', 0, 'Seed of the moments and signals.', 0)
  console.run(main)
