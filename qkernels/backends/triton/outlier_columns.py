"""Finds the outlier columns of LLM.int8() in all rows of x, before x is quantized in slices.

If one row has an outlier, its column is multiplied in 16 bits in every row, so a slice depends on
the outliers of all slices. Reading x a second time needs no scratch memory, unlike its codes.
"""

from __future__ import annotations

import torch

from ...layouts import eight_bit as layout
from ..plan import Plan, Symbolic
from .launch import start


def find(
    plan: Plan,
    x: Symbolic,
    threshold: float,
    *,
    up: Symbolic | None = None,
    norm: Symbolic | None = None,
    eps: float = 0.0,
) -> Symbolic:
    """int32 (K + 1): the outlier columns in order, and at K their number.

    A column is one if it has an element of at least `threshold` after `up` and `norm`. The result
    equals the `columns` that `eight_bit.quantize` of all rows gives, by the same arithmetic. x
    (M, K), up (M, K), norm (K) and eps are those of `eight_bit.quantize`.
    """
    from ...triton_kernels.activations import outlier_columns

    m, k = x.shape
    block = row_block(layout.padded(k))
    columns = plan.empty((k + 1,), torch.int32)
    arguments = {
        "x_ptr": x,
        "up_ptr": x if up is None else up,
        "norm_ptr": x if norm is None else norm,
        "columns_ptr": columns,
        "counter_ptr": plan.counters(1 + k),
        "eps": eps,
        "threshold": threshold,
        "M": m,
        "K": k,
        "NORM": norm is not None,
        "GATED": up is not None,
        "BLOCK": block,
        "num_warps": row_warps(block),
    }
    start(plan, outlier_columns, (m, 1), arguments)
    return columns


#: features of a row that one program keeps in registers; the rest of a longer row is read twice
ROW_BLOCK = 16384


def row_block(kp: int) -> int:
    """Features of a row that a program handles at a time: a power of two, and whole groups."""
    return min(ROW_BLOCK, max(layout.BLOCK, 1 << (kp - 1).bit_length()))


def row_warps(block: int) -> int:
    """Warps of a program that handles `block` features at a time."""
    return min(16, max(1, block // 512))
