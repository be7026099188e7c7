"""Which backend measured faster on a GPU, by kind of kernel and rows of x: what backend="auto" goes
by.

FASTER is printed by `python -m bench.faster RESULTS.json...` from the results that RUN names, not
written by hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import formats, layouts

if TYPE_CHECKING:
    from .problem import Problem

RUN, GPU, CAPABILITY = "bench/results/2026-11-27-h200", "NVIDIA H200", (9, 0)
#: kind of kernel -> (most rows of x, faster backend), rows ascending; the last entry holds for all
#: above, too
FASTER: dict[str, tuple[tuple[int, str], ...]] = {
    "unsigned4 q4_k": ((256, "triton"), (4096, "cuda")),
    "e4m3 row token": ((16, "triton"), (32, "cuda"), (4096, "triton")),
    "int8 row token": ((16, "triton"), (32, "cuda"), (4096, "triton")),
    "linear4 group": ((256, "triton"), (4096, "cuda")),
    "lut164 scale": ((4096, "triton"),),
}


def kind_of(problem: Problem) -> str | None:
    """What decides which code runs: the codes and their scales, not the format that has them. None
    for what has no kernel."""
    fmt, params = formats.get(problem.format), dict(problem.params)
    layout = None if fmt.obstacle(problem.shape, params) else fmt.kernel_layout(params)
    if layout == layouts.WEIGHT_ONLY:
        codes = fmt.weight_only_traits(problem.shape, params)
        return f"{codes.decoder}{codes.bits} {codes.scaler}"
    if layout == layouts.EIGHT_BIT:
        both = fmt.eight_bit_traits(problem.shape, params)
        return f"{both.kind} {both.weight_scale} {both.activation}" + (
            " outliers" if both.threshold else ""
        )
    return None


def faster(problem: Problem) -> str | None:
    """The backend that measured faster for such a problem; None where nothing was measured."""
    if problem.capability != CAPABILITY or problem.experts or problem.batch_invariant:
        return None
    known = FASTER.get(kind_of(problem) or "")
    if not known:
        return None
    return next((backend for most, backend in known if problem.m <= most), known[-1][1])


def words(backend: str) -> str:
    """For `explain`."""
    return f"{backend} measured faster on an {GPU} ({RUN})"
