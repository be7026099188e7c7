"""What launchers ask of a GPU."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors; a few without a GPU, so that the interpreter and the emulator meet
    split K.
    """
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
