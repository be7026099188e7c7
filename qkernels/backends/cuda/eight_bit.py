"""Launches csrc/eight_bit: one kernel quantizes the activations, a second one multiplies the codes.

The GEMV quantizes a few rows itself (`quantizes`), which saves the first kernel.
The structs mirror csrc/eight_bit/arguments.h, field for field.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...layouts import eight_bit as layout
from ..device import sm_count
from ..eight_bit import Activations, traits_of
from ..plan import Plan, Symbolic
from . import k_slices
from .calls import Call
from .launch import start, whole

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: the numbers of Kind in csrc/ptx/eight_bit.h and of Granularity in csrc/eight_bit/arguments.h
KINDS = {"int8": 0, "e4m3": 1, "e5m2": 2}
GRANULARITIES = {"token": 0, "group": 1, "tensor": 2}
#: features of a step along K; rows of W of a block of the GEMM, and of the GEMV
STEP, TILE_N, GEMV_N = 128, 128, 16
#: rows of x of a block of the GEMV, which is used up to the larger one; and of the GEMM
GEMV_ROWS = (8, 16)
TILE_ROWS = (16, 32, 64, 128)
#: as in csrc/eight_bit/gemv.h, gemm.h and quantize.h: threads of a block, shared memory
GEMV_THREADS, GEMM_THREADS, QUANTIZE_SHARED = 128, 256, 128
#: as in csrc/eight_bit/hopper.h: rows of x of a tile, rows of W of a tile, threads of a block
HOPPER_M, HOPPER_N, HOPPER_THREADS = 128, {"int8": 256, "e4m3": 128, "e5m2": 128}, 384
#: the Hopper kernel is used for at least this many rows of x
HOPPER_ROWS = 129
#: the GEMV quantizes at most so many rows of x itself, by what shares a scale. Every block
#: quantizes them again: a step of a warp takes 100 (int8) or 150 instructions (fp8, sm_90a), and 30
#: more for each row (53 with groups, and for int8 with one scale). An SM of an H200 issues 300 to
#: 400 while a step of W arrives (an estimate from bandwidths)
QUANTIZED_ROWS = {"token": 8, "group": 4, "tensor": 4}
#: and, for scales of rows, at most so many elements: each block reads them all for their absmax
#: while its first loads of W are in flight. On an SM of an H200 those of 4 blocks are 64 KiB, which
#: take about 2 us (an estimate from bandwidths), as 2^16 elements a block do from the L1 cache
ABSMAX_ELEMENTS = 1 << 16
#: blocks of the GEMV that an SM holds at a time
GEMV_BLOCKS = 4
#: the most bytes of partial sums of one product
PARTIAL_BYTES = 32 << 20


class QuantizeArgs(ctypes.Structure):
    __slots__ = ()  # a name that is no field is an AttributeError, not an attribute
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "x", "up", "norm", "rounded", "codes", "scale", "zero", "columns", "counter",
        )),
        ("eps", ctypes.c_float), ("threshold", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "m", "k", "kp", "granularity", "is_int8", "is_bfloat", "vector",
        )),
    ]  # fmt: skip


class EightBitArgs(ctypes.Structure):
    __slots__ = ()  # a name that is no field is an AttributeError, not an attribute
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "x", "weight", "x_scale", "w_scale", "zero", "row_sum", "bias", "x16", "columns", "y",
            "partial", "counter",
        )),
        ("threshold", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "m", "n", "k", "kp", "k_slice", "one_scale", "by_element", "is_bfloat",
        )),
    ]  # fmt: skip


class QuantizeCall(Call):
    _fields_ = [
        ("args", QuantizeArgs), ("stream", ctypes.c_uint64),
        ("pdl", ctypes.c_int), ("size", ctypes.c_int),
    ]  # fmt: skip


class EightBitCall(Call):
    _fields_ = [
        ("args", EightBitArgs), ("stream", ctypes.c_uint64), ("split", ctypes.c_uint32),
        *((name, ctypes.c_int) for name in ("is_gemv", "rows", "blocks", "pdl", "size")),
    ]  # fmt: skip


class Config(NamedTuple):
    """Kernel and block sizes of a product.

    gemv: the GEMV, not the GEMM. rows: rows of x of a block; 0 for the Hopper kernel. k_slice:
    steps of a split-K slice. split: blocks along K; for the Hopper kernel, all blocks.
    """

    gemv: bool
    rows: int
    k_slice: int
    split: int


def configure(
    kind: str, shape: tuple[int, int], m: int, invariant: bool, sms: int, hopper: bool = False
) -> Config:
    """Kernel and block sizes for m rows of x on a GPU with `sms` SMs.

    With `invariant` (batch-invariant mode), `k_slice` does not depend on m. hopper: whether the GPU
    has wgmma.
    """
    return _configure(kind, shape, m, invariant, sms, hopper, PARTIAL_BYTES)


@lru_cache(maxsize=4096)
def _configure(
    kind: str,
    shape: tuple[int, int],
    m: int,
    invariant: bool,
    sms: int,
    hopper: bool,
    partial_bytes: int,
) -> Config:
    n, k = shape
    steps = -(-layout.padded(k) // STEP)
    if hopper and m >= HOPPER_ROWS and not invariant:
        tiles = -(-n // HOPPER_N[kind]) * -(-m // HOPPER_M)
        return Config(False, 0, steps, min(tiles, sms))
    if m <= GEMV_ROWS[-1] and not invariant:
        rows = next(r for r in GEMV_ROWS if m <= r)
        # a slice has at least two steps for each of four warps
        split = k_slices.count_for(steps, -(-n // GEMV_N), GEMV_BLOCKS * sms, min_steps=8)
        return Config(True, rows, k_slices.steps_of(steps, split), split)
    sequential = invariant and kind != "int8"  # int8 is exact in any order
    fitting = [r for r in TILE_ROWS if not (sequential and r == 128)]
    rows = next((r for r in fitting if m <= r), fitting[-1])
    if rows == 128 and -(-n // TILE_N) * -(-m // 128) < sms:
        rows = 64
    blocks_n = -(-n // TILE_N)
    tiles = blocks_n * -(-m // rows)
    split = k_slices.count_for(steps, blocks_n if sequential else tiles, sms, min_steps=4)
    k_slice = k_slices.steps_of(steps, split)
    if split * tiles * rows * TILE_N * 4 > partial_bytes or tiles >= sms:
        split = 1
    return Config(False, rows, k_slice if sequential or split > 1 else steps, split)


def hopper_shared_bytes(kind: str) -> int:
    """Shared memory of a block of the Hopper kernel: ring of steps, results, mbarriers."""
    stages, columns = (4, 32) if kind == "int8" else (6, 64)
    ring = stages * (HOPPER_M + HOPPER_N[kind]) * STEP
    return ring + HOPPER_M * (columns + 8) * 2 + 16 * stages


def has_wgmma(device: torch.device) -> bool:
    """Whether the Hopper kernel runs on this device; the emulator (a CPU device) runs it."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) == (9, 0)


