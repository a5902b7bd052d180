"""Scores on task files: questions with known answers, scored by likelihood or generation.

A Task says how the items of a file are asked: examples, chat, template; their kind says the rest.
Contexts and continuations are joined by a space unless the context ends in white space, and in a
chat not at all: the continuation is the model's answer.
"""

import collections
import dataclasses
import itertools
import json
import math
import random
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from slm.base import console, files
from slm.data import chat, conversations, tokenizer
from slm.inference import scoring
from slm.inference.kinds import KINDS, Item, Kind, Pair, read
from slm.reporting import scores
from slm.runs import processes, rundir
from slm.weights import tree

_GROUP = 8  # batches of requests between two writes of the answers


@dataclasses.dataclass(frozen=True)
class Task:
  """A file of items, and how they are asked and scored; empty values are those of the kind."""

  name: str
  file: str
  kind: str = ''  # of KINDS, where items can be asked in several ways
  split: str = ''  # the items asked; '' is all
  shots: int = 0
  shots_from: str = ''  # split of the file, or another file, whose first items are the examples;
  # '' draws other items of the file for each
  seed: int = 0  # of that draw
  chat: bool = False  # by the model's chat template
  turns: bool = False  # each example is a turn of the conversation; else all are in the message
  template: str = '{}'  # of the question, which replaces {}
  phrase: str = ''  # asked for by the template, after which the answer stands
  metric: str = ''
  until: tuple[str, ...] = ()
  max_tokens: int = 0
  group: str = ''  # field: scores are averaged over its values, and examples have the same value
  form_of: str = ''  # the evaluation of which this is one form; the better form counts
  limit: int = 0  # items used, from the first; 0 is all
  samples: int = 0  # answers drawn to each item: scores are their means, and pass@k; 0: one, greedy
  temperature: float = 1.0  # of these draws
  ended: bool = False  # whether an answer that is cut at max_tokens counts 0, as in training

  @property
  def evaluation(self) -> str:
    """Return the name of the evaluation that this task is, or is a form of."""
    return self.form_of or self.name


def joined(pair: Pair) -> Pair:
  """Start the continuation with the white space that ends the context, or with a space."""
  context, continuation = pair
  head = context.rstrip()
  return head, (context[len(head) :] or ' ' * bool(head)) + continuation


def drawn(items: Sequence[Item], item: Item, shots: int, seed: int) -> list[Item]:
  """Draw `shots` other items by (seed, id), from `dev` if it suffices.

  Raises:
    ValueError: if there are too few items.
  """
  if not shots:
    return []
  pool = [x for x in items if x.get('split') == 'dev']
  pool = pool if len(pool) > shots else items
  if len(pool) <= shots:
    raise ValueError(f'shots={shots}: expected fewer than the items of the file, {len(pool)}')
  found = random.Random(f'{seed} {item["id"]}').sample(pool, shots + 1)
  return [x for x in found if x['id'] != item['id']][:shots]


def first(task: Task, pool: Sequence[Item], item: Item) -> list[Item]:
  """Return the first task.shots items of a pool, others than item, of its group.

  Raises:
    ValueError: if there are too few.
  """
  same = lambda x: not task.group or x.get(task.group) == item.get(task.group)
  found = list(itertools.islice((x for x in pool if x['id'] != item['id'] and same(x)), task.shots))
  if len(found) < task.shots:
    raise ValueError(
      f'{task.name}: expected {task.shots} examples for {item["id"]} from {task.shots_from!r}, '
      f'found {len(found)}'
    )
  return found


def ask(task: Task, item: Item, shown: Sequence[Item], tok: tokenizer.Tokenizer) -> list[Pair]:
  """Write the (context, continuation) pairs of an item after examples, as they are encoded.

  Raises:
    ValueError: if a chat is asked for and there is no template, or it refuses the messages.
  """
  fill = lambda pair: (task.template.replace('{}', pair[0]), pair[1])
  gold = lambda x: fill(KINDS[x['type']].pairs(x)[x.get('gold', 0)])
  pairs = [fill(pair) for pair in KINDS[item['type']].pairs(item)]
  written = ''.join(''.join(joined(gold(x))) + '\n\n' for x in shown)
  if not task.chat:
    return [joined((written + context, text)) for context, text in pairs]
  if not tok.chat_template:
    raise ValueError(f'{task.name}: is asked as a chat, and the tokenizer holds no chat template')
  history = [m for x in shown for m in zip(('user', 'assistant'), gold(x), strict=True)]
  history, written = (history, '') if task.turns else ([], written)

  def render(context: str) -> str:
    talk = [*history, *conversations.dialogue(written + context)]
    messages = [{'role': role, 'content': content.strip()} for role, content in talk]
    special = chat.variables(tok)
    return chat.render(messages, tok.chat_template, add_generation_prompt=True, **special)

  return [(render(context), text.strip()) for context, text in pairs]


