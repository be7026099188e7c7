"""Compile jobs of the transforms of QuIP and QuIP#."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qkernels.backends.plan import Plan
from qkernels.backends.triton import transforms

from .base import CompileJob, job_of, operand

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
            for side in ("input", "output"):
                if not subset or (n, m, side) == (28672, 4096, "input"):
                    yield _job(arch, n, stored, m, side)


def _job(arch: int, n: int, stored: tuple[int, ...], m: int, side: str) -> CompileJob:
    storage = {f"{side}.factor{i}": operand("fp16", order, order) for i, order in enumerate(stored)}
    storage[f"{side}.diagonal"] = operand("fp16", n)
    if len(stored) > 1:
        storage[f"{side}.perm"] = operand(torch.int32, n)
    if side == "input":
        plan = Plan((operand("bf16", m, n),))
        transforms.before(plan, plan.operands[0], storage, 1.0, len(stored) < 2, m == 1)
    else:
        operands = operand(torch.float32, m, n), operand("bf16", m, n), operand("bf16", n)
        plan = Plan(operands)
        x, y, bias = plan.operands
        transforms.after(plan, x, y, storage, 1.0, bias, m == 1)
    return job_of(
        plan,
        "kronecker_rows",
        f"{side} {n} kept={'x'.join(map(str, stored)) or '-'} M={m}",
        arch,
        ("x_ptr", "y_ptr", "pre_ptr", "post_ptr", "bias_ptr", "STRIDE"),
        tensor_core=False,
    )
