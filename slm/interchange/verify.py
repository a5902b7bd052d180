"""Compare a model as it is computed here with what transformers, and a run, make of the same texts.

Logits are compared in float32, and the ids that texts become.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm import models
from slm.base import console
from slm.data import tokenizer
from slm.interchange import convert, tokenizer_files
from slm.models.decoder import unembed
from slm.runs import load, rundir
from slm.weights import sharding, tree

Batch = tuple[np.ndarray, np.ndarray]  # (ids, mask) [b,t]
Logits = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (ids, mask) -> [b,t,v]
Reader = Callable[[str], list[int]]  # text -> ids
LENGTHS = (3, 64, 600)  # RoPE scaling and windows show on long texts alone
# What tokenizers do differently if they do: spaces, line ends, characters of several bytes, digits.
# None has U+2581, SentencePiece's sign for a space, which transformers takes for one.
TEXTS = (
  '', 'a', ' ', ' a space before', 'two  spaces,\ttabs\n\nand lines\r\n ', "it's John's 1234567",
  'naïve café, 漢字かな, Ελληνικά, \u0627\u0644', '👩🏽\u200d💻 \x00 \u200b',
  'x = {"a": [1, 2.50]}  # no',
)  # fmt: skip


class Side(NamedTuple):
  """A model as somebody computes it; `read` is None without a tokenizer."""

  logits: Logits
  read: Reader | None


def prompts(vocab: int, seed: int = 0) -> list[Batch]:
  """Draw (ids, mask) [b,t]: a text of each length, then a batch padded on the left.

  Lengths beyond the context a model was trained with are tested too: rotary positions go on.
  """
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.integers(0, vocab, shape).astype(np.int32)
  found = [(draw(1, n), np.ones((1, n), np.int32)) for n in LENGTHS]
  t = LENGTHS[1]
  mask = (np.arange(t) >= np.array([0, t // 3, t - 1])[:, None]).astype(np.int32)
  return [*found, (draw(3, t), mask)]


def ours(path: Path) -> tuple[Side, int, str]:
  """Return a directory as it is computed here, its vocabulary and its tensors' type."""
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  model, params, _, dtype, _ = convert.read(path, mesh, 'float32')
  read = None
  if tokenizer_files.is_there(tokenizer_files.read(path)):
    tok = tokenizer.load(path)
    read = _reader(tok, [tok.ids.bos] if tok.begins else [])
  return Side(_logits(model, params), read), model.cfg.vocab, dtype


def native(run: Path, dtype: str) -> Side:
  """Return a run as it is, its weights rounded to the type they were exported in.

  Raises:
    ValueError: if it is not finished, or holds several specialists.
  """
  loaded = load.load(run, load.mesh_for(run), finished=True)
  try:
    read = _reader(*load.reads(loaded))
  except FileNotFoundError:  # its data are gone, or it has none
    read = None
  model, rounded = loaded.model, tree.cast(loaded.params(), jnp.dtype(dtype))
  del loaded  # and its weights with it
  return Side(_logits(model, tree.cast(rounded, jnp.dtype('float32'))), read)


def _reader(tok: tokenizer.Tokenizer, begin: Sequence[int]) -> Reader:
  return lambda text: [*begin, *tok.encode(text)]


def _logits(model: models.Model, params: Any) -> Logits:
  @jax.jit
  def logits(params, ids, mask):
    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    batch = {'inputs': ids, 'positions': positions, 'segments': mask}
    return unembed(params, model.forward(params, batch))

  return lambda ids, mask: np.asarray(logits(params, ids, mask))


def theirs(path: Path) -> Side:
  """Return a directory as transformers computes it; no code of the directory is run.

  Raises:
    ValueError: if transformers is not installed, or does not load the directory.
  """
  model = _from_transformers(
    'AutoModelForCausalLM', path, dtype='float32', use_safetensors=True, attn_implementation='eager'
  ).eval()
  import torch

  def logits(ids, mask):
    ids, mask = (torch.tensor(x).long() for x in (ids, mask))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
      return model(ids, attention_mask=mask, position_ids=positions).logits.numpy()

  if not tokenizer_files.is_there(tokenizer_files.read(path)):
    return Side(logits, None)
  tok = _from_transformers('AutoTokenizer', path)
  return Side(logits, lambda text: tok(text).input_ids)


