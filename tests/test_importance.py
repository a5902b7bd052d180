"""Importance sampling: histograms, repeats, caps, closed forms, nested sets."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import toy

from slm.data import importance, loader

CLUSTERS = np.repeat([0, 1, 2, 3], [50, 30, 15, 5])
TARGET = np.array([10.0, 0.0, 30.0, 60.0])


def drawn(ids: np.ndarray) -> np.ndarray:
  return np.bincount(CLUSTERS[ids], minlength=4)


def test_histogram_matches_the_target():
  ids = importance.resample(TARGET, CLUSTERS, 1000, 0)
  np.testing.assert_array_equal(drawn(ids), [100, 0, 300, 600])


def test_windows_drawn_match_whatever_rows_hold():
  windows = np.array([1, 4, 2, 10])[CLUSTERS]
  ids = importance.resample(TARGET, CLUSTERS, 1350, 0, windows=windows)
  counts = np.bincount(CLUSTERS[ids], windows[ids], minlength=4)
  np.testing.assert_allclose(counts / counts.sum(), TARGET / 100, atol=0.005)
  mixed = np.random.default_rng(0).integers(1, 9, 100) * (CLUSTERS + 1)  # within clusters too
  ids = importance.resample(TARGET, CLUSTERS, 3000, 0, windows=mixed)
  counts = np.bincount(CLUSTERS[ids], mixed[ids], minlength=4)
  np.testing.assert_allclose(counts / counts.sum(), TARGET / 100, atol=0.01)


def test_interpolation_is_over_windows():
  windows = np.array([1, 4, 2, 10])[CLUSTERS]
  ids = importance.resample(TARGET, CLUSTERS, 2000, 0, interpolation=1.0, windows=windows)
  np.testing.assert_array_equal(drawn(ids), [1000, 600, 300, 100])  # the generic rows themselves


def test_no_repeats_before_exhaustion():
  ids = importance.resample(TARGET, CLUSTERS, 173, 0)
  for c, size in enumerate([50, 30, 15, 5]):
    chosen = ids[CLUSTERS[ids] == c]
    for start in range(0, len(chosen), size):
      part = chosen[start : start + size]
      assert len(np.unique(part)) == len(part)


def test_seed_decides():
  a, b, c = (importance.resample(TARGET, CLUSTERS, 80, seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()


def test_repeat_cap_is_respected_and_mass_moves():
  ids = importance.resample(TARGET, CLUSTERS, 100, 0, repeat_cap=2.0)
  counts = drawn(ids)
  assert len(ids) == 100 and counts[3] == 10 and counts[2] == 30 and counts[0] == 60
  with pytest.raises(ValueError, match='repeat_cap=1 allows 70'):
    importance.resample(TARGET, CLUSTERS, 100, 0, repeat_cap=1.0)


def test_smoothing_and_interpolation():
  generic = np.array([50.0, 30, 15, 5])
  np.testing.assert_allclose(importance.target(TARGET, generic, 25.0, 0.0), (TARGET + 25) / 200)
  np.testing.assert_allclose(importance.target(TARGET, generic, 0.0, 1.0), generic / 100)
  with pytest.raises(ValueError, match='smoothing >= 0'):
    importance.target(TARGET, generic, -1.0, 0.0)


def test_clusters_without_generic_rows_are_left_out():
  p = importance.target(np.array([1.0, 1.0]), np.array([4.0, 0.0]), 0.0, 0.0)
  np.testing.assert_array_equal(p, [1, 0])
  with pytest.raises(ValueError, match='no generic row'):
    importance.target(np.array([0.0, 1.0]), np.array([4.0, 0.0]), 0.0, 0.0)


def test_diagnostics_have_closed_forms():
  p, g = np.array([0.5, 0.5, 0, 0]), np.full(4, 0.25)
  values = importance.diagnostics(p, g)
  assert values['ess_fraction'] == pytest.approx(0.5)
  assert values['effective_clusters'] == pytest.approx(2)
  assert values['entropy'] == pytest.approx(np.log(2))
  chi2 = ((TARGET / 100 - [0.5, 0.3, 0.15, 0.05]) ** 2 / [0.5, 0.3, 0.15, 0.05]).sum()
  values = importance.diagnostics(TARGET, np.bincount(CLUSTERS))
  assert values['ess_fraction'] == pytest.approx(1 / (1 + chi2))
  lost = importance.diagnostics(np.array([1.0, 3.0]), np.array([1.0, 0.0]))
  assert lost['ess_fraction'] == 0 and lost['mass_without_generic_rows'] == 0.75


def test_nested_sets_are_nested():
  tokens = np.random.default_rng(0).integers(50, 256, 400)
  small, large = (importance.nested(tokens, n, 3) for n in (5_000, 20_000))
  np.testing.assert_array_equal(large[: len(small)], small)
  assert 5_000 <= tokens[small].sum() < 5_256
  with pytest.raises(ValueError, match='10000000 tokens requested'):
    importance.nested(tokens, 10_000_000, 3)


def test_prepared_nested_sets_state_their_tokens():
  root = pathlib.Path(toy.prepared()) / 'index'
  counts = np.load(root.parent / 'law/train/counts.npy')
  previous = None
  for size in (500, 2000):
    ids, record = (
      np.load(root / f'law-{size}.npy'),
      json.loads((root / f'law-{size}.json').read_text()),
    )
    assert record['tokens'] == counts[ids, 1].sum() >= size
    assert previous is None or (ids[: len(previous)] == previous).all()
    previous = ids


def test_entry_point_writes_an_index_the_loader_reads():
  path = toy.prepared()
  command = [sys.executable, '-m', 'slm.data.importance', f'--data={path}']
  command += ['--on=law/train@law-2000', '--level=8', '--tokens=200000', '--out=law-is']
  subprocess.run(command, check=True, capture_output=True)
  record = json.loads((pathlib.Path(path) / 'index/law-is.json').read_text())
  assert record['tokens'] == pytest.approx(200_000, rel=0.02)
  generic = loader.Split(path, 'generic', 'train', 'law-is', 8)
  p = loader.histogram(path, 'law', 'train', 8, 'law-2000')
  q = loader.histogram(path, 'generic', 'train', 8, 'law-is')
  np.testing.assert_allclose(
    q, p, atol=0.003
  )  # in windows; many passes even out the choice of rows
  drawn, rows = (
    np.bincount(c, minlength=8) for c in (generic.clusters[generic.ids], generic.clusters)
  )
  np.testing.assert_allclose(record['made']['expected_repeats'], drawn / np.maximum(rows, 1))
  bad = subprocess.run([*command, '--level=3'], capture_output=True, text=True)
  assert bad.returncode == 1 and 'no level 3; there are: 2, 8' in bad.stderr
  for flag in ('--level=0', '--tokens=inf'):
    bad = subprocess.run([*command, flag], capture_output=True, text=True)
    assert bad.returncode == 1 and f'error: {flag[2:]}: expected' in bad.stderr


def request(out: str, **changes) -> importance.Request:
  fields = dict(data=toy.prepared(), domain='law', level=8, tokens=5000, out=out)
  return importance.Request(**fields | changes)


def test_top_takes_the_most_frequent_cluster_alone():
  path = toy.prepared()
  importance.sample(request('law-top', top=True))
  split = loader.Split(path, 'generic', 'train', 'law-top', 8)
  assert set(split.clusters[split.ids]) == {int(loader.histogram(path, 'law', 'train', 8).argmax())}


def test_a_name_stands_for_one_index():
  once = request('law-once')
  assert importance.sample(once) == importance.sample(once)
  with pytest.raises(ValueError, match=r'law-once.json: another index has this name \(seed was 0'):
    importance.sample(dataclasses.replace(once, seed=1))
