"""compressed-tensors' `pack-quantized`: integers of 2 to 8 bits in groups, weight only.

    weight_packed      int32 (N, ceil(K*bits/32))   codes, a bit stream along each row (see bits.py)
    weight_scale       float (N, G)                 G = ceil(K / group_size)
    weight_zero_point  int32 (ceil(N*bits/32), G)   zeros, a bit stream along N; asymmetric only
    weight_g_idx       int32 (K)                    group of each input feature; act-order only
    weight_shape       int (2)                      N, K

    W[n, k] = weight_scale[n, g] * (code[n, k] - zero[n, g])
    g = k // group_size or weight_g_idx[k]

compressed-tensors' quantizer has signed integers; stored codes and zeros are those plus
2^(bits-1). The zero of a symmetric grid is not stored, and is 2^(bits-1). The grid is GPTQ's; only
the order of the bytes differs.

Source: vllm-project/compressed-tensors, `PackedQuantizationCompressor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.weight_only import WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits
from . import bits, compressed_tensors
from .base import FLOATS, TensorSpec
from .grid import Grid, check_group_index, cut_groups, cut_sizes, group_count
from .grouped import Grouped
from .types import Params, Shape

STORAGE = "pack-quantized"
#: values of compressed-tensors' `actorder`; only the first three have a weight_g_idx
_ACT_ORDERS = ("group", "dynamic", True, "weight", "static", False, None)
#: code widths that fused kernels decode
_KERNEL_BITS = (2, 3, 4, 8)


class PackQuantized(Grouped):
    name = "pack_quantized"
    summary = (
        "2..8-bit integers in groups, with or without zeros (compressed-tensors, llm-compressor)"
    )
    algorithms = ("gptq", "awq")
    defaults = {"bits": 4, "group_size": 128, "symmetric": True, "act_order": False}

    def check_params(self, shape: Shape, params: Params) -> None:
        self.expect("bits", params["bits"], tuple(range(2, 9)))
        self.check_group_size(shape, params)

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        (n, k), b = shape, params["bits"]
        g = group_count(k, params["group_size"])
        specs = {
            "weight_packed": TensorSpec((torch.int32,), (n, bits.words(k, b))),
            "weight_scale": TensorSpec(FLOATS, (n, g)),
            "weight_shape": TensorSpec((torch.int64, torch.int32), (2,)),
        }
        if not params["symmetric"]:
            specs["weight_zero_point"] = TensorSpec((torch.int32,), (bits.words(n, b), g))
        if params["act_order"]:
            specs["weight_g_idx"] = TensorSpec((torch.int32,), (k,))
        return specs

    def cuts(self, shape: Shape, params: Params) -> Shape:
        return cut_sizes(params, bits.codes_per_words(params["bits"]))

    def cut(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        params: Params,
        dim: int,
        begin: int,
        end: int,
    ) -> tuple[dict[str, Tensor], Params]:
        part, params = super().cut(tensors, shape, params, dim, begin, end)
        part["weight_shape"] = part["weight_shape"].clone()
        part["weight_shape"][dim] = end - begin
        if dim == 1 and "weight_g_idx" in part:
            index, groups, size = cut_groups(part["weight_g_idx"], params["group_size"], begin, end)
            for name in ("weight_scale", "weight_zero_point"):
                if name in part:
                    part[name] = tensors[name][:, groups].contiguous()
            part["weight_g_idx"] = index
            params = {**params, "group_size": size}
        return part, params

    def take_rows(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params, index: Tensor
    ) -> tuple[dict[str, Tensor], Params]:
        taken = dict(tensors)
        for name in ("weight_packed", "weight_scale"):
            taken[name] = tensors[name][index]
        n, k = tensors["weight_shape"]
        taken["weight_shape"] = torch.stack([torch.full_like(n, index.numel()), k])
        if "weight_zero_point" in tensors:
            zeros = bits.take_rows(tensors["weight_zero_point"], params["bits"], index)
            taken["weight_zero_point"] = bits.pack_rows(zeros, params["bits"])
        return taken, params

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        (n, k), b = shape, params["bits"]
        self.check_finite("weight_scale", tensors["weight_scale"])
        if tensors["weight_shape"].tolist() != list(shape):
            raise ValueError(
                f"{self.name}: weight_shape: expected {list(shape)}, "
                f"got {tensors['weight_shape'].tolist()}"
            )
        if params["act_order"]:
            check_group_index(self.name, "weight_g_idx", tensors["weight_g_idx"], k, params)
        streams = {"weight_packed": (tensors["weight_packed"].T, k)}
        if not params["symmetric"]:
            streams["weight_zero_point"] = (tensors["weight_zero_point"], n)
        for name, (stream, count) in streams.items():
            # Only a stream that does not fill its last word has bits after its last code.
            if count * b % 32 and not bits.padding_is_zero(stream, b, count):
                raise ValueError(
                    f"{self.name}: {name}: expected zero bits behind the last code, got others"
                )

    # ------------------------------------------------------------------ arithmetic
    def from_grid(self, grid: Grid, params: Params) -> dict[str, Tensor]:
        b = params["bits"]
        (n, k), device = grid.codes.shape, grid.codes.device
        tensors = {
            "weight_packed": bits.pack_rows(grid.codes.T, b).T.contiguous(),
            "weight_scale": grid.scale.contiguous(),
            "weight_shape": torch.tensor([n, k], device=device),
        }
        if params["symmetric"]:
            if not bool((grid.zero == 1 << (b - 1)).all()):
                raise ValueError(
                    f"{self.name}: symmetric: expected every zero point to be {1 << (b - 1)}, "
                    "got others"
                )
        else:
            tensors["weight_zero_point"] = bits.pack_rows(grid.zero, b)
        if params["act_order"]:
            tensors["weight_g_idx"] = grid.group_index()
        elif not grid.in_order(params["group_size"]):
            raise ValueError(
                f"{self.name}: act_order: expected True for groups in another order, got False"
            )
        return tensors

    def to_grid(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Grid:
        codes = bits.unpack_rows(tensors["weight_packed"].T, params["bits"], shape[1]).T
        zeros = self._zeros(tensors, shape, params)
        return Grid(
            codes=codes.contiguous(),
            scale=tensors["weight_scale"],
            zero=zeros,
            group_size=params["group_size"],
            group_of=tensors.get("weight_g_idx"),
        )

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        return self.to_grid(tensors, shape, params).dequantize()

    @staticmethod
    def _zeros(tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        """Zero points uint8 (N, G)."""
        if params["symmetric"]:
            return torch.full_like(
                tensors["weight_scale"], 1 << (params["bits"] - 1), dtype=torch.uint8
            )
        return bits.unpack_rows(tensors["weight_zero_point"], params["bits"], shape[0])

    # ------------------------------------------------------------------ kernel family
    def kernel_layout(self, params: Mapping[str, Any]) -> str | None:
        return WEIGHT_ONLY if params["bits"] in _KERNEL_BITS else None

    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        size = shape[1] if params["group_size"] == -1 else params["group_size"]
        return WeightOnlyTraits(params["bits"], "linear", "group", size)

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        grid = self.to_grid(tensors, shape, params)
        return WeightOnlyParts(
            codes=grid.codes,
            scaler_tensors={"scales": grid.scale.T, "zeros": grid.zero.T},
            group_index=grid.group_of,
            extra={"weight_shape": tensors["weight_shape"]},
        )

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        b = params["bits"]
        tensors = {
            "weight_packed": bits.pack_rows(parts.codes.T, b).T.contiguous(),
            "weight_scale": parts.scaler_tensors["scales"].T.contiguous(),
            **parts.extra,
        }
        if not params["symmetric"]:
            tensors["weight_zero_point"] = bits.pack_rows(parts.scaler_tensors["zeros"].T, b)
        if parts.group_index is not None:
            tensors["weight_g_idx"] = parts.group_index
        return tensors

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any]:
        channel = params["group_size"] == -1
        weights = compressed_tensors.arguments(
            "int",
            params["bits"],
            "channel" if channel else "group",
            symmetric=params["symmetric"],
            group_size=None if channel else params["group_size"],
            actorder="group" if params["act_order"] else None,
        )
        return compressed_tensors.write(STORAGE, weights, None, skipped)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        scheme = compressed_tensors.read(config)
        if scheme is None or scheme.kind[0] != "int" or scheme.storage != STORAGE:
            return None
        if scheme.inputs is not None:
            raise ValueError(
                "quantization_config input_activations: expected null with pack-quantized weights, "
                f"got {scheme.inputs!r:.60}"
            )
        channel = scheme.expect("strategy", ("group", "channel")) == "channel"
        return {
            "bits": scheme.kind[1],
            "group_size": -1 if channel else scheme.weights.get("group_size", 128),
            "symmetric": scheme.weights.get("symmetric", True),
            "act_order": scheme.expect("actorder", _ACT_ORDERS) in ("group", "dynamic", True),
        }
