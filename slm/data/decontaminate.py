r"""Find evaluation items in training text, report them, and drop the sets or rows that hold them.

  python -m slm.data.decontaminate --train='chat/*.jsonl.gz' --eval=mmlu=mmlu.jsonl --out=DIR
  python -m slm.data.decontaminate --train=web=web/*.jsonl.zst:text,sft.jsonl:prompt+response \
    --eval=gsm8k=gsm8k_test.jsonl:question --eval=drop=drop.jsonl:passage+question \
    --locked=gsm8k --mask_numbers --action=drop-rows --out=DIR

An item is overlapped if more than half of its tokens lie in runs of 8 or more that stand in one
training document (slm/data/overlap.py). An item under 8 tokens has to equal a whole document, and
is counted apart. An evaluation is contaminated if more than 2 % of its items are either.

--train and --eval take [NAME=]GLOB[:FIELD+FIELD], of JSON lines or text, plain, .gz or .zst. The
files of a NAME are one set; without it every file is one. Every field of a training row is a
document, and so is every turn of a list of messages. Without FIELD it is the first that a row has
of messages, prompt, question, query, instruction, problem, context, context_options, text.

DIR/report.md and report.json have the counts, DIR/hits/*.jsonl every match with its spans.
--action=drop-rows also writes the training files without the rows that match, into DIR/clean;
--action=drop-set the names of the contaminated sets into DIR/dropped.txt, and the files of the
others into DIR/kept.txt. The exit status is 1 if an evaluation that --locked names is contaminated
by the training files as they are. Started again, it continues by file; another --action reads
nothing again.
"""

import dataclasses
import hashlib
import heapq
import importlib.util
import json
import os
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from slm.base import arguments, artifact, console, files
from slm.data import contamination, overlap, sources, tfds, work
from slm.data.contamination import Item, Source
from slm.data.settings import RUNNERS

