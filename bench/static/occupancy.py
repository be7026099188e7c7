"""How many blocks of a kernel fit on one streaming multiprocessor (SM)."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """Limits of one SM, from the CUDA programming guide (technical specifications)."""

    warps: int
    blocks: int
    shared_kib: int


LIMITS = {
    80: Limits(64, 32, 164),
    86: Limits(48, 16, 100),
    87: Limits(48, 16, 164),
    89: Limits(48, 24, 100),
    90: Limits(64, 32, 228),
    100: Limits(64, 32, 228),
    103: Limits(64, 32, 228),
    120: Limits(48, 24, 100),
    121: Limits(48, 24, 100),
}
#: the warps of an SM run on four partitions; each has 16,384 registers, allocated in units of 256
_PARTITIONS, _REGISTERS, _REGISTER_UNIT = 4, 16384, 256
#: bytes of shared memory that the driver takes in each block, and the unit of allocation
_SHARED_RESERVED, _SHARED_UNIT = 1024, 128
#: columns of an SM's tensor memory (sm_100)
_TENSOR_COLUMNS = 512


class Occupancy(NamedTuple):
    """Blocks and warps that fit on one SM. limit: the resource that allows no more."""

    blocks: int
    warps: int
    limit: str


def occupancy(
    arch: int, registers: int, shared: int, warps: int, tensor_columns: int = 0
) -> Occupancy:
    """How many blocks of a kernel fit on one SM.

    registers: per thread. shared: bytes per block. warps, tensor_columns: per block.
    """
    limits = LIMITS[arch]
    per_warp = _rounded(max(registers, 1) * 32, _REGISTER_UNIT)
    per_block = _rounded(shared + _SHARED_RESERVED, _SHARED_UNIT)
    fitting = {
        "registers": _REGISTERS // per_warp * _PARTITIONS // _rounded(warps, _PARTITIONS),
        "shared memory": limits.shared_kib * 1024 // per_block,
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    if tensor_columns:
        fitting["tensor memory"] = _TENSOR_COLUMNS // tensor_columns
    limit = min(fitting, key=lambda name: fitting[name])
    return Occupancy(fitting[limit], fitting[limit] * warps, limit)


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit
