"""The Triton backend: which problems its kernels take, and their registration.

Importing this module does not need triton; running a kernel does.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import layouts
from ...weights.packed import PackedWeight
from .. import registry
from ..problem import Problem
from ..rejects import common_reason


def interpreted() -> bool:
    """Whether triton runs kernels in its CPU interpreter: TRITON_INTERPRET=1.

    The variable must be set before triton is imported.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def unavailable() -> str | None:
    """Why no Triton kernel can run on this machine; None if they can."""
    if not _installed():
        return "triton is not installed (pip install qkernels[triton])"
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device is visible (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return None


def _rejects(problem: Problem, layout: str) -> str | None:
    """Why the kernel of this layout cannot take the problem; None if it can."""
    device_reason = None
    if problem.device == "cpu" and not interpreted():
        device_reason = "the weight is on the CPU"
    elif problem.device not in ("cpu", "cuda"):
        device_reason = f"no kernel for device {problem.device!r}"
    return common_reason(problem, layout, device_reason)


def _automatic(problem: Problem) -> str | None:
    """Why backend="auto" does not choose the kernel; None if it may."""
    return (
        "the interpreter is only used when backend='triton' asks for it"
        if problem.device == "cpu"
        else None
    )


def _module(name: str) -> ModuleType:
    """A launcher module. It imports triton, so it is imported at first use."""
    return importlib.import_module(f"{__name__}.{name}")


_quantized = registry.Quantized(
    lambda *args, **kwargs: _module(layouts.EIGHT_BIT).quantize(*args, **kwargs),
    lambda *args: _module(layouts.EIGHT_BIT).multiply(*args),
    lambda *args, **kwargs: _module(layouts.EIGHT_BIT).columns_of(*args, **kwargs),
    lambda plan: _module("launch").Compiled(plan),
    tune=lambda *args: _module(layouts.EIGHT_BIT).tune(*args),
)


def _rejects_experts(problem: Problem, layout: str) -> str | None:
    reason = _rejects(problem, layout) or _module("experts").obstacle(problem, layout)
    return None if reason is None else str(reason)


def _grouped(problem: Problem) -> Any:
    return _module("experts").Grouped(problem)


def _layer(*args: Any) -> Any:
    return _module("experts").Layer(*args)


def _fused(*args: Any) -> Tensor:
    result: Tensor = _module("experts").fused(*args)
    return result


def _register_experts(name: str, layout: str) -> None:
    def run(*args: Any) -> Tensor:
        result: Tensor = _module("experts").run(*args)
        return result

    def configuration(problem: Problem) -> str:
        return str(_module("experts").configuration(problem))

    rejects = partial(_rejects_experts, layout=layout)
    registry.register(
        registry.ExpertsKernel(
            name,
            "triton",
            layout,
            unavailable,
            rejects,
            run,
            _automatic,
            configuration,
            _grouped,
            _fused,
            _layer,
        )
    )


def register_kernels() -> None:
    """Register two kernels for each layout: one for a single matrix and one for experts.

    The launcher module of a single matrix has the name of its layout.
    """
    _register_experts("triton.experts_weight_only", layouts.WEIGHT_ONLY)
    _register_experts("triton.experts_eight_bit", layouts.EIGHT_BIT)
    families = {
        "triton.weight_only_gemm": layouts.WEIGHT_ONLY,
        "triton.eight_bit_gemm": layouts.EIGHT_BIT,
    }
    for name, layout in families.items():

        def run(
            x: Tensor,
            p: PackedWeight,
            bias: Tensor | None,
            problem: Problem,
            layout: str = layout,
        ) -> Tensor:
            result: Tensor = _module(layout).run(x, p, bias, problem)
            return result

        def configuration(problem: Problem, layout: str = layout) -> str:
            return str(_module(layout).configuration(problem))

        def bind(p: PackedWeight, problem: Problem, layout: str = layout) -> registry.Bound | None:
            bound: registry.Bound | None = _module(layout).bind(p, problem)
            return bound

        registry.register(
            registry.Kernel(
                name,
                "triton",
                layout,
                unavailable,
                partial(_rejects, layout=layout),
                run,
                _automatic,
                configuration,
                bind=bind,
                quantized=_quantized if layout == layouts.EIGHT_BIT else None,
            )
        )
