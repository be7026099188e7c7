"""The kernels in plain torch: the reference for every fused kernel, and unquantized weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import formats, layouts
from .problem import Problem
from .registry import ANY_LAYOUT, Kernel, register

if TYPE_CHECKING:
    from ..weights.packed import PackedWeight


def _dense_rejects(problem: Problem) -> str | None:
    fmt = formats.get(problem.format)
    if not fmt.dense:
        return "for unquantized weights only"
    stored = {"fp16": torch.float16, "bf16": torch.bfloat16}[problem.format]
    if problem.dtype != stored:
        return f"x must have the weight's dtype {stored}, not {problem.dtype}"
    if problem.batch_invariant:
        return (
            "torch's matmul sums in an order that depends on M, and batch_invariant was asked for"
        )
    return None


def _run_dense(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    return torch.nn.functional.linear(
        x, p.storage["weight"], None if bias is None else bias.to(x.dtype)
    )


#: rows that the reference computes at a time when a row must not depend on M: matmuls of one shape
#: sum in one order, and 64 is a multiple of every BLAS's tile
_INVARIANT_ROWS = 64


def run_reference(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    """x (M, K) @ W^T + bias (N) -> y (M, N) in x's dtype, as `Kernel.run`."""
    y = reference(x, p, problem.batch_invariant)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


def reference(x: Tensor, p: PackedWeight, batch_invariant: bool) -> Tensor:
    """x (M, K) @ W^T by the format's own reference, in the dtype in which that accumulates."""
    fmt, tensors = formats.get(p.format), p.tensors
    if batch_invariant:
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % _INVARIANT_ROWS))
        chunks = padded.split(_INVARIANT_ROWS)
        return torch.cat([fmt.matmul(c, tensors, p.shape, p.params, True) for c in chunks])[
            : x.shape[0]
        ]
    return fmt.matmul(x, tensors, p.shape, p.params, False)


def register_kernels() -> None:
    """Register both kernels. They come last, because every fused kernel is preferred."""
    register(
        Kernel(
            "torch.linear",
            "reference",
            layouts.CHECKPOINT,
            lambda: None,
            _dense_rejects,
            _run_dense,
        )
    )
    register(
        Kernel(
            "reference.dequantize",
            "reference",
            ANY_LAYOUT,
            lambda: None,
            lambda p: None,
            run_reference,
        )
    )
