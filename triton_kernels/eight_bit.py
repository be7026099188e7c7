"""y = x @ W^T + bias, with 8-bit codes of x and W: int8 by int8 in int32, fp8 by fp8 in float32.

One program computes a (BLOCK_N, BLOCK_M) block of y^T = W @ x^T, or the part of it that one K slice
contributes. W is the first operand, because its rows fill the 64 or 128 rows of the tensor core
even if x has few rows. Both operands have K innermost (qkernels/layouts/eight_bit.py;
triton_kernels/activations.py computes the codes of x). A step is 128 bytes of K.

    int8   exact in int32, so the order of the sum over K does not matter
    fp8    each step of 128 is summed separately and added to a float32 total, because sm_90 keeps
           only about 14 bits within a sum (DeepSeek-V3, arXiv 2412.19437). Scales of 128-blocks
           multiply the sum of a step, all other scales the total.

    y = (acc - zero * row_sum) * x_scale * weight_scale + bias

LLM.int8(): the outlier columns are multiplied in 16 bits and added to the total before it is scaled
by weight_scale. The quantizing kernel has left a list of those columns on the device. An element of
such a column with |x| >= threshold has code 0, so x itself is multiplied; of any other element, the
difference between x and its code. The sum equals that of the reference, which multiplies whole
outlier columns in 16 bits, and x needs no second pass that clears codes. BY_ELEMENT
(batch-invariant): only elements with |x| >= threshold are multiplied in 16 bits, so that outliers
of other rows add zeros.

K is split as in weight_only.py: K_SLICES slices of whole steps, summed in order, whether one
program or several compute them.
"""

import triton
import triton.language as tl

from .blocks import INTERPRETED, all_k_slices, grouped
from .launchable import kernel
from .pdl import fetch, launch_dependents, wait_for_previous

STEP = tl.constexpr(128)
#: outlier columns of one 16-bit product
COLUMNS = tl.constexpr(32)


#: PTX: four codes in $2 -> two pairs of 16-bit floats, each code in the upper byte of a float. For
#: E5M2 that is the value. For E4M3, exponent and mantissa are shifted down by one bit, and the
#: result is 2^-8 of the value.
E5M2_HALVES = tl.constexpr("""
prmt.b32 $0, $2, 0, 0x1404;
prmt.b32 $1, $2, 0, 0x3424;
""")
E4M3_HALVES = tl.constexpr("""
{
.reg .b32 low, sign;
prmt.b32 low, $2, 0, 0x1404;
and.b32 sign, low, 0x80008000;
and.b32 low, low, 0x7F007F00;
shr.u32 low, low, 1;
or.b32 $0, low, sign;
prmt.b32 low, $2, 0, 0x3424;
and.b32 sign, low, 0x80008000;
and.b32 low, low, 0x7F007F00;
shr.u32 low, low, 1;
or.b32 $1, low, sign;
}
""")


@triton.jit
def _half(codes, E4M3: tl.constexpr, FINITE: tl.constexpr):
    """fp8 codes (uint8) -> their values, exact in float16. FINITE: no E4M3 code is a NaN."""
    if INTERPRETED:  # triton's interpreter runs no PTX
        bits = codes.to(tl.int16)
        moved = ((bits & 0x80) << 8 | (bits & 0x7F) << 7) if E4M3 else bits << 8
        value = moved.to(tl.float16, bitcast=True)
    else:
        value = tl.inline_asm_elementwise(
            E4M3_HALVES if E4M3 else E5M2_HALVES,
            "=&r,=&r,r",
            [codes],
            tl.float16,
            is_pure=True,
            pack=4,
        )
    if E4M3:
        value *= 256.0
        if not FINITE:
            value = tl.where((codes & 0x7F) == 0x7F, float("nan"), value)
    return value


