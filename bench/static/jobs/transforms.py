"""Compile jobs of the transforms of QuIP and QuIP#."""

from __future__ import annotations

from collections.abc import Iterator

from qkernels.backends.triton.transforms import constants
from qkernels.triton_kernels.kronecker import kronecker_rows

from .base import CompileJob

#: features of models' layers, and the orders of the stored factors: none, the one that is no power
#: of two, or those of QuIP
_JOBS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (4096, ()), (8192, ()), (14336, (28,)), (28672, (28,)), (11008, (43,)),
    (4096, (64, 64)), (14336, (28, 16, 32)),
)  # fmt: skip


def compile_jobs(arch: int, subset: bool = False) -> Iterator[CompileJob]:
    """Both sides of each size; with `subset` one of them.

    No tensor-core instruction is required, because the compiler decides about it.
    """
    for n, stored in _JOBS:
        for m in (1, 4096):
            options, warps = constants(n, stored, m == 1)
            permuted = len(stored) > 1
            for before in (True, False):
                if subset and (n, m, before) != (28672, 4096, True):
                    continue
                side, factors = "input" if before else "output", "x".join(map(str, stored)) or "-"
                yield CompileJob(
                    kernel="kronecker_rows",
                    label=f"{side} {n} kept={factors} M={m}",
                    arch=arch,
                    fn=kronecker_rows,
                    types={
                        "x_ptr": "*bf16" if before else "*fp32", "y_ptr": "*bf16",
                        "pre_ptr": "*fp16", "post_ptr": "*fp16", "bias_ptr": "*bf16",
                        "gather_ptr": "*i32", "scatter_ptr": "*i32",
                        "factor0_ptr": "*fp16", "factor1_ptr": "*fp16", "factor2_ptr": "*fp16",
                        "scale": "fp32", "M": "i32", "STRIDE": "i32",
                    },
                    constants={
                        **options,
                        "HAS_PRE": before, "HAS_POST": not before, "HAS_BIAS": not before,
                        "GATHERED": before and permuted, "SCATTERED": not before and permuted,
                        "CODEBOOK_ORDER": before and not permuted, "TRANSPOSED": before,
                        "PDL": arch >= 90,
                    },
                    aligned=("x_ptr", "y_ptr", "pre_ptr", "post_ptr", "bias_ptr", "STRIDE"),
                    num_warps=warps,
                    num_stages=1,
                    tensor_core=False,
                )  # fmt: skip
