"""Compare a model as slm computes it with transformers and with a run: logits and token ids."""

import importlib.util
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
from slm.weights.axes import Params

Batch = tuple[np.ndarray, np.ndarray]  # (ids, mask) [b,t]
Logits = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (ids, mask) -> [b,t,v] in float32
Encode = Callable[[str], list[int]]  # text -> ids, with the begin token
LENGTHS = (3, 64, 600)  # RoPE scaling and windows need long texts to show
# Texts that tokenizers are known to differ on: spaces, line ends, multi-byte characters, digits.
# None contains U+2581, SentencePiece's space symbol: transformers reads it as a space.
TEXTS = (
  '', 'a', ' ', ' a space before', 'two  spaces,\ttabs\n\nand lines\r\n ', "it's John's 1234567",
  'naïve café, 漢字かな, Ελληνικά, \u0627\u0644', '👩🏽\u200d💻 \x00 \u200b',
  'x = {"a": [1, 2.50]}  # no',
)  # fmt: skip


class Side(NamedTuple):
  """One of the models compared; `encode` is None without a tokenizer."""

  logits: Logits
  encode: Encode | None


def prompts(vocab: int) -> list[Batch]:
  """Draw a batch of one row for each of LENGTHS, and one of three rows padded on the left.

  A length may exceed the context that the model was trained with: rotary positions continue.
  """
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.integers(0, vocab, shape).astype(np.int32)
  batches = [(draw(1, n), np.ones((1, n), np.int32)) for n in LENGTHS]
  t = LENGTHS[1]
  mask = (np.arange(t) >= np.array([0, t // 3, t - 1])[:, None]).astype(np.int32)
  return [*batches, (draw(3, t), mask)]


def slm_side(path: Path) -> tuple[Side, int, str]:
  """Load a directory of transformers; return it, its vocabulary size and its tensors' type."""
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  model, params, _, dtype, _ = convert.read(path, mesh, 'float32')
  encode = None
  if tokenizer_files.has_tokenizer(tokenizer_files.read(path)):
    tok = tokenizer.load(path)
    encode = _encoder(tok, tok.begin)
  return Side(_logits(model, params), encode), model.cfg.vocab, dtype


def run_side(run: Path, dtype: str) -> Side:
  """Load a run, its weights rounded to the type of the export it is compared with.

  Raises:
    ValueError: if the run is unfinished or holds several specialists.
  """
  loaded = load.load(run, load.mesh_for(run), finished=True)
  try:
    encode = _encoder(*load.reads(loaded))
  except FileNotFoundError:  # no tokenizer, or its data directory is gone
    encode = None
  model, rounded = loaded.model, tree.cast(loaded.params(), jnp.dtype(dtype))
  del loaded  # frees its weights
  return Side(_logits(model, tree.cast(rounded, jnp.dtype('float32'))), encode)


def _encoder(tok: tokenizer.Tokenizer, begin: Sequence[int]) -> Encode:
  return lambda text: [*begin, *tok.encode(text)]


def _logits(model: models.Model, params: Params) -> Logits:
  @jax.jit
  def logits(params, ids, mask):
    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    batch = {'inputs': ids, 'positions': positions, 'segments': mask}
    # Unless told, a GPU or TPU multiplies float32 with the precision of TF32 or bfloat16.
    with jax.default_matmul_precision('highest'):
      return unembed(params, model.forward(params, batch))

  return lambda ids, mask: np.asarray(logits(params, ids, mask))


def available() -> bool:
  """Return whether transformers and torch are installed."""
  return bool(importlib.util.find_spec('transformers') and importlib.util.find_spec('torch'))


def transformers_side(path: Path) -> Side:
  """Load a directory with transformers, which runs no code of the directory.

  Raises:
    ValueError: if transformers is not installed or does not load the directory.
  """
  try:
    import torch
    import transformers
  except ImportError:
    raise ValueError("verify needs transformers and torch: pip install 'slm[hf]'") from None

  def from_pretrained(auto_class: Any, **options: Any) -> Any:
    try:
      return auto_class.from_pretrained(
        path, local_files_only=True, trust_remote_code=False, **options
      )
    except Exception as e:  # noqa: BLE001 (any class, depending on the part that fails)
      text = (str(e).splitlines() or [type(e).__name__])[0]
      raise ValueError(f'{path}: transformers does not load it ({text})') from None

  model = from_pretrained(
    transformers.AutoModelForCausalLM,
    dtype='float32',
    use_safetensors=True,
    attn_implementation='eager',
  ).eval()

  def logits(ids, mask):
    ids, mask = (torch.tensor(x).long() for x in (ids, mask))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
      return model(ids, attention_mask=mask, position_ids=positions).logits.numpy()

  if not tokenizer_files.has_tokenizer(tokenizer_files.read(path)):
    return Side(logits, None)
  tok = from_pretrained(transformers.AutoTokenizer)
  return Side(logits, lambda text: tok(text).input_ids)


def verify(paths: Sequence[str | Path], tolerance: float) -> float:
  """Print the differences between models, and return the largest, relative to the largest logit.

  The first directory, as slm computes it, is compared with itself in transformers, and with the
  second: another directory in transformers, or a run. One model is in memory at a time.

  Raises:
    ValueError: if a directory cannot be loaded, vocabularies differ, or a text has other ids.
  """
  paths = [Path(path) for path in paths]
  first = paths[0]
  side, vocab, dtype = slm_side(first)
  of_transformers = [rundir.of_transformers(path) for path in paths]
  batches, logits = prompts(vocab), []
  with console.Progress(f'compute {first.name}', len(batches), 'batches') as progress:
    for batch in batches:
      logits.append(side.logits(*batch))
      progress.update(1)
  encode = side.encode
  del side  # frees its weights
  largest, difference = 0.0, ''
  for path, is_hf in zip(paths, of_transformers, strict=True):
    name = f'transformers on {path}' if is_hf else f'the run {path}'
    other = transformers_side(path) if is_hf else run_side(path, dtype)
    difference = difference or _compare_texts(first, encode, name, other.encode)
    largest = max(largest, _compare_logits(batches, logits, name, other.logits, tolerance))
    del other
  if encode and encode(''):
    print("rolling likelihoods of lm-evaluation-harness's own `hf` model score the begin token too")
  if difference:
    raise ValueError(difference)
  return largest


def _compare_logits(
  batches: list[Batch], ours: list[np.ndarray], name: str, logits: Logits, tolerance: float
) -> float:
  """Print how another model's logits differ from ours; return the largest relative difference."""
  largest = 0.0
  for (ids, mask), got in zip(batches, ours, strict=True):
    want = logits(ids, mask)
    if want.shape != got.shape:
      raise ValueError(f'{name}: logits of shape {want.shape}, here {got.shape}')
    absolute = np.abs(want - got)[mask > 0].max()
    relative = absolute / np.abs(want[mask > 0]).max()
    relative = float(relative) if np.isfinite(relative) else np.inf
    same = np.mean((want.argmax(-1) == got.argmax(-1))[mask > 0])
    print(
      f'{ids.shape[0]} x {ids.shape[1]:4d} tokens, {name}: largest difference {relative:.2e} '
      f'of the largest logit ({absolute:.2e}), same best token {same:.1%}  '
      f'{"ok" if relative <= tolerance else "DIFFERS"}',
      flush=True,
    )
    largest = max(largest, relative)
  return largest


def _compare_texts(path: Path, ours: Encode | None, name: str, other: Encode | None) -> str:
  """Print whether another model encodes texts as ours; describe the first difference, or ''.

  The texts are TEXTS and one around each special token. End tokens that a tokenizer adds to every
  text are reported and are no difference: prompts have none.
  """
  if not (ours and other):
    print(f'texts, {name}: not compared, there is no tokenizer')
    return ''
  begin, end = ours(''), other('')[len(ours('')) :]
  end = end if other('a')[-len(end) :] == end else []
  texts = [*TEXTS, *(f'{token}a {token}b' for token in tokenizer_files.special(path))]
  for text in texts:
    want, got = other(text), ours(text)
    if want != [*got, *end]:
      print(f'texts, {name}: {text!r}  DIFFERS')
      short = lambda ids: f'{ids[:12]}{", ..." * (len(ids) > 12)}'
      return f'{path}: the text {text!r} is {short(want)} for {name}, and {short(got)} here'
  start = f'with begin token {begin[0]}' if begin else 'without a begin token'
  added = f'; the other adds {end}' if end else ''
  print(f'texts, {name}: the same ids for {len(texts)} texts, {start}{added}  ok')
  return ''
