"""The CUDA C++ backend: when its kernels apply, their registration, and how they are started.

Importing this module needs no GPU and no compiled extension: the first call loads the extension,
and compiles it if there is none (build.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import layouts
from ...weights.packed import PackedWeight
from .. import registry
from ..plan import Product
from ..problem import Problem
from ..rejects import common_reason
from . import build

#: (kernel's name, call struct, tensors read, tensors written) -> an error message, or "". Tests set
#: it to the CPU emulator.
emulator: Callable[[str, Any, list[Tensor], list[Tensor]], str] | None = None


def unavailable() -> str | None:
    """Why this machine cannot run the backend, or None."""
    if emulator is not None:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return build.unavailable()


def _rejects(problem: Problem, module: str, layout: str) -> str | None:
    """Why the kernel that `module` launches does not take the problem, or None."""
    on_device = problem.device == ("cpu" if emulator else "cuda")
    device_reason = None if on_device else f"no kernel for device {problem.device!r}"
    if on_device and emulator is None and problem.capability is not None:
        device_reason = build.obstacle(*problem.capability)
    why = common_reason(problem, layout, device_reason) or _module(module).rejects(problem)
    return str(why) if why else None


def _automatic(problem: Problem) -> str | None:
    """Why backend="auto" does not take the backend, or None: it never starts the compiler."""
    if build.is_built():
        return None
    return "not compiled yet: backend='cuda' compiles it, or QKERNELS_CUDA_ARCHS at install time"


def _first(problem: Problem) -> str | None:
    """Why backend="auto" takes the kernel for few rows of x before Triton's, or None.

    None where a row's bits must not depend on M: there one kernel takes all M, and this one would
    read the weight once for every few rows.
    """
    if problem.batch_invariant:
        return None
    return "it issues fewer instructions a weight for few rows of x (python -m bench.static.decode)"


def stream_of(index: int) -> int:
    """The current stream of GPU `index`."""
    return int(torch._C._cuda_getCurrentRawStream(index))


def current_device() -> int:
    """The index of the GPU that kernels are started on."""
    return int(torch._C._cuda_getDevice())


@lru_cache(maxsize=16)
def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


_quantized = registry.Quantized(
    lambda *args, **kwargs: _module("eight_bit").quantize(*args, **kwargs),
    lambda *args: _module("eight_bit").multiply(*args),
    lambda *args, **kwargs: _module("eight_bit").columns_of(*args, **kwargs),
    lambda plan: _module("launch").Compiled(plan),
    cast_bias=True,
)


def register_kernels() -> None:
    """Register each kernel with the module that launches it."""
    kernels: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        ("cuda.weight_only_decode", "weight_only", layouts.WEIGHT_ONLY, {"first": _first}),
        ("cuda.weight_only_hopper", "hopper", layouts.WEIGHT_ONLY, {}),
        ("cuda.weight_only_gemm", "gemm", layouts.WEIGHT_ONLY, {}),
        ("cuda.eight_bit", "eight_bit", layouts.EIGHT_BIT, {"quantized": _quantized}),
    )
    for name, module, layout, more in kernels:

        def run(
            x: Tensor,
            p: PackedWeight,
            bias: Tensor | None,
            problem: Problem,
            module: str = module,
        ) -> Tensor:
            result: Tensor = _module(module).run(x, p, bias, problem)
            return result

        def bind(p: PackedWeight, problem: Problem, module: str = module) -> Product:
            product: Product = _module("launch").product(_module(module).declare)
            return product

        def configuration(problem: Problem, module: str = module) -> str:
            return str(_module(module).configuration(problem))

        rejects = partial(_rejects, module=module, layout=layout)
        registry.register(
            registry.Kernel(
                name,
                "cuda",
                layout,
                unavailable,
                rejects,
                run,
                _automatic,
                configuration,
                bind=bind,
                **more,
            )
        )
