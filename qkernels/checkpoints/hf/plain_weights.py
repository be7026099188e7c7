"""Packed matrices for modules that need a plain `weight`: routers and scaled embeddings.

Such modules do more than a matrix product, so QuantLinear and QuantEmbedding cannot replace them.
Routers are small, so their weight is dequantized when it is loaded.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ...weights.packed import pack
from ..tensor_files import TensorFiles
from .layers import TensorNames, errors_naming_module
from .quantization import Scheme

_SHOWN = 3
#: safetensors dtype -> torch dtype
DTYPES: dict[str | None, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


def load_dequantized(
    module: nn.Module,
    prefix: str,
    names: TensorNames,
    files: TensorFiles,
    scheme: Scheme,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Dequantize the packed weight in the files into `module.weight`, in `dtype`.

    names: tensor name within the module `prefix` -> name in the files. Raises ValueError naming the
    file and the module if the tensors are no valid weight.
    """
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    tensors = {leaf: files.read(stored) for leaf, stored in names.items()}
    bias = tensors.pop("bias", None)
    # GPTQ files often hold a bias of zeros for layers without a bias
    if bias is not None and bool(bias.any()):
        with errors_naming_module(f"{prefix}.bias", names, files):
            raise ValueError("expected none or zeros, got one that is not zero")
    with errors_naming_module(prefix, names, files):
        packed = pack(scheme.format, tensors, (weight.shape[0], weight.shape[1]), **scheme.params)
    module.weight = nn.Parameter(
        packed.dequantize(dtype).contiguous().to(device), weight.requires_grad
    )


def warn_dequantized(prefixes: list[str]) -> None:
    """Warn which modules' packed weights were dequantized, if any."""
    if prefixes:
        shown = ", ".join(prefixes[:_SHOWN]) + (", ..." if len(prefixes) > _SHOWN else "")
        warnings.warn(
            f"{len(prefixes)} modules are stored packed but need a plain weight, so it is "
            f"dequantized: {shown}",
            stacklevel=3,
        )


def repeats_constant(model: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether `tensor` equals a buffer that the model computes itself.

    compressed-tensors writes such buffers to the file; other writers do not.
    """
    prefix, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        return False
    buffer = module._buffers.get(leaf) if leaf in module._non_persistent_buffers_set else None
    return buffer is not None and torch.equal(buffer.to(tensor.dtype).cpu(), tensor)
