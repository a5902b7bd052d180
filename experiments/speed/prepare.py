"""Measure the peak memory and the rate of `slm.data.prepare` by the size of the text.

python -m experiments.speed.prepare --corpus='corpus/*.jsonl.gz' --gigabytes=0.1,1,4

The text is made of the sentences of a corpus in random order, so that any amount is to be had. A
size that was measured is not measured again; the text and what is prepared of it are deleted.
"""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from slm.base import artifact, console, files
from slm.data import loader, sources

_SENTENCES = 200_000  # taken of the corpus
_DOCUMENT = 4000  # characters of a document, on average
_FILE = 64 << 20  # bytes of a file
_STAGES = ('documents', 'tokenizer', 'windows', 'clusters', 'rows')


def write_text(corpus: str, folder: Path, size: int) -> None:
  """Write documents of shuffled sentences as JSON lines, `size` bytes in all."""
  sentences: list[str] = []
  for path in sources.expand(corpus):
    for text, _ in sources.read(path, 'text', ''):
      sentences += [part.strip() for part in text.replace('\n', ' ').split('. ') if part.strip()]
    if len(sentences) >= _SENTENCES:
      break
  rng, written, number = random.Random(size), 0, 0
  del sentences[_SENTENCES:]
  per_document = max(_DOCUMENT * len(sentences) // sum(map(len, sentences)), 1)
  while written < size:
    with (folder / f'{number:05d}.jsonl').open('w') as f:
      limit = min(_FILE, size - written)
      while f.tell() < limit:
        drawn = rng.choices(sentences, k=rng.randint(1, 2 * per_document))
        f.write(json.dumps({'text': '. '.join(drawn)}, ensure_ascii=False) + '\n')
      written += f.tell()
    number += 1


def measure(corpus: str, size: int, scratch: Path, options: list[str]) -> dict[str, Any]:
  """Prepare text of a size in a process of its own; return its time and peak memory."""
  shutil.rmtree(scratch, ignore_errors=True)
  (scratch / 'text').mkdir(parents=True)
  try:
    # In another process: a child's peak is at least that of the process that starts it.
    writer = multiprocessing.get_context('spawn').Process(
      target=write_text, args=(corpus, scratch / 'text', size)
    )
    writer.start()
    writer.join()
    if writer.exitcode:
      raise ValueError(f'--corpus={corpus}: its sentences could not be written')
    start = time.monotonic()
    command = [sys.executable, '-m', 'slm.data.prepare', f'--out={scratch / "data"}', *options]
    command.append(f'--config=configs/data.py:generic={scratch}/text/*.jsonl')
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
      raise ValueError(f'slm.data.prepare failed on {size:,} bytes')
    seconds = time.monotonic() - start
    manifest = loader.manifest(scratch / 'data')
    splits = manifest['sets']['generic'].values()
    return {
      'bytes': sum(path.stat().st_size for path in (scratch / 'text').iterdir()),
      'peak': usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024),
      'seconds': seconds,
      'stages': {stage: manifest['cost'][stage]['seconds'] for stage in _STAGES},
      'documents': sum(facts['documents'] for facts in splits),
      'rows': sum(facts['rows'] for facts in splits),
    }
  finally:
    shutil.rmtree(scratch)


def table(results: list[dict[str, Any]]) -> str:
  """Return the results as a Markdown table."""
  lines = [
    '| GB of text | documents | rows | peak memory (MB) | seconds | MB/s | '
    f'{" | ".join(_STAGES)} |',
    '| ---: ' * (6 + len(_STAGES)) + '|',
  ]
  for r in sorted(results, key=lambda r: r['bytes']):
    stages = ' | '.join(f'{r["stages"][stage]:.0f}' for stage in _STAGES)
    lines.append(
      f'| {r["bytes"] / 1e9:.2g} | {r["documents"]:,} | {r["rows"]:,} | {r["peak"] / 1e6:.0f} | '
      f'{r["seconds"]:.0f} | {r["bytes"] / 1e6 / r["seconds"]:.1f} | {stages} |'
    )
  return '\n'.join(lines) + '\n'


def _main(argv: list[str]) -> None:
  console.required('corpus', 'out')
  f = flags.FLAGS
  out, options = Path(f.out), ['--config.workers=1', *argv[1:]]
  record = out / f'{f.name}.json'
  found = files.read_json(record) if record.exists() else {'options': options, 'results': []}
  artifact.check_same(record, found['options'], options, 'what other options gave')
  for size in (round(float(text) * 1e9) for text in f.gigabytes):
    if all(abs(r['bytes'] / size - 1) > 0.01 for r in found['results']):
      scratch = Path(f.scratch or out / 'scratch')
      found['results'].append(measure(f.corpus, size, scratch, options))
      files.write_json(record, found)
      files.write_text(out / f'{f.name}.md', table(found['results']))
  print(table(found['results']))


if __name__ == '__main__':
  flags.DEFINE_string('corpus', None, 'Files whose sentences the text is made of: a glob.')
  flags.DEFINE_list('gigabytes', ['0.1', '1', '4'], 'Sizes of the text.')
  flags.DEFINE_string('out', 'experiments/speed/results', 'Directory of the table.')
  flags.DEFINE_string('name', 'prepare', 'Name of the table.')
  flags.DEFINE_string('scratch', '', 'Directory for text and rows; default: in --out.')
  console.run(_main, positional=True)
