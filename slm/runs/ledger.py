"""The cost ledger of a run directory: tokens, FLOPs and device-seconds by phase."""

import resource
from pathlib import Path
from typing import Any

import jax

from slm.base import files

_PHASE = {'phase': str, 'tokens': float, 'flops': float, 'device_seconds': float}
_LIKE = {'phases': [_PHASE], 'ancestors': [str]}


def read_ledger(workdir: Path) -> dict[str, Any]:
  """Read the cost ledger: {'phases': [...], 'ancestors': [...]}."""
  path = workdir / 'ledger.json'
  return files.read_json(path, _LIKE) if path.exists() else {'phases': [], 'ancestors': []}


def write_ledger(workdir: Path, phases: list[dict[str, Any]], ancestors: list[str]) -> None:
  """Set these phases' entries in the ledger; entries of other phases stay."""
  names = {p['phase'] for p in phases}
  others = [p for p in read_ledger(workdir)['phases'] if p['phase'] not in names]
  files.write_json(workdir / 'ledger.json', {'phases': others + phases, 'ancestors': ancestors})


def peak_bytes() -> dict[str, int]:
  """Return the peak memory so far: of this process, and of its fullest device if that is known.

  CPU devices report no statistics: there is no 'device_peak_bytes' then.
  """
  peak = {'host_peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
  if stats := list(filter(None, (device.memory_stats() for device in jax.local_devices()))):
    peak['device_peak_bytes'] = max(s['peak_bytes_in_use'] for s in stats)
  return peak


def phase_entry(phase: str, tokens: int, flops: float, device_seconds: float) -> dict[str, Any]:
  """Make a ledger entry; the peak memory is of a device or, of CPUs, of the process."""
  peak = peak_bytes()
  return {
    'phase': phase,
    'tokens': tokens,
    'flops': flops,
    'device_seconds': device_seconds,
    'peak_memory_bytes': peak.get('device_peak_bytes', peak['host_peak_bytes']),
    'devices': jax.device_count(),
    'kind': jax.devices()[0].device_kind,
  }


def spend(
  folder: Path, phase: str, tokens: int, flops: float, device_seconds: float, ancestors: list[str]
) -> None:
  """Add a cost to a phase's entry in a directory's ledger."""
  cost = {'tokens': tokens, 'flops': flops, 'device_seconds': device_seconds}
  for entry in read_ledger(folder)['phases']:
    if entry['phase'] == phase:
      cost = {name: entry[name] + value for name, value in cost.items()}
  write_ledger(folder, [phase_entry(phase, **cost)], ancestors)
