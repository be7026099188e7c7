"""Searches the scales of many GGUF blocks at once: ggml's weighted objectives.

x (..., n) float32 are the weights that share a scale; w (..., n) are the weights of their squared
errors. Results have a last dimension of 1. Each search tries a few scales near the one that just
spans the range, rounds, and takes the closed-form least-squares scale of those codes:

    symmetric     minimize sum w (x - s q)^2 over s;                    q in [-half, half - 1]
    asymmetric    minimize sum w (x - (s q - min))^2 over s, min >= 0;  q in [0, top]
    nonnegative   as symmetric with q in [0, top]; then single codes change while that helps

Rounding is half to even throughout. Source: the objectives of llama.cpp's quantize functions
(ggml-quants.c, release b11434).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: ggml's GROUP_MAX_EPS: a group with smaller weights counts as zero
EPSILON = 1e-15
HALF_MAX = 65504.0


class Scan(NamedTuple):
    """The inverse scales to try: (top + first + step * i) / range for i = 0..steps.

    absolute: minimize the weighted |error| instead of its square.
    """

    first: float
    step: float
    steps: int
    absolute: bool = False


#: Scans without and with importance. With importance the best range may be much below the full
#: range, because important weights inside it may count for more than those at its ends.
COARSE = Scan(-1.0, 0.1, 20)
FINE = Scan(-0.9, 0.1, 60)
#: how often codes are rounded again with the best scale (and minimum) after the scan
REFITS = 4


def half(x: Tensor) -> Tensor:
    """x as float16. Raises ValueError if a scale does not fit."""
    if bool((x.abs() > HALF_MAX).any()):
        raise ValueError(
            f"weight: expected scales up to 65504 (float16), got {x.abs().max().item():.6g}"
        )
    return x.half()


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where that is not finite."""
    result = 1 / x
    return torch.where(torch.isfinite(result), result, torch.zeros_like(result))


def error_weights(importance: Tensor, x: Tensor, sigma2: Tensor) -> Tensor:
    """importance * sqrt(sigma2 + x^2); sigma2 makes small weights count, too."""
    return importance * (sigma2 + x.square()).sqrt()


def largest(x: Tensor) -> Tensor:
    """The entry of largest magnitude, with its sign, (..., 1)."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


# ---------------------------------------------------------------------- without a search
def symmetric_from_largest(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """(scale, codes in [-half, half - 1]): the weight of largest magnitude gets the code -half."""
    scale = largest(x) / -half
    codes = (x * inverse(scale) + (half + 0.5)).trunc().clamp(0, 2 * half - 1) - half
    return scale, codes


def asymmetric_from_range(x: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, min, codes in [0, top]): the smallest weight gets 0, the largest `top`."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / top
    codes = ((x - low) * inverse(scale) + 0.5).trunc().clamp(0, top)
    return scale, -low, codes


def nonnegative_from_largest(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(scale, codes in [0, top]) of x >= 0: the largest gets `top`."""
    high = x.amax(-1, keepdim=True)
    return high / top, torch.round(x * (top * inverse(high))).clamp(0, top)


# ---------------------------------------------------------------------- searches
def symmetric(x: Tensor, w: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """(scale, codes in [-half, half - 1])."""
    high = largest(x)
    live = high.abs() >= EPSILON
    over = inverse(high)
    best = torch.zeros_like(high)
    scale, codes = torch.zeros_like(high), torch.zeros_like(x)
    for i in [0, *range(-9, 0), *range(1, 10 + REFITS)]:
        factor = -(half + 0.1 * i) * over if i < 10 else inverse(scale)
        q = torch.round(x * factor).clamp_(-half, half - 1)
        wq = w * q
        sum_xq, sum_qq = (wq * x).sum(-1, keepdim=True), (wq * q).sum(-1, keepdim=True)
        better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq) & live
        fitted = sum_xq * inverse(sum_qq)
        scale = torch.where(better, fitted, scale)
        best = torch.where(better, fitted * sum_xq, best)
        codes = torch.where(better, q, codes)
    return scale, codes


