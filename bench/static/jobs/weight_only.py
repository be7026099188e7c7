"""Compile jobs of the weight-only kernel: every format and configuration."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from qkernels import formats, layouts
from qkernels.backends.triton import weight_only as launcher
from qkernels.backends.weight_only import traits_of

from .base import DTYPES, CompileJob, job_of, label, plan_of, problem_of, sms, weight

#: tensors of the kernel's weight_args that are read 16 bytes at a time: qdata, qhigh and perm
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
def formats_of_jobs() -> tuple[tuple[str, dict[str, Any]], ...]:
    """(format, parameters), once for each kind of kernel."""
    jobs, pairs = [], set()
    for number, (name, params) in enumerate((*_LISTED, *((name, {}) for name in formats.names()))):
        fmt, shape = formats.get(name), (8, 256)
        if fmt.kernel_layout(fmt.resolve(shape, params)) != layouts.WEIGHT_ONLY:
            continue
        traits = fmt.weight_only_traits(shape, fmt.resolve(shape, params))
        pair = traits.decoder, traits.bits, traits.scaler
        if number < len(_LISTED) or pair not in pairs:
            pairs.add(pair)
            jobs.append((name, params))
    return tuple(jobs)


#: M of each job, one in each class of M; sm_90 has more classes
_JOB_ROWS, _JOB_ROWS_90 = (1, 64, 4096), (1, 32, 64, 128, 256, 4096)
_JOB_SHAPE, _JOB_SMS = (8192, 8192), 132


def compile_jobs(arch: int, subset: bool = False) -> Iterator[CompileJob]:
    """Every configuration the table gives `arch`; a few of them with `subset`."""
    for number, (name, params) in enumerate(formats_of_jobs()):
        for m in _JOB_ROWS_90 if arch == 90 else _JOB_ROWS:
            for dtype in DTYPES:
                if not subset or (number, dtype) in ((0, "fp16"), (4, "bf16"), (7, "bf16")):
                    yield job(arch, name, params, m, dtype)


def job(arch: int, name: str, params: dict[str, Any], m: int, dtype: str) -> CompileJob:
    """The job of a format's product with m rows of x, in the configuration of the table."""
    problem = problem_of(arch, name, params, _JOB_SHAPE, m, dtype)
    config, plan = launcher.tabled(problem), plan_of(problem)
    with sms(launcher, _JOB_SMS):
        launcher.declare(plan, weight(name, params, _JOB_SHAPE), config, problem)
    return job_of(
        plan,
        "weight_only_gemm",
        label(name, params, dtype, f"M={m}"),
        arch,
        ("x_ptr", *ALIGNED_WEIGHT_ARGS, "y_ptr", "N", "K", "KP"),
        weights=config.block_n * launcher.sizes(traits_of(problem)).features,
    )
