"""Decoders: packed words -> values, exact in float16 and bfloat16, before scaling.

A decoder is two small functions, passed to the kernel as compile-time arguments:

    split(words, high, table, BITS, DTYPE)   words of qkernels/layouts/weight_only.py (and the plane of
                                    high bits, for 3, 5 and 6 bits); returns the values of features
                                    2i and of features 2i+1 as DTYPE, with the bits of s as trailing
                                    dimensions of 2, lowest first; values may be off by a constant
    finish(value, zero, BITS, DTYPE)      takes that constant and the zero point off

Integer codes become floats without a conversion: OR-ing a code into the low mantissa bits of 2^m
(m = 10 in float16, 7 in bfloat16) makes the float 2^m + code, and both halves of a word at once.

PTX is used where triton has no words for an instruction: taking a register for two 16-bit floats,
and looking up bytes in registers. Triton's interpreter runs the same arithmetic spelled out; the
tests run the PTX itself in a small interpreter of their own.
"""

import os
from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Decoder(NamedTuple):
    split: JITFunction
    finish: JITFunction


#: $0, $1 = the halves of $2
HALVES = tl.constexpr("mov.b32 {$0, $1}, $2;")

#: A word's nibbles, in pairs, to four pairs of 16-bit entries of a table of 16. $5..$8 hold the low
#: bytes of entries 0-3, 4-7, 8-11, 12-15, $9..$12 the high bytes. prmt picks four bytes out of
#: eight by
#: the low three bits of four nibbles; a second prmt picks between entries 0-7 and 8-15 by the
#: fourth.
LOOKUP16 = tl.constexpr("""
{
.reg .b32 low3, bit3, a, b, lo, hi;
and.b32 low3, $4, 0x77777777;
shr.u32 bit3, $4, 1;
and.b32 bit3, bit3, 0x44444444;
or.b32 bit3, bit3, 0x32103210;
prmt.b32 a, $5, $6, low3;
prmt.b32 b, $7, $8, low3;
prmt.b32 lo, a, b, bit3;
prmt.b32 a, $9, $10, low3;
prmt.b32 b, $11, $12, low3;
prmt.b32 hi, a, b, bit3;
prmt.b32 $0, lo, hi, 0x5140;
prmt.b32 $1, lo, hi, 0x7362;
shr.u32 low3, low3, 16;
shr.u32 bit3, bit3, 16;
prmt.b32 a, $5, $6, low3;
prmt.b32 b, $7, $8, low3;
prmt.b32 lo, a, b, bit3;
prmt.b32 a, $9, $10, low3;
prmt.b32 b, $11, $12, low3;
prmt.b32 hi, a, b, bit3;
prmt.b32 $2, lo, hi, 0x5140;
prmt.b32 $3, lo, hi, 0x7362;
}
""")


@triton.jit
def _shifts(word, WIDTH: tl.constexpr):
    """word >> s*WIDTH for s in 0..16/WIDTH-1, as trailing dimensions of 2: lowest bit of s first."""
    if WIDTH == 8:
        return tl.join(word, word >> 8)
    elif WIDTH == 4:
        return tl.join(tl.join(word, word >> 4), tl.join(word >> 8, word >> 12))
    else:
        low = tl.join(tl.join(word, word >> 2), tl.join(word >> 4, word >> 6))
        high = tl.join(tl.join(word >> 8, word >> 10), tl.join(word >> 12, word >> 14))
        return tl.join(low, high)


@triton.jit
def _pairs(words, high, BITS: tl.constexpr):
    """Codes of features 2i in the low halves, of 2i+1 in the high halves."""
    if BITS == 3:
        return (_shifts(words, 2) & 0x30003) | ((_shifts(high, 2) & 0x10001) << 2)
    elif BITS == 5:
        return (_shifts(words, 4) & 0xF000F) | ((_shifts(high, 4) & 0x10001) << 4)
    elif BITS == 6:
        return (_shifts(words, 4) & 0xF000F) | ((_shifts(high, 4) & 0x30003) << 4)
    else:
        return _shifts(words, BITS) & (((1 << BITS) - 1) * 0x10001)


@triton.jit
def _halves(pair, DTYPE: tl.constexpr):
    """The bits of two 16-bit floats in an int32 -> those floats."""
    if INTERPRETED:
        low, high = pair.to(tl.int16), (pair >> 16).to(tl.int16)
    else:
        low, high = tl.inline_asm_elementwise(
            HALVES, "=h,=h,r", [pair], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )
    return low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)


