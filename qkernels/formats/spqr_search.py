"""SpQR's search: GPTQ with tiny groups, quantized scales and zeros, and outliers in 16 bits.

A weight is an outlier if its rounding costs the output more than `threshold` times the mean of
Var(column) / U_kk^2, with U the factor by which GPTQ divides errors. An outlier would widen the
range of its group, so the range is fitted without likely outliers. A leave-one-out fit finds them:
without such a weight the rest of the group rounds that much better.

Source: Dettmers et al. 2023, arXiv 2306.03078, algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .hessian import BLOCK, inverse_factor
from .spqr_grid import STAT_TOP, SpqrGrid, pack_outliers, stats

_TINY = 1e-12


class _Range(NamedTuple):
    """The grid scale * (code - zero); both tensors are (..., 1)."""

    scale: Tensor
    zero: Tensor

    def round(self, weight: Tensor, top: int) -> Tensor:
        """`weight` rounded to the nearest point, with codes 0..top."""
        codes = (torch.round(weight / self.scale + self.zero)).clamp(0, top)
        return self.scale * (codes - self.zero)


def spqr(
    weight: Tensor,
    hessian: Tensor | None,
    *,
    bits: int,
    group_size: int = 16,
    row_group: int = 16,
    act_order: bool = False,
    threshold: float = 0.2,
    damp: float = 0.01,
) -> SpqrGrid:
    """Quantize a weight (N, K).

    Args:
        hessian: H (K, K), the mean of x x^T; None if all inputs count the same.
        act_order: round columns in order of falling diag(H), with groups along that order.
        threshold: relative cost from which a weight is an outlier; negative for no outliers.
        damp: fraction of the mean diagonal added to H. SpQR's authors take 1, which propagates less
            of the errors.

    Raises:
        ValueError: for an H of another shape, or one that stays singular.
    """
    n, k = weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = weight.to(dtype, copy=True)
    perm = None
    if hessian is None:
        upper = torch.eye(k, dtype=dtype, device=w.device)
        importance = w.square().sum(0)
    else:
        if hessian.shape != (k, k):
            raise ValueError(f"hessian: expected shape ({k}, {k}), got {tuple(hessian.shape)}")
        h = hessian.to(dtype, copy=True)
        importance = h.diagonal().clone()
        dead = importance == 0
        h.diagonal()[dead] = 1
        w[:, dead] = 0
    if act_order:
        perm = importance.argsort(descending=True, stable=True)
        w = w[:, perm]
    if hessian is not None:
        upper = inverse_factor(h if perm is None else h[perm][:, perm], damp)
    pivots = upper.diagonal()
    limit = (
        threshold * float((w.var(0) / pivots.square()).mean())
        if n > 1 and threshold >= 0
        else torch.inf
    )
    top = (1 << bits) - 1
    row_group = min(row_group, n)
    groups, rows = k // group_size, -(-n // row_group)
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    stat_codes = torch.empty(2, n, groups, dtype=torch.uint8, device=w.device)
    second_level = torch.empty(groups, rows, 4, dtype=torch.float16, device=w.device)
    outliers = torch.zeros(n, k, dtype=torch.float16, device=w.device)
    step = group_size * max(1, BLOCK // group_size)
    for begin in range(0, k, step):
        end = min(begin + step, k)
        errors = torch.empty(n, end - begin, dtype=dtype, device=w.device)
        block, factor = w[:, begin:end], upper[begin:end, begin:end]
        for i in range(end - begin):
            at = begin + i
            g = at // group_size
            if at % group_size == 0:
                group, group_pivots = w[:, at : at + group_size], pivots[at : at + group_size]
                inliers = _without_outliers(group, group_pivots, limit, top)
                stat_codes[:, :, g], second_level[g] = _quantized_stats(
                    inliers, group_pivots, top, row_group
                )
                codes_s, codes_z = stat_codes[0, :, g : g + 1], stat_codes[1, :, g : g + 1]
                scale, zero = stats(codes_s, codes_z, second_level[g : g + 1], row_group)
                scale, zero = scale[:, 0].to(dtype), zero[:, 0].to(dtype)
            column = block[:, i]
            code = torch.round(column / scale + zero).clamp_(0, top)
            codes[:, at] = code.to(torch.uint8)
            rounded = scale * (code - zero)
            error = (column - rounded) / pivots[at]
            if limit != torch.inf:
                # An outlier is the difference in float16; where float16 cannot hold the difference,
                # the weight is no outlier.
                value = (column - rounded).half()
                is_outlier = (error.square() > limit) & torch.isfinite(value) & (value != 0)
                outliers[:, at] = torch.where(is_outlier, value, 0)
                error = torch.where(
                    is_outlier, (column - rounded - value.to(dtype)) / pivots[at], error
                )
            errors[:, i] = error
            block[:, i + 1 :].addr_(error, factor[i, i + 1 :], alpha=-1)
        w[:, end:].addmm_(errors, upper[begin:end, end:], alpha=-1)
    outlier_rows, columns = outliers.nonzero(as_tuple=True)
    offsets = torch.zeros(n + 1, dtype=torch.int32, device=w.device)
    offsets[1:] = (outliers != 0).sum(1).cumsum(0)
    col_vals = pack_outliers(outliers[outlier_rows, columns], columns)
    return SpqrGrid(codes, stat_codes[0], stat_codes[1], second_level, offsets, col_vals, perm)


def _extremes(group: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum along the last dimension, each (..., 1)."""
    return group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)


