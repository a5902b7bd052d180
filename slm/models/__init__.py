"""Models as pure functions over weights: nothing outside this package uses Flax."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm.models.config import DecoderConfig
from slm.models.decoder import Decoder, Output
from slm.models.observe import KEPT, STATS
from slm.weights.axes import Params

MODELS = {DecoderConfig: Decoder}
Config = DecoderConfig  # the union of the keys of MODELS


@dataclasses.dataclass(frozen=True)
class Model:
  """A model as pure functions over a nested dict of weights."""

  cfg: DecoderConfig
  init: Callable[[jax.Array], Params]
  forward: Callable[..., Output]  # forward(params, batch, cache=None, states=())
  observe: Callable[..., tuple[Output, Params]]  # observe(params, batch, kept=None): see observe.py


def build(cfg: Config) -> Model:
  """Build the model that a config describes."""
  module = MODELS[type(cfg)](cfg)
  row = jnp.zeros((1, 2), jnp.int32)
  batch = {'inputs': row, 'positions': row, 'segments': row}

  def forward(params, batch, cache=None, states=()):
    return module.apply({'params': params}, batch, cache, states)

  def observe(params, batch, kept=None):
    out, collections = module.apply({'params': params, KEPT: kept or {}}, batch, mutable=[STATS])
    return out, collections[STATS]

  return Model(cfg, lambda key: module.init(key, batch)['params'], forward, observe)
