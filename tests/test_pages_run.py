"""Every command that a page shows is run as printed, and every error that it quotes exists.

The commands run in this process, page after page, in a directory with small texts and models under
the names that the pages use. `SMALLER` adds flags that make them short; `NOT_RUN` lists the others.
"""

import ast
import contextlib
import dataclasses
import functools
import gzip
import importlib.util
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from typing import NamedTuple

import jax
import pytest
import toy
from absl import app, flags
from test_pages import PAGES, ROOT

from experiments import common
from experiments.specialise import scales
from slm.interchange import convert

pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning')  # runpy: already imported
LANGUAGES = {'sh', 'text', 'json'}  # of the blocks of a page; `sh` holds commands

# Flags that are added to a command, so that it takes seconds; the longest matching beginning.
SMALLER = {
  'slm.data.prepare': '--config.tokenizer.vocab=400 --config.context=64 --config.fit_windows=600 '
  '--config.dims=8 --config.sizes=(2000,) --config.workers=1',
  'slm.data.prepare --runner=direct': '--config.tokenizer.vocab=400 --config.context=64 '
  '--config.fit_windows=600 --config.dims=8 --config.sizes=(2000,)',
  'slm.data.importance': '--tokens=5000',
  'slm.data.dsir': '--tokens=5000',
  'slm.train': '--config.steps=2 --config.schedule.warmup=1 --config.log_every=1 '
  '--config.tensorboard=False --config.eval.max_rows=32',
  'slm.train --profile=20:22': '--config.steps=2 --config.schedule.warmup=1 --config.log_every=1 '
  '--config.tensorboard=False --config.eval.max_rows=32 --profile=2:2',
  'slm.train --config=configs/sft.py': '--config.epochs=0 --config.steps=2 --config.log_every=1 '
  '--config.tensorboard=False --config.eval.max_rows=32',
  'slm.train --config=configs/dpo.py': '--config.epochs=0 --config.steps=2 --config.log_every=1 '
  '--config.tensorboard=False --config.eval.max_rows=32',
  'slm.train --config=configs/reward.py': '--config.epochs=0 --config.steps=2 --config.log_every=1 '
  '--config.tensorboard=False --config.eval.max_rows=32',
  'slm.train --config=configs/grpo.py': '--config.steps=2 --config.schedule.warmup=1 '
  '--config.tensorboard=False --config.eval.max_rows=4 --config.data.batch_size=2 '
  '--config.objective.samples=2 --config.objective.max_tokens=4',
  'slm.train --config=configs/ppo.py': '--config.steps=2 --config.schedule.warmup=1 '
  '--config.tensorboard=False --config.eval.max_rows=4 --config.data.batch_size=2 '
  '--config.objective.whiten=2 --config.objective.max_tokens=4',
  'slm.generate': '--max_tokens=4',
  'slm.latency': '--prompt=16 --new_tokens=4 --rounds=1',
  'slm.prune calibrate': '--rows=32',
  'slm.prune search': '--count=2 --survivors=1 --config.steps=2 --config.schedule.warmup=1 '
  '--config.tensorboard=False --config.eval.max_rows=32',
  'slm.continuations': '--rows=8 --max_tokens=4',
  'slm.synthesise answers': '--max_tokens=4',
  'slm.minitron': '--config.recover.steps=2 --config.recover.schedule.warmup=1 '
  '--config.calibrate.rows=32 --config.recover.eval.max_rows=32',
  'experiments.specialise.measured': '--out=measured.csv',
}  # fmt: skip
# Commands that are parsed and not run.
NOT_RUN = {
  'make model': 'downloads 93 MB; a random model stands in its place',
  'make setup': 'makes an environment',
  'python -m slm.launch --on=local --nodes=2 --submit -- train --config=configs/pretrain.py '
  '--config.data.path=DATA --workdir=runs/slm-2': 'two processes; tests/test_processes.py'
  ' starts them',
  'python -m slm.train --config=configs/pretrain.py --config.data.path=gs://BUCKET/DATA '
  '--workdir=gs://BUCKET/runs/slm': 'needs a bucket; tests/test_stage.py has a fake one',
  'python -m slm.evaluate --run=gs://BUCKET/runs/slm --data=gs://BUCKET/DATA --on=generic/test':
    'needs a bucket; tests/test_stage.py has a fake one',
  "python -m slm.data.prepare --runner=flink --config='configs/data.py:generic=/mnt/corpus/"
  "*.jsonl.gz' --out=/mnt/DATA -- --flink_master=HOST:8081 --parallelism=64 "
  '--environment_type=DOCKER --environment_config=IMAGE': 'needs a cluster',
  "python -m slm.data.prepare --runner=spark --config='configs/data.py:generic=/mnt/corpus/"
  "*.jsonl.gz' --out=/mnt/DATA -- --spark_master_url=spark://HOST:7077 --environment_type=DOCKER "
  '--environment_config=IMAGE': 'needs a cluster',
  "python -m slm.data.prepare --runner=dataflow --config='configs/data.py:generic=gs://BUCKET/"
  "corpus/*.jsonl.gz' --out=gs://BUCKET/DATA -- --project=NAME --region=us-central1 "
  '--temp_location=gs://BUCKET/tmp --sdk_container_image=IMAGE --max_num_workers=200':
    'needs an account',
  '. .venv/bin/activate': 'make quickstart makes the environment',
  'python -m slm.compile --topology=v5e:4x4 --config=configs/pretrain.py --context=1024 '
  '--config.mesh.data=1 --config.mesh.fsdp=-1 --config.dtype=bfloat16 '
  '--config.data.batch_size=64 --config.model.vocab=32000 --config.model.embed=768 '
  '--config.model.num_layers=12 --config.model.mlp=2048 --config.model.num_heads=12 '
  '--config.model.num_kv_heads=12 --config.model.head_dim=64':
    'needs libtpu; tests/test_compile.py compiles for TPUs',
  'python -m experiments.scale.run --out=runs/scale':
    'an hour, and libtpu; tests/test_compile.py compiles the same in small',
  'python -m experiments.specialise.run --scale=paper --topology=v5p:4x4x4 --out=runs/paper':
    'minutes, and libtpu; tests/test_compile_studies.py compiles a small study',
  "pip install -e '.[tpu]'": 'changes the environment',
  "pip install -e '.[eval]'": 'changes the environment',
  "pip install -e '.[reference]'": 'changes the environment',
  "pip install -e '.[rl]'": 'changes the environment',
  'python -m slm.harness run --model=slm --model_args=pretrained=runs/slm-law --tasks=arc_easy':
    'downloads its task; tests/test_harness.py has one on disk',
  'python -m slm.evaluate --run=runs/slm-law --suite=olmes_small --tasks=CORPORA --limit=200':
    'needs corpora',
  'python -m slm.compare --run=runs/slm --run=runs/slm-law --task=olmes_small.arc_easy-letter':
    'needs the answers of the suite; tests/test_suites.py runs it',
  'python -m slm.evaluate --run=runs/slm-law --suite=tulu_unseen --tasks=CORPORA --freeze':
    'needs corpora; tests/test_suites.py runs it on small files',
  'python -m slm.evaluate --run=runs/slm-law --suite=tulu_unseen --tasks=CORPORA':
    'needs corpora; tests/test_suites.py runs it on small files',
  'python -m experiments.specialise.run --scale=cpu --corpus=CORPORA --out=runs/cpu':
    'two hours, and corpora; the scale quick is run',
  'python -m experiments.minitron.run --scale=cpu --corpus=CORPORA --out=runs/minitron':
    'three core-hours, and corpora',
  'python -m experiments.minitron.run --scale=smollm2 --corpus=CORPORA --out=runs/smollm2':
    'five core-hours, and corpora',
  'python -m slm.tulu --config=configs/tulu_quick.py --workdir=runs/tulu':
    'minutes; tests/test_tulu.py runs it in small',
  'python -m experiments.minitron.run --scale=smoke --out=runs/minitron_smoke':
    'minutes: 56 students; tests/test_minitron.py makes some of them',
  'python -m experiments.tulu.run --scale=smoke --out=runs/tulu_smoke':
    'a minute; tests/test_tulu_study.py makes some of its runs, tests/smoke.sh all',
  'python -m experiments.tulu.run --scale=cpu --out=runs/tulu': 'an hour',
  'python -m experiments.faults.run --scale=smoke --out=runs/faults':
    'minutes: starts and kills processes; tests/test_faults.py has its parts',
  'python -m experiments.faults.run --scale=full --out=runs/faults': 'hours',
  'python -m experiments.faults.run --scale=posttrain --out=runs/faults-posttrain': 'minutes',
  'python -m experiments.speed.run --scale=cpu': 'minutes, and measures this machine',
  'python -m experiments.speed.run --scale=cpu --out=runs/busy --busy=1 --rounds=5 '
  "--row='train: slm' --row='train: torch' --row='train: torch.compile'":
    'minutes, and measures this machine',
  'python -m experiments.speed.run --scale=gpu': 'needs a GPU',
  'python -m experiments.speed.llama --run=models/smollm2-135m-instruct '
  '--gguf=SmolLM2-135M-Instruct.Q4_1.gguf': 'needs the model and llama.cpp',
  'python -m experiments.speed.minitron --scale=cpu': 'minutes, and measures this machine',
  'python -m experiments.speed.posttrain': 'minutes, and measures this machine',
  'python -m experiments.speed.posttrain --run=models/smollm2-135m-instruct':
    'minutes, and needs the model',
  "python -m slm.data.decontaminate --train='CORPORA/*/train.jsonl.gz,CORPORA/posttrain/*_train."
  "jsonl.gz' --eval='CORPORA/eval/*.jsonl.gz,CORPORA/posttrain/*_test.jsonl.gz,CORPORA/posttrain/"
  "*eval*.jsonl.gz' --strip='(?m)^(Question|Context|Passage|Q): |^(Answer|A):$|(?s:^Choices:.*)' "
  '--mask_numbers --out=runs/decontaminate': 'needs corpora',
  'python -m experiments.verifiers.run --prompts=ifeval.jsonl.gz --texts=news.jsonl.gz':
    "a minute; needs lm-evaluation-harness, NLTK's data and the prompts of IFEval",
  "python -m experiments.speed.prepare --corpus='corpus/*.jsonl.gz' --gigabytes=0.1,1,4":
    'minutes, and measures this machine',
}  # fmt: skip
# Extras that a command needs: where one is not installed, the command is skipped.
NEEDS = {
  'slm.gguf import': 'gguf', 'slm.hf verify': 'transformers',
  'slm.data.prepare --runner=direct': 'apache_beam', 'slm.synthesise gym': 'reasoning_gym',
  'slm.synthesise answers': 'langdetect',
}  # fmt: skip


