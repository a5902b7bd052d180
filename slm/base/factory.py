"""From a config section to what its `name` selects."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def build(
  kind: str, table: Mapping[str, Callable], cfg: Mapping[str, Any], *args: Any, **more: Any
):
  """Call table[cfg['name']](*args, **rest of cfg, **more).

  Raises:
    ValueError: naming the section, if the name is unknown or a key is unknown or missing.
  """
  rest = dict(cfg)
  name = rest.pop('name')
  if name not in table:
    raise ValueError(f'{kind}.name: expected one of {sorted(table)}, found {name!r}')
  try:
    inspect.signature(table[name]).bind(*args, **rest, **more)
  except TypeError as e:
    raise ValueError(f'{kind} {name!r}: {e}; the section has {sorted(rest)}') from None
  return table[name](*args, **rest, **more)
