"""Compile jobs of experts: the product in each format of the other families' jobs, and the sort."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qkernels import layouts
from qkernels.backends.problem import Problem
from qkernels.backends.triton import configs
from qkernels.backends.triton.eight_bit import STEP
from qkernels.backends.triton.experts import (
    _CHUNK,
    _bins,
    _codes_constants,
    method,
    obstacle,
    tabled,
)
from qkernels.backends.triton.weight_only import kernel_traits, sizes, traits_of
from qkernels.triton_kernels.experts import experts_eight_bit, experts_weight_only, sort_slots

from . import eight_bit, weight_only
from .base import CompileJob, label, problem_of

#: about Mixtral-8x7B: experts, and the shape of one expert's matrix
_JOB_EXPERTS, _JOB_SHAPE = 8, (8192, 4096)
#: slots (tokens times choices), one number in each class of M
_JOB_SLOTS = (16, 512, 32768)
_ALIGNED = ("x_ptr", "y_ptr", "slots_ptr", "experts_ptr", "N", "KP")


def compile_jobs(arch: int, subset: bool = False) -> Iterator[CompileJob]:
    """Every configuration the table gives `arch`, for each format of the other families' jobs.

    All in bfloat16, and one 4-bit format in float16 too, because the other families' jobs cover
    both. subset: only a few of them.
    """
    yield _sort_job(arch)
    for number, (name, params, pointers) in enumerate(weight_only.formats_and_types()):
        problem = _problem(arch, name, params, 1, "fp16")
        if obstacle(problem, layouts.WEIGHT_ONLY):
            continue
        for dtype in ("bf16", "fp16") if number == 0 else ("bf16",):
            for slots in _JOB_SLOTS:
                if subset and (number, dtype, slots) != (0, "bf16", _JOB_SLOTS[0]):
                    continue
                yield _weight_only_job(arch, name, params, pointers, dtype, slots)
    for name, params, has_zero in eight_bit.JOBS:
        problem = _problem(arch, name, params, 1, "fp16")
        if obstacle(problem, layouts.EIGHT_BIT) or has_zero:
            continue
        for slots in _JOB_SLOTS:
            if not subset or (params.get("granularity") == "block" and slots == _JOB_SLOTS[1]):
                yield _eight_bit_job(arch, name, params, slots)


def _problem(arch: int, name: str, params: dict[str, Any], slots: int, dtype: str) -> Problem:
    return problem_of(arch, name, params, _JOB_SHAPE, slots, dtype, experts=_JOB_EXPERTS)


_COMMON_TYPES = {
    "slots_ptr": "*i32", "experts_ptr": "*i32", "weights_ptr": "*fp32",
    **dict.fromkeys(("S", "EXPERTS", "BLOCKS", "M", "PER_ROW", "N", "KP"), "i32"),
}  # fmt: skip


def _common_constants(config: configs.GemmConfig, arch: int) -> dict[str, Any]:
    return {
        "HAS_BIAS": True,
        "HAS_WEIGHTS": True,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_N": config.group_n,
        "PDL": arch >= 90,
    }


def _weight_only_job(
    arch: int, name: str, params: dict[str, Any], pointers: tuple[str, ...], dtype: str, slots: int
) -> CompileJob:
    problem = _problem(arch, name, params, slots, dtype)
    config, traits = tabled(problem), traits_of(problem)
    pointer = "*" + dtype
    return CompileJob(
        kernel="experts_weight_only",
        label=label(name, params, dtype, f"slots={slots}"),
        arch=arch,
        fn=experts_weight_only,
        types={
            **_COMMON_TYPES,
            **dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr"), pointer),
            "K": "i32",
            "weight_args": weight_only.WEIGHT_ARGS,
            "weight_strides": ("i32",) * len(weight_only.WEIGHT_ARGS),
            "scaler_args": pointers,
            "scaler_strides": ("i32",) * len(pointers),
        },
        constants={
            "TRAITS": kernel_traits(traits, _JOB_SHAPE, group_lookup=False),
            "METHOD": method(config, problem, permuted=bool(params.get("act_order")), upcast=False),
            **_common_constants(config, arch),
            "WARPS": config.num_warps,
        },
        aligned=(
            *_ALIGNED,
            "K",
            *weight_only.ALIGNED_WEIGHT_ARGS,
            *(name.replace("args", "strides") for name in weight_only.ALIGNED_WEIGHT_ARGS),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        weights=config.block_n * sizes(traits).features,
    )


def _eight_bit_job(arch: int, name: str, params: dict[str, Any], slots: int) -> CompileJob:
    problem = _problem(arch, name, params, slots, "bf16")
    config, fixed = tabled(problem), _codes_constants(_JOB_SHAPE, problem)
    weight, codes = ("*u8", "*u8") if fixed["WIDEN"] else eight_bit.CODES[fixed["KIND"]]
    return CompileJob(
        kernel="experts_eight_bit",
        label=label(name, params, "bf16", f"slots={slots}"),
        arch=arch,
        fn=experts_eight_bit,
        types={
            **_COMMON_TYPES,
            "x_ptr": codes,
            "weight_ptr": weight,
            **dict.fromkeys(("x_scale_ptr", "w_scale_ptr"), "*fp32"),
            **dict.fromkeys(("bias_ptr", "y_ptr"), "*bf16"),
            **dict.fromkeys(("weight_stride", "w_scale_stride"), "i32"),
        },
        constants={**fixed, **_common_constants(config, arch)},
        aligned=(*_ALIGNED, "weight_ptr", "weight_stride", "x_scale_ptr", "w_scale_ptr"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        weights=config.block_n * STEP,
    )


def _sort_job(arch: int) -> CompileJob:
    return CompileJob(
        kernel="sort_slots",
        label="128 experts",
        arch=arch,
        fn=sort_slots,
        types={
            "ids_ptr": "*i64", "slots_ptr": "*i32", "experts_ptr": "*i32",
            **dict.fromkeys(("S", "EXPERTS", "BLOCKS"), "i32"),
        },
        constants={"BLOCK_M": 64, "BINS": _bins(128), "CHUNK": _CHUNK, "PDL": arch >= 90},
        aligned=("ids_ptr", "slots_ptr", "experts_ptr"),
        num_warps=4,
        num_stages=3,
        tensor_core=False,
    )  # fmt: skip
