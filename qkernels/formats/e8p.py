"""E8P, the codebook of QuIP#: 2^16 points of the lattice E8 shifted by a quarter, for eight weights
each.

A point is s * a + t: `a` one of 256 vectors of positive half-integers, s signs, t = +-1/4 in every
place.

    16-bit code    15 ....... 8   7 ..... 0
                   which of 256    signs        their parity p says t = -1/4 instead of +1/4, and s flips
                                                nibble 0 once more if p = 1, so that flips are even
                                                in number

The 256: all 227 of norm^2 <= 10 in lexicographic order, then 29 of norm^2 12. Only sign patterns
that make the sum of s * a even are used (half of E8's points), so the last entry of `a` is negated
where the sum is odd. The table keeps them as nibbles 2v + 8; nibble k is entry 2k, nibble k + 4 is
entry 2k + 1.

Residual quantization adds a second code for what the first one leaves: E8P again for 4 bits, for 3
bits 256 points of E8 itself: 0, the 240 shortest vectors, and 15 of the form +-2 e_i.

Source: Tseng et al. 2024 (QuIP#, arXiv 2402.04396), section 4 and appendix C.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

#: entry of the vector that each nibble of a table's word holds
NIBBLE_OF = (0, 2, 4, 6, 1, 3, 5, 7)

#: the 29 of norm^2 12, times two
_NORM_12 = (
    "31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133 "
    "33133311 33133131 33131331 33133113 33131313 33131133 31333311 31333131 31331331 31333113 "
    "31331313 13331133 13333311 13333131 13331331 13333113 13331313 11331333 33113331"
)


class Rounding(NamedTuple):
    """How many bits a weight become a code. rms: of the weights that the codes fit best.

    share: what the residual is multiplied by before it gets its own code; 0 for no residual.
    """

    rms: float
    share: float


ROUNDING = {2: Rounding(1.03, 0.0), 3: Rounding(0.98, 2.04), 4: Rounding(1.03, 3.45)}


@lru_cache(maxsize=1)
def absolute() -> Tensor:
    """The 256 vectors of positive half-integers, float32 (256, 8)."""
    short = [v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in v) <= 10]
    long = [tuple(int(c) / 2 for c in text) for text in _NORM_12.split()]
    return torch.tensor(short + long)


@lru_cache(maxsize=1)
def points() -> Tensor:
    """What each of the 65536 codes stands for, float32 (65536, 8)."""
    vectors = absolute().clone()
    vectors[:, 7] *= 1 - 2 * (vectors.sum(1) % 2)
    code = torch.arange(1 << 16)
    bits = (code[:, None] >> torch.arange(8)) & 1
    odd = bits.sum(1) % 2
    bits[:, 0] ^= odd
    signs = torch.empty(1 << 16, 8)
    signs[:, list(NIBBLE_OF)] = 1 - 2 * bits.float()
    return vectors[code >> 8] * signs + 0.25 - 0.5 * odd[:, None]


@lru_cache(maxsize=1)
def residual_points() -> Tensor:
    """The 256 points of E8 for a third bit, float32 (256, 8)."""
    whole = [v for v in itertools.product((-1.0, 0.0, 1.0), repeat=8) if sum(x * x for x in v) == 2]
    half = [v for v in itertools.product((-0.5, 0.5), repeat=8) if sum(v) % 2 == 0]
    long = (torch.eye(8) * 2).tolist() + (torch.eye(8) * -2).tolist()
    return torch.tensor([(0.0,) * 8, *whole, *half, *long[:15]])


@lru_cache(maxsize=8)
def table(device: torch.device) -> Tensor:
    """int32 (512): the words of `absolute`, then those of `residual_points`, both as nibbles 2v +
    8.
    """
    vectors = absolute().clone()
    vectors[:, 7] *= 1 - 2 * (vectors.sum(1) % 2)
    nibbles = torch.cat([vectors, residual_points()])[:, list(NIBBLE_OF)].mul(2).add(8).long()
    words = (nibbles << torch.arange(0, 32, 4)).sum(1)
    return torch.where(words >> 31 > 0, words - (1 << 32), words).to(torch.int32).to(device)


def decode(codes: Tensor, bits: int) -> Tensor:
    """Codes int32 (...), the residual's in the high 16 bits -> float32 (..., 8)."""
    found = points().to(codes.device)[(codes & 0xFFFF).long()]
    share = ROUNDING[bits].share
    if share:
        second = points() if bits == 4 else residual_points()
        found = found + second.to(codes.device)[((codes >> 16) & 0xFFFF).long()] / share
    return found


