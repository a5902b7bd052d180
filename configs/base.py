"""The defaults of a training run; slm/runs/config.py says what each key means."""

from ml_collections import ConfigDict

from slm.base import schema
from slm.runs import config


def get_config() -> ConfigDict:
  """Return the defaults: a small decoder trained on the generic set."""
  return ConfigDict(config.defaults())


def section(kind: type, **changes) -> ConfigDict:
  """Return the defaults of a section, such as slm.reparam.dense.LoraConfig, with some changed."""
  return ConfigDict({**schema.defaults(kind), **changes})
