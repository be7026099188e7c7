"""QuantLinear: a drop-in nn.Linear whose weight stays packed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.problem import resolve_batch_invariant
from ..ops import matmul as ops
from ..weights.packed import PackedWeight, params_text, quantize
from .base import Holder, mangled

#: attributes of nn.Module with the hooks of its calls
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip


class _View(NamedTuple):
    """A layer's weight, and the buffers (names and tensors) from which it was made."""

    packed: PackedWeight
    keys: tuple[str, ...]
    tensors: tuple[Tensor | None, ...]

    def agrees(self, buffers: dict[str, Tensor | None]) -> bool:
        """Whether these are still the buffers."""
        return all(
            buffers.get(key) is tensor for key, tensor in zip(self.keys, self.tensors, strict=True)
        )


class QuantLinear(Holder):
    """y = x @ W^T + bias with a packed (N, K) weight.

    The packed tensors are non-persistent buffers: they follow `.to(device)`, but `.half()` and
    `.to(dtype)` do not change their dtypes. `state_dict()` has the checkpoint's own tensors, bit
    for bit, whatever layout the weight is in. x may have any leading dimensions and any float
    dtype. Threads may share a layer, and make its first call at the same time.
    """

    bias: Tensor | None

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        backend: str = "auto",
        batch_invariant: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer that shares the packed weight's tensors. ValueError if the bias does not fit.

        Args:
            packed: the weight (N, K).
            bias: (N) float or None.
            backend, batch_invariant: as in `qkernels.matmul`.
            dtype: the value of `weight.dtype`; None for the bias's dtype, or else torch's default.
        """
        if bias is not None:
            ops.check_bias(bias, packed.shape[0])
        super().__init__(dtype or (torch.get_default_dtype() if bias is None else bias.dtype))
        self.out_features, self.in_features = packed.shape
        self.backend = backend
        self.batch_invariant = batch_invariant
        if bias is not None:
            bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
        self.register_parameter("bias", bias)
        # A PackedWeight for this layer alone: other layers may share the tensors, and each layer
        # moves its weight to a kernel layout by itself.
        self._hold(
            PackedWeight(packed.format, packed.shape, packed.storage, packed.params, packed.layout)
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: str, **params: Any) -> QuantLinear:
        """A QuantLinear with an nn.Linear's weight, rounded to nearest, and with its hooks.

        The nn.Linear is not changed. Raises ValueError as `quantize` does.
        """
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls(quantize(linear.weight, format, **params), bias, dtype=linear.weight.dtype)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.stand_in_for(linear)

    def stand_in_for(self, linear: nn.Module) -> QuantLinear:
        """Take over the hooks and the training mode of the layer that this one replaces.

        Hooks of torch.nn.utils are left out, because they compute the weight anew before each call,
        as weight_norm does. Returns self.
        """
        for name in _HOOKS:
            setattr(self, name, getattr(linear, name))
        hooks = linear._forward_pre_hooks
        computing = {
            i for i, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils")
        }
        if computing:
            others = OrderedDict((i, hook) for i, hook in hooks.items() if i not in computing)
            self._forward_pre_hooks = others
        return self.train(linear.training)

    # ------------------------------------------------------------------ the weight
    #
    # The weight is a PackedWeight, and its tensors are this module's buffers. Either can change:
    #
    # - A first call moves the PackedWeight to a kernel's layout. Then `_settle` makes its new
    #   tensors the buffers.
    # - torch and other libraries replace buffers, to move or to offload them. Then `packed` makes a
    #   new PackedWeight of the buffers.
    #
    # `_view` tells which of the two has changed: it has the PackedWeight, and the buffers as they
    # were when both last agreed.
    def _hold(self, packed: PackedWeight) -> None:
        with self._lock:
            snapshot = packed.snapshot
            self._keep(snapshot.storage)
            self._keys = [mangled(name) for name in self._names]
            self._meta = (packed.format, packed.shape, dict(packed.params), snapshot.layout)
            self._spec = ops.spec_of(packed, snapshot)
            self._view: _View | None = _View(
                packed, tuple(self._keys), tuple(snapshot.storage.values())
            )

    @property
    def packed(self) -> PackedWeight:
        """The weight, sharing this layer's tensors."""
        view = self._view
        if view is not None and view.agrees(self._buffers):
            return view.packed
        with self._lock:  # another thread may be replacing the buffers
            view = self._view
            if view is None or not view.agrees(self._buffers):
                format, shape, params, layout = self._meta
                tensors = tuple(self._buffers[key] for key in self._keys)
                storage = dict(zip(self._names, tensors, strict=True))
                packed = PackedWeight(format, shape, storage, params, layout)  # type: ignore[arg-type]
                view = self._view = _View(packed, tuple(self._keys), tensors)
            return view.packed

    def _settle(self, packed: PackedWeight) -> None:
        """Make the weight's tensors the buffers, after a call has moved it to another layout."""
        with self._lock:
            view = self._view
            if view is not None and view.packed is packed and packed.layout != self._meta[3]:
                self._hold(packed)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_view": None}

    @property
    def qweight(self) -> Tensor:
        """The codes in the current layout. Other libraries (PEFT) read the layer's device here."""
        tensors = self.packed.storage.values()
        return max(tensors, key=lambda tensor: tensor.numel() * tensor.element_size())

    def prepack(self, x: Tensor) -> QuantLinear:
        """Move the weight to the layout that the kernel for inputs like `x` takes. Returns self.

        Eager calls do this by themselves. Call it before torch.compile or CUDA graph capture.
        """
        packed = self.packed
        ops.prepack_for(packed, x, self.backend, resolve_batch_invariant(self.batch_invariant))
        self._settle(packed)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self._parameters["bias"])

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ W^T + bias, with this bias (N) instead of the layer's."""
        if not torch.compiler.is_compiling():
            packed = self.packed
            y = ops.matmul(x, packed, bias, self.backend, self.batch_invariant)
            if packed.layout != self._meta[3]:  # this call moved it
                self._settle(packed)
            return y
        shape = (self.out_features, self.in_features)
        storage = [self._buffers[key] for key in self._keys]
        ops.check_operands(x, shape, storage[0].device, bias)
        invariant = resolve_batch_invariant(self.batch_invariant)
        return ops.call_operator(x, storage, bias, self._spec, self.backend, shape, invariant)

    def extra_repr(self) -> str:
        format, _, params, layout = self._meta
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={format!r}, "
            f"{params_text(params)}layout={layout!r}"
        )


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, or transformers' Conv1D: GPT-2's linear layer, transposed."""
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and getattr(module, "weight", None) is not None
    )


def computes_otherwise(module: nn.Linear) -> bool:
    """Whether the forward of a subclass of nn.Linear computes something else than x @ W^T + bias.

    It is tried out with small numbers. Falcon has a subclass that computes the same.
    """
    if type(module).forward is nn.Linear.forward:
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (
        torch.randn(size, generator=generator, device="cpu") for size in ((5, 3), (5,), (2, 3))
    )
    small = copy.copy(module)
    bias_or_none = None if module.bias is None else nn.Parameter(bias)
    small._parameters = {**module._parameters, "weight": nn.Parameter(weight), "bias": bias_or_none}
    small.in_features, small.out_features = 3, 5
    try:
        with torch.no_grad():
            y = type(module).forward(small, x)
            return not torch.allclose(y, nn.functional.linear(x, weight, bias_or_none), atol=1e-5)
    except Exception:  # a module's own code can break in any way
        return True


def linear_of(module: nn.Module) -> nn.Linear:
    """`module`, for which `is_linear` holds, as an nn.Linear.

    That is the module itself, or for a Conv1D a new nn.Linear whose weight is a transposed view.
    """
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    linear.bias = bias  # type: ignore[assignment]
    for name in _HOOKS:
        setattr(linear, name, getattr(module, name))
    return linear.train(module.training)
