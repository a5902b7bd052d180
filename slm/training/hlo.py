"""What a compiled program sends and moves on one device, read from its HLO text.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_INSTRUCTION = re.compile(r'\s*(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)')
_HEADER = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?')
_KERNEL = 'custom_call_target="tpu_custom_call"'  # a Pallas kernel
_CALLED = re.compile(r'(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)')
_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 'bf16': 2, 'token': 0, 'opaque': 0}
# Instructions that move nothing by themselves.
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
  'after-all', 'partition-id', 'replica-id', 'async-start', 'async-done', 'async-update', 'iota',
  'custom-call', 'optimization-barrier', 'domain',
}  # fmt: skip
_SLICES = ('dynamic-slice', 'slice', 'gather')
# Instructions in a fusion that hand on what they get, to a collective that runs meanwhile.
_HANDED_ON = {'parameter', 'tuple', *COLLECTIVES}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction: its name, type as text, operation, names of operands, the rest of the line."""

  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  attributes: str

  def sizes(self, on_chip: bool = True) -> list[float]:
    """Return the bytes of each array of the result; without `on_chip`, 0 for those kept there."""
    return [
      _item_bytes(dtype) * math.prod(int(n) for n in dims.split(',') if n)
      if on_chip or 'S(' not in layout
      else 0.0
      for dtype, dims, layout in _SHAPE.findall(self.type)
    ]


def _item_bytes(dtype: str) -> float:
  if dtype in _BYTES:
    return _BYTES[dtype]
  bits = re.search(r'\d+', dtype)
  return int(bits[0]) / 8 if bits else 0


@dataclasses.dataclass(frozen=True)
class Collective:
  """A kind of communication of a program.

  Attributes:
    kind: one of COLLECTIVES.
    axes: the mesh axes over which devices communicate.
    source: the operation of the model that it belongs to.
    count: how often it runs in a step.
    bytes: that one device sends in a step, by an optimal algorithm over n devices: (n - 1) / n of
      the whole array, twice that for all-reduce, the array for collective-permute.
  """

  kind: str
  axes: tuple[str, ...]
  source: str
  count: int
  bytes: float


