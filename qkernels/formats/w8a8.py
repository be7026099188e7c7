"""SmoothQuant's W8A8: int8 weights and int8 activations, as compressed-tensors stores them.

    weight             int8 (N, K)
    weight_scale       float (N, 1); (N, G) with groups; (1) with granularity "tensor"
    weight_zero_point  int8, shaped like weight_scale; only with symmetric_weight False
    input_scale        float (1), [input_zero_point int8 (1)]; only with activation "static"

    W[n, k] = weight_scale[n, g] * (weight[n, k] - weight_zero_point[n, g]),  g = k // group_size

    dynamic  q = round(x * 127 / absmax_row)
             y = (q @ weight^T) * absmax_row/127 * weight_scale
             with symmetric_input False, and 0 within [min, max]:
             s = (max - min) / 255,  zp = round(-128 - min / s)
             q = round(clamp(x / s + zp)),  y = (q - zp) * s @ W^T
    static   q = clamp(round(x / input_scale) + zp)
             y = (q @ weight^T - zp * rowsum(weight)) * input_scale * weight_scale
    none     y = x @ W^T

Source: Xiao et al. 2022 (arXiv 2211.10438); compressed-tensors' `int-quantized` layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.eight_bit import EIGHT_BIT, EightBitParts, EightBitTraits
from ..layouts.weight_only import WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits
from .base import FLOATS, Format, TensorSpec, accumulate_dtype
from .compressed_tensors import read_eight_bit, write_eight_bit
from .eightbit import (
    check_groups,
    int_matmul,
    per_token_asymmetric,
    per_token_int8,
    reciprocal_or_zero,
    signed_codes,
)
from .grid import Grid, check_group_size, group_count
from .types import Params, Shape


class W8A8(Format):
    name = "w8a8"
    summary = (
        "int8 weights x int8 activations, per channel and per token "
        "(SmoothQuant, compressed-tensors)"
    )
    algorithms = ("smoothquant", "ranges")
    #: symmetric_input, symmetric_weight: True if activations, weights have no zero points
    defaults = {
        "granularity": "channel",
        "activation": "dynamic",
        "symmetric_input": True,
        "symmetric_weight": True,
        "group_size": -1,
    }
    quantize_only = {"input_scale": None, "input_zero_point": None}

    def check_params(self, shape: Shape, params: Params) -> None:
        self.expect("granularity", params["granularity"], ("channel", "tensor"))
        self.expect("activation", params["activation"], ("dynamic", "static", "none"))
        if not params["symmetric_input"] and params["activation"] == "none":
            raise ValueError(
                f"{self.name}: symmetric_input: expected True with activation 'none', got False"
            )
        if params["granularity"] == "tensor" and params["group_size"] != -1:
            raise ValueError(
                f"{self.name}: group_size: expected -1 with granularity 'tensor', "
                f"got {params['group_size']}"
            )
        check_group_size(self.name, shape[1], params["group_size"], short=False)

    def params_from_tensors(
        self, tensors: Mapping[str, Tensor], params: Mapping[str, Any]
    ) -> Params:
        # The tensors decide, because a symmetric checkpoint may hold zero points that are all 0.
        names = {"symmetric_input": "input_zero_point", "symmetric_weight": "weight_zero_point"}
        return {**params, **{key: False for key, name in names.items() if name in tensors}}

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        groups = (shape[0], group_count(shape[1], params["group_size"]))
        scale = groups if params["granularity"] == "channel" else (1,)
        specs = {
            "weight": TensorSpec((torch.int8,), shape),
            "weight_scale": TensorSpec(FLOATS, scale),
        }
        if not params["symmetric_weight"]:
            specs["weight_zero_point"] = TensorSpec((torch.int8,), scale)
        if params["activation"] == "static":
            specs["input_scale"] = TensorSpec(FLOATS, (1,))
            if not params["symmetric_input"]:
                specs["input_zero_point"] = TensorSpec((torch.int8,), (1,))
        return specs

    def cuts(self, shape: Shape, params: Params) -> Shape:
        return 1, max(1, params["group_size"])

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        self.check_finite("weight_scale", tensors["weight_scale"], nonnegative=True)
        if "input_scale" in tensors:
            self.check_finite("input_scale", tensors["input_scale"])
            if float(tensors["input_scale"]) <= 0:
                raise ValueError(
                    f"{self.name}: input_scale: expected a value > 0, "
                    f"got {float(tensors['input_scale'])}"
                )

    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        n, k = weight.shape
        channel, groups = params["granularity"] == "channel", group_count(k, params["group_size"])
        grouped = weight.reshape(n, groups, -1) if channel else weight.reshape(1, 1, -1)
        scale_shape = (n, groups) if channel else (1,)
        if params["symmetric_weight"]:
            absmax = grouped.abs().amax(dim=2, keepdim=True)
            codes = torch.round(grouped * (127 * reciprocal_or_zero(absmax))).to(torch.int8)
            tensors = {"weight": codes.view(n, k), "weight_scale": (absmax / 127).view(scale_shape)}
        else:
            codes, scale, zero_point = per_token_asymmetric(grouped)
            tensors = {
                "weight": codes.view(n, k),
                "weight_scale": scale.view(scale_shape),
                "weight_zero_point": zero_point.view(scale_shape),
            }
        scale, zero = params["input_scale"], params["input_zero_point"]
        if params["activation"] == "static":
            if not isinstance(scale, (int, float)) or not scale > 0:
                raise ValueError(
                    f"{self.name}: input_scale: expected a number > 0 with activation='static', "
                    f"got {scale!r}"
                )
            tensors["input_scale"] = torch.tensor(
                [scale], dtype=torch.float32, device=weight.device
            )
            if zero is not None:
                if not isinstance(zero, int) or not -128 <= zero <= 127:
                    raise ValueError(
                        f"{self.name}: input_zero_point: expected an int in [-128, 127], "
                        f"got {zero!r}"
                    )
                tensors["input_zero_point"] = torch.tensor(
                    [zero], dtype=torch.int8, device=weight.device
                )
        elif scale is not None or zero is not None:
            raise ValueError(
                f"{self.name}: input_scale, input_zero_point: expected none with activation="
                f"{params['activation']!r}"
            )
        return tensors

    def from_grid(self, grid: Grid, params: Params) -> dict[str, Tensor]:
        if params["granularity"] != "channel" or params["activation"] == "static":
            raise ValueError(
                f"{self.name}: expected granularity channel and no static activation, got {params}"
            )
        if reason := self.obstacle((1, 1), params):  # a converted weight must run in fused kernels
            raise ValueError(
                f"{self.name}: groups: expected one for each row and no zero points: {reason}"
            )
        check_groups(self.name, grid, group_count(grid.codes.shape[1], params["group_size"]))
        if not grid.in_order(params["group_size"]):
            raise ValueError(
                f"{self.name}: groups: expected neighbouring features, got another order"
            )
        scale = grid.scale.contiguous()
        if not params["symmetric_weight"]:
            codes, zero = (
                (part.to(torch.int16) - 128).to(torch.int8) for part in (grid.codes, grid.zero)
            )
            return {"weight": codes, "weight_scale": scale, "weight_zero_point": zero.contiguous()}
        return {"weight": signed_codes(self.name, grid), "weight_scale": scale}

    def to_grid(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Grid:
        codes = (tensors["weight"].to(torch.int16) + 128).to(torch.uint8)
        groups = (shape[0], group_count(shape[1], params["group_size"]))
        scale, zero = tensors["weight_scale"], self._zeros(tensors)
        if params["granularity"] == "tensor":
            scale, zero = (part.reshape(1, 1).expand(groups) for part in (scale, zero))
        return Grid(codes, scale, zero, params["group_size"])

    @staticmethod
    def _zeros(tensors: Mapping[str, Tensor]) -> Tensor:
        """Zero points plus 128, as of codes plus 128: uint8, shaped like weight_scale."""
        zeros = tensors.get("weight_zero_point")
        if zeros is None:
            return torch.full_like(tensors["weight_scale"], 128, dtype=torch.uint8)
        return (zeros.to(torch.int16) + 128).to(torch.uint8)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        n, k = shape
        scale, zero = tensors["weight_scale"].float(), tensors.get("weight_zero_point")
        groups = scale.shape[1] if scale.dim() == 2 else 1
        weight = tensors["weight"].float().view(n, groups, k // groups)
        if zero is not None:
            weight = weight - zero.float()[..., None]
        return (weight * scale[..., None]).view(n, k)

    def matmul(
        self,
        x: Tensor,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        params: Params,
        batch_invariant: bool = False,
    ) -> Tensor:
        if params["activation"] == "none":
            return super().matmul(x, tensors, shape, params)
        dtype = accumulate_dtype(x.dtype)
        x, weight = x.to(dtype), tensors["weight"]
        zero = tensors.get("input_zero_point")
        if params["activation"] == "static":
            scale = tensors["input_scale"].to(dtype)
            shift = 0 if zero is None else zero.to(dtype)
            q = (torch.round(x / scale) + shift).clamp(-128, 127).to(torch.int8)
        elif params["symmetric_input"]:
            q, scale = per_token_int8(x)
        else:
            q, scale, zero = per_token_asymmetric(x)
        if not params["symmetric_weight"] or params["group_size"] != -1:
            # code - zero is a small integer, which any float dtype holds exactly.
            steps = q.to(dtype) if zero is None else q.to(dtype) - zero.to(dtype)
            return super().matmul(steps, tensors, shape, params) * scale
        acc = int_matmul(q, weight).to(dtype)
        if zero is not None:
            acc = acc - zero.to(dtype) * weight.sum(dim=1, dtype=torch.int32).to(dtype)
        return acc * scale * tensors["weight_scale"].to(dtype).reshape(1, -1)

    # ------------------------------------------------------------------ kernel families
    def kernel_layout(self, params: Mapping[str, Any]) -> str | None:
        if params["activation"] == "none":
            return WEIGHT_ONLY
        return None if self.obstacle((1, 1), dict(params)) else EIGHT_BIT

    def obstacle(self, shape: Shape, params: Params) -> str | None:
        if params["activation"] == "none":
            return None
        if not params["symmetric_weight"]:
            return "kernels that multiply int8 by int8 take no zero points of weights"
        if params["group_size"] != -1:
            return (
                "kernels that multiply int8 by int8 take one scale for each row of the weight, "
                "not groups"
            )
        if params["activation"] == "dynamic" and not params["symmetric_input"]:
            return "kernels that quantize each token take no zero points of activations"
        return None

    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        size = shape[1] if params["group_size"] == -1 else params["group_size"]
        return WeightOnlyTraits(8, "linear", "group", size)

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        grid = self.to_grid(tensors, shape, params)
        extra = {
            key: tensors[key] for key in ("weight_scale", "weight_zero_point") if key in tensors
        }
        scalers = {"scales": grid.scale.T, "zeros": grid.zero.T}
        if params["granularity"] == "channel":
            extra = {}  # the scalers hold the stored numbers
        return WeightOnlyParts(codes=grid.codes, scaler_tensors=scalers, extra=extra)

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        codes = (parts.codes.to(torch.int16) - 128).to(torch.int8)
        tensors = {"weight": codes.contiguous(), **parts.extra}
        if params["granularity"] == "channel":
            tensors["weight_scale"] = parts.scaler_tensors["scales"].T.contiguous()
            if not params["symmetric_weight"]:
                zeros = parts.scaler_tensors["zeros"].T.to(torch.int16) - 128
                tensors["weight_zero_point"] = zeros.to(torch.int8).contiguous()
        return tensors

    def eight_bit_traits(self, shape: Shape, params: Params) -> EightBitTraits:
        return EightBitTraits(
            "int8", "row", "tensor" if params["activation"] == "static" else "token"
        )

    def eight_bit(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> EightBitParts:
        zero = tensors.get("input_zero_point")
        extra = {key: tensors[key] for key in tensors if key in ("weight_scale", "input_scale")}
        return EightBitParts(
            tensors["weight"],
            tensors["weight_scale"].reshape(-1).expand(shape[0]),
            tensors.get("input_scale"),
            zero,
            extra,
        )

    def from_eight_bit(
        self, parts: EightBitParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        tensors = {"weight": parts.weight, **parts.extra}
        if parts.input_zero_point is not None:
            tensors["input_zero_point"] = parts.input_zero_point
        return tensors

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any]:
        return write_eight_bit("int", params, skipped)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        return read_eight_bit(config, "int")
