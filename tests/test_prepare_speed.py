"""The measurement of preparing: text of any size, its memory and time, the table."""

import hashlib
import pathlib

import toy

from experiments.speed import prepare

OPTIONS = [
  '--config.workers=1', '--config.tokenizer.name=bytes', '--config.fit_windows=200',
  '--config.dims=4', '--config.levels=(4,)', '--config.heldout=(0.2,0.2)',
]  # fmt: skip


def test_text_has_the_size_that_was_asked_for_and_is_the_same_again(tmp_path, monkeypatch):
  corpus = str(toy.write_jsonl(tmp_path / 'a.jsonl', ['. '.join(toy.documents(['sea'], 99, 0))]))
  monkeypatch.setattr(prepare, '_FILE', 40_000)
  hashes = []
  for name in ('one', 'two'):
    (folder := tmp_path / name).mkdir()
    prepare.write_text(corpus, folder, 100_000)
    paths = sorted(folder.iterdir())
    assert len(paths) == 3
    assert 100_000 <= sum(path.stat().st_size for path in paths) < 130_000
    hashes.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
  assert hashes[0] == hashes[1]


def test_a_size_is_measured_and_its_text_deleted(tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(pathlib.Path(__file__).parent.parent))
  corpus = str(toy.write_jsonl(tmp_path / 'a.jsonl', toy.documents(list(toy.TOPICS), 99, 0)))
  found = prepare.measure(corpus, 200_000, tmp_path / 'scratch', OPTIONS)
  assert not (tmp_path / 'scratch').exists()
  assert 50e6 < found['peak'] < 5e9 and found['rows'] > 500 and found['seconds'] > 0.5
  assert prepare.table([found]).count('\n') == 3
