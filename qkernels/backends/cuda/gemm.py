"""Launches the weight-only GEMM of csrc/weight_only/gemm.h, for 9 rows of x and more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import layouts
from ...layouts import weight_only as layout
from .. import cuda
from ..triton import workspace
from . import transforms
from . import weight_only as gemv

if TYPE_CHECKING:
    from ...dispatch import Problem
    from ...packed import PackedWeight

#: as in csrc/weight_only/gemm.h
ROWS, STAGES, THREADS = 64, 4, 128
#: partial sums of one call may take this much memory
WORKSPACE_BYTES = 32 * 2**20


def columns_of(decoder: str, bits: int) -> int:
    """Rows of x of a block: fewer where tiles are long."""
    return 32 if layout.tile_features(bits, decoder == "e8p") == 256 else 64


def shared_bytes(decoder: str, bits: int) -> int:
    """Shared memory of a block: a codebook, and in each stage codes, their high bits, and x."""
    vectors = decoder == "e8p"
    codes = ROWS * (64 + 4 * layout.high_words(bits, vectors))
    x = 2 * columns_of(decoder, bits) * layout.tile_features(bits, vectors)
    return gemv.book_bytes(decoder, bits) + STAGES * (codes + x)


def rejects(problem: Problem) -> str | None:
    if problem.m <= gemv.COLUMNS:
        return f"for more than {gemv.COLUMNS} rows of x"
    if problem.batch_invariant:
        return "the GEMV takes these to sum in an order that does not depend on M"
    return gemv.unsupported(problem)


def run(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    """x (M, K) contiguous float16 or bfloat16, p in the WEIGHT_ONLY layout -> y (M, N)."""
    assert p.layout == layouts.WEIGHT_ONLY
    traits = gemv.traits_of(problem)
    if traits.norms is not None:
        return transforms.around(multiply, x, p, bias, traits)
    return multiply(x, p, bias, traits)


def multiply(x: Tensor, p: PackedWeight, bias: Tensor | None, traits: layout.WeightOnlyTraits) -> Tensor:
    """Without transforms: x as the codes want it -> y in x's dtype, in float32 if a transform comes next."""
    call = gemv.call_of(p, traits, x.dtype, kernel=1)
    args, device = call.args, x.device
    m, n = x.shape[0], p.shape[0]
    columns_x = by_columns(x) if traits.outliers else None
    x = in_chunks(x, p.storage.get("perm"))
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = torch.empty(m, n, dtype=gemv.output_dtype(x, traits), device=device)
    columns = columns_of(traits.decoder, traits.bits)
    blocks_n, blocks_m = -(-n // ROWS), -(-m // columns)
    shares = shares_of(args.tiles, blocks_n * blocks_m, gemv.processors(device), columns)
    args.share = -(-args.tiles // shares)
    args.m, args.x, args.y, args.x_stride = m, x.data_ptr(), y.data_ptr(), x.shape[1]
    args.bias = None if bias is None else bias.data_ptr()
    call.grid_x, call.grid_y = blocks_n * blocks_m, shares
    call.shared = shared_bytes(traits.decoder, traits.bits)
    held: list[Tensor] = []
    if shares > 1:
        partial = workspace.partials(shares * blocks_n * blocks_m * ROWS * columns, device)
        counter = workspace.counters(device)
        args.partial, args.counter = partial.data_ptr(), counter.data_ptr()
        held = [partial, counter]
    reads = [x, *p.storage.values(), *([] if bias is None else [bias])]
    if columns_x is not None:
        args.x_columns, args.x_rows = columns_x.data_ptr(), columns_x.shape[1]
        reads.append(columns_x)
    cuda.execute(gemv.kernel_of(traits), call, reads, [y, *held])
    return y


def in_chunks(x: Tensor, perm: Tensor | None) -> Tensor:
    """x in kernel order with rows of whole 16-byte chunks: gathered or padded only where it must be."""
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


def shares_of(tiles: int, blocks: int, count: int, columns: int) -> int:
    """Parts to cut K into so that every processor has a block or two, within the workspace."""
    wanted = max(1, min(2 * count // blocks, tiles // STAGES, 32))
    wanted = min(wanted, max(1, WORKSPACE_BYTES // (blocks * ROWS * columns * 4)))
    return -(-tiles // -(-tiles // wanted))


def configuration(problem: Problem) -> str:
    """What `explain` says."""
    traits = gemv.traits_of(problem)
    columns = columns_of(traits.decoder, traits.bits)
    tiles = -(-problem.shape[1] // layout.tile_features(traits.bits, traits.vectors))
    blocks = -(-problem.shape[0] // ROWS) * -(-problem.m // columns)
    shares = shares_of(tiles, blocks, gemv.processors(torch.device(problem.device)), columns)
    return f"{columns} rows of x and {ROWS} of W a block, K in {shares} shares"
