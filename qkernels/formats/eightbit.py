"""Exact int8 products, activation scales and int8 grids for the formats int8 and w8a8."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import Grid

# 1024 products of two int8 (at most 2^14 each) sum to at most 2^24: exact in float32 in any order.
_EXACT_K = 1024


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact product a (M, K) @ b (N, K)^T of int8 matrices -> int32 (M, N), on any device."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for k in range(0, a.shape[1], _EXACT_K):
        total += (a[:, k : k + _EXACT_K].float() @ b[:, k : k + _EXACT_K].float().T).to(torch.int32)
    return total


def reciprocal_or_zero(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: an all-zero row quantizes to zeros, not NaN."""
    return torch.where(x == 0, torch.zeros_like(x), 1 / x)


def per_token_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) -> int8 codes (M, K), scales (M, 1): x * 127 / absmax, rounded half to even."""
    absmax = x.abs().amax(dim=-1, keepdim=True)
    codes = torch.round(x * (127 * reciprocal_or_zero(absmax))).clamp(-127, 127)
    return codes.to(torch.int8), absmax / 127


def per_token_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., K) -> int8 codes, scales (..., 1) and int8 zero points (..., 1).

    x = scale * (code - zero point). Each operation is compressed-tensors': the range contains 0,
    and the zero point is added before the sum is rounded, half to even. Where a whole row is 0, the
    scale is 0, too.
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
    """Raise ValueError unless each row of the grid has `count` groups."""
    if grid.scale.shape[1] != count:
        expected = "one" if count == 1 else f"{count}"
        raise ValueError(
            f"{fmt}: groups: expected {expected} for each row, got {grid.scale.shape[1]}"
        )


def signed_codes(fmt: str, grid: Grid) -> Tensor:
    """code - zero as int8 (N, K). Raises ValueError if a difference does not fit int8."""
    zero = grid.zero.to(torch.int16).repeat_interleave(
        grid.codes.shape[1] // grid.zero.shape[1], dim=1
    )
    steps = grid.codes.to(torch.int16) - zero
    if bool((steps < -128).any()) or bool((steps > 127).any()):
        raise ValueError(
            f"{fmt}: expected codes within 128 of their zero point, got {steps.abs().max()}"
        )
    return steps.to(torch.int8)
