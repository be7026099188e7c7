"""Scratch memory that kernels which split K need: partial sums and counters."""

from __future__ import annotations

import torch
from torch import Tensor

#: blocks of one launch that may count their shares
MAX_BLOCKS = 65536

_counters: dict[tuple[str, int | None, int], Tensor] = {}


def partials(elements: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialized memory of one launch, from torch's caching allocator: safe on every stream, in graphs."""
    return torch.empty(elements, dtype=dtype, device=device)


def counters(device: torch.device) -> Tensor:
    """Zeroed int32 counters of this device and stream. Every launch leaves them zero.

    Launches on one stream follow one another and share them. A CUDA graph uses those of the stream it
    is captured on: replay graphs captured on one stream one after another, as torch does.
    """
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    key = (device.type, device.index, stream)
    found = _counters.get(key)
    if found is None:
        found = torch.zeros(MAX_BLOCKS, dtype=torch.int32, device=device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return found  # belongs to the graph's memory, and is zeroed by the graph at each replay
        _counters[key] = found
    return found
