"""Launches csrc/eight_bit: activations to codes, then the product of codes, two launches a call.

Structs mirror csrc/eight_bit/arguments.h, field for field.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...layouts import eight_bit as layout
from .. import workspace
from ..device import sm_count
from ..eight_bit import Activations, row_bytes, traits_of
from ..plan import NOW, Work
from .calls import Call
from .launch import start, whole

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: as csrc/ptx/eight_bit.h and csrc/eight_bit/arguments.h number them
KINDS = {"int8": 0, "e4m3": 1, "e5m2": 2}
SHARED = {"token": 0, "group": 1, "tensor": 2}
#: features of one step along K, rows of W of a tile of the GEMM and of the GEMV
STEP, TILE_N, GEMV_N = 128, 128, 16
#: rows of x up to which the GEMV is taken, and rows of x in a tile of the GEMM
GEMV_ROWS = (8, 16)
TILE_ROWS = (16, 32, 64, 128)
#: as in csrc/eight_bit/gemv.h, gemm.h and quantize.h: threads of a block, shared memory
GEMV_THREADS, GEMM_THREADS, QUANTIZE_SHARED = 128, 256, 128
#: as in csrc/eight_bit/hopper.h: rows of x of a tile, and of W by kind of code, threads of a block
HOPPER_M, HOPPER_N, HOPPER_THREADS = 128, {"int8": 256, "e4m3": 128, "e5m2": 128}, 384
#: fewer rows of x than this are left to the other kernel
HOPPER_ROWS = 129
#: blocks of the GEMV that one processor holds at a time
GEMV_BLOCKS = 4
#: bytes of partial sums that one product may take
PARTIAL_BYTES = 32 << 20


class QuantizeArgs(ctypes.Structure):
    __slots__ = ()  # a name that is no field is an AttributeError, not an attribute
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "x", "up", "norm", "rounded", "codes", "scale", "zero", "columns", "counter",
        )),
        ("eps", ctypes.c_float), ("threshold", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("m", "k", "kp", "shared", "is_int8", "is_bfloat", "vector")),
    ]  # fmt: skip


class EightBitArgs(ctypes.Structure):
    __slots__ = ()  # a name that is no field is an AttributeError, not an attribute
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "x", "weight", "x_scale", "w_scale", "zero", "row_sum", "bias", "x16", "columns", "y", "partial",
            "counter",
        )),
        ("threshold", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "m", "n", "k", "kp", "k_slice", "one_scale", "by_element", "is_bfloat",
        )),
    ]  # fmt: skip


class QuantizeCall(Call):
    _fields_ = [
        ("args", QuantizeArgs), ("stream", ctypes.c_uint64), ("pdl", ctypes.c_int), ("size", ctypes.c_int),
    ]  # fmt: skip


class EightBitCall(Call):
    _fields_ = [
        ("args", EightBitArgs), ("stream", ctypes.c_uint64), ("split", ctypes.c_uint32),
        *((name, ctypes.c_int) for name in ("is_gemv", "rows", "blocks", "pdl", "size")),
    ]  # fmt: skip


class Config(NamedTuple):
    """gemv: which kernel. rows: of x in a block. share: steps summed on their own. split: blocks
    along K.

    rows = 0: Hopper's kernel, in `split` blocks.
    """

    gemv: bool
    rows: int
    k_slice: int
    split: int


def configure(
    kind: str, shape: tuple[int, int], m: int, invariant: bool, count: int, hopper: bool = False
) -> Config:
    """Tiles for M = m on a GPU of `count` processors. With `invariant`, `share` does not depend on
    m.
    """
    return _configure(kind, shape, m, invariant, count, hopper, PARTIAL_BYTES)


@lru_cache(maxsize=4096)
def _configure(
    kind: str,
    shape: tuple[int, int],
    m: int,
    invariant: bool,
    count: int,
    hopper: bool,
    partial_bytes: int,
) -> Config:
    n, k = shape
    steps = -(-layout.padded(k) // STEP)
    if hopper and m >= HOPPER_ROWS and not invariant:
        tiles = -(-n // HOPPER_N[kind]) * -(-m // HOPPER_M)
        return Config(False, 0, steps, min(tiles, count))
    if m <= GEMV_ROWS[-1] and not invariant:
        rows = next(r for r in GEMV_ROWS if m <= r)
        blocks, least = -(-n // GEMV_N), 8  # two steps for each of four warps
        k_slices = _shares(steps, blocks, GEMV_BLOCKS * count, least)
        return Config(True, rows, *_evenly(steps, k_slices))
    sequential = invariant and kind != "int8"  # int8 is exact in any order
    fitting = [r for r in TILE_ROWS if not (sequential and r == 128)]
    rows = next((r for r in fitting if m <= r), fitting[-1])
    if rows == 128 and -(-n // TILE_N) * -(-m // 128) < count:
        rows = 64
    blocks_n = -(-n // TILE_N)
    tiles = blocks_n * -(-m // rows)
    k_slice, split = _evenly(steps, _shares(steps, blocks_n if sequential else tiles, count, 4))
    too_many = split * tiles * rows * TILE_N * 4 > partial_bytes or tiles > workspace.MAX_BLOCKS
    if too_many or tiles >= count:
        split = 1
    return Config(False, rows, k_slice if sequential or split > 1 else steps, split)


def hopper_shared_bytes(kind: str) -> int:
    """Shared memory of a block of Hopper's kernel: ring of steps, results of two warpgroups,
    barriers.
    """
    stages, piece = (4, 32) if kind == "int8" else (6, 64)
    return stages * (HOPPER_M + HOPPER_N[kind]) * STEP + HOPPER_M * (piece + 8) * 2 + 16 * stages


def has_wgmma(device: torch.device) -> bool:
    """Whether Hopper's kernel runs on this device, or in its emulator."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) == (9, 0)