@triton.jit
def accumulate_codes(
    begin, end, w_rows, x_rows, w_scale_ptr, x_scale_ptr, first_n, m, M, KP,
    KIND: tl.constexpr, BLOCKS: tl.constexpr, WIDEN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The product over steps begin..end-1, (BLOCK_N, BLOCK_M), int32 or float32."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if KIND == "int8" else tl.float32)
    kk = tl.arange(0, STEP)
    for step in range(begin, end):
        k = step * STEP + kk
        if EVEN_K:
            w = tl.load(w_rows + k[None, :])
            x = tl.load(x_rows + k[:, None])
        else:
            w = tl.load(w_rows + k[None, :], mask=(k < KP)[None, :], other=0.0)
            x = tl.load(x_rows + k[:, None], mask=(k < KP)[:, None], other=0.0)
        if KIND == "int8":
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        else:
            if WIDEN:
                part = tl.dot(_half(w, KIND == "e4m3", True), _half(x, True, False))
            else:
                part = tl.dot(w, x)
            if BLOCKS:
                scale = tl.load(x_scale_ptr + step * M + m)[None, :]
                tl.static_assert(BLOCK_N <= STEP)  # the block's rows have one scale
                blocks_k = tl.cdiv(KP, STEP)
                scale *= tl.load(w_scale_ptr + first_n // STEP * blocks_k + step)
                part *= scale
            acc += part
    return acc


@triton.jit
def _outliers(
    acc, scale, w_rows, x_rows, x16_rows, columns_ptr, threshold, K,
    BY_ELEMENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + W's codes times the difference between x and its codes, over the outlier columns."""
    count = tl.load(columns_ptr + K)
    if BY_ELEMENT:
        # One column at a time, because the place of a column in the list depends on the other rows,
        # and so would the order of the sum of a dot. Products of 8 by 16 bits are exact, and zeros
        # change nothing.
        for i in range(0, count):
            k = tl.load(columns_ptr + i)
            x = tl.load(x16_rows + k).to(tl.float32)
            acc += tl.load(w_rows + k).to(tl.float32) * tl.where(tl.abs(x) >= threshold, x, 0.0)
    else:
        DTYPE: tl.constexpr = tl.float32 if UPCAST else x16_rows.dtype.scalar.element_ty
        i = tl.arange(0, COLUMNS)
        for start in range(0, count, COLUMNS):
            live = start + i < count
            k = tl.load(columns_ptr + start + i, mask=live, other=0)
            w = tl.load(w_rows + k[None, :], mask=live[None, :], other=0)
            x = tl.load(x16_rows + k[:, None], mask=live[:, None], other=0).to(tl.float32)
            coded = tl.load(x_rows + k[:, None], mask=live[:, None], other=0).to(tl.float32)
            x -= coded * scale  # an outlier's code is 0
            acc = tl.dot(w.to(tl.float32).to(DTYPE), x.to(DTYPE), acc, input_precision="ieee")
    return acc


@kernel
def eight_bit_gemm(
    x_ptr, weight_ptr, x_scale_ptr, w_scale_ptr, zero_ptr, row_sum_ptr, bias_ptr, x16_ptr,
    columns_ptr, y_ptr, partial_ptr, counter_ptr,
    threshold, M, N, K, KP,
    KIND: tl.constexpr, BLOCKS: tl.constexpr, ONE_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, OUTLIERS: tl.constexpr, BY_ELEMENT: tl.constexpr,
    WIDEN: tl.constexpr, UPCAST: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, K_SLICES: tl.constexpr, SPLIT_K: tl.constexpr,
    GROUP_N: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (M, N) of codes x (M, KP) and weight (N, KP), all row-major. Grid: (blocks of N x of M,
    SPLIT_K).

    x16: (M, K), the unquantized x, for outliers. columns: the list that `quantize_rows` writes.
    KIND: type of the weight's codes. BLOCKS: whether scales are those of 128-blocks; x_scale is
    then (groups, M). ONE_SCALE: whether x_scale is one number instead of (M).
    WIDEN: fp8 codes are passed as uint8 and multiplied as float16, for GPUs without fp8.
    UPCAST: outliers in float32, because triton's interpreter takes bfloat16 for integers.
    EVEN_K: whether KP is a multiple of STEP.
    PREFETCH: steps of W that a program fetches before it waits for x (pdl.py).
    The other arguments are those of `weight_only_gemm`.
    """
    launch_dependents(PDL)
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    pid_n, pid_m = grouped(pid, blocks_n, blocks_m, GROUP_N)
    first_n, first_m = pid_n * BLOCK_N, pid_m * BLOCK_M

    r = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last row; their results are not stored.
    n = tl.minimum(first_n + r, N - 1)
    m = tl.minimum(first_m + c, M - 1)
    w_rows = weight_ptr + n.to(tl.int64)[:, None] * KP
    x_rows = x_ptr + m.to(tl.int64)[None, :] * KP
    steps = tl.cdiv(KP, STEP)
    slice_steps = tl.cdiv(steps, K_SLICES)
    if PDL and PREFETCH > 0:
        step = tl.minimum(tl.program_id(1) * slice_steps + tl.arange(0, PREFETCH), steps - 1)
        fetch(w_rows + step[None, :] * STEP)
    wait_for_previous(PDL)
    if K_SLICES == SPLIT_K:
        begin = tl.program_id(1) * slice_steps
        acc = accumulate_codes(
            begin, tl.minimum(begin + slice_steps, steps), w_rows, x_rows, w_scale_ptr, x_scale_ptr,
            first_n, m, M, KP, KIND, BLOCKS, WIDEN, EVEN_K, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if KIND == "int8" else tl.float32)
        for s in range(K_SLICES):
            begin = s * slice_steps
            acc += accumulate_codes(
                begin, tl.minimum(begin + slice_steps, steps), w_rows, x_rows, w_scale_ptr,
                x_scale_ptr, first_n, m, M, KP, KIND, BLOCKS, WIDEN, EVEN_K, BLOCK_M, BLOCK_N,
            )  # fmt: skip

    last = True
    if SPLIT_K > 1:
        acc, last = all_k_slices(acc, pid, blocks_n * blocks_m, partial_ptr, counter_ptr, SPLIT_K)
    if last:
        if HAS_ZERO:
            acc -= tl.load(row_sum_ptr + n)[:, None] * tl.load(zero_ptr).to(tl.int32)
        y = acc.to(tl.float32)
        if not BLOCKS:
            scale = tl.load(x_scale_ptr + (m * 0 if ONE_SCALE else m))[None, :]
            y *= scale
            if OUTLIERS:
                x16_rows = x16_ptr + m.to(tl.int64)[None, :] * K
                y = _outliers(
                    y, scale, w_rows, x_rows, x16_rows, columns_ptr, threshold, K,
                    BY_ELEMENT, UPCAST,
                )  # fmt: skip
            y *= tl.load(w_scale_ptr + n)[:, None]
        if HAS_BIAS:
            y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
        n = first_n + r
        m = first_m + c
        at = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])
