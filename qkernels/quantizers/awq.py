"""AWQ: scales up important input features before rounding, and clips ranges where that helps.

Multiplying a feature's weights by s and dividing its activations by s does not change the layer's
output, and the rounding error of those weights shrinks by s. s = mean|x|^ratio, with the ratio that
gives the least error of the layers' output; the division is folded into the operator before. Then
each group's range is narrowed to where the group's part of the output error is least.

Source: Lin et al. 2023 (arXiv 2306.00978).

Errors are those of the linear layers' outputs, tr((W - Q) H (W - Q)^T) with H the mean of x x^T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats.grid import split_groups

RATIOS = 20
#: the narrowest range tried, as a fraction of a group's largest magnitude, and the number of ranges
CLIP_LOWEST = 0.5
CLIP_STEPS = 10


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T): the mean squared error of the output that D = W - Q (N, K) makes."""
    return float(((difference @ hessian) * difference).sum())


def search_scale(
    weight: Tensor, hessian: Tensor, mean_abs: Tensor, round_trip: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float, float]:
    """Scales (K) for the features of W (N, K), and the output error without and with them.

    weight: all layers that share the input, stacked. mean_abs: mean |x| of each feature (K).
    round_trip: quantizes and dequantizes an (N, K) weight.
    """
    unscaled = output_error(weight - round_trip(weight), hessian)
    best, least = torch.ones_like(mean_abs), unscaled
    for i in range(1, RATIOS):
        scale = mean_abs.clamp(min=1e-4).pow(i / RATIOS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = output_error(weight - round_trip(weight * scale) / scale, hessian)
        if error < least:
            best, least = scale, error
    return best, unscaled, least


def search_clip(
    weight: Tensor, hessian: Tensor, group_size: int, round_trip: Callable[[Tensor], Tensor]
) -> Tensor:
    """W (N, K) clipped: each group gets the range with the least error of the output.

    round_trip: quantizes and dequantizes an (N, K) weight.
    """
    n, k = weight.shape
    grouped = split_groups(weight, group_size)
    size = grouped.shape[2]
    blocks = [hessian[i : i + size, i : i + size] for i in range(0, k, size)]
    blocks[-1] = torch.nn.functional.pad(blocks[-1], (0, -k % size, 0, -k % size))
    stacked = torch.stack(blocks)

    def errors(rounded: Tensor) -> Tensor:
        difference = split_groups(weight - rounded, group_size).transpose(0, 1)  # (G, N, g)
        return ((difference @ stacked) * difference).sum(-1).T  # (N, G)

    largest = grouped.abs().amax(-1, keepdim=True)
    best, least = weight.clone(), errors(round_trip(weight))
    for i in range(1, CLIP_STEPS + 1):
        limit = largest * (1 - (1 - CLIP_LOWEST) * i / CLIP_STEPS)
        clipped = torch.clamp(grouped, -limit, limit).view(n, -1)[:, :k]
        error = errors(round_trip(clipped))
        better = (error < least)[..., None].expand(n, -1, size).reshape(n, -1)[:, :k]
        best = torch.where(better, clipped, best)
        least = torch.minimum(error, least)
    return best
