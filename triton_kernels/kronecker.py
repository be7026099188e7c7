"""y = post * (A0 (x) C (x) A1 (x) A2) (pre * x) for each row: the orthogonal transforms around the
weights of QuIP and QuIP#.

A row of x is taken as a box with the axes (a0, c, a1, a2). The axis c is multiplied while x is
loaded: each program computes one index of c for ROWS rows. The other axes are padded to powers of
two. One after another is permuted to the end, where a dot multiplies it:

    (.., b0, b1, b2) . A2^T  ->  turn  ->  (.., b2, b0, b1) . A1^T  ->  turn
                                       ->  (.., b1, b2, b0) . A0^T  ->  turn

The factors are exact in tf32. x is split into two tf32 numbers, which keep 22 bits, so each dot is
two products. In effect only the loads and the store round. ROWS is chosen so that each dot has its
smallest size. The other rows of a program do not change the result of a row.
"""

import triton
import triton.language as tl

from .launchable import kernel
from .pdl import launch_dependents, wait_for_previous


@triton.jit
def _odd_bits(i):
    """1 if the number of one bits of i < 2^16 is odd, else 0.

    Element (i, j) of Sylvester's Hadamard matrix is 1 - 2 * _odd_bits(i & j).
    """
    i = i ^ (i >> 8)
    i = i ^ (i >> 4)
    i = i ^ (i >> 2)
    return (i ^ (i >> 1)) & 1


@triton.jit
def _multiplied(box, factor_ptr, A: tl.constexpr, B: tl.constexpr, NEXT: tl.constexpr,
                TOTAL: tl.constexpr, ROWS: tl.constexpr, SYLVESTER: tl.constexpr,
                TRANSPOSED: tl.constexpr):  # fmt: skip
    """Multiply the last axis by a factor, and permute the axis before it to the end.

    A: order of the factor. B: length of the last axis, A padded. NEXT: length of the axis before.
    TOTAL: elements of a row. SYLVESTER: the factor is a Hadamard matrix, which is computed instead
    of loaded. A dense factor of order 1 is +-1.
    """
    if A > 1:
        i, j = tl.arange(0, B), tl.arange(0, B)
        inside = (i < A)[:, None] & (j < A)[None, :]
        if SYLVESTER:
            factor = tl.where(
                inside, 1.0 - 2.0 * _odd_bits(i[:, None] & j[None, :]).to(tl.float32), 0.0
            )
        else:
            at = i[:, None] * A + j[None, :] if TRANSPOSED else j[None, :] * A + i[:, None]
            factor = tl.load(factor_ptr + at, mask=inside, other=0).to(tl.float32)
        box = box.reshape(ROWS * TOTAL // B, B)
        high = (box.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        box = tl.dot(
            box - high, factor, tl.dot(high, factor, input_precision="tf32"), input_precision="tf32"
        )
    elif not SYLVESTER:
        box *= tl.load(factor_ptr).to(tl.float32)
    box = box.reshape(ROWS, TOTAL // B // NEXT, NEXT, B).permute(0, 3, 1, 2)
    return box.reshape(ROWS * TOTAL // NEXT, NEXT)


@kernel
def kronecker_rows(
    x_ptr, y_ptr, pre_ptr, post_ptr, bias_ptr, gather_ptr, scatter_ptr,
    factor0_ptr, factor1_ptr, factor2_ptr, scale, M, STRIDE,
    A0: tl.constexpr, C: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, ROWS: tl.constexpr,
    SYLVESTER: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATHERED: tl.constexpr, SCATTERED: tl.constexpr, CODEBOOK_ORDER: tl.constexpr,
    TRANSPOSED: tl.constexpr, MIDDLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The transform of each row, times `scale`. Grid: (blocks of rows, C).

    x (M, n) and y (M, STRIDE) row-major, n = A0*C*A1*A2. pre, post, bias: (n).
    A0, C, A1, A2: orders of the factors. B0, B1, B2: A0, A1, A2 padded.
    SYLVESTER: all factors but A0 are Hadamard matrices of powers of two; factor0 is read if A0 > 1.
        Otherwise factor0 and factor2 are the factors of A0 and A2, A1 is 1, and the factor of C is
        factor1 with MIDDLE, else 1.
    GATHERED: inner feature i is outer feature gather[i] of x; pre is in the order of x.
    SCATTERED: inner feature i is feature scatter[i] of y; post and bias are in the order of y.
    CODEBOOK_ORDER: y is in the kernel order of codebook codes.
    TRANSPOSED: the factors are transposed.
    """
    N: tl.constexpr = A0 * C * A1 * A2
    TOTAL: tl.constexpr = B0 * B1 * B2
    launch_dependents(PDL)
    wait_for_previous(PDL)
    # (ROWS * B0 * B1, B2): the box in the order of memory, without the axis c
    r = tl.arange(0, ROWS * B0 * B1)
    i0, i1, i2 = r // B1 % B0, r % B1, tl.arange(0, B2)
    m = tl.program_id(0) * ROWS + r // (B0 * B1)
    inside = ((i0 < A0) & (i1 < A1))[:, None] & (i2 < A2)[None, :]
    live = inside & (m < M)[:, None]
    rest = i1[:, None] * A2 + i2[None, :]
    program_c = tl.program_id(1)

    box = tl.zeros((ROWS * B0 * B1, B2), dtype=tl.float32)
    for c in tl.static_range(C):
        source = (i0 * C + c)[:, None] * (A1 * A2) + rest
        if GATHERED:
            source = tl.load(gather_ptr + source, mask=inside, other=0)
        part = tl.load(x_ptr + m.to(tl.int64)[:, None] * N + source, mask=live, other=0).to(
            tl.float32
        )
        if HAS_PRE:
            part *= tl.load(pre_ptr + source, mask=inside, other=0).to(tl.float32)
        if SYLVESTER:
            box += part * (1.0 - 2.0 * _odd_bits(program_c & c).to(tl.float32))
        elif not MIDDLE:
            box += part
        else:
            at = c * C + program_c if TRANSPOSED else program_c * C + c
            box += part * tl.load(factor1_ptr + at).to(tl.float32)
    box = _multiplied(box, factor2_ptr, A2, B2, B1, TOTAL, ROWS, SYLVESTER, TRANSPOSED)
    box = _multiplied(box, factor1_ptr, A1, B1, B0, TOTAL, ROWS, True, TRANSPOSED)
    box = _multiplied(box, factor0_ptr, A0, B0, B2, TOTAL, ROWS, SYLVESTER and A0 == 1, TRANSPOSED)
    box = box.reshape(ROWS * B0 * B1, B2) * scale

    target = (i0 * C + program_c)[:, None] * (A1 * A2) + rest
    if SCATTERED:
        target = tl.load(scatter_ptr + target, mask=inside, other=0)
    if HAS_POST:
        box *= tl.load(post_ptr + target, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        box += tl.load(bias_ptr + target, mask=inside, other=0).to(tl.float32)
    if CODEBOOK_ORDER:  # qkernels/layouts/weight_only.py: codebook_order
        word, s = target % 256 // 16, target % 16 // 8 * 4 + target % 8 // 2
        place = s * 32 + word // 2 % 2 * 16 + word % 2 * 8 + word // 4 * 2 + target % 2
        target = target // 256 * 256 + place
    tl.store(
        y_ptr + m.to(tl.int64)[:, None] * STRIDE + target, box.to(y_ptr.dtype.element_ty), mask=live
    )
