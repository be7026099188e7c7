"""The float64 oracle, and error bounds derived from the arithmetic."""

from __future__ import annotations

import os

import torch
from torch import Tensor

import qkernels as qk
from qkernels import formats
from qkernels.formats.incoherent import IncoherentFormat

#: Unit roundoff. Triton's interpreter truncates float32 to bfloat16 where hardware rounds, so there
#: it is twice as large.
ROUNDOFF = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2.0**-8,
    torch.float32: 2.0**-24,
}


def oracle(x: Tensor, p: qk.PackedWeight, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ p.dequantize(torch.float64).T
    return y if bias is None else y + bias.double()


def static_scale(p: qk.PackedWeight) -> Tensor | None:
    """The scale of static activations, by either of its names."""
    tensors = p.tensors
    return tensors.get("input_scale", tensors.get("activation_scale"))


def assert_fused_close(
    y: Tensor, x: Tensor, p: qk.PackedWeight, bias: Tensor | None = None
) -> None:
    """Assert that y is x @ W^T + bias up to three roundings: W to x's dtype, float32 sums, y.

    Each element: |error| <= r * u * sum|x||w| + K * 2^-24 * sum|x||w| + u * |y|, where r is 1, or 2
    if the entries of W's table are rounded before they are scaled. All of y, where roundings
    average out: norm(error) <= 2u * norm(y).
    """
    want = oracle(x, p, bias)
    u = ROUNDOFF[x.dtype]
    fmt = formats.get(p.format)
    if isinstance(fmt, IncoherentFormat):
        # The product between the transforms is rounded; the outer transform spreads the errors of
        # a row.
        before, after = fmt.sides(p.tensors, p.shape, p.params)
        inside = (
            before.inner(x.double()).abs()
            @ fmt.grid_values(p.tensors, p.shape, p.params).double().abs().T
        )
        magnitude = inside.norm(dim=-1, keepdim=True) * after.diagonal.double().abs()
    else:
        magnitude = x.double().abs() @ p.dequantize(torch.float64).abs().T
    if bias is not None:
        magnitude += bias.double().abs()
    k = p.shape[1]
    # 1e-7: results or weights below float16's normal range round to multiples of 2^-24
    bound = (
        (_roundings(p, x.dtype) * u + k * 2.0**-24) * magnitude
        + u * want.abs()
        + 1e-7 * (1 + x.double().abs().sum(-1, keepdim=True))
    )
    error = (y.double() - want).abs()
    worst = (error - bound).max().item() if error.numel() else 0.0
    assert bool((error <= bound).all()), f"elementwise error over its bound by {worst}"
    assert error.norm() <= 2 * u * want.norm() + 1e-6, (
        f"{error.norm() / want.norm():.2e} > {2 * u:.2e}"
    )


def _roundings(p: qk.PackedWeight, dtype: torch.dtype) -> int:
    """How often kernels round a weight: twice if entries of its table are rounded to `dtype`."""
    fmt = formats.get(p.format)
    if fmt.kernel_layout(p.params) != "weight_only":
        return 1
    if not fmt.weight_only_traits(p.shape, p.params).codes.table:
        return 1
    table = fmt.weight_only(p.tensors, p.shape, p.params).table
    assert table is not None
    return 1 if torch.equal(table, table.to(dtype).to(table.dtype)) else 2


def every_power(name: str, first: int = 0) -> qk.PackedWeight:
    """MXFP4 weights (16, 512) of random codes, with every scale from 2^(first-127) to 2^125."""
    exponents = torch.arange(256).clamp(first, 252)
    p = qk.quantize(torch.randn(16, 512), name)
    tensors = {key: t.clone() for key, t in p.tensors.items()}
    if name == "mxfp4":
        tensors["weight_scale"].copy_(exponents.view(16, 16))
    else:
        tensors["data"].view(256, 17)[:, 0] = exponents
    return qk.pack(name, tensors, p.shape)