class Command(NamedTuple):
  """A command that a page shows, and why it is not run, if it is not."""

  page: str
  words: tuple[str, ...]
  reason: str

  @property
  def argv(self):
    """Return the module and its arguments; empty for what is no `python -m MODULE`."""
    if self.words == ('make', 'quickstart'):  # the study that it starts, in the environment here
      recipe = re.search(
        r'^quickstart:.*\n\t\$\(PY\) -m (.+)', (ROOT / 'Makefile').read_text(), re.M
      )
      return tuple(recipe[1].replace('$(OUT)', 'runs/quick').split())
    return self.words[2:] if self.words[:2] == ('python', '-m') else ()


def shown(page):
  """Yield the words of each command of a page: in `sh` blocks, and in sentences."""
  for language, block, inline in re.findall(
    r'^```(\w*)\n(.*?)^```|`(python -m [^`]+)`', page.read_text(), re.M | re.S
  ):
    assert inline or language in LANGUAGES, f'{page}: a block of {language!r}'
    if inline or language == 'sh':
      for line in (inline or block).replace('\\\n', ' ').splitlines():
        if words := shlex.split(line, comments=True):
          yield tuple(words)


REASONS = {tuple(shlex.split(line)): reason for line, reason in NOT_RUN.items()}
COMMANDS = [
  Command(str(page.relative_to(ROOT)), words, REASONS.get(words, ''))
  for page in PAGES
  for words in shown(page)
]


