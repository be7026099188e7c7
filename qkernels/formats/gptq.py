"""GPTQ checkpoints (AutoGPTQ, GPTQModel): 2, 3, 4 and 8 bits, act-order, two conventions for zeros.

    qweight int32 (K*bits/32, N)   codes, a bit stream along K (see bits.py)
    qzeros  int32 (G, N*bits/32)   zero points, a bit stream along N; G = ceil(K / group_size)
    scales  float  (G, N)
    g_idx   int32 (K)              group of each input feature; optional when it is k // group_size

    W[n, k] = scales[g, n] * (code[k, n] - zero[g, n]),  g = g_idx[k]

`checkpoint_format="gptq"` stores zero - 1 in `bits` bits, wrapping; "gptq_v2" stores the zero
itself. Configs often name the wrong one. A symmetric grid has one possible zero, 2^(bits-1), so its
tensors tell. They also tell the order of the groups: `g_idx` is what it says, whatever `desc_act`
is. All zeros, which some tools write for "no order", stand for k // group_size. Source: Frantar et
al. 2022 (arXiv 2210.17323) and AutoGPTQ's QuantLinear.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.weight_only import WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits
from . import bits
from . import grid as affine
from .base import FLOATS, TensorSpec
from .grouped import Grouped
from .types import Params, Shape

WIDTHS = (2, 3, 4, 8)
#: checkpoint_format -> what is taken off a zero point when it is stored
_SHIFTS = {"gptq": 1, "gptq_v2": 0}


class Gptq(Grouped):
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
        self.expect("bits", params["bits"], WIDTHS)
        self.expect("checkpoint_format", params["checkpoint_format"], tuple(_SHIFTS))
        self.check_group_size(shape, params)

    def params_from_tensors(
        self, tensors: Mapping[str, Tensor], params: Mapping[str, Any]
    ) -> Params:
        stated = dict(params)
        qzeros, scales, index = (tensors.get(name) for name in ("qzeros", "scales", "g_idx"))
        if _is_plain(qzeros, 2) and scales is not None and params.get("symmetric") is not False:
            stated |= self._convention(qzeros, scales, params)  # type: ignore[arg-type]
        if _is_plain(index, 1):
            assert index is not None
            if _says_nothing(index, params):
                stated["act_order"] = False
            elif "act_order" not in params:
                stated["act_order"] = not torch.equal(
                    index.long(), _in_order(index.numel(), params, index)
                )
        return stated

    def _convention(self, qzeros: Tensor, scales: Any, params: Mapping[str, Any]) -> Params:
        """What qzeros (G, words) of a grid that is said to be symmetric, or may be, say of zeros
        and their storage.
        """
        b = params.get("bits", self.defaults["bits"])
        n = scales.shape[1] if isinstance(scales, Tensor) and scales.dim() == 2 else 0
        if type(b) is not int or b not in WIDTHS or n == 0 or qzeros.shape[1] != bits.words(n, b):
            return {}  # `validate` says what is wrong
        stored = bits.unpack_rows(qzeros.T, b, n)
        low, high, zero = int(stored.min()), int(stored.max()), 1 << (b - 1)
        named = params.get("checkpoint_format", self.defaults["checkpoint_format"])
        for convention, shift in _SHIFTS.items():
            if (low, high) == (zero - shift, zero - shift):
                if convention != named:
                    warnings.warn(
                        f"qkernels: gptq: qzeros hold {low} everywhere, the zero point {zero} of a symmetric grid as "
                        f"checkpoint_format {convention!r} stores it: read so, although {named!r} is named",
                        stacklevel=4,
                    )
                return {"symmetric": True, "checkpoint_format": convention}
        if params.get("symmetric") is None:
            return {"symmetric": False}
        raise ValueError(
            f"{self.name}: qzeros: expected {zero - 1} (checkpoint_format 'gptq') or {zero} ('gptq_v2') everywhere, as "
            f"a symmetric grid has no other zero point than {zero}, got {low}..{high}; pass symmetric=False "
            "(sym: false in a config) if the grid is none"
        )

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
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        params: Params,
        dim: int,
        begin: int,
        end: int,
    ) -> tuple[dict[str, Tensor], Params]:
        found, params = super().cut(tensors, shape, params, dim, begin, end)
        if dim == 1 and "g_idx" in found and not _says_nothing(tensors["g_idx"], params):
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
            in_order = _says_nothing(index, params) or torch.equal(
                index.long(), _in_order(k, params, index)
            )
            if not params["act_order"] and not in_order:
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
                raise ValueError(
                    f"{self.name}: {name}: expected zero bits behind the last code, got others"
                )

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

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        n, k = shape
        index = tensors.get("g_idx")
        useless = index is not None and _says_nothing(index, params)
        return WeightOnlyParts(
            codes=bits.unpack_rows(tensors["qweight"], params["bits"], k).T,
            scaler_tensors={
                "scales": tensors["scales"],
                "zeros": _unpack_zeros(tensors["qzeros"], n, params),
            },
            group_index=None if useless else index,
            extra={"g_idx": index} if useless else {},  # type: ignore[dict-item]
        )

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        tensors = {
            "qweight": bits.pack_rows(parts.codes.T, params["bits"]),
            "qzeros": _pack_zeros(parts.scaler_tensors["zeros"], params),
            "scales": parts.scaler_tensors["scales"],
            **parts.extra,
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
        params = {
            "bits": config.get("bits", 4),
            "group_size": config.get("group_size", 128),
            "checkpoint_format": config.get("checkpoint_format") or "gptq",
        }
        if "sym" in config:  # else the tensors say it
            params["symmetric"] = config["sym"]
        if config.get("desc_act"):  # where it is false the tensors say it, too
            params["act_order"] = config["desc_act"]
        return params


def left_alone(skipped: list[str]) -> dict[str, Any]:
    """Config fields for unquantized layers: transformers reads the list, GPTQModel and vLLM
    `dynamic`.
    """
    inside = [name for name in skipped if name.rpartition(".")[2] != "lm_head"]
    fields: dict[str, Any] = {"modules_to_not_convert": skipped}
    if inside:
        fields["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in inside}
    return fields


def _is_plain(tensor: Any, dims: int) -> bool:
    """Whether it is integers as they are stored, of `dims` dimensions, that can be looked at."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.dtype != torch.int32
        or tensor.layout != torch.strided
    ):
        return False
    return tensor.dim() == dims and bool(tensor.numel()) and not tensor.is_meta


