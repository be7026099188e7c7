"""GPTQ: rounds one input feature at a time; the features after it compensate for its error.

It minimizes tr((W - Q) H (W - Q)^T), the squared error of the layer's output on the calibration
inputs, with H the mean of x x^T over them. Rows of W are independent, so layers with the same input
may be stacked.

Source: Frantar et al. 2022 (arXiv 2210.17323).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats import grid
from ..formats.grid import Grid, group_count, split_groups
from ..formats.hessian import BLOCK, inverse_factor


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool = False,
    static_groups: bool = False,
    clip_search: bool = False,
    damp: float = 0.01,
) -> Grid:
    """Quantize a weight (N, K), in float64 if the weight is float64, in float32 otherwise.

    Args:
        hessian: H (K, K).
        group_size: -1 for one group; the last group is short where it does not divide K.
        act_order: round features in order of falling diag(H), with groups along that order.
        static_groups: groups in the checkpoint's order, with scales fixed before rounding starts.
        clip_search: choose each group's range by searching for the least error, instead of min and
            max.
        damp: fraction of the mean diagonal added to the diagonal; raised tenfold until H is
            positive definite.

    Raises:
        ValueError: for an H of another shape, or one that stays singular.
    """
    n, k = weight.shape
    if hessian.shape != (k, k):
        raise ValueError(f"hessian: expected shape ({k}, {k}), got {tuple(hessian.shape)}")
    size = k if group_size == -1 else min(group_size, k)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w, h = weight.to(dtype, copy=True), hessian.to(dtype, copy=True)
    dead = h.diagonal() == 0  # inputs that are always zero, so their weights may be zero, too
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    order = torch.arange(k, device=w.device)
    if act_order:
        order = h.diagonal().argsort(descending=True, stable=True)
        w, h = w[:, order], h[order][:, order]
    in_order = torch.arange(k, device=w.device) // size
    # the group of each position in rounding order
    group_at = order // size if static_groups else in_order
    upper = inverse_factor(h, damp)
    groups = group_count(k, size)
    scale = torch.ones(n, groups, dtype=torch.float16, device=w.device)
    zero = torch.zeros(n, groups, dtype=torch.uint8, device=w.device)
    if static_groups:
        original = torch.empty_like(w)
        original[:, order] = w
        scale, zero = fit(split_groups(original, size), bits, symmetric, clip_search)
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    top = (1 << bits) - 1
    # Every group starts within a block, so its weights are up to date when its scale is chosen.
    step = size * max(1, BLOCK // size) if size <= BLOCK else math.gcd(size, BLOCK)
    index = group_at.tolist()
    for begin in range(0, k, step):
        end = min(begin + step, k)
        block, errors = w[:, begin:end], torch.empty(n, end - begin, dtype=dtype, device=w.device)
        factor = upper[begin:end, begin:end]
        for i in range(end - begin):
            at = begin + i
            if not static_groups and at % size == 0:
                current = w[:, at : at + size].unsqueeze(1)
                group_scale, group_zero = fit(current, bits, symmetric, clip_search)
                scale[:, index[at]], zero[:, index[at]] = group_scale[:, 0], group_zero[:, 0]
            s, z = scale[:, index[at]].float(), zero[:, index[at]].float()
            column = block[:, i]
            code = (torch.round(column / s) + z).clamp_(0, top)
            codes[:, at] = code.to(torch.uint8)
            error = (column - (code - z) * s) / factor[i, i]
            errors[:, i] = error
            block[:, i + 1 :].addr_(error, factor[i, i + 1 :], alpha=-1)
        w[:, end:].addmm_(errors, upper[begin:end, end:], alpha=-1)
    codes_in_order = torch.empty_like(codes)
    codes_in_order[:, order] = codes
    group_of = torch.empty(k, dtype=torch.int32, device=w.device)
    group_of[order] = group_at.to(torch.int32)
    return Grid(codes_in_order, scale, zero, group_size, group_of)


def fit(grouped: Tensor, bits: int, symmetric: bool, search: bool) -> tuple[Tensor, Tensor]:
    """Scale float16 and zero uint8 (N, G) of groups (N, G, g).

    They come from the full range of a group, or with `search` from the range with the least sum of
    |error|^2.4.
    """
    scale, zero = grid.fit(grouped, bits, symmetric)
    if not search:
        return scale, zero
    best = _error(grouped, scale, zero, bits)
    for percent in range(99, 19, -1):
        narrower = grid.fit(grouped * (percent / 100), bits, symmetric)
        error = _error(grouped, *narrower, bits)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, narrower[0], scale)
        zero = torch.where(better, narrower[1], zero)
    return scale, zero


def _error(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The sum of |error|^2.4 of each group, (N, G)."""
    codes = grid.encode(grouped, scale, zero, bits).float()
    rounded = (codes - zero.float()[..., None]) * scale.float()[..., None]
    return (rounded - grouped).abs_().pow_(2.4).sum(-1)
