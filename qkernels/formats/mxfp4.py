"""MXFP4 of OCP Microscaling: floats of 4 bits (e2m1), a power of two for each block of 32.

    weight_packed  uint8 (N, K/2)    two codes a byte, the first in the low nibble
    weight_scale   uint8 (N, K/32)   e8m0

    W[n, k] = value(code[n, k]) * 2^(weight_scale[n, k // 32] - 127)

e2m1.py says what codes and scales are. The scale 255, e8m0's NaN, is refused. Scales of 253 and 254
are valid, although float32 does not hold their largest weights, 2^128 and more.

Rounding is compressed-tensors': the scale makes 4 of the power of two next to the block's largest
magnitude, where 1.75 times a power goes to the next one. The codes are rounded half to even. OCP's
own rule (section 6.3) takes the power of two below: it would turn weights of 7 to 8 into 6.

Source: OCP Microscaling Formats (MX) Specification 1.0; vllm-project/compressed-tensors,
`MXFP4PackedCompressor` and `generate_mx_scales`, for names, order and rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.weight_only import WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits
from . import compressed_tensors, e2m1
from .base import Format, TensorSpec
from .types import Params, Shape

STORAGE = "mxfp4-pack-quantized"
#: how a config names the dtype of scales; early ones leave it out
_SCALE_DTYPE = "torch.uint8"


class Mxfp4(Format):
    name = "mxfp4"
    summary = "4-bit floats e2m1, blocks of 32 with power-of-two scales (OCP, compressed-tensors)"
    k_multiple = e2m1.BLOCK

    def check_params(self, shape: Shape, params: Params) -> None:
        if shape[1] % e2m1.BLOCK:
            raise ValueError(
                f"{self.name}: shape: expected input features a multiple of {e2m1.BLOCK}, "
                f"got {shape[1]}"
            )

    def cuts(self, shape: Shape, params: Params) -> Shape:
        return 1, e2m1.BLOCK

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        n, k = shape
        return {
            "weight_packed": TensorSpec((torch.uint8,), (n, k // 2)),
            "weight_scale": TensorSpec((torch.uint8,), (n, k // e2m1.BLOCK)),
        }

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        self.check_finite("weight_scale", tensors["weight_scale"].view(torch.float8_e8m0fnu))

    # ------------------------------------------------------------------ arithmetic
    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        n, k = weight.shape
        blocks = weight.view(n, -1, e2m1.BLOCK)
        scales = e2m1.shared_scales(blocks.abs().amax(-1), round_up_from=1.75)
        steps = blocks / e2m1.scale_values(scales)[..., None]
        codes = e2m1.nearest(steps, ties_to_even=True) | (blocks < 0).to(torch.uint8) << 3
        return {"weight_packed": _pack(codes.view(n, k)), "weight_scale": scales}

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        packed, n = tensors["weight_packed"], shape[0]
        table = torch.tensor(e2m1.TABLE, dtype=torch.float32, device=packed.device)
        # One look-up decodes both codes of a byte: 256 pairs of values.
        pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1)
        blocks = pairs[packed.int()].view(n, -1, e2m1.BLOCK)
        return blocks.mul_(e2m1.scale_values(tensors["weight_scale"])[..., None]).view(shape)

    # ------------------------------------------------------------------ kernel family
    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return WEIGHT_ONLY

    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        return WeightOnlyTraits(4, "lut16", "e8m0", e2m1.BLOCK)

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        packed = tensors["weight_packed"]
        return WeightOnlyParts(
            codes=torch.stack((packed & 15, packed >> 4), dim=2).view(shape),
            scaler_tensors={"scales": tensors["weight_scale"].T},  # neighbouring rows are adjacent
            table=torch.tensor(e2m1.TABLE, dtype=torch.float32, device=packed.device),
        )

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        scales = parts.scaler_tensors["scales"].T.contiguous()
        return {"weight_packed": _pack(parts.codes), "weight_scale": scales}

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any]:
        weights = compressed_tensors.arguments(
            "float", 4, "group", group_size=e2m1.BLOCK, scale_dtype=_SCALE_DTYPE,
            zp_dtype=_SCALE_DTYPE,
        )  # fmt: skip
        return compressed_tensors.write(STORAGE, weights, None, skipped)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        scheme = compressed_tensors.read(config)
        if scheme is None or scheme.storage != STORAGE:
            return None
        if scheme.inputs is not None:
            raise ValueError(
                "quantization_config input_activations: expected null with "
                f"{STORAGE} weights, got {scheme.inputs!r:.60}"
            )
        scheme.expect("type", ("float",))
        scheme.expect("num_bits", (4,))
        scheme.expect("strategy", ("group",))
        scheme.expect("group_size", (e2m1.BLOCK,))
        scheme.expect("symmetric", (True, None))
        scheme.expect("scale_dtype", (_SCALE_DTYPE, None))
        return {}


def _pack(codes: Tensor) -> Tensor:
    """Codes uint8 (N, K) -> bytes (N, K/2), the first of two codes in the low nibble."""
    return codes[:, ::2] | codes[:, 1::2] << 4
