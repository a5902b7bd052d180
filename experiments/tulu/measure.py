"""What the study measures of a run: rewards of its answers, scores of pairs, losses of rows."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.base import files
from slm.data import loader, sources
from slm.inference import rewards, verifiers
from slm.models.decode import greedy
from slm.objectives import answers, losses, preference, reference
from slm.runs import load
from slm.runs.config import DpoConfig, PolicyConfig

_BATCH = 128  # prompts or rows
Mesh = jax.sharding.Mesh


@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers to the prompts of a split.

  Attributes:
    rewards: by family of verifiers, [prompts, 1 + samples]: of the greedy answer, then of drawn
      ones; 1 if all checks of a prompt pass, else 0.
    kl: log p - log p of the start, nats per drawn answer [prompts, samples]; empty without a start.
    texts: of all answers, in the order of the rewards.
  """

  rewards: dict[str, np.ndarray]
  kl: np.ndarray
  texts: list[list[str]]


def pass_at(k: int, passed: np.ndarray) -> np.ndarray:
  """Estimate without bias whether one of k answers passes, from n >= k: [prompts,n] -> [prompts].

  1 - C(n - c, k) / C(n, k), with c that pass (Chen et al. 2021, arXiv 2107.03374).
  """
  n = passed.shape[1]
  return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in passed.sum(1)])


def answer(
  run: Path, start: Path | None, data: str, on: str, labels: Mapping[str, Sequence[Any]],
  samples: int, max_tokens: int, mesh: Mesh,
) -> Answers:  # fmt: skip
  """Answer the prompts of 'set/split' greedily and by `samples` draws, the same for every run.

  labels: by family of verifiers, the label of each prompt, in the order of the rows.
  """
  loaded = load.load(run, mesh, finished=True)
  params, model = loaded.params(), loaded.model
  ref = load.load(start, mesh, finished=True).params() if start else None
  tok, _ = load.reads(loaded, data)
  cfg = PolicyConfig(samples=max(samples, 2), max_tokens=max_tokens)
  key = jax.random.key(0)

  @jax.jit
  def respond(params, ref, batch):
    how = ((1, greedy), (samples, None))
    parts = [answers.draw(cfg, model, tok, params, batch, key, n, by) for n, by in how]
    out = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    if ref is None:
      return out, None
    rows = answers.rows(batch, parts[1])
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()}
    before = losses.target_logprobs(model.forward, ref, flat, cfg.chunk)
    moved = jnp.sum((flat['old'] - before) * flat['weights'], axis=-1)
    return out, moved.reshape(rows['inputs'].shape[:2])

  texts, kl = [], []
  split = on.split('/')
  with jax.set_mesh(mesh):
    for _, ids, batch in loader.evaluation_batches(data, *split, _BATCH):
      here, real = {'inputs': batch['inputs'], 'length': batch['length'].reshape(-1)}, ids >= 0
      out, moved = respond(params, ref, {**here, 'row': np.maximum(ids, 0).astype(np.int32)})
      out = jax.tree.map(np.asarray, out)
      said = answers.texts(tok, here, out)
      size = samples + 1
      texts += [said[i * size : (i + 1) * size] for i in np.flatnonzero(real)]
      if moved is not None:
        kl.append(np.asarray(moved)[real])
  return Answers(
    {name: _passes(found, texts) for name, found in labels.items()},
    np.concatenate(kl) if kl else np.zeros((0, samples)),
    texts,
  )


def _passes(labels: Sequence[Any], texts: Sequence[Sequence[str]]) -> np.ndarray:
  """Return which texts of each prompt satisfy all checks of its label, float [prompts,n]."""
  grade, width = rewards.reward(labels), len(texts[0])
  rows = np.repeat(np.arange(len(texts)), width).tolist()
  values = grade(rows, [x for found in texts for x in found])
  full = np.array([sum(c.get('weight', 1.0) for c in label) for label in labels])
  return (np.array(values).reshape(-1, width) >= full[:, None] - 1e-6).astype(float)


def pairs(run: Path, data: str, on: str, kind: str, mesh: Mesh) -> np.ndarray:
  """Return the scores of the chosen and rejected answer of all pairs of 'set/split': [pairs,2].

  kind: 'norm', the mean log-probability of an answer's tokens, or 'plain', their sum.
  """
  loaded, judged = load.load(run, mesh, finished=True), DpoConfig(kind=kind)
  where = dict(zip(('set', 'split'), on.split('/'), strict=True))
  cfg = dataclasses.replace(
    loaded.cfg,
    data=dataclasses.replace(loaded.cfg.data, path=data),
    eval=dataclasses.replace(loaded.cfg.eval, **where, max_rows=0),
  )

  def scores(params, beside, batch):
    logprobs = losses.target_logprobs(loaded.model.forward, params, batch, judged.chunk)
    return preference.scores(judged, logprobs, batch)

  evaluate = reference.Evaluator(cfg, judged, scores, loaded.reparam, mesh)
  with jax.set_mesh(mesh):
    return evaluate.pairs(lambda _: loaded.params(), {})[:, :2]


def lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yield (line number, record) of a file of JSON lines."""
  return sources.records(str(path))


def label(cell: Mapping[str, Any]) -> str:
  """Name settings of a grid: beta5-peak0.001."""
  return '-'.join(f'{key.rpartition(".")[2]}{value:g}' for key, value in cell.items())


def passes(checks: Sequence[Mapping[str, Any]], text: str) -> bool:
  """Return whether a text satisfies all checks."""
  return all(v.value >= 1 for v in verifiers.score(text, verifiers.read(checks)).verdicts)


def keep(path: Path, make: Callable[[], Any]) -> None:
  """Write what `make` gives as arrays, and texts beside them, unless the file is there."""
  if path.exists():
    return
  found = make()
  if isinstance(found, Answers):
    files.write_json(path.with_suffix('.json'), found.texts)
    found = {**found.rewards, 'kl': found.kl}
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.replacing(path) as part, part.open('wb') as f:
    np.savez(f, **found)


def read(path: Path) -> dict[str, np.ndarray]:
  """Read what `keep` wrote."""
  with np.load(path) as found:
    return dict(found)
