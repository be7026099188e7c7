"""Decoders: packed words -> values, exact in float16 and bfloat16, before scaling.

A decoder is two small functions, which the kernel gets at compile time. The rows of
qkernels/layouts/codecs.py name them:

    split_...(words, high, table, BITS, DTYPE)
        words, high   words of qkernels/layouts/weight_only.py; `high` is the plane of high bits,
                      for 3, 5 and 6 bits
        Returns the values of features 2i and those of features 2i+1 as DTYPE, with the bits of s as
        trailing dimensions of 2, lowest bit first. The values may be off by a constant.
    finish_...(value, zero, BITS, DTYPE)
        Subtracts that constant and the zero point.

Integer codes become floats without a conversion instruction. OR-ing a code into the low mantissa
bits of 2^m (m = 10 in float16, 7 in bfloat16) gives the float 2^m + code, in both halves of a word
at once.

Two things need PTX, because triton has no operation for them: taking a register for two 16-bit
floats, and looking up bytes in registers. Triton's interpreter cannot run PTX, so it runs the same
arithmetic in triton operations. The tests run the PTX in a small interpreter
(tests/kernels/ptx.py).
"""

import triton
import triton.language as tl

from .blocks import INTERPRETED, widened

#: PTX: $0, $1 = the halves of $2
HALVES = tl.constexpr("mov.b32 {$0, $1}, $2;")

