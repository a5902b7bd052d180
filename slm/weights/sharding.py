"""Meshes, and the sharding of weights and activations by their logical axes."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slm.weights.axes import Params, leaf_axes

# Logical axis -> mesh axes. `batch` is an axis of activations; `embed` is split in weights only.
# `groups` are those of weights that are still split by `embed`. In the weights of experts the axis
# `experts` comes first and takes `expert`, all others are split over it too.
RULES: dict[str, tuple[str, ...]] = {
  'batch': ('data', 'fsdp', 'expert'),
  'groups': ('data',),
  'embed': ('fsdp', 'expert'),
  'mlp': ('tensor',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'vocab': ('tensor',),
  'experts': ('expert',),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh; -1: all that remain."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  expert: int = 1


MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


def mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
  """Return the size of every mesh axis; one size may be -1, for all remaining devices.

  Raises:
    ValueError: if an axis is unknown or the product of the sizes is not the number of devices.
  """
  if unknown := set(sizes) - set(MESH_AXES):
    raise ValueError(f'mesh: unknown axes {sorted(unknown)}, expected some of {MESH_AXES}')
  shape = [sizes.get(a, 1) for a in MESH_AXES]
  if shape.count(-1) == 1:
    rest = math.prod(n for n in shape if n != -1)
    shape[shape.index(-1)] = max(devices // rest, 1) if rest else -1
  if shape.count(-1) > 1:
    left = ', '.join(f'mesh.{a}' for a, n in zip(MESH_AXES, shape, strict=True) if n == -1)
    raise ValueError(f'mesh: {left} are all -1, the devices that are left: set all but one to 1')
  if min(shape) < 1 or math.prod(shape) != devices:
    raise ValueError(
      f'mesh: {dict(zip(MESH_AXES, shape, strict=True))} needs {math.prod(shape)} devices, '
      f'found {devices}'
    )
  return tuple(shape)


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
  """Build a mesh of `mesh_shape` over the given devices, or over all.

  Raises:
    ValueError: as mesh_shape does.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(sizes, len(devices))
  # jax.make_mesh refuses sizes that are no product of the sides of a slice of TPUs, as 16 of 8x8.
  placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  # JAX's default, Explicit, rejects ordinary operations; see CONTRIBUTING.
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def fit_mesh(channels: int) -> Mesh:
  """Return a mesh that splits rows over all devices, weights over as many as divide `channels`."""
  count = len(jax.devices())
  fsdp = math.gcd(channels, count)
  return make_mesh({'data': count // fsdp, 'fsdp': fsdp})


def spec(names: tuple[str | None, ...], mesh: Mesh, taken: tuple[str, ...] = ()) -> P:
  """Translate logical axes to a partition spec; each mesh axis not yet `taken` is used once."""
  used, parts = set(taken), []
  for name in names:
    axes = tuple(a for a in RULES.get(name, ()) if mesh.shape[a] > 1 and a not in used)
    used.update(axes)
    parts.append(axes if len(axes) > 1 else axes[0] if axes else None)
  return P(*parts)


def shardings(params: Params, mesh: Mesh) -> Params:
  """Return the NamedSharding of every weight.

  Raises:
    ValueError: if a leaf has no row in AXES or another rank than its row, or a mesh axis does not
      divide the dimension it would split.
  """

  def one(path, leaf):
    names, weight = leaf_axes(path), jax.tree_util.keystr(path)
    if len(names) != len(leaf.shape):
      raise ValueError(f'weight {weight}: axes {names}, shape {leaf.shape}')
    sharding = NamedSharding(mesh, spec(names, mesh))
    for name, size, part in zip(names, leaf.shape, sharding.spec, strict=True):
      axes = part if isinstance(part, tuple) else (part,) if part else ()
      count = math.prod(mesh.shape[axis] for axis in axes)
      if size % count:
        raise ValueError(
          f'mesh: weight {weight} has {name}={size}, which {part}={count} does not divide'
        )
    return sharding

  return jax.tree_util.tree_map_with_path(one, params)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Return the sharding of an array whose dimension `axis` is the batch."""
  return NamedSharding(mesh, spec((None,) * axis + ('batch',), mesh))


def batch_devices(mesh: Mesh) -> int:
  """Count the devices that split the batch axis."""
  return math.prod(mesh.shape[a] for a in RULES['batch'])


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrain an activation to the sharding of its logical axes, if there is a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(names, mesh, _grouped.get()))


# Mesh axes that an enclosing vmap_groups or map_rows uses.
_grouped: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar('grouped', default=())


def axes_in_use() -> tuple[str, ...]:
  """Return the mesh axes that an enclosing vmap_groups or map_rows uses."""
  return _grouped.get()


@contextlib.contextmanager
def using(axes: tuple[str, ...]) -> Iterator[None]:
  """Trace code as inside a map that uses these mesh axes, where no constraint does."""
  token = _grouped.set(axes)
  try:
    yield
  finally:
    _grouped.reset(token)


def platform() -> str:
  """Return the platform that the code being traced is for: that of its mesh, or this machine's."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return device.platform if device is not None else jax.default_backend()


def batch_axes() -> tuple[str, ...]:
  """Return the mesh axes that split the batch axis of the code being traced."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or _grouped.get():
    return ()
  return tuple(a for a in RULES['batch'] if mesh.shape[a] > 1)


def batch_shards() -> int:
  """Count the devices that split the batch axis of the code being traced."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in batch_axes())


def map_shards(fn: Callable[..., Any], in_names: Any, out_names: Any) -> Callable[..., Any]:
  """Run `fn` on each device's part of arrays that are split by their logical axes."""

  def run(*args):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
      return fn(*args)
    specs = tuple(spec(names, mesh, _grouped.get()) for names in in_names)
    out = spec(out_names, mesh, _grouped.get())
    return jax.shard_map(fn, in_specs=specs, out_specs=out, check_vma=False)(*args)

  return run


def map_rows(fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
  """Run `fn` on each device's rows; axes of the mesh that do not split the batch stay automatic.

  Inside, the batch axes can be named in collectives, and no constraint uses them.
  """

  def run(*args):
    axes = batch_axes()

    def local(*args):
      with using(axes):
        return fn(*args)

    return jax.shard_map(
      local, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False
    )(*args)

  return run


def vmap_groups(fn: Callable[..., Any], in_axes: Any) -> Callable[..., Any]:
  """Map `fn` over groups of rows; the group axis replaces the batch axis on the mesh."""

  def run(*args):
    mesh = jax.sharding.get_abstract_mesh()
    names = () if mesh.empty else tuple(a for a in RULES['batch'] if mesh.shape[a] > 1)
    with using(names):
      return jax.vmap(fn, in_axes, spmd_axis_name=names or None)(*args)

  return run
