"""Scores on task files: questions with known answers, scored by likelihood or generation.

A file holds JSON lines, each an item with an `id` and the fields of its kind in KINDS. `type` names
the kind; items with a `question` and a `final` answer are numeric. Contexts and continuations are
joined by a space unless the context ends in white space.
"""

import itertools
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slm.base import console, files
from slm.data import sources
from slm.inference import scoring, verifiers
from slm.runs import processes, rundir
from slm.weights import tree

Item = Mapping[str, Any]
Pair = tuple[str, str]
_GROUP = 8  # batches of requests between two writes of the answers


class Kind(NamedTuple):
  """A kind of item: its fields, its (context, continuation) pairs, and the scores of an answer.

  `score` takes the item and the (log-probability, greedy) of each pair or, where max_tokens is set,
  the text generated after the context; `main` names the score that models are compared by.
  Few-shot examples show the gold pair: item['gold'], or the first.
  """

  fields: Mapping[str, type]
  pairs: Callable[[Item], list[Pair]]
  score: Callable[[Item, Any], dict[str, float]]
  main: str = 'acc'
  max_tokens: int = 0
  until: tuple[str, ...] = ()


def choose(item: Item, answers: Sequence[tuple[float, bool]]) -> dict[str, float]:
  """Score choices: acc, acc_norm by bytes, bits per byte of the gold one; ties go to the first.

  Bytes are those of the choice in the file (acc_bytes of lm-evaluation-harness; OLMES, Gu et al.
  2024, arXiv 2406.08446).
  """
  logprobs = np.array([logprob for logprob, _ in answers])
  sizes = np.array([len(text.strip().encode()) for _, text in KINDS[item['type']].pairs(item)])
  gold = item['gold']
  return {
    'acc': float(logprobs.argmax() == gold),
    'acc_norm': float((logprobs / sizes).argmax() == gold),
    'bpb': float(-logprobs[gold] / sizes[gold] / math.log(2)),
  }


def choose_context(item: Item, answers: Sequence[tuple[float, bool]]) -> dict[str, float]:
  """Score contexts by the same continuation after each (Trinh and Le 2018, arXiv 1806.02847)."""
  return {name: value for name, value in choose(item, answers).items() if name != 'acc_norm'}


def last_word(item: Item, answers: Sequence[tuple[float, bool]]) -> dict[str, float]:
  """Score a continuation: acc (whether it is the greedy one), NLL (nats), bits per byte."""
  logprob, greedy = answers[0]
  size = len(item['continuation'].strip().encode())
  return {'acc': float(greedy), 'nll': -logprob, 'bpb': -logprob / math.log(2) / size}


def short_answer(item: Item, text: str) -> dict[str, float]:
  """Score a generated answer: exact match with the answer or one of its aliases."""
  exact = verifiers.answers.exact(text, item['answer'], item['aliases'])
  return {'exact_match': float(exact)}


def final_number(item: Item, text: str) -> dict[str, float]:
  """Score a generated solution: its last number is the final one (Cobbe et al. 2021, GSM8K).

  verifiers.answers.gsm8k_numeric says how they are compared.
  """
  return {'exact_match': float(verifiers.answers.gsm8k_numeric(text, item['final']))}


def _with_answer(query: str) -> str:
  """Add the line `Answer:` to a query with a `Question:` that does not end in a colon."""
  lacks = re.search(r'^Question:', query, re.MULTILINE) and not query.rstrip().endswith(':')
  return f'{query}\nAnswer:' if lacks else query


KINDS = {
  'mc': Kind(
    {'query': str, 'choices': list, 'gold': int},
    lambda x: [(_with_answer(x['query']), choice) for choice in x['choices']],
    choose,
  ),
  'schema': Kind(
    {'context_options': list, 'continuation': str, 'gold': int},
    lambda x: [(context, x['continuation']) for context in x['context_options']],
    choose_context,
  ),
  'lm': Kind(
    {'context': str, 'continuation': str},
    lambda x: [(x['context'], x['continuation'])],
    last_word,
  ),
  'qa': Kind(
    {'query': str, 'answer': str, 'aliases': list},
    lambda x: [(_with_answer(x['query']), x['answer'])],
    short_answer, 'exact_match', 32, ('\n',),
  ),
  'numeric': Kind(
    {'question': str, 'final': str},
    lambda x: [(f'Question: {x["question"]}\nAnswer:', x.get('answer') or x['final'])],
    final_number, 'exact_match', 256, ('\n\n', 'Question:'),
  ),
}  # fmt: skip


