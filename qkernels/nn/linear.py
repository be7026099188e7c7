"""QuantLinear: a drop-in nn.Linear whose weight stays packed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.problem import resolve_batch_invariant
from ..ops import matmul as ops
from ..weights.packed import PackedWeight, quantize
from .base import Holder, mangled

#: where nn.Module keeps the hooks of its calls
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


class _View(NamedTuple):
    """A layer's weight, and the buffers (names and tensors) that it had when it was last looked at."""

    packed: PackedWeight
    keys: tuple[str, ...]
    tensors: tuple[Tensor | None, ...]

    def agrees(self, buffers: dict[str, Tensor | None]) -> bool:
        """Whether those are the buffers still."""
        return all(
            buffers.get(key) is tensor for key, tensor in zip(self.keys, self.tensors, strict=True)
        )


class QuantLinear(Holder):
    """y = x @ W^T + bias with a packed (N, K) weight.

    The packed tensors are non-persistent buffers, so they follow `.to(device)` but keep their
    dtypes whatever `.half()` or `.to(dtype)` says; `state_dict()` holds the checkpoint's own
    tensors, bit for bit, in whichever layout the weight is kept. x may have any leading dimensions
    and any float dtype. Threads may share a layer, its first call included.
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
        """`bias`: (N) float or None. `dtype`: what `weight.dtype` says, None for the bias's or
        torch's default.

        The rest is as in `qkernels.matmul`. ValueError if the bias does not fit.
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
        # An object of its own: other layers may share the tensors, and each moves its weight by
        # itself.
        self._hold(
            PackedWeight(packed.format, packed.shape, packed.storage, packed.params, packed.layout)
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: str, **params: Any) -> QuantLinear:
        """Quantize an nn.Linear by round-to-nearest; it is left as it was, and shares its hooks.

        ValueError as `quantize`.
        """
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls(quantize(linear.weight, format, **params), bias, dtype=linear.weight.dtype)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.stand_in_for(linear)

    def stand_in_for(self, linear: nn.Module) -> QuantLinear:
        """Take over the hooks of the layer whose place this one takes, and whether it trains.
        Returns self.

        Without those of torch.nn.utils that compute a weight anew before each call, as weight_norm
        does.
        """
        for name in _HOOKS:
            setattr(self, name, getattr(linear, name))
        hooks = linear._forward_pre_hooks
        computing = {
            i for i, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils")
        }
        if computing:
            kept = OrderedDict((i, hook) for i, hook in hooks.items() if i not in computing)
            self._forward_pre_hooks = kept
        return self.train(linear.training)

    # ------------------------------------------------------------------ the weight
    #
    # The weight is an object, and its tensors are this module's buffers. Two parties change them: a
    # first call moves the object to a kernel's layout, after which `_settle` makes its new tensors
    # the buffers; and others replace buffers, to move or to offload them, after which `packed`
    # makes a new object of those. `_view` tells the two apart: the object, and the buffers as they
    # were when the two last agreed.
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
        with self._lock:  # another thread may be at work on the buffers
            view = self._view
            if view is None or not view.agrees(self._buffers):
                format, shape, params, layout = self._meta
                tensors = tuple(self._buffers[key] for key in self._keys)
                storage = dict(zip(self._names, tensors, strict=True))
                packed = PackedWeight(format, shape, storage, params, layout)  # type: ignore[arg-type]
                view = self._view = _View(packed, tuple(self._keys), tensors)
            return view.packed

    def _settle(self, packed: PackedWeight) -> None:
        """Follow the weight to the layout that a call has moved it to."""
        with self._lock:
            view = self._view
            if view is not None and view.packed is packed and packed.layout != self._meta[3]:
                self._hold(packed)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_view": None}

    @property
    def qweight(self) -> Tensor:
        """The codes as held now. Other libraries (PEFT) learn the layer's device from it."""
        tensors = self.packed.storage.values()
        return max(tensors, key=lambda tensor: tensor.numel() * tensor.element_size())

    def prepack(self, x: Tensor) -> QuantLinear:
        """Move the weight to the layout that the kernel for inputs like `x` takes. Returns self.

        Eager calls do this by themselves; call it before torch.compile or CUDA graph capture.
        """
        packed = self.packed
        ops.prepack_for(packed, x, self.backend, resolve_batch_invariant(self.batch_invariant))
        self._settle(packed)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self._parameters["bias"])

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ W^T + bias, with a bias (N) that is not the layer's own."""
        if not torch.compiler.is_compiling():
            packed = self.packed
            y = ops.matmul(x, packed, bias, self.backend, self.batch_invariant)
            if packed.layout != self._meta[3]:  # the first call moved it
                self._settle(packed)
            return y
        shape = (self.out_features, self.in_features)
        storage = [self._buffers[key] for key in self._keys]
        ops.check_operands(x, shape, storage[0].device, bias)
        invariant = resolve_batch_invariant(self.batch_invariant)
        return ops.call_operator(x, storage, bias, self._spec, self.backend, shape, invariant)

    def extra_repr(self) -> str:
        format, _, params, layout = self._meta
        shown = ", ".join(f"{k}={v!r}" for k, v in params.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={format!r}, {shown}, layout={layout!r}"
        )


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, or what GPT-2 has instead: transformers' Conv1D, a transposed
    one.
    """
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and getattr(module, "weight", None) is not None
    )


def computes_otherwise(module: nn.Linear) -> bool:
    """Whether a subclass has a forward that is no x @ W^T + bias. It is tried with small numbers:
    Falcon's is one.
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
    """`module`, for which `is_linear` holds, as an nn.Linear: itself, or one around its weight's
    transpose.
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
