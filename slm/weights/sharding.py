"""Meshes, and where the logical axes of weights and activations lie on them."""

import contextvars
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slm.weights.axes import Params, leaf_axes

# Logical axis -> mesh axes. `batch` is an activation axis; `embed` is a weight axis only
# (activations never shard it).
RULES: dict[str, tuple[str, ...]] = {
  'batch': ('data', 'fsdp', 'expert'),
  'embed': ('fsdp',),
  'mlp': ('tensor',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'vocab': ('tensor',),
  'experts': ('expert',),
}

MESH_AXES = ('data', 'fsdp', 'tensor', 'expert')


def mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
  """Return the size of every mesh axis; one may be -1 and takes the devices that are left.

  Raises:
    ValueError: if an axis is unknown or the sizes do not multiply to the device count.
  """
  unknown = set(sizes) - set(MESH_AXES)
  if unknown:
    raise ValueError(f'mesh: unknown axes {sorted(unknown)}, expected some of {MESH_AXES}')
  shape = [sizes.get(a, 1) for a in MESH_AXES]
  if shape.count(-1) == 1:
    rest = math.prod(n for n in shape if n != -1)
    shape[shape.index(-1)] = max(devices // rest, 1) if rest else -1
  if min(shape) < 1 or math.prod(shape) != devices:
    raise ValueError(
      f'mesh: {dict(zip(MESH_AXES, shape, strict=True))} needs {math.prod(shape)} devices, '
      f'found {devices}'
    )
  return tuple(shape)


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
  """Build the mesh of `mesh_shape` over the given devices, or over all.

  Raises:
    ValueError: as mesh_shape does.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(sizes, len(devices))
  # Explicit is JAX's default and rejects ordinary operations; see CONTRIBUTING.
  return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def fit_mesh(channels: int) -> Mesh:
  """Split weights over as many devices as divide their channels, rows over all devices."""
  n = len(jax.devices())
  fsdp = math.gcd(channels, n)
  return make_mesh({'data': n // fsdp, 'fsdp': fsdp})


def spec(names: tuple[str | None, ...], mesh: Mesh, taken: tuple[str, ...] = ()) -> P:
  """Translate logical axes to a partition spec; a mesh axis is used at most once."""
  used, parts = set(taken), []
  for name in names:
    there = tuple(a for a in RULES.get(name, ()) if mesh.shape[a] > 1 and a not in used)
    used.update(there)
    parts.append(there if len(there) > 1 else there[0] if there else None)
  return P(*parts)


def shardings(params: Params, mesh: Mesh) -> Params:
  """Return the NamedSharding of every weight.

  Raises:
    ValueError: if a mesh axis does not divide the dimension it would split.
  """

  def one(path, leaf):
    names = leaf_axes(path)
    where = spec(names, mesh)
    for name, size, part in zip(names, leaf.shape, where, strict=True):
      n = math.prod(mesh.shape[a] for a in _tuple(part))
      if size % n:
        raise ValueError(
          f'mesh: weight {jax.tree_util.keystr(path)} has {name}={size}, '
          f'which {part}={n} does not divide'
        )
    return NamedSharding(mesh, where)

  return jax.tree_util.tree_map_with_path(one, params)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Shard dimension `axis` as the batch axis."""
  return NamedSharding(mesh, spec((None,) * axis + ('batch',), mesh))


def batch_devices(mesh: Mesh) -> int:
  """Count the devices the batch axis is split over."""
  return math.prod(mesh.shape[a] for a in RULES['batch'])


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrain an activation to its logical axes; without a mesh return it unchanged."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(names, mesh, _grouped.get()))


# Mesh axes that an enclosing vmap_groups has taken for its group axis.
_grouped: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar('grouped', default=())


def batch_shards() -> int:
  """Count the devices that the batch axis of the code being traced is split over."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty or _grouped.get() else batch_devices(mesh)


def vmap_groups(fn: Callable[..., Any], in_axes: Any) -> Callable[..., Any]:
  """Map `fn` over groups of rows, the group axis taking the place of the batch axis on the mesh."""

  def run(*args):
    mesh = jax.sharding.get_abstract_mesh()
    names = () if mesh.empty else tuple(a for a in RULES['batch'] if mesh.shape[a] > 1)
    token = _grouped.set(names)
    try:
      return jax.vmap(fn, in_axes, spmd_axis_name=names or None)(*args)
    finally:
      _grouped.reset(token)

  return run


def _tuple(part: Any) -> tuple[str, ...]:
  return part if isinstance(part, tuple) else () if part is None else (part,)