def answer(
  scorer: scoring.Scorer, items: Sequence[Item], shown: Sequence[Sequence[Item]], task: Task,
  max_tokens: int,
) -> list[dict[str, Any]]:  # fmt: skip
  """Answer items after their examples; returns a record of the answers, scores and cost of each.

  `tokens` counts those of contexts and continuations (max_tokens where text is generated);
  `truncated` is whether a context did not fit; `device_seconds` is an equal share of the time.
  `ended` is the share of generated answers that end before max_tokens.
  """
  kind, began = KINDS[items[0]['type']], time.monotonic()
  requests = [ask(task, x, before, scorer.tok) for x, before in zip(items, shown, strict=True)]
  room = scorer.context + 1
  if kind.max_tokens:
    prompts = [scorer.encode(pairs[0][0], task.chat) for pairs in requests]
    drawn = [p for p in prompts for _ in range(task.samples or 1)]
    how = {'temperature': task.temperature, 'seed': _seed(items)} if task.samples else {}
    until = task.until or kind.until
    flat = iter(scoring.completions(scorer, drawn, max_tokens, until, **how))
    answers = [list(itertools.islice(flat, task.samples or 1)) for _ in prompts]
    sizes = [[len(p) + max_tokens] for p in prompts]
    room = scorer.context
  else:
    ids = [[scorer.pair(*pair, task.chat) for pair in pairs] for pairs in requests]
    flat = iter(scoring.loglikelihoods(scorer, list(itertools.chain(*ids))))
    answers = [list(itertools.islice(flat, len(pairs))) for pairs in ids]
    sizes = [[len(a) + len(b) for a, b in pairs] for pairs in ids]
  share = (time.monotonic() - began) * jax.device_count() / len(items)
  return [
    {
      'id': item['id'],
      'tokens': sum(lengths) * (task.samples or 1),
      'truncated': max(lengths) > room,
      'device_seconds': share,
    }
    | (_graded(task, kind, item, given) if kind.max_tokens else _scored(kind, item, given))
    | ({'parts': kind.parts(item)} if kind.parts else {})
    | ({'group': str(item.get(task.group))} if task.group else {})
    for item, given, lengths in zip(items, answers, sizes, strict=True)
  ]


def _seed(items: Sequence[Item]) -> int:
  """Return a seed for the draws of answers to items."""
  return zlib.crc32(''.join(item['id'] for item in items).encode())


def _scored(kind: Kind, item: Item, given: Sequence[tuple[float, bool]]) -> dict[str, Any]:
  return {'answer': given, 'scores': kind.score(item, given)}


def _graded(
  task: Task, kind: Kind, item: Item, given: Sequence[tuple[str, bool]]
) -> dict[str, Any]:
  """Return the texts of generated answers, their scores, and by which rule one was found."""
  texts, ended = zip(*given, strict=True)
  counts = [end or not task.ended for end in ended]
  found = [
    {name: value * counted for name, value in kind.score(item, text).items()}
    for text, counted in zip(texts, counts, strict=True)
  ]
  record: dict[str, Any] = {'answer': texts[0], 'scores': found[0]}
  record['ended'] = sum(ended) / len(ended)
  if kind.rule:
    record['rule'] = kind.rule(item, texts[0])
  if task.samples:
    passing = sum(scores[task.metric or kind.main] >= 1 for scores in found)
    means = {name: sum(x[name] for x in found) / len(found) for name in found[0]}
    record |= {'answer': list(texts), 'scores': means | passes(len(found), passing)}
  return record


