"""Base of the modules with a packed weight: buffers that keep their dtypes, and the state dict."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from .. import formats
from ..weights.packed import PackedWeight, pack
from .stand_in import StandIn

if TYPE_CHECKING:
    from typing_extensions import Self


class Holder(nn.Module):
    """A module with one packed weight, whose tensors are non-persistent buffers.

    The buffers follow `.to(device)`, but `.half()` and `.to(dtype)` do not change their dtypes.
    `state_dict()` has the checkpoint's own tensors, bit for bit, whatever layout the weight is in.

    Attributes:
        dtype: the dtype in which the model computes. It follows `.half()` and `.to(dtype)`.
    """

    dtype: torch.dtype
    #: the weight's format, shape and parameters; QuantLinear adds the layout
    _meta: tuple[Any, ...]

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._names: list[str] = []
        self.dtype = dtype
        #: held while the buffers are replaced
        self._lock = threading.RLock()

    @property
    def packed(self) -> PackedWeight:
        """The weight, sharing this module's tensors."""
        raise NotImplementedError

    def _hold(self, packed: PackedWeight) -> None:
        """Make `packed` the weight: `_keep` its tensors and set `_meta`."""
        raise NotImplementedError

    def _keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the buffers by these tensors."""
        for name in self._names:
            del self._buffers[mangled(name)]
            self._non_persistent_buffers_set.discard(mangled(name))
        self._names = list(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(mangled(name), tensor, persistent=False)

    # ------------------------------------------------------------------ reads of `layer.weight`
    @property
    def weight(self) -> StandIn:
        """Shape, dtype and device of the matrix, for model code that asks; it is no tensor."""
        packed = self.packed
        return StandIn(packed.format, packed.shape, self.dtype, packed.device)

    @weight.setter
    def weight(self, value: Any) -> None:
        self._refuse_weight(value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            self._refuse_weight(param)
        super().register_parameter(name, param)

    def _refuse_weight(self, value: Any) -> NoReturn:
        raise ValueError(
            "weight: expected nothing to be assigned, because it is packed "
            f"({self.packed.format}), got a {type(value).__name__}; put another layer in this "
            "one's place (to tie a packed head, make it of the embedding's packed weight)"
        )

    # ------------------------------------------------------------------ nn.Module's protocol
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        packed_tensors = {id(self._buffers[mangled(name)]) for name in self._names}
        like = torch.empty(0, dtype=self.dtype, device=self.packed.device)

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in packed_tensors and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)
        dtype = fn(like).dtype
        self.dtype = dtype if dtype.is_floating_point else self.dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        refuse_save_pretrained()
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
        format, shape, params = self._meta[:3]
        specs = formats.get(format).specs(shape, params)
        tensors = {name: state_dict[prefix + name] for name in specs if prefix + name in state_dict}
        missing = [name for name, s in specs.items() if s.required and name not in tensors]
        assign = local_metadata.get("assign_to_params_buffers", False)
        device = self.packed.device
        if missing:
            missing_keys += [prefix + name for name in missing]
        elif assign:
            self._hold(pack(format, tensors, shape, **params))
        elif device.type != "meta":
            self._hold(
                pack(format, {name: t.to(device) for name, t in tensors.items()}, shape, **params)
            )
        else:  # torch does the same for parameters on the meta device
            warnings.warn(
                f"{prefix or 'state_dict'}: the packed weight stays without data on the meta "
                "device; assign=True takes the tensors, to_empty(device=...) makes room for them",
                stacklevel=2,
            )
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in tensors}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def refuse_save_pretrained() -> None:
    """ValueError if transformers' `save_pretrained` is the caller, for a model with packed layers.

    `save_pretrained` would write their tensors without a `quantization_config`, and loading would
    put random weights in their place. A model that qkernels has quantized or loaded as a whole has
    told transformers (checkpoints/hf/save_pretrained.py), so it does not come here. A layer put in
    by hand does not know its model, so this function searches the call stack for the caller.
    """
    model_class = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    frame = None if model_class is None else sys._getframe(1)
    while frame is not None:
        model = frame.f_locals.get("self") if frame.f_code.co_name == "save_pretrained" else None
        is_model = model_class is not None and isinstance(model, model_class)
        if is_model and not getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "save_pretrained: expected a model that qkernels has quantized or loaded as a "
                "whole, got one with packed layers put in by hand; "
                "qkernels.save_model(model, path) saves it"
            )
        frame = frame.f_back


def mangled(name: str) -> str:
    """The buffer's name for a tensor: buffer names have no dots and must not hide an attribute."""
    return "packed_" + name.replace(".", "__")
