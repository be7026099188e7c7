"""Finds the outlier columns of LLM.int8() in all rows of x, before these are quantized by slices.

An outlier in one row makes its column one of 16 bits in every row, so slices have to know of each other's.
Reading all of x once more takes no scratch memory, unlike its codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...layouts import eight_bit as layout
from . import eight_bit
from .jobs import CompileJob


def find(
    x: Tensor, threshold: float, *, up: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """int32 (K + 1): the columns of what is quantized that have an element of at least `threshold`, in order, and
    at K how many they are: what `eight_bit.quantize` of all rows has as `columns`, found with the same arithmetic.

    x (M, K), up (M, K) and norm (K) as in `eight_bit.quantize`.
    """
    from ...triton_kernels.activations import outlier_columns

    m, k = x.shape
    block = eight_bit.row_block(layout.padded(k))
    columns = torch.empty(k + 1, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):  # triton launches on the current device, whatever its arguments say
        outlier_columns[(m,)](
            x, x if up is None else up, x if norm is None else norm, columns,
            eight_bit._counter(1 + k, x.device), eps, threshold, m, k,
            NORM=norm is not None, GATED=up is not None, BLOCK=block, num_warps=eight_bit.row_warps(block),
        )  # fmt: skip
    return columns


# ---------------------------------------------------------------------- ahead of time
_JOB_FEATURES = 8192


def compile_jobs(arch: int, subset: bool = False) -> Iterator[CompileJob]:
    """Of x alone, after RMSNorm and after SiLU; with `subset` the first."""
    from ...triton_kernels.activations import outlier_columns

    block = eight_bit.row_block(_JOB_FEATURES)
    for label, norm, gated in (("", False, False), ("RMSNorm ", True, False), ("SiLU ", False, True)):
        if subset and label:
            continue
        yield CompileJob(
            kernel="outlier_columns",
            label=f"int8 {label}bf16",
            arch=arch,
            fn=outlier_columns,
            types={
                **dict.fromkeys(("x_ptr", "up_ptr", "norm_ptr"), "*bf16"),
                **dict.fromkeys(("columns_ptr", "counter_ptr"), "*i32"),
                **dict.fromkeys(("eps", "threshold"), "fp32"),
                **dict.fromkeys(("M", "K"), "i32"),
            },
            constants={"NORM": norm, "GATED": gated, "BLOCK": block},
            aligned=("x_ptr", "up_ptr", "norm_ptr", "K"),
            num_warps=eight_bit.row_warps(block),
            num_stages=3,
            tensor_core=False,
        )
