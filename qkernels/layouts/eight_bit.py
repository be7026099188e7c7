"""EIGHT_BIT, the kernel layout of the formats that quantize activations and multiply 8 bits by 8.

    weight            int8 or float8 (N, KP), row-major; KP is K rounded up to 16, so that kernels
                      read rows 16 bytes at a time; zeros beyond K
    weight_scale      float32 (N), or (ceil(N/128), ceil(K/128)) with 128x128 blocks
    input_scale       float32 (1), with static activations
    input_zero_point  int8 (1)
    row_sum           int32 (N), the sums of the weight's rows, which correct for input_zero_point
    extra.*           the checkpoint's own tensors where they differ from the above

Tensor cores take both operands with K innermost, as stored here, so no codes are moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

EIGHT_BIT = "eight_bit"

#: bytes of one load
ALIGN = 16
#: the scale of a block is shared by so many features and so many rows of the weight
BLOCK = 128


class EightBitTraits(NamedTuple):
    """How the 8-bit kernels treat a format with given parameters.

    kind: type of the weight's codes, "int8", "e4m3" or "e5m2". Activations are int8 for int8
        weights and e4m3 for the others.
    weight_scale: "row", or "block" for one scale per 128x128 block.
    activation: which activations share a scale: "token" (a row of x), "group" (128 features of a
        row) or "tensor" (all of x, with a scale known beforehand).
    threshold: activations of at least this size are multiplied in 16 bits (LLM.int8()); 0: none.
    """

    kind: str
    weight_scale: str
    activation: str
    threshold: float = 0.0


@dataclass
class EightBitParts:
    """A weight's tensors, as a format hands them over before `pack` pads them.

    weight: int8 or float8 (N, K).
    weight_scale: float (N), or (ceil(N/128), ceil(K/128)) with 128x128 blocks.
    input_scale: float, one element, with static activations.
    input_zero_point: int8, one element.
    extra: tensors that no kernel reads, kept so that the checkpoint can be restored.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


def padded(k: int) -> int:
    """K rounded up to whole loads."""
    return -(-k // ALIGN) * ALIGN


def pack(
    fmt: Any, shape: tuple[int, int], params: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Checkpoint tensors of format `fmt` -> tensors of this layout."""
    parts = fmt.eight_bit(tensors, shape, params)
    weight, k = parts.weight, shape[1]
    # torch pads no float8, so the bytes are padded: zero is all zero bits in each of these types.
    codes = torch.nn.functional.pad(weight.view(torch.uint8), (0, padded(k) - k))
    storage = {
        "weight": codes.view(weight.dtype),
        "weight_scale": parts.weight_scale.float(),
    }
    if parts.input_scale is not None:
        storage["input_scale"] = parts.input_scale.float().reshape(1)
    if parts.input_zero_point is not None:
        storage["input_zero_point"] = parts.input_zero_point
        storage["row_sum"] = weight.sum(dim=1, dtype=torch.int32)
    return storage | {f"extra.{k}": v for k, v in parts.extra.items()}


def unpack(
    fmt: Any, shape: tuple[int, int], params: dict[str, Any], storage: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `pack`."""
    weight = storage["weight"]
    parts = EightBitParts(
        weight=weight.view(torch.uint8)[:, : shape[1]].contiguous().view(weight.dtype),
        weight_scale=storage["weight_scale"],
        input_scale=storage.get("input_scale"),
        input_zero_point=storage.get("input_zero_point"),
        extra={k.removeprefix("extra."): v for k, v in storage.items() if k.startswith("extra.")},
    )
    return fmt.from_eight_bit(parts, shape, params)