def encode(x: Tensor, bits: int) -> Tensor:
    """Vectors (B, 8) -> codes int32 (B) of the nearest points, then of the nearest to what is left."""
    codes = nearest(x)
    share = ROUNDING[bits].share
    if share:
        left = (x - points().to(x)[codes]) * share
        if bits == 4:
            second = nearest(left)
        else:
            book = residual_points().to(x)
            second = (2 * left @ book.T - book.square().sum(1)).argmax(1)
        codes = codes | (second << 16)
    return codes.to(torch.int32)


# ---------------------------------------------------------------------- the nearest point
#: a vector of norm^2 <= 10, sorted, for each of the seven kinds there are
_KINDS = torch.tensor(
    [[0.5] * 8]
    + [[1.5] * i + [0.5] * (8 - i) for i in range(1, 5)]
    + [[2.5] + [0.5] * 7, [2.5, 1.5] + [0.5] * 6]
)
_POWERS = 3 ** torch.arange(8)


@lru_cache(maxsize=1)
def _index_of() -> Tensor:
    """The index in `absolute` by its entries read as digits 0, 1, 2; int64 (3^8)."""
    found = torch.zeros(3**8, dtype=torch.int64)
    found[((absolute() - 0.5).long() * _POWERS).sum(1)] = torch.arange(256)
    return found


def nearest(x: Tensor) -> Tensor:
    """Vectors (B, 8) -> codes int64 (B) of the nearest of the 65536 points, exactly.

    Of s * a the signs of x are best, and if their product is not the one that `a` needs, the flip
    that costs least. All arrangements of the 7 short kinds are there, so the best one has its
    entries in the order of |x|; only the 29 long ones are tried one by one, where a vector of their
    kind could win at all.
    """
    device = x.device
    best = torch.full((x.shape[0],), -torch.inf, dtype=x.dtype, device=device)
    codes = torch.zeros(x.shape[0], dtype=torch.int64, device=device)
    for shift, odd in ((0.25, 0), (-0.25, 1)):
        score, index, flips = _nearest_shifted(x - shift)
        score = score + 2 * shift * x.sum(1)  # |x|^2 - distance^2, but for the same constant
        better = score > best
        best = torch.where(better, score, best)
        codes = torch.where(better, index << 8 | (flips ^ odd), codes)
    return codes


def _nearest_shifted(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For vectors (B, 8): |y|^2 - distance^2, index of `a`, and flips as bits of its nibbles."""
    kinds, long = _KINDS.to(y), absolute()[227:].to(y)
    size, negative = y.abs(), y < 0
    ordered, order = size.sort(1, descending=True)
    odd = negative.sum(1) % 2
    # The signs' product must make the sum even.
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
        # five entries of 1.5: the sum is odd
        size, mismatch = (
            size[maybe],
            (odd[maybe] == 0)[:, None],
        )
        cost, place = (size[:, None, :] * long).min(2)
        found, which = (2 * size @ long.T - 12 - 4 * mismatch * cost).max(1)
        wins = found > score[maybe]
        maybe, which = maybe[wins], which[wins]
        score[maybe], index[maybe] = found[wins], which + 227
        place = place[wins].gather(1, which[:, None])[:, 0]
        flipped[maybe] = torch.where(mismatch[wins, 0], place, -1)
    negative = negative ^ (torch.arange(8, device=y.device) == flipped[:, None])
    # From signs to flips: the table has the last entry negated where the sum of `a` is odd.
    negative[:, 7] ^= absolute().sum(1).to(y.device)[index] % 2 == 1
    bits = negative[:, list(NIBBLE_OF)].long() << torch.arange(8, device=y.device)
    return score, index, bits.sum(1)
