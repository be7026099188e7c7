"""Adapters for other projects' kernels, which race in the same loop on the same weights.

Each file is one project and has a list CONTESTANTS. A peer whose package is not installed says so
and takes no part. A peer whose package does not do what the adapter expects is listed as failed,
with the reason.

Peers that take our own codes (`same_weight`) are held to our reference as closely as our kernels.
Peers that quantize by themselves are checked against the product with the unrounded weight, within
the error that their format may have.

There is no adapter for llama.cpp: its Python bindings (llama-cpp-python, ggml-python) run graphs
and models, and offer no product of a torch CUDA tensor with a packed weight.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import qkernels as qk
from qkernels.benchmark.race import Contestant, Layer
from qkernels.weights.packed import PackedWeight

#: relative error that rounding the weights (and activations) may cost, on Gaussian data
FOUR_BIT, EIGHT_BIT = 0.2, 0.05
#: relative error that 16-bit scales and outputs may cost where the codes are the same
SAME_WEIGHT = 0.02


class Peer(Contestant):
    """A contestant of another project. module: the module that must be importable."""

    module = "torch"
    #: most peers compile with nvcc, or search configurations of Triton kernels, at their first call
    patience, compiles = 240.0, True

    def unavailable(self) -> str | None:
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
        return None


def unrounded(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The function x -> x @ weight^T in float64, with a bfloat16 copy of the weight."""
    rounded = weight.bfloat16()
    return lambda x: x.double() @ rounded.double().T


def layer(
    call: Callable[[Tensor], Tensor],
    nbytes: int,
    weight: Tensor,
    tolerance: float,
    kind: str = "bf16",
) -> Layer:
    """The layer of a peer that quantizes by itself: checked against the unrounded weight."""
    return Layer(call, nbytes, unrounded(weight), tolerance, kind)


def same_weight(call: Callable[[Tensor], Tensor], p: PackedWeight, kind: str = "bf16") -> Layer:
    """The layer of a peer that was given the tensors of `p`: checked against our reference."""
    dtype = torch.float64 if p.shape[0] * p.shape[1] <= 2**26 else torch.float32
    return Layer(
        call, p.nbytes, lambda x: qk.matmul(x.to(dtype), p, backend="reference"), SAME_WEIGHT, kind
    )


def contestants(only: Sequence[str] | None = None) -> list[Contestant]:
    """The contestants of every module here, or of the named modules in their order.

    only: files in this folder without the underscore, or modules of other packages, with dots.

    Raises:
        ValueError: a name is neither.
    """
    modules = {
        info.name.removesuffix("_"): f"{__name__}.{info.name}"
        for info in pkgutil.iter_modules(__path__)
    }
    field: list[Contestant] = []
    for name in modules if only is None else only:
        if name not in modules and "." not in name:
            raise ValueError(
                f"peers: expected some of {', '.join(modules)}, or a module; got {name!r}"
            )
        field += importlib.import_module(modules.get(name, name)).CONTESTANTS
    return field
