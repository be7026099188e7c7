"""Columns of x in kernel order, for weights whose features are sorted by group (act-order)."""

import triton.language as tl

from .launchable import kernel
from .pdl import launch_dependents, wait_for_previous


@kernel
def gather_columns(x_ptr, perm_ptr, y_ptr, K, KP, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y[m, kk] = x[m, perm[kk]], 0 where perm is -1. x (M, K), y (M, KP).

    Grid: (M, blocks of KP).
    """
    launch_dependents(PDL)
    wait_for_previous(PDL)
    kk = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(0).to(tl.int64)
    k = tl.load(perm_ptr + kk, mask=kk < KP, other=-1)
    value = tl.load(x_ptr + m * K + k, mask=k >= 0, other=0)
    tl.store(y_ptr + m * KP + kk, value, mask=kk < KP)
