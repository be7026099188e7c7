"""The factored inverse Hessian, for algorithms that propagate rounding errors (GPTQ, SpQR)."""

from __future__ import annotations

import torch
from torch import Tensor

#: columns rounded before one product updates all columns after them
BLOCK = 128


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper triangular U with U^T U = (H + damp * mean(diag H) * I)^-1.

    damp is raised tenfold, three times at most, until H is positive definite; then ValueError.
    """
    mean = hessian.diagonal().mean()
    for attempt in range(4):
        damped = hessian.clone()
        damped.diagonal().add_(mean * damp * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
    raise ValueError(
        "hessian: expected a positive definite matrix, got one that stays singular with "
        f"damp={damp * 1000}"
    )
