"""Launches the transforms around the weights of QuIP and QuIP#.

Their arguments come from the tensors `input.*` and `output.*` of the kernel layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from ...layouts.weight_only import section, whole_tiles
from ..plan import Plan, Symbolic
from .launch import start

#: features of a program, of which two tf32 copies fit in shared memory on every architecture
LARGEST_BOX = 4096
#: the same for at most DECODE_ROWS rows, where several SMs work on one row
DECODE_BOX, DECODE_ROWS = 2048, 16
#: features of one warp
_ELEMENTS_PER_WARP = 1024


def before(
    plan: Plan,
    x: Symbolic,
    storage: Mapping[str, Tensor],
    divisor: float,
    codebook: bool,
    few: bool,
) -> Symbolic:
    """x (M, K) -> the transformed x that the codes multiply, (M, K) in the dtype of x.

    divisor: the transform scale of the input (`WeightOnlyTraits.transform_scales`).
    codebook: the result has the kernel order of codebook codes and is (M, whole tiles).
    few: divide the transform among programs as it suits few rows. It decides the order of sums, so
        it is the same for all slices of a product, and for every M in batch-invariant mode.
    """
    width = whole_tiles(x.shape[1]) if codebook else x.shape[1]
    # Whole tiles are multiplied, so the elements after the last feature must not be NaN.
    empty = plan.empty if width == x.shape[1] else plan.zeros
    y = empty((x.shape[0], width), x.dtype)
    side = section(storage, "input.")
    _launch(
        plan, x, y, side, divisor, few, pre=side["diagonal"], gather=side.get("perm"),
        codebook=codebook, transposed=True,
    )  # fmt: skip
    return y


def after(
    plan: Plan,
    x: Symbolic,
    y: Symbolic,
    storage: Mapping[str, Tensor],
    divisor: float,
    bias: Symbolic | None,
    few: bool,
) -> None:
    """The products x (M, N), float32 -> y (M, N), transformed, plus bias.

    divisor: the transform scale of the output. few: as in `before`.
    """
    side = section(storage, "output.")
    _launch(
        plan, x, y, side, divisor, few, post=side["diagonal"], bias=bias, scatter=side.get("perm")
    )


def _launch(
    plan: Plan,
    x: Symbolic,
    y: Symbolic,
    side: Mapping[str, Tensor],
    divisor: float,
    few: bool,
    *,
    pre: Tensor | None = None,
    post: Tensor | None = None,
    bias: Symbolic | None = None,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    codebook: bool = False,
    transposed: bool = False,
) -> None:
    from ...triton_kernels.kronecker import kronecker_rows

    factors = [side[f"factor{i}"] for i in range(3) if f"factor{i}" in side]
    orders = tuple(f.shape[0] for f in factors)
    m, n = x.shape
    options, warps = constants(n, orders, few)
    unread = side.get("diagonal", x)  # a pointer that is never read needs an address
    if len(factors) < 3:  # the factors of the kernel's axes a0, c and a2
        factors = [*factors[:1], unread, *factors[1:], unread, unread][:3]
    pointers = {"pre": pre, "post": post, "bias": bias, "gather": gather, "scatter": scatter}
    arguments = {
        "x_ptr": x,
        "y_ptr": y,
        **{f"{name}_ptr": unread if t is None else t for name, t in pointers.items()},
        **{f"factor{i}_ptr": factor for i, factor in enumerate(factors)},
        "scale": 1 / divisor,
        "M": m,
        "STRIDE": y.shape[1],
        **options,
        "HAS_PRE": pre is not None,
        "HAS_POST": post is not None,
        "HAS_BIAS": bias is not None,
        "GATHERED": gather is not None,
        "SCATTERED": scatter is not None,
        "CODEBOOK_ORDER": codebook,
        "TRANSPOSED": transposed,
        "num_warps": warps,
    }
    start(plan, kronecker_rows, (-(-m // options["ROWS"]), options["C"]), arguments)


@lru_cache(maxsize=256)
def constants(n: int, stored: tuple[int, ...], decode: bool) -> tuple[dict[str, Any], int]:
    """(compile-time arguments, warps) of the kernel for n features.

    stored: orders of the factors stored with the weight. The rest of n is the order of a Hadamard
    matrix, a power of two, which this function divides into the axes c, a1 and a2.
    """
    sylvester = n // math.prod(stored)
    if len(stored) > 1:
        assert sylvester == 1
        orders, c = (stored[0], 1, stored[-1]), stored[1] if len(stored) == 3 else 1
    else:
        first = (*stored, 1)[0]
        box = min(sylvester, max(64, (DECODE_BOX if decode else LARGEST_BOX) // _padded(first)))
        # in one axis or two
        bits = min(6, box.bit_length() - 1) if box < 256 else box.bit_length() - 1
        c = sylvester >> bits
        low = 1 << (bits if bits <= 6 else bits - bits // 2)
        orders = (first, sylvester // c // low, low)
    padded = [_padded(order) for order in orders]
    total = math.prod(padded)
    rows = max(1, 16 * max(padded) // total)  # a dot has at least 16 rows
    warps = max(4, min(16, rows * total // _ELEMENTS_PER_WARP))
    sizes = {f"A{i}": order for i, order in enumerate(orders)} | {
        f"B{i}": b for i, b in enumerate(padded)
    }
    return {
        **sizes,
        "C": c,
        "ROWS": rows,
        "SYLVESTER": len(stored) < 2,
        "MIDDLE": len(stored) == 3,
    }, warps


def _padded(order: int) -> int:
    """The length of an axis, padded for a dot: at least 16, a power of two."""
    return 1 if order == 1 else max(16, 1 << (order - 1).bit_length())
