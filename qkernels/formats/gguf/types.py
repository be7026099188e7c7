"""The table of GGUF block types. B = blocks; scales are float32 (B, groups of the block).

K-quants have two levels of scales: float16 for the block of 256, 4 to 8 bits for each 16 or 32:

    q2_k  scale = d * (s & 15), min = dmin * (s >> 4)             s: a byte for 16 weights
    q3_k  scale = d * (s - 32)                                    s: 6 bits for 16, 12 bytes
    q4_k  scale = d * s, min = dmin * m          (q5_k as well)   s, m: 6 bits for 32, 12 bytes
    q6_k  scale = d * s                                           s: int8 for 16
    iq4_xs scale = d * (s - 32)                                   s: 6 bits for 32, 2 + 4 bytes
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .. import e2m1
from . import search
from .base import Field, Fields, GgufFormat, Plane

F16, I8, I16, I32, U8 = torch.float16, torch.int8, torch.int16, torch.int32, torch.uint8
E8M0 = torch.float8_e8m0fnu

#: 16 values denser near 0 than an even grid (ggml's kvalues_iq4nl)
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


# ---------------------------------------------------------------------- blocks of 32, one scale
class _Scale(GgufFormat):
    """Signed codes times one scale."""

    block = group = 32
    scaler = "block_scale"
    signed = True

    def scales(self, fields: Fields) -> tuple[Tensor, None]:
        return fields["d"].float(), None

    def encode(self, x: Tensor, importance: Tensor | None, sigma2: Tensor) -> Fields:
        half = 1 << (self.bits - 1)
        if importance is None:
            scale, codes = search.symmetric_from_largest(x, half)
        else:
            scale, codes = search.symmetric(x, search.error_weights(importance, x, sigma2), half)
        return {"d": search.half(scale), "codes": (codes + half).to(U8)}


class _ScaleMin(GgufFormat):
    """Unsigned codes times a scale, less a minimum. The file has the negative minimum, "m"."""

    block = group = 32
    scaler = "scale_min"

    def scales(self, fields: Fields) -> tuple[Tensor, Tensor]:
        return fields["d"].float(), -fields["m"].float()

    def encode(self, x: Tensor, importance: Tensor | None, sigma2: Tensor) -> Fields:
        top = (1 << self.bits) - 1
        if importance is None:
            scale, minimum, codes = search.asymmetric_from_range(x, top)
        else:
            weights = search.error_weights(importance, x, sigma2)
            scale, minimum, codes = search.asymmetric(x, weights, top, search.FINE)
        return {"d": search.half(scale), "m": search.half(-minimum), "codes": codes.to(U8)}


class Q80(_Scale):
    name = "q8_0"
    summary = "8-bit integers, blocks of 32 (GGUF)"
    int8_codes = True
    fields = (Field("d", F16, 1), Field("qs", I8, 32))
    planes = (Plane("qs", 8, 32),)

    def encode(self, x: Tensor, importance: Tensor | None, sigma2: Tensor) -> Fields:
        scale = x.abs().amax(-1, keepdim=True) / 127
        steps = x * search.inverse(scale)
        # rounded half away from zero
        codes = torch.where(steps < 0, (steps - 0.5).ceil(), (steps + 0.5).floor())
        return {"d": search.half(scale), "codes": (codes + 128).to(U8)}


class Q40(_Scale):
    name = "q4_0"
    summary = "4-bit integers, blocks of 32 (GGUF)"
    fields = (Field("d", F16, 1), Field("qs", U8, 16))
    planes = (Plane("qs", 4, 16),)


class Q41(_ScaleMin):
    name = "q4_1"
    summary = "4-bit integers with a minimum, blocks of 32 (GGUF)"
    fields = (Field("d", F16, 1), Field("m", F16, 1), Field("qs", U8, 16))
    planes = (Plane("qs", 4, 16),)


class Q50(_Scale):
    name = "q5_0"
    summary = "5-bit integers, blocks of 32 (GGUF)"
    fields = (Field("d", F16, 1), Field("qh", U8, 4), Field("qs", U8, 16))
    planes = (Plane("qs", 4, 16), Plane("qh", 1, 1, shift=4))


class Q51(_ScaleMin):
    name = "q5_1"
    summary = "5-bit integers with a minimum, blocks of 32 (GGUF)"
    fields = (Field("d", F16, 1), Field("m", F16, 1), Field("qh", U8, 4), Field("qs", U8, 16))
    planes = (Plane("qs", 4, 16), Plane("qh", 1, 1, shift=4))


class Iq4Nl(GgufFormat):
    name = "iq4_nl"
    summary = "16 uneven values, blocks of 32 (GGUF)"
    block = group = 32
    scaler = "scale"
    table = IQ4_TABLE
    fields = (Field("d", F16, 1), Field("qs", U8, 16))
    planes = (Plane("qs", 4, 16),)

    def scales(self, fields: Fields) -> tuple[Tensor, None]:
        return fields["d"].float(), None

    def encode(self, x: Tensor, importance: Tensor | None, sigma2: Tensor) -> Fields:
        weights = x.square()
        if importance is not None:
            weights = search.error_weights(importance, x, 2 * x.square().mean(-1, keepdim=True))
        scale = search.table_scale(x, weights, IQ4_TABLE)
        return {
            "d": search.half(scale),
            "codes": search.nearest(x * search.inverse(scale), IQ4_TABLE),
        }


class Mxfp4(GgufFormat):
    """MXFP4. The scale 255 is refused: it is OCP's NaN, and ggml reads it as 2^128.

    Without importance, bytes are ggml's: the scale makes 4 of the largest power of two up to the
    largest weight (OCP's rule), and a weight in the middle between two values takes the smaller
    one. Only where the largest weight is less than 2^-18 below the next power, which no 16-bit
    weight is, ggml may take that power, because it rounds a logarithm. With importance, the scales
    next to ggml's are tried, too.
    """

    name = "gguf_mxfp4"
    summary = "4-bit floats e2m1, blocks of 32 with power-of-two scales (GGUF's MXFP4)"
    block = group = e2m1.BLOCK
    scaler = "e8m0"
    table = (*e2m1.MAGNITUDES, 0.0, *e2m1.TABLE[9:])  # ggml has no -0.0
    fields = (Field("scales", E8M0, 1), Field("qs", U8, 16))
    planes = (Plane("qs", 4, 16),)

    @property
    def ggml_type(self) -> str:
        return "MXFP4"

    def scales(self, fields: Fields) -> tuple[Tensor, None]:
        return fields["scales"].float(), None

    def encode(self, x: Tensor, importance: Tensor | None, sigma2: Tensor) -> Fields:
        scales = e2m1.shared_scales(x.abs().amax(-1, keepdim=True), round_up_from=2)
        if importance is None:
            return {"scales": scales, "codes": self._codes(x, scales)}
        steps = torch.tensor([0, -1, 1], dtype=I32, device=x.device)
        scales = (scales + steps[:, None, None]).clamp(min=0).to(U8)  # (3, B, 1)
        codes = self._codes(x, scales)
        errors = importance * (self.values(codes) * e2m1.scale_values(scales) - x).square()
        best = errors.sum(-1, keepdim=True).argmin(0, keepdim=True)
        return {
            "scales": scales.gather(0, best)[0],
            "codes": codes.gather(0, best.expand(1, *x.shape))[0],
        }

    def _codes(self, x: Tensor, scales: Tensor) -> Tensor:
        codes = e2m1.nearest(x / e2m1.scale_values(scales), ties_to_even=False)
        return codes | ((x < 0) & (codes > 0)).to(U8) << 3


# ---------------------------------------------------------------------- blocks of 256, two levels
class _SuperBlock(GgufFormat):
    """A block of 256 with a float16 scale, and integer scales of its groups."""

    block = 256

    def weights(self, x: Tensor, importance: Tensor | None) -> Tensor | None:
        """importance * sqrt(2 * mean(x^2) + x^2), by group: (B, groups, group)."""
        if importance is None:
            return None
        weights = search.error_weights(importance, x, 2 * x.square().mean(-1, keepdim=True))
        return weights.view(x.shape[0], -1, self.group)


class _ScaleMinK(_SuperBlock):
    """Each group has a scale and a minimum: integers up to `top`, times d and dmin."""

    top = 63
    search = search.COARSE

    def default_weights(self, groups: Tensor) -> Tensor:
        """Weights of the errors in the search without importance."""
        return groups.square().mean(-1, keepdim=True).sqrt() + groups.abs()

    def pack_scales(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """Integer scales and minima, uint8 (B, groups) -> the field "scales"."""
        raise NotImplementedError

    def encode(self, x: Tensor, importance: Tensor | None, sigma2: Tensor) -> Fields:
        groups = x.view(x.shape[0], -1, self.group)
        weights = self.weights(x, importance)
        top = (1 << self.bits) - 1
        if weights is None:
            default_weights = self.default_weights(groups)
            scale, minimum, _ = search.asymmetric(groups, default_weights, top, self.search)
            d, s = search.nonnegative_from_largest(scale[..., 0], self.top)
            dmin, m = search.nonnegative_from_largest(minimum[..., 0], self.top)
        else:
            scale, minimum, _ = search.asymmetric(groups, weights, top, search.FINE)
            total = weights.sum(-1)
            d, s = search.nonnegative(scale[..., 0], total, self.top)
            dmin, m = search.nonnegative(minimum[..., 0], total, self.top)
        d, dmin = search.half(d), search.half(dmin)
        fields = {"d": d, "dmin": dmin, "scales": self.pack_scales(s.to(U8), m.to(U8))}
        step, low = (d.float() * s)[..., None], (dmin.float() * m)[..., None]
        codes = torch.round((groups + low) * search.inverse(step)).clamp(0, top)
        return fields | {"codes": codes.to(U8).view(x.shape)}


class Q2K(_ScaleMinK):
    name = "q2_k"
    summary = "2-bit integers, two levels of scales (GGUF)"
    group = 16
    top = 15
    scaler = "q2_k"
    search = search.Scan(-0.5, 0.1, 15, absolute=True)
    fields = (
        Field("scales", U8, 16),
        Field("qs", U8, 64),
        Field("d", F16, 1),
        Field("dmin", F16, 1),
    )
    planes = (Plane("qs", 2, 32),)

    def default_weights(self, groups: Tensor) -> Tensor:
        return groups.abs()

    def pack_scales(self, scale: Tensor, minimum: Tensor) -> Tensor:
        return scale | (minimum << 4)

    def scales(self, fields: Fields) -> tuple[Tensor, Tensor]:
        scale, minimum = fields["scales"] & 15, fields["scales"] >> 4
        return fields["d"].float() * scale.float(), fields["dmin"].float() * minimum.float()


class Q4K(_ScaleMinK):
    name = "q4_k"
    summary = "4-bit integers, two levels of scales (GGUF)"
    group = 32
    scaler = "q4_k"
    fields: ClassVar[tuple[Field, ...]] = (
        Field("d", F16, 1), Field("dmin", F16, 1), Field("scales", I32, 3), Field("qs", U8, 128),
    )  # fmt: skip
    planes: ClassVar[tuple[Plane, ...]] = (Plane("qs", 4, 32),)

    def scales(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """Scales and minima from 12 bytes.

        Bytes 0-3 have scales 0-3 and bytes 4-7 minima 0-3 in their low six bits; their high two
        bits are the high bits of scales and minima 4-7. Bytes 8-11 have the low four bits of scales
        4-7 (low nibble) and of minima 4-7 (high nibble).
        """
        a, b, c = fields["scales"].view(U8).view(-1, 3, 4).unbind(1)
        scale = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], dim=1)
        minimum = torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], dim=1)
        return fields["d"].float() * scale.float(), fields["dmin"].float() * minimum.float()

    def pack_scales(self, scale: Tensor, minimum: Tensor) -> Tensor:
        (s0, s1), (m0, m1) = scale.split(4, dim=1), minimum.split(4, dim=1)
        parts = [s0 | ((s1 >> 4) << 6), m0 | ((m1 >> 4) << 6), (s1 & 15) | ((m1 & 15) << 4)]
        return torch.cat(parts, dim=1).view(I32)


class Q5K(Q4K):
    name = "q5_k"
    summary = "5-bit integers, two levels of scales (GGUF)"
    search = search.Scan(-0.5, 0.1, 15)
    fields = (*Q4K.fields[:3], Field("qh", U8, 32), Field("qs", U8, 128))
    planes = (Plane("qs", 4, 32), Plane("qh", 1, 32, shift=4))


class _ScaleK(_SuperBlock):
    """Each group of 16 has a scale, an integer in [-scale_half, scale_half - 1], times d."""

    group = 16
    signed = True
    scale_half: int

    def group_weights(self, x: Tensor, importance: Tensor | None) -> Tensor:
        """Weights of the errors in the search, (B, groups, 16)."""
        raise NotImplementedError

    def block_scale(self, scale: Tensor, total: Tensor, fitted: bool) -> tuple[Tensor, Tensor]:
        """(d, integer scales) of the groups' scales (B, groups): the largest becomes -scale_half.

        total: sum of the weights of each group. fitted: whether to search, as with importance.
        """
        largest = search.largest(scale)
        factor = -self.scale_half * search.inverse(largest)
        steps = torch.round(factor * scale).clamp(-self.scale_half, self.scale_half - 1)
        return search.inverse(factor), steps

    def pack_scales(self, steps: Tensor) -> Tensor:
        """Integer scales (B, groups) -> the field "scales"."""
        raise NotImplementedError

    def encode(self, x: Tensor, importance: Tensor | None, sigma2: Tensor) -> Fields:
        groups = x.view(x.shape[0], -1, self.group)
        half = 1 << (self.bits - 1)
        weights = self.group_weights(x, importance)
        scale, _ = search.symmetric(groups, weights, half)
        d, steps = self.block_scale(scale[..., 0], weights.sum(-1), importance is not None)
        d = search.half(d)
        unit = (d.float() * steps)[..., None]
        codes = torch.round(groups * search.inverse(unit)).clamp(-half, half - 1) + half
        return {"d": d, "scales": self.pack_scales(steps), "codes": codes.to(U8).view(x.shape)}


class Q3K(_ScaleK):
    name = "q3_k"
    summary = "3-bit integers, two levels of scales (GGUF)"
    scaler = "q3_k"
    scale_half = 32
    fields = (
        Field("hmask", U8, 32),
        Field("qs", U8, 64),
        Field("scales", I32, 3),
        Field("d", F16, 1),
    )
    planes = (Plane("qs", 2, 32), Plane("hmask", 1, 32, shift=2))

    def group_weights(self, x: Tensor, importance: Tensor | None) -> Tensor:
        weights = self.weights(x, importance)
        return x.square().view(x.shape[0], -1, 16) if weights is None else weights

    def block_scale(self, scale: Tensor, total: Tensor, fitted: bool) -> tuple[Tensor, Tensor]:
        if not fitted:
            return super().block_scale(scale, total, fitted)
        d, steps = search.symmetric(scale, total, self.scale_half)
        return d, steps

    def scales(self, fields: Fields) -> tuple[Tensor, None]:
        """Scales from 12 bytes.

        Bytes 0-7 have the low four bits of scales 0-7 (low nibble) and 8-15 (high nibble). Bytes
        8-11 have the high two bits: of scales 0-3 in bits 0-1, of scales 4-7 in bits 2-3, ...
        """
        raw = fields["scales"].view(U8)
        low, high = raw[:, :8], raw[:, 8:]
        low = torch.cat([low & 15, low >> 4], dim=1)
        high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
        return fields["d"].float() * ((low | (high << 4)).float() - 32), None

    def pack_scales(self, steps: Tensor) -> Tensor:
        codes = (steps + 32).to(U8)
        low, high = codes & 15, codes >> 4
        top = torch.zeros_like(codes[:, :4])
        for i in range(4):
            top |= high[:, 4 * i : 4 * i + 4] << (2 * i)
        return torch.cat([low[:, :8] | (low[:, 8:] << 4), top], dim=1).view(I32)


class Q6K(_ScaleK):
    name = "q6_k"
    summary = "6-bit integers, two levels of scales (GGUF)"
    scaler = "q6_k"
    scale_half = 128
    fields = (
        Field("ql", U8, 128),
        Field("qh", U8, 64),
        Field("scales", I8, 16),
        Field("d", F16, 1),
    )
    planes = (Plane("ql", 4, 64), Plane("qh", 2, 32, shift=4))

    def group_weights(self, x: Tensor, importance: Tensor | None) -> Tensor:
        return (x.square() if importance is None else importance).reshape(x.shape[0], -1, 16)

    def scales(self, fields: Fields) -> tuple[Tensor, None]:
        return fields["d"].float() * fields["scales"].float(), None

    def pack_scales(self, steps: Tensor) -> Tensor:
        return steps.to(I8)


class Iq4Xs(_SuperBlock):
    name = "iq4_xs"
    summary = "16 uneven values, two levels of scales (GGUF)"
    group = 32
    scaler = "iq4_xs"
    table = IQ4_TABLE
    fields = (
        Field("d", F16, 1),
        Field("scales_h", I16, 1),
        Field("scales_l", I32, 1),
        Field("qs", U8, 128),
    )
    planes = (Plane("qs", 4, 16),)

    def scales(self, fields: Fields) -> tuple[Tensor, None]:
        shifts = torch.arange(8, dtype=I32, device=fields["d"].device)
        low = (fields["scales_l"] >> (4 * shifts)) & 15
        high = (fields["scales_h"].to(I32) >> (2 * shifts)) & 3
        return fields["d"].float() * ((low | (high << 4)).float() - 32), None

    def encode(self, x: Tensor, importance: Tensor | None, sigma2: Tensor) -> Fields:
        groups = x.view(x.shape[0], -1, 32)
        weights = self.weights(x, importance)
        scale = search.table_scale(
            groups, groups.square() if weights is None else weights, IQ4_TABLE
        )[..., 0]
        d = -search.largest(scale) / 32
        steps = torch.round(scale * search.inverse(d)).clamp(-32, 31)
        codes = search.nearest(groups * search.inverse(d * steps)[..., None], IQ4_TABLE)
        stored = (steps + 32).to(torch.int64)
        shifts = torch.arange(8, device=x.device)
        low = ((stored & 15) << (4 * shifts)).sum(-1, keepdim=True)
        high = ((stored >> 4) << (2 * shifts)).sum(-1, keepdim=True)
        return {
            "d": search.half(d),
            "scales_l": low.to(I32),  # wraps to the same 32 bits
            "scales_h": high.to(I16),
            "codes": codes.view(x.shape),
        }


TYPES: tuple[GgufFormat, ...] = (
    Q80(), Q40(), Q41(), Q50(), Q51(), Q2K(), Q3K(), Q4K(), Q5K(), Q6K(), Iq4Nl(), Iq4Xs(),
    Mxfp4(),
)  # fmt: skip
