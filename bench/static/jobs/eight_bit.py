"""Compile jobs of the 8-bit product and of the quantization of activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qkernels.backends.eight_bit import traits_of
from qkernels.backends.triton.eight_bit import STEP, constants, has_fp8, tabled
from qkernels.backends.triton.launch import prefetch
from qkernels.backends.triton.outlier_columns import row_block, row_warps
from qkernels.layouts import eight_bit as layout
from qkernels.triton_kernels.activations import quantize_rows
from qkernels.triton_kernels.eight_bit import eight_bit_gemm

from .base import CompileJob, label, problem_of

#: format, parameters, and whether there is a zero point
JOBS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("w8a8", {}, False),
    ("w8a8", {"activation": "static"}, True),
    ("int8", {}, False),
    ("fp8", {"activation": "dynamic"}, False),
    ("fp8", {"activation": "static", "granularity": "tensor", "float_format": "e5m2"}, False),
    ("fp8", {"activation": "dynamic", "granularity": "block"}, False),
)
#: M of each job, one in each class of M
_JOB_ROWS, _JOB_ROWS_90 = (1, 64, 4096), (1, 64, 256, 4096)
_JOB_SHAPE = (8192, 8192)
#: kind of weight -> types of its codes and of those of x
CODES = {"int8": ("*i8", "*i8"), "e4m3": ("*fp8e4nv", "*fp8e4nv"), "e5m2": ("*fp8e5", "*fp8e4nv")}


def compile_jobs(arch: int, subset: bool = False) -> Iterator[CompileJob]:
    """Every configuration the table gives `arch`; a few of them with `subset`."""
    for number, (name, params, has_zero) in enumerate(JOBS):
        # Only LLM.int8() computes in 16 bits; elsewhere the dtype is one conversion at the end.
        for dtype in ("bf16", "fp16") if name == "int8" else ("bf16",):
            if subset and (number, dtype) not in ((2, "bf16"), (3, "bf16")):
                continue
            for m in _JOB_ROWS_90 if arch == 90 else _JOB_ROWS:
                yield _product_job(arch, name, params, has_zero, dtype, m)
            yield _quantize_job(arch, name, params, has_zero, dtype, norm=number in (0, 3))
            if number in (0, 3) and not subset:
                yield _quantize_job(arch, name, params, has_zero, dtype, norm=False, gated=True)


def _product_job(
    arch: int, name: str, params: dict[str, Any], has_zero: bool, dtype: str, m: int
) -> CompileJob:
    problem = problem_of(arch, name, params, _JOB_SHAPE, m, dtype)
    config, traits = tabled(problem), traits_of(problem)
    fixed = constants(traits, _JOB_SHAPE, problem, has_zero=has_zero)
    k_slices = 4 if config.k_slices == 0 else config.k_slices
    weight, codes = ("*u8", "*u8") if fixed["WIDEN"] else CODES[traits.kind]
    pointer = "*" + dtype
    return CompileJob(
        kernel="eight_bit_gemm",
        label=label(name, params, dtype, f"M={m}"),
        arch=arch,
        fn=eight_bit_gemm,
        types={
            "x_ptr": codes, "weight_ptr": weight, "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32",
            "zero_ptr": "*i8", "row_sum_ptr": "*i32", "bias_ptr": pointer, "x16_ptr": pointer,
            "columns_ptr": "*i32", "y_ptr": pointer, "counter_ptr": "*i32",
            "partial_ptr": "*i32" if traits.kind == "int8" else "*fp32",
            "threshold": "fp32", "M": "i32", "N": "i32", "K": "i32", "KP": "i32",
        },
        constants={
            **fixed,
            "HAS_BIAS": True,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "K_SLICES": k_slices,
            "SPLIT_K": k_slices,
            "GROUP_N": config.group_n,
            "PREFETCH": prefetch(config.block_m),
            "PDL": arch >= 90,
        },
        aligned=(
            "x_ptr", "weight_ptr", "x_scale_ptr", "w_scale_ptr", "x16_ptr", "y_ptr", "N", "K", "KP",
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        weights=config.block_n * STEP,
    )  # fmt: skip


def _quantize_job(
    arch: int,
    name: str,
    params: dict[str, Any],
    has_zero: bool,
    dtype: str,
    *,
    norm: bool,
    gated: bool = False,
) -> CompileJob:
    problem = problem_of(arch, name, params, _JOB_SHAPE, 1, dtype)
    traits = traits_of(problem)
    int8, pointer = traits.kind == "int8", "*" + dtype
    block = row_block(layout.padded(_JOB_SHAPE[1]))
    return CompileJob(
        kernel="quantize_rows",
        label=label(name, params, *(("RMSNorm",) if norm else ("SiLU",) if gated else ()), dtype),
        arch=arch,
        fn=quantize_rows,
        types={
            "x_ptr": pointer, "up_ptr": pointer, "q_ptr": "*i8" if int8 else "*u8",
            "scale_ptr": "*fp32", "norm_ptr": pointer, "normed_ptr": pointer, "zero_ptr": "*i8",
            "columns_ptr": "*i32", "counter_ptr": "*i32", "eps": "fp32", "threshold": "fp32",
            "M": "i32", "K": "i32", "KP": "i32",
        },
        constants={
            "INT8": int8,
            "SHARED": traits.activation,
            "HAS_ZERO": has_zero,
            "OUTLIERS": traits.threshold > 0,
            "NORM": norm,
            "GATED": gated,
            "NATIVE": has_fp8(problem.capability),
            "BLOCK": block,
            "PDL": arch >= 90,
        },
        aligned=("x_ptr", "q_ptr", "norm_ptr", "normed_ptr", "K", "KP"),
        num_warps=row_warps(block),
        num_stages=3,
        tensor_core=False,
    )  # fmt: skip
