"""Scalers: where a tile's scales and zero points come from. One small function each.

A *run* is SCALE_GROUP neighbouring features in kernel order that share a scale; a tile has
SCALE_GROUPS of them. A scaler takes
    args      tuple of pointers, in the order SCALER_TENSORS names them
    rows      int32 (BLOCK_N), output features; row_mask says which exist
    kk        int32 (SCALE_GROUPS), first feature of each run
    N, K, KP  sizes; KP counts features in kernel order, padding included
    GROUP     constexpr, features (flat: flattened weights) per scale
    ROW_GROUP   constexpr, neighbouring rows per scale
    GROUP_LOOKUP    constexpr, whether groups are looked up in `slice_group` (act-order, odd groups)
and returns (scale, zero), each (BLOCK_N, SCALE_GROUPS) in any float or integer dtype; zero is
ignored by decoders that have none. The scalers in HAS_MIN return (scale, minus) instead: weight =
scale * value - minus. The last tile may reach past the last feature: indices are clamped there, and
the kernel multiplies whatever finite weight results with x = 0.
"""

import triton
import triton.language as tl


@triton.jit
def _along_k(group_ptr, rows, row_mask, kk, N, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
             GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """Offsets into a (groups, N / ROW_GROUP) tensor, and which exist."""
    kk = tl.minimum(kk, KP - 1)
    if GROUP_LOOKUP:
        g = tl.load(group_ptr + kk // 16)
    else:
        g = kk // GROUP
    offsets = g[None, :] * tl.cdiv(N, ROW_GROUP) + rows[:, None] // ROW_GROUP
    return offsets, row_mask[:, None] & (kk >= 0)[None, :]


@triton.jit
def _flattened(rows, row_mask, kk, K, GROUP: tl.constexpr):
    """Block number in the flattened (N, K) matrix, and which exist."""
    kk = tl.minimum(kk, K - 1)
    first = rows.to(tl.int64)[:, None] * K + kk[None, :]
    return first // GROUP, row_mask[:, None] & (kk >= 0)[None, :]


@triton.jit
def group(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
          GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """scales and zeros (G, N): GPTQ, AWQ."""
    scales_ptr, zeros_ptr, group_ptr = args
    at, live = _along_k(group_ptr, rows, row_mask, kk, N, KP, GROUP, ROW_GROUP, GROUP_LOOKUP)
    return tl.load(scales_ptr + at, mask=live, other=0), tl.load(zeros_ptr + at, mask=live, other=0)


@triton.jit
def scale(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
          GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """absmax (G, N / ROW_GROUP): NF4 and FP4 with blocks along K, FP8."""
    at, live = _along_k(args[0], rows, row_mask, kk, N, KP, GROUP, ROW_GROUP, GROUP_LOOKUP)
    found = tl.load(args[0] + at, mask=live, other=0)
    return found, found


@triton.jit
def scale_flat(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
               GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """absmax (blocks of the flattened weight)."""
    block, live = _flattened(rows, row_mask, kk, K, GROUP)
    found = tl.load(args[0] + block, mask=live, other=0)
    return found, found


@triton.jit
def _nested(args, at, block, live):
    """map[absmax8] * outer[block / 256] + offset: double quantization."""
    absmax_ptr, map_ptr, outer_ptr, offset_ptr = args
    code = tl.load(absmax_ptr + at, mask=live, other=0).to(tl.int32)
    inner = tl.load(map_ptr + code) * tl.load(outer_ptr + block // 256, mask=live, other=0)
    return inner + tl.load(offset_ptr)


@triton.jit
def nested(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
           GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """absmax uint8 (G, N), in turn quantized in blocks of 256 as bitsandbytes counts them, row by
    row.
    """
    at, live = _along_k(args[0], rows, row_mask, kk, N, KP, GROUP, ROW_GROUP, GROUP_LOOKUP)
    block, _ = _flattened(rows, row_mask, kk, K, GROUP)
    found = _nested(args, at, block, live)
    return found, found


@triton.jit
def nested_flat(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
                GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """absmax uint8 (blocks of the flattened weight)."""
    block, live = _flattened(rows, row_mask, kk, K, GROUP)
    found = _nested(args, block, block, live)
    return found, found


@triton.jit
def scale_min(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
                GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """d and m float16 (G, N), weight = d * value + m: GGUF's q4_1 and q5_1."""
    at, live = _along_k(args[0], rows, row_mask, kk, N, KP, GROUP, ROW_GROUP, GROUP_LOOKUP)
    d = tl.load(args[0] + at, mask=live, other=0).to(tl.float32)
    return d, -tl.load(args[1] + at, mask=live, other=0).to(tl.float32)


@triton.jit
def _of_block(ptr, rows, row_mask, kk, N, KP, COUNT: tl.constexpr, item):
    """Item `item` of the COUNT items of each K-quant's block of 256 features, (256-blocks * COUNT,
    N).
    """
    block = tl.minimum(kk, KP - 1) // 256
    at = (block * COUNT + item)[None, :] * N + rows[:, None]
    return tl.load(ptr + at, mask=row_mask[:, None] & (kk >= 0)[None, :], other=0)


@triton.jit
def q2_k(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
         GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """A byte for 16 features: scale in the low nibble, minimum in the high one."""
    scales_ptr, d_ptr, dmin_ptr = args
    both = _of_block(scales_ptr, rows, row_mask, kk, N, KP, 16, kk % 256 // 16).to(tl.int32)
    d = _of_block(d_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    dmin = _of_block(dmin_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    return d * (both & 15).to(tl.float32), dmin * (both >> 4).to(tl.float32)


@triton.jit
def q3_k(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
         GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """6 bits for 16 features: low nibbles in two words (0-7 low, 8-15 high), top bits in the third."""
    scales_ptr, d_ptr = args
    j = kk % 256 // 16
    low = _of_block(scales_ptr, rows, row_mask, kk, N, KP, 3, j % 8 // 4)
    high = _of_block(scales_ptr, rows, row_mask, kk, N, KP, 3, 2)
    low = (low >> (j % 4 * 8 + j // 8 * 4)[None, :]) & 15
    high = (high >> (j % 4 * 8 + j // 4 * 2)[None, :]) & 3
    d = _of_block(d_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    found = d * ((low | (high << 4)) - 32).to(tl.float32)
    return found, found


@triton.jit
def q4_k(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
         GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """6-bit scale and minimum for 32 features in three words, as qkernels/formats/gguf/types.py
    says.
    """
    d_ptr, dmin_ptr, scales_ptr = args
    j = kk % 256 // 32
    shift, late = (j % 4 * 8)[None, :], (j >= 4)[None, :]
    a = _of_block(scales_ptr, rows, row_mask, kk, N, KP, 3, 0) >> shift
    b = _of_block(scales_ptr, rows, row_mask, kk, N, KP, 3, 1) >> shift
    c = _of_block(scales_ptr, rows, row_mask, kk, N, KP, 3, 2) >> shift
    s = tl.where(late, (c & 15) | ((a >> 2) & 48), a & 63)
    m = tl.where(late, ((c >> 4) & 15) | ((b >> 2) & 48), b & 63)
    d = _of_block(d_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    dmin = _of_block(dmin_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    return d * s.to(tl.float32), dmin * m.to(tl.float32)


@triton.jit
def q6_k(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
         GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """int8 for 16 features."""
    scales_ptr, d_ptr = args
    s = _of_block(scales_ptr, rows, row_mask, kk, N, KP, 16, kk % 256 // 16).to(tl.float32)
    found = _of_block(d_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32) * s
    return found, found


@triton.jit
def iq4_xs(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
           GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """6 bits for 32 features: low nibbles in a word, top bits in half a one."""
    d_ptr, high_ptr, low_ptr = args
    j = (kk % 256 // 32)[None, :]
    low = (_of_block(low_ptr, rows, row_mask, kk, N, KP, 1, 0) >> (j * 4)) & 15
    high = (_of_block(high_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.int32) >> (j * 2)) & 3
    d = _of_block(d_ptr, rows, row_mask, kk, N, KP, 1, 0).to(tl.float32)
    found = d * ((low | (high << 4)) - 32).to(tl.float32)
    return found, found


@triton.jit
def two_level(args, rows, row_mask, kk, N, K, KP, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
              GROUP_LOOKUP: tl.constexpr):  # fmt: skip
    """SpQR: codes of scale (low 3 bits) and zero, uint8 (G, N), and s_s, z_s, s_z, z_z (G, N /
    ROW_GROUP, 4).
    """
    stats_ptr, second_ptr, group_ptr = args
    at, live = _along_k(group_ptr, rows, row_mask, kk, N, KP, GROUP, 1, GROUP_LOOKUP)
    stat = tl.load(stats_ptr + at, mask=live, other=0).to(tl.int32)
    at, live = _along_k(group_ptr, rows, row_mask, kk, N, KP, GROUP, ROW_GROUP, GROUP_LOOKUP)
    s_s = tl.load(second_ptr + at * 4, mask=live, other=0).to(tl.float32)
    z_s = tl.load(second_ptr + at * 4 + 1, mask=live, other=0).to(tl.float32)
    s_z = tl.load(second_ptr + at * 4 + 2, mask=live, other=0).to(tl.float32)
    z_z = tl.load(second_ptr + at * 4 + 3, mask=live, other=0).to(tl.float32)
    return s_s * ((stat & 7).to(tl.float32) - s_z), z_s * ((stat >> 3).to(tl.float32) - z_z)


_ALL = (
    group, scale, scale_flat, nested, nested_flat, two_level, scale_min, q2_k, q3_k, q4_k, q6_k, iq4_xs,
)  # fmt: skip
BY_NAME = {f.__name__: f for f in _ALL}
#: those whose second result is subtracted after scaling
HAS_MIN = frozenset({"scale_min", "q2_k", "q4_k"})
#: those whose second result is a zero point: weight = scale * (value - zero)
HAS_ZERO = frozenset({"group", "two_level"})

#: the tensors each scaler reads, as qkernels/layouts/weight_only.py names them
_NESTED = ("scaler.absmax", "scaler.nested_map", "scaler.nested_absmax", "scaler.offset")
SCALER_TENSORS = {
    "group": ("scaler.scales", "scaler.zeros", "slice_group"),
    "scale": ("scaler.absmax",),
    "scale_min": ("scaler.d", "scaler.m"),
    "q2_k": ("scaler.scales", "scaler.d", "scaler.dmin"),
    "q3_k": ("scaler.scales", "scaler.d"),
    "q4_k": ("scaler.d", "scaler.dmin", "scaler.scales"),
    "q6_k": ("scaler.scales", "scaler.d"),
    "iq4_xs": ("scaler.d", "scaler.scales_h", "scaler.scales_l"),
    "scale_flat": ("scaler.absmax",),
    "nested": _NESTED,
    "nested_flat": _NESTED,
    "two_level": ("scaler.stats", "scaler.second_level", "slice_group"),
}
