"""Packed matrices of modules that compute with a plain `weight` in a way of their own: routers,
scaled embeddings.

No layer of ours can stand in for them. Routers are small, so their weight is dequantized when it is
loaded.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ...weights.packed import pack
from ..tensor_files import TensorFiles
from .layers import Owned, located
from .quantization import Scheme

_SHOWN = 3
#: by safetensors' names
DTYPES: dict[str | None, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


def load_dequantized(
    module: nn.Module,
    prefix: str,
    names: Owned,
    files: TensorFiles,
    scheme: Scheme,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Put the values of the packed weight in the files into `module.weight`, in `dtype`.

    names: tensor's name within the module `prefix` -> in the files. ValueError, naming file and
    module, if they are no valid weight.
    """
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    tensors = {own: files.read(full) for own, full in names.items()}
    bias = tensors.pop("bias", None)
    # GPTQ files often hold zeros for layers that have none
    if bias is not None and bool(bias.any()):
        with located(f"{prefix}.bias", names, files):
            raise ValueError("expected none or zeros, got one that is not zero")
    with located(prefix, names, files):
        packed = pack(scheme.format, tensors, (weight.shape[0], weight.shape[1]), **scheme.params)
    module.weight = nn.Parameter(
        packed.dequantize(dtype).contiguous().to(device), weight.requires_grad
    )


def warn_dequantized(prefixes: list[str]) -> None:
    """Say which modules' packed weights were dequantized, if any."""
    if prefixes:
        shown = ", ".join(prefixes[:_SHOWN]) + (", ..." if len(prefixes) > _SHOWN else "")
        warnings.warn(
            f"{len(prefixes)} modules are stored packed but compute with a plain weight in a way of their own, so "
            f"it is dequantized: {shown}",
            stacklevel=3,
        )


def repeats_constant(model: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether the tensor is what the model computes itself: compressed-tensors writes buffers that
    others do not.
    """
    prefix, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        return False
    own = module._buffers.get(leaf) if leaf in module._non_persistent_buffers_set else None
    return own is not None and torch.equal(own.to(tensor.dtype).cpu(), tensor)
