"""A compile job: everything needed to compile a kernel ahead of time, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qkernels import formats
from qkernels.backends.problem import Problem

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


@dataclass(frozen=True)
class CompileJob:
    """One kernel with one configuration, which `bench.static` and the tests compile.

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
