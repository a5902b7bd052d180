"""The paired bootstrap against scipy, an explicit loop, and known differences."""

import numpy as np
import scipy.stats

from slm.reporting.stats import RESAMPLES, resample


def test_bootstrap_agrees_with_scipy():
  rng = np.random.default_rng(0)
  tokens = rng.integers(20, 256, 200).astype(float)
  a = (3 + rng.normal(0, 0.4, 200)) * tokens
  b = a + rng.normal(0.02, 0.1, 200) * tokens
  losses = resample(np.stack([a, b], 1), tokens, seed=0, resamples=5000)
  ours = np.percentile(losses[:, 0] - losses[:, 1], [2.5, 97.5])
  theirs = scipy.stats.bootstrap(
    (a, b, tokens),
    lambda a, b, t, axis=-1: (a - b).sum(axis) / t.sum(axis),
    paired=True, n_resamples=5000, method='percentile', vectorized=True, rng=1,
  ).confidence_interval  # fmt: skip
  np.testing.assert_allclose(ours, theirs, atol=0.1 * (theirs.high - theirs.low))
  # Unpaired, the difficulty of the rows would hide the difference.
  assert ours[1] - ours[0] < 0.4 * np.diff(np.percentile(losses[:, 0], [2.5, 97.5]))[0]


def test_bootstrap_of_documents_agrees_with_a_loop():
  rng = np.random.default_rng(5)
  documents = np.repeat([7, 3, 11, 2, 40], [4, 1, 6, 2, 3])
  tokens = rng.integers(20, 256, len(documents)).astype(float)
  nll = rng.normal(3, 0.4, (len(documents), 2)) * tokens[:, None]
  draws, expected = np.random.default_rng(9).integers(5, size=(50, 5)), []
  for draw in draws:
    names = [sorted(set(documents))[i] for i in draw]
    rows = [row for name in names for row in range(len(documents)) if documents[row] == name]
    expected.append(nll[rows].sum(0) / tokens[rows].sum())
  np.testing.assert_allclose(resample(nll, tokens, 9, 50, documents), expected, rtol=1e-12)
  alone = resample(nll, tokens, 9, 50, np.arange(len(tokens)))
  np.testing.assert_allclose(alone, resample(nll, tokens, 9, 50), rtol=1e-12)


def test_bootstrap_covers_the_truth():
  rng, inside, trials = np.random.default_rng(3), 0, 200
  for trial in range(trials):
    tokens = rng.integers(20, 256, 150).astype(float)
    delta = rng.normal(0.05, 0.2, (150, 1)) * tokens[:, None]
    low, high = np.percentile(resample(delta, tokens, trial, 500), [2.5, 97.5])
    inside += low <= 0.05 <= high
  assert 0.89 <= inside / trials <= 0.99


def test_bootstrap_is_seeded_and_chunking_changes_nothing_but_speed():
  tokens = np.full(5000, 10.0)
  nll = np.random.default_rng(0).normal(30, 3, (5000, 2))
  losses = resample(nll, tokens, seed=4)
  assert losses.shape == (RESAMPLES, 2)
  np.testing.assert_array_equal(losses, resample(nll, tokens, seed=4))
  np.testing.assert_allclose(losses.std(0), nll.std(0) / 10 / 5000**0.5, rtol=0.1)
