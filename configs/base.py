"""Defaults of a training run; slm/runs/config.py documents every key."""

from ml_collections import ConfigDict

from slm.base import schema
from slm.runs import config


def get_config() -> ConfigDict:
  """Return the defaults: a small decoder trained on the generic set."""
  return ConfigDict(config.defaults())


def section(kind: type, **changes) -> ConfigDict:
  """Return a section with its defaults, such as slm.reparam.dense.LoraConfig, and some changes."""
  return ConfigDict({**schema.defaults(kind), **changes})
