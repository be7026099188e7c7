"""LDLQ, the rounding of QuIP and QuIP#: it propagates rounding errors, between the transforms.

Like GPTQ it minimizes tr((W - Q) H (W - Q)^T), but from the last column to the first. With
H = L D L^T, L unit lower triangular in blocks, and E = W - Q, that trace is the sum over blocks k
of (E L)_k D_k (E L)_k^T, and

    Q_k = round(W_k + sum over j > k of E_j L_jk)

makes each term as small as rounding can. A block is one column for integer grids, and 8 columns for
codes of eight weights. Coordinate descent then rounds each block again with all others fixed.

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

#: columns that one product updates
LAZY = 128
#: fraction of the mean diagonal added to the diagonal of H
DAMP = 0.01

#: targets (N, block) -> (codes (N, any), their values (N, block))
Rounder = Callable[[Tensor], tuple[Tensor, Tensor]]


def input_scale(weight: Tensor, hessian: Tensor | None) -> Tensor:
    """Factors of the inputs, (K), that give inputs and weights (divided by them) the same range.

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


def inner_weight(
    weight: Tensor, hessian: Tensor | None, before: Side, after: Side
) -> tuple[Tensor, Tensor | None]:
    """W (N, K) and H (K, K) between the transforms, float32."""
    inverse_in = before._replace(diagonal=before.diagonal.float().reciprocal())
    inverse_out = after._replace(diagonal=after.diagonal.float().reciprocal())
    inner = inverse_out.inner(inverse_in.inner(weight.float()).T).T
    if hessian is None:
        return inner, None
    if hessian.shape != (weight.shape[1],) * 2:
        k = weight.shape[1]
        raise ValueError(f"hessian: expected shape ({k}, {k}), got {tuple(hessian.shape)}")
    return inner, before.inner(before.inner(hessian.float()).T)


def ldlq(
    weight: Tensor, hessian: Tensor | None, rounder: Rounder, *, block: int, passes: int = 0
) -> Tensor:
    """Codes of a weight (N, K), the codes of all blocks side by side.

    Args:
        hessian: H (K, K); None rounds each block to nearest.
        rounder: rounds the targets of one block.
        block: columns of a block.
        passes: rounds of coordinate descent afterwards.

    Raises:
        ValueError: for a singular H.
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
            columns = slice(i, i + block)
            target = (
                targets[:, i - begin : i - begin + block]
                + error[:, i + block : end] @ lower[i + block : end, columns]
            )
            codes[i // block], value = rounder(target)
            error[:, columns] = weight[:, columns] - value
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
    """Round every block again to its best codes with all others fixed; changes `error`, `codes`."""
    k = weight.shape[1]
    for begin in range(0, k, lazy):
        end = min(begin + lazy, k)
        gradient = error @ h[:, begin:end]  # updated below for the columns begin..end
        for i in range(begin, end, block):
            columns = slice(i, i + block)
            local = slice(i - begin, i - begin + block)
            step = torch.linalg.solve(h[columns, columns], gradient[:, local], left=False)
            value = weight[:, columns] - error[:, columns]
            codes[i // block], rounded = rounder(value + step)
            change = value - rounded
            error[:, columns] += change
            gradient += change @ h[columns, begin:end]
