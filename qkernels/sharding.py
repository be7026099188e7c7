"""Parts of a packed weight: some of its rows or columns, as a packed weight of its own.

For tensor parallelism: a column-parallel layer holds a range of output features (rows of W), a row-parallel
one a range of input features (columns of W). Nothing is requantized: a part's values are the whole's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import formats
from .packed import PackedWeight, pack

ROWS, COLUMNS = 0, 1
_WORDS = ("rows", "columns")


def shard(p: PackedWeight, dim: int, index: int, count: int) -> PackedWeight:
    """Part `index` of `count` equal parts of p (N, K): N / count rows (dim 0) or K / count columns (dim 1).

    Raises ValueError, naming the counts that work, if a part would cut a group, a block or a packed word.
    """
    if not 0 <= index < count:
        raise ValueError(f"index: expected 0 <= index < {count}, got {index}")
    check_shard(p.format, p.shape, p.params, dim, count)
    size = p.shape[dim]
    part = size // count
    return narrow(p, dim, index * part, (index + 1) * part)


def check_shard(format: str, shape: tuple[int, int], params: Mapping[str, Any], dim: int, count: int) -> None:
    """ValueError, naming the counts that work, if `shard` could not cut such a weight into `count` parts."""
    size = shape[dim]
    unit = formats.get(format).cuts(shape, dict(params))[dim]
    if size % (count * unit) and count > 1:
        works = [
            str(c) for c in range(1, max(1, min(size // unit, 64)) + 1) if c == 1 or size % (c * unit) == 0
        ]
        raise ValueError(
            f"{format}: {_WORDS[dim]}: expected {size} to be a multiple of {count} parts times {unit}, so "
            f"that no group, block or word is cut; counts that work: {', '.join(works)}"
        )


def check_cut(
    format: str, shape: tuple[int, int], params: Mapping[str, Any], dim: int, begin: int, end: int
) -> None:
    """ValueError if `narrow` could not cut rows or columns begin..end-1 out of such a weight."""
    size = shape[dim]
    if dim not in (ROWS, COLUMNS) or not 0 <= begin < end <= size:
        raise ValueError(f"{format}: expected dim 0 or 1 and 0 <= begin < end <= {size}, got {begin}..{end}")
    if (begin, end) == (0, size):
        return
    unit = formats.get(format).cuts(shape, dict(params))[dim]
    if begin % unit or (end % unit and end != size):
        raise ValueError(
            f"{format}: {_WORDS[dim]}: expected to be cut at multiples of {unit}, got {begin}..{end - 1} of {size}"
        )


def narrow(p: PackedWeight, dim: int, begin: int, end: int) -> PackedWeight:
    """Rows (dim 0) or columns (dim 1) begin..end-1 of p, as stored. ValueError if they cannot be cut out."""
    check_cut(p.format, p.shape, p.params, dim, begin, end)
    if (begin, end) == (0, p.shape[dim]):
        return PackedWeight(p.format, p.shape, p.tensors, p.params)
    fmt = formats.get(p.format)
    tensors, params = fmt.cut(p.tensors, p.shape, p.params, dim, begin, end)
    shape = (end - begin, p.shape[1]) if dim == ROWS else (p.shape[0], end - begin)
    return pack(p.format, tensors, shape, **params)


def take_rows(p: PackedWeight, index: Tensor) -> PackedWeight:
    """The rows of p (N, K) that `index`, int64 (R), names, in its order, as a packed weight (R, K).

    ValueError for a format whose tensors do not keep rows apart along their first dimension.
    """
    fmt = formats.get(p.format)
    n, k = p.shape
    whole, other = fmt.specs((n, k), p.params), fmt.specs((n + 1, k), p.params)
    found = {}
    for name, tensor in p.tensors.items():
        full, more = whole[name].shape, other[name].shape
        if full != more:
            if full is None or more is None or (full[0], more[0], full[1:]) != (n, n + 1, more[1:]):
                raise ValueError(
                    f"{p.format}: {name}: expected a tensor that keeps rows apart, got shape {full}"
                )
            tensor = tensor[index]
        found[name] = tensor
    return PackedWeight(p.format, (index.numel(), k), found, p.params)
