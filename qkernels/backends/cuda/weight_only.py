"""Launches the weight-only GEMV of csrc/weight_only/gemv.h: arguments from a packed weight, grid,
workspace.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import formats, layouts
from ...layouts import weight_only as layout
from .. import workspace
from ..device import sm_count
from ..plan import NOW, Work
from . import transforms
from .calls import (
    BOOK_WORDS,
    SCALE_TYPES,
    SCALER_TENSORS,
    SCALINGS,
    WeightOnlyArgs,
    WeightOnlyCall,
    kernel_name,
)
from .launch import start, whole

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: as in csrc/weight_only/gemv.h: warps that take tiles in turn, rows of W and of x in a block
WARPS, ROWS, COLUMNS = 4, 16, 8
#: tiles of activations in shared memory come in multiples of this: warps x tiles in flight
CHUNK = 16
#: shared memory for activations
STAGED_BYTES = 32 * 1024
#: and for sums of outliers, as in csrc/weight_only/outliers.h
SPARSE_BYTES = 4 * 8 * (ROWS * COLUMNS + 4)
#: blocks that run on a multiprocessor at a time: 128 threads of 128 registers
BLOCKS_PER_PROCESSOR = 4
#: rows of x in one launch, so that the workspace stays small
MAX_ROWS = 384


@lru_cache(maxsize=4096)
def traits_of(problem: Problem) -> layout.WeightOnlyTraits:
    return formats.get(problem.format).weight_only_traits(problem.shape, dict(problem.params))


def rejects(problem: Problem) -> str | None:
    if problem.m > COLUMNS and not problem.batch_invariant:
        return f"for up to {COLUMNS} rows of x"
    return unsupported(problem)


def unsupported(problem: Problem) -> str | None:
    """Why no CUDA weight-only kernel takes the format with these parameters."""
    traits = traits_of(problem)
    if kernel_name(traits.decoder, traits.bits, traits.scaler) is None:
        return f"no CUDA kernel for {traits.bits}-bit {traits.decoder} codes with scales {traits.scaler!r}"
    return None


def kernel_of(traits: layout.WeightOnlyTraits) -> str:
    """The kernel's name, of traits that `unsupported` has nothing against."""
    name = kernel_name(traits.decoder, traits.bits, traits.scaler)
    assert name is not None
    return name


