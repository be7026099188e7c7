"""FP8 weights, E4M3FN or E5M2, with optional FP8 activations.

    weight float8 (N, K)
    weight_scale      () or (1)          granularity "tensor"
    weight_scale      (N, 1)             granularity "channel"
    weight_scale_inv  float32 (ceil(N/block_rows), ceil(K/block_columns))   granularity "block";
                                         despite its name it multiplies: W = weight * scale
    input_scale       () or (1)          only with activation "static"

Every granularity may use either scale name. `scale_name="weight_scale"` is the name of
compressed-tensors and vLLM; "weight_scale_inv" is the name of DeepSeek and transformers, which call
the input scale `activation_scale`.

Activations are E4M3 for either weight dtype. Activation "none" does not quantize them
(weight-only); "dynamic" quantizes per token, or with block scales per group of 1 x block_columns;
"static" quantizes per tensor with `input_scale`. Groups along a row are blocks of one row. Rounding
is half to even and saturates, because E4M3FN has no infinity and a weight in E5M2 must not become
infinite.

Source: Micikevicius et al. 2022 (arXiv 2209.05433); compressed-tensors' `float-quantized` layout;
DeepSeek-V3 (arXiv 2412.19437) for the 128-blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.eight_bit import EIGHT_BIT, EightBitParts, EightBitTraits
from ..layouts.weight_only import SLICE, WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits
from .base import FLOATS, Format, TensorSpec, accumulate_dtype
from .compressed_tensors import read_eight_bit, write_eight_bit
from .types import Params, Shape

#: name of the weight scale -> name of the input scale in the same checkpoint
_INPUT_SCALES = {"weight_scale": "input_scale", "weight_scale_inv": "activation_scale"}

#: float8_e8m0fnu (DeepSeek's ue8m0) stores scales that are powers of two
_SCALES = (*FLOATS, torch.float8_e8m0fnu)

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BLOCK = 128
#: lower bounds that others use: vLLM for a scale per token, DeepSeek for the absmax of a group
_TOKEN_FLOOR = 1 / (448 * 512)
_GROUP_AMAX_FLOOR = 1e-4


def to_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Saturating cast, round half even; NaN stays NaN. torch's cast saturates only from 2.12 on."""
    top = torch.finfo(dtype).max
    return x.clamp(-top, top).to(dtype)


