"""Compile jobs of the weight-only kernel: every format and configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qkernels.backends.triton import configs
from qkernels.backends.triton.launch import prefetch
from qkernels.backends.triton.weight_only import (
    GATHER_ROWS,
    kernel_traits,
    method,
    sizes,
    tabled,
    traits_of,
)
from qkernels.triton_kernels.weight_only import weight_only_gemm

from .base import DTYPES, CompileJob, label, problem_of

#: types of the kernel's weight_args: qdata, qhigh, perm and the table
WEIGHT_ARGS = ("*i32",) * 4
#: those of them that are read 16 bytes at a time
ALIGNED_WEIGHT_ARGS = tuple(f"weight_args[{i}]" for i in range(3))
#: format, parameters and the types of its scaler's tensors
JOBS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("gptq", {"bits": 4, "group_size": 128}, ("*fp16", "*u8", "*i32")),
    ("gptq", {"bits": 4, "group_size": 32}, ("*fp16", "*u8", "*i32")),
    ("gptq", {"bits": 4, "group_size": 128, "act_order": True}, ("*fp16", "*u8", "*i32")),
    ("gptq", {"bits": 2, "group_size": 128}, ("*fp16", "*u8", "*i32")),
    ("gptq", {"bits": 3, "group_size": 128}, ("*fp16", "*u8", "*i32")),
    ("gptq", {"bits": 8, "group_size": 128}, ("*fp16", "*u8", "*i32")),
    ("nf4", {"block_size": 64}, ("*fp32",)),
    ("nf4", {"block_size": 64, "double_quant": True}, ("*u8", "*fp32", "*fp32", "*fp32")),
    ("q8_0", {}, ("*fp16",)),
    ("q4_1", {}, ("*fp16", "*fp16")),
    ("q4_k", {}, ("*fp16", "*fp16", "*i32")),
    ("q5_k", {}, ("*fp16", "*fp16", "*i32")),
    ("q6_k", {}, ("*i8", "*fp16")),
    ("iq4_nl", {}, ("*fp16",)),
    ("iq4_xs", {}, ("*fp16", "*i16", "*i32")),
    ("q2_k", {}, ("*u8", "*fp16", "*fp16")),
    ("q3_k", {}, ("*i32", "*fp16")),
    ("spqr", {}, ("*u8", "*fp16", "*i32")),
    ("spqr", {"bits": 4, "act_order": True}, ("*u8", "*fp16", "*i32")),
    ("fp8", {"float_format": "e4m3"}, ("*fp32",)),
    ("fp8", {"float_format": "e5m2"}, ("*fp32",)),
    *(("quip", {"bits": bits}, ("*fp32",)) for bits in (2, 3, 4)),
    *(("quip_sharp", {"bits": bits}, ("*fp32",)) for bits in (2, 3, 4)),
)
#: M of each job, one in each class of M; sm_90 has more classes
_JOB_ROWS, _JOB_ROWS_90 = (1, 64, 4096), (1, 32, 64, 128, 256, 4096)
_JOB_SHAPE, _JOB_SMS = (8192, 8192), 132


def compile_jobs(arch: int, subset: bool = False) -> Iterator[CompileJob]:
    """Every configuration the table gives `arch`; a few of them with `subset`."""
    for number, (name, params, pointers) in enumerate(JOBS):
        for m in _JOB_ROWS_90 if arch == 90 else _JOB_ROWS:
            for dtype in DTYPES:
                if subset and (number, dtype) not in ((0, "fp16"), (4, "bf16"), (7, "bf16")):
                    continue
                problem = problem_of(arch, name, params, _JOB_SHAPE, m, dtype)
                config = tabled(problem)
                traits = traits_of(problem)
                permuted = bool(params.get("act_order")) and m < GATHER_ROWS
                fixed = kernel_traits(traits, _JOB_SHAPE, group_lookup=False)
                blocks = -(-_JOB_SHAPE[0] // config.block_n) * -(-m // config.block_m)
                tiles = -(-_JOB_SHAPE[1] // fixed.tile)
                k_slices = configs.k_slices_of(config, tiles, blocks, _JOB_SMS)
                pointer = "*" + dtype
                yield CompileJob(
                    kernel="weight_only_gemm",
                    label=label(name, params, dtype, f"M={m}"),
                    arch=arch,
                    fn=weight_only_gemm,
                    types={
                        "x_ptr": pointer, "bias_ptr": pointer,
                        "y_ptr": "*fp32" if traits.transform_scales else pointer,
                        "weight_args": WEIGHT_ARGS, "scaler_args": pointers,
                        "partial_ptr": "*fp32", "counter_ptr": "*i32",
                        "sparse_x_ptr": pointer,
                        "outlier_args": ("*i32", "*i32", "i32", "i32") if traits.outliers else (),
                        "M": "i32", "N": "i32", "K": "i32", "KP": "i32",
                    },
                    constants={
                        "TRAITS": fixed,
                        "METHOD": method(fixed, config, problem, permuted=permuted, upcast=False),
                        "HAS_BIAS": True,
                        "BLOCK_M": config.block_m,
                        "BLOCK_N": config.block_n,
                        "K_SLICES": k_slices,
                        "SPLIT_K": k_slices,
                        "GROUP_N": config.group_n,
                        "WARPS": config.num_warps,
                        "PREFETCH": prefetch(config.block_m),
                        "PDL": arch >= 90,
                    },
                    aligned=("x_ptr", *ALIGNED_WEIGHT_ARGS, "y_ptr", "N", "K", "KP"),
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    weights=config.block_n * sizes(traits).features,
                )  # fmt: skip
