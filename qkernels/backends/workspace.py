"""Scratch memory of a call: partial sums and counters of kernels that split K, copies of x; how
much of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: blocks of one launch that may count their shares
MAX_BLOCKS = 65536
#: what one call may allocate beside its output: partial sums and copies of x together
BYTES = 32 * 2**20

_counters: dict[tuple[str, int | None, int], Tensor] = {}


def fits(rows: int, row_bytes: int, held: int = 0) -> bool:
    """Whether `slices` of these is one."""
    return rows <= 1 or held + rows * row_bytes <= BYTES or not row_bytes


def slices(rows: int, row_bytes: int, held: int = 0) -> Iterator[slice]:
    """Slices of `rows` rows, in order, that need at most BYTES of scratch at `row_bytes` a row, or
    one row.

    held: bytes of scratch that every slice takes, whatever its rows. All are of about one size, and
    of whole tiles of 128 rows as long as that many fit. The slices' kernels decode the weight anew,
    which costs little where a slice has hundreds of rows.
    """
    if fits(rows, row_bytes, held):
        if rows:
            yield slice(0, rows)
        return
    most = max(1, (BYTES - held) // row_bytes)
    unit = 128 if most >= 128 else 16 if most >= 16 else 1
    most = most // unit * unit
    count = -(-rows // most)
    most = min(most, -(-rows // (count * unit)) * unit)
    for first in range(0, rows, most):
        yield slice(first, min(first + most, rows))


def counters(device: torch.device) -> Tensor:
    """Zeroed int32 counters of this device and stream. Every launch leaves them zero.

    Launches on one stream follow one another and share them. A CUDA graph uses those of the stream
    it is captured on: replay graphs captured on one stream one after another, as torch does.
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
