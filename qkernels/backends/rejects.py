"""Why a GPU backend does not take a problem: the checks that Triton and CUDA have in common."""

from __future__ import annotations

import torch

from .. import formats
from .problem import Problem

#: the oldest GPU that kernels run on
MIN_CAPABILITY = (8, 0)


def common_reason(problem: Problem, layout: str, device_reason: str | None) -> str | None:
    """Why no kernel for weights in `layout` takes the problem, or None.

    Args:
        problem: the product to compute.
        layout: the kernel layout that the backend's kernel reads.
        device_reason: why the backend does not run on the problem's device, or None.
    """
    fmt, params = formats.get(problem.format), dict(problem.params)
    if obstacle := fmt.obstacle(problem.shape, params):
        return obstacle
    if fmt.kernel_layout(params) != layout:
        family = layout.replace("_", "-")
        return f"{problem.format} with these parameters is not in the {family} family"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"x must be float16 or bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if device_reason is not None:
        return device_reason
    if problem.capability is not None and problem.capability < MIN_CAPABILITY:
        return f"needs sm_80 or newer, this is sm_{problem.capability[0]}{problem.capability[1]}"
    return None
