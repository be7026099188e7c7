"""GPTQ checkpoints (AutoGPTQ, GPTQModel): 2, 3, 4 and 8 bits, act-order, two conventions for zeros.

    qweight int32 (K*bits/32, N)   codes, a bit stream along K (see bits.py)
    qzeros  int32 (G, N*bits/32)   zero points, a bit stream along N; G = ceil(K / group_size)
    scales  float  (G, N)
    g_idx   int32 (K)              group of each input feature; optional when it is k // group_size

    W[n, k] = scales[g, n] * (code[k, n] - zero[g, n]),  g = g_idx[k]

`checkpoint_format="gptq"` stores zero - 1 in `bits` bits, wrapping; "gptq_v2" stores the zero itself.
Source: Frantar et al. 2022 (arXiv 2210.17323) and AutoGPTQ's QuantLinear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.weight_only import WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits
from . import affine, bits
from .base import FLOATS, Params, Shape, TensorSpec


class Gptq(affine.Grouped):
    name = "gptq"
    summary = "2/3/4/8-bit integers in groups, zeros, act-order (AutoGPTQ, GPTQModel)"
    algorithms = ("gptq", "awq")
    defaults = {
        "bits": 4,
        "group_size": 128,
        "symmetric": True,
        "act_order": False,
        "checkpoint_format": "gptq",
    }

    def check_params(self, shape: Shape, params: Params) -> None:
        self.expect("bits", params["bits"], (2, 3, 4, 8))
        self.expect("checkpoint_format", params["checkpoint_format"], ("gptq", "gptq_v2"))
        self.check_group_size(shape, params)

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        (n, k), b = shape, params["bits"]
        g = affine.groups(k, params["group_size"])
        return {
            "qweight": TensorSpec((torch.int32,), (bits.words(k, b), n)),
            "qzeros": TensorSpec((torch.int32,), (g, bits.words(n, b))),
            "scales": TensorSpec(FLOATS, (g, n)),
            "g_idx": TensorSpec((torch.int32,), (k,), required=params["act_order"]),
        }

    def cuts(self, shape: Shape, params: Params) -> Shape:
        return affine.cuts(params, bits.codes_per_words(params["bits"]))

    def cut(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params, dim: int, begin: int, end: int
    ) -> tuple[dict[str, Tensor], Params]:
        found, params = super().cut(tensors, shape, params, dim, begin, end)
        if dim == 1 and "g_idx" in found:
            index, kept, size = affine.cut_groups(found["g_idx"], params["group_size"], begin, end)
            found |= {name: tensors[name][kept] for name in ("scales", "qzeros")} | {"g_idx": index}
            params = {**params, "group_size": size}
        return found, params

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        (n, k), b = shape, params["bits"]
        self.check_finite("scales", tensors["scales"])
        index = tensors.get("g_idx")
        if index is not None:
            affine.check_group_index(self.name, "g_idx", index, k, params)
            if not params["act_order"] and not torch.equal(index.long(), _in_order(k, params, index)):
                raise ValueError(
                    f"{self.name}: g_idx: expected k // group_size because act_order is False, "
                    "got another order; pass act_order=True"
                )
        # Only the last word of a stream that does not fill it can hold such bits.
        for name, stream, count in (
            ("qweight", tensors["qweight"], k),
            ("qzeros", tensors["qzeros"].T, n),
        ):
            if count * b % 32 and not bits.padding_is_zero(stream, b, count):
                raise ValueError(f"{self.name}: {name}: expected zero bits behind the last code, got others")

    def from_grid(self, grid: affine.Grid, params: Params) -> dict[str, Tensor]:
        return {
            "qweight": bits.pack_rows(grid.codes.T, params["bits"]),
            "qzeros": _pack_zeros(grid.zero.T, params),
            "scales": grid.scale.T.contiguous(),
            "g_idx": grid.group_index(),
        }

    def to_grid(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> affine.Grid:
        return affine.Grid(
            codes=bits.unpack_rows(tensors["qweight"], params["bits"], shape[1]).T.contiguous(),
            scale=tensors["scales"].T.contiguous(),
            zero=_unpack_zeros(tensors["qzeros"], shape[0], params).T.contiguous(),
            group_size=params["group_size"],
            group_of=tensors["g_idx"] if params["act_order"] else None,
        )

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        n, k = shape
        codes = bits.unpack_rows(tensors["qweight"], params["bits"], k)
        zeros = _unpack_zeros(tensors["qzeros"], n, params)
        group_of = tensors["g_idx"].long() if params["act_order"] else None
        return affine.decode(codes, tensors["scales"], zeros, params["group_size"], group_of)

    # ------------------------------------------------------------------ kernel family
    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return WEIGHT_ONLY

    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        size = shape[1] if params["group_size"] == -1 else params["group_size"]
        return WeightOnlyTraits(params["bits"], "linear", "group", size)

    def weight_only(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> WeightOnlyParts:
        n, k = shape
        return WeightOnlyParts(
            codes=bits.unpack_rows(tensors["qweight"], params["bits"], k).T,
            scaler_tensors={
                "scales": tensors["scales"],
                "zeros": _unpack_zeros(tensors["qzeros"], n, params),
            },
            group_index=tensors.get("g_idx"),
        )

    def from_weight_only(self, parts: WeightOnlyParts, shape: Shape, params: Params) -> dict[str, Tensor]:
        tensors = {
            "qweight": bits.pack_rows(parts.codes.T, params["bits"]),
            "qzeros": _pack_zeros(parts.scaler_tensors["zeros"], params),
            "scales": parts.scaler_tensors["scales"],
        }
        if parts.group_index is not None:
            tensors["g_idx"] = parts.group_index
        return tensors

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": params["bits"],
            "group_size": params["group_size"],
            "sym": params["symmetric"],
            "desc_act": params["act_order"],
            "checkpoint_format": params["checkpoint_format"],
            "lm_head": not any(name.rpartition(".")[2] == "lm_head" for name in skipped),
            **left_alone(skipped),
        }

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        if config.get("quant_method") != "gptq":
            return None
        return {
            "bits": config.get("bits", 4),
            "group_size": config.get("group_size", 128),
            "symmetric": config.get("sym", True),
            "act_order": config.get("desc_act", False),
            "checkpoint_format": config.get("checkpoint_format", "gptq"),
        }


def left_alone(skipped: list[str]) -> dict[str, Any]:
    """Config fields for unquantized layers: transformers reads the list, GPTQModel and vLLM `dynamic`."""
    inside = [name for name in skipped if name.rpartition(".")[2] != "lm_head"]
    fields: dict[str, Any] = {"modules_to_not_convert": skipped}
    if inside:
        fields["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in inside}
    return fields


def _in_order(k: int, params: Params, like: Tensor) -> Tensor:
    size = k if params["group_size"] == -1 else params["group_size"]
    return torch.arange(k, device=like.device) // size


def _zero_shift(params: Params) -> int:
    return 1 if params["checkpoint_format"] == "gptq" else 0


def _pack_zeros(zeros: Tensor, params: Params) -> Tensor:
    """Zero points uint8 (G, N) -> stored words (G, N*bits/32)."""
    stored = (zeros.to(torch.int16) - _zero_shift(params)) & ((1 << params["bits"]) - 1)
    return bits.pack_rows(stored.to(torch.uint8).T, params["bits"]).T.contiguous()


def _unpack_zeros(qzeros: Tensor, n: int, params: Params) -> Tensor:
    """Stored words (G, N*bits/32) -> zero points uint8 (G, N)."""
    stored = bits.unpack_rows(qzeros.T, params["bits"], n).T
    zeros = (stored.to(torch.int16) + _zero_shift(params)) & ((1 << params["bits"]) - 1)
    return zeros.to(torch.uint8).contiguous()
