"""SmoothQuant: moves the difficulty of activations with outlier features into the weights.

x / s and W * s give the same product; s = max|x|^alpha / max|W|^(1 - alpha) per input feature evens
out both ranges. The division by s is folded into the operator before.

Source: Xiao et al. 2022 (arXiv 2211.10438).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-5


def smoothing_scale(max_abs: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """s (K), from the largest |x| of each feature (K) and all weights (N, K) with that input."""
    largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0).float().clamp(min=FLOOR)
    scale = max_abs.float().clamp(min=FLOOR).pow(alpha) / largest.pow(1 - alpha)
    return scale.clamp(min=FLOOR)
