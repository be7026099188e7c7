"""Compile jobs of the weight-only kernel: every format and configuration."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from qkernels import formats, quantize
from qkernels.backends.triton import configs
from qkernels.backends.triton.launch import prefetch
from qkernels.backends.triton.weight_only import (
    GATHER_ROWS,
    kernel_traits,
    method,
    scaler_tensors,
    sizes,
    tabled,
    traits_of,
)
from qkernels.layouts import weight_only as layout
from qkernels.triton_kernels.weight_only import weight_only_gemm

from .base import DTYPES, CompileJob, label, problem_of

#: types of the kernel's weight_args: qdata, qhigh, perm and the table
WEIGHT_ARGS = ("*i32",) * 4
#: dtypes of scales -> triton's names
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32",
}  # fmt: skip
#: those of them that are read 16 bytes at a time
ALIGNED_WEIGHT_ARGS = tuple(f"weight_args[{i}]" for i in range(3))
#: format and parameters of jobs; every other pair of codes and scales of a format is added
_LISTED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gptq", {"bits": 4, "group_size": 128}),
    ("gptq", {"bits": 4, "group_size": 32}),
    ("gptq", {"bits": 4, "group_size": 128, "act_order": True}),
    ("gptq", {"bits": 2, "group_size": 128}),
    ("gptq", {"bits": 3, "group_size": 128}),
    ("gptq", {"bits": 8, "group_size": 128}),
    ("nf4", {"block_size": 64}),
    ("nf4", {"block_size": 64, "double_quant": True}),
    ("iq4_nl", {}),
    ("spqr", {}),
    ("spqr", {"bits": 4, "act_order": True}),
    ("fp8", {"float_format": "e4m3"}),
    ("fp8", {"float_format": "e5m2"}),
    *(("quip", {"bits": bits}) for bits in (2, 3, 4)),
    *(("quip_sharp", {"bits": bits}) for bits in (2, 3, 4)),
)


@lru_cache(maxsize=1)
def formats_and_types() -> tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...]:
    """(format, parameters, types of the scaler's tensors), once for each kind of kernel.

    The types are those of a small weight of the format.
    """
    jobs, pairs = [], set()
    for number, (name, params) in enumerate((*_LISTED, *((name, {}) for name in formats.names()))):
        fmt, shape = formats.get(name), (8, 256)
        if fmt.kernel_layout(fmt.resolve(shape, params)) != layout.WEIGHT_ONLY:
            continue
        traits = fmt.weight_only_traits(shape, fmt.resolve(shape, params))
        pair = traits.decoder, traits.bits, traits.scaler
        if number >= len(_LISTED) and pair in pairs:
            continue
        pairs.add(pair)
        p = quantize(torch.randn(shape), name, **params)
        storage = layout.pack(fmt, shape, p.params, p.tensors)
        tensors = (storage.get(tensor) for tensor in scaler_tensors(traits))
        types = tuple("*i32" if t is None else _TYPES[t.dtype] for t in tensors)
        jobs.append((name, params, types))
    return tuple(jobs)


#: M of each job, one in each class of M; sm_90 has more classes
_JOB_ROWS, _JOB_ROWS_90 = (1, 64, 4096), (1, 32, 64, 128, 256, 4096)
_JOB_SHAPE, _JOB_SMS = (8192, 8192), 132


def compile_jobs(arch: int, subset: bool = False) -> Iterator[CompileJob]:
    """Every configuration the table gives `arch`; a few of them with `subset`."""
    for number, (name, params, pointers) in enumerate(formats_and_types()):
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
