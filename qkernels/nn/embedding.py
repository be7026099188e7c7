"""QuantEmbedding: a drop-in nn.Embedding whose rows stay packed until they are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import formats
from ..weights.packed import PackedWeight
from ..weights.sharding import take_rows
from .base import Holder, mangled


class QuantEmbedding(Holder):
    """ids (...) -> rows of a packed (V, K) weight in `dtype`, (..., K).

    Only the rows that are looked up are decoded, so the format must store each row separately
    (GGUF's types, pack_quantized, int8, fp8). The tensors are non-persistent buffers, never change
    dtype, and may be shared with a QuantLinear that is tied to the embedding.
    """

    def __init__(self, packed: PackedWeight, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.num_embeddings, self.embedding_dim = packed.shape
        self._hold(packed)
        # raises the ValueError for other formats now, not at the first call
        take_rows(self.packed, torch.zeros(1, dtype=torch.int64, device=packed.device))

    def _hold(self, packed: PackedWeight) -> None:
        self._keep(packed.tensors)
        self._meta = (packed.format, packed.shape, dict(packed.params))

    @property
    def packed(self) -> PackedWeight:
        """The weight, sharing this module's tensors."""
        format, shape, params = self._meta
        tensors = {name: self._buffers[mangled(name)] for name in self._names}
        return PackedWeight(format, shape, tensors, params)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        if ids.numel() == 0:
            return torch.empty(*ids.shape, self.embedding_dim, dtype=self.dtype, device=ids.device)
        # Each row is decoded once, however often its token occurs.
        unique, back = torch.unique(ids, return_inverse=True)
        return take_rows(self.packed, unique.reshape(-1)).dequantize(self.dtype)[back]

    def extra_repr(self) -> str:
        format, shape, _ = self._meta
        bits = formats.get(format) and self.packed.bits_per_weight
        return (
            f"{shape[0]}, {shape[1]}, format={format!r}, bits_per_weight={bits:.2f}, "
            f"dtype={self.dtype}"
        )


def input_embeddings(model: nn.Module) -> Any:
    """The module of the input embeddings; None for a model that has none, or several."""
    return _result_or_none(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> Any:
    """The output projection, or None."""
    return _result_or_none(model, "get_output_embeddings")


def _result_or_none(model: nn.Module, method: str) -> Any:
    """The result of the model's method; None if the model does not have it."""
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
