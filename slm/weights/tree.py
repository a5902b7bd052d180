"""Operations on trees of weights: flatten, cast, hash."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.weights.axes import Params

Path = tuple[str, ...]


def flatten(tree: Params, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
  """Yield (path, leaf) of a nested dict."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from flatten(value, prefix + (key,))
    else:
      yield prefix + (key,), value


def unflatten(flat: Mapping[Path, Any]) -> Params:
  """Return the nested dict of leaves by path."""
  tree: Params = {}
  for path, value in flat.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return tree


def cast(params: Params, dtype: Any) -> Params:
  """Convert every floating-point leaf to a dtype."""
  return jax.tree.map(
    lambda w: w.astype(dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w, params
  )


def weights_hash(params: Mapping[str, Any]) -> str:
  """Hash the names and float32 values of weights."""
  digest = hashlib.sha256()
  for path, leaf in sorted(flatten(params)):
    digest.update('/'.join(path).encode() + np.asarray(leaf, '<f4').tobytes())
  return digest.hexdigest()
