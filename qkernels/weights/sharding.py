"""Cut packed weights by rows or columns, and join them again, without requantization.

For tensor parallelism: a column-parallel layer has a range of the output features (rows of W), a
row-parallel layer a range of the input features (columns of W). A part has the same values as the
whole weight.
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
    """Part `index` of `count` equal parts of p (N, K).

    A part has N / count rows (dim 0) or K / count columns (dim 1). Raises ValueError, naming the
    counts that work, if a part would cut a group, a block or a packed word.
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
    """ValueError, naming the counts that work, if `shard` cannot cut `count` parts."""
    size = shape[dim]
    unit = formats.get(format).cuts(shape, dict(params))[dim]
    if size % (count * unit) and count > 1:
        works = [
            str(c)
            for c in range(1, max(1, min(size // unit, 64)) + 1)
            if c == 1 or size % (c * unit) == 0
        ]
        raise ValueError(
            f"{format}: {_WORDS[dim]}: expected {size} to be a multiple of {count} parts times "
            f"{unit}, so that no group, block or word is cut; "
            f"counts that work: {', '.join(works)}"
        )


def check_cut(
    format: str, shape: tuple[int, int], params: Mapping[str, Any], dim: int, begin: int, end: int
) -> None:
    """ValueError if `narrow` cannot cut rows or columns begin..end-1 out of the weight."""
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
            f"{format}: {_WORDS[dim]}: expected to be cut at multiples of {unit}, "
            f"got {begin}..{end - 1} of {size}"
        )


def narrow(p: PackedWeight, dim: int, begin: int, end: int) -> PackedWeight:
    """Rows (dim 0) or columns (dim 1) begin..end-1 of p, in the checkpoint layout.

    ValueError if they cannot be cut out.
    """
    check_cut(p.format, p.shape, p.params, dim, begin, end)
    if (begin, end) == (0, p.shape[dim]):
        return PackedWeight(p.format, p.shape, p.tensors, p.params)
    fmt = formats.get(p.format)
    tensors, params = fmt.cut(p.tensors, p.shape, p.params, dim, begin, end)
    shape = (end - begin, p.shape[1]) if dim == ROWS else (p.shape[0], end - begin)
    return pack(p.format, tensors, shape, **params)


def join_rows(parts: Sequence[PackedWeight]) -> PackedWeight | None:
    """One weight with the rows of all parts, one part below the other: the inverse of cutting rows.

    None if the parts differ in format, K or parameters, or if one weight cannot hold them bit for
    bit: because their tensor-wide scales, column orders or tables differ, or because a part's rows
    do not end where a block or word does.
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
        whole_specs = fmt.specs((n, k), first.params)
        for name, tensor in tensors[0].items():
            pieces = [t[name] for t in tensors]
            shape = whole_specs[name].shape or ()
            # the dimensions that are larger in the whole weight
            grown = [d for d, size in enumerate(shape) if size != tensor.shape[d]]
            if grown:
                joined[name] = torch.cat(pieces, grown[0])
            elif all(torch.equal(tensor, piece) for piece in pieces[1:]):
                joined[name] = tensor
            else:
                return None
        whole = pack(first.format, joined, (n, k), **first.params)
        begin = 0
        for p, expected, spec in zip(parts, tensors, specs, strict=True):
            cut = narrow(whole, ROWS, begin, begin + p.shape[0]).tensors
            if set(cut) != set(expected) or not all(
                torch.equal(cut[name], expected[name]) for name in spec if name in expected
            ):
                return None
            begin += p.shape[0]
    except (ValueError, KeyError, RuntimeError):  # `joined` is no weight of the format
        return None
    return whole


def take_rows(p: PackedWeight, index: Tensor) -> PackedWeight:
    """The rows index[0], index[1], ... of p (N, K) as a packed weight (R, K); index is int64 (R).

    ValueError for a format that does not store each row separately.
    """
    tensors, params = formats.get(p.format).take_rows(p.tensors, p.shape, p.params, index)
    return PackedWeight(p.format, (index.numel(), p.shape[1]), tensors, params)
