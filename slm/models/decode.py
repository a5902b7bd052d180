"""Cached generation and sampling."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm import models
from slm.models.decoder import by_layer, init_cache, unembed
from slm.weights import sharding
from slm.weights.axes import Params

Sampler = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [b,v], key or keys [b]) -> ids [b]
_MIN_TEMPERATURE = 1e-6  # logits divided by less could overflow float32


class Completions(NamedTuple):
  """Generated ids and log-probabilities [b,max_tokens], and lengths [b] up to an end id."""

  tokens: jax.Array
  logprobs: jax.Array
  lengths: jax.Array


def greedy(logits: jax.Array, key: jax.Array) -> jax.Array:
  """Take the most probable id."""
  return jnp.argmax(logits, axis=-1)


def sampled(
  logits: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
  """Sample at a temperature from the top_k ids (0: all) and the smallest set with top_p mass.

  Temperatures below _MIN_TEMPERATURE are raised to it: they still give the most probable id.
  """
  logits = logits / max(temperature, _MIN_TEMPERATURE)
  if top_k:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    # Keep the ids with less than top_p mass before them.
    last = jnp.sum(mass - jax.nn.softmax(ordered, axis=-1) < top_p, axis=-1, keepdims=True) - 1
    cut = jnp.take_along_axis(ordered, last, axis=-1)
    logits = jnp.where(logits < cut, -jnp.inf, logits)
  return jax.random.categorical(key, logits, axis=-1)


def drawn(logits: jax.Array, keys: jax.Array, temperature: float = 1.0) -> jax.Array:
  """Sample each row of logits [b,v] at a temperature by its own key of keys [b]."""
  return jax.vmap(jax.random.categorical)(keys, logits / temperature)


def _restrict(logits: jax.Array, known: jax.Array) -> jax.Array:
  """Exclude from logits [b,v] the ids that are not known [tokenizer's vocab]."""
  size = logits.shape[-1]
  known = jnp.pad(jnp.asarray(known), (0, max(size - len(known), 0)))[None, :size]
  return jnp.where(known, logits, -jnp.inf)


@functools.partial(
  jax.jit, static_argnames=('model', 'max_tokens', 'sampler', 'end', 'temperature')
)
def generate(
  model: models.Model,
  params: Params,
  prompts: jax.Array,
  prompt_mask: jax.Array,
  key: jax.Array,
  *,
  max_tokens: int,
  sampler: Sampler = greedy,
  end: frozenset[int] = frozenset(),
  known: jax.Array | None = None,
  temperature: float = 1.0,
) -> Completions:
  """Continue prompts [b,t], padded on the left where prompt_mask [b,t] is 0.

  A row stops at any id of `end`, which then fills the rest of its tokens; the loop ends when all
  rows have. With `known`, a bool
  [tokenizer's vocab], only ids of the tokenizer are chosen, not embeddings that pad a vocabulary.
  Log-probabilities are the model's at `temperature`, over all ids. A `key` of the shape [b] has one
  for each row, which `sampler` then gets folded with the number of the token.
  """
  b, t = prompts.shape
  mask = prompt_mask.astype(jnp.int32)
  cache = init_cache(model.cfg, b, t + max_tokens, params['embedding'].dtype)
  positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
  batch = {'inputs': prompts, 'positions': positions, 'segments': mask}
  out = model.forward(params, batch, cache)
  cache, logits = out.cache, unembed(params, out.replace(hidden=out.hidden[:, -1]))
  params, cache = by_layer(params), by_layer(cache)
  ones = jnp.ones((b, 1), jnp.int32)

  def pick(logits, i, last, done):
    allowed = logits if known is None else _restrict(logits, known)
    fold = jax.vmap(jax.random.fold_in, (0, None)) if key.ndim else jax.random.fold_in
    ids = sampler(allowed, fold(key, i)).astype(jnp.int32)
    ids = jnp.where(done, last, ids)
    logprob = _log_prob(logits / temperature, ids)
    ended = done | jnp.isin(ids, jnp.array(sorted(end), jnp.int32))
    return ids, jnp.where(done, 0.0, logprob), ended

  def step(carry, i):
    ids, position, cache, done = carry
    batch = {'inputs': ids[:, None], 'positions': position[:, None], 'segments': ones}
    out = model.forward(params, batch, cache)
    ids, logprob, ended = pick(unembed(params, out)[:, -1], i, ids, done)
    return (ids, position + 1, out.cache, ended), (ids, logprob, done)

  start = jnp.zeros((b,), bool)
  ids, logprob, done = pick(logits, 0, prompts[:, -1].astype(jnp.int32), start)
  carry = (ids, positions[:, -1] + 1, cache, done)
  if end:
    rest = _until_ended(step, carry, max_tokens)
  else:
    _, rest = jax.lax.scan(step, carry, jnp.arange(1, max_tokens))
  join = lambda first, rest: jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], axis=1)
  tokens, logprobs, ended = map(join, (ids, logprob, start), rest)
  return Completions(tokens, logprobs, jnp.sum(~ended, axis=1))


