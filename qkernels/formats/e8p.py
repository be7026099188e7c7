"""E8P, the codebook of QuIP#: 2^16 points of the shifted lattice E8; a code stands for 8 weights.

A point is s * a + t, with `a` one of 256 magnitudes (8 positive half-integers each), s signs, and
t = -1/4 or +1/4 in all 8 entries.

    16-bit code    15 ....... 8   7 ..... 0
                   which of 256    signs        parity p of the signs: t = -1/4 if p = 1, else +1/4;
                                                if p = 1, s flips nibble 0 once more, so that the
                                                number of flips is even

The 256 magnitudes are all 227 of norm^2 <= 10 in lexicographic order, then 29 of norm^2 12. Only
sign patterns that make the sum of s * a even are used (half of E8's points), so the last entry of
`a` is negated where its sum is odd. The table stores each entry v as the nibble 2v + 8; nibble k is
entry 2k, nibble k + 4 is entry 2k + 1.

With 3 and 4 bits a second code quantizes the residual of the first: E8P again for 4 bits; for 3
bits 256 points of E8 itself: 0, the 240 shortest vectors, and 15 of the form +-2 e_i.

Source: Tseng et al. 2024 (QuIP#, arXiv 2402.04396), section 4 and appendix C.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

#: entry of a magnitude or point that each nibble of a table word holds
NIBBLE_OF = (0, 2, 4, 6, 1, 3, 5, 7)

#: the 29 magnitudes of norm^2 12, times two
_LONG_TIMES_2 = (
    "31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133 "
    "33133311 33133131 33131331 33133113 33131313 33131133 31333311 31333131 31331331 31333113 "
    "31331313 13331133 13333311 13333131 13331331 13333113 13331313 11331333 33113331"
)


class Rounding(NamedTuple):
    """How weights are scaled for a codebook.

    Attributes:
        rms: root mean square of the weights that the codes fit best.
        residual_scale: factor of the residual before it gets its own code; 0 for no residual.
    """

    rms: float
    residual_scale: float


#: bits per weight -> rounding
ROUNDING = {2: Rounding(1.03, 0.0), 3: Rounding(0.98, 2.04), 4: Rounding(1.03, 3.45)}


@lru_cache(maxsize=1)
def magnitudes() -> Tensor:
    """The 256 magnitudes, positive half-integers, float32 (256, 8)."""
    short = [v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in v) <= 10]
    long = [tuple(int(c) / 2 for c in text) for text in _LONG_TIMES_2.split()]
    return torch.tensor(short + long)


@lru_cache(maxsize=1)
def points() -> Tensor:
    """The 8 weights that each of the 65536 codes stands for, float32 (65536, 8)."""
    signed = magnitudes().clone()
    signed[:, 7] *= 1 - 2 * (signed.sum(1) % 2)
    code = torch.arange(1 << 16)
    bits = (code[:, None] >> torch.arange(8)) & 1
    odd = bits.sum(1) % 2
    bits[:, 0] ^= odd
    signs = torch.empty(1 << 16, 8)
    signs[:, list(NIBBLE_OF)] = 1 - 2 * bits.float()
    return signed[code >> 8] * signs + 0.25 - 0.5 * odd[:, None]


@lru_cache(maxsize=1)
def residual_points() -> Tensor:
    """The 256 points of E8 for the residual with 3 bits, float32 (256, 8)."""
    whole = [v for v in itertools.product((-1.0, 0.0, 1.0), repeat=8) if sum(x * x for x in v) == 2]
    half = [v for v in itertools.product((-0.5, 0.5), repeat=8) if sum(v) % 2 == 0]
    long = (torch.eye(8) * 2).tolist() + (torch.eye(8) * -2).tolist()
    return torch.tensor([(0.0,) * 8, *whole, *half, *long[:15]])


@lru_cache(maxsize=8)
def table(device: torch.device) -> Tensor:
    """Words of nibbles 2v + 8, int32 (512): of the magnitudes, then of `residual_points`."""
    signed = magnitudes().clone()
    signed[:, 7] *= 1 - 2 * (signed.sum(1) % 2)
    nibbles = torch.cat([signed, residual_points()])[:, list(NIBBLE_OF)].mul(2).add(8).long()
    words = (nibbles << torch.arange(0, 32, 4)).sum(1)
    return torch.where(words >> 31 > 0, words - (1 << 32), words).to(torch.int32).to(device)


def decode(codes: Tensor, bits: int) -> Tensor:
    """Codes int32 (...), with the residual's in the high 16 bits -> weights float32 (..., 8)."""
    weights = points().to(codes.device)[(codes & 0xFFFF).long()]
    scale = ROUNDING[bits].residual_scale
    if scale:
        second = points() if bits == 4 else residual_points()
        weights = weights + second.to(codes.device)[((codes >> 16) & 0xFFFF).long()] / scale
    return weights


