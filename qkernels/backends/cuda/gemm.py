"""Launches the weight-only GEMM of csrc/weight_only/gemm.h, for 9 rows of x and more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import layouts
from ...layouts import weight_only as layout
from ...layouts.codecs import CodeKind
from .. import workspace
from ..device import sm_count
from ..plan import NOW, Work
from . import k_slices, launch, transforms
from . import weight_only as gemv
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
    if problem.m <= gemv.COLUMNS:
        return f"for more than {gemv.COLUMNS} rows of x"
    if problem.batch_invariant:
        return "the GEMV takes these to sum in an order that does not depend on M"
    return gemv.unsupported(problem)


def compute(
    x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem, y: Tensor, work: Work = NOW
) -> None:
    """A `plan.Compute`: x @ W^T + bias into y.

    If x must be copied or transformed, that is done for a slice of its rows at a time. The
    number of split-K slices depends on all rows of the problem, so slices of rows change no bit.
    """
    assert p.layout == layouts.WEIGHT_ONLY
    traits = gemv.traits_of(problem)
    call = gemv.call_of(p, traits, x.dtype, kernel=1)
    m, n = x.shape[0], p.shape[0]
    copied = row_bytes(x, p, traits)
    count = k_slices_for(problem, x.device)
    call.args.k_slice = k_slices.steps_of(call.args.tiles, count)
    partial = count * -(-n // ROWS) * ROWS * 4 if count > 1 else 0  # bytes per row of x

    def multiply(x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        _launch(x, y, p, bias, call, traits, count, work)

    for rows in work.slices(m, copied + partial if copied else 0, copied_once(x, traits)):
        transforms.around(multiply, x[rows], p, bias, traits, y[rows], work)


run = launch.whole(compute)


def _launch(
    x: Tensor,
    y: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
    count: int,
    work: Work,
) -> None:
    """Launch the kernel with `count` split-K slices on some rows, without transforms.

    x is in the order of codes. y is in x's dtype, or in float32 if a transform follows.
    """
    args, device = call.args, x.device
    m, n = y.shape
    columns = columns_of(traits.codes)
    blocks_n, blocks_m = -(-n // ROWS), -(-m // columns)
    call.grid_x, call.grid_y = blocks_n * blocks_m, count
    call.shared = shared_bytes(traits.codes)
    scratch: list[Tensor] = []
    if count > 1:
        partial = work.empty((count * blocks_n * blocks_m * ROWS * columns,), torch.float32, device)
        counter = work.counters(blocks_n * blocks_m, device)
        args.partial, args.counter = partial.data_ptr(), counter.data_ptr()
        scratch = [partial, counter]
    start(x, y, p, bias, call, traits, scratch, work)


def start(
    x: Tensor,
    y: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
    scratch: list[Tensor],
    work: Work,
) -> None:
    """Start a kernel that reads x in 16-byte chunks, on some rows. scratch: what else it writes."""
    args = call.args
    reads = [*p.storage.values(), *([] if bias is None else [bias])]
    if traits.outliers:
        columns_x = work.by_torch(by_columns(x))
        args.x_columns, args.x_rows = columns_x.data_ptr(), columns_x.shape[1]
        reads.append(columns_x)
    chunks = in_chunks(x, p.storage.get("perm"))
    x = chunks if chunks is x else work.by_torch(chunks)
    args.m, args.x, args.y, args.x_stride = y.shape[0], x.data_ptr(), y.data_ptr(), x.shape[1]
    args.bias = None if bias is None else bias.data_ptr()
    launch.start(gemv.kernel_of(traits), call, [x, *reads], [y, *scratch], work)


def row_bytes(x: Tensor, p: PackedWeight, traits: layout.WeightOnlyTraits) -> int:
    """Bytes per row of x that copies and transforms allocate at most."""
    k, aligned, size = x.shape[1], x.data_ptr() % 16 == 0, 0
    if traits.transform_scales is not None:
        k, aligned, size = transforms.width_of(k, traits), True, transforms.row_bytes(p, traits)
    if traits.outliers:
        size += 2 * k
    if "perm" in p.storage:
        kp = p.storage["perm"].numel()
        return size + 2 * (k + 1) + 2 * kp + (2 * (kp + 7) if kp % 8 else 0)
    return size + (2 * (k + 7) if k % 8 or not aligned else 0)


def copied_once(x: Tensor, traits: layout.WeightOnlyTraits) -> int:
    """Bytes that a slice allocates whatever its number of rows: `by_columns` pads rows."""
    return 14 * x.shape[1] if traits.outliers else 0


def in_chunks(x: Tensor, perm: Tensor | None) -> Tensor:
    """x in kernel order with rows of whole 16-byte chunks; gathered or padded only if needed."""
    if perm is not None:
        padded = torch.nn.functional.pad(x, (0, 1))
        x = padded.index_select(1, torch.where(perm < 0, x.shape[1], perm))
    if x.shape[1] % 8:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def by_columns(x: Tensor) -> Tensor:
    """x (M, K) -> x^T (K, M padded with zeros to a multiple of 8), for outliers."""
    columns = torch.zeros(x.shape[1], x.shape[0] + -x.shape[0] % 8, dtype=x.dtype, device=x.device)
    columns[:, : x.shape[0]] = x.T
    return columns


def k_slices_for(problem: Problem, device: torch.device) -> int:
    """Split-K slices of the launches for a problem: every SM has a block or two.

    Partial sums fit in the workspace. If copies of x need it too, rows are computed in slices.
    """
    traits = gemv.traits_of(problem)
    columns = columns_of(traits.codes)
    blocks = -(-problem.shape[0] // ROWS) * -(-problem.m // columns)
    most = min(gemv.MAX_K_SLICES, workspace.BYTES // (blocks * ROWS * columns * 4))
    tiles = gemv.tiles_of(problem.shape, traits)
    return k_slices.count_for(tiles, blocks, 2 * sm_count(device), STAGES, most)


def configuration(problem: Problem) -> str:
    """Block sizes and split-K slices in words, for `explain`."""
    traits = gemv.traits_of(problem)
    columns = columns_of(traits.codes)
    count = k_slices_for(problem, torch.device(problem.device))
    return f"{columns} rows of x and {ROWS} of W a block, K in {count} slices"
