"""The two halves of an 8-bit product, each by itself. `module` is a language's eight_bit.py."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

import qkernels as qk
from qkernels.backends.eight_bit import Activations
from qkernels.backends.plan import Plan, Symbolic
from qkernels.backends.problem import Problem

from ..plans import at_once


def _compiled(module: Any) -> Any:
    return importlib.import_module(f"{module.__package__}.launch").Compiled


def quantize(
    module: Any,
    x: Tensor,
    p: qk.PackedWeight,
    problem: Problem,
    *,
    up: Tensor | None = None,
    norm: Tensor | None = None,
    **more: Any,
) -> Activations:
    def declare(plan: Plan, x: Symbolic, up: Symbolic | None, norm: Symbolic | None) -> Any:
        return module.quantize(plan, x, p, problem, up=up, norm=norm, **more)

    codes: Activations = at_once(_compiled(module), declare, x, up, norm)
    return codes


def multiply(
    module: Any,
    a: Activations,
    p: qk.PackedWeight,
    bias: Tensor | None,
    problem: Problem,
    *more: Any,
) -> Tensor:
    y = torch.empty(a.x.shape[0], p.shape[0], dtype=a.x.dtype, device=a.x.device)

    def declare(plan: Plan, y: Symbolic, bias: Symbolic | None, *codes: Any) -> None:
        module.multiply(plan, Activations(*codes), p, bias, problem, y, *more)

    at_once(_compiled(module), declare, y, bias, *a)
    return y