def _until_ended(step: Callable, carry: Any, max_tokens: int) -> tuple[jax.Array, ...]:
  """Scan `step` over 1 .. max_tokens - 1 as `generate` does, but no further than all rows need.

  What follows is what the steps would give: the last id, log-probability 0, ended.
  """
  shape = (max_tokens - 1, len(carry[0]))
  made = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.ones(shape, bool)

  def body(state):
    i, carry, made = state
    carry, new = step(carry, i)
    return i + 1, carry, tuple(old.at[i - 1].set(x) for old, x in zip(made, new, strict=True))

  goes_on = lambda state: (state[0] < max_tokens) & ~state[1][3].all()
  i, (last, *_), (ids, *rest) = jax.lax.while_loop(goes_on, body, (jnp.int32(1), carry, made))
  return jnp.where(jnp.arange(1, max_tokens)[:, None] < i, ids, last), *rest


def answer(
  model: models.Model,
  params: Params,
  prompts: jax.Array,
  lengths: jax.Array,
  keys: jax.Array,
  *,
  slots: int,
  max_tokens: int,
  sampler: Sampler = drawn,
  end: frozenset[int] = frozenset(),
  known: jax.Array | None = None,
  temperature: float = 1.0,
) -> Completions:
  """Continue prompts [n,t], padded on the right, as `generate` does, once for each key.

  There are n * samples `keys`, those of a prompt one after the other. `slots` continuations are
  drawn at once: where some have ended, the next of the queue take their place, so that none waits
  for the longest. What is drawn depends neither on the slots nor on the order. On a mesh each
  device has slots and a queue of its own, and holds all weights that are not split by `tensor`.
  """
  choose = functools.partial(
    _choose, sampler=sampler, end=end, known=known, temperature=temperature, max_tokens=max_tokens
  )

  def local(params, prompts, lengths, keys):
    return _Queue(model, by_layer(params), prompts, lengths, keys, max_tokens, choose).run(slots)

  if axes := sharding.batch_axes():
    rows = jax.sharding.PartitionSpec(axes)
    local = sharding.map_rows(local, (jax.sharding.PartitionSpec(), rows, rows, rows), rows)
  return local(params, prompts, lengths, keys)


def _choose(logits, keys, number, sampler, end, known, temperature, max_tokens):
  """Draw the token of a `number` in each answer; return it, its log-probability, whether it ends.

  Arrays are [b]; an answer ends at an id of `end` too, or once it has max_tokens.
  """
  allowed = logits if known is None else _restrict(logits, known)
  ids = sampler(allowed, jax.vmap(jax.random.fold_in)(keys, number)).astype(jnp.int32)
  ended = jnp.isin(ids, jnp.array(sorted(end), jnp.int32)) | (number == max_tokens - 1)
  return ids, _log_prob(logits / temperature, ids), ended


class _Slots(NamedTuple):
  """Answers in work, one per slot [b].

  Attributes:
    item: the numbers of the answers; that of no answer is the number of them all.
    number: of the next token of each answer.
    last: the token before it.
    following: the first answer that no slot has begun.
  """

  item: jax.Array
  number: jax.Array
  last: jax.Array
  following: jax.Array
  cache: dict[str, Any]
  made: Completions


