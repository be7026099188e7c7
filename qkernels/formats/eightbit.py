"""What the 8-bit formats share: exact integer products and activation scales."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import Grid

# 1024 products of two int8 (at most 2^14 each) sum to at most 2^24: exact in float32 in any order.
_EXACT_K = 1024


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact integer product a (M, K) @ b (N, K)^T of int8 matrices -> (M, N) int32, on any device."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for k in range(0, a.shape[1], _EXACT_K):
        total += (a[:, k : k + _EXACT_K].float() @ b[:, k : k + _EXACT_K].float().T).to(torch.int32)
    return total


def reciprocal_or_zero(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: an all-zero row quantizes to zeros, not NaN."""
    return torch.where(x == 0, torch.zeros_like(x), 1 / x)


def per_token_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) -> int8 codes (M, K) and scales float (M, 1): round half even of x * 127 / absmax."""
    absmax = x.abs().amax(dim=-1, keepdim=True)
    codes = torch.round(x * (127 * reciprocal_or_zero(absmax))).clamp(-127, 127)
    return codes.to(torch.int8), absmax / 127


def per_token_affine(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., K) -> int8 codes, scales (..., 1) and int8 zero points (..., 1): x = scale * (code -
    zero point).

    As compressed-tensors has it, operation by operation: 0 lies within the range, and the zero
    point is added before the sum is rounded, half to even. Where all are 0, the scale is 0, too.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round((-128 - low / divisor).clamp(-128, 127))
    codes = torch.round((x / divisor + zero).clamp(-128, 127))
    return codes.to(torch.int8), scale, zero.to(torch.int8)


def one_group(weight: Tensor, scale: Tensor) -> Grid:
    """int8 weight (N, K) and its scale (N, 1) as an integer grid with one group."""
    codes = (weight.to(torch.int16) + 128).to(torch.uint8)
    return Grid(codes, scale, torch.full_like(scale, 128, dtype=torch.uint8), group_size=-1)


def check_groups(fmt: str, grid: Grid, count: int = 1) -> None:
    """ValueError unless each row of the grid has so many groups."""
    if grid.scale.shape[1] != count:
        wanted = "one" if count == 1 else f"{count}"
        raise ValueError(
            f"{fmt}: groups: expected {wanted} for each row, got {grid.scale.shape[1]}"
        )


def signed_codes(fmt: str, grid: Grid) -> Tensor:
    """int8 (N, K), codes less their zero points. ValueError if a step is none that int8 holds."""
    zero = grid.zero.to(torch.int16).repeat_interleave(
        grid.codes.shape[1] // grid.zero.shape[1], dim=1
    )
    steps = grid.codes.to(torch.int16) - zero
    if bool((steps < -128).any()) or bool((steps > 127).any()):
        raise ValueError(
            f"{fmt}: expected codes within 128 of their zero point, got {steps.abs().max()}"
        )
    return steps.to(torch.int8)