Path = pathlib.Path
LIMIT = 0.02  # share of an evaluation's items above which it is contaminated
ACTIONS = ('report', 'drop-set', 'drop-rows')
_SPEC = re.compile(r'(?:([\w.-]+)=)?(.+?)(?::([\w-]+(?:\+[\w-]+)*))?')
_ROWS = 20  # training rows that are listed
_EXAMPLES = 3  # matches of each evaluation that are shown
_FILES = 5  # files of each evaluation that are shown
_SHOWN = 100  # characters of a span
Report = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is compared with what, and what is done about it."""

  train: tuple[str, ...]
  eval: tuple[str, ...]
  out: str
  rule: contamination.Rule = contamination.Rule()
  locked: tuple[str, ...] = ()
  action: str = 'report'
  workers: int = 0  # 0: one per usable core
  runner: str = ''  # of Apache Beam
  options: tuple[str, ...] = ()  # of the runner

  def __post_init__(self) -> None:
    if self.runner and not importlib.util.find_spec('apache_beam'):
      raise ValueError(f'--runner={self.runner}: needs apache-beam, pip install slm[beam]')


def decontaminate(request: Request) -> Report:
  """Compare, report and act as a request says; return the report.

  Under a runner the files are the same; it reads training files at addresses too.

  Raises:
    ValueError: if an input is wrong, or the directory holds what other inputs gave.
  """
  train, evaluations = _expand(request.train, request.runner), _evaluations(request.eval)
  _check(request, train, evaluations)
  found, out = contamination.items(evaluations, request.rule), Path(request.out)
  with artifact.hold(out):
    work.sweep(out)
    contents = _claim(request, train, evaluations)
    scans = {
      out / f'hits/{i:05d}.json': contamination.Scan(
        out / f'hits/{i:05d}.jsonl', source, tuple(evaluations), contents, request.rule
      )
      for i, source in enumerate(train)
    }
    read = _run(request, 'training files', contamination.scan, scans)
    _check_found(scans, read)
    report = summarise(request, found, scans, read)
    if request.action == 'drop-rows':
      report['clean'] = _drop_rows(request, scans)
    elif request.action == 'drop-set':
      report['dropped'] = _drop_sets(out, report, train)
    files.write_text(out / 'report.md', markdown(report))
    files.write_json(out / 'report.json', report)
  return report


def _expand(specs: Iterable[str], runner: str = '') -> list[Source]:
  """List the files that specs name; without a name each is a set of its own.

  Raises:
    ValueError: if a file is named twice, or a spec names something else.
  """
  expand = sources.expand
  if runner:
    from slm.data import remote

    expand = remote.expand
  found: dict[str, Source] = {}
  for spec in specs:
    name, glob, fields = _SPEC.fullmatch(spec).groups()
    if glob.startswith((tfds.PREFIX, 'python:')):
      raise ValueError(f'{spec}: expected files of JSON lines or text')
    for path in expand(glob):
      if path in found:
        raise ValueError(f'{path}: is named twice')
      found[path] = Source(name or path, path, tuple(fields.split('+')) if fields else ())
  return list(found.values())


def _evaluations(specs: Iterable[str]) -> list[Source]:
  """List the files of evaluations; without a name each is called as its file.

  Raises:
    ValueError: if two specs give one name.
  """
  found: list[Source] = []
  for spec in specs:
    group = _expand([spec])
    if group[0].set == group[0].path:
      group = [source._replace(set=Path(source.path).name.partition('.')[0]) for source in group]
      again = [source.set for i, source in enumerate(group) if source.set in _names(group[:i])]
    else:
      again = []
    for name in [*again, *sorted(_names(group) & _names(found))]:
      raise ValueError(f'--eval={spec}: two evaluations are called {name}: write NAME=FILE')
    found += group
  return found


def _names(group: Iterable[Source]) -> set[str]:
  return {source.set for source in group}


def _check(request: Request, train: Sequence[Source], evaluations: Sequence[Source]) -> None:
  """Raise ValueError if the request asks for what does not exist or is not done."""
  for name in request.locked:
    if name not in _names(evaluations):
      near = arguments.suggestion(name, _names(evaluations))
      raise ValueError(f'--locked={name}: no such evaluation{near}')
  for source in train if request.action == 'drop-rows' else ():
    if contamination.is_text(source.path):
      raise ValueError(f'{source.path}: rows are dropped from JSON lines alone')


def _claim(request: Request, train: Sequence[Source], evaluations: Sequence[Source]) -> str:
  """Record what the directory is made from; return a hash of the evaluations.

  Raises:
    ValueError: if it was made from something else.
  """
  record = Path(request.out) / 'decontaminate.json'
  known = files.read_json(record, {'contents': {str: list}})['contents'] if record.exists() else {}
  here = [Path(s.path) for s in (*train, *evaluations) if not sources.is_address(s.path)]
  contents = artifact.contents(here, known)
  settings = {
    'train': train,
    'evaluations': evaluations,
    'rule': dataclasses.asdict(request.rule),
    'contents': contents,
  }
  artifact.claim(record, artifact.plain(settings), 'what other files or settings gave')
  ours = json.dumps([contents[source.path] for source in evaluations])
  return hashlib.sha256(ours.encode()).hexdigest()


def _run(
  request: Request,
  description: str,
  function: Callable[[Any], dict[str, Any]],
  tasks: dict[Path, Any],
) -> list[dict[str, Any]]:
  """Run the tasks that are not complete; return the summaries of all."""
  if request.runner:
    from slm.data import distributed

    distributed.run_tasks(function, tasks, request.runner, request.options)
  with work.Pool(request.workers) as pool:
    return work.run(pool, description, function, tasks)


def _check_found(scans: Mapping[Path, contamination.Scan], read: Iterable[Report]) -> None:
  """Raise ValueError if matches are not as they were written."""
  for path, summary in zip(scans, read, strict=True):
    for _, problem in work.damages(path, summary['files']):
      raise ValueError(f'{problem}: delete {path} and run the same command again')


def _found(task: contamination.Scan) -> Iterator[dict[str, Any]]:
  """Yield what a task has written."""
  return (record for _, record in sources.records(str(task.out)))


def _drop_rows(
  request: Request, scans: Mapping[Path, contamination.Scan]
) -> dict[str, dict[str, Any]]:
  """Write all training files without the rows that match; return the counts by file."""
  names = shown([task.source.path for task in scans.values()])
  tasks = {}
  for path, task in scans.items():
    rows = frozenset(match['line'] for match in _found(task) if match['kind'] != 'masked')
    name = f'../clean/{names[task.source.path]}'
    tasks[path.with_name(f'{path.stem}-clean.json')] = contamination.Clean(
      path.parent, name, task.source, rows
    )
  made = _run(request, 'clean copies', contamination.clean, tasks)
  return {
    task.source.path: {key: summary[key] for key in ('kept', 'dropped')}
    for task, summary in zip(tasks.values(), made, strict=True)
  }


def _drop_sets(out: Path, report: Report, train: Sequence[Source]) -> list[str]:
  """Write the names of the contaminated sets, and the files of the others; return the names."""
  names = [name for name, facts in report['training'].items() if facts['contaminated']]
  kept = [source.path for source in train if source.set not in names]
  files.write_text(out / 'dropped.txt', ''.join(f'{name}\n' for name in names))
  files.write_text(out / 'kept.txt', ''.join(f'{path}\n' for path in kept))
  return names


def shown(paths: Iterable[str]) -> dict[str, str]:
  """Return paths without the folders that all have in common."""
  whole = {p: p if sources.is_address(p) else str(Path(p).absolute()) for p in paths}
  parts = {path: text.split('/') for path, text in whole.items()}
  common = len(os.path.commonprefix([names[:-1] for names in parts.values()]))
  return {path: '/'.join(names[common:]) for path, names in parts.items()}


class _Tally:
  """What the matches of all training files add up to."""

  def __init__(self) -> None:
    self.items: dict[tuple[str, str], set[str]] = defaultdict(set)  # by evaluation and kind
    self.by_set: dict[tuple[str, str], set[str]] = defaultdict(set)  # by set and evaluation
    self.by_file: dict[str, dict[str, int]] = defaultdict(dict)  # evaluation -> file -> items
    self.rows: Counter[str] = Counter()  # set -> rows that match
    self.top: list[Report] = []  # the rows that match most items
    self.examples: dict[str, list[Report]] = defaultdict(list)  # evaluation -> best matches

  def add(self, task: contamination.Scan) -> None:
    """Add the matches of a training file."""
    rows: dict[int, dict[str, Any]] = {}
    in_file: dict[str, set[str]] = defaultdict(set)
    for match in _found(task):
      evaluation, item = match['evaluation'], match['item']
      self.items[evaluation, match['kind']].add(item)
      if match['kind'] == 'masked':
        continue
      self.by_set[task.source.set, evaluation].add(item)
      in_file[evaluation].add(item)
      row = rows.setdefault(match['line'], {'items': set(), 'best': match})
      row['items'].add((evaluation, item))
      row['best'] = max(row['best'], match, key=lambda x: x['score'])
      self._example(self.examples[evaluation], match)
    for evaluation, found in in_file.items():
      self.by_file[evaluation][task.source.path] = len(found)
    self.rows[task.source.set] += len(rows)
    self.top += [{**row['best'], 'items': len(row['items'])} for row in rows.values()]
    self.top = heapq.nlargest(_ROWS, self.top, key=lambda row: (row['items'], row['score']))

  def _example(self, kept: list[dict[str, Any]], match: dict[str, Any]) -> None:
    """Keep a match if it is among the best of different items."""
    same = [i for i, other in enumerate(kept) if other['item'] == match['item']]
    if same and kept[same[0]]['score'] >= match['score']:
      return
    for i in same:
      del kept[i]
    kept.append(match)
    kept.sort(key=lambda x: -x['score'])
    del kept[_EXAMPLES:]


def summarise(
  request: Request,
  items: Sequence[Item],
  scans: Mapping[Path, contamination.Scan],
  read: Sequence[Mapping[str, Any]],
) -> Report:
  """Add up all matches; `read` says how much each training file holds."""
  tally, paths = _Tally(), defaultdict(list)
  counts: dict[str, Counter[str]] = defaultdict(Counter)
  for task, summary in zip(scans.values(), read, strict=True):
    tally.add(task)
    paths[task.source.set].append(task.source.path)
    amounts = {key: summary[key] for key in ('rows', 'documents', 'characters')}
    counts[task.source.set].update(amounts)
  total = Counter(item.evaluation for item in items)
  short = Counter(item.evaluation for item in items if item.short)
  evaluations = {
    name: _evaluation(name, total[name], short[name], request, tally) for name in total
  }
  over = lambda name: [e for e in total if len(tally.by_set[name, e]) / total[e] > LIMIT]
  rule = dataclasses.asdict(request.rule)
  return {
    'rule': rule | {'ngram': overlap.NGRAM, 'threshold': overlap.THRESHOLD, 'limit': LIMIT},
    'evaluations': evaluations,
    'training': {
      name: counts[name]
      | {'files': files, 'matching_rows': tally.rows[name], 'contaminated': over(name)}
      for name, files in paths.items()
    },
    'rows': tally.top,
    'examples': {name: tally.examples[name] for name in total if tally.examples[name]},
    'cost': {
      'seconds': sum(summary['seconds'] for summary in read),
      'characters': sum(summary['characters'] for summary in read),
    },
  }


def _evaluation(name: str, total: int, short: int, request: Request, tally: _Tally) -> Report:
  """Return what was found of an evaluation."""
  found = {kind: tally.items[name, kind] for kind in contamination.KINDS}
  whole = found['overlap'] | found['equal']
  facts = {
    'items': total,
    'overlapped': len(found['overlap']),
    'share': len(found['overlap']) / total,
    'short': short,
    'equal': len(found['equal']),
    'contaminated': len(whole) / total > LIMIT,
    'locked': name in request.locked,
    'files': tally.by_file[name],
  }
  return facts | ({'masked': len(found['masked'] - whole)} if request.rule.mask_numbers else {})


def markdown(report: Report) -> str:
  """Return the tables of a report."""
  rule, training = report['rule'], report['training']
  names = shown(path for facts in training.values() for path in facts['files'])
  masked = rule['mask_numbers']
  place = lambda match: f'{names[match["file"]]}:{match["line"]}'
  sets = [
    [names.get(name, name), len(facts['files']), facts['rows'], facts['matching_rows'],
     ', '.join(facts['contaminated'])]
    for name, facts in training.items()
  ]  # fmt: skip
  rows = [
    [place(row), row['items'], row['evaluation'], row['item'], f'{row["score"]:.2f}', _words(row)]
    for row in report['rows']
  ]
  examples = [
    [name, match['item'], place(match), f'{match["score"]:.2f}', _words(match)]
    for name, matches in report['examples'].items()
    for match in matches
  ]
  more = ['only with numbers masked'] if masked else []
  head = ['evaluation', 'items', 'overlapped', 'share', 'short items', 'equal', *more, 'where']
  return '\n'.join([
    '# Evaluation items in training text', '',
    f'Overlapped: more than {100 * rule["threshold"]:.0f} % of the tokens lie in runs of '
    f'{rule["ngram"]} or more of one training document. Short: under {rule["ngram"]} tokens; equal '
    f'to a whole document. Contaminated: more than {100 * rule["limit"]:.0f} % of the items are '
    'either.', '',
    *_table(head, [_line(name, facts, names) for name, facts in report['evaluations'].items()]),
    '', '## Training sets', '',
    *_table(['set', 'files', 'rows', 'rows that match', 'contaminated with'], sets),
    '', '## Rows that match most items', '',
    *_table(['row', 'items', 'best match', 'item', 'score', 'words in common'], rows),
    '', '## Best matches of each evaluation', '',
    *_table(['evaluation', 'item', 'row', 'score', 'words in common'], examples), '',
  ])  # fmt: skip


def _line(name: str, facts: Report, names: Mapping[str, str]) -> list[Any]:
  """Return an evaluation's line in the table."""
  where = sorted(facts['files'].items(), key=lambda x: -x[1])
  places = [f'{names[path]} ({count})' for path, count in where[:_FILES]]
  places += [f'and {len(where) - _FILES} more files'] if len(where) > _FILES else []
  marks = [mark for mark in ('locked', 'contaminated') if facts[mark]]
  return [
    ', '.join([name, *marks]), facts['items'], facts['overlapped'], f'{100 * facts["share"]:.2f} %',
    facts['short'], facts['equal'], *([facts['masked']] if 'masked' in facts else []),
    ', '.join(places),
  ]  # fmt: skip


