"""Launches the weight-only GEMM of csrc/weight_only/gemm.h, for 17 rows of x and more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import layouts
from ...layouts import weight_only as layout
from ...layouts.codecs import CodeKind
from .. import workspace
from ..device import sm_count
from ..plan import Plan, Symbolic
from ..weight_only import traits_of
from . import k_slices, launch, transforms
from . import weight_only as decode
from .calls import WeightOnlyCall

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: as in csrc/weight_only/gemm.h
ROWS, STAGES, THREADS = 64, 4, 128


def columns_of(codes: CodeKind) -> int:
    """Rows of x of a block: fewer if tiles are long."""
    return 32 if codes.tile == 256 else 64


def shared_bytes(codes: CodeKind) -> int:
    """Shared memory of a block: a codebook, and for each stage codes, their high bits, and x."""
    words, x = ROWS * (64 + 4 * codes.high_words), 2 * columns_of(codes) * codes.tile
    return 4 * codes.book_words + STAGES * (words + x)


def rejects(problem: Problem) -> str | None:
    """Why this kernel does not take the problem, or None."""
    if decode.rejects(problem) is None:
        return "the decode kernel takes these"
    return decode.unsupported(problem)


def declare(plan: Plan, p: PackedWeight, problem: Problem) -> None:
    """A `launch.Declare`.

    If x must be copied or transformed, that is done for a slice of its rows at a time. The
    number of split-K slices depends on all rows of the problem, so slices of rows change no bit.
    """
    assert p.layout == layouts.WEIGHT_ONLY
    traits = traits_of(problem)
    x, bias = plan.operands
    call = decode.call_of(p, traits, x.dtype, kernel=1)
    count = k_slices_for(problem, x.device)
    call.args.k_slice = k_slices.steps_of(call.args.tiles, count)

    def multiply(x: Symbolic, bias: Symbolic | None, y: Symbolic) -> None:
        _launch(plan, x, y, p, bias, call, traits, count)

    def rows(x: Symbolic, y: Symbolic) -> None:
        transforms.around(plan, multiply, x, p, bias, traits, y)

    plan.by_rows(rows, x, plan.y)


run = launch.whole(declare)


def _launch(
    plan: Plan,
    x: Symbolic,
    y: Symbolic,
    p: PackedWeight,
    bias: Symbolic | None,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
    count: int,
) -> None:
    """Declare the kernel's launch with `count` split-K slices on some rows, without transforms.

    x is in the order of codes. y is in x's dtype, or in float32 if a transform follows.
    """
    m, n = y.shape
    columns = columns_of(traits.codes)
    blocks = -(-n // ROWS) * -(-m // columns)
    call.grid_x, call.grid_y, call.threads = blocks, count, THREADS
    call.shared = shared_bytes(traits.codes)
    scratch: list[Symbolic] = []
    if count > 1:
        scratch = decode.partial_sums(plan, call.args, count * blocks * ROWS * columns, blocks)
    start(plan, x, y, p, bias, call, traits, scratch)


def start(
    plan: Plan,
    x: Symbolic,
    y: Symbolic,
    p: PackedWeight,
    bias: Symbolic | None,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
    scratch: list[Symbolic],
) -> None:
    """Start a kernel that reads x in 16-byte chunks, on some rows. scratch: what else it writes."""
    args = call.args
    reads: list[Any] = [*p.storage.values(), *([] if bias is None else [bias])]
    if traits.outliers:
        columns_x = _by_columns(plan, x)
        args.x_columns, args.x_rows = columns_x.data_ptr(), columns_x.shape[1]
        reads.append(columns_x)
    x = _in_chunks(plan, x, p.storage.get("perm"))
    args.m, args.x, args.y, args.x_stride = y.shape[0], x.data_ptr(), y.data_ptr(), x.shape[1]
    args.bias = None if bias is None else bias.data_ptr()
    launch.start(plan, decode.kernel_of(traits), call, [x, *reads], [y, *scratch])


def _in_chunks(plan: Plan, x: Symbolic, perm: Tensor | None) -> Symbolic:
    """x in kernel order with rows of whole 16-byte chunks; gathered or padded only if needed."""
    if perm is None and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    k = x.shape[1] if perm is None else perm.numel()
    y = plan.empty((x.shape[0], -(-k // 8) * 8), x.dtype)
    if perm is None:
        plan.by_torch(_padded, x, y)
    else:
        index, pad = plan.empty(tuple(perm.shape), perm.dtype), plan.empty((k,), torch.bool)
        plan.by_torch(_gathered, x, perm, index, pad, y)
    return y


def _padded(x: Tensor, y: Tensor) -> None:
    """Copy x to y, whose rows may be longer: zeros are after x's features."""
    y[:, : x.shape[1]] = x
    y[:, x.shape[1] :] = 0


def _gathered(x: Tensor, perm: Tensor, index: Tensor, pad: Tensor, y: Tensor) -> None:
    """x in the order of `perm`, zeros where it is -1 and after it. index, pad: scratch memory."""
    k = perm.numel()
    torch.clamp(perm, min=0, out=index)
    torch.index_select(x, 1, index, out=y[:, :k])
    y[:, :k].masked_fill_(torch.lt(perm, 0, out=pad), 0)
    y[:, k:] = 0


def _by_columns(plan: Plan, x: Symbolic) -> Symbolic:
    """x (M, K) -> x^T (K, M padded with zeros to a multiple of 8), for outliers."""
    columns = plan.empty((x.shape[1], -(-x.shape[0] // 8) * 8), x.dtype)
    plan.by_torch(lambda x, columns: _padded(x.T, columns), x, columns)
    return columns


def k_slices_for(problem: Problem, device: torch.device) -> int:
    """Split-K slices of the launches for a problem: every SM has a block or two.

    One if the order of sums must not depend on M: the decode kernel takes these problems, except
    for weights of few rows. Partial sums fit in the workspace. If copies of x need it too, rows are
    computed in slices.
    """
    if problem.batch_invariant:
        return 1
    traits = traits_of(problem)
    columns = columns_of(traits.codes)
    blocks = -(-problem.shape[0] // ROWS) * -(-problem.m // columns)
    most = min(decode.MAX_K_SLICES, workspace.BYTES // (blocks * ROWS * columns * 4))
    tiles = decode.tiles_of(problem.shape, traits)
    return k_slices.count_for(tiles, blocks, 2 * sm_count(device), STAGES, most)


def configuration(problem: Problem) -> str:
    """Block sizes and split-K slices in words, for `explain`."""
    traits = traits_of(problem)
    columns = columns_of(traits.codes)
    count = k_slices_for(problem, torch.device(problem.device))
    return f"{columns} rows of x and {ROWS} of W a block, K in {count} slices"