class Program:
  """The instructions of a compiled program by computation."""

  def __init__(self, text: str):
    """Read a program as `jax.stages.Compiled.as_text` prints it."""
    self.unknown: set[str] = set()  # loops whose length is not found: they count once
    self._computations: dict[str, list[Instruction]] = {}
    self._entry, current = '', None
    for line in text.splitlines():
      if line[:1] not in (' ', '}', '') and (header := _HEADER.match(line)):
        current = self._computations.setdefault(header[2], [])
        self._entry = header[2] if header[1] else self._entry
      elif current is not None and (match := _INSTRUCTION.match(line)):
        current.append(_instruction(*match.groups()))

  def executed(self, computation: str = '', times: int = 1) -> Iterator[tuple[Instruction, int]]:
    """Yield every instruction outside of fusions with the number of times that it runs."""
    for x in self._computations.get(computation or self._entry, []):
      yield x, times
      if x.op == 'while':
        body = re.search(r'body=%?([\w.-]+)', x.attributes)[1]
        yield from self.executed(body, times * self._trips(x))
      elif x.op in ('call', 'conditional', 'async-start'):
        branches = re.search(r'branch_computations=\{([^}]*)\}', x.attributes)
        names = re.findall(r'[\w.-]+', branches[1]) if branches else _CALLED.findall(x.attributes)
        for name in names:
          yield from self.executed(name, times)

  def _trips(self, loop: Instruction) -> int:
    """Return how often a loop runs: what XLA knows, or what its counter, from 0, says."""
    if known := re.search(r'known_trip_count\D+(\d+)', loop.attributes):
      return int(known[1])
    parts = [re.search(rf'{n}=%?([\w.-]+)', loop.attributes)[1] for n in ('condition', 'body')]
    condition, body = ({x.name: x for x in self._computations[name]} for name in parts)
    below = lambda x: x.op == 'compare' and 'direction=LT' in x.attributes
    compared = [x for x in condition.values() if below(x)]
    read, limit = [condition.get(name) for name in compared[0].operands] if compared else [None] * 2
    place = re.search(r'index=(\d+)', read.attributes) if read else None
    if len(compared) != 1 or not place or not limit or limit.op != 'constant':
      self.unknown.add(loop.name)
      return 1
    counter = body[list(body.values())[-1].operands[int(place[1])]]
    steps = [_constant(body[n]) for n in counter.operands if body[n].op == 'constant']
    return -(-_constant(limit) // (steps[0] if counter.op == 'add' and steps else 1))

  def collectives(self, axes: Sequence[str], shape: Sequence[int]) -> list[Collective]:
    """Return the communication over a mesh of these axes and this shape, most bytes first."""
    totals: dict[tuple, list[float]] = {}
    chained = set()  # channels of collectives that a chain of fusions overlaps with other work
    for x, times in self.executed():
      kind, x = self._collective(x)
      channel = re.search(r'channel_id=(\d+).*chain_id', x.attributes)
      if not kind or channel and channel[1] in chained:
        continue
      if channel:
        chained.add(channel[1])
      varying, members = _members(x.attributes, axes, shape)
      sizes, count = x.sizes(), len(x.operands)
      if x.op.endswith('-start') and kind != 'all-reduce':  # operands, results, and more
        sizes = sizes[count : 2 * count]
      total = totals.setdefault((kind, varying, _source(x)), [0, 0.0])
      total[0] += times
      total[1] += times * sum(sizes) * _share(kind, members)
    listed = [Collective(*key, int(count), moved) for key, (count, moved) in totals.items()]
    return sorted(listed, key=lambda c: -c.bytes)

  def _collective(self, x: Instruction) -> tuple[str, Instruction]:
    """Return the kind of collective that an instruction starts ('': none), and its instruction."""
    if (kind := x.op.removesuffix('-start')) in COLLECTIVES:
      return kind, x
    for y in self._inner(x):
      if y.op in COLLECTIVES:
        attributes = f'{y.attributes} {x.attributes}'
        # TPUs have no reduce-scatter of their own: a fusion keeps a slice of the sum.
        if y.op == 'all-reduce' and 'all-reduce-scatter' in x.name:
          return 'reduce-scatter', dataclasses.replace(x, attributes=attributes)
        return y.op, dataclasses.replace(y, attributes=attributes)
    return '', x

  def traffic(self) -> float:
    """Return the bytes that one device reads from and writes to its main memory in a step.

    An operand counts whole where an instruction reads it, unless a fusion takes slices of it, and
    arrays that the compiler keeps on the chip do not count. A kernel reads its operands once.
    """
    total, by_name = 0.0, {x.name: x for x, _ in self.executed()}
    for x, times in self.executed():
      if x.op in _FREE and _KERNEL not in x.attributes or x.op.endswith('-done'):
        continue
      total += times * (self._written(x) + self._read(x, by_name))
    return total

  def _written(self, x: Instruction) -> float:
    """Return the bytes of an instruction's result in main memory; of an update, only its slice."""
    whole = x.sizes(on_chip=False)
    if x.op.endswith('-start'):  # their results name what they read too
      return whole[0 if x.op == 'copy-start' else 1]
    inner = self._inner(x)
    if inner and inner[-1].op == 'tuple':  # without what a chain of fusions hands on
      made = {y.name: y for y in inner if y.op not in _HANDED_ON}
      whole = [
        size for n in inner[-1].operands if n in made for size in made[n].sizes(on_chip=False)
      ]
    if updated := self._updates(x):
      return min(updated, sum(whole))
    return sum(whole)

  def _updates(self, x: Instruction) -> float:
    """Return the bytes of the slices that an instruction writes in place, 0 if it does not."""
    inner = self._inner(x)
    by_name = {y.name: y for y in inner}
    updates = [y for y in inner or [x] if y.op == 'dynamic-update-slice']
    return sum(
      sum(by_name[y.operands[1]].sizes()) if y.operands[1] in by_name else 0.0 for y in updates
    )

  def _inner(self, x: Instruction) -> list[Instruction]:
    """Return the instructions of a fusion, none for others."""
    return self._computations.get(_CALLED.findall(x.attributes)[0], []) if x.op == 'fusion' else []

  def _read(self, x: Instruction, by_name: dict[str, Instruction]) -> float:
    """Return the bytes that an instruction reads from main memory."""
    inner, total = self._inner(x), 0.0
    for i, name in enumerate(x.operands):
      operand = by_name.get(name)
      whole = sum(operand.sizes(on_chip=False)) if operand else 0.0
      if inner:
        whole = min(whole, self._taken(inner, _parameter(inner, i), whole))
      elif x.op in (*_SLICES, 'slice-start'):
        whole = min(whole, sum(x.sizes()[-1:]))
      total += whole
    return total

  def _taken(self, inner: list[Instruction], name: str, whole: float) -> float:
    """Return the bytes that a fusion's instructions read of its array `name`, of `whole` bytes."""
    total = 0.0
    for y in inner:
      if name not in y.operands or y.op in _HANDED_ON:
        continue
      if y.op in _SLICES:
        total += sum(y.sizes())
      elif y.op == 'bitcast':
        total += self._taken(inner, y.name, whole)
      elif y.op == 'fusion':
        nested = self._inner(y)
        places = [i for i, operand in enumerate(y.operands) if operand == name]
        total += sum(self._taken(nested, _parameter(nested, i), whole) for i in places)
      elif y.op != 'dynamic-update-slice' or y.operands[0] != name:
        return whole
    return total


def _parameter(inner: list[Instruction], i: int) -> str:
  """Return the name of a fusion's i-th parameter."""
  found = (y for y in inner if y.op == 'parameter' and y.attributes.partition(')')[0] == str(i))
  return next(y.name for y in found)


def _constant(x: Instruction) -> int:
  return int(x.attributes.partition(')')[0])


def _instruction(name: str, kind: str, op: str, rest: str) -> Instruction:
  """Make an instruction; the operands end where their parenthesis closes."""
  depth, end = 1, 0
  while depth and end < len(rest):
    depth += (rest[end] == '(') - (rest[end] == ')')
    end += 1
  inside = rest[: end - 1]
  attributes = rest if op in ('constant', 'parameter') else rest[end:]
  return Instruction(name, kind, op, tuple(re.findall(r'%([\w.-]+)', inside)), attributes)


def _source(x: Instruction) -> str:
  """Return the operation of the model that an instruction comes from."""
  match = re.search(r'op_name="([^"]*)"', x.attributes)
  if not match:
    return ''
  parts = [
    p for p in match[1].split('/') if not re.fullmatch(r'while|body|closed_call|jit\(.*\)', p)
  ]
  return '/'.join(parts[-3:])


def _share(kind: str, members: int) -> float:
  """Return the bytes that a device sends, as a share of the whole array."""
  if kind == 'collective-permute':
    return 1.0
  share = (members - 1) / members
  # The result of a reduce-scatter is one part of the array.
  return {'all-reduce': 2 * share, 'reduce-scatter': members - 1}.get(kind, share)


def _members(
  attributes: str, axes: Sequence[str], shape: Sequence[int]
) -> tuple[tuple[str, ...], int]:
  """Return the mesh axes along which a collective's devices differ, and how many they are."""
  group = np.unravel_index(_group(attributes, math.prod(shape)), shape)
  varying = tuple(a for a, c in zip(axes, group, strict=True) if len(set(c.tolist())) > 1)
  return varying, len(group[0])


def _group(attributes: str, devices: int) -> np.ndarray:
  """Return the devices of one group of a collective, from any of HLO's notations.

  Raises:
    ValueError: if it is in another one.
  """
  if pairs := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', attributes):
    return np.array([int(pairs[1]), int(pairs[2])])
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
    return np.array([int(n) for n in listed[1].split(',')])
  if iota := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
    rows = int(iota[1].split(',')[0])
    return _iota(iota[2], iota[3]).reshape(rows, -1)[0]
  if mesh := re.search(r'replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}', attributes):
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    order = re.search(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', mesh[2])  # of the devices in the mesh
    listed = _iota(*order.groups()) if order else np.arange(devices)
    chosen = set(re.findall(r"'(\w+)'", mesh[3]))
    where = tuple(slice(None) if name in chosen else 0 for name in sizes)
    return listed.reshape(list(sizes.values()))[where].ravel()
  if unread := re.search(r'(?:replica_groups|source_target_pairs)=(?!\{\}).{,40}', attributes):
    raise ValueError(f'HLO: {unread[0]}: is no known notation of groups of devices')
  return np.arange(devices)  # {} and nothing: all of them


def _iota(shape: str, order: str | None) -> np.ndarray:
  """Return the numbers that HLO writes as [shape]T(order)."""
  sizes = [int(n) for n in shape.split(',')]
  grid = np.arange(math.prod(sizes)).reshape(sizes)
  return grid.transpose([int(n) for n in order.split(',')]) if order else grid
