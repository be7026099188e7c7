"""Launches csrc/eight_bit: activations to codes, then the product of codes, two launches a call.

Structs mirror csrc/eight_bit/arguments.h, field for field.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...layouts import eight_bit as layout
from .. import cuda
from ..triton import workspace
from ..triton.eight_bit import Activations, row_bytes, traits_of
from .weight_only import processors

if TYPE_CHECKING:
    from ...dispatch import Problem
    from ...packed import PackedWeight

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
#: blocks of the GEMV that one processor holds at a time
GEMV_BLOCKS = 4
#: bytes of partial sums that one product may take
PARTIAL_BYTES = 32 << 20


class QuantizeArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "x", "up", "norm", "rounded", "codes", "scale", "zero", "columns", "counter",
        )),
        ("eps", ctypes.c_float), ("threshold", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("m", "k", "kp", "shared", "is_int8", "is_bfloat", "vector")),
    ]  # fmt: skip


class EightBitArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "x", "weight", "x_scale", "w_scale", "zero", "row_sum", "bias", "x16", "columns", "y", "partial",
            "counter",
        )),
        ("threshold", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "m", "n", "k", "kp", "share", "one_scale", "by_element", "is_bfloat",
        )),
    ]  # fmt: skip


class QuantizeCall(ctypes.Structure):
    _fields_ = [
        ("args", QuantizeArgs), ("stream", ctypes.c_uint64), ("early", ctypes.c_int), ("size", ctypes.c_int),
    ]  # fmt: skip


class EightBitCall(ctypes.Structure):
    _fields_ = [
        ("args", EightBitArgs), ("stream", ctypes.c_uint64), ("split", ctypes.c_uint32),
        *((name, ctypes.c_int) for name in ("is_gemv", "rows", "blocks", "early", "size")),
    ]  # fmt: skip


class Config(NamedTuple):
    """gemv: which kernel. rows: of x in a block. share: steps summed on their own. split: blocks along K."""

    gemv: bool
    rows: int
    share: int
    split: int


def configure(kind: str, shape: tuple[int, int], m: int, invariant: bool, count: int) -> Config:
    """Tiles for M = m on a GPU of `count` processors. With `invariant`, `share` does not depend on m."""
    n, k = shape
    steps = -(-layout.padded(k) // STEP)
    if m <= GEMV_ROWS[-1] and not invariant:
        rows = next(r for r in GEMV_ROWS if m <= r)
        blocks, least = -(-n // GEMV_N), 8  # two steps for each of four warps
        shares = _shares(steps, blocks, GEMV_BLOCKS * count, least)
        return Config(True, rows, *_evenly(steps, shares))
    sequential = invariant and kind != "int8"  # int8 is exact in any order
    fitting = [r for r in TILE_ROWS if not (sequential and r == 128)]
    rows = next((r for r in fitting if m <= r), fitting[-1])
    if rows == 128 and -(-n // TILE_N) * -(-m // 128) < count:
        rows = 64
    blocks_n = -(-n // TILE_N)
    tiles = blocks_n * -(-m // rows)
    share, split = _evenly(steps, _shares(steps, blocks_n if sequential else tiles, count, 4))
    too_many = split * tiles * rows * TILE_N * 4 > PARTIAL_BYTES or tiles > workspace.MAX_BLOCKS
    if too_many or tiles >= count:
        split = 1
    return Config(False, rows, share if sequential or split > 1 else steps, split)


def shared_bytes(gemv: bool, rows: int) -> int:
    """Shared memory of a block: sums of four warps, or the ring of steps."""
    if gemv:
        return (4 * rows * 20 + 4) * 4
    return (3 if rows == 128 else 4) * (rows + TILE_N) * STEP


def _shares(steps: int, blocks: int, wanted: int, least: int) -> int:
    """Shares of K that bring `blocks` near to `wanted`, with `least` steps in each."""
    return max(1, min(wanted // blocks, steps // least))


def _evenly(steps: int, shares: int) -> tuple[int, int]:
    """Steps of a share, and how many shares that makes."""
    share = -(-steps // shares)
    return share, -(-steps // share)


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
) -> Activations:
    """x (M, K) contiguous -> its codes as the weight `p` wants them.

    up (M, K): silu(x) * up is quantized. norm (K): RMSNorm with this weight comes first. Both round to
    x's dtype where a model's operations do. keep: the result has what was quantized in 16 bits as `x`
    even where LLM.int8() does not need it.
    """
    traits = traits_of(problem)
    m, k = x.shape
    for name, t, shape in (("up", up, (m, k)), ("norm", norm, (k,))):
        if t is not None and (t.dtype != x.dtype or tuple(t.shape) != shape or not t.is_contiguous()):
            raise ValueError(
                f"{name}: expected contiguous {x.dtype} of shape {shape}, got {t.dtype} {tuple(t.shape)}"
            )
    kp, int8 = layout.padded(k), traits.kind == "int8"
    codes = torch.empty(m, kp, dtype=torch.int8 if int8 else torch.float8_e4m3fn, device=x.device)
    if traits.activation == "tensor":
        scale = p.storage["input_scale"]
    else:
        groups = (-(-k // layout.BLOCK),) if traits.activation == "group" else ()
        scale = torch.empty(*groups, m, dtype=torch.float32, device=x.device)
    rounded = torch.empty_like(x) if (keep or traits.threshold > 0) and (up is not None or norm is not None) \
        else None  # fmt: skip
    columns = counter = None
    if traits.threshold > 0:
        columns = torch.empty(k + 1, dtype=torch.int32, device=x.device)
        counter = counters(1 + -(-k // 32), x.device)
    wide = [t for t in (x, up, norm, rounded) if t is not None]
    args = QuantizeArgs(
        x=_address(x), up=_address(up), norm=_address(norm), rounded=_address(rounded), codes=_address(codes),
        scale=_address(scale), zero=_address(p.storage.get("input_zero_point")), columns=_address(columns),
        counter=_address(counter), eps=eps, threshold=traits.threshold, m=m, k=k, kp=kp,
        shared=SHARED[traits.activation], is_int8=int8, is_bfloat=x.dtype == torch.bfloat16,
        vector=k % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in wide),
    )  # fmt: skip
    reads = _held(x, up, norm, p.storage.get("input_zero_point"))
    writes = _held(codes, rounded, columns, counter)
    (reads if traits.activation == "tensor" else writes).append(scale)
    cuda.execute("quantize_rows", QuantizeCall(args=args, size=ctypes.sizeof(QuantizeCall)), reads, writes)
    return Activations(codes, scale, x if rounded is None else rounded, columns)


def counters(elements: int, device: torch.device) -> Tensor:
    """int32 zeros, which kernels leave zero: the backend's counters, where they are enough of them."""
    if elements <= workspace.MAX_BLOCKS:
        return workspace.counters(device)
    return torch.zeros(elements, dtype=torch.int32, device=device)


