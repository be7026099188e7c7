"""What modules with a packed weight have in common: buffers that keep their dtypes, the
checkpoint's state dict.
"""

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

    They follow `.to(device)` but keep their dtypes whatever `.half()` or `.to(dtype)` says;
    `state_dict()` holds the checkpoint's own tensors, bit for bit, in whichever layout the weight
    is kept.

    Attributes:
        dtype: what the model around computes in. It follows `.half()` and `.to(dtype)`.
    """

    dtype: torch.dtype
    #: format, shape and parameters of the weight, and what else a module keeps of it
    _meta: tuple[Any, ...]

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._names: list[str] = []
        self.dtype = dtype
        #: taken by whoever replaces the buffers
        self._lock = threading.RLock()

    @property
    def packed(self) -> PackedWeight:
        """The weight, sharing this module's tensors."""
        raise NotImplementedError

    def _hold(self, packed: PackedWeight) -> None:
        """Take `packed` for the weight: `_keep` its tensors and set `_meta`."""
        raise NotImplementedError

    def _keep(self, tensors: Mapping[str, Tensor]) -> None:
        """These tensors as buffers, instead of those kept so far."""
        for name in self._names:
            del self._buffers[mangled(name)]
            self._non_persistent_buffers_set.discard(mangled(name))
        self._names = list(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(mangled(name), tensor, persistent=False)

    # ------------------------------------------------------------------ for code that reads `layer.weight`
    @property
    def weight(self) -> StandIn:
        """Shape, dtype and device of the matrix, as model code asks for them; no tensor."""
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
            f"weight: expected nothing to be assigned, because it is packed ({self.packed.format}), got a "
            f"{type(value).__name__}; put another layer in this one's place (to tie a packed head, "
            "make it of the embedding's packed weight)"
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
        else:  # as torch does
            warnings.warn(
                f"{prefix or 'state_dict'}: the packed weight stays without data on the meta device; "
                "assign=True takes the tensors, to_empty(device=...) makes room for them",
                stacklevel=2,
            )
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in tensors}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def refuse_save_pretrained() -> None:
    """ValueError if transformers' `save_pretrained` is the caller, of a model that it does not know
    to hold packed layers.

    It would write their tensors without a `quantization_config`, and load random weights in their
    place. Models that are quantized or loaded as a whole tell it (checkpoints/save_pretrained.py);
    layers put in by hand cannot, as they do not know their model. So the caller is looked for.
    """
    kind = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    frame = None if kind is None else sys._getframe(1)
    while frame is not None:
        model = frame.f_locals.get("self") if frame.f_code.co_name == "save_pretrained" else None
        if kind and isinstance(model, kind) and not getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "save_pretrained: expected a model that qkernels has quantized or loaded as a whole, got one with "
                "packed layers put in by hand; qkernels.save_model(model, path) saves it"
            )
        frame = frame.f_back


def mangled(name: str) -> str:
    """A tensor's name as a buffer name, which may hold no dot and must not hide an attribute."""
    return "packed_" + name.replace(".", "__")