def _words(match: Report) -> str:
  """Return the words of the longest span."""
  longest = max(match['spans'], key=lambda span: span['item_tokens'][1] - span['item_tokens'][0])
  text = longest['text']
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]} [...]'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
  """Yield the lines of a Markdown table; numbers stand to the right."""
  rows = [[f'{x:,}' if isinstance(x, int) else x for x in row] for row in rows]
  right = [all(re.fullmatch(r'[\d.,]+( %)?', row[i]) for row in rows) for i in range(len(head))]
  yield f'| {" | ".join(head)} |'
  yield f'| {" | ".join("---:" if x and rows else "---" for x in right)} |'
  for row in rows:
    yield f'| {" | ".join(" ".join(x.split()).replace("|", chr(92) + "|") for x in row)} |'


def _main(argv: list[str]) -> None:
  console.required('train', 'eval', 'out')
  f = flags.FLAGS
  if argv[1:] and not f.runner:
    raise ValueError(f'unexpected argument {argv[1]!r}; flags are --name=value')
  split = lambda values: tuple(x for value in values for x in value.split(',') if x)
  request = Request(
    train=split(f.train), eval=split(f.eval), out=f.out, locked=split(f.locked), action=f.action,
    rule=contamination.Rule(f.turns, f.combine, f.strip, f.mask_numbers), workers=f.workers,
    runner=f.runner or '', options=tuple(argv[1:]),
  )  # fmt: skip
  report = decontaminate(request)
  for name, facts in report['evaluations'].items():
    print(
      f'{name}: {facts["overlapped"]:,} of {facts["items"]:,} items overlapped '
      f'({100 * facts["share"]:.2f} %), {facts["equal"]:,} of {facts["short"]:,} short ones equal'
      + (f', {facts["masked"]:,} more with numbers masked' if 'masked' in facts else '')
    )
  for path, counts in report.get('clean', {}).items():
    print(f'{path}: {counts["dropped"]:,} rows dropped, {counts["kept"]:,} kept')
  for name in report.get('dropped', ()):
    print(f'drop {name}: contaminated with {", ".join(report["training"][name]["contaminated"])}')
  cost = report['cost']
  rate = cost['characters'] / 1e6 / max(cost['seconds'], 1e-9)
  print(f'{request.out}: {cost["characters"]:,} characters read, {rate:.1f}M a second and core')
  for name, facts in report['evaluations'].items():
    if facts['locked'] and facts['contaminated']:
      count = facts['overlapped'] + facts['equal']
      raise ValueError(
        f'--locked={name}: {count:,} of {facts["items"]:,} items are in the training text, over '
        f'{100 * LIMIT:.0f} %; see {request.out}/report.md'
      )


