"""Scratch memory of a call, and its limit: partial sums of split K, copies of x."""

from __future__ import annotations

from collections.abc import Iterator

#: scratch memory that one call may allocate: partial sums and copies of x together
BYTES = 32 * 2**20


def slices(rows: int, row_bytes: int, fixed_bytes: int = 0) -> Iterator[slice]:
    """Slices of `rows` rows, in order, each within BYTES of scratch memory, or of one row.

    The slices have about one size, and whole tiles of 128 rows as long as that many fit. Each
    slice's kernel decodes the weight again, which costs little where a slice has hundreds of rows.

    Args:
        rows: of x.
        row_bytes: scratch memory of one row.
        fixed_bytes: scratch memory of every slice, whatever its number of rows.
    """
    if rows <= 1 or fixed_bytes + rows * row_bytes <= BYTES or not row_bytes:
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
