"""Other people's products, raced in the same loop on the same weights; one small file each.

A module here has CONTESTANTS. A peer whose package is not installed says so and takes no part. Peers are
checked against the product with the unrounded weight, within what their format may cost.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable

import torch
from torch import Tensor

from qkernels.benchmark.race import Contestant, Layer

#: relative error that rounding the weights (and activations) may cost, on Gaussian data
FOUR_BIT, EIGHT_BIT = 0.2, 0.05


class Peer(Contestant):
    """`module`: what must be importable."""

    module = "torch"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
        return None


def unrounded(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x @ weight^T in float64, from a 16-bit copy."""
    kept = weight.bfloat16()
    return lambda x: x.double() @ kept.double().T


def layer(
    call: Callable[[Tensor], Tensor], nbytes: int, weight: Tensor, tolerance: float, kind: str = "bf16"
) -> Layer:
    return Layer(call, nbytes, unrounded(weight), tolerance, kind)


def contestants(only: set[str] | None = None) -> list[Contestant]:
    """Those of every module here, or of the named ones."""
    found: list[Contestant] = []
    for info in pkgutil.iter_modules(__path__):
        name = info.name.removesuffix("_")
        if only is None or name in only:
            found += importlib.import_module(f"{__name__}.{info.name}").CONTESTANTS
    return found
