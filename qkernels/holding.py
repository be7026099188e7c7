"""What modules with a packed weight have in common: buffers that keep their dtypes, the checkpoint's state dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import formats
from .packed import PackedWeight, pack

if TYPE_CHECKING:
    from typing_extensions import Self


class Holder(nn.Module):
    """A module with one packed weight, whose tensors are non-persistent buffers.

    They follow `.to(device)` but keep their dtypes whatever `.half()` or `.to(dtype)` says; `state_dict()` holds
    the checkpoint's own tensors, bit for bit, in whichever layout the weight is kept.
    """

    #: format, shape and parameters of the weight, and what else a module keeps of it
    _meta: tuple[Any, ...]

    def __init__(self) -> None:
        super().__init__()
        self._names: list[str] = []

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

    # ------------------------------------------------------------------ nn.Module's protocol
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        packed_tensors = {id(self._buffers[mangled(name)]) for name in self._names}

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
        format, shape, params = self._meta[:3]
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


def mangled(name: str) -> str:
    """A tensor's name as a buffer name, which may hold no dot and must not hide an attribute."""
    return "packed_" + name.replace(".", "__")