#: PTX: the eight nibbles of $4 -> eight 16-bit entries of a table of 16, in four pairs. $5..$8 hold
#: the low bytes of entries 0-3, 4-7, 8-11, 12-15, and $9..$12 the high bytes. The low three bits of
#: four nibbles select four bytes out of eight (prmt). The fourth bit then selects between entries
#: 0-7 and 8-15 (a second prmt).
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
    """word >> s*WIDTH for s in 0..16/WIDTH-1.

    The bits of s are the trailing dimensions, the lowest bit first.
    """
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
def split_linear(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes plus 1024 (float16, up to 8 bits) or 128 (bfloat16, up to 7 bits)."""
    MAGIC: tl.constexpr = 0x64006400 if DTYPE == tl.float16 else 0x43004300
    return _halves(_pairs(words, high, BITS) | MAGIC, DTYPE)


@triton.jit
def finish_linear(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    OFFSET: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
    return value - (zero + OFFSET).to(value.dtype)


@triton.jit
def split_byte(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """8-bit codes plus 1024 in float16, minus 128 in bfloat16.

    bfloat16 has 7 bits of mantissa, so the top bit of a code selects the number to subtract:

        code < 128:  (128 + code)       - 256        code >= 128:  (128 + code - 128) - 128
    """
    if DTYPE == tl.float16:
        return split_linear(words, high, table, BITS, DTYPE)
    else:
        pair = _pairs(words, high, BITS)
        low, odd = _halves((pair & 0x007F007F) | 0x43004300, DTYPE)
        from_low, from_odd = _halves((pair & 0x00800080) ^ 0x43804380, DTYPE)  # 256 or 128
        if INTERPRETED:  # triton's interpreter takes bfloat16 for integers
            low, odd = widened(low) - widened(from_low), widened(odd) - widened(from_odd)
            return low.to(DTYPE), odd.to(DTYPE)
        else:
            return low - from_low, odd - from_odd


@triton.jit
def finish_byte(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    OFFSET: tl.constexpr = 1024.0 if DTYPE == tl.float16 else -128.0
    return value - (zero + OFFSET).to(value.dtype)


@triton.jit
def finish_signed(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Signed codes: code - 2^(BITS-1)."""
    MAGIC: tl.constexpr = 1024.0 if DTYPE == tl.float16 else (-128.0 if BITS == 8 else 128.0)
    return value - (MAGIC + (1 << (BITS - 1)))


@triton.jit
def finish_unsigned(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Unsigned codes, of at most 5 bits: the code itself."""
    MAGIC: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
    return value - MAGIC


@triton.jit
def finish_half_integer(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Half-integer codes: code - (2^BITS - 1) / 2, in two exact steps."""
    MAGIC: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
    return (value - MAGIC) - ((1 << BITS) - 1) * 0.5


@triton.jit
def _lookup16(words, table, DTYPE: tl.constexpr):
    """words -> four tiles of pairs of table entries. table: as `lut` of the layout packs it."""
    at = table if DTYPE == tl.float16 else table + 8
    if INTERPRETED:
        pairs = ()
        for s in tl.static_range(4):
            bits = words * 0
            for b in tl.static_range(2):
                code = (words >> ((s // 2) * 16 + (s % 2) * 8 + b * 4)) & 15
                low = (tl.load(at + code // 4) >> (code % 4 * 8)) & 255
                top = (tl.load(at + 4 + code // 4) >> (code % 4 * 8)) & 255
                bits |= (low | (top << 8)) << (b * 16)
            pairs = (*pairs, bits)
        return pairs
    else:
        return tl.inline_asm_elementwise(
            LOOKUP16,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [words, tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3),
             tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def split_lut16(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    a, b, c, d = _lookup16(words, table, DTYPE)
    return _halves(tl.join(tl.join(a, b), tl.join(c, d)), DTYPE)


@triton.jit
def finish_nothing(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    return value


@triton.jit
def _e8p(code, table):
    """16-bit codes of QuIP#'s E8P -> eight nibbles q; the weights are (q - 7.5) / 2.

    The high byte is the index of a codebook entry: eight odd nibbles o, each for the value o/2 - 4.
    The low byte holds their signs; a negative sign replaces o by 16 - o. Let p be 1 if the number
    of signs is odd. If so, the sign of nibble 0 is flipped, which makes the number of sign changes
    even. p also selects whether 1/4 is added to or subtracted from the weights, which turns odd
    nibbles into even ones.
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
    """Nibbles k and k + 4 of a word, neighbours along K -> floats, too large by 1024 or 128.

    k is the trailing dimensions.
    """
    MAGIC: tl.constexpr = 0x64006400 if DTYPE == tl.float16 else 0x43004300
    return _halves((_shifts(nibbles, 4) & 0x000F000F) | MAGIC, DTYPE)


@triton.jit
def split_e8p(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Both codes of each word, in units of half a weight.

    2 bits a weight: too large by a constant, which `finish` subtracts. 3 and 4 bits: final values,
    the residual's code included.
    """
    even0, odd0 = _nibble_floats(_e8p(words, table), DTYPE)
    even1, odd1 = _nibble_floats(_e8p(words >> 16, table), DTYPE)
    even, odd = tl.join(even0, even1), tl.join(odd0, odd1)
    if BITS == 2:
        return even, odd
    else:
        OFFSET: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
        if BITS == 4:
            residual0, residual1 = _e8p(high, table), _e8p(high >> 16, table)
            RESIDUAL: tl.constexpr = 1 / 3.45  # qkernels/formats/quip_sharp.py
            MIDDLE: tl.constexpr = OFFSET + 7.5
        else:
            residual0, residual1 = (
                tl.load(table + 256 + (high & 255)),
                tl.load(table + 256 + ((high >> 8) & 255)),
            )
            RESIDUAL: tl.constexpr = 1 / 2.04
            MIDDLE: tl.constexpr = OFFSET + 8
        even0, odd0 = _nibble_floats(residual0, DTYPE)
        even1, odd1 = _nibble_floats(residual1, DTYPE)
        even = (even.to(tl.float32) - (OFFSET + 7.5)) + (
            tl.join(even0, even1).to(tl.float32) - MIDDLE
        ) * RESIDUAL
        odd = (odd.to(tl.float32) - (OFFSET + 7.5)) + (
            tl.join(odd0, odd1).to(tl.float32) - MIDDLE
        ) * RESIDUAL
        return even.to(DTYPE), odd.to(DTYPE)


@triton.jit
def finish_e8p(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    MAGIC: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
    return (value - MAGIC) - 7.5


@triton.jit
def split_e4m3(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Sign, exponent and mantissa, moved into place. `finish` corrects the exponent's bias."""
    SHIFT: tl.constexpr = 7 if DTYPE == tl.float16 else 4
    pair = _pairs(words, high, BITS)
    return _halves(((pair & 0x00800080) << 8) | ((pair & 0x007F007F) << SHIFT), DTYPE)


@triton.jit
def finish_e4m3(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    FACTOR: tl.constexpr = 256.0 if DTYPE == tl.float16 else 1.329227995784916e36  # 2^(bias - 7)
    return value * FACTOR


@triton.jit
def split_e5m2(words, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    pair = _pairs(words, high, BITS)
    if DTYPE == tl.float16:
        return _halves(pair << 8, DTYPE)
    else:
        return _halves(((pair & 0x00800080) << 8) | ((pair & 0x007F007F) << 5), DTYPE)


@triton.jit
def finish_e5m2(value, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    FACTOR: tl.constexpr = 1.0 if DTYPE == tl.float16 else 5.192296858534828e33  # 2^(127 - 15)
    return value * FACTOR
