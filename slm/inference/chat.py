"""Conversations with a model by its own chat template."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.data import chat, tokenizer
from slm.models.decode import Sampler, follow
from slm.models.decoder import by_layer, init_cache
from slm.runs import load
from slm.weights import tree
from slm.weights.axes import Params

_PIECE = 64  # tokens of a prompt per forward pass
_SHORTEST = 512  # length of the first cache, in tokens


class Chat:
  """A conversation; the cache keeps the tokens that its turns have in common.

  Raises:
    ValueError: if the tokenizer has no chat template.
  """

  def __init__(
    self, loaded: load.Loaded, params: Params, tok: tokenizer.Tokenizer, sampler: Sampler, seed: int
  ):
    if not tok.chat_template:
      raise ValueError(f'{load.tokenizer_of(loaded)}: holds no chat template, which --chat needs')
    self._model, self._context = loaded.model, loaded.cfg.context
    self._params = by_layer(tree.cast(params, jnp.dtype(loaded.cfg.dtype)))
    self._tok = tok
    self._sampler, self._key = sampler, jax.random.key(seed)
    self._cache, self._cached_ids = self._empty_cache(_SHORTEST), []

  def answer(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Iterator[str]:
    """Yield the model's answer to messages, piece by piece.

    Raises:
      ValueError: if the template refuses the messages, or they leave no room in the context.
    """
    special = chat.variables(self._tok)
    text = chat.render(messages, self._tok.chat_template, add_generation_prompt=True, **special)
    prompt = chat.encode(self._tok, text)
    room = self._context - len(prompt)
    if room < 1:
      raise ValueError(f'the conversation has {len(prompt)} tokens, the context {self._context}')
    shown, answer = '', []
    next_id = self._next(prompt)
    while next_id not in self._tok.ends and len(answer) < min(max_tokens, room):
      answer.append(next_id)
      text = self._tok.continued(prompt, answer)
      if not text.endswith('\ufffd'):  # the rest of a character is still to come
        yield text[len(shown) :]
        shown = text
      next_id = self._next([*prompt, *answer])
    yield self._tok.continued(prompt, answer)[len(shown) :]

  def _next(self, ids: list[int]) -> int:
    """Choose the id that follows ids; only those that are not cached are read."""
    common = len(os.path.commonprefix([self._cached_ids, ids[:-1]]))
    if len(ids) + _PIECE > self._cache['segments'].shape[1]:
      larger = self._empty_cache(2 ** (len(ids) + 2 * _PIECE).bit_length())
      copy = lambda new, old: new.at[tuple(slice(n) for n in old.shape)].set(old)
      self._cache = jax.tree.map(copy, larger, self._cache)
    self._cache['index'] = jnp.asarray(common, jnp.int32)
    size = 1 if len(ids) - common == 1 else _PIECE
    options = {'sampler': self._sampler, 'known': self._tok.known}
    for start in range(common, len(ids), size):
      piece = ids[start : start + size]
      padded = np.zeros((1, size), np.int32)
      padded[0, : len(piece)] = piece
      key = jax.random.fold_in(self._key, start + len(piece))
      chosen, self._cache = follow(
        self._model, self._params, self._cache, padded, len(piece), key, **options
      )
    self._cached_ids = ids
    return int(chosen[0])

  def _empty_cache(self, length: int) -> dict[str, jax.Array]:
    return by_layer(init_cache(self._model.cfg, 1, length, self._params['embedding'].dtype))
