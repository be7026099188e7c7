"""Launches the weight-only GEMM of csrc/weight_only/hopper.h, for many rows of x on sm_90."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import layouts
from ...layouts import weight_only as layout
from ...layouts.codecs import CodeKind
from ..device import sm_count
from ..plan import Plan, Symbolic
from ..weight_only import traits_of
from . import gemm, transforms
from . import weight_only as decode
from .launch import whole

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: as in csrc/weight_only/hopper.h: rows of W of a block, threads
ROWS, THREADS = 128, 384
#: fewer rows of x than this leave most SMs without a work tile
MIN_ROWS = 129


def columns_of(codes: CodeKind, outliers: bool = False) -> int:
    """Rows of x of a block: fewer if tiles are long, or if outliers need registers."""
    return 128 if codes.tile == 256 or outliers else 256


def shared_bytes(codes: CodeKind, outliers: bool = False) -> int:
    """Shared memory of a block: rings of x and codes, the result, mbarriers, a codebook."""
    columns, high = columns_of(codes, outliers), codes.high_words
    chunks, tiles, tile = (4 if columns == 256 else 6), (2 if high else 3), ROWS * (64 + 4 * high)
    rings = chunks * columns * 128 + tiles * tile
    return rings + ROWS * columns * 2 + 16 * (chunks + tiles) + 4 * codes.book_words


def rejects(problem: Problem) -> str | None:
    """Why this kernel does not take the problem, or None."""
    if problem.capability is not None and problem.capability != (9, 0):
        return "for sm_90 (wgmma)"
    if problem.m < MIN_ROWS:
        return f"for {MIN_ROWS} rows of x and more"
    if problem.batch_invariant:
        return "other kernels take these to sum in an order that does not depend on M"
    return decode.unsupported(problem)


def declare(plan: Plan, p: PackedWeight, problem: Problem) -> None:
    """A `launch.Declare`.

    If x must be copied or transformed, that is done for a slice of its rows at a time, as in
    gemm.py.
    """
    assert p.layout == layouts.WEIGHT_ONLY
    traits = traits_of(problem)
    x, bias = plan.operands
    call = decode.call_of(p, traits, x.dtype, kernel=2)
    n = p.shape[0]

    def multiply(x: Symbolic, bias: Symbolic | None, y: Symbolic) -> None:
        call.grid_x, call.grid_y = min(_tiles(n, y.shape[0], traits), sm_count(x.device)), 1
        gemm.start(plan, x, y, p, bias, call, traits, [])

    def rows(x: Symbolic, y: Symbolic) -> None:
        transforms.around(plan, multiply, x, p, bias, traits, y)

    plan.by_rows(rows, x, plan.y)


run = whole(declare)


def _tiles(n: int, m: int, traits: layout.WeightOnlyTraits) -> int:
    """Number of work tiles of a launch."""
    return -(-n // ROWS) * -(-m // columns_of(traits.codes, traits.outliers))


def configuration(problem: Problem) -> str:
    """Tile sizes in words, for `explain`."""
    traits = traits_of(problem)
    tiles = _tiles(problem.shape[0], problem.m, traits)
    columns = columns_of(traits.codes, traits.outliers)
    return f"wgmma, {columns} rows of x and {ROWS} of W a tile, {tiles} tiles"