def configured(problem: Problem, device: torch.device) -> Config:
    """Tiles for a call, by all rows of the problem: its slices are computed with the same."""
    kind = traits_of(problem).kind
    return configure(
        kind, problem.shape, problem.m, problem.batch_invariant, sm_count(device), has_wgmma(device)
    )  # fmt: skip


def shared_bytes(gemv: bool, rows: int) -> int:
    """Shared memory of a block: sums of four warps, or the ring of steps."""
    if gemv:
        return (4 * rows * 20 + 4) * 4
    return (3 if rows == 128 else 4) * (rows + TILE_N) * STEP


def _shares(steps: int, blocks: int, wanted: int, least: int) -> int:
    """Shares of K that bring `blocks` near to `wanted`, with `least` steps in each."""
    return max(1, min(wanted // blocks, steps // least))


def _evenly(steps: int, k_slices: int) -> tuple[int, int]:
    """Steps of a share, and how many shares that makes."""
    k_slice = -(-steps // k_slices)
    return k_slice, -(-steps // k_slice)


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _held(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def rejects(problem: Problem) -> str | None:
    """Nothing: every format of the family, any shape, from sm_80 on."""
    return None


# ---------------------------------------------------------------------- activations
def quantize(
    x: Tensor,
    p: PackedWeight,
    problem: Problem,
    *,
    up: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    keep: bool = False,
    work: Work = NOW,
    columns: Tensor | None = None,
) -> Activations:
    """x (M, K) contiguous -> its codes as the weight `p` wants them.

    up (M, K): silu(x) * up is quantized. norm (K): RMSNorm with this weight comes first. Both round
    to x's dtype where a model's operations do. keep: the result has what was quantized in 16 bits
    as `x` even where LLM.int8() does not need it. columns: what `outlier_columns` found in more
    rows than these.
    """
    traits = traits_of(problem)
    m, k = x.shape
    call, reads = _started(x, p, traits, up, norm, eps)
    args, storage, outliers = call.args, p.storage, traits.threshold > 0
    codes_dtype = torch.int8 if args.is_int8 else torch.float8_e4m3fn
    codes = work.empty((m, args.kp), codes_dtype, x.device)
    if traits.activation == "tensor":
        scale = storage["input_scale"]
    else:
        groups = (-(-k // layout.BLOCK),) if traits.activation == "group" else ()
        scale = work.empty((*groups, m), torch.float32, x.device)
    rounded = counter = None
    if (keep or outliers) and (up is not None or norm is not None):
        rounded = work.empty((m, k), x.dtype, x.device)
        args.rounded = rounded.data_ptr()
        args.vector &= rounded.data_ptr() % 16 == 0
    if outliers and columns is None:
        columns, counter = _list_columns(args, k, x.device, work)
    elif columns is not None:
        args.columns = columns.data_ptr()
    args.codes, args.scale = codes.data_ptr(), scale.data_ptr()
    reads += _held(storage.get("input_zero_point"))
    writes = _held(codes, rounded, columns, counter)
    (reads if traits.activation == "tensor" else writes).append(scale)
    start("quantize_rows", call, reads, writes, work)
    return Activations(codes, scale, x if rounded is None else rounded, columns)


def outlier_columns(
    x: Tensor,
    p: PackedWeight,
    problem: Problem,
    *,
    up: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor | None:
    """int32 (K + 1): the outlier columns of all rows of the problem in order, and at K how many
    they are.

    None where a row's result does not depend on the other rows. Operands as in `quantize`; no
    scratch memory.
    """
    traits = traits_of(problem)
    if not traits.threshold or problem.batch_invariant:
        return None
    call, reads = _started(x, p, traits, up, norm, eps)
    columns, counter = _list_columns(call.args, x.shape[1], x.device, NOW)
    start("quantize_rows", call, reads, [columns, counter])
    return columns


def _list_columns(
    args: QuantizeArgs, k: int, device: torch.device, work: Work
) -> tuple[Tensor, Tensor]:
    """Asks for the list of outlier columns; the list and the counter that it takes."""
    columns = work.empty((k + 1,), torch.int32, device)
    counter = counters(1 + -(-k // 32), device, work)
    args.columns, args.counter = columns.data_ptr(), counter.data_ptr()
    return columns, counter


def _started(
    x: Tensor,
    p: PackedWeight,
    traits: layout.EightBitTraits,
    up: Tensor | None,
    norm: Tensor | None,
    eps: float,
) -> tuple[QuantizeCall, list[Tensor]]:
    """A call with what is read of activations, and these tensors. ValueError if they do not fit."""
    m, k = x.shape
    for name, t, shape in (("up", up, (m, k)), ("norm", norm, (k,))):
        if t is not None and (
            t.dtype != x.dtype or tuple(t.shape) != shape or not t.is_contiguous()
        ):
            raise ValueError(
                f"{name}: expected contiguous {x.dtype} of shape {shape}, got {t.dtype} {tuple(t.shape)}"
            )
    call = _quantize_call(p, traits, x.dtype, m, eps)
    args = call.args
    together = args.x = x.data_ptr()
    for name, t in (("up", up), ("norm", norm)):
        if t is not None:
            setattr(args, name, t.data_ptr())
            together |= t.data_ptr()
    args.vector = k % 8 == 0 and together % 16 == 0
    return call, _held(x, up, norm)


def _quantize_call(
    p: PackedWeight, traits: layout.EightBitTraits, dtype: torch.dtype, m: int, eps: float
) -> QuantizeCall:
    """A copy of the call with all fields but the addresses of a call's tensors, found once."""
    key = ("cuda.quantize", dtype, m, eps)
    found: QuantizeCall | None = p.plans.get(key)
    if found is None:
        k = p.shape[1]
        args = QuantizeArgs(
            zero=_address(p.storage.get("input_zero_point")), eps=eps, threshold=traits.threshold,
            m=m, k=k, kp=layout.padded(k), shared=SHARED[traits.activation], is_int8=traits.kind == "int8",
            is_bfloat=dtype == torch.bfloat16,
        )  # fmt: skip
        found = p.plans[key] = QuantizeCall(args=args, size=ctypes.sizeof(QuantizeCall))
    return found.copy()


def counters(elements: int, device: torch.device, work: Work) -> Tensor:
    """int32 zeros, which kernels leave zero: the backend's counters, where they are enough of them."""
    if elements <= workspace.MAX_BLOCKS:
        return workspace.counters(device)
    return work.zeros((elements,), torch.int32, device)


# ---------------------------------------------------------------------- the product
def multiply(
    a: Activations,
    p: PackedWeight,
    bias: Tensor | None,
    problem: Problem,
    config: Config | None = None,
    out: Tensor | None = None,
    work: Work = NOW,
) -> Tensor:
    """y (M, N) = what `a` holds, times W^T, plus bias, in the dtype of `a.x`; into `out` if it is
    given.

    `a` may hold some rows of the problem only: they come out as they would among all.
    """
    traits, storage = traits_of(problem), p.storage
    n, m, device = p.shape[0], a.x.shape[0], a.x.device
    config = config or configured(problem, device)
    y = torch.empty(m, n, dtype=a.x.dtype, device=device) if out is None else out
    bias = None if bias is None else bias.to(a.x.dtype).contiguous()
    call = _product_call(p, traits, a.x.dtype, m, problem.batch_invariant, config)
    args, partial, counter = call.args, None, None
    if config.split > 1 and config.rows:
        tile = config.rows * (GEMV_N if config.gemv else TILE_N)
        blocks = -(-n // GEMV_N) if config.gemv else -(-n // TILE_N) * -(-m // config.rows)
        partial = work.empty((config.split * blocks * tile,), torch.float32, device)
        counter = counters(blocks, device, work)
        args.partial, args.counter = partial.data_ptr(), counter.data_ptr()
    args.x, args.x_scale, args.x16, args.y = (t.data_ptr() for t in (a.codes, a.scale, a.x, y))
    if a.columns is not None:
        args.columns = a.columns.data_ptr()
    if bias is not None:
        args.bias = bias.data_ptr()
    held = _held(a.codes, a.scale, a.x, a.columns, bias, *storage.values())
    start(f"eight_bit_{traits.kind}", call, held, _held(y, partial, counter), work)
    return y


def _product_call(
    p: PackedWeight,
    traits: layout.EightBitTraits,
    dtype: torch.dtype,
    m: int,
    invariant: bool,
    config: Config,
) -> EightBitCall:
    """A copy of the call with all fields but the addresses of a call's tensors."""
    key = ("cuda.eight_bit", dtype, invariant)
    found: EightBitCall | None = p.plans.get(key)
    if found is None:
        storage, (n, k) = p.storage, p.shape
        args = EightBitArgs(
            weight=_address(storage["weight"]), w_scale=_address(storage["weight_scale"]),
            zero=_address(storage.get("input_zero_point")), row_sum=_address(storage.get("row_sum")),
            threshold=traits.threshold, n=n, k=k, kp=layout.padded(k),
            one_scale=traits.activation == "tensor", by_element=invariant, is_bfloat=dtype == torch.bfloat16,
        )  # fmt: skip
        found = p.plans[key] = EightBitCall(
            args=args, blocks=traits.weight_scale == "block", size=ctypes.sizeof(EightBitCall)
        )
    call = found.copy()
    call.args.m, call.args.k_slice = m, config.k_slice
    call.split, call.is_gemv, call.rows = config.split, config.gemv, config.rows
    return call


def compute(
    x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem, y: Tensor, work: Work = NOW
) -> None:
    """x (M, K) contiguous float16 or bfloat16, p in the EIGHT_BIT layout -> y (M, N).

    Where rows go by slices and depend on each other, a launch for all of them finds the outlier
    columns first.
    """
    slices = work.slices(x.shape[0], scratch_bytes(problem, x.device))
    columns = outlier_columns(x, p, problem) if len(slices) > 1 else None
    for rows in slices:
        # Not held by a name, lest two slices have codes at a time.
        multiply(
            quantize(x[rows], p, problem, columns=columns, work=work),
            p,
            bias,
            problem,
            out=y[rows],
            work=work,
        )


run = whole(compute)


def scratch_bytes(problem: Problem, device: torch.device, made: bool = False) -> int:
    """Scratch memory that a row of x takes, as `row_bytes`, with its partial sums."""
    n = problem.shape[0]
    config = configured(problem, device)
    partial = config.split * -(-n // TILE_N) * TILE_N * 4 if config.split > 1 and config.rows else 0
    return row_bytes(problem, made) + partial


def configuration(problem: Problem) -> str:
    """What `explain` says."""
    config = configured(problem, torch.device(problem.device))
    if not config.rows:
        tile = f"{HOPPER_M} rows of x and {HOPPER_N[traits_of(problem).kind]} of W a tile"
        return f"wgmma, {tile}, {config.split} blocks; activations quantized before"
    name = "GEMV, 16 rows of W" if config.gemv else f"GEMM, tiles of {TILE_N} rows of W"
    return f"{name} by {config.rows} of x, {config.split} slices of K; activations quantized before"
