"""Every command that a page shows is one: its module, flags and config keys are there."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from absl import app, flags

pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning')  # runpy: already imported
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *ROOT.glob('docs/*.md')]
PAGES += ROOT.glob('experiments/*/README.md')
OTHERS = {'slm.harness', 'slm.COMMAND', 'pytest', 'pip', 'venv'}  # not of one grammar


def shown(page):
  """Return the arguments of each `python -m MODULE ...` of a page, in blocks and in sentences."""
  blocks = re.findall(r'^```\w*\n(.*?)^```', text := page.read_text(), re.M | re.S)
  lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
  lines += [' '.join(code.split()) for code in re.findall(r'`(python -m [^`]+)`', text)]
  words = (shlex.split(line, comments=True) for line in lines if 'python -m' in line)
  return [argv[argv.index('-m') + 1 :] for argv in words]


COMMANDS = [(page, argv) for page in PAGES for argv in shown(page) if argv[0] not in OTHERS]


@pytest.mark.parametrize(
  ('page', 'argv'), COMMANDS, ids=[f'{page.relative_to(ROOT)}-{a[0]}' for page, a in COMMANDS]
)
def test_what_a_page_says_can_be_typed(page, argv, monkeypatch, capsys):
  module, *rest = (arg for arg in argv if arg != '...')
  parsed = []
  monkeypatch.setattr(app, 'run', lambda _, flags_parser: parsed.append(flags_parser(sys.argv)))
  monkeypatch.setattr(sys, 'argv', [module, *rest])
  monkeypatch.chdir(ROOT)
  before = set(flags.FLAGS)
  try:
    runpy.run_module(module, run_name='__main__')
  except SystemExit as e:
    assert not e.code, capsys.readouterr().err
  finally:
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
  assert parsed or '--help' in rest


def test_pages_show_commands():
  assert len(COMMANDS) > 30
  assert {argv[0].partition('.')[0] for _, argv in COMMANDS} == {'slm', 'experiments'}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(page):
  for target in re.findall(r'\]\(([^)#\s]+)', page.read_text()):
    assert '://' in target or (page.parent / target).exists(), target
