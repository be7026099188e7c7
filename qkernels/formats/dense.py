"""fp16 and bf16: unquantized weights as formats. They are the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .base import Format, TensorSpec
from .types import Params, Shape


class Dense(Format):
    """`weight` (N, K) in a 16-bit float."""

    dtype: ClassVar[torch.dtype]
    dense = True

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec((self.dtype,), shape)}

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        self.check_finite("weight", tensors["weight"])

    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        return {"weight": weight.to(self.dtype)}

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        return tensors["weight"].float()

    def to_hf_config(self, params: Params, skipped: list[str]) -> None:
        return None


class Fp16(Dense):
    name = "fp16"
    summary = "16-bit float, the unquantized baseline"
    dtype = torch.float16


class Bf16(Dense):
    name = "bf16"
    summary = "bfloat16, the unquantized baseline"
    dtype = torch.bfloat16
