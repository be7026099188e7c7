"""Facts about a GPU that launchers of both languages ask for."""

from __future__ import annotations

import os
from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors (SMs) of a GPU; 8 for other devices.

    8 is small enough that the interpreter and the emulator split K in small tests, too.
    """
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=64)
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a block of a GPU may have; for other devices, that of the smallest GPU."""
    smallest = 99 * 1024  # sm_86, sm_89, sm_120
    if device.type != "cuda":
        return smallest
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", smallest))


@lru_cache(maxsize=64)
def supports_pdl(index: int | None) -> bool:
    """Whether kernels on GPU `index` use programmatic dependent launch (PDL, sm_90 and later).

    index: -1 for the CPU, which has no PDL; None for the current GPU. QKERNELS_PDL=0 in the
    environment switches PDL off.
    """
    if index == -1 or os.environ.get("QKERNELS_PDL", "1") == "0":
        return False
    return torch.cuda.get_device_capability(index) >= (9, 0)
