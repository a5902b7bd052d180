"""The cost ledger of a run directory: tokens, FLOPs and device-seconds by phase."""

import resource
from pathlib import Path
from typing import Any

import jax

from slm.base import files


def read_ledger(workdir: Path) -> dict[str, Any]:
  """Read the cost ledger: {'phases': [...], 'ancestors': [...]}."""
  path = workdir / 'ledger.json'
  return files.read_json(path) if path.exists() else {'phases': [], 'ancestors': []}


def write_ledger(workdir: Path, phases: list[dict[str, Any]], ancestors: list[str]) -> None:
  """Set these phases' entries in the ledger; entries of other phases stay."""
  names = {p['phase'] for p in phases}
  others = [p for p in read_ledger(workdir)['phases'] if p['phase'] not in names]
  files.write_json(workdir / 'ledger.json', {'phases': others + phases, 'ancestors': ancestors})


def phase_entry(phase: str, tokens: int, flops: float, device_seconds: float) -> dict[str, Any]:
  """Make a ledger entry."""
  stats = jax.local_devices()[0].memory_stats()
  # CPU devices report no statistics: the process's peak memory stands in.
  host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {
    'phase': phase,
    'tokens': tokens,
    'flops': flops,
    'device_seconds': device_seconds,
    'peak_memory_bytes': stats['peak_bytes_in_use'] if stats else host,
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