def compute(
    x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem, y: Tensor, work: Work = NOW
) -> None:
    """x (M, K) contiguous float16 or bfloat16, p in the WEIGHT_ONLY layout, bias in x's dtype -> y
    (M, N).

    What is transformed goes by slices of rows. Nothing that orders a sum depends on M, so they
    change no bit.
    """
    assert p.layout == layouts.WEIGHT_ONLY
    traits = traits_of(problem)
    call = call_of(p, traits, x.dtype)

    def multiply(x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        _multiply(x, p, bias, y, call, traits, work)

    if traits.transform_scales is None:
        multiply(x, bias, y)
        return
    held = (
        partial_elements(
            p.shape[0], min(x.shape[0], MAX_ROWS), k_slices_for(p.shape, traits, x.device)
        )
        * 4
    )
    for rows in work.slices(x.shape[0], transforms.row_bytes(p, traits), held):
        transforms.around(multiply, x[rows], p, bias, traits, y[rows], work)


run = whole(compute)


def _multiply(
    x: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    y: Tensor,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
    work: Work,
) -> None:
    """Without transforms: x as the codes want it, y in x's dtype, in float32 if a transform comes
    next. MAX_ROWS rows at a time.
    """
    for first in range(0, x.shape[0], MAX_ROWS):
        rows = slice(first, first + MAX_ROWS)
        part, into = (x, y) if x.shape[0] <= MAX_ROWS else (x[rows], y[rows])
        if part.data_ptr() % 4:  # the kernel reads two features at a time
            part = work.by_torch(part.clone())
        _launch(part, p, bias, into, call, traits, work)


def partial_elements(n: int, m: int, k_slices: int) -> int:
    """Of the partial sums of a launch."""
    return k_slices * -(-n // ROWS) * -(-m // COLUMNS) * ROWS * COLUMNS if k_slices > 1 else 0


def _launch(
    x: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    y: Tensor,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
    work: Work,
) -> None:
    m, n = x.shape[0], p.shape[0]
    args = call.args
    tile = layout.tile_features(traits.bits, traits.codebook)
    blocks_n, blocks_m = -(-n // ROWS), -(-m // COLUMNS)
    k_slices = k_slices_for(p.shape, traits, x.device)
    args.k_slice = -(-args.tiles // k_slices)
    args.chunk = chunk_of(args.k_slice, tile, m)
    args.m, args.x, args.y = m, x.data_ptr(), y.data_ptr()
    args.bias = None if bias is None else bias.data_ptr()
    call.grid_x, call.grid_y = blocks_n * blocks_m, k_slices
    call.shared = shared_bytes(
        traits.decoder, traits.bits, m, args.k_slice, outliers=traits.outliers
    )
    held: list[Tensor] = []
    if elements := partial_elements(n, m, k_slices):
        partial = work.empty((elements,), torch.float32, x.device)
        counter = workspace.counters(x.device)
        args.partial, args.counter = partial.data_ptr(), counter.data_ptr()
        held = [partial, counter]
    reads = [x, *p.storage.values(), *([] if bias is None else [bias])]
    start(kernel_of(traits), call, reads, [y, *held], work)


def call_of(
    p: PackedWeight, traits: layout.WeightOnlyTraits, dtype: torch.dtype, kernel: int = 0
) -> WeightOnlyCall:
    """A copy of the call with the fields that depend on the weight and x's dtype alone, found once."""
    key = ("cuda.weight_only", dtype, kernel)
    if key not in p.plans:
        p.plans[key] = _described(p, traits, dtype)
        p.plans[key].kernel = kernel
    found: WeightOnlyCall = p.plans[key]
    return found.copy()


def _described(
    p: PackedWeight, traits: layout.WeightOnlyTraits, dtype: torch.dtype
) -> WeightOnlyCall:
    n, k = p.shape
    storage = p.storage
    names = SCALER_TENSORS.get(
        traits.scaler, ("scales" if "scaler.scales" in storage else "absmax",)
    )
    scale = storage[f"scaler.{names[0]}"]
    if traits.codebook:
        k = traits.group_size  # x comes out of its transform in whole tiles
    kp = storage["perm"].numel() if "perm" in storage else k
    tile = layout.tile_features(traits.bits, traits.codebook)
    scale_group = layout.scale_group(traits, k, group_lookup="slice_group" in storage)
    group = traits.group_size
    args = WeightOnlyArgs(
        n=n, k=k, kp=kp, tiles=-(-kp // tile), group=group, row_group=traits.row_group, scale_group=scale_group,
        shift=group.bit_length() - 1 if group & (group - 1) == 0 else -1,
        scaling=SCALINGS.get(traits.scaler, 0),  # other scalers have kernels of their own
        scale_type=SCALE_TYPES.get(scale.dtype, 0),  # codes of nested scales have no type
        is_float=traits.transform_scales is not None,
    )  # fmt: skip
    for field, name in (
        ("qdata", "qdata"), ("qhigh", "qhigh"), ("perm", "perm"), ("slice_group", "slice_group"),
        ("zero", "scaler.zeros"), ("nested_map", "scaler.nested_map"),
        ("nested_outer", "scaler.nested_absmax"), ("nested_offset", "scaler.offset"),
        ("row_offsets", "outlier.row_offsets"), ("col_vals", "outlier.col_vals"),
        *zip(("scale", "second", "third"), (f"scaler.{name}" for name in names), strict=False),
    ):  # fmt: skip
        if name in storage:
            setattr(args, field, storage[name].data_ptr())
    # a codebook; or a table's float16 entries, then bfloat16 entries, 8 words each
    if "lut" in storage:
        args.table = storage["lut"].data_ptr() + (
            32 if "table" in storage and dtype == torch.bfloat16 else 0
        )
    scale_groups = tile // scale_group
    return WeightOnlyCall(
        args=args,
        scale_groups=scale_groups if scale_groups in (1, 2, 4) else 0,
        is_bfloat=int(dtype == torch.bfloat16),
        size=ctypes.sizeof(WeightOnlyCall),
    )


def tiles_of(shape: tuple[int, int], traits: layout.WeightOnlyTraits) -> int:
    """Tiles along K; where groups are padded a launch has more, in the shares that these are cut
    into.
    """
    return -(-shape[1] // layout.tile_features(traits.bits, traits.codebook))


def k_slices_for(
    shape: tuple[int, int], traits: layout.WeightOnlyTraits, device: torch.device
) -> int:
    """Parts of K in every launch for a weight."""
    return k_slices_of(tiles_of(shape, traits), -(-shape[0] // ROWS), sm_count(device))


@lru_cache(maxsize=4096)
def k_slices_of(tiles: int, blocks_n: int, count: int) -> int:
    """Parts to cut K into so that all blocks run at once; depends on the weight and the GPU, never
    on M.
    """
    wanted = max(1, BLOCKS_PER_PROCESSOR * count // blocks_n)
    wanted = min(wanted, max(1, tiles // WARPS), 32)
    return -(-tiles // -(-tiles // wanted))


@lru_cache(maxsize=4096)
def chunk_of(k_slice: int, tile: int, m: int) -> int:
    """Tiles whose activations are staged at a time."""
    fits = STAGED_BYTES // (2 * min(m, COLUMNS) * tile * CHUNK)
    return CHUNK * max(1, min(fits, -(-k_slice // CHUNK)))


@lru_cache(maxsize=4096)
def shared_bytes(
    decoder: str, bits: int, m: int = COLUMNS, k_slice: int = 2**20, *, outliers: bool = False
) -> int:
    """Shared memory of a launch; by default of the largest."""
    tile = layout.tile_features(bits, decoder == "e8p")
    staged = max(
        2 * min(m, COLUMNS) * chunk_of(k_slice, tile, m) * tile, 4 * WARPS * ROWS * COLUMNS
    )
    return book_bytes(decoder, bits) + staged + (SPARSE_BYTES if outliers else 0)


def book_bytes(decoder: str, bits: int) -> int:
    """Of the decoder's codebook, in front of what else is in shared memory."""
    return 4 * BOOK_WORDS.get((decoder, bits), 0)


def configuration(problem: Problem) -> str:
    """What `explain` says."""
    k_slices = k_slices_for(problem.shape, traits_of(problem), torch.device(problem.device))
    again = (
        f", which reads the weight {-(-problem.m // COLUMNS)} times" if problem.m > COLUMNS else ""
    )
    return f"{COLUMNS} rows of x and {ROWS} of W a block, K in {k_slices} slices{again}"
