"""Scalers: functions that load the scales and zero points of a tile. One function per scheme.

A *scale group* is SCALE_GROUP neighbouring features in kernel order that share a scale; a tile has
SCALE_GROUPS of them. A scaler takes
    args          tuple of pointers: the tensors of its row in qkernels/layouts/codecs.py, in order,
                  and `slice_group` if the row has `lookup`
    rows          int32 (BLOCK_N), output features; row_mask says which exist
    kk            int32 (SCALE_GROUPS), first feature of each scale group
    N, K, KP      sizes; KP counts features in kernel order, padding included
    GROUP         constexpr, features per scale (flat scalers: weights of the flattened matrix)
    ROW_GROUP     constexpr, neighbouring rows per scale
    GROUP_LOOKUP  constexpr, whether groups are looked up in `slice_group` (act-order, odd groups)
and returns (scale, zero), each (BLOCK_N, SCALE_GROUPS) in any float or integer dtype. Decoders
without zero points ignore zero. Where the row has zero="min", a scaler returns (scale, min)
instead, for weight = scale * value - min.

The last tile may reach past the last feature. Scalers clamp their indices there, and the kernel
multiplies the resulting weight, which is finite, by x = 0.
"""

import triton
import triton.language as tl


@triton.jit
def _along_k(group_ptr, rows, row_mask, kk, N, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
             GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """(offsets, mask) in a tensor of shape (groups, N / ROW_GROUP)."""
    kk = tl.minimum(kk, KP - 1)
    if GROUP_LOOKUP:
        g = tl.load(group_ptr + kk // 16)
    else:
        g = kk // GROUP
    offsets = g[None, :] * tl.cdiv(N, ROW_GROUP) + rows[:, None] // ROW_GROUP
    return offsets, row_mask[:, None] & (kk >= 0)[None, :]


@triton.jit
def _flattened(rows, row_mask, kk, K, GROUP: tl.constexpr):
    """(block number, mask) in the flattened (N, K) matrix."""
    kk = tl.minimum(kk, K - 1)
    first = rows.to(tl.int64)[:, None] * K + kk[None, :]
    return first // GROUP, row_mask[:, None] & (kk >= 0)[None, :]


@triton.jit
def group(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
          GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """scales and zeros (G, N): GPTQ and AWQ."""
    scales_ptr, zeros_ptr, group_ptr = args
    at, live = _along_k(group_ptr, rows, row_mask, kk, N, KP, GROUP, ROW_GROUP, GROUP_LOOKUP)
    return tl.load(scales_ptr + at, mask=live, other=0), tl.load(zeros_ptr + at, mask=live, other=0)


@triton.jit
def scale(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
          GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """absmax (G, N / ROW_GROUP): NF4 and FP4 with blocks along K, and FP8."""
    at, live = _along_k(args[0], rows, row_mask, kk, N, KP, GROUP, ROW_GROUP, GROUP_LOOKUP)
    absmax = tl.load(args[0] + at, mask=live, other=0)
    return absmax, absmax


@triton.jit
def scale_flat(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
               GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """absmax (blocks of the flattened weight)."""
    block, live = _flattened(rows, row_mask, kk, K, GROUP)
    absmax = tl.load(args[0] + block, mask=live, other=0)
    return absmax, absmax


@triton.jit
def _nested(args, at, block, live):
    """map[absmax] * outer[block / 256] + offset, with absmax uint8: double quantization."""
    absmax_ptr, map_ptr, outer_ptr, offset_ptr = args
    code = tl.load(absmax_ptr + at, mask=live, other=0).to(tl.int32)
    inner = tl.load(map_ptr + code) * tl.load(outer_ptr + block // 256, mask=live, other=0)
    return inner + tl.load(offset_ptr)


@triton.jit
def nested(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
           GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """absmax uint8 (G, N), quantized in turn in blocks of 256. bitsandbytes counts row by row."""
    at, live = _along_k(args[0], rows, row_mask, kk, N, KP, GROUP, ROW_GROUP, GROUP_LOOKUP)
    block, _ = _flattened(rows, row_mask, kk, K, GROUP)
    absmax = _nested(args, at, block, live)
    return absmax, absmax


@triton.jit
def nested_flat(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
                GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """absmax uint8 (blocks of the flattened weight)."""
    block, live = _flattened(rows, row_mask, kk, K, GROUP)
    absmax = _nested(args, block, block, live)
    return absmax, absmax


@triton.jit
def scale_min(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
                GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """d and m float16 (G, N), weight = d * value + m: GGUF's q4_1 and q5_1."""
    at, live = _along_k(args[0], rows, row_mask, kk, N, KP, GROUP, ROW_GROUP, GROUP_LOOKUP)
    d = tl.load(args[0] + at, mask=live, other=0).to(tl.float32)
    return d, -tl.load(args[1] + at, mask=live, other=0).to(tl.float32)


@triton.jit
def e8m0(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
         GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """scales uint8 (G, N), 2^(code - 127): MXFP4. That is the exponent of a bfloat16."""
    at, live = _along_k(args[0], rows, row_mask, kk, N, KP, GROUP, ROW_GROUP, GROUP_LOOKUP)
    code = tl.load(args[0] + at, mask=live, other=0).to(tl.int16)
    bits = tl.where(code > 0, code << 7, 0x0040).to(tl.int16)  # 2^-127 is not a normal number
    s = bits.to(tl.bfloat16, bitcast=True)
    return s, s


@triton.jit
def _block_item(ptr, rows, row_mask, kk, N, KP, COUNT: tl.constexpr, item):
    """Item `item` of the COUNT items of each K-quant block of 256 features.

    The tensor is (blocks of 256 * COUNT, N).
    """
    block = tl.minimum(kk, KP - 1) // 256
    at = (block * COUNT + item)[None, :] * N + rows[:, None]
    return tl.load(ptr + at, mask=row_mask[:, None] & (kk >= 0)[None, :], other=0)


@triton.jit
def q2_k(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
         GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """A byte for 16 features: scale in the low nibble, min in the high nibble."""
    scales_ptr, d_ptr, dmin_ptr = args
    code = _block_item(scales_ptr, rows, row_mask, kk, N, KP, 16, kk % 256 // 16).to(tl.int32)
    d = _block_item(d_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    dmin = _block_item(dmin_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    return d * (code & 15).to(tl.float32), dmin * (code >> 4).to(tl.float32)


@triton.jit
def q3_k(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
         GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """6 bits for 16 features: nibbles in two words (0-7 low, 8-15 high), top bits in a third."""
    scales_ptr, d_ptr = args
    j = kk % 256 // 16
    low = _block_item(scales_ptr, rows, row_mask, kk, N, KP, 3, j % 8 // 4)
    high = _block_item(scales_ptr, rows, row_mask, kk, N, KP, 3, 2)
    low = (low >> (j % 4 * 8 + j // 8 * 4)[None, :]) & 15
    high = (high >> (j % 4 * 8 + j // 4 * 2)[None, :]) & 3
    d = _block_item(d_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    s = d * ((low | (high << 4)) - 32).to(tl.float32)
    return s, s


@triton.jit
def q4_k(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
         GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """6-bit scale and min for 32 features, in three words (qkernels/formats/gguf/types.py)."""
    scales_ptr, d_ptr, dmin_ptr = args
    j = kk % 256 // 32
    shift, late = (j % 4 * 8)[None, :], (j >= 4)[None, :]
    a = _block_item(scales_ptr, rows, row_mask, kk, N, KP, 3, 0) >> shift
    b = _block_item(scales_ptr, rows, row_mask, kk, N, KP, 3, 1) >> shift
    c = _block_item(scales_ptr, rows, row_mask, kk, N, KP, 3, 2) >> shift
    s = tl.where(late, (c & 15) | ((a >> 2) & 48), a & 63)
    m = tl.where(late, ((c >> 4) & 15) | ((b >> 2) & 48), b & 63)
    d = _block_item(d_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    dmin = _block_item(dmin_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    return d * s.to(tl.float32), dmin * m.to(tl.float32)


@triton.jit
def q6_k(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
         GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """An int8 scale for 16 features."""
    scales_ptr, d_ptr = args
    s = _block_item(scales_ptr, rows, row_mask, kk, N, KP, 16, kk % 256 // 16).to(tl.float32)
    s *= _block_item(d_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    return s, s


@triton.jit
def iq4_xs(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
           GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """6 bits for 32 features: low nibbles in a word, top bits in half a word."""
    low_ptr, d_ptr, high_ptr = args
    j = (kk % 256 // 32)[None, :]
    low = (_block_item(low_ptr, rows, row_mask, kk, N, KP, 1, 0) >> (j * 4)) & 15
    high = (_block_item(high_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.int32) >> (j * 2)) & 3
    d = _block_item(d_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    s = d * ((low | (high << 4)) - 32).to(tl.float32)
    return s, s


@triton.jit
def two_level(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
              GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """SpQR: scales and zeros are quantized in turn.

    stats: uint8 (G, N), the code of the scale (low 3 bits) and that of the zero. second_level:
    (G, N / ROW_GROUP, 4), the scale and zero of each: s_s, z_s, s_z, z_z. The zero is no integer,
    so that scale * zero is a min.
    """
    stats_ptr, second_ptr, group_ptr = args
    at, live = _along_k(group_ptr, rows, row_mask, kk, N, KP, GROUP, 1, GROUP_LOOKUP)
    stat = tl.load(stats_ptr + at, mask=live, other=0).to(tl.int32)
    at, live = _along_k(group_ptr, rows, row_mask, kk, N, KP, GROUP, ROW_GROUP, GROUP_LOOKUP)
    s_s = tl.load(second_ptr + at * 4, mask=live, other=0).to(tl.float32)
    z_s = tl.load(second_ptr + at * 4 + 1, mask=live, other=0).to(tl.float32)
    s_z = tl.load(second_ptr + at * 4 + 2, mask=live, other=0).to(tl.float32)
    z_z = tl.load(second_ptr + at * 4 + 3, mask=live, other=0).to(tl.float32)
    s = s_s * ((stat & 7).to(tl.float32) - s_z)
    return s, s * (z_s * ((stat >> 3).to(tl.float32) - z_z))
