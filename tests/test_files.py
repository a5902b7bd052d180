"""Errors of damaged files name the file, whatever their reader raises."""

import json
import re

import numpy as np
import pytest

from slm.base import files


@pytest.mark.parametrize(
  ('error', 'said'),
  [
    (ValueError('two\nlines'), 'truncated or damaged (two lines)'),
    (KeyError('type'), "truncated or damaged (lacks 'type')"),
    (IndexError('list index out of range'), 'damaged (IndexError: list index out of range)'),
    (RecursionError('maximum'), 'damaged (nested too deeply)'),
    (type('LibraryError', (Exception,), {})('no header'), 'damaged (LibraryError: no header)'),
  ],
)
def test_every_error_of_a_reader_names_the_file(tmp_path, error, said):
  path = tmp_path / 'x.json'
  with pytest.raises(ValueError, match=re.escape(f'{path}: ')) as caught, files.reading(path):
    raise error
  assert said in str(caught.value) and '\n' not in str(caught.value)
  with pytest.raises(ValueError, match='x.json: not a list'), files.reading(path, 'a list'):
    raise error


def test_errors_that_name_the_file_or_are_the_systems_pass(tmp_path):
  with pytest.raises(ValueError, match='^x: line 3$'), files.reading('x', 'a list'):
    raise ValueError('x: line 3')
  with pytest.raises(FileNotFoundError, match='none: no such file'):
    files.read_json(tmp_path / 'none')


@pytest.mark.parametrize('text', ['[' * 100_000, '{"a": ', '\ufeff{}', b'{"a": "\xff"}', ''])
def test_damaged_json_is_one_line(tmp_path, text):
  path = tmp_path / 'x.json'
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(ValueError, match='x.json: truncated or damaged') as caught:
    files.read_json(path)
  assert '\n' not in str(caught.value)


def test_damaged_arrays_are_one_line(tmp_path):
  path = tmp_path / 'x.npy'
  files.write_npy(path, np.arange(9))
  whole = path.read_bytes()
  for damaged in (b'', whole[:5], whole[:-1], json.dumps({}).encode()):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match='x.npy: truncated or damaged'):
      files.read_npy(path)


@pytest.mark.parametrize('shape', [(12, 2), (7,), (0, 2)])
def test_an_array_in_parts_is_the_same_file(tmp_path, shape):
  array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
  files.write_npy(tmp_path / 'whole.npy', array)
  files.write_npy_parts(tmp_path / 'parts.npy', shape, array.dtype, [array[:3], array[3:]])
  assert (tmp_path / 'parts.npy').read_bytes() == (tmp_path / 'whole.npy').read_bytes()
  parts = [*files.read_npy_parts(tmp_path / 'parts.npy', 5)]
  np.testing.assert_array_equal(np.concatenate([array[:0], *parts]), array)
  with pytest.raises(ValueError, match=r'parts.npy: expected \d+ entries, found'):
    files.write_npy_parts(tmp_path / 'parts.npy', (99, *shape[1:]), array.dtype, [array])
