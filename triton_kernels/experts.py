"""Mixtures of experts: every row of x times the matrix of its expert, one launch for all experts.

A *slot* is a pair (token, choice), numbered token * TOP_K + choice. Each slot has one expert and
one row of y. `sort_slots` lists the slots expert by expert, pads the slots of each expert to whole
blocks of BLOCK_M, and writes the expert of each block. The rows of y of slots that are not here
become zeros. The outputs have fixed sizes, so the host waits for nothing:

    expert ids of slots   2 0 | 0 9 | 2 0            9: expert of another process ("not here")
    slots   (BLOCK_M 2)   1 2 | 5 - | 0 4 | 3 - | unwritten       -: padding, the number of slots
    experts               0     0     2     3     -1              3: EXPERTS, not here; -1: no block

The products call the same functions for each tile as weight_only.py and eight_bit.py. Three things
differ: which rows of x a block reads, where the tensors of its expert begin (layouts stack experts
in a leading dimension, so there is one stride per tensor), and where the rows of y are stored. K is
never split, because experts give blocks enough.
"""

import triton
import triton.language as tl

from .blocks import grouped
from .eight_bit import STEP, accumulate_codes
from .launchable import kernel
from .pdl import launch_dependents, wait_for_previous
from .weight_only import accumulate, memory_row


@triton.jit
def _bucket(ids_ptr, slot, S, EXPERTS):
    """Experts of slots: EXPERTS for those not here, EXPERTS + 1 where there is no slot."""
    expert = tl.load(ids_ptr + slot, mask=slot < S, other=-1)
    bucket = tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS).to(tl.int32)
    return tl.where(slot < S, bucket, EXPERTS + 1)


