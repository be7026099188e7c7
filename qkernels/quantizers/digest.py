"""What tells two models, or two sets of tensors, apart: digests over every bit that can change a
result.

blake2b reads about 1 GB/s on a core, whatever its instructions: seconds for a model that takes
minutes to quantize.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: bytes taken from a tensor at once, where it must be moved or made contiguous
_CHUNK = 1 << 26
#: of a config: where it was loaded from and by what, and where weights go next
_ELSEWHERE = ("_name_or_path", "transformers_version")


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, dtypes, shapes and values, in this order. ValueError for a tensor without data."""
    digest = hashlib.blake2b(digest_size=32)
    seen: dict[int, tuple[str, Tensor]] = {}  # tied ones once; kept, so that no other takes its id
    for name, tensor in tensors:
        again = seen.setdefault(id(tensor), (name, tensor))[0]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {again}\n".encode())
        if again == name:
            _add(digest, name, tensor.detach())
    return digest.hexdigest()


def of_model(model: nn.Module) -> str:
    """Of all parameters and buffers, of what the modules are, and of the config, but not of where
    it came from.
    """
    modules = [
        f"{name} {type(m).__qualname__} {m.extra_repr()}" for name, m in model.named_modules()
    ]
    tensors = of_tensors(
        [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    )
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    values = to_dict() if to_dict else getattr(config, "__dict__", None)
    return hashlib.blake2b(as_json([modules, tensors, values]).encode(), digest_size=32).hexdigest()


def as_json(values: Any) -> str:
    """The same text for the same values; what JSON has no word for by its type's name."""
    return json.dumps(_keyed(values), sort_keys=True, default=lambda value: type(value).__name__)


def _keyed(values: Any) -> Any:
    """With keys that are all strings, and without those of _ELSEWHERE."""
    if isinstance(values, dict):
        return {str(key): _keyed(value) for key, value in values.items() if key not in _ELSEWHERE}
    return [_keyed(value) for value in values] if isinstance(values, (list, tuple)) else values


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "the meta device" if tensor.is_meta else f"layout {tensor.layout}"
        raise ValueError(f"{name}: expected a tensor with its data in memory, got {kind}")
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    if not tensor.numel():
        return
    each = max(1, _CHUNK * len(rows) // (tensor.numel() * tensor.element_size()))
    for part in rows.split(each):
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
