"""Text to rows: `python -m slm.data.prepare --config=configs/data.py:SETS --out=DIR`.

SETS is `name=source,...` with one set named generic. A source is a glob of .jsonl or .txt files
(.gz or .zst too), a TFDS set on disk, `tfds:c4/en?split=train` (slm/data/tfds.py), or `python:docs`
or `python:licences`, optionally with `?max_mb=NUMBER`. `name=source` is split by a hash of the
document; `name.train=source,name.test=source` keeps the splits. Training documents whose exact text
is held out in any set are dropped. The default is the docstrings of Python and of the packages that
slm requires, with their licences as the domain.
"""

from ml_collections import ConfigDict

from slm.base import schema
from slm.data.settings import PrepareConfig

_PYTHON = 'generic=python:docs?max_mb=12,licences=python:licences'


def get_config(arg: str = '') -> ConfigDict:
  """Return the defaults of slm/data/settings.py for the text that `arg`, SETS, names."""
  return ConfigDict(schema.defaults(PrepareConfig) | {'sets': _sets(arg or _PYTHON)})


def _sets(arg: str) -> dict[str, dict[str, str]]:
  sets: dict[str, dict[str, str]] = {}
  for item in arg.split(','):
    key, equals, source = item.partition('=')
    name, _, split = key.partition('.')
    if not (equals and name and source):
      raise ValueError(
        f'configs/data.py: expected name=source or name.split=source, found {item!r}'
      )
    splits = sets.setdefault(name, {})
    if (split or 'all') in splits:
      raise ValueError(f'configs/data.py: {key} is given twice')
    splits[split or 'all'] = source
  return sets