def passes(drawn: int, passing: int) -> dict[str, float]:
  """Estimate, from how many of the answers drawn to an item pass, whether one of k does: pass@k.

  It is 1 - C(drawn - passing, k) / C(drawn, k), for k = 1, 2, 4, ... up to `drawn`, which is
  unbiased (Chen et al. 2021, arXiv 2107.03374).
  """
  sizes = [1 << i for i in range(drawn.bit_length())]
  return {f'pass@{k}': 1 - math.comb(drawn - passing, k) / math.comb(drawn, k) for k in sizes}


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Average each score (scores.estimate), with its standard error where there is one.

  An NLL adds ppl, its exponential; `rules` counts by which rule answers were found.
  """
  result: dict[str, Any] = {'n': len(records)}
  for name in records[0]['scores']:
    result[name], error = scores.estimate(*scores.columns(records, name))
    if error is not None:
      result[f'{name}_stderr'] = error
  if 'nll' in result:
    result['ppl'] = math.exp(result['nll'])
    if 'nll_stderr' in result:
      result['ppl_stderr'] = result['ppl'] * result['nll_stderr']
  if 'rule' in records[0]:
    result['rules'] = dict(collections.Counter(r['rule'] for r in records).most_common())
  totals = ('tokens', 'truncated', 'device_seconds')
  return result | {name: sum(r[name] for r in records) for name in totals}


def evaluate(scorer: scoring.Scorer, items: Sequence[Item]) -> dict[str, float]:
  """Return the summary of items; its 'score' is the main one of their kind."""
  kind = KINDS[items[0]['type']]
  max_tokens = min(kind.max_tokens, scorer.context // 2)
  result = summary(answer(scorer, items, [()] * len(items), Task('', ''), max_tokens))
  return result | {'score': result[kind.main]}


def run(
  ref: str | Path, paths: Sequence[str], mesh: jax.sharding.Mesh, batch_size: int, *,
  data: str = '', shots: int = 0, seed: int = 0, limit: int = 0, split: str = '',
) -> dict[str, dict[str, Any]]:  # fmt: skip
  """Evaluate a run on task files as `perform` does; the examples are drawn by `seed`.

  Raises:
    ValueError: if two files have one name, an option does not fit, or another process writes there.
  """
  names = [Path(path).name.partition('.')[0] + f'-{shots}shot' * bool(shots) for path in paths]
  if len(set(names)) < len(names):
    raise ValueError(f'--task: two files have one name: {sorted(names)}')
  if min(shots, limit) < 0:
    raise ValueError(f'--shots={shots}, --limit={limit}: expected at least 0')
  options = {'shots': shots, 'seed': seed * bool(shots), 'limit': limit, 'split': split}
  named = [Task(name, path, **options) for name, path in zip(names, paths, strict=True)]
  return perform(ref, named, mesh, batch_size, data=data)


def perform(
  ref: str | Path, tasks: Sequence[Task], mesh: jax.sharding.Mesh, batch_size: int, *,
  data: str = '', context: int = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
  """Evaluate a run on tasks; returns a summary by task.

  `context` is the most tokens that are read at a time; 0: what the run was trained with.

  RUN/tasks/TASK.jsonl has a line per item; a second call continues it, or replaces it if the
  checkpoint, the file or the settings have changed. RUN/tasks.json holds the summaries.

  Raises:
    ValueError: if a task does not fit its file or the model, or another process writes there.
  """
  pools = [_items(task) for task in tasks]
  folder = rundir.evaluations(ref, 'tasks')
  scorer = scoring.open_model(ref, mesh, batch_size, data=data, context=context)
  record, weights = folder.with_suffix('.json'), tree.weights_hash(scorer.params)
  with processes.hold(folder.parent, folder.name):
    results = files.read_json(record) if record.exists() else {}
    for task, (items, pool) in zip(tasks, pools, strict=True):
      chosen = choice(task, items)
      facts = {'step': scorer.step, 'weights': weights, 'context': scorer.context}
      settings = _settings(task, items[0]['type'], scorer) | facts
      records = _records(scorer, folder / f'{task.name}.jsonl', task, pool, chosen, settings)
      settings |= {'type': items[0]['type'], 'split': task.split, 'limit': task.limit}
      settings |= {'main': task.metric or KINDS[items[0]['type']].main}
      settings |= {'of': len(choice(dataclasses.replace(task, limit=0), items))}
      results[task.name] = summary([records[x['id']] for x in chosen]) | settings
      if not jax.process_index():
        files.write_json(record, results)
  return {task.name: results[task.name] for task in tasks}


def _items(task: Task) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Read the items of a task, and those from which its examples are taken."""
  items = read(task.file, task.kind)
  for item in items if task.phrase else ():
    item['phrase'] = task.phrase
  if task.samples and not (KINDS[items[0]['type']].max_tokens and task.temperature > 0):
    raise ValueError(
      f'{task.file}: samples={task.samples}, temperature={task.temperature:g}: expected items that '
      'are answered by generated text, and a temperature above 0'
    )
  if task.shots and not KINDS[items[0]['type']].answered:
    raise ValueError(f'{task.file}: shots={task.shots}: its items hold no answer to show')
  if not choice(task, items):
    raise ValueError(f'{task.file}: no item has split {task.split!r}')
  if not task.shots_from:
    return items, items
  if not _in_file(task.shots_from):
    return items, [x for x in items if x.get('split') == task.shots_from]
  return items, read(task.shots_from, task.kind)


def _in_file(shots_from: str) -> bool:
  return '.' in shots_from


