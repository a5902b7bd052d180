"""The next-token loss, and what a router adds to it."""

import functools
from collections.abc import Callable, Mapping

from slm.models.decoder import head
from slm.objectives import losses
from slm.objectives.losses import Batch, Sums, chunked
from slm.runs.config import NextTokenConfig
from slm.weights.axes import Params


def next_token(cfg: NextTokenConfig, forward: Mapping[str, Callable]) -> Callable[..., Sums]:
  """Minimise the next-token loss; `chunk` tokens' logits exist at a time.

  For a model that routes tokens, `balance` and `z` weigh the load-balance loss (moe.balance) and
  the mean squared log-partition of the router (Zoph et al. 2022, eq. 5).
  """

  def objective(params: Params, frozen: Params, batch: Batch) -> Sums:
    out = forward['student'](params, batch)
    rows = {'targets': batch['targets'], 'weights': batch['weights']}
    summed = functools.partial(losses.next_token, out.cap)
    nll = chunked(summed, cfg.chunk, head(params), out.hidden, (), rows)['loss']
    weight = rows['weights'].sum()
    if out.routing is None:
      return {'loss': (nll, weight)}
    more, parts = losses.routing(out.routing, weight, cfg.balance, cfg.z)
    parts |= {'loss': nll + more, 'nll': nll}
    return {name: (value, weight) for name, value in parts.items()}

  return objective