def encode(x: Tensor, bits: int) -> Tensor:
    """Weights (B, 8) -> codes int32 (B): the nearest point, and the nearest to its residual."""
    codes = nearest(x)
    scale = ROUNDING[bits].residual_scale
    if scale:
        residual = (x - points().to(x)[codes]) * scale
        if bits == 4:
            second = nearest(residual)
        else:
            codebook = residual_points().to(x)
            second = (2 * residual @ codebook.T - codebook.square().sum(1)).argmax(1)
        codes = codes | (second << 16)
    return codes.to(torch.int32)


# ---------------------------------------------------------------------- the nearest point
#: the entries, sorted, of the seven kinds of magnitudes with norm^2 <= 10
_KINDS = torch.tensor(
    [[0.5] * 8]
    + [[1.5] * i + [0.5] * (8 - i) for i in range(1, 5)]
    + [[2.5] + [0.5] * 7, [2.5, 1.5] + [0.5] * 6]
)
_POWERS = 3 ** torch.arange(8)


@lru_cache(maxsize=1)
def _index_of() -> Tensor:
    """Index in `magnitudes` by a magnitude's entries, read as digits 0, 1, 2; int64 (3^8)."""
    index = torch.zeros(3**8, dtype=torch.int64)
    index[((magnitudes() - 0.5).long() * _POWERS).sum(1)] = torch.arange(256)
    return index


def nearest(x: Tensor) -> Tensor:
    """Weights (B, 8) -> codes int64 (B) of the nearest of the 65536 points, exactly.

    The best signs are those of x. If their product is not the one that `a` needs, the best choice
    flips the sign that costs least. The codebook has every permutation of the 7 short kinds, so the
    best permutation has its entries in the order of |x|. The 29 long magnitudes are tried one by
    one, and only for rows where one of their kind could win.
    """
    device = x.device
    best = torch.full((x.shape[0],), -torch.inf, dtype=x.dtype, device=device)
    codes = torch.zeros(x.shape[0], dtype=torch.int64, device=device)
    for shift, odd in ((0.25, 0), (-0.25, 1)):
        score, index, flips = _nearest_shifted(x - shift)
        score = score + 2 * shift * x.sum(1)  # |x|^2 - distance^2 plus a constant
        better = score > best
        best = torch.where(better, score, best)
        codes = torch.where(better, index << 8 | (flips ^ odd), codes)
    return codes


def _nearest_shifted(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For y (B, 8): |y|^2 - distance^2, index of the nearest `a`, sign flips as bits by nibble."""
    kinds, long = _KINDS.to(y), magnitudes()[227:].to(y)
    size, negative = y.abs(), y < 0
    ordered, order = size.sort(1, descending=True)
    odd = negative.sum(1) % 2
    # The sum of s * a must be even, which fixes the product of the signs.
    mismatch = odd[:, None] != (kinds.sum(1) % 2)[None, :]
    score, kind = (
        2 * ordered @ kinds.T - kinds.square().sum(1) - 2 * mismatch * ordered[:, 7:]
    ).max(1)
    entries = torch.empty_like(y).scatter_(1, order, kinds[kind])
    index = _index_of().to(y.device)[((entries - 0.5).long() * _POWERS.to(y.device)).sum(1)]
    flipped = torch.where(mismatch.gather(1, kind[:, None])[:, 0], order[:, 7], -1)

    reach = 2 * ordered @ long[0].sort(descending=True).values - 12
    maybe = (reach > score).nonzero()[:, 0]
    if maybe.numel():
        # Long magnitudes have five entries of 1.5, so their sum is odd.
        size, mismatch = size[maybe], (odd[maybe] == 0)[:, None]
        cost, entry = (size[:, None, :] * long).min(2)
        long_score, which = (2 * size @ long.T - 12 - 4 * mismatch * cost).max(1)
        wins = long_score > score[maybe]
        maybe, which = maybe[wins], which[wins]
        score[maybe], index[maybe] = long_score[wins], which + 227
        entry = entry[wins].gather(1, which[:, None])[:, 0]
        flipped[maybe] = torch.where(mismatch[wins, 0], entry, -1)
    negative = negative ^ (torch.arange(8, device=y.device) == flipped[:, None])
    # Signs become flips: the table negates the last entry where the sum of `a` is odd.
    negative[:, 7] ^= magnitudes().sum(1).to(y.device)[index] % 2 == 1
    bits = negative[:, list(NIBBLE_OF)].long() << torch.arange(8, device=y.device)
    return score, index, bits.sum(1)