def execute(argv, main):
  """Run a module as `python -m` does, its main by `main(main, argv)`; raise if it fails."""
  defined, printed, devices = set(flags.FLAGS), io.StringIO(), jax.devices
  mesh = any(arg.startswith('--config.mesh.') for arg in argv)
  try:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
      patch.setattr(app, 'run', lambda f, flags_parser: main(f, flags_parser(sys.argv)))
      patch.setattr(sys, 'argv', list(argv))
      if not mesh:  # programs of one device compile faster
        patch.setattr(jax, 'devices', lambda *kind: devices(*kind)[:1])
      patch.setattr(sys, 'stdin', io.StringIO('ship\n'))
      with contextlib.redirect_stderr(printed):
        runpy.run_module(argv[0], run_name='__main__')
  except SystemExit as e:
    if e.code:
      raise RuntimeError(f'{shlex.join(argv)}\n{printed.getvalue()[-2000:]}') from None
  finally:
    for name in set(flags.FLAGS) - defined:
      delattr(flags.FLAGS, name)


def shortened(argv):
  """Add the flags that make a command short."""
  line = ' '.join(argv)
  known = max((k for k in SMALLER if f'{line} '.startswith(f'{k} ')), key=len, default='')
  whole = not known or {'--dry_run', '--help'} & set(argv)
  return [*argv, *(() if whole else SMALLER[known].split())]