def read(path: str | Path) -> list[dict[str, Any]]:
  """Read a task file, plain, .gz or .zst; every item gets the `type` of its kind.

  Raises:
    ValueError: naming the file and line of an item that is malformed, of another kind than the
      first, or has the id of another.
  """
  items: dict[str, dict[str, Any]] = {}
  for number, line in enumerate(sources.lines(str(path)), 1):
    if not line.strip():
      continue
    where = f'{path}:{number}'
    with files.reading(where, 'valid JSON'):
      item = json.loads(line)
    if not isinstance(item, dict) or not isinstance(item.get('id'), str):
      raise ValueError(f'{where}: expected an object with an id')
    if item.get('type') not in list(KINDS) and {'question', 'final'} <= set(item):
      item['type'] = 'numeric'
    _check(where, item)
    if item['id'] in items:
      raise ValueError(f'{where}: id {item["id"]!r} was used before')
    items[item['id']] = item
    if item['type'] != (first := next(iter(items.values()))['type']):
      raise ValueError(f'{where}: type {item["type"]!r}, the first item has {first!r}')
  if not items:
    raise ValueError(f'{path}: holds no items')
  return list(items.values())


_EXPECTED = {str: 'text', list: 'a list of texts', int: 'a whole number'}


def _check(where: str, item: dict[str, Any]) -> None:
  if item.get('type') not in list(KINDS):
    raise ValueError(f'{where}: type: expected one of {list(KINDS)}, found {item.get("type")!r}')
  for name, kind in KINDS[item['type']].fields.items():
    value = item.get(name)
    texts = value if kind is list else [value] if kind is str else []
    if not isinstance(value, kind) or not all(isinstance(x, str) for x in texts):
      found = repr(value) if name in item else 'none'
      raise ValueError(f'{where}: {name}: expected {_EXPECTED[kind]}, found {found}')
  pairs = KINDS[item['type']].pairs(item)
  if not all(isinstance(text, str) and text.strip() for _, text in pairs):
    raise ValueError(f'{where}: an answer is empty or no text')
  gold = item.get('gold', 0)
  if not isinstance(gold, int) or not 0 <= gold < len(pairs):
    raise ValueError(f'{where}: gold: expected 0 to {len(pairs) - 1}, found {gold!r}')


def joined(pair: Pair) -> Pair:
  """Start the continuation with the white space that ends the context, or with a space."""
  context, continuation = pair
  head = context.rstrip()
  return head, (context[len(head) :] or ' ' * bool(head)) + continuation


def examples(items: Sequence[Item], item: Item, shots: int, seed: int) -> str:
  """Write `shots` other items with their answers: drawn by (seed, id), from `dev` if it suffices.

  Raises:
    ValueError: if there are too few items.
  """
  if not shots:
    return ''
  pool = [x for x in items if x.get('split') == 'dev']
  pool = pool if len(pool) > shots else items
  if len(pool) <= shots:
    raise ValueError(f'shots={shots}: expected fewer than the items of the file, {len(pool)}')
  drawn = random.Random(f'{seed} {item["id"]}').sample(pool, shots + 1)
  others = [x for x in drawn if x['id'] != item['id']][:shots]
  gold = lambda other: KINDS[other['type']].pairs(other)[other.get('gold', 0)]
  return ''.join(''.join(joined(gold(x))) + '\n\n' for x in others)


