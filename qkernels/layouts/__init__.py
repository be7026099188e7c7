"""Kernel layouts: the order of a weight's bytes that kernels read, and the way back, bit for bit.

One definition serves every kernel language. Each layout is one module with `pack` and `unpack`. A
format names the layout that its kernels take (`Format.kernel_layout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from ..tensors import whole
from . import eight_bit, weight_only
from .eight_bit import EIGHT_BIT
from .weight_only import WEIGHT_ONLY

CHECKPOINT = "checkpoint"

_MODULES: dict[str, ModuleType] = {WEIGHT_ONLY: weight_only, EIGHT_BIT: eight_bit}


def pack(
    fmt: Any,
    shape: tuple[int, int],
    params: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    layout: str,
) -> dict[str, Tensor]:
    """Checkpoint tensors of format `fmt` -> the tensors of `layout`.

    Each tensor is contiguous and aligned, because kernels are given addresses only.

    Raises:
        ValueError: `layout` is not the layout of the format's kernels.
    """
    expected = fmt.kernel_layout(params)
    if layout not in _MODULES or layout != expected:
        raise ValueError(
            f"layout: expected {expected or 'none'!r} for {fmt.name!r} {dict(params)},"
            f" got {layout!r}"
        )
    packed = _MODULES[layout].pack(fmt, shape, dict(params), tensors)
    return {
        name: whole(f"{fmt.name}: {name}", tensor, aligned=True) for name, tensor in packed.items()
    }


def unpack(
    fmt: Any,
    shape: tuple[int, int],
    params: Mapping[str, Any],
    storage: Mapping[str, Tensor],
    layout: str,
) -> dict[str, Tensor]:
    """The inverse of `pack`: tensors of `layout` -> checkpoint tensors."""
    if layout == CHECKPOINT:
        return dict(storage)
    return _MODULES[layout].unpack(fmt, shape, dict(params), storage)
