"""Talking with a model by its own chat template."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.data import chat, tokenizer
from slm.models.decode import Sampler, follow
from slm.models.decoder import init_cache
from slm.runs import load
from slm.weights import tree
from slm.weights.axes import Params

_PIECE = 64  # tokens of a prompt that are read at once
_SHORTEST = 512  # tokens that the first cache has room for


class Chat:
  """A conversation; what its turns have in common is read once.

  Raises:
    ValueError: if the tokenizer has no chat template.
  """

  def __init__(
    self, loaded: load.Loaded, params: Params, tok: tokenizer.Tokenizer, sampler: Sampler, seed: int
  ):
    if not tok.chat_template:
      raise ValueError(f'{load.tokenizer_of(loaded)}: holds no chat template, and --chat needs one')
    self._model, self._context = loaded.model, loaded.cfg.context
    self._params = tree.cast(params, jnp.dtype(loaded.cfg.dtype))
    self._tok = tok
    self._sampler, self._key = sampler, jax.random.key(seed)
    self._cache, self._read = self._empty(_SHORTEST), []

  def answer(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Iterator[str]:
    """Yield the model's answer to messages, piece by piece.

    Raises:
      ValueError: if the template refuses the messages, or they leave no room in the context.
    """
    special = {f'{name}_token': text for name, text in self._tok.special().items()}
    text = chat.render(messages, self._tok.chat_template, add_generation_prompt=True, **special)
    prompt = self._tok.encode(text)
    room = self._context - len(prompt)
    if room < 1:
      raise ValueError(f'the conversation has {len(prompt)} tokens, the context {self._context}')
    shown, said = '', []
    next_id = self._follow(prompt)
    while next_id not in self._tok.ends and len(said) < min(max_tokens, room):
      said.append(next_id)
      text = self._tok.continued(prompt, said)
      if not text.endswith('\ufffd'):  # the rest of a character is still to come
        yield text[len(shown) :]
        shown = text
      next_id = self._follow([*prompt, *said])
    yield self._tok.continued(prompt, said)[len(shown) :]

  def _follow(self, ids: list[int]) -> int:
    """Read those of ids that were not read before, and choose the next."""
    common = len(os.path.commonprefix([self._read, ids[:-1]]))
    length = self._cache['segments'].shape[1]
    if len(ids) + _PIECE > length:
      larger = self._empty(2 ** (len(ids) + 2 * _PIECE).bit_length())
      put = lambda new, old: new.at[tuple(slice(n) for n in old.shape)].set(old)
      self._cache = jax.tree.map(put, larger, self._cache)
    self._cache['index'] = jnp.asarray(common, jnp.int32)
    size = 1 if len(ids) - common == 1 else _PIECE
    for start in range(common, len(ids), size):
      piece = ids[start : start + size]
      padded = np.zeros((1, size), np.int32)
      padded[0, : len(piece)] = piece
      key = jax.random.fold_in(self._key, start + len(piece))
      chosen, self._cache = follow(
        self._model, self._params, self._cache, padded, len(piece), key, sampler=self._sampler,
        known=self._tok.known,
      )  # fmt: skip
    self._read = ids
    return int(chosen[0])

  def _empty(self, length: int) -> dict[str, jax.Array]:
    return init_cache(self._model.cfg, 1, length, self._params['embedding'].dtype)