def asymmetric(x: Tensor, w: Tensor, top: int, scan: Scan) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, min, codes in [0, top])."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    width = high - low
    over = inverse(width)
    sum_w, sum_x = w.sum(-1, keepdim=True), (w * x).sum(-1, keepdim=True)

    def error_of(q: Tensor, scale: Tensor, base: Tensor) -> Tensor:
        error = scale * q + base - x
        return (w * (error.abs() if scan.absolute else error.square())).sum(-1, keepdim=True)

    def fitted(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Least-squares scale and base (= -min) of codes, and their error; infinite if singular."""
        wq = w * q
        sum_q, sum_qq = wq.sum(-1, keepdim=True), (wq * q).sum(-1, keepdim=True)
        sum_xq = (wq * x).sum(-1, keepdim=True)
        det = sum_w * sum_qq - sum_q * sum_q
        over_det = inverse(det)
        s, b = (
            (sum_w * sum_xq - sum_x * sum_q) * over_det,
            (sum_qq * sum_x - sum_q * sum_xq) * over_det,
        )
        above = b > 0  # a base above 0 is a negative min, which the file cannot store
        s, b = torch.where(above, sum_xq * inverse(sum_qq), s), torch.where(above, 0, b)
        return s, b, torch.where(det > 0, error_of(q, s, b), torch.inf)

    scale, base = width / top, low
    codes = torch.round((x - low) * (top * over)).clamp_(0, top)
    best = error_of(codes, scale, base)
    for i in range(scan.steps + 1 + REFITS):
        if i <= scan.steps:
            q = torch.round((x - low) * ((scan.first + scan.step * i + top) * over)).clamp_(0, top)
        else:  # refit: round with the best scale and base
            q = torch.round((x - base) * inverse(scale)).clamp_(0, top)
        s, b, error = fitted(q)
        better = error < best
        scale, base = torch.where(better, s, scale), torch.where(better, b, base)
        best, codes = torch.where(better, error, best), torch.where(better, q, codes)
    return scale.clamp(min=0), -base, codes


def nonnegative(x: Tensor, w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(scale (B, 1), codes in [0, top]) of x (B, n) >= 0; at most five passes over single codes."""
    over = inverse(x.amax(-1, keepdim=True))

    def codes_of(i: float) -> Tensor:
        return torch.round(x * ((0.1 * i + top) * over)).clamp_(max=top)

    def error_of(i: float, codes: Tensor) -> Tensor:
        scale = inverse((0.1 * i + top) * over)
        return (w * (x - scale * codes).square()).sum(-1, keepdim=True)

    codes = codes_of(0)
    best = error_of(0, codes)
    for i in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried = codes_of(i)
        error = error_of(i, tried)
        codes, best = torch.where(error < best, tried, codes), torch.minimum(error, best)
    wx = w * x
    sum_xq, sum_qq = (wx * codes).sum(-1), (w * codes.square()).sum(-1)
    for _ in range(5):
        changed = torch.zeros_like(sum_xq, dtype=torch.bool)
        for j in range(x.shape[-1]):
            old = codes[:, j]
            rest_xq, rest_qq = sum_xq - wx[:, j] * old, sum_qq - w[:, j] * old.square()
            new = torch.round(x[:, j] * rest_qq * inverse(rest_xq)).clamp(0, top)
            new_xq, new_qq = rest_xq + wx[:, j] * new, rest_qq + w[:, j] * new.square()
            take = (rest_xq > 0) & (rest_qq > 0) & (new != old)
            take &= new_xq.square() * sum_qq > sum_xq.square() * new_qq
            codes[:, j] = torch.where(take, new, old)
            sum_xq, sum_qq = torch.where(take, new_xq, sum_xq), torch.where(take, new_qq, sum_qq)
            changed |= take
        if not bool(changed.any()):
            break
    scale = (sum_xq * inverse(sum_qq))[:, None]
    return scale, codes


# ---------------------------------------------------------------------- tables
def nearest(x: Tensor, table: tuple[float, ...]) -> Tensor:
    """Index of the nearest entry of an ascending table, uint8."""
    values = torch.tensor(table, dtype=torch.float32, device=x.device)
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2, right=True).to(torch.uint8)


def table_scale(x: Tensor, w: Tensor, table: tuple[float, ...]) -> Tensor:
    """The best of the tried scales for a table t, (..., 1).

    It maximizes (sum w x t)^2 / sum w t^2. 15 scales are tried around each scale that maps the
    largest weight to an end of the table.
    """
    values = torch.tensor(table, dtype=torch.float32, device=x.device)
    high = largest(x)
    live = high.abs() >= EPSILON
    over = inverse(high)
    scale, best = torch.zeros_like(high), torch.zeros_like(high)
    # The table is uneven, so the largest weight may belong to either of its ends.
    for end in [e + i for e in (table[0], table[-1]) for i in range(-7, 8)]:
        q = values[nearest(x * (end * over), table).int()]
        wq = w * q
        sum_xq, sum_qq = (wq * x).sum(-1, keepdim=True), (wq * q).sum(-1, keepdim=True)
        better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq) & live
        fitted = sum_xq * inverse(sum_qq)
        scale, best = torch.where(better, fitted, scale), torch.where(better, fitted * sum_xq, best)
    return scale
