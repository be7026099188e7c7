"""AWQ checkpoints in the "GEMM" layout of AutoAWQ: 4 bits, eight output features in a word.

    qweight int32 (K, N/8)    scales float (G, N)    qzeros int32 (G, N/8)

    word j of a row holds columns 8j + [0 2 4 6 1 3 5 7], lowest nibble first;
    that is, nibble 4*odd + pair holds column 2*pair + odd:

      bits  31..28 27..24 23..20 19..16 15..12 11..8  7..4  3..0
      col     7      5      3      1      6      4     2     0

    W[n, k] = scales[k // group_size, n] * (code[k, n] - zero[k // group_size, n])

Source: Lin et al. 2023 (arXiv 2306.00978) and AutoAWQ's WQLinear_GEMM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.weight_only import WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits
from .base import FLOATS, TensorSpec
from .gptq import skipped_fields
from .grid import Grid, decode, group_count
from .grouped import Grouped
from .types import Params, Shape


def pack_columns(codes: Tensor) -> Tensor:
    """Codes uint8 (R, N) -> int32 (R, N/8) in AWQ's nibble order."""
    rows, n = codes.shape
    columns = codes.view(rows, n // 8, 4, 2).to(torch.int32)  # (..., pair, odd)
    packed = torch.zeros(rows, n // 8, dtype=torch.int32, device=codes.device)
    for odd in range(2):
        for pair in range(4):
            packed |= columns[..., pair, odd] << (4 * (4 * odd + pair))
    return packed


def unpack_columns(words: Tensor) -> Tensor:
    """int32 (R, N/8) -> codes uint8 (R, N). The inverse of `pack_columns`."""
    codes = torch.empty(*words.shape, 4, 2, dtype=torch.uint8, device=words.device)
    for odd in range(2):
        for pair in range(4):
            codes[..., pair, odd] = (words >> (4 * (4 * odd + pair))) & 15
    return codes.view(words.shape[0], -1)


class Awq(Grouped):
    name = "awq"
    summary = "4-bit integers in groups with zeros, the GEMM layout of AutoAWQ"
    algorithms = ("awq", "gptq")
    defaults = {"bits": 4, "group_size": 128, "symmetric": False}
    short_groups = False  # AutoAWQ has K / group_size groups and refuses other group sizes

    def check_params(self, shape: Shape, params: Params) -> None:
        self.expect("bits", params["bits"], (4,))
        self.check_group_size(shape, params)
        if shape[0] % 8:
            raise ValueError(
                f"{self.name}: shape: expected N to be a multiple of 8, got N={shape[0]}"
            )

    def cuts(self, shape: Shape, params: Params) -> Shape:
        return 8, max(1, params["group_size"])

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        n, k = shape
        g = group_count(k, params["group_size"])
        return {
            "qweight": TensorSpec((torch.int32,), (k, n // 8)),
            "qzeros": TensorSpec((torch.int32,), (g, n // 8)),
            "scales": TensorSpec(FLOATS, (g, n)),
        }

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        self.check_finite("scales", tensors["scales"])

    def from_grid(self, grid: Grid, params: Params) -> dict[str, Tensor]:
        if not grid.in_order(params["group_size"]):
            raise ValueError(f"{self.name}: groups: expected neighbouring features, got act-order")
        return {
            "qweight": pack_columns(grid.codes.T.contiguous()),
            "qzeros": pack_columns(grid.zero.T.contiguous()),
            "scales": grid.scale.T.contiguous(),
        }

    def to_grid(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Grid:
        return Grid(
            codes=unpack_columns(tensors["qweight"]).T.contiguous(),
            scale=tensors["scales"].T.contiguous(),
            zero=unpack_columns(tensors["qzeros"]).T.contiguous(),
            group_size=params["group_size"],
        )

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        zeros = unpack_columns(tensors["qzeros"])
        return decode(
            unpack_columns(tensors["qweight"]), tensors["scales"], zeros, params["group_size"]
        )

    # ------------------------------------------------------------------ kernel family
    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return WEIGHT_ONLY

    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        size = shape[1] if params["group_size"] == -1 else params["group_size"]
        return WeightOnlyTraits(4, "linear", "group", size)

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        return WeightOnlyParts(
            codes=unpack_columns(tensors["qweight"]).T,
            scaler_tensors={
                "scales": tensors["scales"],
                "zeros": unpack_columns(tensors["qzeros"]),
            },
        )

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        return {
            "qweight": pack_columns(parts.codes.T.contiguous()),
            "qzeros": pack_columns(parts.scaler_tensors["zeros"]),
            "scales": parts.scaler_tensors["scales"],
        }

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": params["group_size"],
            "zero_point": not params["symmetric"],
            "version": "gemm",
            **skipped_fields(skipped),
        }

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        if config.get("quant_method") != "awq":
            return None
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise ValueError(
                f"quantization_config.version: expected 'gemm' for awq, got {version!r}"
            )
        return {
            "bits": config.get("bits", config.get("w_bit", 4)),
            "group_size": config.get("group_size", config.get("q_group_size", 128)),
            "symmetric": not config.get("zero_point", True),
        }
