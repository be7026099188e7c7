"""LDLQ: rounding that passes errors on, inside the transforms of QuIP and QuIP#.

Minimizes tr((W - Q) H (W - Q)^T) as GPTQ does, from the last column to the first: with H = L D L^T,
L unit lower triangular in blocks, and E = W - Q, it is the sum over blocks k of (E L)_k D_k (E
L)_k^T, and

    Q_k = round(W_k + sum over j > k of E_j L_jk)

makes each term as small as rounding can. Blocks are single columns for integer grids, 8 columns for
codes of eight weights. Coordinate descent afterwards rounds each block again, all others fixed.

Sources: Chee et al. 2023 (arXiv 2307.13304), section 3; Tseng et al. 2024 (arXiv 2402.04396),
section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .incoherent import Side

#: columns brought up to date in one product
LAZY = 128
#: fraction of the mean diagonal added to the diagonal of H
DAMP = 0.01

Rounder = Callable[[Tensor], tuple[Tensor, Tensor]]


def input_scale(weight: Tensor, hessian: Tensor | None) -> Tensor:
    """What inputs are multiplied by, (K), so that weights (divided by it) and inputs share their
    ranges.

    (diag W^T W / diag H)^(1/4), the square root of the ratio of their root mean squares; 1 without
    H.
    """
    if hessian is None:
        return weight.new_ones(weight.shape[1])
    inputs, weights = hessian.diagonal().float(), weight.float().square().mean(0)
    inputs = inputs + 1e-6 * inputs.mean() + 1e-20
    weights = weights + 1e-6 * weights.mean() + 1e-20
    scale = (weights / inputs) ** 0.25
    return (scale / scale.log().mean().exp()).clamp(2.0**-10, 2.0**10)


def to_inside(
    weight: Tensor, hessian: Tensor | None, before: Side, after: Side
) -> tuple[Tensor, Tensor | None]:
    """W (N, K) and H (K, K) as they are between the transforms, float32."""
    inverse_in = before._replace(diagonal=before.diagonal.float().reciprocal())
    inverse_out = after._replace(diagonal=after.diagonal.float().reciprocal())
    inside = inverse_out.inner(inverse_in.inner(weight.float()).T).T
    if hessian is None:
        return inside, None
    if hessian.shape != (weight.shape[1],) * 2:
        k = weight.shape[1]
        raise ValueError(f"hessian: expected shape ({k}, {k}), got {tuple(hessian.shape)}")
    return inside, before.inner(before.inner(hessian.float()).T)


def ldlq(
    weight: Tensor, hessian: Tensor | None, rounder: Rounder, *, block: int, passes: int = 0
) -> Tensor:
    """Codes of weight (N, K). rounder: (N, block) targets -> codes (N, any) and their values (N,
    block).

    Raises ValueError for an H that stays singular.
    """
    _n, k = weight.shape
    if hessian is None:
        blocks = [rounder(part)[0] for part in weight.split(block, 1)]
        return torch.cat(blocks, 1)
    h = hessian.clone()
    h.diagonal().add_(DAMP * h.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(h)
    if failed:
        raise ValueError("hessian: expected a positive definite matrix, got one that is singular")
    pivots = torch.stack([lower[i : i + block, i : i + block] for i in range(0, k, block)])
    inverse = torch.linalg.inv(pivots)
    lower = torch.einsum("kjb,jbc->kjc", lower.view(k, k // block, block), inverse).reshape(k, k)

    error = torch.zeros_like(weight)
    codes: list[Tensor] = [weight] * (k // block)
    lazy = -(-LAZY // block) * block
    for end in range(k, 0, -lazy):
        begin = max(0, end - lazy)
        targets = weight[:, begin:end] + error[:, end:] @ lower[end:, begin:end]
        for i in range(end - block, begin - 1, -block):
            own = slice(i, i + block)
            target = (
                targets[:, i - begin : i - begin + block]
                + error[:, i + block : end] @ lower[i + block : end, own]
            )
            codes[i // block], value = rounder(target)
            error[:, own] = weight[:, own] - value
    for _ in range(passes):
        _descend(weight, error, codes, h, rounder, block, lazy)
    return torch.cat(codes, 1)


def _descend(
    weight: Tensor,
    error: Tensor,
    codes: list[Tensor],
    h: Tensor,
    rounder: Rounder,
    block: int,
    lazy: int,
) -> None:
    """Rounds every block again to what is best if all others stay; changes `error` and `codes`."""
    k = weight.shape[1]
    for begin in range(0, k, lazy):
        end = min(begin + lazy, k)
        gradient = error @ h[:, begin:end]  # kept up to date within begin..end
        for i in range(begin, end, block):
            own = slice(i, i + block)
            inside = slice(i - begin, i - begin + block)
            step = torch.linalg.solve(h[own, own], gradient[:, inside], left=False)
            value = weight[:, own] - error[:, own]
            codes[i // block], rounded = rounder(value + step)
            change = value - rounded
            error[:, own] += change
            gradient += change @ h[own, begin:end]
