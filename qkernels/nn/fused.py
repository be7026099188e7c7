"""Layers with a norm or a gate fused into the quantization of activations: `qkernels.fused`.

    FusedNormLinear   a norm and the layers that read it in one module, for your own model code
    FusedNorm         replaces an RMSNorm of an existing model
    NormReader        replaces a layer that reads this norm
    FusedGate         replaces a gated feed-forward

`qkernels.fuse_norms` (models/fuse.py) puts the last three into a model. ops/fused.py has the
operators, and explains what is fused and when.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.fused import explain, rms_norm, rms_norm_matmul, silu_mul, silu_mul_matmul
from .linear import QuantLinear

__all__ = [
    "FusedNormLinear",
    "explain",
    "rms_norm",
    "rms_norm_matmul",
    "silu_mul",
    "silu_mul_matmul",
]


class FusedNormLinear(nn.Module):
    """RMSNorm and the quantized layers that read it: x (..., K) -> (..., N) of each layer."""

    def __init__(self, norm_weight: Tensor, eps: float, layers: Sequence[QuantLinear]) -> None:
        """norm_weight: (K). layers: not copied. ValueError if they differ in K or in backend."""
        super().__init__()
        check_layers(layers)
        if tuple(norm_weight.shape) != (layers[0].in_features,):
            raise ValueError(
                f"norm_weight: expected shape ({layers[0].in_features},), "
                f"got {tuple(norm_weight.shape)}"
            )
        is_parameter = isinstance(norm_weight, nn.Parameter)
        self.weight = norm_weight if is_parameter else nn.Parameter(norm_weight.detach())
        self.eps = eps
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(norm_and_layers(x, self.weight, self.eps, list(self.layers)))  # type: ignore[arg-type]

    def explain(self, m: int = 1, dtype: torch.dtype = torch.float16) -> str:
        """How the layers' products run, as `qkernels.fused.explain` says it."""
        first: QuantLinear = self.layers[0]  # type: ignore[assignment]
        packed = [layer.packed for layer in self.layers]
        return explain(packed, m, dtype, None, first.backend, first.batch_invariant)  # type: ignore[arg-type]


def check_layers(layers: Sequence[QuantLinear]) -> None:
    """ValueError unless there is a layer, and all have one K, backend and batch invariance."""
    if not layers:
        raise ValueError("layers: expected at least one, got none")
    for name in ("in_features", "backend", "batch_invariant"):
        values = [getattr(layer, name) for layer in layers]
        if any(value != values[0] for value in values):
            raise ValueError(f"layers: expected one {name} for all, got {values}")


def norm_and_layers(
    x: Tensor, norm: Tensor, eps: float, layers: Sequence[QuantLinear]
) -> list[Tensor]:
    """Each layer's output for RMSNorm of x."""
    if torch.compiler.is_compiling():  # the compiler fuses the norm, each layer is an operator
        plain = rms_norm(x, norm, eps)
        return [QuantLinear.forward(layer, plain) for layer in layers]
    packed = [layer.prepack(x).packed for layer in layers]
    biases = [layer.bias for layer in layers]
    first = layers[0]
    return rms_norm_matmul(x, norm, eps, packed, biases, first.backend, first.batch_invariant)


class FusedNorm(nn.Module):
    """Replaces an RMSNorm: computes the products of all its readers, and delivers them.

    Its own output is x without the norm; the readers use nothing of it but the shape.
    """

    def __init__(self, norm: nn.Module, readers: Sequence[NormReader]) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm_eps(norm)
        self._readers = tuple(readers)  # a tuple, because they are submodules of other modules

    def forward(self, x: Tensor) -> Tensor:
        ys = norm_and_layers(x, self.weight, self.eps, self._readers)  # type: ignore[arg-type]
        for reader, y in zip(self._readers, ys, strict=True):
            reader.deliver(y)
        return x

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, fused with {len(self._readers)} layers"


class NormReader(QuantLinear):
    """A QuantLinear that returns the product which its `FusedNorm` has computed for it."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(
            layer.packed, layer.bias, layer.backend, layer.batch_invariant, layer.dtype
        )
        self.train(layer.training)
        #: thread -> product; threads can be at different places of one model
        self._delivered: dict[int, Tensor] = {}

    def deliver(self, y: Tensor) -> None:
        """Give it the product that this thread's next call returns."""
        self._delivered[_thread()] = y

    def forward(self, x: Tensor) -> Tensor:
        y = self._delivered.pop(_thread(), None)
        if y is None:
            raise RuntimeError(
                "a layer fused with the norm before it was called without that norm, or twice; "
                "qkernels.fuse_norms is for models whose norms feed each layer once"
            )
        return y


class FusedGate(nn.Module):
    """down(silu(gate(x)) * up(x)): the gated feed-forward of Llama-like models.

    Its submodules have the names that they had in the model's own module.
    """

    def __init__(self, mlp: nn.Module, gate: str, up: str, down: str) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self._names = (gate, up, down)
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self._names)
        g, u = gate(x), up(x)
        if torch.compiler.is_compiling():
            y: Tensor = down(silu_mul(g, u))
            return y
        packed = down.prepack(g).packed
        return silu_mul_matmul(g, u, packed, down.bias, down.backend, down.batch_invariant)


def _thread() -> int:
    """This thread's number; 0 in a compiled graph, which cannot ask for it."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def norm_eps(norm: nn.Module) -> float | None:
    """The norm's epsilon, which transformers' norms call variance_epsilon; None if it has none."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) else None
