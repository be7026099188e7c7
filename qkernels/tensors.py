"""What a tensor must be before its numbers are read: dense and plain, and for kernels whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def check_strided(where: str, tensor: Tensor) -> None:
    """ValueError unless the tensor has one number for each place of its shape: none that is sparse
    or nested.
    """
    if tensor.layout is not torch.strided or tensor.is_nested:
        got = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise ValueError(f"{where}: expected a dense tensor of layout torch.strided, got {got}")


def plain(where: str, tensor: Any) -> Tensor:
    """`tensor`, not copied, as a torch.Tensor without gradient, whose shape and dtype no subclass
    can misstate.

    ValueError for what is no dense tensor, and for a subclass whose numbers are elsewhere, as
    torchao's and DTensor are.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{where}: expected a torch.Tensor, got {type(tensor).__name__}")
    kind = type(tensor)
    if kind is not Tensor and not isinstance(tensor, FakeTensor):
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise ValueError(
                f"{where}: expected a torch.Tensor that holds its own numbers, got {kind.__name__}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.as_subclass(Tensor)
    check_strided(where, tensor)
    _check_memory(where, tensor)
    return tensor.detach() if tensor.requires_grad else tensor


#: kernels read so many bytes at once
_ALIGNMENT = 16


def whole(where: str, tensor: Tensor, *, aligned: bool) -> Tensor:
    """`tensor` as kernels read it, which are given an address and no strides: its numbers one after
    another.

    Itself if it is so already, else a copy. ValueError if its memory is smaller than its shape
    says. aligned: where whole loads begin, as tensors of a kernel layout must. Files lay them
    anywhere.
    """
    _check_memory(where, tensor)
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    elif tensor.dim() and tensor.stride(-1) != 1:
        # Where there is one number any stride is called contiguous, but its bytes cannot be viewed.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    if aligned and not isinstance(tensor, FakeTensor) and tensor.data_ptr() % _ALIGNMENT:
        tensor = tensor.clone()
    return tensor


def _check_memory(where: str, tensor: Tensor) -> None:
    """ValueError unless there is memory for every number, as there is not once somebody has freed
    it.
    """
    memory, last = tensor.untyped_storage().nbytes(), tensor.numel() - 1
    if last > 0 and not tensor.is_contiguous():
        last = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if last >= 0 and end > memory:
        raise ValueError(f"{where}: expected memory of {end} bytes, got {memory}")