@triton.jit
def _split_linear(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes plus 1024 (float16, up to 8 bits) or 128 (bfloat16, up to 7 bits)."""
    MAGIC: tl.constexpr = 0x64006400 if DTYPE == tl.float16 else 0x43004300
    return _halves(_pairs(words, high, BITS) | MAGIC, DTYPE)


@triton.jit
def _finish_linear(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    OFFSET: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
    return value - (zero + OFFSET).to(value.dtype)


@triton.jit
def _finish_real(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Zero points that are no integers: float32, or the small differences of both would lose their
    bits.
    """
    OFFSET: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
    return (value - OFFSET).to(tl.float32) - zero.to(tl.float32)


@triton.jit
def _split_byte(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """8-bit codes, in bfloat16 less 128: its mantissa has 7 bits, so the top bit of a code comes as
    another number to take off,

        code < 128:  (128 + code)       - 256        code >= 128:  (128 + code - 128) - 128
    """
    if DTYPE == tl.float16:
        return _split_linear(words, high, table, BITS, DTYPE)
    else:
        pair = _pairs(words, high, BITS)
        low, odd = _halves((pair & 0x007F007F) | 0x43004300, DTYPE)
        from_low, from_odd = _halves((pair & 0x00800080) ^ 0x43804380, DTYPE)  # 256 or 128
        if INTERPRETED:  # it takes bfloat16 for integers
            low, odd = _widened(low) - _widened(from_low), _widened(odd) - _widened(from_odd)
            return low.to(DTYPE), odd.to(DTYPE)
        else:
            return low - from_low, odd - from_odd


@triton.jit
def _widened(value):
    """bfloat16 -> float32 by its bits."""
    return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _finish_byte(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    OFFSET: tl.constexpr = 1024.0 if DTYPE == tl.float16 else -128.0
    return value - (zero + OFFSET).to(value.dtype)


@triton.jit
def _finish_signed(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Takes off the middle of the codes, whatever `zero` is."""
    MAGIC: tl.constexpr = 1024.0 if DTYPE == tl.float16 else (-128.0 if BITS == 8 else 128.0)
    return value - (MAGIC + (1 << (BITS - 1)))


@triton.jit
def _finish_unsigned(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The code itself."""
    MAGIC: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0  # of 5 bits at most
    return value - MAGIC


@triton.jit
def _finish_half_integer(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Takes off half of the largest code, in two steps that are exact."""
    MAGIC: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
    return (value - MAGIC) - ((1 << BITS) - 1) * 0.5


@triton.jit
def _lookup16(words, table, DTYPE: tl.constexpr):
    """words -> four tiles of pairs of table entries; `table` as WeightOnlyParts.lut lays it out."""
    at = table if DTYPE == tl.float16 else table + 8
    if INTERPRETED:
        found = ()
        for s in tl.static_range(4):
            bits = words * 0
            for b in tl.static_range(2):
                code = (words >> ((s // 2) * 16 + (s % 2) * 8 + b * 4)) & 15
                low = (tl.load(at + code // 4) >> (code % 4 * 8)) & 255
                top = (tl.load(at + 4 + code // 4) >> (code % 4 * 8)) & 255
                bits |= (low | (top << 8)) << (b * 16)
            found = (*found, bits)
        return found
    else:
        return tl.inline_asm_elementwise(
            LOOKUP16,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [words, tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3),
             tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _split_lut16(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    a, b, c, d = _lookup16(words, table, DTYPE)
    return _halves(tl.join(tl.join(a, b), tl.join(c, d)), DTYPE)


@triton.jit
def _finish_nothing(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    return value


@triton.jit
def _e8p(code, table):
    """16-bit codes of QuIP#'s E8P -> eight nibbles q, the weights being (q - 7.5) / 2.

    The high byte picks a vector of the codebook, eight odd nibbles o for o/2 - 4. The low byte
    holds signs, o -> 16 - o, that of nibble 0 being flipped if their number p is odd: the flips are
    even in number, and p decides instead whether 1/4 is added or taken off, which makes the odd
    nibbles even.
    """
    signs = code & 255
    p = signs ^ (signs >> 4)
    p = p ^ (p >> 2)
    p = (p ^ (p >> 1)) & 1
    signs = signs ^ p
    signs = (signs | (signs << 12)) & 0x000F000F
    signs = (signs | (signs << 6)) & 0x03030303
    signs = (signs | (signs << 3)) & 0x11111111
    flips = (signs << 1) | (signs << 2) | (signs << 3)
    return tl.load(table + ((code >> 8) & 255)) ^ flips ^ (p | (p << 4) | (p << 8) | (p << 12)
        | (p << 16) | (p << 20) | (p << 24) | (p << 28))  # fmt: skip


@triton.jit
def _nibble_floats(nibbles, DTYPE: tl.constexpr):
    """Nibbles k and k + 4 of a word, neighbours along K: floats too large by 1024 or 128, k
    trailing.
    """
    MAGIC: tl.constexpr = 0x64006400 if DTYPE == tl.float16 else 0x43004300
    return _halves((_shifts(nibbles, 4) & 0x000F000F) | MAGIC, DTYPE)


@triton.jit
def _split_e8p(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Both codes of each word, in units of half a weight: with `finish` only for 2 bits, whole
    otherwise.
    """
    even0, odd0 = _nibble_floats(_e8p(words, table), DTYPE)
    even1, odd1 = _nibble_floats(_e8p(words >> 16, table), DTYPE)
    even, odd = tl.join(even0, even1), tl.join(odd0, odd1)
    if BITS == 2:
        return even, odd
    else:
        OFFSET: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
        if BITS == 4:
            more0, more1 = _e8p(high, table), _e8p(high >> 16, table)
            SHARE: tl.constexpr = 1 / 3.45  # qkernels/formats/quip_sharp.py
            MIDDLE: tl.constexpr = OFFSET + 7.5
        else:
            more0, more1 = (
                tl.load(table + 256 + (high & 255)),
                tl.load(table + 256 + ((high >> 8) & 255)),
            )
            SHARE: tl.constexpr = 1 / 2.04
            MIDDLE: tl.constexpr = OFFSET + 8
        even0, odd0 = _nibble_floats(more0, DTYPE)
        even1, odd1 = _nibble_floats(more1, DTYPE)
        even = (even.to(tl.float32) - (OFFSET + 7.5)) + (
            tl.join(even0, even1).to(tl.float32) - MIDDLE
        ) * SHARE
        odd = (odd.to(tl.float32) - (OFFSET + 7.5)) + (
            tl.join(odd0, odd1).to(tl.float32) - MIDDLE
        ) * SHARE
        return even.to(DTYPE), odd.to(DTYPE)


@triton.jit
def _finish_e8p(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    MAGIC: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
    return (value - MAGIC) - 7.5


@triton.jit
def _split_e4m3(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Sign, exponent and mantissa moved into place; the exponent's bias is left for `finish`."""
    SHIFT: tl.constexpr = 7 if DTYPE == tl.float16 else 4
    pair = _pairs(words, high, BITS)
    return _halves(((pair & 0x00800080) << 8) | ((pair & 0x007F007F) << SHIFT), DTYPE)


@triton.jit
def _finish_e4m3(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    FACTOR: tl.constexpr = 256.0 if DTYPE == tl.float16 else 1.329227995784916e36  # 2^(bias - 7)
    return value * FACTOR


@triton.jit
def _split_e5m2(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    pair = _pairs(words, high, BITS)
    if DTYPE == tl.float16:
        return _halves(pair << 8, DTYPE)
    else:
        return _halves(((pair & 0x00800080) << 8) | ((pair & 0x007F007F) << 5), DTYPE)


@triton.jit
def _finish_e5m2(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    FACTOR: tl.constexpr = 1.0 if DTYPE == tl.float16 else 5.192296858534828e33  # 2^(127 - 15)
    return value * FACTOR


#: (decoder, bits) -> functions; `linear` differs by width
_LINEAR = Decoder(_split_linear, _finish_linear)
BY_NAME = {
    ("linear", 2): _LINEAR,
    ("linear", 3): _LINEAR,
    ("linear", 4): _LINEAR,
    ("linear_real", 2): Decoder(_split_linear, _finish_real),
    ("linear_real", 3): Decoder(_split_linear, _finish_real),
    ("linear_real", 4): Decoder(_split_linear, _finish_real),
    ("linear", 8): Decoder(_split_byte, _finish_byte),
    **{("signed", bits): Decoder(_split_linear, _finish_signed) for bits in (3, 4, 5, 6)},
    ("signed", 8): Decoder(_split_byte, _finish_signed),
    **{("unsigned", bits): Decoder(_split_linear, _finish_unsigned) for bits in (2, 4, 5)},
    **{("half_integer", bits): Decoder(_split_linear, _finish_half_integer) for bits in (2, 3, 4)},
    ("e8p", 2): Decoder(_split_e8p, _finish_e8p),
    ("e8p", 3): Decoder(_split_e8p, _finish_nothing),
    ("e8p", 4): Decoder(_split_e8p, _finish_nothing),
    ("lut16", 4): Decoder(_split_lut16, _finish_nothing),
    ("e4m3", 8): Decoder(_split_e4m3, _finish_e4m3),
    ("e5m2", 8): Decoder(_split_e5m2, _finish_e5m2),
}
