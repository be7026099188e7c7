"""Checks of tensors before their numbers are read: dense, plain, and contiguous for kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def check_strided(where: str, tensor: Tensor) -> None:
    """ValueError for a sparse or nested tensor: one without a number at each place of its shape."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        got = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise ValueError(f"{where}: expected a dense tensor of layout torch.strided, got {got}")


def plain(where: str, tensor: Any) -> Tensor:
    """`tensor`, not copied, as a plain torch.Tensor without gradient.

    So no subclass can misstate its shape and dtype. ValueError if it is not a dense tensor, or is
    of a subclass that keeps its numbers elsewhere, as torchao's subclasses and DTensor do.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{where}: expected a torch.Tensor, got {type(tensor).__name__}")
    cls = type(tensor)
    if cls is not Tensor and not isinstance(tensor, FakeTensor):
        if cls.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise ValueError(
                f"{where}: expected a torch.Tensor that holds its own numbers, got {cls.__name__}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.as_subclass(Tensor)
    check_strided(where, tensor)
    _check_memory(where, tensor)
    return tensor.detach() if tensor.requires_grad else tensor


#: bytes that a kernel's widest load reads at once
_ALIGNMENT = 16


def whole(where: str, tensor: Tensor, *, aligned: bool) -> Tensor:
    """`tensor` with its numbers one after another in memory, because kernels take no strides.

    Returns the tensor itself if it is contiguous already, else a copy. ValueError if its memory is
    smaller than its shape requires.

    aligned: whether it must begin at a multiple of 16 bytes, as tensors of a kernel layout must. A
    tensor in a file can begin anywhere.
    """
    _check_memory(where, tensor)
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    elif tensor.dim() and tensor.stride(-1) != 1:
        # torch calls one number contiguous whatever its stride, but cannot view its bytes then
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    if aligned and not isinstance(tensor, FakeTensor) and tensor.data_ptr() % _ALIGNMENT:
        tensor = tensor.clone()
    return tensor


def _check_memory(where: str, tensor: Tensor) -> None:
    """ValueError unless every number has memory. A tensor whose memory was freed has none."""
    memory, last = tensor.untyped_storage().nbytes(), tensor.numel() - 1
    if last > 0 and not tensor.is_contiguous():
        last = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if last >= 0 and end > memory:
        raise ValueError(f"{where}: expected memory of {end} bytes, got {memory}")
