"""Accelerators that are known: peak FLOP/s and memory, and the names JAX has for them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """An accelerator, from its data sheet.

  Attributes:
    flops: peak dense bfloat16 FLOP/s.
    bytes: of memory.
    bandwidth: bytes/s of that memory.
    network: bytes/s that a TPU sends over all its links, two to each axis of its slice.
  """

  flops: float
  bytes: float
  bandwidth: float = 0.0
  network: float = 0.0


CHIPS = {
  'a100': Chip(312e12, 80e9, 2.04e12),
  'h100': Chip(989e12, 80e9, 3.35e12),
  'h200': Chip(989e12, 141e9, 4.8e12),
  # Google Cloud's pages of each TPU; links as in "How to Scale Your Model" (Austin et al. 2025):
  # v4 and v5p have three axes, v5e and v6e two.
  'tpu-v4': Chip(275e12, 32 * 2**30, 1.228e12, 3 * 9e10),
  'tpu-v5e': Chip(197e12, 16 * 2**30, 8.2e11, 2 * 9e10),
  'tpu-v5p': Chip(459e12, 95e9, 2.765e12, 3 * 1.8e11),
  'tpu-v6e': Chip(918e12, 32 * 2**30, 1.64e12, 2 * 1.8e11),
}
# Kinds of TPU as libtpu and Google name the slices of them, KIND:SHAPE -> their chip.
TPUS = {'v4': 'tpu-v4', 'v5e': 'tpu-v5e', 'v5p': 'tpu-v5p', 'v6e': 'tpu-v6e'}
SLICE = r'(v5e|v6e):[1-9]\d*x[1-9]\d*|(v4|v5p):[1-9]\d*(x[1-9]\d*){2}'
# The `device_kind` of JAX's devices -> their chip. PCIe cards of the H100 and H200 are slower.
_KINDS = {
  'NVIDIA A100-SXM4-40GB': 'a100',
  'NVIDIA A100-SXM4-80GB': 'a100',
  'NVIDIA H100 80GB HBM3': 'h100',
  'NVIDIA H200': 'h200',
  'TPU v4': 'tpu-v4',
  'TPU v5 lite': 'tpu-v5e',
  'TPU v5': 'tpu-v5p',
  'TPU v6 lite': 'tpu-v6e',
}


def of_slice(topology: str) -> Chip:
  """Return the chip of a slice KIND:SHAPE."""
  return CHIPS[TPUS[topology.partition(':')[0]]]


def slice_of(chip: str, count: int) -> str:
  """Return the slice of `count` chips, KIND:SHAPE with sides as equal as they can be; '' if none.

  Sides are powers of two, two for v5e and v6e and three for v4 and v5p; a slice has four chips at
  least and 256, of three sides 4,096, at most.
  """
  kind = next((kind for kind, name in TPUS.items() if name == chip), '')
  sides, most = (2, 256) if kind in ('v5e', 'v6e') else (3, 4096)
  if not kind or count & (count - 1) or not 4 <= count <= most:
    return ''
  power = count.bit_length() - 1
  shape = [2 ** ((power + i) // sides) for i in range(sides)]
  return f'{kind}:{"x".join(map(str, (2, 2, 1) if (count, sides) == (4, 3) else shape))}'


def peak(kind: str) -> float | None:
  """Return the peak dense bfloat16 FLOP/s of a device of JAX's `device_kind`, None if unknown."""
  return CHIPS[_KINDS[kind]].flops if kind in _KINDS else None
