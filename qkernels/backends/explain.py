"""`qkernels.explain`: which kernel runs a product, why, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from . import roofline
from .problem import Problem, problem_of
from .registry import choose, resolve_backend, select, select_experts

if TYPE_CHECKING:
    from ..weights.experts import PackedExperts
    from ..weights.packed import PackedWeight


@dataclass(frozen=True)
class Explanation:
    """The kernel of a product, and the reasons. `str()` of it is meant to be read.

    Attributes:
        problem: the product.
        kernel, backend: the kernel's name and backend.
        reason: why it runs, with its configuration.
        rejected: (name, reason) of every other kernel.
    """

    problem: Problem
    kernel: str
    backend: str
    reason: str
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        n, k = self.problem.shape
        device = self.problem.device
        if self.problem.capability:
            device += f" sm_{self.problem.capability[0]}{self.problem.capability[1]}"
        experts = f"{self.problem.experts} experts of " if self.problem.experts else ""
        lines = [
            f"{experts}{self.problem.format} ({n}, {k}), M={self.problem.m}, "
            f"{str(self.problem.dtype).removeprefix('torch.')} on {device}: {self.kernel}",
            f"  {self.kernel}: {self.reason}",
        ]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.rejected])


def explain(
    p: PackedWeight | PackedExperts,
    m: int = 1,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> Explanation:
    """Which kernel `matmul` runs for x of shape (m, K) and `dtype`, why, and why not the others.

    For experts the product is `grouped_matmul`, of m pairs of a token and an expert. `device`
    defaults to the weight's. Raises ValueError if `backend` has no kernel for the product.
    """
    target = p.device if device is None else torch.device(device)
    problem = problem_of(p, m, dtype, target, batch_invariant)
    kernel = (select_experts if problem.experts else select)(problem, backend)
    _, rejected = choose(problem, resolve_backend(backend))
    if kernel.backend == "reference":
        reason = (
            "plain torch operations; dequantizes the whole weight into temporary memory "
            "at each call"
            if kernel.name.startswith("reference.")
            else "torch's own dense matmul"
        )
    else:
        reason = "fused: multiplies straight from the packed bytes"
        if resolve_backend(backend) == "auto" and (first := kernel.first(problem)):
            reason += f"; taken first, because {first}"
        if kernel.layout != p.layout:
            reason += f"; the first call moves the weight to the {kernel.layout!r} layout, once"
        if configuration := kernel.configuration(problem):
            reason += f"\n  configuration: {configuration}"
    # For experts only the ids say how many bytes are read.
    if target.type == "cuda" and not problem.experts:
        reason += at_best(problem, p.nbytes, torch.cuda.get_device_name(target))
    return Explanation(problem, kernel.name, kernel.backend, reason, rejected)


def at_best(problem: Problem, nbytes: int, gpu_name: str) -> str:
    """A line with the least time that the product could take on that GPU; "" for an unknown GPU."""
    gpu = roofline.find(gpu_name)
    if gpu is None:
        return ""
    kind = roofline.operands(problem.format, problem.shape, dict(problem.params))
    least = roofline.estimate(gpu, problem.shape, problem.m, nbytes, kind=kind)
    return f"\n  at best {least.seconds * 1e6:.1f} us on an {gpu.name}, limited by {least.limit}"
