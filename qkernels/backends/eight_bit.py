"""Shared by both languages' launchers of the 8-bit family: quantized activations."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from .. import formats
from ..layouts import eight_bit as layout
from .problem import Problem


class Activations(NamedTuple):
    """x (M, K) quantized, as `multiply` takes it: tensors of a plan.

    Weights of one kind and one input scale may share it.

    Attributes:
        codes: int8 or float8_e4m3fn, (M, K padded to 16); None if the product quantizes `x` itself.
        scale: float32, (M) per token, (groups, M) per group, (1) per tensor. Without codes only per
            tensor, else None.
        x: the values before quantization, in 16 bits: outliers are multiplied in 16 bits.
        columns: int32 (K + 1), the outlier columns, and at index K their number; None without a
            threshold.
    """

    codes: Any
    scale: Any
    x: Any
    columns: Any = None


@lru_cache(maxsize=4096)
def traits_of(problem: Problem) -> layout.EightBitTraits:
    """The traits of the problem's weight, by which launchers choose code."""
    return formats.get(problem.format).eight_bit_traits(problem.shape, dict(problem.params))
