"""How the grid of a product is walked, and how shares of K become one sum: the same for all
formats.
"""

import triton
import triton.language as tl


@triton.jit
def grouped(pid, blocks_n, blocks_m, GROUP_N: tl.constexpr):
    """The blocks of N and of M that program `pid` has. Those that run together share rows of W and
    of x: GROUP_N blocks of N at a time."""
    first_n = pid // (GROUP_N * blocks_m) * GROUP_N
    together = tl.minimum(blocks_n - first_n, GROUP_N)
    return first_n + pid % (GROUP_N * blocks_m) % together, pid % (GROUP_N * blocks_m) // together


@triton.jit
def all_k_slices(acc, pid, blocks, partial_ptr, counter_ptr, SPLIT_K: tl.constexpr):
    """acc (rows, columns), a program's share of its outputs -> the sum of all SPLIT_K in their
    order, and whether this program came last: nobody else has the sum.

    partial: (SPLIT_K, blocks, rows, columns). counter: int32 (blocks), zero before and after.
    """
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    inside = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mine = (tl.program_id(1) * blocks + pid).to(tl.int64) * (ROWS * COLUMNS)
    tl.store(partial_ptr + mine + inside, acc, cache_modifier=".cg")
    tl.debug_barrier()  # all of this program's stores, before one thread says so
    last = tl.atomic_add(counter_ptr + pid, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        tl.store(counter_ptr + pid, 0)  # as the next call wants to find it
        acc = tl.zeros((ROWS, COLUMNS), dtype=acc.dtype)
        for s in range(SPLIT_K):
            theirs = (s * blocks + pid).to(tl.int64) * (ROWS * COLUMNS)
            acc += tl.load(partial_ptr + theirs + inside, cache_modifier=".cg")
    return acc, last
