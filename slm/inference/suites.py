"""Suites: tables of tasks over one directory of task files, and the seal of those kept unseen."""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from slm.base import files
from slm.inference import scoring
from slm.inference import tasks as tasks_lib
from slm.inference.tasks import Task
from slm.reporting.tables import Table
from slm.runs import processes, rundir
from slm.weights import tree

_PHRASE = 'Therefore, the answer is'
_REASON = f'{{}}\n\nReason in a few sentences, then end with "{_PHRASE} (X)", X being the letter.'
_UNSEEN = 'My final choice is'
_DECIDE = f'{{}}\n\nThink it over and write as the last line: {_UNSEEN}: LETTER'
_SOLVE = 'Solve this problem step by step. The last number you write must be the result.\n\n{}'


def _both(name: str, **how: Any) -> list[Task]:
  """Return the cloze and the letter form of a multiple-choice file after five examples."""
  how = {'split': 'test', 'shots': 5, 'shots_from': 'dev', 'form_of': name, **how}
  path = f'eval/{name}.jsonl*'
  return [
    Task(f'{name}-cloze', path, 'mc', metric='acc_norm', **how),
    Task(f'{name}-letter', path, 'letter', **how),
  ]


def _one(name: str, metric: str = 'acc') -> Task:
  how = {'split': 'test', 'shots': 5, 'shots_from': 'dev', 'metric': metric}
  return Task(name, f'eval/{name}.jsonl*', **how)


# Lambert et al. 2024 (arXiv 2411.15124), table 24, as far as there are files: MMLU, GSM8K and
# IFEval as there, TriviaQA in the place of PopQA, and preference pairs.
_TULU_DEV = [
  Task(
    'mmlu', 'eval/mmlu.jsonl*', 'reasoned', split='test', chat=True, template=_REASON,
    phrase=_PHRASE, group='subject',
  ),
  Task(
    'triviaqa', 'eval/triviaqa.jsonl*', split='test', shots=15, shots_from='dev', chat=True,
    turns=True,
  ),
  Task(
    'gsm8k', 'posttrain/gsm8k_test.jsonl*', 'solution', shots=8,
    shots_from='posttrain/gsm8k_train.jsonl*', chat=True, turns=True,
  ),
  Task('ifeval', 'posttrain/ifeval.jsonl*', chat=True),
  Task('preference', 'posttrain/pref_test.jsonl*', chat=True),
]  # fmt: skip
# Prompts of another design than those of tulu_dev, on other files.
_TULU_UNSEEN = [
  Task('svamp', 'posttrain/svamp_test.jsonl*', 'solution', chat=True, template=_SOLVE),
  *(
    Task(
      name, f'eval/{name}.jsonl*', 'reasoned', split='test', chat=True, template=_DECIDE,
      phrase=_UNSEEN,
    )
    for name in ('openbookqa', 'commonsense_qa', 'strategyqa')
  ),
]  # fmt: skip
# Gu et al. 2024 (arXiv 2406.08446): five examples, the better of cloze and letters. Cloze scores
# are by bytes throughout, and examples are items of `dev`.
_OLMES_SMALL = [
  *_both('arc_easy'),
  *_both('arc_challenge'),
  _one('boolq'),
  _one('commonsense_qa'),
  *_both('hellaswag'),
  *_both('mmlu', shots_from='fewshot', group='subject'),
  *_both('openbookqa'),
  *_both('piqa'),
  _one('social_iqa'),
  _one('winogrande'),
]
SUITES: dict[str, list[Task]] = {
  'tulu_dev': _TULU_DEV,
  'tulu_unseen': _TULU_UNSEEN,
  'olmes_small': _OLMES_SMALL,
}
SEALED = ('tulu_unseen',)


