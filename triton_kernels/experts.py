"""Products of rows with the expert each is sent to: mixtures of experts, in one launch for all
experts.

A *slot* is a pair (token, choice), numbered token * TOP_K + choice; each has one expert, and one
row of y. `sort_slots` lists the slots of each expert one after another, each expert's padded to
whole blocks of BLOCK_M, and says whose each block is. What it writes has a fixed size, so nothing
waits for the host:

    expert ids of slots   2 0 | 0 9 | 2 0            9: of another process ("not here")
    slots   (BLOCK_M 2)   1 2 | 5 - | 0 4 | 3 - | unwritten       -: padding, the number of slots
    experts               0     0     2     3     -1              3: EXPERTS, not here: zeros; -1: no block

The products are those of weight_only.py and eight_bit.py, tile by tile the same functions; what is
new is which rows of x a block takes, where its expert's tensors begin (one stride a tensor, layouts
stack experts in a leading dimension), and where rows of y go. K is never split: with experts there
are blocks enough.
"""

import triton
import triton.language as tl

from .blocks import grouped
from .eight_bit import STEP
from .eight_bit import _accumulate as _accumulate_codes
from .launchable import kernel
from .pdl import launch_dependents, wait_for_previous
from .weight_only import _accumulate, _memory_row


@triton.jit
def _bucket(ids_ptr, slot, S, EXPERTS):
    """Experts of slots, EXPERTS for those not here, EXPERTS + 1 where there is no slot."""
    found = tl.load(ids_ptr + slot, mask=slot < S, other=-1)
    bucket = tl.where((found >= 0) & (found < EXPERTS), found, EXPERTS).to(tl.int32)
    return tl.where(slot < S, bucket, EXPERTS + 1)


@kernel
def sort_slots(
    ids_ptr, slots_ptr, experts_ptr, S, EXPERTS, BLOCKS,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ids (S), int32 or int64 -> slots int32 (BLOCKS * BLOCK_M), experts int32 (BLOCKS).

    Each program writes the blocks of one expert, in the order of its slots; so it counts
    everybody's. The last one writes those of slots that are not here, and marks the blocks left
    over. BINS: a power of two from EXPERTS + 2 on. Grid: (EXPERTS + 1).
    """
    launch_dependents(PDL)
    wait_for_previous(PDL)
    mine = tl.program_id(0)
    bins = tl.arange(0, BINS)
    i = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for start in range(0, S, CHUNK):
        counts += tl.histogram(_bucket(ids_ptr, start + i, S, EXPERTS), BINS)
    blocks = tl.where(bins <= EXPERTS, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(bins < mine, blocks, 0), 0)
    own = tl.sum(tl.where(bins == mine, blocks, 0), 0)
    for start in range(0, own, CHUNK):
        tl.store(experts_ptr + first + start + i, i * 0 + mine, mask=start + i < own)
    if mine == EXPERTS:
        for start in range(first + own, BLOCKS, CHUNK):
            tl.store(experts_ptr + start + i, i * 0 - 1, mask=start + i < BLOCKS)

    begin = slots_ptr + first.to(tl.int64) * BLOCK_M
    seen = 0
    for start in range(0, S, CHUNK):
        found = (_bucket(ids_ptr, start + i, S, EXPERTS) == mine).to(tl.int32)
        tl.store(begin + seen + tl.cumsum(found, 0) - found, start + i, mask=found != 0)
        seen += tl.sum(found, 0)
    rest = seen + tl.arange(0, BLOCK_M)
    tl.store(begin + rest, rest * 0 + S, mask=rest < own * BLOCK_M)


@triton.jit
def _place(experts_ptr, slots_ptr, N, BLOCKS, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
           GROUP_N: tl.constexpr):  # fmt: skip
    """This program's block of N, its expert, and its slots. GROUP_N blocks of N run next to each
    other, and share the rows of x and, with the blocks of slots of the same expert, those of W."""
    pid_n, pid_m = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), BLOCKS, GROUP_N)
    slots = tl.load(slots_ptr + pid_m * BLOCK_M + tl.arange(0, BLOCK_M))
    return pid_n, tl.load(experts_ptr + pid_m), slots


@triton.jit
def _of_expert(pointers, strides, expert):
    """Each pointer moved to the expert's part."""
    moved = (pointers[0] + expert * strides[0],)
    for i in tl.static_range(1, len(pointers)):
        # triton has no starred tuples
        moved = moved + (pointers[i] + expert * strides[i],)  # noqa: RUF005
    return moved


@triton.jit
def _store(
    acc, here, expert, rows, slots, bias_ptr, weights_ptr, y_ptr, S, N,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """(acc + bias) * weight of the slot, zeros for slots not here, to the slots' rows of y (S, N)."""
    live = slots < S
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * N + rows, mask=rows < N, other=0).to(tl.float32)[:, None]
    if HAS_WEIGHTS:
        acc *= tl.load(weights_ptr + slots, mask=live, other=0).to(tl.float32)[None, :]
    acc = tl.where(here, acc, 0.0)
    y = y_ptr + slots.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & live[None, :])


