"""Launches csrc/transforms: the orthogonal transforms before and after QuIP's and QuIP#'s products.

The structs mirror csrc/transforms/arguments.h, field for field.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...layouts import weight_only as layout
from ..plan import Plan, Symbolic
from .calls import Call
from .launch import start

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight

#: features of a block's box. A Hadamard transform has few, so that several SMs compute one row.
#: With a dense factor there are more, because every block of a row reads the whole row.
BOX, DENSE_BOX = 2048, 4096
#: blocks along M: each computes every ROWS-th row, so that it reads factors once for many rows
ROWS = 1024
#: as in csrc/transforms/kronecker.h: threads of a block, and shared memory of the largest box,
#: 64 x c x 128 (QuIP)
THREADS, LARGEST_SHARED = 256, 74240

_POINTERS = ("x", "y", "diagonal", "bias", "perm", "factor0", "factor1", "factor2")
_SIZES = ("m", "n", "width", "a0", "c", "b", "log_b", "is_codebook", "is_aligned")


class TransformArgs(ctypes.Structure):
    __slots__ = ()  # a name that is no field is an AttributeError, not an attribute
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in _SIZES),
    ]


class TransformCall(Call):
    _fields_ = [
        ("args", TransformArgs),
        ("stream", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("rows", "shared")),
        *((name, ctypes.c_int) for name in ("is_bfloat", "is_after", "pdl", "size")),
    ]


class Box(NamedTuple):
    """The shape (a0, c, b) of a row. hadamard: whether its last two axes have Hadamard factors."""

    a0: int
    c: int
    b: int
    hadamard: bool


def around(
    plan: Plan,
    multiply: Callable[[Symbolic, Symbolic | None, Symbolic], None],
    x: Symbolic,
    p: PackedWeight,
    bias: Symbolic | None,
    traits: layout.WeightOnlyTraits,
    y: Symbolic,
) -> None:
    """Transform x, multiply it by the codes, and transform the result to the weight's output.

    Without transforms it only multiplies.

    Args:
        plan: takes the launches and the scratch memory.
        multiply: (x, bias, y) declares the product of the codes and x into y.
        x: (M, K), a slice of the rows.
        p: the weight, in the WEIGHT_ONLY layout.
        bias: (N) in x's dtype, or None.
        traits: codes, scales and transforms of the weight.
        y: (M, N), the output.
    """
    if traits.transform_scales is None:
        multiply(x, bias, y)
        return
    inside = plan.empty(y.shape, torch.float32)
    multiply(before(plan, x, p, traits), None, inside)
    after(plan, inside, p, traits, bias, y)


def before(plan: Plan, x: Symbolic, p: PackedWeight, traits: layout.WeightOnlyTraits) -> Symbolic:
    """Transform x (M, K), contiguous, for the product with the codes.

    Returns (M, K) in x's dtype; for codes of a codebook (M, whole tiles).
    """
    width = traits.group_size if traits.codes.codebook else x.shape[1]
    y = plan.empty((x.shape[0], width), x.dtype)
    _launch(plan, x, y, p, traits, "input", None)
    return y


def after(
    plan: Plan,
    x: Symbolic,
    p: PackedWeight,
    traits: layout.WeightOnlyTraits,
    bias: Symbolic | None,
    y: Symbolic,
) -> None:
    """Transform products x (M, N), float32, to the weight's output y (M, N) with bias."""
    _launch(plan, x, y, p, traits, "output", bias)


def box_of(n: int, orders: tuple[int, ...]) -> Box:
    """The box of a row of n features.

    orders: of the dense factors that are stored with the weight; the rest of n is Hadamard.
    """
    if len(orders) > 1:
        return Box(orders[0], math.prod(orders[1:-1]), orders[-1], False)
    a0 = math.prod(orders)
    power = n // a0
    largest = BOX if a0 == 1 else DENSE_BOX
    b = min(power, 1 << max(0, (largest // a0).bit_length() - 1))
    return Box(a0, power // b, b, True)


def shared_bytes(box: Box, orders: tuple[int, ...]) -> int:
    """Shared memory of a block: the box, one row of the middle factor, and the outer factors.

    `transform_shared` of csrc/transforms/kronecker.h computes the same.
    """
    inner = -(-box.a0 * box.b // 8) * 32
    inner += -(-box.c // 4) * 16 if len(orders) == 3 else 0
    return inner + sum(2 * order * (-(-order // 8) * 8) for order in orders[:1] + orders[1:][-1:])


def _launch(
    plan: Plan,
    x: Symbolic,
    y: Symbolic,
    p: PackedWeight,
    traits: layout.WeightOnlyTraits,
    side: str,
    bias: Symbolic | None,
) -> None:
    """Declare the transform of x to y. side: "input" (before the product) or "output" (after)."""
    tensors = {
        k.removeprefix(side + "."): v for k, v in p.storage.items() if k.startswith(side + ".")
    }
    call = _call_of(p, tensors, traits, side, y.dtype)
    args = call.args
    args.m, args.x, args.y = x.shape[0], x.data_ptr(), y.data_ptr()
    args.bias = None if bias is None else bias.data_ptr()
    whole_units = args.n % 8 == 0 and (args.b % 8 == 0 or args.c == 1)
    addresses = x.data_ptr() | tensors["diagonal"].data_ptr()
    args.is_aligned = int(whole_units and "perm" not in tensors and addresses % 16 == 0)
    call.rows = min(x.shape[0], ROWS)
    reads = [x, *tensors.values(), *([] if bias is None else [bias])]
    start(plan, "transform_rows", call, reads, [y])


def _call_of(
    p: PackedWeight,
    tensors: Mapping[str, Tensor],
    traits: layout.WeightOnlyTraits,
    side: str,
    dtype: torch.dtype,
) -> TransformCall:
    """A copy of the weight's call template, in which x, y and the bias are not set."""
    key = ("cuda.transform", side, dtype)
    template: TransformCall | None = p.plans.get(key)
    if template is None:
        is_after = side == "output"
        assert traits.transform_scales is not None
        n = p.shape[0] if is_after else p.shape[1]
        is_codebook = traits.codes.codebook and not is_after
        factors = [tensors[f"factor{i}"] for i in range(3) if f"factor{i}" in tensors]
        orders = tuple(f.shape[0] for f in factors)
        box = box_of(n, orders)
        args = TransformArgs(
            diagonal=tensors["diagonal"].data_ptr(),
            scale=1 / traits.transform_scales[is_after],
            n=n, width=traits.group_size if is_codebook else n,
            a0=box.a0, c=box.c, b=box.b, log_b=box.b.bit_length() - 1 if box.hadamard else 0,
            is_codebook=is_codebook,
        )  # fmt: skip
        axes = {1: (0,), 2: (0, 2), 3: (0, 1, 2)}.get(len(factors), ())
        for axis, factor in zip(axes, factors, strict=True):
            setattr(args, f"factor{axis}", factor.data_ptr())
        if "perm" in tensors:
            args.perm = tensors["perm"].data_ptr()
        template = p.plans[key] = TransformCall(
            args=args, shared=shared_bytes(box, orders), is_bfloat=dtype == torch.bfloat16,
            is_after=is_after, size=ctypes.sizeof(TransformCall),
        )  # fmt: skip
    return template.copy()