def furnish(root):
  """Write the texts, tasks and models that the pages name."""
  (root / 'corpus').mkdir()
  (root / 'law').mkdir()
  toy.write_jsonl(root / 'corpus/part-0.jsonl.gz', toy.documents(list(toy.TOPICS), 400, 0))
  for i, text in enumerate(toy.documents(['law', 'law', 'sea'], 540, 1)):
    (root / f'law/{i}.txt').write_text(text)
  toy.write_jsonl(root / 'law.jsonl', toy.documents(['law'], 60, 2))
  talk = lambda i, *names: dict(
    zip(names, (f'sail {i}?', *('ship', 'rope')[: len(names) - 1]), strict=True)
  )
  for name, names in {
    'talks': ('prompt', 'response'), 'more': ('question', 'answer'), 'sums': ('prompt', 'final'),
    'pairs': ('prompt', 'chosen', 'rejected'), 'questions': ('question', 'answer'),
  }.items():  # fmt: skip
    lines = ''.join(json.dumps(talk(i, *names)) + '\n' for i in range(80))
    (root / f'{name}.jsonl').write_text(lines)
  tasks = {
    'arc_easy': {'type': 'mc', 'query': 'What sails?', 'choices': ['ship', 'rope'], 'gold': 0},
    'lambada': {'type': 'lm', 'context': 'The ship and the', 'continuation': 'sail'},
  }
  for name, item in tasks.items():
    lines = [json.dumps({'id': str(i), **item}) for i in range(8)]
    with gzip.open(root / f'{name}.jsonl.gz', 'wt') as f:
      f.write('\n'.join(lines))
  source = toy.random_run()
  convert.export_model(source, root / 'HF_DIR')
  chat = root / 'models/smollm2-135m-instruct'
  shutil.copytree(source, chat)
  shutil.copytree(source.parent / 'data/tokenizer', chat / 'tokenizer')
  template = (
    '{% for m in messages %}{{ m.role }}:\n{{ m.content }}'
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    '{% if add_generation_prompt %}assistant:\n{% endif %}'
  )
  (chat / 'tokenizer/chat_template.jinja').write_text(template)
  if importlib.util.find_spec('gguf'):
    import ggufs

    tok = ggufs.byte_pairs('gpt-2')
    ggufs.write(root / 'FILE.gguf', 'llama', *ggufs.random_model('llama', len(tok['tokens'])), tok)


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
  """Return a function of i: the error of command i or None, once all before it have run."""
  root, errors = tmp_path_factory.mktemp('pages'), []
  smaller = {
    'quick': dict(
      sources={'generic': 'corpus/*.jsonl.gz', 'licences': 'law/*.txt'},
      prepare={'tokenizer.vocab': 400, 'context': 64, 'levels': (8,), 'dims': 8, 'workers': 1},
      methods=('slm', 'slm_noft'), steps=2, finetune_steps=(1, 1), warmup=1, selection_level=8,
    ),
    'paper': dict(methods=('slm',), once=(), budgets=(1,), budgeted=()),
  }  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(root)
    patch.setattr(common, 'cache', lambda directory: None)  # that of the tests stays
    for name, changes in smaller.items():
      patch.setitem(scales.SCALES, name, dataclasses.replace(scales.SCALES[name], **changes))
    furnish(root)

    def run(i):
      for command in COMMANDS[len(errors) : i + 1]:
        errors.append(None)
        try:
          if command.argv and not command.reason and not missing(command):
            execute(shortened(command.argv), lambda main, argv: main(argv))
        except Exception as e:  # noqa: BLE001 (the command's own test raises it)
          errors[-1] = e
      return errors[i]

    yield run


