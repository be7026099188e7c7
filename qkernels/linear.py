"""QuantLinear: a drop-in nn.Linear whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, formats, ops
from .packed import PackedWeight, pack, quantize


class QuantLinear(nn.Module):
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
        self._names: list[str] = []
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
        for name in self._names:
            del self._buffers[_mangle(name)]
            self._non_persistent_buffers_set.discard(_mangle(name))
        self._names = list(packed.storage)
        self._keys = [_mangle(name) for name in self._names]
        for name, tensor in packed.storage.items():
            self.register_buffer(_mangle(name), tensor, persistent=False)
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
        tensors: list[Tensor] = [self._buffers[_mangle(name)] for name in self._names]  # type: ignore[misc]
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

    # ------------------------------------------------------------------ nn.Module's protocol
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        packed_tensors = {id(self._buffers[_mangle(name)]) for name in self._names}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in packed_tensors and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.packed.tensors.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        format, shape, params, _ = self._meta
        specs = formats.get(format).specs(shape, params)
        tensors = {name: state_dict[prefix + name] for name in specs if prefix + name in state_dict}
        missing = [name for name, s in specs.items() if s.required and name not in tensors]
        if missing:
            missing_keys += [prefix + name for name in missing]
        else:
            device = self.packed.device
            self._hold(pack(format, {k: v.to(device) for k, v in tensors.items()}, shape, **params))
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in tensors}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

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


def _mangle(name: str) -> str:
    """A tensor's name as a buffer name, which may hold no dot and must not hide an attribute."""
    return "packed_" + name.replace(".", "__")
