"""Shared by both languages' launchers of the 8-bit family: quantized activations, their size."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .. import formats
from ..layouts import eight_bit as layout
from .problem import Problem


class Activations(NamedTuple):
    """x (M, K) quantized, as `multiply` takes it.

    Weights of one kind and one input scale may share it.

    Attributes:
        codes: int8 or float8_e4m3fn, (M, K padded to 16).
        scale: float32, (M) per token, (groups, M) per group, (1) per tensor.
        x: the values before quantization, in 16 bits: outliers are multiplied in 16 bits.
        columns: int32 (K + 1), the outlier columns, and at index K their number; None without a
            threshold.
    """

    codes: Tensor
    scale: Tensor
    x: Tensor
    columns: Tensor | None = None


@lru_cache(maxsize=4096)
def traits_of(problem: Problem) -> layout.EightBitTraits:
    """The traits of the problem's weight, by which launchers choose code."""
    return formats.get(problem.format).eight_bit_traits(problem.shape, dict(problem.params))


def row_bytes(problem: Problem, fused: bool = False) -> int:
    """Scratch memory that a row of x takes in `quantize`.

    fused: whether a norm or a gate is fused with it. LLM.int8() then also keeps the result of the
    norm in 16 bits, because its outliers are not in x.
    """
    traits, k = traits_of(problem), problem.shape[1]
    scales = {"token": 1, "group": -(-k // layout.BLOCK), "tensor": 0}[traits.activation]
    return layout.padded(k) + 4 * scales + (2 * k if fused and traits.threshold > 0 else 0)