def configured(problem: Problem, device: torch.device) -> Config:
    """`configure` for all rows of the problem, which slices of its rows use, too."""
    kind, sms = traits_of(problem).kind, sm_count(device)
    return configure(
        kind, problem.shape, problem.m, problem.batch_invariant, sms, has_wgmma(device)
    )


def quantizes(problem: Problem, config: Config) -> bool:
    """Whether the product quantizes x itself, if x is aligned to 16 bytes; see QUANTIZED_ROWS."""
    traits, m, k = traits_of(problem), problem.m, problem.shape[1]
    small = traits.activation != "token" or m * k <= ABSMAX_ELEMENTS
    # LLM.int8() must know the outlier columns of all rows before the first product.
    few = config.gemv and m <= QUANTIZED_ROWS[traits.activation]
    # Before sm_89, rounding to fp8 takes 115 instructions a row and step instead of 30.
    slow = traits.kind != "int8" and problem.capability is not None and problem.capability < (8, 9)
    return few and small and k % 8 == 0 and not traits.threshold and not slow


def shared_bytes(gemv: bool, rows: int, quantized: int = 0) -> int:
    """Shared memory of a block: for the GEMV sums of four warps, for the GEMM the ring of steps.

    quantized: rows that the GEMV quantizes itself: codes of four warps, maxima and scales.
    """
    if gemv:
        return (4 * rows * 20 + 4 + quantized * (4 * 48 + 4 + 4)) * 4
    return (3 if rows == 128 else 4) * (rows + TILE_N) * STEP


def _address(t: Tensor | Symbolic | None) -> int | None:
    return None if t is None else t.data_ptr()


def _present(*tensors: Any) -> list[Any]:
    """The tensors that are not None."""
    return [t for t in tensors if t is not None]


def rejects(problem: Problem) -> str | None:
    """None: the kernels take every format of the family and any shape, from sm_80 on."""
    return None


