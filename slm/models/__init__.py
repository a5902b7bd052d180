"""Models by name; `forward(params, batch)` is the wall between Flax and everything else."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from slm.models.config import DecoderConfig
from slm.models.decoder import Decoder, Output
from slm.models.observe import KEPT, STATS
from slm.weights.axes import Params

MODELS = {DecoderConfig: Decoder}
Config = DecoderConfig  # a union of MODELS' keys, once there are several


@dataclasses.dataclass(frozen=True)
class Model:
  """A model as two pure functions over a nested dict of weights."""

  cfg: DecoderConfig
  init: Callable[[jax.Array], Params]
  forward: Callable[..., Output]  # forward(params, batch, cache=None, states=())
  observe: Callable[..., tuple[Output, Params]]  # observe(params, batch, kept=None): see observe.py


def _observe(
  module, params: Params, batch: Mapping[str, jax.Array], kept: Params | None = None
) -> tuple[Output, Params]:
  out, found = module.apply({'params': params, KEPT: kept or {}}, batch, mutable=[STATS])
  return out, found[STATS]


def build(cfg: Config) -> Model:
  """Build the model that a config describes."""
  module = MODELS[type(cfg)](cfg)
  row = jnp.zeros((1, 2), jnp.int32)
  batch = {'inputs': row, 'positions': row, 'segments': row}
  return Model(
    cfg=cfg,
    init=lambda key: module.init(key, batch)['params'],
    forward=lambda params, batch, cache=None, states=(): module.apply(
      {'params': params}, batch, cache, states
    ),
    observe=lambda params, batch, kept=None: _observe(module, params, batch, kept),
  )
