"""SmoothQuant's W8A8: int8 weights and int8 activations, as compressed-tensors stores them.

    weight int8 (N, K)    weight_scale float (N, 1), or (1) with granularity "tensor"
    input_scale float (1), [input_zero_point int8 (1)]     only with activation "static"

    dynamic  q = round(x * 127 / absmax_row),            y = (q @ weight^T) * absmax_row/127 * weight_scale
    static   q = clamp(round(x / input_scale) + zp),     y = (q @ weight^T - zp * rowsum(weight)) * ...

Source: Xiao et al. 2022 (arXiv 2211.10438); compressed-tensors' `int-quantized` layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.eight_bit import EIGHT_BIT, EightBitParts, EightBitTraits
from .affine import Grid
from .base import FLOATS, Format, Params, Shape, TensorSpec, accumulate_dtype
from .compressed_tensors import read_eight_bit, write_eight_bit
from .eightbit import int_matmul, one_group, per_token_int8, reciprocal_or_zero, signed_codes


class W8A8(Format):
    name = "w8a8"
    summary = "int8 weights x int8 activations, per channel and per token (SmoothQuant, compressed-tensors)"
    algorithms = ("smoothquant", "ranges")
    #: symmetric_input: whether static activations have no zero point
    defaults = {"granularity": "channel", "activation": "dynamic", "symmetric_input": True}
    quantize_only = {"input_scale": None, "input_zero_point": None}

    def check_params(self, shape: Shape, params: Params) -> None:
        self.expect("granularity", params["granularity"], ("channel", "tensor"))
        self.expect("activation", params["activation"], ("dynamic", "static"))
        if not params["symmetric_input"] and params["activation"] != "static":
            raise ValueError(
                f"{self.name}: symmetric_input: expected True with dynamic activations, got False"
            )

    def params_from_tensors(self, tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> Params:
        # A symmetric checkpoint may hold zero points, all 0.
        stated = {"symmetric_input": False} if "input_zero_point" in tensors else {}
        return {**params, **stated}

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        per_channel = params["granularity"] == "channel"
        specs = {
            "weight": TensorSpec((torch.int8,), shape),
            "weight_scale": TensorSpec(FLOATS, (shape[0], 1) if per_channel else (1,)),
        }
        if params["activation"] == "static":
            specs["input_scale"] = TensorSpec(FLOATS, (1,))
            if not params["symmetric_input"]:
                specs["input_zero_point"] = TensorSpec((torch.int8,), (1,))
        return specs

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        self.check_finite("weight_scale", tensors["weight_scale"], nonnegative=True)
        if "input_scale" in tensors:
            self.check_finite("input_scale", tensors["input_scale"])
            if float(tensors["input_scale"]) <= 0:
                raise ValueError(
                    f"{self.name}: input_scale: expected a value > 0, got {float(tensors['input_scale'])}"
                )

    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        if params["granularity"] == "channel":
            absmax = weight.abs().amax(dim=1, keepdim=True)
        else:
            absmax = weight.abs().amax().reshape(1)
        tensors = {
            "weight": torch.round(weight * (127 * reciprocal_or_zero(absmax))).to(torch.int8),
            "weight_scale": absmax / 127,
        }
        scale, zero = params["input_scale"], params["input_zero_point"]
        if params["activation"] == "static":
            if not isinstance(scale, (int, float)) or not scale > 0:
                raise ValueError(
                    f"{self.name}: input_scale: expected a number > 0 with activation='static', got {scale!r}"
                )
            tensors["input_scale"] = torch.tensor([scale], dtype=torch.float32, device=weight.device)
            if zero is not None:
                if not isinstance(zero, int) or not -128 <= zero <= 127:
                    raise ValueError(
                        f"{self.name}: input_zero_point: expected an int in [-128, 127], got {zero!r}"
                    )
                tensors["input_zero_point"] = torch.tensor([zero], dtype=torch.int8, device=weight.device)
        elif scale is not None or zero is not None:
            raise ValueError(
                f"{self.name}: input_scale, input_zero_point: expected none with activation='dynamic'"
            )
        return tensors

    def from_grid(self, grid: Grid, params: Params) -> dict[str, Tensor]:
        if params["granularity"] != "channel" or params["activation"] != "dynamic":
            raise ValueError(
                f"{self.name}: expected granularity channel and activation dynamic, got {params}"
            )
        return {"weight": signed_codes(self.name, grid), "weight_scale": grid.scale.contiguous()}

    def to_grid(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Grid:
        return one_group(tensors["weight"], tensors["weight_scale"].reshape(-1, 1).expand(shape[0], 1))

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        return tensors["weight"].float() * tensors["weight_scale"].float()

    def matmul(
        self,
        x: Tensor,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        params: Params,
        batch_invariant: bool = False,
    ) -> Tensor:
        dtype = accumulate_dtype(x.dtype)
        x, weight = x.to(dtype), tensors["weight"]
        zero = tensors.get("input_zero_point")
        if params["activation"] == "dynamic":
            q, scale = per_token_int8(x)
        else:
            scale = tensors["input_scale"].to(dtype)
            shift = 0 if zero is None else zero.to(dtype)
            q = (torch.round(x / scale) + shift).clamp(-128, 127).to(torch.int8)
        acc = int_matmul(q, weight).to(dtype)
        if zero is not None:
            acc = acc - zero.to(dtype) * weight.sum(dim=1, dtype=torch.int32).to(dtype)
        return acc * scale * tensors["weight_scale"].to(dtype).reshape(1, -1)

    # ------------------------------------------------------------------ kernel family
    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return EIGHT_BIT

    def eight_bit_traits(self, shape: Shape, params: Params) -> EightBitTraits:
        return EightBitTraits("int8", "row", "tensor" if params["activation"] == "static" else "token")

    def eight_bit(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> EightBitParts:
        zero = tensors.get("input_zero_point")
        extra = {key: tensors[key] for key in tensors if key in ("weight_scale", "input_scale")}
        return EightBitParts(
            tensors["weight"],
            tensors["weight_scale"].reshape(-1).expand(shape[0]),
            tensors.get("input_scale"),
            zero,
            extra,
        )

    def from_eight_bit(self, parts: EightBitParts, shape: Shape, params: Params) -> dict[str, Tensor]:
        tensors = {"weight": parts.weight, **parts.extra}
        if parts.input_zero_point is not None:
            tensors["input_zero_point"] = parts.input_zero_point
        return tensors

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any]:
        return write_eight_bit(
            "int", params["granularity"], params["activation"], params["symmetric_input"], skipped
        )

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        parsed = read_eight_bit(config, "int")
        if parsed is not None and parsed["activation"] == "none":
            raise ValueError(
                "quantization_config input_activations: expected dynamic or static int8 activations "
                "for w8a8, got null (weight-only int8)"
            )
        return parsed
