"""Does `transformers` compute what is computed here, and what a run does? Logits in float32."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm import models
from slm.interchange import convert
from slm.models.decoder import unembed
from slm.runs import load, rundir
from slm.weights import sharding, tree

Logits = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (ids, mask) [b,t] -> [b,t,v]
LENGTHS = (3, 64, 600)  # RoPE scaling and windows show on long texts alone


def prompts(vocab: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
  """Draw (ids, mask) [b,t]: a text of each length, then a batch padded on the left.

  Lengths beyond the context a model was trained with are tested too: rotary positions go on.
  """
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.integers(0, vocab, shape).astype(np.int32)
  found = [(draw(1, n), np.ones((1, n), np.int32)) for n in LENGTHS]
  t = LENGTHS[1]
  mask = (np.arange(t) >= np.array([0, t // 3, t - 1])[:, None]).astype(np.int32)
  return [*found, (draw(3, t), mask)]


def ours(path: Path) -> tuple[Logits, int, str]:
  """Return logits(ids, mask) of a directory computed here, its vocabulary and tensors' type."""
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  model, params, _, dtype, _ = convert.read(path, mesh, 'float32')
  return _logits(model, params), model.cfg.vocab, dtype


def native(run: Path, dtype: str) -> Logits:
  """Return logits(ids, mask) of a run, its weights rounded to the type they were exported in."""
  loaded = load.load(run, load.mesh_for(run), finished=True)
  rounded = tree.cast(loaded.params(), jnp.dtype(dtype))
  return _logits(loaded.model, tree.cast(rounded, jnp.dtype('float32')))


def _logits(model: models.Model, params: Any) -> Logits:
  @jax.jit
  def logits(params, ids, mask):
    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    batch = {'inputs': ids, 'positions': positions, 'segments': mask}
    return unembed(params, model.forward(params, batch))

  return lambda ids, mask: np.asarray(logits(params, ids, mask))


def theirs(path: Path) -> Logits:
  """Return logits(ids, mask) as transformers computes them; no code of the directory is run.

  Raises:
    ValueError: if transformers is not installed, or does not load the directory.
  """
  try:
    import torch
    import transformers
  except ImportError:
    raise ValueError("verify needs transformers and torch: pip install 'slm[hf]'") from None
  try:
    model = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
      use_safetensors=True, attn_implementation='eager',
    ).eval()  # fmt: skip
  except (OSError, ValueError, KeyError, RuntimeError) as e:
    raise ValueError(f'{path}: transformers does not load it ({str(e).splitlines()[0]})') from None

  def logits(ids, mask):
    ids, mask = (torch.tensor(x).long() for x in (ids, mask))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
      return model(ids, attention_mask=mask, position_ids=positions).logits.numpy()

  return logits


def verify(paths: Sequence[str | Path], tolerance: float) -> float:
  """Print and return the largest difference of logits, relative to the largest logit.

  The first directory is computed here and by transformers; another directory of transformers by
  transformers, and a run as the model that it is here.

  Raises:
    ValueError: if a directory cannot be loaded, or the vocabularies differ.
  """
  first, *others = (Path(p) for p in paths)
  mine, vocab, dtype = ours(first)
  reference = {f'transformers on {first}': theirs(first)}
  for path in others:
    if rundir.of_transformers(path):
      reference[f'transformers on {path}'] = theirs(path)
    else:
      reference[f'the run {path}'] = native(path, dtype)
  worst = 0.0
  for ids, mask in prompts(vocab):
    got = mine(ids, mask)
    for name, logits in reference.items():
      want = logits(ids, mask)
      if want.shape != got.shape:
        raise ValueError(f'{name}: logits of shape {want.shape}, here {got.shape}')
      apart = np.abs(want - got)[mask > 0].max()
      gap = apart / np.abs(want[mask > 0]).max()
      gap = gap if np.isfinite(gap) else np.inf
      same = np.mean((want.argmax(-1) == got.argmax(-1))[mask > 0])
      verdict = 'ok' if gap <= tolerance else 'DIFFERS'
      print(
        f'{ids.shape[0]} x {ids.shape[1]:4d} tokens, {name}: largest difference {gap:.2e} '
        f'of the largest logit ({apart:.2e}), same best token {same:.1%}  {verdict}'
      )
      worst = max(worst, float(gap))
  return worst