def choice(task: Task, items: Sequence[Item]) -> list[Item]:
  """Return the items that are asked; a limit takes as many of each group as it can."""
  found = [x for x in items if task.split in ('', x.get('split'))]
  if task.limit and task.group:
    seen = collections.Counter()
    turn = {}
    for item in found:
      turn[item['id']] = seen[item.get(task.group)]
      seen[item.get(task.group)] += 1
    found.sort(key=lambda x: turn[x['id']])
  return found[: task.limit or None]


def _settings(task: Task, kind: str, scorer: scoring.Scorer) -> dict[str, Any]:
  """Return what answers depend on beside the weights; the rarer ones only where they are set."""
  most = min(task.max_tokens or KINDS[kind].max_tokens, scorer.context // 2)
  settings = {
    'sha256': files.sha256(Path(task.file)), 'shots': task.shots, 'seed': task.seed,
    'max_tokens': most if KINDS[kind].max_tokens else 0,
  }  # fmt: skip
  rare = (
    'kind', 'shots_from', 'chat', 'turns', 'template', 'phrase', 'until', 'group', 'samples',
    'temperature', 'ended',
  )  # fmt: skip
  default = Task('', '')
  changed = {k: getattr(task, k) for k in rare if getattr(task, k) != getattr(default, k)}
  if _in_file(task.shots_from):
    changed['shots_from'] = files.sha256(Path(task.shots_from))
  if task.chat:
    changed['chat_template'] = scorer.tok.chat_template
  return settings | json.loads(json.dumps(changed))


def _records(
  scorer: scoring.Scorer, path: Path, task: Task, pool: Sequence[Item], chosen: Sequence[Item],
  settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:  # fmt: skip
  """Return the chosen items' records by id; those that the file lacks are appended to it."""
  records = _resume(path, settings)
  todo = [x for x in chosen if x['id'] not in records]
  draw = lambda x: (
    first(task, pool, x) if task.shots_from else drawn(pool, x, task.shots, task.seed)
  )
  shown = {x['id']: draw(x) for x in todo}
  pairs = lambda x: KINDS[x['type']].pairs(x)
  longest = lambda x: max(len(a) + len(b) for a, b in pairs(x))
  length = lambda x: longest(x) + sum(map(longest, shown[x['id']]))
  todo.sort(key=length, reverse=True)  # items of similar length share a batch: little padding
  requests = max(max(len(pairs(x)) for x in chosen), task.samples)
  size = max(_GROUP * scorer.batch_size // requests, 1)
  with console.Progress(path.stem, len(chosen), 'items', not jax.process_index()) as progress:
    progress.skip(len(chosen) - len(todo))
    for i in range(0, len(todo), size):
      group = todo[i : i + size]
      before = [shown[x['id']] for x in group]
      answered = answer(scorer, group, before, task, settings['max_tokens'])
      records |= {r['id']: r for r in answered}
      if not jax.process_index():
        with path.open('a') as f:
          f.write(''.join(json.dumps(r) + '\n' for r in answered))
      progress.update(len(group))
  return records


def _resume(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Read the records of a file, up to a line cut short; on other settings start the file anew."""
  text = path.read_text() if path.exists() else ''
  *lines, rest = text.split('\n')
  try:
    before, *records = [json.loads(line) for line in lines] or [{}]
  except ValueError as e:
    raise ValueError(f'{path}: damaged ({e}); remove it to start again') from None
  changed = [k for k in settings | before if before.get(k) != settings.get(k)]
  if before and changed:
    changes = ', '.join(f'{k} was {before.get(k)}, now {settings.get(k)}' for k in changed)
    print(f'{path}: evaluated again, as {changes}', file=sys.stderr)
  if changed:
    lines, records = [json.dumps(settings)], []
  if (changed or rest) and not jax.process_index():
    files.write_text(path, '\n'.join(lines) + '\n')
  return {r['id']: r for r in records}


def line(result: Mapping[str, Any]) -> str:
  """Format the scores of a summary with their standard errors, and the rules that found answers."""
  names = dict.fromkeys([*(kind.main for kind in KINDS.values()), 'acc_norm', 'ppl', 'bpb'])
  names |= dict.fromkeys(('strict', 'loose_parts', 'strict_parts'))
  error = lambda name: f' ± {result[name]:.2g}' if name in result else ''  # none of a single item
  text = '  '.join(f'{k} {result[k]:.4g}{error(f"{k}_stderr")}' for k in names if k in result)
  rules = ', '.join(f'{rule} {count}' for rule, count in result.get('rules', {}).items())
  return text + f'  found by: {rules}' * bool(rules)
