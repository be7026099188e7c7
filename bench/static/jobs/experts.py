"""Compile jobs of experts: the product in each format of the other families' jobs, and the sort."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qkernels import layouts
from qkernels.backends.plan import Plan
from qkernels.backends.problem import Problem
from qkernels.backends.triton import experts as launcher
from qkernels.backends.triton.eight_bit import STEP
from qkernels.backends.triton.weight_only import sizes
from qkernels.backends.weight_only import traits_of

from . import eight_bit, weight_only
from .base import CompileJob, job_of, label, operand, problem_of, weight

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
    for number, (name, params) in enumerate(weight_only.formats_of_jobs()):
        problem = _problem(arch, name, params, 1, "fp16")
        if launcher.obstacle(problem, layouts.WEIGHT_ONLY):
            continue
        for dtype in ("bf16", "fp16") if number == 0 else ("bf16",):
            for slots in _JOB_SLOTS:
                if subset and (number, dtype, slots) != (0, "bf16", _JOB_SLOTS[0]):
                    continue
                yield _product_job(arch, name, params, dtype, slots)
    for name, params, has_zero in eight_bit.JOBS:
        problem = _problem(arch, name, params, 1, "fp16")
        if launcher.obstacle(problem, layouts.EIGHT_BIT) or has_zero:
            continue
        for slots in _JOB_SLOTS:
            if not subset or (params.get("granularity") == "block" and slots == _JOB_SLOTS[1]):
                yield _product_job(arch, name, params, "bf16", slots)


def _problem(arch: int, name: str, params: dict[str, Any], slots: int, dtype: str) -> Problem:
    return problem_of(arch, name, params, _JOB_SHAPE, slots, dtype, experts=_JOB_EXPERTS)


def _product_job(
    arch: int, name: str, params: dict[str, Any], dtype: str, slots: int
) -> CompileJob:
    problem = _problem(arch, name, params, slots, dtype)
    config, (n, k), top_k = launcher.tabled(problem), _JOB_SHAPE, 2
    p = weight(name, params, _JOB_SHAPE, _JOB_EXPERTS)
    operands = (
        operand(dtype, slots // top_k, k),
        operand(torch.int64, slots // top_k, top_k),
        operand(torch.float32, slots // top_k, top_k),
        operand(dtype, _JOB_EXPERTS, n),
    )
    plan = Plan(operands, (slots // top_k, top_k, n))
    launcher.declare(plan, p, config, problem)
    if p.layout == layouts.EIGHT_BIT:
        read = ("weight_ptr", "weight_stride", "x_scale_ptr", "w_scale_ptr")
        kernel, features = "experts_eight_bit", STEP
    else:
        strides = (name.replace("args", "strides") for name in weight_only.ALIGNED_WEIGHT_ARGS)
        read = ("K", *weight_only.ALIGNED_WEIGHT_ARGS, *strides)
        kernel, features = "experts_weight_only", sizes(traits_of(problem)).features
    return job_of(
        plan,
        kernel,
        label(name, params, dtype, f"slots={slots}"),
        arch,
        (*_ALIGNED, *read),
        weights=config.block_n * features,
    )


def _sort_job(arch: int) -> CompileJob:
    plan = Plan((operand(torch.int64, 256, 2),))
    launcher.sort(plan, plan.operands[0], 128, 64)
    aligned = ("ids_ptr", "slots_ptr", "experts_ptr")
    return job_of(plan, "sort_slots", "128 experts", arch, aligned, tensor_core=False)