@kernel
def experts_weight_only(
    x_ptr, qdata_ptr, qhigh_ptr, perm_ptr, table_ptr, scaler_args, bias_ptr, weights_ptr, y_ptr, slots_ptr,
    experts_ptr, qdata_stride, qhigh_stride, perm_stride, table_stride, scaler_strides,
    S, EXPERTS, BLOCKS, M, PER_ROW, N, K, KP,
    BITS: tl.constexpr, WIDTH: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr, FINISH: tl.constexpr, SCALER: tl.constexpr,
    GROUP: tl.constexpr, ROW_GROUP: tl.constexpr, SCALE_GROUP: tl.constexpr, GROUP_LOOKUP: tl.constexpr, HAS_MIN: tl.constexpr,
    ZERO: tl.constexpr, PERMUTED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, POST_SCALE: tl.constexpr,
    LAST_SCALE: tl.constexpr, UPCAST: tl.constexpr, WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr, WARPS: tl.constexpr,
    OUTLIERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (M, K), one row for PER_ROW slots; y (S, N); bias (EXPERTS, N); weights (S). The rest as
    weight_only_gemm. Grid: (blocks of N x BLOCKS)."""
    launch_dependents(PDL)
    wait_for_previous(PDL)
    pid_n, expert, slots = _place(experts_ptr, slots_ptr, N, BLOCKS, BLOCK_M, BLOCK_N, GROUP_N)
    if expert < 0:
        return
    here = expert < EXPERTS
    e = tl.minimum(expert, EXPERTS - 1).to(tl.int64)
    tiles = tl.where(here, tl.cdiv(KP, 16 * (32 // WIDTH)), 0)
    scalers = _of_expert(scaler_args, scaler_strides, e)
    # `outlier_args` of a kernel without outliers is never looked at; the scaler's stand in.
    acc = _accumulate(
        0, tiles, 0, scalers, x_ptr,
        x_ptr, qdata_ptr + e * qdata_stride, qhigh_ptr + e * qhigh_stride, perm_ptr + e * perm_stride,
        table_ptr + e * table_stride, scalers, pid_n, tl.where(slots < S, slots // PER_ROW, M), M, N, K, KP,
        BITS, WIDTH, HIGH, STEP, SPLIT, FINISH, SCALER,
        GROUP, ROW_GROUP, SCALE_GROUP, GROUP_LOOKUP, HAS_MIN, ZERO, False, PERMUTED, POST_SCALE, LAST_SCALE, UPCAST, WAIT,
        BLOCK_M, BLOCK_N, WARPS, OUTLIERS, 1,
    )  # fmt: skip
    rows = pid_n * BLOCK_N + _memory_row(tl.arange(0, BLOCK_N), BLOCK_N, WARPS)
    _store(acc, here, e, rows, slots, bias_ptr, weights_ptr, y_ptr, S, N, HAS_BIAS, HAS_WEIGHTS)


@kernel
def experts_eight_bit(
    x_ptr, weight_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, weights_ptr, y_ptr, slots_ptr, experts_ptr,
    weight_stride, w_scale_stride, S, EXPERTS, BLOCKS, M, PER_ROW, N, KP,
    KIND: tl.constexpr, BLOCK_SCALES: tl.constexpr, WIDEN: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (M, KP) codes, one row for PER_ROW slots, x_scale (M) or with BLOCK_SCALES (groups, M). The
    rest as eight_bit_gemm and above. Grid: (blocks of N x BLOCKS)."""
    launch_dependents(PDL)
    wait_for_previous(PDL)
    pid_n, expert, slots = _place(experts_ptr, slots_ptr, N, BLOCKS, BLOCK_M, BLOCK_N, GROUP_N)
    if expert < 0:
        return
    here = expert < EXPERTS
    e = tl.minimum(expert, EXPERTS - 1).to(tl.int64)
    rows = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end are the last one again, padding is row 0; what comes of them is not stored.
    n = tl.minimum(rows, N - 1)
    m = tl.where(slots < S, slots // PER_ROW, 0)
    w_rows = weight_ptr + e * weight_stride + n.to(tl.int64)[:, None] * KP
    x_rows = x_ptr + m.to(tl.int64)[None, :] * KP
    w_scale_ptr += e * w_scale_stride
    acc = _accumulate_codes(
        0, tl.where(here, tl.cdiv(KP, STEP), 0), w_rows, x_rows, w_scale_ptr, x_scale_ptr, pid_n * BLOCK_N, n,
        m, M, KP, KIND, BLOCK_SCALES, WIDEN, EVEN_K, BLOCK_M, BLOCK_N,
    ).to(tl.float32)  # fmt: skip
    if not BLOCK_SCALES:
        acc *= tl.load(x_scale_ptr + m)[None, :]
        acc *= tl.load(w_scale_ptr + n)[:, None]
    _store(acc, here, e, rows, slots, bias_ptr, weights_ptr, y_ptr, S, N, HAS_BIAS, HAS_WEIGHTS)


@kernel
def gate(h_ptr, y_ptr, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y (S, N) = activation(h[:, :N]) * h[:, N:], h (S, 2 * N). Grid: (S, blocks of N)."""
    launch_dependents(PDL)
    wait_for_previous(PDL)
    slot = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = h_ptr + slot * (2 * N) + n
    value = tl.load(row, mask=n < N, other=0).to(tl.float32)
    if ACTIVATION == "silu":
        value = value * tl.div_rn(1.0, 1.0 + tl.exp(-value))
    else:
        value = value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    value *= tl.load(row + N, mask=n < N, other=0).to(tl.float32)
    tl.store(y_ptr + slot * N + n, value.to(y_ptr.dtype.element_ty), mask=n < N)


@kernel
def combine(h_ptr, weights_ptr, y_ptr, TOP_K, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y (T, N) = sum of weights (T, TOP_K) times h (T, TOP_K, N), in order. Grid: (T, blocks of N)."""
    launch_dependents(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(TOP_K):
        slot = token * TOP_K + choice
        h = tl.load(h_ptr + slot * N + n, mask=n < N, other=0).to(tl.float32)
        total += h * tl.load(weights_ptr + slot).to(tl.float32)
    tl.store(y_ptr + token * N + n, total.to(y_ptr.dtype.element_ty), mask=n < N)