def _group_size(k: int, params: Mapping[str, Any]) -> int:
    size = params.get("group_size", Gptq.defaults["group_size"])
    return size if type(size) is int and size > 0 else k


def _in_order(k: int, params: Mapping[str, Any], like: Tensor) -> Tensor:
    return torch.arange(k, device=like.device) // _group_size(k, params)


def _says_nothing(index: Tensor, params: Mapping[str, Any]) -> bool:
    """Whether g_idx (K) is all zeros, although there are more groups than one."""
    return _group_size(index.numel(), params) < index.numel() and not bool(index.any())


def _zero_shift(params: Params) -> int:
    return _SHIFTS[params["checkpoint_format"]]


def _pack_zeros(zeros: Tensor, params: Params) -> Tensor:
    """Zero points uint8 (G, N) -> stored words (G, N*bits/32)."""
    stored = (zeros.to(torch.int16) - _zero_shift(params)) & ((1 << params["bits"]) - 1)
    return bits.pack_rows(stored.to(torch.uint8).T, params["bits"]).T.contiguous()


def _unpack_zeros(qzeros: Tensor, n: int, params: Params) -> Tensor:
    """Stored words (G, N*bits/32) -> zero points uint8 (G, N)."""
    stored = bits.unpack_rows(qzeros.T, params["bits"], n).T
    zeros = (stored.to(torch.int16) + _zero_shift(params)) & ((1 << params["bits"]) - 1)
    return zeros.to(torch.uint8).contiguous()
