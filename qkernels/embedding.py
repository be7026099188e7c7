"""QuantEmbedding: a drop-in nn.Embedding whose rows stay packed until they are looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import formats
from .packed import PackedWeight, pack
from .sharding import take_rows


class QuantEmbedding(nn.Module):
    """ids (...) -> rows of a packed (V, K) weight in `dtype`, (..., K); only the rows asked for are decoded.

    Only for formats that store a row's bytes together (GGUF's types, int8, fp8 by channel). The tensors are
    non-persistent buffers, never change dtype, and may be shared with a QuantLinear that is tied to it.
    """

    def __init__(self, packed: PackedWeight, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.shape
        self.dtype = dtype
        self._names: list[str] = []
        self._hold(packed)
        take_rows(
            self.packed, torch.zeros(1, dtype=torch.int64, device=packed.device)
        )  # ValueError now, not later

    def _hold(self, packed: PackedWeight) -> None:
        for name in self._names:
            del self._buffers[_mangle(name)]
        tensors = packed.tensors
        self._meta = (packed.format, packed.shape, dict(packed.params))
        self._names = list(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(_mangle(name), tensor, persistent=False)

    @property
    def packed(self) -> PackedWeight:
        """The weight, sharing this module's tensors."""
        format, shape, params = self._meta
        tensors = {name: self._buffers[_mangle(name)] for name in self._names}
        return PackedWeight(format, shape, tensors, params)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        if ids.numel() == 0:
            return torch.empty(*ids.shape, self.embedding_dim, dtype=self.dtype, device=ids.device)
        # Each row is decoded once, however often its token comes.
        unique, back = torch.unique(ids, return_inverse=True)
        return take_rows(self.packed, unique.reshape(-1)).dequantize(self.dtype)[back]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

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
        format, shape, params = self._meta
        specs = formats.get(format).specs(shape, params)
        tensors = {name: state_dict[prefix + name] for name in specs if prefix + name in state_dict}
        missing = [prefix + name for name, s in specs.items() if s.required and name not in tensors]
        if missing:
            missing_keys += missing
        else:
            device = self.packed.device
            self._hold(pack(format, {k: v.to(device) for k, v in tensors.items()}, shape, **params))
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in tensors}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        format, shape, _ = self._meta
        bits = formats.get(format) and self.packed.bits_per_weight
        return f"{shape[0]}, {shape[1]}, format={format!r}, bits_per_weight={bits:.2f}, dtype={self.dtype}"


def _mangle(name: str) -> str:
    """A tensor's name as a buffer name, which may hold no dot and must not hide an attribute."""
    return "packed_" + name.replace(".", "__")
