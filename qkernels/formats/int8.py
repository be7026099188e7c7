"""LLM.int8(): int8 rows, activations quantized per token, outlier columns kept in 16 bits.

    weight int8 (N, K)    SCB float32 (N), the row absmax    [weight_format uint8, 0 = row major]
    W = weight * SCB / 127

Matmul (x is (M, K)):
    outlier column   any |x[:, k]| >= threshold (threshold 0: none)
    row absmax a[m]  over the elements with |x| < threshold, also those in outlier columns
    q                round-half-even(x * 127 / a), outlier columns zeroed
    y                (q @ weight^T) * a * SCB / 127^2  +  x[:, outliers] @ W[:, outliers]^T

A row's result therefore depends on the other rows of the batch, as in the paper. With a single row
the outlier columns are its outlier elements; batch-invariant mode computes every row as if it were
alone.

Source: Dettmers et al. 2022 (arXiv 2208.07339); bitsandbytes 0.50.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.eight_bit import EIGHT_BIT, EightBitParts, EightBitTraits
from .base import Format, TensorSpec, accumulate_dtype
from .eightbit import check_groups, int_matmul, one_group, reciprocal_or_zero, signed_codes
from .grid import Grid
from .types import Params, Shape


class Int8(Format):
    name = "int8"
    summary = "LLM.int8(): int8 x int8 with 16-bit outlier columns (bitsandbytes)"
    algorithms = ("smoothquant",)
    defaults = {"threshold": 6.0}

    def check_params(self, shape: Shape, params: Params) -> None:
        if params["threshold"] < 0:
            raise ValueError(
                f"{self.name}: threshold: expected a number >= 0, got {params['threshold']}"
            )

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec((torch.int8,), shape),
            "SCB": TensorSpec((torch.float32,), (shape[0],)),
            "weight_format": TensorSpec((torch.uint8,), (), required=False),
        }

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        self.check_finite("SCB", tensors["SCB"], nonnegative=True)
        layout = tensors.get("weight_format")
        if layout is not None and int(layout) != 0:
            raise ValueError(
                f"{self.name}: weight_format: expected 0 (row major), got {int(layout)}"
            )

    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        # bitsandbytes quantizes the float16 copy of the weight. Nothing is clamped to the range of
        # float16: a weight beyond 65504 has no float16 copy and stays unchanged.
        absmax = weight.abs().amax(dim=1)
        codes = torch.round(weight * (127 * reciprocal_or_zero(absmax))[:, None])
        return {
            "weight": codes.to(torch.int8),
            "SCB": absmax,
            "weight_format": torch.zeros((), dtype=torch.uint8, device=weight.device),
        }

    def from_grid(self, grid: Grid, params: Params) -> dict[str, Tensor]:
        check_groups(self.name, grid)
        absmax = (grid.scale.float() * 127).view(-1)
        return {
            "weight": signed_codes(self.name, grid),
            "SCB": absmax,
            "weight_format": torch.zeros((), dtype=torch.uint8, device=absmax.device),
        }

    def to_grid(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Grid:
        return one_group(tensors["weight"], (tensors["SCB"] / 127)[:, None])

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        return tensors["weight"].float() * (tensors["SCB"] / 127)[:, None]

    def matmul(
        self,
        x: Tensor,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        params: Params,
        batch_invariant: bool = False,
    ) -> Tensor:
        dtype = accumulate_dtype(x.dtype)
        x, codes, absmax_w = x.to(dtype), tensors["weight"], tensors["SCB"].to(dtype)
        threshold = params["threshold"]
        outlier = x.abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
        columns = outlier if batch_invariant else outlier.any(dim=0)
        absmax = x.abs().masked_fill(outlier, 0).amax(dim=1, keepdim=True)
        scaled = x.masked_fill(columns, 0) * (127 * reciprocal_or_zero(absmax))
        q = torch.round(scaled).clamp(-127, 127).to(torch.int8)
        y = int_matmul(q, codes).to(dtype) * (absmax / 127) * (absmax_w / 127)
        if batch_invariant:
            dense = codes.to(dtype) * (absmax_w / 127)[:, None]
            y = y + x.masked_fill(~outlier, 0) @ dense.T
        elif bool(columns.any()):
            dense = codes[:, columns].to(dtype) * (absmax_w / 127)[:, None]
            y = y + x[:, columns] @ dense.T
        return y

    # ------------------------------------------------------------------ kernel family
    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return EIGHT_BIT

    def eight_bit_traits(self, shape: Shape, params: Params) -> EightBitTraits:
        return EightBitTraits("int8", "row", "token", threshold=float(params["threshold"]))

    def eight_bit(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> EightBitParts:
        extra = {key: tensor for key, tensor in tensors.items() if key != "weight"}
        return EightBitParts(tensors["weight"], tensors["SCB"] / 127, extra=extra)

    def from_eight_bit(
        self, parts: EightBitParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        return {"weight": parts.weight, **parts.extra}

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_threshold": params["threshold"],
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": skipped,
        }

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        if config.get("quant_method") != "bitsandbytes" or not config.get("load_in_8bit"):
            return None
        return {"threshold": config.get("llm_int8_threshold", 6.0)}
