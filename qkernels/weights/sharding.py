"""Parts of a packed weight: some of its rows or columns, as a packed weight of its own.

For tensor parallelism: a column-parallel layer holds a range of output features (rows of W), a
row-parallel one a range of input features (columns of W). Nothing is requantized: a part's values
are the whole's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import formats
from .packed import PackedWeight, pack

ROWS, COLUMNS = 0, 1
_WORDS = ("rows", "columns")


def shard(p: PackedWeight, dim: int, index: int, count: int) -> PackedWeight:
    """Part `index` of `count` equal parts of p (N, K): N / count rows (dim 0) or K / count columns
    (dim 1).

    Raises ValueError, naming the counts that work, if a part would cut a group, a block or a packed
    word.
    """
    if not 0 <= index < count:
        raise ValueError(f"index: expected 0 <= index < {count}, got {index}")
    check_shard(p.format, p.shape, p.params, dim, count)
    size = p.shape[dim]
    part = size // count
    return narrow(p, dim, index * part, (index + 1) * part)


def check_shard(
    format: str, shape: tuple[int, int], params: Mapping[str, Any], dim: int, count: int
) -> None:
    """ValueError, naming the counts that work, if `shard` could not cut such a weight into `count`
    parts.
    """
    size = shape[dim]
    unit = formats.get(format).cuts(shape, dict(params))[dim]
    if size % (count * unit) and count > 1:
        works = [
            str(c)
            for c in range(1, max(1, min(size // unit, 64)) + 1)
            if c == 1 or size % (c * unit) == 0
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
        raise ValueError(
            f"{format}: expected dim 0 or 1 and 0 <= begin < end <= {size}, got {begin}..{end}"
        )
    if (begin, end) == (0, size):
        return
    unit = formats.get(format).cuts(shape, dict(params))[dim]
    if begin % unit or (end % unit and end != size):
        raise ValueError(
            f"{format}: {_WORDS[dim]}: expected to be cut at multiples of {unit}, got {begin}..{end - 1} of {size}"
        )


def narrow(p: PackedWeight, dim: int, begin: int, end: int) -> PackedWeight:
    """Rows (dim 0) or columns (dim 1) begin..end-1 of p, as stored. ValueError if they cannot be
    cut out.
    """
    check_cut(p.format, p.shape, p.params, dim, begin, end)
    if (begin, end) == (0, p.shape[dim]):
        return PackedWeight(p.format, p.shape, p.tensors, p.params)
    fmt = formats.get(p.format)
    tensors, params = fmt.cut(p.tensors, p.shape, p.params, dim, begin, end)
    shape = (end - begin, p.shape[1]) if dim == ROWS else (p.shape[0], end - begin)
    return pack(p.format, tensors, shape, **params)


def join_rows(parts: Sequence[PackedWeight]) -> PackedWeight | None:
    """The parts, weights of one format, K and parameters, one below the other: the inverse of
    cutting rows.

    None where they are no such weights, or where one weight cannot hold them bit for bit: their
    scales of a whole tensor, orders of columns or tables differ, or their rows do not end where a
    block or word does.
    """
    first = parts[0]
    n, k = sum(p.shape[0] for p in parts), first.shape[1]
    if any((p.format, p.shape[1], p.params) != (first.format, k, first.params) for p in parts):
        return None
    fmt = formats.get(first.format)
    tensors = [p.tensors for p in parts]
    specs = [fmt.specs(p.shape, p.params) for p in parts]
    joined = {}
    try:
        whole = fmt.specs((n, k), first.params)
        for name, tensor in tensors[0].items():
            pieces = [t[name] for t in tensors]
            shape = whole[name].shape
            grown = (
                []
                if shape is None
                else [d for d, size in enumerate(shape) if size != tensor.shape[d]]
            )
            if grown:
                joined[name] = torch.cat(pieces, grown[0])
            elif all(torch.equal(tensor, piece) for piece in pieces[1:]):
                joined[name] = tensor
            else:
                return None
        found = pack(first.format, joined, (n, k), **first.params)
        begin = 0
        for p, own, spec in zip(parts, tensors, specs, strict=True):
            again = narrow(found, ROWS, begin, begin + p.shape[0]).tensors
            if set(again) != set(own) or not all(
                torch.equal(again[name], own[name]) for name in spec if name in own
            ):
                return None
            begin += p.shape[0]
    except (ValueError, KeyError, RuntimeError):  # what no whole weight of the format looks like
        return None
    return found


def take_rows(p: PackedWeight, index: Tensor) -> PackedWeight:
    """The rows of p (N, K) that `index`, int64 (R), names, in its order, as a packed weight (R, K).

    ValueError for a format whose tensors do not keep rows apart.
    """
    tensors, params = formats.get(p.format).take_rows(p.tensors, p.shape, p.params, index)
    return PackedWeight(p.format, (index.numel(), p.shape[1]), tensors, params)
