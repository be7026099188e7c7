"""QuantLinear: a drop-in nn.Linear whose weight stays packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, ops
from .holding import Holder, mangled
from .packed import PackedWeight, quantize


class QuantLinear(Holder):
    """y = x @ W^T + bias with a packed (N, K) weight.

    The packed tensors are non-persistent buffers, so they follow `.to(device)` but keep their dtypes
    whatever `.half()` or `.to(dtype)` says; `state_dict()` holds the checkpoint's own tensors, bit for
    bit, in whichever layout the weight is kept. x may have any leading dimensions and any float dtype.
    """

    bias: Tensor | None

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        backend: str = "auto",
        batch_invariant: bool | None = None,
    ) -> None:
        """`bias`: (N) float or None; the rest as in `qkernels.matmul`. ValueError if it does not fit."""
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.backend = backend
        self.batch_invariant = batch_invariant
        if bias is not None:
            if tuple(bias.shape) != (self.out_features,) or not bias.is_floating_point():
                raise ValueError(
                    f"bias: expected a floating tensor of shape ({self.out_features},), "
                    f"got {bias.dtype} {tuple(bias.shape)}"
                )
            bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
        self.register_parameter("bias", bias)
        # An object of its own: other layers may share the tensors, and each moves its weight by itself.
        self._hold(PackedWeight(packed.format, packed.shape, packed.storage, packed.params, packed.layout))

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: str, **params: Any) -> QuantLinear:
        """Quantize an nn.Linear by round-to-nearest; it is left as it was. ValueError as `quantize`."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls(quantize(linear.weight, format, **params), bias)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    # ------------------------------------------------------------------ the weight
    def _hold(self, packed: PackedWeight) -> None:
        self._keep(packed.storage)
        self._keys = [mangled(name) for name in self._names]
        self._meta = (packed.format, packed.shape, dict(packed.params), packed.layout)
        self._spec = ops.spec_of(packed)
        self._packed: PackedWeight | None = packed

    @property
    def packed(self) -> PackedWeight:
        """The weight, sharing this layer's tensors."""
        buffers, held = self._buffers, self._packed
        # Others replace buffers, to move or to offload them: what was held is good while they are its own.
        if (
            held is None
            or held.layout != self._meta[3]
            or any(
                buffers[key] is not tensor
                for key, tensor in zip(self._keys, held.storage.values(), strict=True)
            )
        ):
            format, shape, params, layout = self._meta
            storage = {name: buffers[key] for name, key in zip(self._names, self._keys, strict=True)}
            held = self._packed = PackedWeight(format, shape, storage, params, layout)  # type: ignore[arg-type]
        return held

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    @property
    def qweight(self) -> Tensor:
        """The codes as held now. Other libraries (PEFT) learn the layer's device from it."""
        tensors: list[Tensor] = [self._buffers[mangled(name)] for name in self._names]  # type: ignore[misc]
        return max(tensors, key=lambda tensor: tensor.numel() * tensor.element_size())

    def prepack(self, x: Tensor) -> QuantLinear:
        """Move the weight to the layout that the kernel for inputs like `x` takes. Returns self.

        Eager calls do this by themselves; call it before torch.compile or CUDA graph capture.
        """
        packed = self.packed
        layout = packed.layout
        ops.prepack_for(packed, x, self.backend, dispatch.resolve_batch_invariant(self.batch_invariant))
        if packed.layout != layout:
            self._hold(packed)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self._parameters["bias"])

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ W^T + bias, with a bias (N) that is not the layer's own."""
        if not torch.compiler.is_compiling():
            packed = self.packed
            y = ops.matmul(x, packed, bias, self.backend, self.batch_invariant)
            if packed.layout != self._meta[3]:  # the first call moved it
                self._hold(packed)
            return y
        shape = (self.out_features, self.in_features)
        storage = [self._buffers[key] for key in self._keys]
        ops.check_operands(x, shape, storage[0].device, bias)
        invariant = dispatch.resolve_batch_invariant(self.batch_invariant)
        return ops.call(x, storage, bias, self._spec, self.backend, shape, invariant)

    def extra_repr(self) -> str:
        format, _, params, layout = self._meta
        shown = ", ".join(f"{k}={v!r}" for k, v in params.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={format!r}, {shown}, layout={layout!r}"
        )


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, or what GPT-2 has instead: transformers' Conv1D, a transposed one."""
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and getattr(module, "weight", None) is not None
    )


def linear_of(module: nn.Module) -> nn.Linear:
    """`module`, for which `is_linear` holds, as an nn.Linear: itself, or one around its weight's transpose."""
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    linear.bias = bias  # type: ignore[assignment]
    return linear.train(module.training)