class Fp8(Format):
    name = "fp8"
    summary = (
        "8-bit float E4M3/E5M2, per tensor, channel, group or block (compressed-tensors, DeepSeek)"
    )
    algorithms = ("ranges", "smoothquant")
    activation_top = 448.0  # activations are E4M3 for either weight dtype
    #: scale_name "auto" is weight_scale_inv for blocks and weight_scale otherwise
    defaults = {
        "granularity": "channel",
        "float_format": "e4m3",
        "activation": "none",
        "scale_name": "auto",
        "block_rows": BLOCK,
        "block_columns": BLOCK,
    }
    quantize_only = {"input_scale": None}

    def check_params(self, shape: Shape, params: Params) -> None:
        self.expect("granularity", params["granularity"], ("tensor", "channel", "block"))
        self.expect("float_format", params["float_format"], tuple(DTYPES))
        self.expect("activation", params["activation"], ("none", "dynamic", "static"))
        self.expect("scale_name", params["scale_name"], ("auto", *_INPUT_SCALES))
        params["scale_name"] = _scale_name(params)
        for key in ("block_rows", "block_columns"):
            if params[key] < 1 or (params["granularity"] != "block" and params[key] != BLOCK):
                blocks = params["granularity"] == "block"
                expected = "a positive number" if blocks else f"{BLOCK} without blocks"
                raise ValueError(f"fp8: {key}: expected {expected}, got {params[key]}")
        if params["granularity"] == "block" and params["activation"] == "static":
            raise ValueError(
                "fp8: activation: expected 'none' or 'dynamic' with block scales, got 'static'"
            )

    def params_from_tensors(
        self, tensors: Mapping[str, Tensor], params: Mapping[str, Any]
    ) -> Params:
        result: Params = {}
        for name in _INPUT_SCALES:
            if name in tensors:
                result["scale_name"] = name
        weight = tensors.get("weight")
        for name, dtype in DTYPES.items():
            if isinstance(weight, Tensor) and weight.dtype == dtype:
                result["float_format"] = name
        return {**result, **params}

    def cuts(self, shape: Shape, params: Params) -> Shape:
        return _block(params) if params["granularity"] == "block" else (1, 1)

    def take_rows(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params, index: Tensor
    ) -> tuple[dict[str, Tensor], Params]:
        if params["granularity"] != "block":
            return super().take_rows(tensors, shape, params, index)
        name = params["scale_name"]
        scale = tensors[name][index // params["block_rows"]]
        return {**tensors, "weight": tensors["weight"][index], name: scale}, {
            **params,
            "block_rows": 1,
        }

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        (n, k), (rows, columns) = shape, _block(params)
        shapes = {"block": (-(-n // rows), -(-k // columns)), "channel": (n, 1), "tensor": None}
        specs = {
            "weight": TensorSpec((DTYPES[params["float_format"]],), shape),
            params["scale_name"]: TensorSpec(_SCALES, shapes[params["granularity"]]),
        }
        if params["activation"] == "static":
            specs[_INPUT_SCALES[params["scale_name"]]] = TensorSpec(FLOATS, None)
        return specs

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        self.check_finite("weight", tensors["weight"])
        name = params["scale_name"]
        self.check_finite(name, tensors[name], nonnegative=True)
        for name, spec in self.specs(shape, params).items():
            if spec.shape is None and tensors[name].numel() != 1:
                raise ValueError(
                    f"fp8: {name}: expected one element, got shape {tuple(tensors[name].shape)}"
                )
        if params["activation"] == "static":
            name = _INPUT_SCALES[params["scale_name"]]
            self.check_finite(name, tensors[name])
            if float(tensors[name]) <= 0:
                raise ValueError(f"fp8: {name}: expected a value > 0, got {float(tensors[name])}")

    # ------------------------------------------------------------------ arithmetic
    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        params = {**params, "scale_name": _scale_name(params)}
        dtype = DTYPES[params["float_format"]]
        top = torch.finfo(dtype).max
        granularity = params["granularity"]
        if granularity == "block":
            absmax = _block_absmax(weight, *_block(params))
        elif granularity == "channel":
            absmax = weight.abs().amax(dim=1, keepdim=True)
        else:
            absmax = weight.abs().amax().reshape(1)
        scale = torch.where(absmax > 0, absmax / top, torch.ones_like(absmax))
        divisor = scale
        if granularity == "block":
            divisor = _scale_per_weight(scale, weight.shape, *_block(params))
        tensors = {"weight": to_fp8(weight / divisor, dtype), params["scale_name"]: scale}
        input_scale = params["input_scale"]
        if params["activation"] == "static":
            if not isinstance(input_scale, (int, float)) or not input_scale > 0:
                raise ValueError(
                    "fp8: input_scale: expected a number > 0 with activation='static', "
                    f"got {input_scale!r}"
                )
            name = _INPUT_SCALES[params["scale_name"]]
            tensors[name] = torch.tensor([input_scale], dtype=torch.float32, device=weight.device)
        elif input_scale is not None:
            raise ValueError("fp8: input_scale: expected none unless activation='static'")
        return tensors

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        scale = tensors[params["scale_name"]].float()
        if params["granularity"] == "block":
            scale = _scale_per_weight(scale, shape, *_block(params))
        return tensors["weight"].float() * scale

    # ------------------------------------------------------------------ kernel family
    def kernel_layout(self, params: Mapping[str, Any]) -> str | None:
        if self.obstacle((1, 1), dict(params)):
            return None
        return WEIGHT_ONLY if params["activation"] == "none" else EIGHT_BIT

    def obstacle(self, shape: Shape, params: Params) -> str | None:
        rows, columns = _block(params)
        if params["activation"] == "none":
            if columns % SLICE == 0:
                return None
            return (
                f"kernels that decode float8 take blocks of a multiple of {SLICE} columns, "
                f"not of {columns}"
            )
        if (rows, columns) == (BLOCK, BLOCK):
            return None
        return (
            "kernels that multiply 8 bits by 8 bits take scales of 128x128 blocks, "
            f"not of {rows}x{columns}"
        )

    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        rows, group = _block(params) if params["granularity"] == "block" else (1, shape[1])
        return WeightOnlyTraits(8, params["float_format"], "scale", group, min(rows, shape[0]))

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        name = params["scale_name"]
        scale = tensors[name]
        if params["granularity"] == "block":
            absmax = scale.T
        else:
            absmax = scale.reshape(1, -1).expand(1, shape[0])  # one per row, also if per tensor
        return WeightOnlyParts(
            codes=tensors["weight"].view(torch.uint8),
            scaler_tensors={"absmax": absmax.float()},
            extra={name: scale},
        )

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        return {
            "weight": parts.codes.contiguous().view(DTYPES[params["float_format"]]),
            **parts.extra,
        }

    def eight_bit_traits(self, shape: Shape, params: Params) -> EightBitTraits:
        if params["granularity"] == "block":
            return EightBitTraits(params["float_format"], "block", "group")
        static = params["activation"] == "static"
        return EightBitTraits(params["float_format"], "row", "tensor" if static else "token")

    def eight_bit(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> EightBitParts:
        extra = {key: tensor for key, tensor in tensors.items() if key != "weight"}
        scale = tensors[params["scale_name"]]
        if params["granularity"] != "block":
            scale = scale.reshape(-1).expand(shape[0])
        return EightBitParts(
            tensors["weight"], scale, self._input_scale(tensors, params), extra=extra
        )

    @staticmethod
    def _input_scale(tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> Tensor | None:
        return tensors.get(_INPUT_SCALES[params["scale_name"]])

    def from_eight_bit(
        self, parts: EightBitParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        return {"weight": parts.weight, **parts.extra}

    # ------------------------------------------------------------------ the product

    def matmul(
        self,
        x: Tensor,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        params: Params,
        batch_invariant: bool = False,
    ) -> Tensor:
        x = x.to(accumulate_dtype(x.dtype))
        return super().matmul(self._round_input(x, tensors, params), tensors, shape, params)

    def _round_input(self, x: Tensor, tensors: Mapping[str, Tensor], params: Params) -> Tensor:
        """x (M, K) rounded to the values that FP8 activations can hold, in x's dtype."""
        dtype, top = torch.float8_e4m3fn, 448.0
        if params["activation"] == "none":
            return x
        if params["activation"] == "static":
            scale = tensors[_INPUT_SCALES[params["scale_name"]]].to(x.dtype).reshape(())
        elif params["granularity"] == "block":
            m, k = x.shape
            size = min(params["block_columns"], k)
            groups = torch.nn.functional.pad(x, (0, -k % size)).view(m, -1, size)
            scale = groups.abs().amax(-1).clamp(min=_GROUP_AMAX_FLOOR) / top
            scale = scale.repeat_interleave(size, dim=1)[:, :k]
        else:
            scale = (x.abs().amax(dim=1, keepdim=True) / top).clamp(min=_TOKEN_FLOOR)
        return to_fp8(x / scale, dtype).to(x.dtype) * scale

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any]:
        if params["scale_name"] == "weight_scale":
            return write_eight_bit("float", params, skipped)
        # The ecosystem's fp8 method has no weight-only products: others read "dynamic", and our own
        # field says "none".
        weight_only = {"qkernels_activation": "none"} if params["activation"] == "none" else {}
        return {
            "quant_method": "fp8",
            "fmt": params["float_format"],
            "activation_scheme": "dynamic" if weight_only else params["activation"],
            "weight_block_size": list(_block(params)) if params["granularity"] == "block" else None,
            "modules_to_not_convert": skipped,
            **weight_only,
        }

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        if config.get("quant_method") != "fp8":
            parsed = read_eight_bit(config, "float")
            return parsed and {key: parsed[key] for key in parsed if key in cls.defaults}
        activation = config.get("qkernels_activation", config.get("activation_scheme", "dynamic"))
        block = config.get("weight_block_size")
        if block is None:
            return {"granularity": "tensor", "activation": activation}
        sizes = list(block) if isinstance(block, (list, tuple)) else []
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(
                "quantization_config.weight_block_size: expected two positive integers, "
                f"got {block!r:.60}"
            )
        rows, columns = sizes
        return {
            "granularity": "block",
            "activation": activation,
            "block_rows": rows,
            "block_columns": columns,
        }


def _scale_name(params: Mapping[str, Any]) -> str:
    """Name of the weight scale, with "auto" resolved."""
    name: str = params["scale_name"]
    if name != "auto":
        return name
    return "weight_scale_inv" if params["granularity"] == "block" else "weight_scale"


def _block(params: Mapping[str, Any]) -> Shape:
    """(rows, columns) of a block."""
    return params["block_rows"], params["block_columns"]


def _block_absmax(weight: Tensor, rows: int, columns: int) -> Tensor:
    """Absmax of each block of a weight (N, K): (ceil(N/rows), ceil(K/columns)).

    Blocks at the edges may be smaller.
    """
    n, k = weight.shape
    rows, columns = min(rows, n), min(columns, k)
    padded = torch.nn.functional.pad(weight.abs(), (0, -k % columns, 0, -n % rows))
    return padded.view(padded.shape[0] // rows, rows, -1, columns).amax(dim=(1, 3))


def _scale_per_weight(scale: Tensor, shape: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """Block scales -> one scale per weight, (N, K)."""
    n, k = shape
    rows, columns = min(rows, n), min(columns, k)
    return scale.repeat_interleave(rows, dim=0)[:n].repeat_interleave(columns, dim=1)[:, :k]