def _from_transformers(kind: str, path: Path, **how: Any) -> Any:
  """Load a directory by a class of transformers, without the network or code of its own.

  Raises:
    ValueError: if transformers is not installed, or does not load the directory.
  """
  try:
    import torch  # noqa: F401  (without it transformers has no models)
    import transformers
  except ImportError:
    raise ValueError("verify needs transformers and torch: pip install 'slm[hf]'") from None
  try:
    return getattr(transformers, kind).from_pretrained(
      path, local_files_only=True, trust_remote_code=False, **how
    )
  except Exception as e:  # noqa: BLE001 (it raises whatever its parts do)
    text = (str(e).splitlines() or [type(e).__name__])[0]
    raise ValueError(f'{path}: transformers does not load it ({text})') from None


def verify(paths: Sequence[str | Path], tolerance: float) -> float:
  """Print and return the largest difference of logits, relative to the largest logit.

  The first directory is computed here and by transformers; another directory of transformers by
  transformers, and a run as the model that it is here. Their weights are held one after the other.
  Texts are compared by the ids that each makes of them.

  Raises:
    ValueError: if a directory cannot be loaded, the vocabularies differ, or a text becomes other
      ids, naming the first.
  """
  first, *others = (Path(p) for p in paths)
  side, vocab, dtype = ours(first)
  sides: dict[str, Callable[[], Side]] = {}
  for path in (first, *others):
    if rundir.of_transformers(path):
      sides[f'transformers on {path}'] = functools.partial(theirs, path)
    else:
      sides[f'the run {path}'] = functools.partial(native, path, dtype)
  batches, here = prompts(vocab), []
  with console.progress(f'compute {first.name}', len(batches), 'batches') as progress:
    for batch in batches:
      here.append(side.logits(*batch))
      progress.update(1)
  read = side.read
  del side  # and the weights with it
  worst, difference = 0.0, ''
  for name, open_side in sides.items():
    there = open_side()
    difference = difference or _compare_texts(first, read, name, there.read)
    worst = max(worst, _compare_logits(batches, here, name, there.logits, tolerance))
    del there
  if read and read(''):
    print("rolling likelihoods of lm-evaluation-harness's own `hf` model score the begin token too")
  if difference:
    raise ValueError(difference)
  return worst


def _compare_logits(
  batches: list[Batch], here: list[np.ndarray], name: str, logits: Logits, tolerance: float
) -> float:
  """Print how far the logits of each batch are from those computed here; return the farthest."""
  worst = 0.0
  for (ids, mask), got in zip(batches, here, strict=True):
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
      f'of the largest logit ({apart:.2e}), same best token {same:.1%}  {verdict}',
      flush=True,
    )
    worst = max(worst, float(gap))
  return worst


def _compare_texts(path: Path, here: Reader | None, name: str, there: Reader | None) -> str:
  """Print whether texts become the same ids there as here; return the first difference, or ''.

  Beside `TEXTS`, each special token inside a text is read. A begin token is part of the ids. An end
  token that a tokenizer puts after every text is said, and no difference: prompts have none.
  """
  if not (here and there):
    print(f'texts, {name}: not compared, there is no tokenizer')
    return ''
  begin, tail = here(''), there('')[len(here('')) :]
  tail = tail if there('a')[-len(tail) :] == tail else []
  texts = [*TEXTS, *(f'{t}a {t}b' for t in tokenizer_files.special(path))]
  for text in texts:
    want, got = there(text), here(text)
    if want != [*got, *tail]:
      print(f'texts, {name}: {text!r}  DIFFERS')
      short = lambda ids: f'{ids[:12]}{", ..." * (len(ids) > 12)}'
      return f'{path}: the text {text!r} is {short(want)} for {name}, and {short(got)} here'
  start = f'begun by the id {begin[0]}' if begin else 'without a begin token'
  end = f', there followed by {tail}' if tail else ''
  print(f'texts, {name}: {len(texts)} are the same ids, {start}{end}  ok')
  return ''
