"""Functions that all matrix products share: the order of the grid and the sum over K slices."""

import os

import triton
import triton.language as tl

#: whether triton's interpreter runs the kernels; it knows no inline PTX
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def grouped(pid, blocks_n, blocks_m, GROUP_N: tl.constexpr):
    """(pid_n, pid_m): the block of N and the block of M of program `pid`.

    Programs go over GROUP_N blocks of N at a time, so that those that run at the same time read the
    same rows of W and of x.
    """
    first_n = pid // (GROUP_N * blocks_m) * GROUP_N
    group_n = tl.minimum(blocks_n - first_n, GROUP_N)
    return first_n + pid % (GROUP_N * blocks_m) % group_n, pid % (GROUP_N * blocks_m) // group_n


@triton.jit
def all_k_slices(acc, pid, blocks, partial_ptr, counter_ptr, SPLIT_K: tl.constexpr):
    """(acc, last): the sum of all K slices in their order, and whether this program finished last.

    Only the program that finished last gets the sum. acc: (rows, columns), the outputs of this
    program's K slice. partial: (SPLIT_K, blocks, rows, columns), scratch memory. counter: int32
    (blocks), zero before and after.
    """
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    element = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    block = (tl.program_id(1) * blocks + pid).to(tl.int64) * (ROWS * COLUMNS)
    tl.store(partial_ptr + block + element, acc, cache_modifier=".cg")
    tl.debug_barrier()  # all threads have stored before one thread counts the program
    last = tl.atomic_add(counter_ptr + pid, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        tl.store(counter_ptr + pid, 0)  # the next call expects zero
        acc = tl.zeros((ROWS, COLUMNS), dtype=acc.dtype)
        for s in range(SPLIT_K):
            slice_block = (s * blocks + pid).to(tl.int64) * (ROWS * COLUMNS)
            acc += tl.load(partial_ptr + slice_block + element, cache_modifier=".cg")
    return acc, last


@triton.jit
def widened(value):
    """bfloat16 -> float32 by its bits: the conversion of triton's interpreter loses subnormals."""
    return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
