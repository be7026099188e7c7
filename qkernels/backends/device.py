"""Facts about a GPU that launchers of both languages ask for."""

from __future__ import annotations

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
