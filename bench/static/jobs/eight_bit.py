"""Compile jobs of the 8-bit product and of the quantization of activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qkernels.backends.plan import Plan
from qkernels.backends.triton import eight_bit as launcher

from .base import CompileJob, Weight, job_of, label, operand, problem_of, sms, weight

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
_JOB_SHAPE, _JOB_SMS = (8192, 8192), 132


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


def packed(name: str, params: dict[str, Any], has_zero: bool, shape: tuple[int, int]) -> Weight:
    """A weight of the format."""
    static = {"input_scale": 0.1} if params.get("activation") == "static" else {}
    p = weight(name, {**params, **static}, shape)
    if has_zero:
        p.storage["input_zero_point"] = torch.zeros(1, dtype=torch.int8)
        p.storage["row_sum"] = torch.zeros(1, dtype=torch.int32)
    return p


def _product_job(
    arch: int, name: str, params: dict[str, Any], has_zero: bool, dtype: str, m: int
) -> CompileJob:
    problem = problem_of(arch, name, params, _JOB_SHAPE, m, dtype)
    config = launcher.tabled(problem)
    plan = Plan(
        (operand(dtype, m, _JOB_SHAPE[1]), operand(dtype, _JOB_SHAPE[0])), (m, _JOB_SHAPE[0])
    )
    with sms(launcher, _JOB_SMS):
        launcher.declare(plan, packed(name, params, has_zero, _JOB_SHAPE), config, problem)
    aligned = (
        "x_ptr", "weight_ptr", "x_scale_ptr", "w_scale_ptr", "x16_ptr", "y_ptr", "N", "K", "KP",
    )  # fmt: skip
    name = label(name, params, dtype, f"M={m}")
    return job_of(
        plan, "eight_bit_gemm", name, arch, aligned, weights=config.block_n * launcher.STEP
    )


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
    k = _JOB_SHAPE[1]
    plan = Plan((operand(dtype, 1, k), operand(dtype, 1, k), operand(dtype, k)))
    x, up, weight = plan.operands
    launcher.quantize(
        plan, x, packed(name, params, has_zero, _JOB_SHAPE), problem,
        up=up if gated else None, norm=weight if norm else None, eps=1e-6,
    )  # fmt: skip
    kind = ("RMSNorm",) if norm else ("SiLU",) if gated else ()
    aligned = ("x_ptr", "q_ptr", "norm_ptr", "normed_ptr", "K", "KP")
    name = label(name, params, *kind, dtype)
    return job_of(plan, "quantize_rows", name, arch, aligned, tensor_core=False)
