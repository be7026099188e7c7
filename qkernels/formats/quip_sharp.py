"""QuIP#: E8P codes, each of eight weights, between randomized Hadamard transforms.

    W = Wscale * diag(SV) H_N / sqrt(N)  decode(Qidxs)  H_K^T / sqrt(K) diag(SU)

    Qidxs        int16 (N, K / 8)     a code for 8 neighbouring columns (e8p.py)
    Qidxs_resid  int16 (N, K / 8), for 3 bits uint8: codes of the residual; only with 3 and 4 bits
    SU, SV       float16 (K), (N)     signs; any factors after fine-tuning
    Wscale       float32 ()
    codebook_id  int64 ()             7 is E8P alone

`checkpoint_format="quip_sharp"` is the format of the public release, for 2 bits, N a multiple of 16
and K of 64. Qidxs is int64 (N, K / 32), read as (N/16, K/64, 8, 4): word (i, j, g, c) has rows
16i + 2g and 16i + 2g + 1, and columns 64j + 16c .. 64j + 16c + 15:

    bit 0..7           8..15          16..23         24..31         32 + 4s + i
        which of 256:  row 2g | +1  | row 2g, next | +1, next |     sign s of those four, i = 0..3

H_n is transforms.hadamard_factors(n): for powers of two, and those times 12, 20, 28, ... up to 60.

Source: Tseng et al. 2024, arXiv 2402.04396.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.weight_only import WeightOnlyParts, WeightOnlyTraits, whole_tiles
from . import e8p
from .base import TensorSpec
from .incoherent import IncoherentFormat, Side
from .transforms import hadamard_factors, hadamard_orders
from .types import Params, Shape

CODEBOOKS = {2: 7, 3: 1003, 4: 1004}
_RESIDUAL = {3: torch.uint8, 4: torch.int16}


class QuipSharp(IncoherentFormat):
    name = "quip_sharp"
    summary = "2/3/4-bit lattice codes between Hadamard transforms (QuIP#)"
    defaults = {"bits": 2, "checkpoint_format": "compact"}
    k_multiple = 8

    def check_params(self, shape: Shape, params: Params) -> None:
        n, k = shape
        self.expect("bits", params["bits"], (2, 3, 4))
        self.expect("checkpoint_format", params["checkpoint_format"], ("compact", "quip_sharp"))
        if k % 8:
            raise ValueError(f"{self.name}: shape: expected K to be a multiple of 8, got K={k}")
        for size in (k, n):
            try:
                hadamard_orders(size)
            except ValueError as error:
                raise ValueError(f"{self.name}: shape: {error}") from None
        if params["checkpoint_format"] == "quip_sharp" and (
            params["bits"] != 2 or n % 16 or k % 64
        ):
            raise ValueError(
                f"{self.name}: checkpoint_format: expected 'compact' for bits={params['bits']}, "
                f"shape={shape}; 'quip_sharp' is for 2 bits, N a multiple of 16 and K of 64"
            )

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        n, k = shape
        if params["checkpoint_format"] == "quip_sharp":
            codes = {"Qidxs": TensorSpec((torch.int64,), (n, k // 32))}
        else:
            codes = {"Qidxs": TensorSpec((torch.int16,), (n, k // 8))}
        if params["bits"] > 2:
            codes["Qidxs_resid"] = TensorSpec((_RESIDUAL[params["bits"]],), (n, k // 8))
        return codes | {
            "SU": TensorSpec((torch.float16,), (k,)),
            "SV": TensorSpec((torch.float16,), (n,)),
            "Wscale": TensorSpec((torch.float32,), ()),
            "codebook_id": TensorSpec((torch.int64,), ()),
        }

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        for name in ("SU", "SV", "Wscale"):
            self.check_finite(name, tensors[name])
        want, got = CODEBOOKS[params["bits"]], int(tensors["codebook_id"])
        if got != want:
            raise ValueError(
                f"{self.name}: codebook_id: expected {want} for bits={params['bits']}, got {got}"
            )

    # ------------------------------------------------------------------ codes
    def _codes(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        """Codes int32 (N, K / 8), with the residual's in the high 16 bits."""
        stored = tensors["Qidxs"]
        codes = _unpack_public(stored) if stored.dtype == torch.int64 else stored.int() & 0xFFFF
        if "Qidxs_resid" in tensors:
            codes = codes | (tensors["Qidxs_resid"].int() << 16)
        return codes

    def _stored(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """The inverse of `_codes`."""
        if params["checkpoint_format"] == "quip_sharp":
            return {"Qidxs": _pack_public(codes)}
        stored = {"Qidxs": _low_16(codes)}
        if params["bits"] > 2:
            stored["Qidxs_resid"] = _low_16(codes >> 16).to(_RESIDUAL[params["bits"]])
        return stored

    def sides(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> tuple[Side, Side]:
        device = tensors["SU"].device
        n, k = shape
        before = [f.to(device) for f in hadamard_factors(k)]
        after = [f.to(device) for f in hadamard_factors(n)]
        return Side(before, math.sqrt(k), tensors["SU"]), Side(after, math.sqrt(n), tensors["SV"])

    def factor_orders(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return hadamard_orders(shape[1]), hadamard_orders(shape[0])

    def loaded_orders(self, orders: tuple[int, ...]) -> tuple[int, ...]:
        return orders[:1] if orders[0] & (orders[0] - 1) else ()

    def grid_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        codes = self._codes(tensors, shape, params)
        return e8p.decode(codes, params["bits"]).view(shape) * tensors["Wscale"]

    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        from . import ldlq

        n, k = weight.shape
        generator = torch.Generator().manual_seed(params["seed"])
        signs = [torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1 for size in (k, n)]
        su, sv = (s.half().to(weight.device) for s in signs)
        before, after = self.sides({"SU": su, "SV": sv}, (n, k), params)
        inner, hessian = ldlq.inner_weight(weight, params["hessian"], before, after)
        bits = params["bits"]
        scale = inner.square().mean().sqrt().clamp(min=1e-12) / e8p.ROUNDING[bits].rms

        def round_to_codes(target: Tensor) -> tuple[Tensor, Tensor]:
            codes = e8p.encode(target, bits)
            return codes[:, None], e8p.decode(codes, bits).to(target.dtype)

        codes = ldlq.ldlq(inner / scale, hessian, round_to_codes, block=8, passes=params["passes"])
        return {
            **self._stored(codes, params),
            "SU": su,
            "SV": sv,
            "Wscale": scale.float(),
            "codebook_id": torch.tensor(CODEBOOKS[bits], device=weight.device),
        }

    # ------------------------------------------------------------------ kernel family
    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        n, k = shape
        group, transform_scales = whole_tiles(k), (math.sqrt(k), math.sqrt(n))
        return WeightOnlyTraits(
            params["bits"], "e8p", "row_scale", group, n, transform_scales=transform_scales
        )

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        extra = {name: tensors[name] for name in ("SU", "SV", "codebook_id")}
        return WeightOnlyParts(
            codes=self._codes(tensors, shape, params),
            scaler_tensors={"absmax": tensors["Wscale"].view(1, 1) / 2},
            codebook=e8p.table(tensors["Qidxs"].device),
            sides=self.kernel_sides(tensors, shape, params),
            extra=extra,
        )

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        scale = parts.scaler_tensors["absmax"].view(()) * 2
        return {**self._stored(parts.codes, params), "Wscale": scale, **parts.extra}

    # ------------------------------------------------------------------ checkpoints
    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        if config.get("quant_method") != "quip_sharp":
            return None
        return {key: config.get(key, default) for key, default in cls.defaults.items()}


def _low_16(codes: Tensor) -> Tensor:
    """The low 16 bits of each code, as int16."""
    codes = codes & 0xFFFF
    return torch.where(codes >= 1 << 15, codes - (1 << 16), codes).to(torch.int16)


def _pack_public(codes: Tensor) -> Tensor:
    """Codes int32 (N, K / 8) -> Qidxs of the public release, int64 (N, K / 32)."""
    n, count = codes.shape
    box = codes.long().view(n // 16, 8, 2, count // 8, 4, 2)  # i, g, row, j, c, next
    four = box.permute(0, 3, 1, 4, 5, 2).reshape(n // 16, count // 8, 8, 4, 4)  # next, row
    words = torch.zeros_like(four[..., 0])
    for i in range(4):
        words |= (four[..., i] >> 8 & 0xFF) << (8 * i)
        for s in range(8):
            words |= (four[..., i] >> s & 1) << (32 + 4 * s + i)
    return words.view(n, count // 4)


def _unpack_public(words: Tensor) -> Tensor:
    """The inverse of `_pack_public`."""
    n, count = words.shape[0], words.shape[1] * 4
    words = words.view(n // 16, count // 8, 8, 4)
    four = []
    for i in range(4):
        code = (words >> (8 * i) & 0xFF) << 8
        for s in range(8):
            code |= (words >> (32 + 4 * s + i) & 1) << s
        four.append(code)
    box = torch.stack(four, -1).view(n // 16, count // 8, 8, 4, 2, 2)
    return box.permute(0, 2, 5, 1, 3, 4).reshape(n, count).to(torch.int32)
