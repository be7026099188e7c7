"""Scratch memory of a call, and its limit: partial sums and counters of split K, copies of x."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: blocks of one launch that may have a counter of finished K slices
MAX_BLOCKS = 65536
#: scratch memory that one call may allocate: partial sums and copies of x together
BYTES = 32 * 2**20

_counters: dict[tuple[str, int | None, int], Tensor] = {}


def fits(rows: int, row_bytes: int, fixed_bytes: int = 0) -> bool:
    """Whether `slices` gives one slice for these arguments."""
    return rows <= 1 or fixed_bytes + rows * row_bytes <= BYTES or not row_bytes


def slices(rows: int, row_bytes: int, fixed_bytes: int = 0) -> Iterator[slice]:
    """Slices of `rows` rows, in order, each within BYTES of scratch memory, or of one row.

    The slices have about one size, and whole tiles of 128 rows as long as that many fit. Each
    slice's kernel decodes the weight again, which costs little where a slice has hundreds of rows.

    Args:
        rows: of x.
        row_bytes: scratch memory of one row.
        fixed_bytes: scratch memory of every slice, whatever its number of rows.
    """
    if fits(rows, row_bytes, fixed_bytes):
        if rows:
            yield slice(0, rows)
        return
    most = max(1, (BYTES - fixed_bytes) // row_bytes)
    unit = 128 if most >= 128 else 16 if most >= 16 else 1
    most = most // unit * unit
    count = -(-rows // most)
    most = min(most, -(-rows // (count * unit)) * unit)
    for first in range(0, rows, most):
        yield slice(first, min(first + most, rows))


def counters(device: torch.device) -> Tensor:
    """Zeroed int32 counters, one tensor for each device and stream. Every launch leaves them zero.

    Launches on one stream run one after another, so they can share the counters. A CUDA graph uses
    the counters of the stream it is captured on: replay the graphs captured on one stream one after
    another, as torch does.
    """
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    key = (device.type, device.index, stream)
    tensor = _counters.get(key)
    if tensor is None:
        tensor = torch.zeros(MAX_BLOCKS, dtype=torch.int32, device=device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return tensor  # belongs to the graph's memory; each replay of the graph zeroes it
        _counters[key] = tensor
    return tensor