if __name__ == '__main__':
  flags.DEFINE_multi_string('train', [], 'Training text: [NAME=]GLOB[:FIELD+FIELD],...')
  flags.DEFINE_multi_string('eval', [], 'Evaluations: [NAME=]GLOB[:FIELD+FIELD],...')
  flags.DEFINE_string('out', '', 'Directory to write to.')
  flags.DEFINE_multi_string('locked', [], 'NAME,...: evaluations that end it with status 1.')
  flags.DEFINE_enum('action', 'report', ACTIONS, 'Also drop contaminated sets, or matching rows.')
  flags.DEFINE_enum('turns', 'user', contamination.TURNS, 'Of messages: those that are compared.')
  combine = "Score of an item of several fields: the mean of the fields' scores, or the highest."
  flags.DEFINE_enum('combine', 'mean', overlap.COMBINE, combine)
  strip = 'Regular expression of what is left out of items, such as ^Question: |Answer:$.'
  flags.DEFINE_string('strip', '', strip)
  masks = 'Count also the items that are overlapped only if all numbers are alike.'
  flags.DEFINE_bool('mask_numbers', False, masks)
  flags.DEFINE_integer('workers', 0, 'Processes; 0: one per usable core.', 0)
  runners = [name for name in RUNNERS if name != 'dataflow']  # its workers do not see --out
  told = 'Compare with Apache Beam, whose options stand after --; default: without it.'
  flags.DEFINE_enum('runner', None, runners, told)
  console.run(_main, positional=True)
