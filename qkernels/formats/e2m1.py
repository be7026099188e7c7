"""e2m1, a float of 4 bits, and e8m0, the power of two that scales a block of them.

OCP Microscaling's MXFP4 is made of both; GGUF's type 39 has the same codes and scales.

    e2m1, 4 bits: |sign|exponent: 2|mantissa: 1|    0, 0.5, 1, 1.5, 2, 3, 4, 6, or the negative
    e8m0, 8 bits: |exponent: 8|                     2^(byte - 127); the byte 255 is NaN

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: weights that share a scale
BLOCK = 32
#: the value of each code without its sign
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: the value of each code; code 8 is -0.0
TABLE = (*MAGNITUDES, *(-value for value in MAGNITUDES))

_BIAS = 127
#: exponent of the largest power of two in MAGNITUDES
_TOP_EXPONENT = 2
#: the largest scale whose block is finite in float32, whatever its codes are: 6 * 2^(252-127)
_TOP_SCALE = 252


def scale_values(scales: Tensor) -> Tensor:
    """e8m0 bytes, uint8 -> float32, exact also where they are subnormal."""
    return scales.view(torch.float8_e8m0fnu).float()


def shared_scales(absmax: Tensor, round_up_from: float) -> Tensor:
    """The scale of each block, uint8, for the block's largest magnitude, float32.

    It is the largest power of two up to `absmax`, less the exponent of e2m1's largest number: the
    largest weight becomes 4 or more, and a weight above 6 becomes 6. If `absmax` is at least
    `round_up_from` (1 to 2) times that power of two, the scale is doubled: the largest weight is
    then below 4. Blocks of zeros have scale 0.
    """
    mantissa, exponent = torch.frexp(absmax)  # absmax = mantissa * 2^exponent, 0.5 <= mantissa < 1
    scales = exponent - 1 - _TOP_EXPONENT + _BIAS + (2 * mantissa >= round_up_from)
    return torch.where(absmax > 0, scales.clamp(0, _TOP_SCALE), 0).to(torch.uint8)


def nearest(x: Tensor, *, ties_to_even: bool) -> Tensor:
    """The code without its sign, uint8, whose value is nearest to |x|.

    A value in the middle between two takes the even code, or else the smaller one.
    """
    values = torch.tensor(MAGNITUDES, dtype=torch.float32, device=x.device)
    middles = (values[1:] + values[:-1]) / 2
    if ties_to_even:  # each odd code gives up the upper end of its range
        middles[1::2] = torch.nextafter(middles[1::2], torch.zeros_like(middles[1::2]))
    return torch.bucketize(x.abs(), middles, out_int32=True).to(torch.uint8)
