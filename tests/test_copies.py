"""Prepared data at an address: the copy is the same data, made once."""

import fcntl
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from slm.base import artifact, console, files
from slm.data import copies, loader
from slm.runs import config

ADDRESS = 'gs://bucket/data'


class Bucket(MemoryFileSystem):
  """A bucket in memory, which notes what is read from it."""

  protocol = ('gs', 'gcs')
  store, pseudo_dirs, opened = {}, [''], []

  @classmethod
  def _strip_protocol(cls, path):
    path = path.partition('://')[2] if '://' in path else path
    return f'/{path.strip("/")}'.rstrip('/')

  def _open(self, path, mode='rb', **more):
    self.opened.append(path.removeprefix('/bucket/data/'))
    return super()._open(path, mode, **more)


@pytest.fixture
def bucket(tiny_data, tmp_path, monkeypatch):
  """Put the tiny data into a bucket, without what only slm.data.prepare reads; return its files."""
  monkeypatch.setattr(Bucket, 'store', {})
  monkeypatch.setattr(Bucket, 'pseudo_dirs', [''])
  monkeypatch.setenv('SLM_CACHE', str(tmp_path / 'cache'))
  backend.fsspec_backend._get_filesystem.cache_clear()
  fsspec.register_implementation('gcs', Bucket, clobber=True)
  bucket = Bucket()
  for path in Path(tiny_data).rglob('*'):
    if path.is_file():
      bucket.pipe_file(f'{ADDRESS}/{path.relative_to(tiny_data)}', path.read_bytes())
  Bucket.opened.clear()
  yield bucket
  backend.fsspec_backend._get_filesystem.cache_clear()


def batches(cfg):
  stream = loader.build(cfg.data)
  return [next(stream) for _ in range(3)]


def test_a_run_reads_the_same_rows_from_the_copy(bucket, tiny_data, tiny_config_of):
  there = config.resolve(tiny_config_of(**{'data.path': ADDRESS}))
  here = config.resolve(tiny_config_of())
  assert there.rows == here.rows and there.tokenizer == here.tokenizer
  for a, b in zip(batches(there), batches(here), strict=True):
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[key], b[key]) for key in a)
  copied = {name for name in bucket.opened if not name.startswith('index/')}
  assert not any(name.startswith('windows/') or name.endswith('00001.npy') for name in copied)
  assert files.damage(
    Path(there.data.path) / 'generic/train/clusters.npy',
    loader.facts(tiny_data, 'generic/train')['files']['clusters.npy'],
  ) == ''  # fmt: skip

  bucket.opened.clear()  # a second start reads only what has no hash in the manifest
  assert config.resolve(tiny_config_of(**{'data.path': ADDRESS})) == there
  assert {name.partition('/')[0] for name in bucket.opened} == {
    'manifest.json', 'tokenizer', 'clusters', 'index',
  }  # fmt: skip


def test_an_index_that_is_written_later_is_found(bucket, tiny_data):
  copy = copies.local(ADDRESS)
  for suffix in ('json', 'npy'):
    content = (Path(tiny_data) / f'index/court-2000.{suffix}').read_bytes()
    bucket.pipe_file(f'{ADDRESS}/index/later.{suffix}', content)
  assert copies.local(ADDRESS) == copy
  expected = loader.Split(tiny_data, 'court', 'train', 'court-2000').ids
  np.testing.assert_array_equal(loader.Split(copy, 'court', 'train', 'later').ids, expected)


def test_what_is_wrong_at_an_address_is_named(bucket, tiny_data, tmp_path):
  with pytest.raises(FileNotFoundError, match='gs://bucket/nothing: no such file there'):
    copies.local('gs://bucket/nothing')
  with pytest.raises(ValueError, match='hdfs://there: expected a path, or an address such as gs:'):
    copies.local('hdfs://there')
  with pytest.raises(ValueError, match='gs://bucket/data: an address: this command reads data of'):
    loader.manifest(ADDRESS)
  records = loader.facts(tiny_data, 'court/test')['shards'][0]
  name = f'{ADDRESS}/court/test/{records}'
  content = bucket.cat_file(name)
  bucket.pipe_file(name, content[:-1])
  sizes = f'has {len(content) - 1} bytes, expected {len(content)}'
  with pytest.raises(OSError, match=f'^{name}: {sizes}$'):
    copies.local(ADDRESS)
  (copy,) = (tmp_path / 'cache').iterdir()
  assert not (copy / 'manifest.json').exists() and not list(copy.rglob('*.tmp'))


def test_who_waits_for_the_copy_of_another_says_so_once(bucket, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(copies, '_WAIT', 0.02)
  copy = Path(copies.local(ADDRESS))
  with (copy / 'writer.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # of another open file, as another process's is
    threading.Timer(0.2, fcntl.flock, [lock.fileno(), fcntl.LOCK_UN]).start()
    assert copies.local(ADDRESS) == str(copy)
  said = capsys.readouterr().err.splitlines()
  line = f'{copy}: waiting for another process, which makes this copy'
  assert [x for x in said if 'waiting' in x] == [line]


def test_only_another_writer_is_waited_for(bucket, monkeypatch, capsys):
  """Not a cache that can hold no copies."""
  monkeypatch.setattr(copies.time, 'sleep', lambda _: pytest.fail('waits'))
  monkeypatch.setenv('SLM_CACHE', 'gs://bucket/cache')
  with pytest.raises(SystemExit), console.one_line_errors():
    copies.local(ADDRESS)
  said = 'SLM_CACHE=gs://bucket/cache: expected a directory of this machine, found an address'
  assert capsys.readouterr().err == f'error: {said}\n'

  def refuse(_):
    raise ValueError('no locks here')

  monkeypatch.delenv('SLM_CACHE')
  monkeypatch.setattr(artifact, 'hold', refuse)
  with pytest.raises(ValueError, match='no locks here'):
    copies.local(ADDRESS)
