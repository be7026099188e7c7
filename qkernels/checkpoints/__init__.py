"""Reading and writing whole models: Hugging Face directories and GGUF files.

    __init__.py       load, save and load_tokenizer: choose hf/ or gguf/ by the path
    hf/               Hugging Face directories: config.json, safetensors, tokenizer
    gguf/             GGUF files, as llama.cpp reads and writes them
    tensor_files.py   safetensors files, read by tensor and written by shard
    files.py          the only way to open untrusted files: size limits, errors that name the file
    directories.py    the directory that a model is saved to
    atomic.py         saves as a whole or not at all, whenever the process ends

Model loading starts in hf/reader.py and gguf/reader.py.
"""

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
    from .gguf import reader as gguf_reader
    from .hf import reader as hf_reader

    dtype = _compute_dtype(dtype)

    if gguf_reader.is_gguf(_existing(path)):
        return gguf_reader.load(path, device, torch.float32 if dtype is None else dtype)
    return hf_reader.load(path, device=device, dtype=dtype)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `model` to `path`: a GGUF file if it ends in .gguf, else a Hugging Face directory.

    See `qkernels.save_model`.
    """
    from .gguf import reader as gguf_reader
    from .hf import reader as hf_reader

    if Path(path).suffix != ".gguf":
        hf_reader.save(model, path, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)
        return
    gguf_reader.save(model, path, tokenizer)


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer at `path`, a Hugging Face directory or a .gguf file.

    Raises FileNotFoundError if nothing is there, ValueError if it has no tokenizer.
    """
    from .gguf import reader as gguf_reader
    from .hf import reader as hf_reader

    if gguf_reader.is_gguf(_existing(path)):
        return gguf_reader.load_tokenizer(path)
    return hf_reader.load_tokenizer(path)


def _compute_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype, or the dtype of that name; None for None and "auto".

    Raises ValueError for a dtype that a model cannot compute in.
    """
    result = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if result is None and (dtype is None or dtype == "auto"):
        return None
    if not isinstance(result, torch.dtype) or result not in X_DTYPES:
        raise ValueError(
            "dtype: expected None or one of "
            f"{', '.join(str(d).removeprefix('torch.') for d in X_DTYPES)}, got {dtype!r:.60}"
        )
    return result


def _existing(path: str | os.PathLike[str]) -> Path:
    """`path`, if something is there. Raises FileNotFoundError or ValueError otherwise."""
    path = Path(path)
    try:
        exists = path.exists()
    except OSError as error:
        raise ValueError(f"{path!s:.300}: expected a valid path, got: {error.strerror}") from None
    if not exists:
        raise FileNotFoundError(
            f"{path}: expected a model directory or a .gguf file, found nothing"
        )
    return path