def missing(command):
  """Return the library that a command needs and that is not installed, if there is one."""
  needed = NEEDS.get(' '.join(command.argv[:2]))
  return needed and not importlib.util.find_spec(needed) and needed


@pytest.mark.parametrize('i', range(len(COMMANDS)), ids=lambda i: f'{COMMANDS[i].page}-{i}')
def test_commands_of_the_pages_run(i, outcome):
  command = COMMANDS[i]
  assert command.argv or command.reason, f'{command.page}: {command.words}: not run by any test'
  if command.reason and command.argv and command.argv[0] != 'slm.harness':  # of absl
    execute(command.argv, lambda main, argv: None)  # its flags and keys are there
  if library := missing(command):
    pytest.skip(f'needs {library}')
  if error := outcome(i):
    raise error


def test_every_reason_is_of_a_command_that_a_page_shows():
  assert not REASONS.keys() - {command.words for command in COMMANDS}
  assert sum(not command.reason for command in COMMANDS) > 40


@functools.cache
def messages():
  """Return the strings of slm, with what is filled into them as a null character."""
  found = []
  for path in (*ROOT.glob('slm/**/*.py'), *ROOT.glob('configs/*.py')):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else '\0' for v in node.values]
        found.append(''.join(parts))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
  return found


QUOTED = re.findall(r'^\| `(.+?)` \|', (ROOT / 'docs/troubleshooting.md').read_text(), re.M)


@pytest.mark.parametrize('quoted', QUOTED)
def test_errors_of_the_troubleshooting_page_are_in_the_code(quoted):
  """Where the page has a name in capitals, a number or dots, the code fills something in."""
  parts = re.split(r"'?\b[A-Z][A-Z_]*\b'?|\.\.\.|\b\d+\b", quoted)
  pattern, longest = re.compile('.*'.join(map(re.escape, parts)), re.S), max(parts, key=len)
  assert any(longest in text and pattern.search(text) for text in messages()), quoted
