"""The pages of the project: which there are, and that their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# In the order in which they are read: what one makes, the next ones use.
GUIDES = (
  'data', 'training', 'posttraining', 'specialising', 'advice', 'pruning', 'interchange',
  'evaluating', 'verifiers', 'machines', 'scale', 'architecture', 'troubleshooting',
)  # fmt: skip
PAGES = [ROOT / 'README.md', *(ROOT / f'docs/{name}.md' for name in GUIDES)]
PAGES += [*sorted(ROOT.glob('experiments/*/README.md')), ROOT / 'CONTRIBUTING.md']


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(page):
  for target in re.findall(r'\]\(([^)#\s]+)', page.read_text()):
    assert '://' in target or (page.parent / target).exists(), target


def test_no_guide_is_left_out():
  assert {path.stem for path in ROOT.glob('docs/*.md')} == set(GUIDES)


def test_the_page_on_scale_has_the_table_of_its_experiment():
  table = (ROOT / 'experiments/scale/results/table.md').read_text()
  assert table in (ROOT / 'docs/scale.md').read_text()
