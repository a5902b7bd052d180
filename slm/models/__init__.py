"""Models by name; `forward(params, batch)` is the wall between Flax and everything else."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slm.base import factory
from slm.models.config import DecoderConfig
from slm.models.decoder import Decoder, Output
from slm.models.observe import KEPT, STATS
from slm.weights.axes import Params

MODELS = {'decoder': (DecoderConfig, Decoder)}


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


def build(cfg: Mapping[str, Any]) -> Model:
  """Build the model that `cfg['name']` selects; the other keys are its config.

  Raises:
    ValueError: if the name or a key is unknown or missing, or a size is impossible.
  """
  config = factory.build('model', {n: config_class for n, (config_class, _) in MODELS.items()}, cfg)
  module = MODELS[cfg['name']][1](config)
  row = jnp.zeros((1, 2), jnp.int32)
  batch = {'inputs': row, 'positions': row, 'segments': row}
  return Model(
    cfg=config,
    init=lambda key: module.init(key, batch)['params'],
    forward=lambda params, batch, cache=None, states=(): module.apply(
      {'params': params}, batch, cache, states
    ),
    observe=lambda params, batch, kept=None: _observe(module, params, batch, kept),
  )
