"""Which backend measured faster on a GPU, by kind of kernel and rows of x, for backend="auto".

FASTER is not written by hand: `python -m bench.faster RESULTS.json...` prints it from the results
in RUN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import formats, layouts

if TYPE_CHECKING:
    from .problem import Problem

RUN, GPU, CAPABILITY = "bench/results/2026-11-27-h200", "NVIDIA H200", (9, 0)
#: kind of kernel -> (most rows of x, faster backend), rows ascending; more rows than the last entry
#: has take the last entry, too
FASTER: dict[str, tuple[tuple[int, str], ...]] = {
    "unsigned4 q4_k": ((256, "triton"), (4096, "cuda")),
    "e4m3 row token": ((16, "triton"), (32, "cuda"), (4096, "triton")),
    "int8 row token": ((16, "triton"), (32, "cuda"), (4096, "triton")),
    "linear4 group": ((256, "triton"), (4096, "cuda")),
    "lut164 scale": ((4096, "triton"),),
}


def kind_of(problem: Problem) -> str | None:
    """The codes and the scales, which decide which code runs; the format itself does not.

    None for a weight without a fused kernel.
    """
    fmt, params = formats.get(problem.format), dict(problem.params)
    layout = None if fmt.obstacle(problem.shape, params) else fmt.kernel_layout(params)
    if layout == layouts.WEIGHT_ONLY:
        codes = fmt.weight_only_traits(problem.shape, params)
        return f"{codes.decoder}{codes.bits} {codes.scaler}"
    if layout == layouts.EIGHT_BIT:
        traits = fmt.eight_bit_traits(problem.shape, params)
        return f"{traits.kind} {traits.weight_scale} {traits.activation}" + (
            " outliers" if traits.threshold else ""
        )
    return None


def faster(problem: Problem) -> str | None:
    """The backend that measured faster for this problem; None where nothing was measured."""
    if problem.capability != CAPABILITY or problem.experts or problem.batch_invariant:
        return None
    entries = FASTER.get(kind_of(problem) or "")
    if not entries:
        return None
    return next((backend for most, backend in entries if problem.m <= most), entries[-1][1])


def words(backend: str) -> str:
    """The reason that `explain` gives."""
    return f"{backend} measured faster on an {GPU} ({RUN})"
