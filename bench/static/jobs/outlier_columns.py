"""Compile jobs of the search for outlier columns (LLM.int8())."""

from __future__ import annotations

from collections.abc import Iterator

from qkernels.backends.triton.outlier_columns import row_block, row_warps
from qkernels.triton_kernels.activations import outlier_columns

from .base import CompileJob

_JOB_FEATURES = 8192


def compile_jobs(arch: int, subset: bool = False) -> Iterator[CompileJob]:
    """Three jobs: of x itself, after RMSNorm, and after SiLU; with `subset` only the first."""
    block = row_block(_JOB_FEATURES)
    for label, norm, gated in (
        ("", False, False),
        ("RMSNorm ", True, False),
        ("SiLU ", False, True),
    ):
        if subset and label:
            continue
        yield CompileJob(
            kernel="outlier_columns",
            label=f"int8 {label}bf16",
            arch=arch,
            fn=outlier_columns,
            types={
                **dict.fromkeys(("x_ptr", "up_ptr", "norm_ptr"), "*bf16"),
                **dict.fromkeys(("columns_ptr", "counter_ptr"), "*i32"),
                **dict.fromkeys(("eps", "threshold"), "fp32"),
                **dict.fromkeys(("M", "K"), "i32"),
            },
            constants={"NORM": norm, "GATED": gated, "BLOCK": block, "PDL": arch >= 90},
            aligned=("x_ptr", "up_ptr", "norm_ptr", "K"),
            num_warps=row_warps(block),
            num_stages=3,
            tensor_core=False,
        )
