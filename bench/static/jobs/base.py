"""A compile job: everything needed to compile a kernel ahead of time, without a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qkernels import formats, layouts, quantize
from qkernels.backends.plan import Plan
from qkernels.backends.problem import Problem
from qkernels.backends.triton.launch import Step

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def label(name: str, params: dict[str, Any], *rest: str) -> str:
    """The label of a job: format, parameters, and the rest, such as dtype and shape class."""
    return " ".join([name, *(f"{k}={v}" for k, v in params.items()), *rest])


def problem_of(
    arch: int,
    name: str,
    params: dict[str, Any],
    shape: tuple[int, int],
    m: int,
    dtype: str,
    experts: int = 0,
) -> Problem:
    """The problem of a job: format `name` on a GPU of architecture `arch`."""
    items = tuple(sorted(formats.get(name).resolve(shape, params).items()))
    capability = (arch // 10, arch % 10)
    return Problem(name, items, shape, m, DTYPES[dtype], "cuda", capability, experts=experts)


@dataclass
class Weight:
    """Stands for a packed weight of `shape`, or for `count` experts.

    Its tensors are those of a small weight, of which the launchers read only the dtypes.
    """

    shape: tuple[int, int]
    layout: str
    storage: dict[str, Tensor]
    count: int = 0

    def expert(self, index: int) -> Weight:
        return self


@lru_cache(maxsize=64)
def _stored(name: str, params: tuple[tuple[str, Any], ...]) -> tuple[str, dict[str, Tensor]]:
    """(kernel layout, its tensors) of a small weight of the format."""
    fmt, shape = formats.get(name), (8, 256)
    p = quantize(torch.randn(shape), name, **dict(params))
    layout = fmt.kernel_layout(p.params)
    assert layout is not None
    return layout, layouts.pack(fmt, shape, p.params, p.tensors, layout)


def weight(name: str, params: dict[str, Any], shape: tuple[int, int], count: int = 0) -> Weight:
    """A weight, or experts, of the format, of whole tiles, with Hadamard transforms if any."""
    layout, tensors = _stored(name, tuple(params.items()))
    tensors = {key: tensor for key, tensor in tensors.items() if ".factor" not in key}
    if "perm" in tensors:
        tensors["perm"] = tensors["perm"].new_zeros(shape[1])
    return Weight(shape, layout, tensors, count)


def operand(dtype: str | torch.dtype, *shape: int) -> Tensor:
    """An operand of a call, without memory."""
    return torch.empty(shape, dtype=DTYPES.get(dtype, dtype), device="meta")  # type: ignore[arg-type]


def plan_of(problem: Problem) -> Plan:
    """The plan of a product with one matrix, for x (M, K) and a bias, in which nothing is yet."""
    (n, k), m, dtype = problem.shape, problem.m, problem.dtype
    return Plan((operand(dtype, m, k), operand(dtype, n)), (m, n))


@dataclass(frozen=True)
class CompileJob:
    """One kernel with one configuration, which `bench.static` and the tests compile.

    Its types and constants are those of a launch that a launcher declared (`job_of`).

    kernel: name of the kernel.
    label: format, dtype and shape class, which distinguish this job.
    arch: compute capability as an integer, 90 for sm_90.
    fn: the @triton.jit function.
    types: argument name -> triton type ("*bf16", "i32"; a tuple for a tuple argument).
    constants: argument name -> value, for all other arguments.
    aligned: arguments divisible by 16, as launches with aligned pointers and sizes see them;
        "name[1]" is part 1 of a tuple argument.
    weights: packed weights that one program decodes in one step of its loop; 0 if it decodes none.
    tensor_core: whether the compiled code must have the architecture's tensor-core instruction.
    """

    kernel: str
    label: str
    arch: int
    fn: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    weights: int = 0
    tensor_core: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options, the same as in launches."""
        from qkernels.triton_kernels.launchable import OPTIONS

        return {**OPTIONS, "num_warps": self.num_warps, "num_stages": self.num_stages}


#: dtypes -> triton's names
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip


def _type(value: Any) -> Any:
    """Triton's type of an argument."""
    if isinstance(value, tuple):
        return tuple(map(_type, value))
    if isinstance(value, (int, float)):
        return "i32" if isinstance(value, int) else "fp32"
    return "*" + _TYPES[value.dtype]


def job_of(
    plan: Plan, kernel: str, label: str, arch: int, aligned: tuple[str, ...], **more: Any
) -> CompileJob:
    """The job of the plan's last launch of the kernel. The rest: as in `CompileJob`."""
    steps = [step for step in plan.steps if isinstance(step, Step)]
    step = [step for step in steps if step.kernel.__name__ == kernel][-1]
    parameters = inspect.signature(getattr(step.kernel, "fn", step.kernel)).parameters
    types, constants = {}, {}
    for name, parameter in parameters.items():
        if "constexpr" in str(parameter.annotation):
            constants[name] = step.arguments[name]
        else:
            types[name] = _type(step.arguments[name])
    return CompileJob(
        kernel=kernel,
        label=label,
        arch=arch,
        fn=step.kernel,
        types=types,
        constants={**constants, "PDL": arch >= 90},
        aligned=aligned,
        num_warps=step.arguments.get("num_warps", 4),
        num_stages=step.arguments.get("num_stages", 3),
        **more,
    )


@contextmanager
def sms(launcher: ModuleType, count: int) -> Iterator[None]:
    """Within the context, `launcher` sees a GPU of `count` SMs."""
    with mock.patch.object(launcher, "sm_count", return_value=count):
        yield