def answer(
  scorer: scoring.Scorer, items: Sequence[Item], prefixes: Sequence[str], max_tokens: int
) -> list[dict[str, Any]]:
  """Answer items after their prefixes; returns a record of the answers, scores and cost of each.

  `tokens` counts those of contexts and continuations (max_tokens where text is generated);
  `truncated` is whether a context did not fit; `device_seconds` is an equal share of the time.
  """
  kind, began = KINDS[items[0]['type']], time.monotonic()
  requests = [
    [joined((before + context, text)) for context, text in kind.pairs(item)]
    for item, before in zip(items, prefixes, strict=True)
  ]
  room = scorer.context + 1
  if kind.max_tokens:
    prompts = [scorer.encode(pairs[0][0]) for pairs in requests]
    answers = scoring.continuations(scorer, prompts, max_tokens, kind.until)
    sizes = [[len(p) + max_tokens] for p in prompts]
    room = scorer.context
  else:
    ids = [[scorer.pair(*pair) for pair in pairs] for pairs in requests]
    flat = iter(scoring.loglikelihoods(scorer, list(itertools.chain(*ids))))
    answers = [list(itertools.islice(flat, len(pairs))) for pairs in ids]
    sizes = [[len(a) + len(b) for a, b in pairs] for pairs in ids]
  share = (time.monotonic() - began) * jax.device_count() / len(items)
  return [
    {
      'id': item['id'],
      'answer': given,
      'tokens': sum(lengths),
      'truncated': max(lengths) > room,
      'scores': kind.score(item, given),
      'device_seconds': share,
    }
    for item, given, lengths in zip(items, answers, sizes, strict=True)
  ]


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Average each score over items; the standard error is sqrt(variance / n).

  For scores of 0 and 1 that is sqrt(p (1 - p) / (n - 1)). An NLL adds ppl, its exponential.
  """
  result: dict[str, float] = {'n': len(records)}
  for name in records[0]['scores']:
    values = np.array([r['scores'][name] for r in records])
    result[name] = float(values.mean())
    if len(values) > 1:
      result[f'{name}_stderr'] = float(values.std(ddof=1) / math.sqrt(len(values)))
  if 'nll' in result:
    result['ppl'] = math.exp(result['nll'])
    if 'nll_stderr' in result:
      result['ppl_stderr'] = result['ppl'] * result['nll_stderr']
  totals = ('tokens', 'truncated', 'device_seconds')
  return result | {name: sum(r[name] for r in records) for name in totals}


def evaluate(scorer: scoring.Scorer, items: Sequence[Item]) -> dict[str, float]:
  """Return the summary of items; its 'score' is the main one of their kind."""
  kind = KINDS[items[0]['type']]
  max_tokens = min(kind.max_tokens, scorer.context // 2)
  result = summary(answer(scorer, items, [''] * len(items), max_tokens))
  return result | {'score': result[kind.main]}


def run(
  ref: str | Path, paths: Sequence[str], mesh: jax.sharding.Mesh, batch_size: int, *,
  data: str = '', shots: int = 0, seed: int = 0, limit: int = 0, split: str = '',
) -> dict[str, dict[str, float]]:  # fmt: skip
  """Evaluate a run on task files; returns a summary by task.

  RUN/tasks/TASK.jsonl has a line per item; a second call continues it, or replaces it if the
  checkpoint, the file or the settings have changed. RUN/tasks.json holds the summaries. `split` and
  `limit` (items from the first; 0 is all) choose items.

  Raises:
    ValueError: if two files have one name, an option does not fit, or another process writes there.
  """
  names = [Path(path).name.partition('.')[0] + f'-{shots}shot' * bool(shots) for path in paths]
  if len(set(names)) < len(names):
    raise ValueError(f'--task: two files have one name: {sorted(names)}')
  if min(shots, limit) < 0:
    raise ValueError(f'--shots={shots}, --limit={limit}: expected at least 0')
  items_by_name = {name: read(path) for name, path in zip(names, paths, strict=True)}
  folder = rundir.evaluations(ref, 'tasks')
  scorer = scoring.open_model(ref, mesh, batch_size, data=data)
  record, weights = folder.with_suffix('.json'), tree.weights_hash(scorer.params)
  with processes.hold(folder.parent, folder.name):
    results = files.read_json(record) if record.exists() else {}
    for (name, items), path in zip(items_by_name.items(), paths, strict=True):
      chosen = [x for x in items if split in ('', x.get('split'))][: limit or None]
      if not chosen:
        raise ValueError(f'{path}: no item has split {split!r}')
      settings = {
        'sha256': files.sha256(Path(path)), 'step': scorer.step, 'weights': weights,
        'context': scorer.context, 'shots': shots, 'seed': seed * bool(shots),
        'max_tokens': min(KINDS[items[0]['type']].max_tokens, scorer.context // 2),
      }  # fmt: skip
      records = _records(scorer, folder / f'{name}.jsonl', items, chosen, settings)
      settings |= {'type': items[0]['type'], 'split': split, 'limit': limit}
      results[name] = summary([records[x['id']] for x in chosen]) | settings
      if not jax.process_index():
        files.write_json(record, results)
  return {name: results[name] for name in names}


def _records(
  scorer: scoring.Scorer, path: Path, items: Sequence[Item], chosen: Sequence[Item],
  settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:  # fmt: skip
  """Return the chosen items' records by id; those that the file lacks are appended to it."""
  records = _resume(path, settings)
  todo = [x for x in chosen if x['id'] not in records]
  prefixes = {x['id']: examples(items, x, settings['shots'], settings['seed']) for x in todo}
  pairs = lambda x: KINDS[x['type']].pairs(x)
  length = lambda x: len(prefixes[x['id']]) + max(len(a) + len(b) for a, b in pairs(x))
  todo.sort(key=length, reverse=True)  # items of similar length share a batch: little padding
  size = max(_GROUP * scorer.batch_size // max(len(pairs(x)) for x in chosen), 1)
  with console.Progress(path.stem, len(chosen), 'items', not jax.process_index()) as progress:
    progress.skip(len(chosen) - len(todo))
    for i in range(0, len(todo), size):
      group = todo[i : i + size]
      before = [prefixes[x['id']] for x in group]
      answered = answer(scorer, group, before, settings['max_tokens'])
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
  changed = [k for k in settings if before.get(k) != settings[k]]
  if before and changed:
    changes = ', '.join(f'{k} was {before.get(k)}, now {settings[k]}' for k in changed)
    print(f'{path}: evaluated again, as {changes}', file=sys.stderr)
  if changed:
    lines, records = [json.dumps(settings)], []
  if (changed or rest) and not jax.process_index():
    files.write_text(path, '\n'.join(lines) + '\n')
  return {r['id']: r for r in records}


def line(result: Mapping[str, Any]) -> str:
  """Format the scores of a summary with their standard errors."""
  names = dict.fromkeys([*(kind.main for kind in KINDS.values()), 'acc_norm', 'ppl', 'bpb'])
  error = lambda name: f' ± {result[name]:.2g}' if name in result else ''  # none of a single item
  return '  '.join(f'{k} {result[k]:.4g}{error(f"{k}_stderr")}' for k in names if k in result)
