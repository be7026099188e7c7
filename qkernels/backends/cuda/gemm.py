"""Launches the weight-only GEMM of csrc/weight_only/gemm.h, for 9 rows of x and more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import layouts
from ...layouts import weight_only as layout
from .. import cuda
from ..triton import workspace
from . import weight_only as gemv
from .calls import CODES, WeightOnlyCall

if TYPE_CHECKING:
    from ...dispatch import Problem
    from ...packed import PackedWeight

#: as in csrc/weight_only/gemm.h
ROWS, STAGES, THREADS = 64, 4, 128


def columns_of(bits: int) -> int:
    """Rows of x of a block: fewer where tiles are long."""
    return 32 if bits < 4 else 64


def stage_bytes(bits: int) -> int:
    codes = ROWS * (96 if bits == 3 else 64)
    return codes + 2 * columns_of(bits) * layout.tile_features(bits)


def rejects(problem: Problem) -> str | None:
    if problem.m <= gemv.COLUMNS:
        return f"for more than {gemv.COLUMNS} rows of x"
    if problem.batch_invariant:
        return "the GEMV takes these to sum in an order that does not depend on M"
    return gemv.unsupported(problem)


def run(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    """x (M, K) contiguous float16 or bfloat16, p in the WEIGHT_ONLY layout -> y (M, N).

    Where x has to be copied, that is done for a slice of its rows at a time; in how many shares K is summed
    goes by all rows, so the results are the same bits.
    """
    assert p.layout == layouts.WEIGHT_ONLY
    traits = gemv.traits_of(problem)
    call = gemv.call_of(p, traits, x.dtype, kernel=1)
    args, device = call.args, x.device
    m, n = x.shape[0], p.shape[0]
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = torch.empty(m, n, dtype=x.dtype, device=device)
    columns = columns_of(traits.bits)
    blocks_n, blocks_m = -(-n // ROWS), -(-m // columns)
    perm = p.storage.get("perm")
    copied = row_bytes(x, perm)
    shares = shares_of(args.tiles, blocks_n * blocks_m, gemv.processors(device), columns, m * copied)
    args.share = -(-args.tiles // shares)
    partial = shares * blocks_n * ROWS * 4 if shares > 1 else 0  # bytes a row of x
    for rows in workspace.slices(m, copied + partial if copied else 0):
        _launch(in_chunks(x[rows], perm), y[rows], p, bias, call, traits, shares)
    return y


def _launch(
    x: Tensor,
    y: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
    shares: int,
) -> None:
    """The kernel on some rows, with x as `in_chunks` makes it."""
    args, device = call.args, x.device
    m, n = y.shape
    columns = columns_of(traits.bits)
    blocks_n, blocks_m = -(-n // ROWS), -(-m // columns)
    args.m, args.x, args.y, args.x_stride = m, x.data_ptr(), y.data_ptr(), x.shape[1]
    args.bias = None if bias is None else bias.data_ptr()
    call.grid_x, call.grid_y, call.shared = blocks_n * blocks_m, shares, STAGES * stage_bytes(traits.bits)
    held: list[Tensor] = []
    if shares > 1:
        partial = workspace.partials(shares * blocks_n * blocks_m * ROWS * columns, device)
        counter = workspace.counters(device)
        args.partial, args.counter = partial.data_ptr(), counter.data_ptr()
        held = [partial, counter]
    reads = [x, *p.storage.values(), *([] if bias is None else [bias])]
    cuda.execute("weight_only_" + CODES[traits.decoder, traits.bits], call, reads, [y, *held])


def row_bytes(x: Tensor, perm: Tensor | None) -> int:
    """Memory that `in_chunks` takes at most for a row of x, with what it needs on the way."""
    k = x.shape[1]
    if perm is not None:
        kp = perm.numel()
        return 2 * (k + 1) + 2 * kp + (2 * (kp + 7) if kp % 8 else 0)
    return 2 * (k + 7) if k % 8 or x.data_ptr() % 16 else 0


def in_chunks(x: Tensor, perm: Tensor | None) -> Tensor:
    """x in kernel order with rows of whole 16-byte chunks: gathered or padded only where it must be."""
    if perm is not None:
        padded = torch.nn.functional.pad(x, (0, 1))
        x = padded.index_select(1, torch.where(perm < 0, x.shape[1], perm))
    if x.shape[1] % 8:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def shares_of(tiles: int, blocks: int, count: int, columns: int, held: int = 0) -> int:
    """Parts to cut K into so that every processor has a block or two, within the workspace.

    held: bytes of the workspace that copies of x would take.
    """
    wanted = max(1, min(2 * count // blocks, tiles // STAGES, 32))
    wanted = min(wanted, max(1, (workspace.BYTES - held) // (blocks * ROWS * columns * 4)))
    return -(-tiles // -(-tiles // wanted))


def configuration(problem: Problem) -> str:
    """What `explain` says."""
    bits = gemv.traits_of(problem).bits
    columns, tiles = columns_of(bits), -(-problem.shape[1] // layout.tile_features(bits))
    blocks = -(-problem.shape[0] // ROWS) * -(-problem.m // columns)
    shares = shares_of(tiles, blocks, gemv.processors(torch.device(problem.device)), columns)
    return f"{columns} rows of x and {ROWS} of W a block, K in {shares} shares"