def _fit(low: Tensor, high: Tensor, top: int) -> _Range:
    """The grid with `low` as its first and `high` as its last point."""
    scale = ((high - low) / top).clamp(min=_TINY)
    return _Range(scale, -low / scale)


def _without_outliers(group: Tensor, pivots: Tensor, limit: float, top: int) -> Tensor:
    """A group (N, g) with likely outliers replaced by the mean of the rest, to fit a range to."""
    if limit == torch.inf or group.shape[1] < 3:
        return group
    cost = (
        ((_fit(*_extremes(group), top).round(group, top) - group) / pivots)
        .square()
        .sum(-1, keepdim=True)
    )
    # Leaving one weight out changes the range only if it is the smallest or the largest.
    saved = torch.empty_like(group)
    for i in range(group.shape[1]):
        rest = torch.cat([group[:, :i], group[:, i + 1 :]], 1)
        rest_pivots = torch.cat([pivots[:i], pivots[i + 1 :]])
        rounded = _fit(*_extremes(rest), top).round(rest, top)
        saved[:, i] = cost[:, 0] - ((rounded - rest) / rest_pivots).square().sum(-1)
    inlier = saved <= limit
    mean = (group * inlier).sum(-1, keepdim=True) / inlier.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(inlier, group, mean)


def _quantized_stats(
    group: Tensor, pivots: Tensor, top: int, row_group: int
) -> tuple[Tensor, Tensor]:
    """A group (N, g) -> codes uint8 (2, N) of scales and zeros, second level float16 (R, 4).

    The step and offset of the codes come from the range of the rows' exact scales and zeros. Each
    row then takes the code that rounds it best.
    """
    low, high = group.amin(-1), group.amax(-1)
    # A scale far below the weights, or below the scales of neighbouring rows, would need zeros
    # beyond float16.
    scale = torch.maximum((high - low) / top, torch.maximum(low.abs(), high.abs()) / 64)
    largest = _by_rows(scale, row_group).amax(1).repeat_interleave(row_group)[: scale.shape[0]]
    scale = torch.maximum(scale, largest / 256).clamp(min=2.0**-20)
    s_s, s_z = _steps(scale, row_group)
    middle = (low + high) / 2
    candidates = _points(s_s, s_z, row_group, group)  # (8, N)
    candidates = torch.where(candidates > 0, candidates, torch.full_like(candidates, 2.0**15))
    zeros = top / 2 - middle / candidates
    scale_codes, scale = _best(group, pivots, candidates, zeros, candidates, top)
    z_s, z_z = _steps(top / 2 - middle / scale, row_group)
    candidates = _points(z_s, z_z, row_group, group)
    zero_codes, _ = _best(group, pivots, scale.expand_as(candidates), candidates, candidates, top)
    return torch.stack([scale_codes, zero_codes]), torch.stack([s_s, z_s, s_z, z_z], 1)


def _best(
    group: Tensor, pivots: Tensor, scales: Tensor, zeros: Tensor, values: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """The best of 8 grids for each row: its number, uint8 (N), and its entry of `values`, (N).

    scales, zeros, values: (8, N).
    """
    cost = [
        ((_Range(s[:, None], z[:, None]).round(group, top) - group) / pivots).square().sum(-1)
        for s, z in zip(scales, zeros, strict=True)
    ]
    code = torch.stack(cost).argmin(0)
    return code.to(torch.uint8), values.gather(0, code[None])[0]


def _by_rows(values: Tensor, row_group: int) -> Tensor:
    """Values (N) -> (R, row_group); the last value fills missing rows."""
    missing = -values.numel() % row_group
    return torch.cat([values, values[-1:].expand(missing)]).view(-1, row_group)


def _steps(values: Tensor, row_group: int) -> tuple[Tensor, Tensor]:
    """Step and offset, float16 (R), of codes so that step * (code - offset) spans values (N)."""
    grouped = _by_rows(values, row_group)
    low, high = grouped.amin(1), grouped.amax(1)
    # A step far below the values would need so large an offset that float16 cannot resolve it.
    largest = torch.maximum(low.abs(), high.abs())
    step = torch.maximum((high - low) / STAT_TOP, largest / 512).clamp(min=2.0**-24).half()
    return step, (-low / step.to(low.dtype)).half()


def _points(step: Tensor, offset: Tensor, row_group: int, like: Tensor) -> Tensor:
    """The values of all 8 codes for each row, (8, N)."""
    codes = torch.arange(STAT_TOP + 1, dtype=torch.float32, device=like.device)
    values = step.float() * (codes[:, None] - offset.float())
    return values.to(like.dtype).repeat_interleave(row_group, 1)[:, : like.shape[0]]
