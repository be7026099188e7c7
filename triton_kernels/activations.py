"""Activations to 8-bit codes: one program quantizes one row of x, optionally after RMSNorm or SiLU.

    SHARED   what shares a scale           codes
    token    a row                         int8 round(x * 127 / absmax), e4m3 x / scale
    group    128 features of a row         e4m3
    tensor   everything, scale is given    int8 round(x / scale) + zero point, e4m3

The arithmetic equals that of qkernels/formats (eightbit.py, fp8.py), operation by operation in
float32, so the codes agree bit for bit: divisions are IEEE divisions, rounding is half to even, fp8
saturates and keeps NaN.

LLM.int8(): an element of at least `threshold` does not count for the absmax, gets code 0, and flags
its column. The program that finishes last, as a counter tells, writes the list of flagged columns
and their number, which the matrix product reads. It leaves flags and counter zero. If rows are
quantized in slices, `outlier_columns` writes that list for all rows first.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .blocks import INTERPRETED
from .launchable import kernel
from .pdl import launch_dependents, wait_for_previous

GROUP = tl.constexpr(128)
#: the smallest scale of a token and the smallest absmax of a group (formats/fp8.py)
TOKEN_FLOOR = tl.constexpr(1 / (448 * 512))
GROUP_AMAX_FLOOR = tl.constexpr(1e-4)


@triton.jit
def _rounded(value):
    """float32 -> the nearest integer, half to even, for |value| < 2^22."""
    if INTERPRETED:
        return (value + 12582912.0) - 12582912.0  # 1.5 * 2^23, where floats are integers
    else:
        # Not the sum above, because a multiplication before it would fuse with it.
        return libdevice.rint(value)


@triton.jit
def _as(value, DTYPE: tl.constexpr):
    """float32 -> its nearest DTYPE, as float32.

    bfloat16 is rounded by its bits, because triton's interpreter truncates.
    """
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    else:
        return value.to(DTYPE).to(tl.float32)


@triton.jit
def e4m3_bits(value):
    """float32 -> E4M3FN codes, uint8, on any GPU: half to even, saturating, NaN stays NaN."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Normal numbers: round to 3 bits of mantissa, then change the exponent's bias from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9, the spacing of floats from 2^14 on.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _e4m3(value, NATIVE: tl.constexpr):
    """float32 -> E4M3FN codes, uint8. NATIVE: whether the GPU has an instruction for it."""
    if NATIVE:
        value = tl.clamp(value, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return e4m3_bits(value)


@triton.jit
def _load(x_row, up_row, k, K, DTYPE: tl.constexpr, GATED: tl.constexpr):
    """A chunk of a row as float32: x, or with GATED silu(x) * up. Each step rounds to DTYPE."""
    x = tl.load(x_row + k, mask=k < K, other=0).to(tl.float32)
    if GATED:
        up = tl.load(up_row + k, mask=k < K, other=0).to(tl.float32)
        x = _as(_as(tl.div_rn(x, 1.0 + tl.exp(-x)), DTYPE) * up, DTYPE)
    return x


@triton.jit
def _normed(x, inverse, norm_ptr, k, K, DTYPE: tl.constexpr, NORM: tl.constexpr):
    """With NORM x / rms(x) * weight, where each step rounds to DTYPE, as in models; else x."""
    if NORM:
        weight = tl.load(norm_ptr + k, mask=k < K, other=0).to(tl.float32)
        x = _as(_as(x * inverse, DTYPE) * weight, DTYPE)
    return x


@triton.jit
def _size(x, threshold, OUTLIERS: tl.constexpr):
    """|x| as integers in the same order, NaN the largest; outliers are 0."""
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if OUTLIERS:
        size = tl.where(tl.abs(x) >= threshold, 0, size)
    return size


@triton.jit
def _codes(x, k, scale, zero, threshold, K, INT8: tl.constexpr, SHARED: tl.constexpr,
           HAS_ZERO: tl.constexpr, OUTLIERS: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Codes of a chunk of a row. x is multiplied by `scale` for int8 per token, else divided."""
    if INT8:
        if SHARED == "token":
            value = _rounded(tl.clamp(x * scale, -127.0, 127.0))
            if OUTLIERS:
                value = tl.where(tl.abs(x) >= threshold, 0.0, value)
        else:
            value = _rounded(tl.clamp(tl.div_rn(x, scale), -1024.0, 1024.0))
            if HAS_ZERO:
                value += zero
            value = tl.where(k < K, tl.clamp(value, -128.0, 127.0), 0.0)
        return value.to(tl.int8)
    else:
        return _e4m3(tl.div_rn(x, scale), NATIVE)


@triton.jit
def _inverse_rms(
    first, x_row, up_row, K, eps, DTYPE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """1 / rms of a row. first: the first chunk of the row."""
    total = tl.sum(first * first, 0)
    for start in range(BLOCK, K, BLOCK):
        more = _load(x_row, up_row, start + tl.arange(0, BLOCK), K, DTYPE, GATED)
        total += tl.sum(more * more, 0)
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total, K.to(tl.float32)) + eps))


@triton.jit
def _flag_columns(x, k, counter_ptr, threshold, K):
    """Flag the columns of a chunk of a row that have an outlier.

    Rows that flag the same column store the same value, so their race does no harm.
    """
    outlier = (tl.abs(x) >= threshold) & (k < K)
    tl.store(counter_ptr + 1 + k, outlier.to(tl.int32), mask=outlier, cache_modifier=".cg")


@triton.jit
def _list_columns(columns_ptr, counter_ptr, M, K, BLOCK: tl.constexpr):
    """The last of M programs writes the flagged columns and their number, and clears the flags."""
    CHUNK: tl.constexpr = min(BLOCK, 2048)  # flags that are summed at a time
    tl.debug_barrier()  # all threads have stored their flags before one thread counts the program
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == M - 1:
        tl.store(counter_ptr, 0)
        count = 0
        for start in range(0, K, CHUNK):
            here = start + tl.arange(0, CHUNK)
            flag = tl.load(counter_ptr + 1 + here, mask=here < K, other=0, cache_modifier=".cg")
            tl.store(columns_ptr + count + tl.cumsum(flag, 0) - flag, here, mask=flag != 0)
            tl.store(counter_ptr + 1 + here, flag * 0, mask=here < K)
            count += tl.sum(flag, 0)
        tl.store(columns_ptr + K, count)


@kernel
def outlier_columns(
    x_ptr, up_ptr, norm_ptr, columns_ptr, counter_ptr, eps, threshold, M, K,
    NORM: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write only the `columns` of `quantize_rows`, for the same operands. Grid: (M)."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    launch_dependents(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    x_row, up_row = x_ptr + row * K, up_ptr + row * K
    k = tl.arange(0, BLOCK)
    x = _load(x_row, up_row, k, K, DTYPE, GATED)
    inverse = 1.0
    if NORM:
        inverse = _inverse_rms(x, x_row, up_row, K, eps, DTYPE, GATED, BLOCK)
    _flag_columns(_normed(x, inverse, norm_ptr, k, K, DTYPE, NORM), k, counter_ptr, threshold, K)
    for start in range(BLOCK, K, BLOCK):
        x = _load(x_row, up_row, start + k, K, DTYPE, GATED)
        x = _normed(x, inverse, norm_ptr, start + k, K, DTYPE, NORM)
        _flag_columns(x, start + k, counter_ptr, threshold, K)
    _list_columns(columns_ptr, counter_ptr, M, K, BLOCK)


@kernel
def quantize_rows(
    x_ptr, up_ptr, q_ptr, scale_ptr, norm_ptr, normed_ptr, zero_ptr, columns_ptr, counter_ptr,
    eps, threshold, M, K, KP,
    INT8: tl.constexpr, SHARED: tl.constexpr, HAS_ZERO: tl.constexpr, OUTLIERS: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x (M, K) -> codes q (M, KP), zeros beyond K, and their scales. Grid: (M).

    A program works on its row in chunks of BLOCK, of which the first stays in registers.

    q: int8, or uint8 with the bits of E4M3.
    scale: float32; (M) per token and (groups, M) per group are written, (1) per tensor is read.
    zero: int8 (1), with HAS_ZERO.
    NORM: RMSNorm with weight `norm` (K) comes first.
    GATED: silu(x) * up is quantized; up is (M, K).
    normed: (M, K), the result of either, written if OUTLIERS > 0.
    columns: int32 (K + 1), written if OUTLIERS is 1: the outlier columns, and at K their number.
    counter: int32 (1 + K), zeros, used if OUTLIERS is 1: the finished programs, and a flag per
        column.
    OUTLIERS: 0: no outliers. 1: outliers, whose columns the kernel lists. 2: outliers, and the
        caller already has the list.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    launch_dependents(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0)
    x_row = x_ptr + row.to(tl.int64) * K
    up_row = up_ptr + row.to(tl.int64) * K
    q_row = q_ptr + row.to(tl.int64) * KP
    k = tl.arange(0, BLOCK)

    first = _load(x_row, up_row, k, K, DTYPE, GATED)
    inverse = 1.0
    if NORM:
        inverse = _inverse_rms(first, x_row, up_row, K, eps, DTYPE, GATED, BLOCK)
    first = _normed(first, inverse, norm_ptr, k, K, DTYPE, NORM)

    scale = 1.0
    if SHARED == "token":
        size = tl.max(_size(first, threshold, OUTLIERS), 0)
        for start in range(BLOCK, K, BLOCK):
            more = _load(x_row, up_row, start + k, K, DTYPE, GATED)
            more = _normed(more, inverse, norm_ptr, start + k, K, DTYPE, NORM)
            size = tl.maximum(size, tl.max(_size(more, threshold, OUTLIERS), 0))
        absmax = size.to(tl.float32, bitcast=True)
        if INT8:
            tl.store(scale_ptr + row, tl.div_rn(absmax, 127.0))
            scale = tl.where(
                size == 0, 0.0, 127.0 * tl.div_rn(1.0, tl.where(size == 0, 1.0, absmax))
            )
        else:
            scale = tl.div_rn(absmax, 448.0)
            scale = tl.where(scale < TOKEN_FLOOR, TOKEN_FLOOR, scale)  # keeps NaN, unlike maximum
            tl.store(scale_ptr + row, scale)
    elif SHARED == "tensor":
        scale = tl.load(scale_ptr)
    zero = 0.0
    if HAS_ZERO:
        zero = tl.load(zero_ptr).to(tl.float32)

    for start in range(0, KP, BLOCK):
        here = start + k
        x = first
        if start > 0:
            x = _load(x_row, up_row, here, K, DTYPE, GATED)
            x = _normed(x, inverse, norm_ptr, here, K, DTYPE, NORM)
        if SHARED == "group":
            x = x.reshape(BLOCK // GROUP, GROUP)
            absmax = tl.max(_size(x, threshold, False), 1).to(tl.float32, bitcast=True)
            scales = tl.div_rn(tl.where(absmax < GROUP_AMAX_FLOOR, GROUP_AMAX_FLOOR, absmax), 448.0)
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)
            tl.store(scale_ptr + group * M + row, scales, mask=group < tl.cdiv(K, GROUP))
            q = _e4m3(tl.div_rn(x, scales[:, None]), NATIVE).reshape(BLOCK)
        else:
            q = _codes(x, here, scale, zero, threshold, K, INT8, SHARED, HAS_ZERO, OUTLIERS, NATIVE)
        tl.store(q_row + here, q, mask=here < KP)
        if OUTLIERS:
            if NORM or GATED:
                tl.store(normed_ptr + row.to(tl.int64) * K + here, x.to(DTYPE), mask=here < K)
            if OUTLIERS == 1:
                _flag_columns(x, here, counter_ptr, threshold, K)

    if OUTLIERS == 1:
        _list_columns(columns_ptr, counter_ptr, M, K, BLOCK)
