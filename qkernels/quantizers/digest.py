"""Digests of models and of tensors, over every bit that can change a result.

blake2b reads about 1 GB/s on any core: seconds for a model that takes minutes to quantize.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: bytes read from a tensor at a time, because each part may be copied to the CPU or made contiguous
_CHUNK = 1 << 26
#: config keys that do not change the model: the path it came from, the version that wrote it
_IGNORED_KEYS = ("_name_or_path", "transformers_version")


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, dtypes, shapes and values, in the order of `tensors`.

    Raises ValueError for a tensor without data.
    """
    digest = hashlib.blake2b(digest_size=32)
    # Values of tied tensors count once. Tensors stay in the dict, so that no id is used again.
    seen: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in tensors:
        first_name = seen.setdefault(id(tensor), (name, tensor))[0]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {first_name}\n".encode())
        if first_name == name:
            _add(digest, name, tensor.detach())
    return digest.hexdigest()


def of_model(model: nn.Module) -> str:
    """Digest of a model's parameters, buffers, module types and config.

    Where the model came from does not count.
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
    """The same text for the same values. A value that JSON cannot hold becomes its type's name."""
    return json.dumps(_keyed(values), sort_keys=True, default=lambda value: type(value).__name__)


def _keyed(values: Any) -> Any:
    """`values` with all keys as strings, and without _IGNORED_KEYS."""
    if isinstance(values, dict):
        items = ((key, value) for key, value in values.items() if key not in _IGNORED_KEYS)
        return {str(key): _keyed(value) for key, value in items}
    return [_keyed(value) for value in values] if isinstance(values, (list, tuple)) else values


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    """Add the bytes of a tensor to the digest."""
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "the meta device" if tensor.is_meta else f"layout {tensor.layout}"
        raise ValueError(f"{name}: expected a tensor with its data in memory, got {kind}")
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    if not tensor.numel():
        return
    rows_at_once = max(1, _CHUNK * len(rows) // (tensor.numel() * tensor.element_size()))
    for part in rows.split(rows_at_once):
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