@dataclasses.dataclass(frozen=True)
class _Queue:
  """The answers of one device, see `answer`. The text in a slot has its answer's as segment."""

  model: models.Model
  params: Params
  prompts: jax.Array
  lengths: jax.Array
  keys: jax.Array
  max_tokens: int
  choose: Callable

  def run(self, slots: int) -> Completions:
    """Draw all answers.

    The prompts of an eighth of the slots are read at once, when as many are free: a prompt that is
    read token by token takes a step of all slots for each.
    """
    count, t, most = len(self.keys), self.prompts.shape[1], self.max_tokens
    b, dtype = min(slots, count), self.params['embedding'].dtype
    together = max(b // 8, 1)
    allocate = lambda *size, **kind: by_layer(init_cache(self.model.cfg, *size, dtype, **kind))
    unread = allocate(together, t)
    zero, none = jnp.zeros((b,), jnp.int32), jnp.zeros((count, most), jnp.int32)
    made = Completions(none, none.astype(jnp.float32), jnp.zeros((count,), jnp.int32))
    cache = allocate(b, t + most, ring=True)
    start = _Slots(jnp.full((b,), count), zero, zero, jnp.int32(0), cache, made)

    def goes_on(s: _Slots) -> jax.Array:
      free = jnp.sum(s.item == count)
      return (free < b) & ((free < together) | (s.following >= count))

    filled = lambda s: jax.lax.while_loop(goes_on, self._step, self._fill(s, unread))
    made = jax.lax.while_loop(lambda s: s.following < count, filled, start).made
    # As `generate` does, the last id of an answer fills the rest of its tokens.
    final = jnp.take_along_axis(made.tokens, made.lengths[:, None] - 1, axis=1)
    within = jnp.arange(most)[None] < made.lengths[:, None]
    return made._replace(tokens=jnp.where(within, made.tokens, final))

  def _prompt(self, item: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the prompts of answers, [b,t] padded on the right, and their lengths."""
    of = jnp.minimum(item, len(self.keys) - 1) // (len(self.keys) // len(self.prompts))
    return self.prompts[of], jnp.maximum(self.lengths[of], 1)

  def _draw(self, made: Completions, logits: jax.Array, item: jax.Array, number: jax.Array):
    """Draw and note the token of a `number` in each answer; return also which answers go on."""
    count = len(self.keys)
    ids, logprob, ended = self.choose(logits, self.keys[jnp.minimum(item, count - 1)], number)
    put = lambda old, at, new: old.at[at].set(new, mode='drop')  # out of bounds is not written
    made = Completions(
      put(made.tokens, (item, number), ids),
      put(made.logprobs, (item, number), logprob),
      put(made.lengths, item, number + 1),
    )
    return made, ids, jnp.where(ended, count, item)

  def _fill(self, s: _Slots, unread: dict[str, Any]) -> _Slots:
    """Read the next prompts into as many free slots as `unread` has rows, and draw their tokens."""
    count, (n, t) = len(self.keys), unread['segments'].shape
    free = jnp.nonzero(s.item == count, size=n, fill_value=len(s.item))[0]
    following = jnp.where(free < len(s.item), s.following + jnp.arange(n), count)
    item = jnp.minimum(following, count)
    prompts, lengths = self._prompt(item)
    place = jnp.arange(t)[None] - (t - lengths[:, None])  # padding goes to the left
    real, place = (place >= 0) & (item < count)[:, None], jnp.maximum(place, 0)
    read = jnp.take_along_axis(prompts, place, axis=1)
    batch = {'inputs': read, 'positions': place, 'segments': real.astype(jnp.int32)}
    out = self.model.forward(self.params, batch, unread)
    logits = unembed(self.params, out.replace(hidden=out.hidden[:, -1]))
    made, ids, goes_on = self._draw(s.made, logits, item, jnp.zeros_like(item))
    cache = _into_ring(s.cache, out.cache, free, jnp.where(real, item[:, None] + 1, 0))
    put = lambda old, new: old.at[free].set(new, mode='drop')
    begun = s.following + jnp.sum(item < count)
    return _Slots(put(s.item, goes_on), put(s.number, 1), put(s.last, ids), begun, cache, made)

  def _step(self, s: _Slots) -> _Slots:
    """Draw the next token of the answers in all slots."""
    column = lambda x: x[:, None]
    segments = jnp.where(s.item < len(self.keys), s.item + 1, 0)
    place = self._prompt(s.item)[1] + s.number - 1
    batch = {'inputs': column(s.last), 'positions': column(place), 'segments': column(segments)}
    out = self.model.forward(self.params, batch, s.cache)
    logits = unembed(self.params, out)[:, -1]
    made, ids, item = self._draw(s.made, logits, s.item, s.number)
    return s._replace(item=item, number=s.number + 1, last=ids, cache=out.cache, made=made)


def _into_ring(
  ring: dict[str, Any], read: dict[str, Any], slots: jax.Array, segments: jax.Array
) -> dict[str, Any]:
  """Write n rows that were read, of segments [n,t], as all that some slots of a ring hold.

  They are its latest tokens. A slot out of bounds is not written.
  """

  def put(old, new, axis, where):
    padding = [(0, 0)] * new.ndim
    padding[axis] = (0, old.shape[axis] - new.shape[axis])
    latest = jnp.roll(jnp.pad(new, padding), ring['index'] - new.shape[axis], axis)
    return old.at[where].set(latest, mode='drop')

  rows = lambda old, new: put(old, new, new.ndim - 2, (..., slots, *[slice(None)] * 3))
  held = {name: jax.tree.map(rows, ring[name], read[name]) for name in ('k', 'v')}
  return {**ring, **held, 'segments': put(ring['segments'], segments, 1, slots)}


def _log_prob(logits: jax.Array, ids: jax.Array) -> jax.Array:
  """Return log softmax of logits [b,v] at ids [b]."""
  return jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames=('model', 'sampler'), donate_argnames=('cache',))
def follow(
  model: models.Model,
  params: Params,
  cache: dict[str, jax.Array],
  ids: jax.Array,
  count: int,
  key: jax.Array,
  *,
  sampler: Sampler,
  known: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Append the first `count` of ids [1,t] to a cache, and choose the id that follows them.

  Returns the id [1], one of `known` as in `generate`, and the cache, which needs room for all t
  ids. Setting back its `index` removes later entries.
  """
  offsets = jnp.arange(ids.shape[1])[None]
  batch = {
    'inputs': ids,
    'positions': cache['index'] + offsets,
    'segments': (offsets < count).astype(jnp.int32),
  }
  out = model.forward(params, batch, cache)
  last = jax.lax.dynamic_slice_in_dim(out.hidden, count - 1, 1, axis=1)[:, 0]
  logits = unembed(params, out.replace(hidden=last))
  return sampler(_restrict(logits, known), key), {**out.cache, 'index': cache['index'] + count}