# ---------------------------------------------------------------------- activations
def quantize(
    plan: Plan,
    x: Symbolic,
    p: PackedWeight,
    problem: Problem,
    *,
    up: Symbolic | None = None,
    norm: Symbolic | None = None,
    eps: float = 0.0,
    keep: bool = False,
    columns: Symbolic | None = None,
) -> Activations:
    """Quantize x for the weight `p`.

    Args:
        plan: takes the launch and the result.
        x: (M, K).
        p: the weight, in the EIGHT_BIT layout.
        problem: the product to compute.
        up: (M, K), or None; silu(x) * up is quantized, and rounded to x's dtype where a model
            rounds.
        norm: (K), or None; RMSNorm with this weight is applied first, with the same rounding.
        eps: epsilon of RMSNorm.
        keep: the result has the quantized values in 16 bits as `x`, even if LLM.int8() does not
            need them.
        columns: the result of `columns_of` for all rows, if x is a slice of them.
    """
    traits = traits_of(problem)
    m, k = x.shape
    call, reads = _started(x, p, traits, up, norm, eps)
    args, storage, outliers = call.args, p.storage, traits.threshold > 0
    codes = plan.empty((m, args.kp), torch.int8 if args.is_int8 else torch.float8_e4m3fn)
    scale: Any = storage.get("input_scale")
    if traits.activation != "tensor":
        groups = (-(-k // layout.BLOCK),) if traits.activation == "group" else ()
        scale = plan.empty((*groups, m), torch.float32)
    rounded = counter = None
    if (keep or outliers) and (up is not None or norm is not None):
        rounded = plan.empty((m, k), x.dtype)
        args.rounded = rounded.data_ptr()
    if outliers and columns is None:
        columns, counter = _list_columns(plan, args, k)
    elif columns is not None:
        args.columns = columns.data_ptr()
    args.codes, args.scale = codes.data_ptr(), scale.data_ptr()
    reads += _present(storage.get("input_zero_point"))
    writes = _present(codes, rounded, columns, counter)
    (reads if traits.activation == "tensor" else writes).append(scale)
    start(plan, "quantize_rows", call, reads, writes)
    return Activations(codes, scale, x if rounded is None else rounded, columns)


def columns_of(
    plan: Plan,
    x: Symbolic,
    p: PackedWeight,
    problem: Problem,
    *,
    up: Symbolic | None = None,
    norm: Symbolic | None = None,
    eps: float = 0.0,
) -> Symbolic | None:
    """The outlier columns of all rows in order, and at K their number: int32 (K + 1).

    None if a row's result does not depend on the other rows. The operands are those of `quantize`.
    """
    traits = traits_of(problem)
    if not traits.threshold or problem.batch_invariant:
        return None
    call, reads = _started(x, p, traits, up, norm, eps)
    columns, counter = _list_columns(plan, call.args, x.shape[1])
    start(plan, "quantize_rows", call, reads, [columns, counter])
    return columns


def _list_columns(plan: Plan, args: QuantizeArgs, k: int) -> tuple[Symbolic, Symbolic]:
    """Set the arguments for a list of outlier columns; returns the list and its counter."""
    columns, counter = plan.empty((k + 1,), torch.int32), plan.counters(1 + -(-k // 32))
    args.columns, args.counter = columns.data_ptr(), counter.data_ptr()
    return columns, counter


def _started(
    x: Symbolic,
    p: PackedWeight,
    traits: layout.EightBitTraits,
    up: Symbolic | None,
    norm: Symbolic | None,
    eps: float,
) -> tuple[QuantizeCall, list[Any]]:
    """A call with the activations' addresses set, and the tensors that it reads.

    Raises:
        ValueError: `up` or `norm` has another dtype or shape than x requires.
    """
    m, k = x.shape
    for name, t, shape in (("up", up, (m, k)), ("norm", norm, (k,))):
        if t is not None and (t.dtype != x.dtype or t.shape != shape):
            raise ValueError(
                f"{name}: expected {x.dtype} of shape {shape}, got {t.dtype} {t.shape}"
            )
    call = _quantize_call(p, traits, x.dtype, m, eps)
    args = call.args
    addresses = args.x = x.data_ptr()
    for name, t in (("up", up), ("norm", norm)):
        if t is not None:
            setattr(args, name, t.data_ptr())
            addresses |= t.data_ptr()
    args.vector = k % 8 == 0 and addresses % 16 == 0
    return call, _present(x, up, norm)


def _quantize_call(
    p: PackedWeight, traits: layout.EightBitTraits, dtype: torch.dtype, m: int, eps: float
) -> QuantizeCall:
    """A copy of the weight's call template, in which the addresses of activations are not set."""
    key = ("cuda.quantize", dtype, m, eps)
    template: QuantizeCall | None = p.plans.get(key)
    if template is None:
        k = p.shape[1]
        args = QuantizeArgs(
            zero=_address(p.storage.get("input_zero_point")), eps=eps, threshold=traits.threshold,
            m=m, k=k, kp=layout.padded(k), granularity=GRANULARITIES[traits.activation],
            is_int8=traits.kind == "int8", is_bfloat=dtype == torch.bfloat16,
        )  # fmt: skip
        template = p.plans[key] = QuantizeCall(args=args, size=ctypes.sizeof(QuantizeCall))
    return template.copy()


# ---------------------------------------------------------------------- the product
def multiply(
    plan: Plan,
    a: Activations,
    p: PackedWeight,
    bias: Symbolic | None,
    problem: Problem,
    y: Symbolic,
    config: Config | None = None,
) -> None:
    """The product of quantized activations and a weight, into y.

    `a` may be a slice of the problem's rows: the result has the same bits as with all rows.

    Args:
        plan: takes the launch and its scratch memory.
        a: the quantized activations; or without codes, if `quantizes` says that the GEMV takes x.
        p: the weight, in the EIGHT_BIT layout.
        bias: (N) in x's dtype, or None.
        problem: the product to compute.
        y: (M, N), in x's dtype.
        config: kernel and block sizes; by default those of the problem.
    """
    traits, storage = traits_of(problem), p.storage
    m, n = y.shape
    config = config or configured(problem, plan.device)
    call = _product_call(p, traits, a.x.dtype, m, problem.batch_invariant, config)
    args, partial, counter = call.args, None, None
    if config.split > 1 and config.rows:
        tile = config.rows * (GEMV_N if config.gemv else TILE_N)
        blocks = -(-n // GEMV_N) if config.gemv else -(-n // TILE_N) * -(-m // config.rows)
        partial = plan.empty((config.split * blocks * tile,), torch.float32)
        counter = plan.counters(blocks)
        args.partial, args.counter = partial.data_ptr(), counter.data_ptr()
    args.x16, args.y = a.x.data_ptr(), y.data_ptr()
    args.x, args.x_scale, args.columns, args.bias = map(
        _address, (a.codes, a.scale, a.columns, bias)
    )
    reads = _present(a.codes, a.scale, a.x, a.columns, bias, *storage.values())
    start(plan, f"eight_bit_{traits.kind}", call, reads, _present(y, partial, counter))


def _product_call(
    p: PackedWeight,
    traits: layout.EightBitTraits,
    dtype: torch.dtype,
    m: int,
    invariant: bool,
    config: Config,
) -> EightBitCall:
    """A copy of the weight's call template, in which addresses of activations are not set."""
    key = ("cuda.eight_bit", dtype, invariant)
    template: EightBitCall | None = p.plans.get(key)
    if template is None:
        storage, (n, k) = p.storage, p.shape
        args = EightBitArgs(
            weight=_address(storage["weight"]), w_scale=_address(storage["weight_scale"]),
            zero=_address(storage.get("input_zero_point")),
            row_sum=_address(storage.get("row_sum")), threshold=traits.threshold,
            n=n, k=k, kp=layout.padded(k), one_scale=traits.activation == "tensor",
            by_element=invariant, is_bfloat=dtype == torch.bfloat16,
        )  # fmt: skip
        template = p.plans[key] = EightBitCall(
            args=args, blocks=traits.weight_scale == "block", size=ctypes.sizeof(EightBitCall)
        )
    call = template.copy()
    call.args.m, call.args.k_slice = m, config.k_slice
    call.split, call.is_gemv, call.rows = config.split, config.gemv, config.rows
    return call


def declare(plan: Plan, p: PackedWeight, problem: Problem) -> None:
    """A `launch.Declare`.

    If rows are computed in slices and depend on each other, a first launch finds the outlier
    columns of all rows.
    """
    whole_x, bias = plan.operands
    at_once = quantizes(problem, configured(problem, plan.device)) and whole_x.data_ptr() % 16 == 0

    def rows(x: Symbolic, y: Symbolic, shared: Symbolic | None = None) -> None:
        if at_once:
            a = Activations(None, p.storage.get("input_scale"), x)
        else:
            a = quantize(plan, x, p, problem, columns=shared)
        multiply(plan, a, p, bias, problem, y)

    plan.by_rows(rows, whole_x, plan.y, before_slices=lambda: columns_of(plan, whole_x, p, problem))


run = whole(declare)


def configuration(problem: Problem) -> str:
    """Kernel, block sizes and split-K slices in words, for `explain`."""
    config = configured(problem, torch.device(problem.device))
    if not config.rows:
        tile = f"{HOPPER_M} rows of x and {HOPPER_N[traits_of(problem).kind]} of W a tile"
        return f"wgmma, {tile}, {config.split} blocks; activations quantized before"
    name = "GEMV, 16 rows of W" if config.gemv else f"GEMM, tiles of {TILE_N} rows of W"
    when = "in it" if quantizes(problem, config) else "before"
    tile = f"{name} by {config.rows} of x, {config.split} slices of K"
    return f"{tile}; activations quantized {when}"
