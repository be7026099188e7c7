"""Reading and writing whole models: Hugging Face directories and GGUF files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..ops.matmul import X_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load", "load_tokenizer", "save"]


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
) -> PreTrainedModel:
    """The model at `path`, a Hugging Face directory or a .gguf file; see `qkernels.load_model`."""
    from .gguf import reader as gguf
    from .hf import reader as huggingface

    dtype = _floating(dtype)

    if gguf.is_gguf(_existing(path)):
        return gguf.load(path, device, torch.float32 if dtype is None else dtype)
    return huggingface.load(path, device=device, dtype=dtype)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `model` to `path`: a .gguf file if it is called so, else a Hugging Face directory.

    See `qkernels.save_model`.
    """
    from .gguf import reader as gguf
    from .hf import reader as huggingface

    if Path(path).suffix != ".gguf":
        huggingface.save(model, path, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)
        return
    gguf.save(model, path, tokenizer)


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer at `path`, a Hugging Face directory or a .gguf file.

    Raises FileNotFoundError if nothing is there, ValueError if it has no tokenizer.
    """
    from .gguf import reader as gguf
    from .hf import reader as huggingface

    if gguf.is_gguf(_existing(path)):
        return gguf.load_tokenizer(path)
    return huggingface.load_tokenizer(path)


def _floating(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype, or its name, as a dtype. ValueError for one that a model cannot compute in."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if named is None and (dtype is None or dtype == "auto"):
        return None
    if not isinstance(named, torch.dtype) or named not in X_DTYPES:
        raise ValueError(
            f"dtype: expected None or one of {', '.join(str(d).removeprefix('torch.') for d in X_DTYPES)}, got {dtype!r:.60}"
        )
    return named


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    try:
        exists = path.exists()
    except OSError as error:
        raise ValueError(
            f"{path!s:.300}: expected a path that there can be, got: {error.strerror}"
        ) from None
    if not exists:
        raise FileNotFoundError(
            f"{path}: expected a model directory or a .gguf file, found nothing"
        )
    return path
