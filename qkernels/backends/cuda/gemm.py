"""Launches the weight-only GEMM of csrc/weight_only/gemm.h, for 9 rows of x and more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import layouts
from ...layouts import weight_only as layout
from .. import workspace
from ..device import sm_count
from ..plan import NOW, Work
from . import launch, transforms
from . import weight_only as gemv
from .calls import WeightOnlyCall

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: as in csrc/weight_only/gemm.h
ROWS, STAGES, THREADS = 64, 4, 128


def columns_of(decoder: str, bits: int) -> int:
    """Rows of x of a block: fewer where tiles are long."""
    return 32 if layout.tile_features(bits, decoder == "e8p") == 256 else 64


def shared_bytes(decoder: str, bits: int) -> int:
    """Shared memory of a block: a codebook, and in each stage codes, their high bits, and x."""
    codebook = decoder == "e8p"
    codes = ROWS * (64 + 4 * layout.high_words(bits, codebook))
    x = 2 * columns_of(decoder, bits) * layout.tile_features(bits, codebook)
    return gemv.book_bytes(decoder, bits) + STAGES * (codes + x)


def rejects(problem: Problem) -> str | None:
    if problem.m <= gemv.COLUMNS:
        return f"for more than {gemv.COLUMNS} rows of x"
    if problem.batch_invariant:
        return "the GEMV takes these to sum in an order that does not depend on M"
    return gemv.unsupported(problem)


def compute(
    x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem, y: Tensor, work: Work = NOW
) -> None:
    """x (M, K) contiguous float16 or bfloat16, p in the WEIGHT_ONLY layout, bias in x's dtype -> y
    (M, N).

    Where x has to be copied or transformed, that is done for a slice of its rows at a time; in how
    many shares K is summed goes by all rows, so the results are the same bits.
    """
    assert p.layout == layouts.WEIGHT_ONLY
    traits = gemv.traits_of(problem)
    call = gemv.call_of(p, traits, x.dtype, kernel=1)
    m, n = x.shape[0], p.shape[0]
    copied, held = row_bytes(x, p, traits), copied_once(x, traits)
    k_slices = k_slices_for(problem, x.device)
    call.args.k_slice = -(-call.args.tiles // k_slices)
    partial = k_slices * -(-n // ROWS) * ROWS * 4 if k_slices > 1 else 0  # bytes a row of x

    def multiply(x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        _launch(x, y, p, bias, call, traits, k_slices, work)

    for rows in work.slices(m, copied + partial if copied else 0, held):
        transforms.around(multiply, x[rows], p, bias, traits, y[rows], work)


run = launch.whole(compute)


def _launch(
    x: Tensor,
    y: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
    k_slices: int,
    work: Work,
) -> None:
    """The kernel on some rows: without transforms, x as the codes want it, y in its dtype, or
    float32.
    """
    args, device = call.args, x.device
    m, n = y.shape
    columns = columns_of(traits.decoder, traits.bits)
    blocks_n, blocks_m = -(-n // ROWS), -(-m // columns)
    call.grid_x, call.grid_y = blocks_n * blocks_m, k_slices
    call.shared = shared_bytes(traits.decoder, traits.bits)
    held: list[Tensor] = []
    if k_slices > 1:
        partial = work.empty(
            (k_slices * blocks_n * blocks_m * ROWS * columns,), torch.float32, device
        )
        counter = workspace.counters(device)
        args.partial, args.counter = partial.data_ptr(), counter.data_ptr()
        held = [partial, counter]
    start(x, y, p, bias, call, traits, held, work)


def start(
    x: Tensor,
    y: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
    held: list[Tensor],
    work: Work,
) -> None:
    """Start a kernel that takes x in chunks, on some rows. held: what else it writes."""
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
    launch.start(gemv.kernel_of(traits), call, [x, *reads], [y, *held], work)


def row_bytes(x: Tensor, p: PackedWeight, traits: layout.WeightOnlyTraits) -> int:
    """Memory that copies and transforms take at most for a row of x, with what they need on the
    way.
    """
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
    """Memory that a slice takes whatever its rows: `by_columns` pads them."""
    return 14 * x.shape[1] if traits.outliers else 0


def in_chunks(x: Tensor, perm: Tensor | None) -> Tensor:
    """x in kernel order with rows of whole 16-byte chunks: gathered or padded only where it must
    be.
    """
    if perm is not None:
        padded = torch.nn.functional.pad(x, (0, 1))
        x = padded.index_select(1, torch.where(perm < 0, x.shape[1], perm))
    if x.shape[1] % 8:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def by_columns(x: Tensor) -> Tensor:
    """x (M, K) -> x^T (K, M padded to a multiple of 8), zeros where there is no row: for outliers."""
    columns = torch.zeros(x.shape[1], x.shape[0] + -x.shape[0] % 8, dtype=x.dtype, device=x.device)
    columns[:, : x.shape[0]] = x.T
    return columns


def k_slices_for(problem: Problem, device: torch.device) -> int:
    """Parts of K in the launches for a problem. If copies of x want of the workspace too, rows go
    by slices for it.
    """
    traits = gemv.traits_of(problem)
    columns = columns_of(traits.decoder, traits.bits)
    blocks = -(-problem.shape[0] // ROWS) * -(-problem.m // columns)
    return k_slices_of(gemv.tiles_of(problem.shape, traits), blocks, sm_count(device), columns)


def k_slices_of(tiles: int, blocks: int, count: int, columns: int) -> int:
    """Parts to cut K into so that every processor has a block or two, within the workspace."""
    wanted = max(1, min(2 * count // blocks, tiles // STAGES, 32))
    wanted = min(wanted, max(1, workspace.BYTES // (blocks * ROWS * columns * 4)))
    return -(-tiles // -(-tiles // wanted))


def configuration(problem: Problem) -> str:
    """What `explain` says."""
    traits = gemv.traits_of(problem)
    columns, k_slices = (
        columns_of(traits.decoder, traits.bits),
        k_slices_for(problem, torch.device(problem.device)),
    )
    return f"{columns} rows of x and {ROWS} of W a block, K in {k_slices} slices"