# ---------------------------------------------------------------------- the product
def multiply(
    a: Activations,
    p: PackedWeight,
    bias: Tensor | None,
    problem: Problem,
    config: Config | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y (M, N) = what `a` holds, times W^T, plus bias, in the dtype of `a.x`; into `out` if it is given.

    `a` may hold some rows of the problem only: they come out as they would among all.
    """
    traits, storage = traits_of(problem), p.storage
    n, k = p.shape
    m, device = a.x.shape[0], a.x.device
    config = config or configure(traits.kind, p.shape, problem.m, problem.batch_invariant, processors(device))
    y = torch.empty(m, n, dtype=a.x.dtype, device=device) if out is None else out
    bias = None if bias is None else bias.to(a.x.dtype).contiguous()
    partial = counter = None
    if config.split > 1:
        tile = config.rows * (GEMV_N if config.gemv else TILE_N)
        blocks = -(-n // GEMV_N) if config.gemv else -(-n // TILE_N) * -(-m // config.rows)
        partial = workspace.partials(config.split * blocks * tile, device)
        counter = counters(blocks, device)
    args = EightBitArgs(
        x=_address(a.codes), weight=_address(storage["weight"]), x_scale=_address(a.scale),
        w_scale=_address(storage["weight_scale"]), zero=_address(storage.get("input_zero_point")),
        row_sum=_address(storage.get("row_sum")), bias=_address(bias), x16=_address(a.x),
        columns=_address(a.columns), y=_address(y), partial=_address(partial), counter=_address(counter),
        threshold=traits.threshold, m=m, n=n, k=k, kp=layout.padded(k), share=config.share,
        one_scale=traits.activation == "tensor", by_element=problem.batch_invariant,
        is_bfloat=a.x.dtype == torch.bfloat16,
    )  # fmt: skip
    call = EightBitCall(
        args=args, split=config.split, is_gemv=config.gemv, rows=config.rows,
        blocks=traits.weight_scale == "block", size=ctypes.sizeof(EightBitCall),
    )  # fmt: skip
    held = _held(a.codes, a.scale, a.x, a.columns, bias, *p.storage.values())
    cuda.execute(f"eight_bit_{traits.kind}", call, held, _held(y, partial, counter))
    return y


def run(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    """x (M, K) contiguous float16 or bfloat16, p in the EIGHT_BIT layout -> y (M, N)."""
    y = torch.empty(x.shape[0], p.shape[0], dtype=x.dtype, device=x.device)
    for rows in workspace.slices(x.shape[0], scratch_bytes(problem, x.device)):
        multiply(quantize(x[rows], p, problem), p, bias, problem, out=y[rows])
    return y


def scratch_bytes(problem: Problem, device: torch.device, made: bool = False) -> int:
    """Scratch memory that a row of x takes, as `row_bytes`, with its partial sums."""
    n = problem.shape[0]
    kind, invariant = traits_of(problem).kind, problem.batch_invariant
    split = configure(kind, problem.shape, problem.m, invariant, processors(device)).split
    size = row_bytes(problem, made)
    return size + (split * -(-n // TILE_N) * TILE_N * 4 if split > 1 else 0) if size else 0


def configuration(problem: Problem) -> str:
    """What `explain` says."""
    count = processors(torch.device(problem.device))
    config = configure(traits_of(problem).kind, problem.shape, problem.m, problem.batch_invariant, count)
    name = "GEMV, 16 rows of W" if config.gemv else f"GEMM, tiles of {TILE_N} rows of W"
    return f"{name} by {config.rows} of x, {config.split} shares of K; activations quantized before"
