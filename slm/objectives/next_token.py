"""The next-token objective."""

import functools
from collections.abc import Callable, Mapping

from slm.models.decoder import head
from slm.objectives import losses
from slm.objectives.losses import Batch, Sums, chunked
from slm.runs.config import NextTokenConfig
from slm.weights.axes import Params


def next_token(cfg: NextTokenConfig, forward: Mapping[str, Callable]) -> Callable[..., Sums]:
  """Make the objective of the next-token loss; the logits of `chunk` tokens exist at a time.

  For a model that routes tokens, `balance` and `z` weigh the load-balance loss (moe.balance) and
  the mean squared log-partition of the router (Zoph et al. 2022, eq. 5).
  """

  def objective(params: Params, frozen: Params, batch: Batch) -> Sums:
    out = forward['student'](params, batch)
    rows = {'targets': batch['targets'], 'weights': batch['weights']}
    nll = functools.partial(losses.next_token, out.cap)
    sums = chunked(nll, cfg.chunk, head(params), out.hidden, (), rows)
    return losses.weighted(sums, out.routing, rows['weights'].sum(), cfg)

  return objective
