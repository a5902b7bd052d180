"""Objectives: pure functions from (forward passes, weights, batch) to sums and their weights.

An objective returns {name: (sum, weight)}; 'loss' is what is differentiated. Sums are added over
microbatches, groups and hosts before they are divided: never a mean of means.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from slm import factory, losses
from slm.distill import distill
from slm.losses import Sums, chunked, cross_entropy, join, split
from slm.models.decoder import head, logits

Params = dict[str, Any]
Batch = dict[str, jax.Array]


def next_token(
  forward: Mapping[str, Callable], chunk: int, balance: float = 0.0, z: float = 0.0
) -> Callable[..., Sums]:
  """Minimise the next-token loss; `chunk` tokens' logits exist at a time.

  For a model that routes tokens, `balance` and `z` weigh the load-balance loss (moe.balance) and
  the mean squared log-partition of the router (Zoph et al. 2022, eq. 5).
  """

  def objective(params: Params, frozen: Params, batch: Batch) -> Sums:
    out = forward['student'](params, batch)
    rows = {'targets': batch['targets'], 'weights': batch['weights']}
    summed = functools.partial(losses.next_token, out.cap)
    nll = chunked(summed, chunk, head(params), out.hidden, (), rows)['loss']
    weight = rows['weights'].sum()
    if out.routing is None:
      return {'loss': (nll, weight)}
    more, found = losses.routing(out.routing, weight, balance, z)
    found |= {'loss': nll + more, 'nll': nll}
    return {name: (value, weight) for name, value in found.items()}

  return objective


OBJECTIVES = {'next_token': next_token, 'distill': distill}


def build(cfg: Mapping[str, Any], forward: Mapping[str, Callable]) -> Callable[..., Sums]:
  """Build objective(params, frozen, batch) -> {name: (sum, weight)} from its config."""
  return factory.build('objective', OBJECTIVES, cfg, forward)


def over_tokens(
  fn: Callable[..., Any], forward: Callable, params: Params, batch: Batch, chunk: int
) -> Any:
  """Return fn(logits [b,c,v], targets [b,c]), arrays [b,c], of every position: arrays [b,t].

  The logits of about `chunk` tokens a device exist at a time; there are no gradients.
  """
  out = forward(params, batch)
  cut = functools.partial(split, chunk)
  rows = (cut(out.hidden), cut(batch['targets']))
  found = jax.lax.map(lambda x: fn(logits(head(params), x[0], out.cap), x[1]), rows)
  return jax.tree.map(lambda x: join(x, out.hidden.shape[1]), found)


def token_losses(forward: Callable, params: Params, batch: Batch, chunk: int) -> jax.Array:
  """Return the weighted next-token loss of every position, [b,t] float32, without gradients."""
  return over_tokens(cross_entropy, forward, params, batch, chunk) * batch['weights']