@kernel
def sort_slots(
    ids_ptr, slots_ptr, experts_ptr, S, EXPERTS, BLOCKS,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ids (S), int32 or int64 -> slots int32 (BLOCKS * BLOCK_M), experts int32 (BLOCKS).

    Each program writes the blocks of one expert, with its slots in order. To know where they begin,
    it counts the slots of every expert. The last program writes the slots that are not here and
    marks the unused blocks. BINS: a power of two, at least EXPERTS + 2. Grid: (EXPERTS + 1).
    """
    launch_dependents(PDL)
    wait_for_previous(PDL)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    i = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for start in range(0, S, CHUNK):
        counts += tl.histogram(_bucket(ids_ptr, start + i, S, EXPERTS), BINS)
    blocks = tl.where(bins <= EXPERTS, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(bins < expert, blocks, 0), 0)
    count = tl.sum(tl.where(bins == expert, blocks, 0), 0)
    for start in range(0, count, CHUNK):
        tl.store(experts_ptr + first + start + i, i * 0 + expert, mask=start + i < count)
    if expert == EXPERTS:
        for start in range(first + count, BLOCKS, CHUNK):
            tl.store(experts_ptr + start + i, i * 0 - 1, mask=start + i < BLOCKS)

    begin = slots_ptr + first.to(tl.int64) * BLOCK_M
    written = 0
    for start in range(0, S, CHUNK):
        flag = (_bucket(ids_ptr, start + i, S, EXPERTS) == expert).to(tl.int32)
        tl.store(begin + written + tl.cumsum(flag, 0) - flag, start + i, mask=flag != 0)
        written += tl.sum(flag, 0)
    padding = written + tl.arange(0, BLOCK_M)
    tl.store(begin + padding, padding * 0 + S, mask=padding < count * BLOCK_M)


@triton.jit
def _place(experts_ptr, slots_ptr, N, BLOCKS, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
           GROUP_N: tl.constexpr):  # fmt: skip
    """(pid_n, expert, slots): this program's block of N, its expert and its slots.

    GROUP_N blocks of N run next to each other, because they read the same rows of x, and blocks of
    slots of the same expert read the same rows of W.
    """
    pid_n, pid_m = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), BLOCKS, GROUP_N)
    slots = tl.load(slots_ptr + pid_m * BLOCK_M + tl.arange(0, BLOCK_M))
    return pid_n, tl.load(experts_ptr + pid_m), slots


@triton.jit
def _expert_pointers(pointers, strides, expert):
    """Each pointer, moved to the expert's part of its tensor."""
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
    """Store (acc + bias) * weight of the slot in the slots' rows of y (S, N).

    acc (rows, slots). here: whether the expert is one of this process; if not, stores zeros.
    """
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
    x_ptr, weight_args, scaler_args, bias_ptr, weights_ptr, y_ptr, slots_ptr, experts_ptr,
    weight_strides, scaler_strides, S, EXPERTS, BLOCKS, M, PER_ROW, N, K, KP,
    TRAITS: tl.constexpr, METHOD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr, WARPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x (M, K), one row for PER_ROW slots; y (S, N); bias (EXPERTS, N); weights (S), of the slots.

    weight_strides, scaler_strides: for each tensor of weight_args and scaler_args, the elements
    from one expert to the next. The other arguments are those of `weight_only_gemm`. Grid: (blocks
    of N x BLOCKS).
    """
    launch_dependents(PDL)
    wait_for_previous(PDL)
    pid_n, expert, slots = _place(experts_ptr, slots_ptr, N, BLOCKS, BLOCK_M, BLOCK_N, GROUP_N)
    if expert < 0:
        return
    here = expert < EXPERTS
    e = tl.minimum(expert, EXPERTS - 1).to(tl.int64)
    tiles = tl.where(here, tl.cdiv(KP, TRAITS.tile), 0)
    scalers = _expert_pointers(scaler_args, scaler_strides, e)
    weight = _expert_pointers(weight_args, weight_strides, e)
    m = tl.where(slots < S, slots // PER_ROW, M)
    # Experts have no outliers, so outlier_args and sparse_x_ptr are never read: others stand in.
    acc = accumulate(
        0, tiles, 0, x_ptr, weight, scalers, scalers, x_ptr, pid_n, m, M, N, K, KP,
        TRAITS, METHOD, BLOCK_M, BLOCK_N, WARPS, 1,
    )  # fmt: skip
    rows = pid_n * BLOCK_N + memory_row(tl.arange(0, BLOCK_N), BLOCK_N, WARPS)
    _store(acc, here, e, rows, slots, bias_ptr, weights_ptr, y_ptr, S, N, HAS_BIAS, HAS_WEIGHTS)


@kernel
def experts_eight_bit(
    x_ptr, weight_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, weights_ptr, y_ptr, slots_ptr,
    experts_ptr, weight_stride, w_scale_stride, S, EXPERTS, BLOCKS, M, PER_ROW, N, KP,
    KIND: tl.constexpr, BLOCK_SCALES: tl.constexpr, WIDEN: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (M, KP), codes, one row for PER_ROW slots; x_scale (M), or (groups, M) with BLOCK_SCALES.

    The other arguments are those of `eight_bit_gemm` and `experts_weight_only`. Grid: (blocks of N
    x BLOCKS).
    """
    launch_dependents(PDL)
    wait_for_previous(PDL)
    pid_n, expert, slots = _place(experts_ptr, slots_ptr, N, BLOCKS, BLOCK_M, BLOCK_N, GROUP_N)
    if expert < 0:
        return
    here = expert < EXPERTS
    e = tl.minimum(expert, EXPERTS - 1).to(tl.int64)
    rows = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end repeat the last row of W, and padding reads row 0 of x. Neither is stored.
    n = tl.minimum(rows, N - 1)
    m = tl.where(slots < S, slots // PER_ROW, 0)
    w_rows = weight_ptr + e * weight_stride + n.to(tl.int64)[:, None] * KP
    x_rows = x_ptr + m.to(tl.int64)[None, :] * KP
    w_scale_ptr += e * w_scale_stride
    steps = tl.where(here, tl.cdiv(KP, STEP), 0)
    acc = accumulate_codes(
        0, steps, w_rows, x_rows, w_scale_ptr, x_scale_ptr, pid_n * BLOCK_N, m, M, KP, KIND,
        BLOCK_SCALES, WIDEN, EVEN_K, BLOCK_M, BLOCK_N,
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
    """y (T, N) = sum over choices of weights (T, TOP_K) * h (T, TOP_K, N), in their order.

    Grid: (T, blocks of N).
    """
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