def load(name: str, directory: str, limit: int = 0) -> list[Task]:
  """Return the tasks of a suite with their files found in a directory, named SUITE.TASK.

  Raises:
    ValueError: if there is no such suite, the limit is negative, or a file is missing.
  """
  if name not in SUITES:
    raise ValueError(f'--suite: expected one of {list(SUITES)}, found {name!r}')
  if limit < 0:
    raise ValueError(f'--limit={limit}: expected at least 0')

  def find(pattern: str) -> str:
    found = sorted(Path(directory or '.').glob(pattern))
    if len(found) != 1:
      raise ValueError(
        f'--tasks={directory}: expected one file {pattern} for the suite {name}, found {len(found)}'
      )
    return str(found[0])

  def resolve(task: Task) -> Task:
    source = task.shots_from
    changes = {'shots_from': find(source)} if '.' in source else {}
    form_of = f'{name}.{task.form_of}' if task.form_of else ''
    changes |= {'name': f'{name}.{task.name}', 'file': find(task.file), 'form_of': form_of}
    return dataclasses.replace(task, limit=limit, **changes)

  return [resolve(task) for task in SUITES[name]]


def headline(tasks: Sequence[Task], results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  """Return the score of each evaluation, the better of its forms; the headline is their mean."""
  scores: dict[str, float] = {}
  for task in tasks:
    value = results[task.name][results[task.name]['main']]
    scores[task.evaluation] = max(value, scores.get(task.evaluation, value))
  return scores


def mean(scores: Mapping[str, float]) -> float:
  """Return the unweighted mean over evaluations."""
  return sum(scores.values()) / len(scores)


def table(tasks: Sequence[Task], results: Mapping[str, Mapping[str, Any]]) -> Table:
  """Build a row per task: the items, how they were asked, the scores."""
  head = ['task', 'items', 'shots', 'chat', 'counts', 'scores ± standard error']
  rows = []
  for task in tasks:
    r = results[task.name]
    n = f'{r["n"]:,}' if r['n'] == r['of'] else f'{r["n"]:,} of {r["of"]:,}'
    chat = ('turns' if task.turns else 'yes') if task.chat else 'no'
    rows.append([task.name, n, str(task.shots), chat, r['main'], tasks_lib.line(r)])
  return head, rows


def run(
  ref: str, name: str, directory: str, mesh: jax.sharding.Mesh, batch_size: int, *,
  data: str = '', limit: int = 0, again: str = '',
) -> tuple[list[Task], dict[str, dict[str, Any]]]:  # fmt: skip
  """Evaluate a run on a suite; returns its tasks and their summaries.

  RUN/suites.json keeps the score of each evaluation. A sealed suite needs RUN/frozen.json, runs
  once, and every start and end of it is a line of RUN/sealed.jsonl; one that was stopped goes on.

  Raises:
    ValueError: if a sealed suite is not frozen, what was frozen has changed, or it has run before
      and no reason is given to run it again.
  """
  tasks = load(name, directory, limit)
  path = rundir.split_ref(ref)[0]
  if name in SEALED:
    _open_seal(ref, name, tasks, mesh, data, again)
  results = tasks_lib.perform(ref, tasks, mesh, batch_size, data=data)
  scores = headline(tasks, results)
  if not jax.process_index():
    with processes.hold(path, 'suites'):
      record = rundir.evaluations(ref, 'suites').with_suffix('.json')
      kept = files.read_json(record) if record.exists() else {}
      kept[name] = {'mean': mean(scores), 'scores': scores, 'limit': limit}
      files.write_json(record, kept)
    if name in SEALED:
      _log(path, {'event': 'done', 'suite': name, 'limit': limit, 'mean': mean(scores)})
  return tasks, results


def freeze(
  ref: str, name: str, directory: str, mesh: jax.sharding.Mesh, *, data: str = '', again: str = ''
) -> str:
  """Record in RUN/frozen.json what a sealed suite will be run on; returns the hash of all of it.

  Raises:
    ValueError: if the suite is not sealed, or has run before and no reason is given.
  """
  if name not in SEALED:
    raise ValueError(f'--freeze: expected a sealed suite, one of {list(SEALED)}, found {name!r}')
  path = rundir.split_ref(ref)[0]
  _refuse_second(path, name, again)
  facts = _facts(ref, load(name, directory), mesh, data)
  with processes.hold(path, 'sealed'):
    record = path / 'frozen.json'
    frozen = files.read_json(record) if record.exists() else {}
    files.write_json(record, frozen | {name: facts})
    _log(path, {'event': 'frozen', 'suite': name, 'hash': facts['hash'], 'again': again})
  return facts['hash']


def _facts(ref: str, tasks: Sequence[Task], mesh: jax.sharding.Mesh, data: str) -> dict[str, Any]:
  """Hash the config, the weights, the template and the suite with its files."""
  scorer = scoring.open_model(ref, mesh, 1, data=data)
  sha256 = lambda text: hashlib.sha256(text.encode()).hexdigest()
  asked = [
    dataclasses.asdict(dataclasses.replace(task, limit=0, file='', shots_from=''))
    | {'files': [files.sha256(Path(x)) for x in (task.file, task.shots_from) if '.' in x]}
    for task in tasks
  ]
  facts = {
    'config': files.sha256(rundir.split_ref(ref)[0] / 'config.json'),
    'step': scorer.step,
    'weights': tree.weights_hash(scorer.params),
    'tokenizer': sha256(f'{scorer.tok.fingerprint} {scorer.tok.chat_template}'),
    'suite': sha256(json.dumps(asked, sort_keys=True)),
  }
  return facts | {'hash': sha256(json.dumps(facts, sort_keys=True))}


def _open_seal(
  ref: str, name: str, tasks: Sequence[Task], mesh: jax.sharding.Mesh, data: str, again: str
) -> None:
  """Log the start of a sealed suite, or refuse it."""
  path = rundir.split_ref(ref)[0]
  record = path / 'frozen.json'
  frozen = (files.read_json(record) if record.exists() else {}).get(name)
  if not frozen:
    raise ValueError(
      f'{path}: the suite {name} is sealed: decide for the model first, with --suite={name} '
      '--freeze; then it runs once'
    )
  facts = _facts(ref, tasks, mesh, data)
  if changed := [key for key in facts if facts[key] != frozen.get(key) and key != 'hash']:
    raise ValueError(
      f'{path}: the suite {name} was frozen with another {", ".join(changed)}: evaluate what was '
      'frozen'
    )
  limit = tasks[0].limit
  events = [e for e in _events(path) if e['suite'] == name and e['event'] != 'frozen']
  stopped = events and events[-1]['event'] == 'begun'
  goes_on = stopped and (events[-1]['hash'], events[-1]['limit']) == (facts['hash'], limit)
  if not goes_on:
    _refuse_second(path, name, again)
  if not jax.process_index():
    event = {'event': 'begun', 'suite': name, 'hash': facts['hash'], 'limit': limit}
    _log(path, event | {'again': again, 'continues': bool(goes_on)})


def _refuse_second(path: Path, name: str, again: str) -> None:
  times = [e['time'] for e in _events(path) if e['suite'] == name and e['event'] == 'begun']
  if times and not again:
    raise ValueError(
      f'{path}: the suite {name} is sealed and was run at {times[-1]}: a final model is run once; '
      '--again=REASON runs it again and is logged'
    )


def _events(path: Path) -> list[dict[str, Any]]:
  """Read the log of sealed suites, without a last line that was cut short."""
  log = path / 'sealed.jsonl'
  *lines, _ = (log.read_text() if log.exists() else '').split('\n')
  with files.reading(log, 'valid JSON lines'):
    return [json.loads(line) for line in lines]


def _log(path: Path, event: dict[str, Any]) -> None:
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  lines = [json.dumps(e) for e in [*_events(path), {'time': now, **event}]]
  files.write_text(path / 'sealed.jsonl', '\n'.join(lines) + '\n')
