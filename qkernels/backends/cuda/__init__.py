"""The CUDA C++ backend: when its kernels apply, their registration, and how a call reaches them.

Importing this needs neither a GPU nor a compiled extension: the extension is loaded, and if need be
compiled, at the first call (build.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import formats, layouts
from ...weights.packed import PackedWeight
from .. import registry
from ..plan import Recorded
from ..problem import Problem
from . import build

MIN_CAPABILITY = (8, 0)

#: (kernel's name, call struct, tensors read, tensors written) -> "" or an error. Tests put the CPU
#: emulator here.
emulator: Callable[[str, Any, list[Tensor], list[Tensor]], str] | None = None


def unavailable() -> str | None:
    if emulator is not None:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return build.unavailable()


def _rejects(problem: Problem, module: str, layout: str) -> str | None:
    fmt, params = formats.get(problem.format), dict(problem.params)
    if obstacle := fmt.obstacle(problem.shape, params):
        return obstacle
    if fmt.kernel_layout(params) != layout:
        return f"{problem.format} with these parameters is not in the {layout.replace('_', '-')} family"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"x must be float16 or bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.device != ("cpu" if emulator else "cuda"):
        return f"no kernel for device {problem.device!r}"
    if problem.capability is not None and problem.capability < MIN_CAPABILITY:
        return f"needs sm_80 or newer, this is sm_{problem.capability[0]}{problem.capability[1]}"
    return str(why) if (why := _module(module).rejects(problem)) else None


def _automatic(problem: Problem) -> str | None:
    """backend="auto" takes what is compiled, and starts no compiler by itself."""
    if build.is_built():
        return None
    return "not compiled yet: backend='cuda' compiles it, or QKERNELS_CUDA_ARCHS at install time"


@lru_cache(maxsize=64)
def supports_pdl(index: int) -> bool:
    """Whether GPU `index` can start a kernel before the one before it is done; the emulator (-1)
    can't.
    """
    return index >= 0 and torch.cuda.get_device_capability(index) >= (9, 0)


def stream_of(index: int) -> int:
    """The current stream of GPU `index`."""
    return int(torch._C._cuda_getCurrentRawStream(index))


def current_device() -> int:
    """The index of the GPU that kernels are started on."""
    return int(torch._C._cuda_getDevice())


@lru_cache(maxsize=16)
def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def run(name: str, address: int, index: int) -> None:
    """Start kernel `name` with the call struct at `address` on GPU `index`. RuntimeError with
    CUDA's words if it does not start."""
    start = build.extension().run
    if current_device() == index:
        error = start(name, address)
    else:
        with torch.cuda.device(index):
            error = start(name, address)
    if error:
        raise RuntimeError(f"qkernels: CUDA kernel {name}: {error}")


_quantized = registry.Quantized(
    lambda *args, **kwargs: _module("eight_bit").quantize(*args, **kwargs),
    lambda *args, **kwargs: _module("eight_bit").multiply(*args, **kwargs),
    lambda problem: int(
        _module("eight_bit").scratch_bytes(problem, torch.device(problem.device), made=True)
    ),
    lambda *args, **kwargs: _module("eight_bit").outlier_columns(*args, **kwargs),
)


def register_kernels() -> None:
    """Each kernel with the module that launches it."""
    kernels = (
        ("cuda.weight_only_gemv", "weight_only", layouts.WEIGHT_ONLY),
        ("cuda.weight_only_hopper", "hopper", layouts.WEIGHT_ONLY),
        ("cuda.weight_only_gemm", "gemm", layouts.WEIGHT_ONLY),
        ("cuda.eight_bit", "eight_bit", layouts.EIGHT_BIT),
    )
    for name, module, layout in kernels:

        def run(
            x: Tensor,
            p: PackedWeight,
            bias: Tensor | None,
            problem: Problem,
            module: str = module,
        ) -> Tensor:
            result: Tensor = _module(module).run(x, p, bias, problem)
            return result

        def bind(p: PackedWeight, problem: Problem, module: str = module) -> Recorded:
            return Recorded(
                _module(module).run, _module(module).compute, _module("launch").Replay, True
            )

        def configuration(problem: Problem, module: str = module) -> str:
            return str(_module(module).configuration(problem))

        rejects = partial(_rejects, module=module, layout=layout)
        quantized = _quantized if layout == layouts.EIGHT_BIT else None
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
                quantized=quantized,
            )
        )
