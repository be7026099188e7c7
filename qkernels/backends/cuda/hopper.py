"""Launches the weight-only GEMM of csrc/weight_only/hopper.h, for 17 rows of x and more (sm_90)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from ... import layouts
from ...layouts import weight_only as layout
from ...layouts.codecs import CodeKind
from .. import workspace
from ..device import sm_count
from ..plan import Plan, Symbolic
from ..weight_only import traits_of
from . import gemm, k_slices, transforms
from . import weight_only as decode
from .launch import whole

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: as in csrc/weight_only/hopper.h: warpgroups that multiply, their rows of W, threads, rows of x
CONSUMERS, ROWS, THREADS = 3, 192, 512
#: the fewest tiles of a split-K slice, unless K has fewer
MIN_TILES = 4
#: what `predicted_cycles` assumes of an SM: instructions for a weight, lanes that issue in a
#: cycle, bytes from the L2 cache in a cycle, cycles that a work tile takes to begin and to end
INSTRUCTIONS, LANES, L2_BYTES, BEGIN_AND_END = 4.5, 128, 40, 2000


class Tiling(NamedTuple):
    """Rows of x of a block, split-K slices, and how many blocks come before those that have any."""

    columns: int
    k_slices: int
    whole: int


def columns_of(codes: CodeKind, outliers: bool) -> tuple[int, ...]:
    """Rows of x that blocks may have."""
    return (64,) if codes.tile == 256 or outliers else (64, 128)


def shared_bytes(codes: CodeKind, columns: int) -> int:
    """Shared memory of a block: rings of x and codes, the result, mbarriers, flags, a codebook."""
    chunks, tiles = (8, 4) if columns == 64 else (4 if codes.table else 6, 3)
    rings = chunks * columns * 128 + tiles * ROWS * (64 + 4 * codes.high_words)
    book = decode.PAIRS_BYTES if codes.table else 4 * codes.book_words
    return rings + ROWS * columns * 2 + 16 * (chunks + tiles) + 16 + book


def rejects(problem: Problem) -> str | None:
    """Why this kernel does not take the problem, or None."""
    if problem.capability is not None and problem.capability != (9, 0):
        return "for sm_90 (wgmma)"
    if problem.m <= decode.MOST:
        return f"for {decode.MOST + 1} rows of x and more"
    if problem.batch_invariant:
        return "other kernels take these to sum in an order that does not depend on M"
    return decode.unsupported(problem)


def declare(plan: Plan, p: PackedWeight, problem: Problem) -> None:
    """A `launch.Declare`.

    If x must be copied or transformed, that is done for a slice of its rows at a time, as in
    gemm.py. The number of split-K slices depends on all rows.
    """
    assert p.layout == layouts.WEIGHT_ONLY
    traits = traits_of(problem)
    x, bias = plan.operands
    call = decode.call_of(p, traits, x.dtype, kernel=2)
    args = call.args
    tiling = tiling_for(problem.shape, problem.m, traits, sm_count(x.device))
    call.columns = tiling.columns
    n = p.shape[0]

    def multiply(x: Symbolic, bias: Symbolic | None, y: Symbolic) -> None:
        blocks = _blocks(n, y.shape[0], tiling.columns)
        # Fewer rows than all have fewer blocks; if some were not to be cut, none is.
        all_rows = y.shape[0] == problem.m or tiling.whole == 0
        args.whole = tiling.whole if all_rows else blocks
        rest = blocks - args.whole
        args.k_slice = k_slices.steps_of(args.tiles, tiling.k_slices if rest else 1)
        count = -(-args.tiles // args.k_slice)
        call.grid_x, call.grid_y = min(args.whole + rest * count, sm_count(x.device)), 1
        scratch: list[Symbolic] = []
        if rest and count > 1:
            sums = count * rest * ROWS * call.columns
            scratch = decode.partial_sums(plan, args, sums, rest * CONSUMERS)
        gemm.start(plan, x, y, p, bias, call, traits, scratch)

    def rows(x: Symbolic, y: Symbolic) -> None:
        transforms.around(plan, multiply, x, p, bias, traits, y)

    plan.by_rows(rows, x, plan.y)


run = whole(declare)


def _blocks(n: int, m: int, columns: int) -> int:
    """Blocks of outputs of a launch."""
    return -(-n // ROWS) * -(-m // columns)


@lru_cache(maxsize=4096)
def tiling_for(shape: tuple[int, int], m: int, traits: layout.WeightOnlyTraits, sms: int) -> Tiling:
    """The tiling that `predicted_cycles` likes best, among those whose partial sums fit."""
    codes = traits.codes
    tiles = -(-shape[1] // codes.tile)
    tilings = []
    for columns in columns_of(codes, traits.outliers):
        blocks = _blocks(shape[0], m, columns)
        for uncut in {0, blocks // sms * sms}:
            sums = max(1, blocks - uncut) * ROWS * columns * 4
            most = min(tiles // MIN_TILES, decode.MAX_K_SLICES, workspace.BYTES // sums)
            counts = range(1, max(1, most) + 1) if uncut < blocks else (1,)
            tilings += [Tiling(columns, count, uncut) for count in counts]
    return min(tilings, key=lambda tiling: predicted_cycles(shape, m, codes, sms, tiling))


def predicted_cycles(
    shape: tuple[int, int], m: int, codes: CodeKind, sms: int, tiling: Tiling
) -> float:
    """Cycles of a product, if the slowest of an SM's parts sets the pace.

    These are the tensor core, the instructions, and the L2 cache. Split-K slices are stored by all
    blocks, and added by the last ones.
    """
    columns, count, whole = tiling
    tiles = -(-shape[1] // codes.tile)
    products = CONSUMERS * columns / 32  # of one feature: 64 x 128 x 16 take 64 cycles
    issue = ROWS * INSTRUCTIONS / LANES
    traffic = (ROWS * (64 + 4 * codes.high_words) / codes.tile + 2 * min(m, columns)) / L2_BYTES
    part = ROWS * min(m, columns) * 4 / L2_BYTES if count > 1 else 0
    rest = _blocks(shape[0], m, columns) - whole

    def waves(works: int, tiles: int, end: float) -> float:
        return -(-works // sms) * (tiles * codes.tile * max(products, issue, traffic) + end)

    cut = waves(rest * count, k_slices.steps_of(tiles, count), BEGIN_AND_END + part)
    return waves(whole, tiles, BEGIN_AND_END) + cut + count * part


def configuration(problem: Problem) -> str:
    """Tile sizes in words, for `explain`."""
    traits = traits_of(problem)
    sms = sm_count(torch.device(problem.device))
    tiling = tiling_for(problem.shape, problem.m, traits, sms)
    blocks = _blocks(problem.shape[0], problem.m, tiling.columns)
    return (
        f"wgmma, {tiling.columns} rows of x and {ROWS} of W a tile, {blocks} tiles, K in "
        f"{tiling.k_slices} slices" + f" from number {tiling.whole} on" * (tiling.whole > 0)
    )
