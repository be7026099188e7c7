"""GPTQ checkpoints (AutoGPTQ, GPTQModel): 2, 3, 4 and 8 bits, act-order, two conventions for zeros.

    qweight int32 (K*bits/32, N)   codes, a bit stream along K (see bits.py)
    qzeros  int32 (G, N*bits/32)   zero points, a bit stream along N; G = ceil(K / group_size)
    scales  float  (G, N)
    g_idx   int32 (K)              group of each input feature; optional when it is k // group_size

    W[n, k] = scales[g, n] * (code[k, n] - zero[g, n]),  g = g_idx[k]

`checkpoint_format="gptq"` stores zero - 1 in `bits` bits, wrapping; "gptq_v2" stores the zero
itself. Configs often name the wrong convention. A symmetric grid has only one possible zero,
2^(bits-1), so there `qzeros` shows which convention is right. The order of the groups is also read
from the tensors: `g_idx` decides, whatever the config's `desc_act` says. Some tools write a `g_idx`
of all zeros for "no order"; such a placeholder means k // group_size.

Source: Frantar et al. 2022 (arXiv 2210.17323) and AutoGPTQ's QuantLinear.
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
from .base import FLOATS, TensorSpec
from .grid import Grid, check_group_index, cut_groups, cut_sizes, decode, group_count
from .grouped import Grouped
from .types import Params, Shape

WIDTHS = (2, 3, 4, 8)
#: checkpoint_format -> what is subtracted from a zero point when it is stored
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
        result = dict(params)
        qzeros, scales, index = (tensors.get(name) for name in ("qzeros", "scales", "g_idx"))
        if _has_int32(qzeros, 2) and scales is not None and params.get("symmetric") is not False:
            result |= self._params_from_zeros(qzeros, scales, params)  # type: ignore[arg-type]
        if _has_int32(index, 1):
            assert index is not None
            if _is_placeholder(index, params):
                result["act_order"] = False
            elif "act_order" not in params:
                result["act_order"] = not torch.equal(
                    index.long(), _consecutive_groups(index.numel(), params, index)
                )
        return result

    def _params_from_zeros(self, qzeros: Tensor, scales: Any, params: Mapping[str, Any]) -> Params:
        """`symmetric` and `checkpoint_format` as qzeros (G, words) show them.

        Called unless the grid is declared asymmetric. Raises ValueError if it is declared symmetric
        and qzeros hold anything else than its one zero point.
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
                        f"qkernels: gptq: qzeros hold {low} everywhere, the zero point {zero} of a "
                        f"symmetric grid as checkpoint_format {convention!r} stores it: read so, "
                        f"although {named!r} is named",
                        stacklevel=4,
                    )
                return {"symmetric": True, "checkpoint_format": convention}
        if params.get("symmetric") is None:
            return {"symmetric": False}
        raise ValueError(
            f"{self.name}: qzeros: expected {zero - 1} (checkpoint_format 'gptq') or {zero} "
            f"('gptq_v2') everywhere, as a symmetric grid has no other zero point than {zero}, got "
            f"{low}..{high}; pass symmetric=False (sym: false in a config) if the grid is none"
        )

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        (n, k), b = shape, params["bits"]
        g = group_count(k, params["group_size"])
        return {
            "qweight": TensorSpec((torch.int32,), (bits.words(k, b), n)),
            "qzeros": TensorSpec((torch.int32,), (g, bits.words(n, b))),
            "scales": TensorSpec(FLOATS, (g, n)),
            "g_idx": TensorSpec((torch.int32,), (k,), required=params["act_order"]),
        }

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
        if dim == 1 and "g_idx" in part and not _is_placeholder(tensors["g_idx"], params):
            index, groups, size = cut_groups(part["g_idx"], params["group_size"], begin, end)
            part |= {name: tensors[name][groups] for name in ("scales", "qzeros")}
            part["g_idx"] = index
            params = {**params, "group_size": size}
        return part, params

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        (n, k), b = shape, params["bits"]
        self.check_finite("scales", tensors["scales"])
        index = tensors.get("g_idx")
        if index is not None:
            check_group_index(self.name, "g_idx", index, k, params)
            in_order = _is_placeholder(index, params) or torch.equal(
                index.long(), _consecutive_groups(k, params, index)
            )
            if not params["act_order"] and not in_order:
                raise ValueError(
                    f"{self.name}: g_idx: expected k // group_size because act_order is False, "
                    "got another order; pass act_order=True"
                )
        # Only a stream that does not fill its last word has bits after its last code.
        for name, stream, count in (
            ("qweight", tensors["qweight"], k),
            ("qzeros", tensors["qzeros"].T, n),
        ):
            if count * b % 32 and not bits.padding_is_zero(stream, b, count):
                raise ValueError(
                    f"{self.name}: {name}: expected zero bits behind the last code, got others"
                )

    def from_grid(self, grid: Grid, params: Params) -> dict[str, Tensor]:
        return {
            "qweight": bits.pack_rows(grid.codes.T, params["bits"]),
            "qzeros": _pack_zeros(grid.zero.T, params),
            "scales": grid.scale.T.contiguous(),
            "g_idx": grid.group_index(),
        }

    def to_grid(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Grid:
        return Grid(
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
        return decode(codes, tensors["scales"], zeros, params["group_size"], group_of)

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
        placeholder = index is not None and _is_placeholder(index, params)
        return WeightOnlyParts(
            codes=bits.unpack_rows(tensors["qweight"], params["bits"], k).T,
            scaler_tensors={
                "scales": tensors["scales"],
                "zeros": _unpack_zeros(tensors["qzeros"], n, params),
            },
            group_index=None if placeholder else index,
            extra={"g_idx": index} if placeholder else {},  # type: ignore[dict-item]
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
            **skipped_fields(skipped),
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
        if "sym" in config:  # otherwise `params_from_tensors` finds it
            params["symmetric"] = config["sym"]
        if config.get("desc_act"):  # where it is false, `params_from_tensors` decides
            params["act_order"] = config["desc_act"]
        return params


def skipped_fields(skipped: list[str]) -> dict[str, Any]:
    """Config fields that name the unquantized layers.

    transformers reads `modules_to_not_convert`, GPTQModel and vLLM read `dynamic`.
    """
    inside = [name for name in skipped if name.rpartition(".")[2] != "lm_head"]
    fields: dict[str, Any] = {"modules_to_not_convert": skipped}
    if inside:
        fields["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in inside}
    return fields


def _has_int32(tensor: Any, dims: int) -> bool:
    """Whether `tensor` is a non-empty int32 tensor of `dims` dimensions with readable values."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.dtype != torch.int32
        or tensor.layout != torch.strided
    ):
        return False
    return tensor.dim() == dims and bool(tensor.numel()) and not tensor.is_meta


def _group_size(k: int, params: Mapping[str, Any]) -> int:
    """The group size in `params`, unchecked; K for one group or a value of another type."""
    size = params.get("group_size", Gptq.defaults["group_size"])
    return size if type(size) is int and size > 0 else k


def _consecutive_groups(k: int, params: Mapping[str, Any], like: Tensor) -> Tensor:
    """k // group_size for K features, int64 (K), on the device of `like`."""
    return torch.arange(k, device=like.device) // _group_size(k, params)


def _is_placeholder(index: Tensor, params: Mapping[str, Any]) -> bool:
    """Whether g_idx (K) is all zeros, although there is more than one group."""
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
