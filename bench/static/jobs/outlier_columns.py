"""Compile jobs of the search for outlier columns (LLM.int8())."""

from __future__ import annotations

from collections.abc import Iterator

from qkernels.backends.plan import Plan
from qkernels.backends.triton import outlier_columns

from .base import CompileJob, job_of, operand

_JOB_FEATURES = 8192


def compile_jobs(arch: int, subset: bool = False) -> Iterator[CompileJob]:
    """Three jobs: of x itself, after RMSNorm, and after SiLU; with `subset` only the first."""
    k = _JOB_FEATURES
    for label, norm, gated in (
        ("", False, False),
        ("RMSNorm ", True, False),
        ("SiLU ", False, True),
    ):
        if subset and label:
            continue
        plan = Plan((operand("bf16", 4, k), operand("bf16", 4, k), operand("bf16", k)))
        x, up, weight = plan.operands
        outlier_columns.find(
            plan, x, 6.0, up=up if gated else None, norm=weight if norm else None, eps=1e-6
        )
        aligned = ("x_ptr", "up_ptr", "norm_ptr", "K")
        yield job_of(plan, "outlier_columns", f"int8 {label}bf16", arch, aligned, tensor_core=False)
