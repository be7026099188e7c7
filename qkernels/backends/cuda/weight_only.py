"""Launches the weight-only GEMV of csrc/weight_only/gemv.h: arguments from a packed weight, grid, workspace."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import formats, layouts
from ...layouts import weight_only as layout
from .. import cuda
from ..triton import workspace
from .calls import CODES, SCALE_TYPES, SCALINGS, WeightOnlyArgs, WeightOnlyCall

if TYPE_CHECKING:
    from ...dispatch import Problem
    from ...packed import PackedWeight

#: as in csrc/weight_only/gemv.h: warps that take tiles in turn, rows of W and of x in a block
WARPS, ROWS, COLUMNS = 4, 16, 8
#: tiles of activations in shared memory come in multiples of this: warps x tiles in flight
CHUNK = 16
#: shared memory for activations
STAGED_BYTES = 32 * 1024
#: blocks that run on a multiprocessor at a time: 128 threads of 128 registers
BLOCKS_PER_PROCESSOR = 4
#: rows of x in one launch, so that the workspace stays small
MAX_ROWS = 384


def traits_of(problem: Problem) -> layout.WeightOnlyTraits:
    return formats.get(problem.format).weight_only_traits(problem.shape, dict(problem.params))


def rejects(problem: Problem) -> str | None:
    if problem.m > COLUMNS and not problem.batch_invariant:
        return f"for up to {COLUMNS} rows of x"
    return unsupported(problem)


def unsupported(problem: Problem) -> str | None:
    """Why no CUDA weight-only kernel takes the format with these parameters."""
    traits = traits_of(problem)
    if (traits.decoder, traits.bits) not in CODES:
        return f"no CUDA decoder for {traits.bits}-bit {traits.decoder}"
    if traits.scaler not in SCALINGS:
        return f"no CUDA scaler {traits.scaler!r}"
    return None


def run(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    """x (M, K) contiguous float16 or bfloat16, p in the WEIGHT_ONLY layout -> y (M, N)."""
    assert p.layout == layouts.WEIGHT_ONLY
    traits = traits_of(problem)
    call = call_of(p, traits, x.dtype)
    # A bias of another dtype is cast at each call: N values.
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = torch.empty(x.shape[0], p.shape[0], dtype=x.dtype, device=x.device)
    for first in range(0, x.shape[0], MAX_ROWS):
        rows = slice(first, first + MAX_ROWS)
        part = x[rows]
        if part.data_ptr() % 4:  # the kernel reads two features at a time
            part = part.clone()
        _launch(part, p, bias, y[rows], call, traits)
    return y


def _launch(
    x: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    y: Tensor,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
) -> None:
    m, n = x.shape[0], p.shape[0]
    args = call.args
    tile = layout.tile_features(traits.bits)
    blocks_n, blocks_m = -(-n // ROWS), -(-m // COLUMNS)
    shares = shares_of(args.tiles, blocks_n, processors(x.device))
    args.share = -(-args.tiles // shares)
    args.chunk = chunk_of(args.share, tile, m)
    args.m, args.x, args.y = m, x.data_ptr(), y.data_ptr()
    args.bias = None if bias is None else bias.data_ptr()
    call.grid_x, call.grid_y = blocks_n * blocks_m, shares
    call.shared = shared_bytes(traits.bits, m, args.share)
    held: list[Tensor] = []
    if shares > 1:
        partial = workspace.partials(shares * blocks_n * blocks_m * ROWS * COLUMNS, x.device)
        counter = workspace.counters(x.device)
        args.partial, args.counter = partial.data_ptr(), counter.data_ptr()
        held = [partial, counter]
    reads = [x, *p.storage.values(), *([] if bias is None else [bias])]
    cuda.execute("weight_only_" + CODES[traits.decoder, traits.bits], call, reads, [y, *held])


def call_of(
    p: PackedWeight, traits: layout.WeightOnlyTraits, dtype: torch.dtype, kernel: int = 0
) -> WeightOnlyCall:
    """The fields that depend on the weight and x's dtype alone, found once."""
    key = ("cuda.weight_only", dtype, kernel)
    if key not in p.plans:
        p.plans[key] = _described(p, traits, dtype)
        p.plans[key].kernel = kernel
    found: WeightOnlyCall = p.plans[key]
    return found


def _described(p: PackedWeight, traits: layout.WeightOnlyTraits, dtype: torch.dtype) -> WeightOnlyCall:
    n, k = p.shape
    storage = p.storage
    scale = storage.get("scaler.scales", storage.get("scaler.absmax"))
    assert scale is not None
    kp = storage["perm"].numel() if "perm" in storage else k
    tile = layout.tile_features(traits.bits)
    run_length = layout.scale_run(traits, k, lookup="slice_group" in storage)
    group = traits.group_size
    args = WeightOnlyArgs(
        n=n, k=k, kp=kp, tiles=-(-kp // tile), group=group, row_run=traits.row_run, run=run_length,
        shift=group.bit_length() - 1 if group & (group - 1) == 0 else -1,
        scaling=SCALINGS[traits.scaler], scale=scale.data_ptr(),
        scale_type=SCALE_TYPES.get(scale.dtype, 0),  # codes of nested scales have no type
    )  # fmt: skip
    for field, name in (
        ("qdata", "qdata"), ("qhigh", "qhigh"), ("perm", "perm"), ("slice_group", "slice_group"),
        ("zero", "scaler.zeros"), ("nested_map", "scaler.nested_map"),
        ("nested_outer", "scaler.nested_absmax"), ("nested_offset", "scaler.offset"),
    ):  # fmt: skip
        if name in storage:
            setattr(args, field, storage[name].data_ptr())
    if "lut" in storage:  # float16 entries, then bfloat16 entries, 8 words each
        args.table = storage["lut"].data_ptr() + (32 if dtype == torch.bfloat16 else 0)
    runs = tile // run_length
    return WeightOnlyCall(
        args=args,
        runs=runs if runs in (1, 2, 4) else 0,
        is_bfloat=int(dtype == torch.bfloat16),
        size=ctypes.sizeof(WeightOnlyCall),
    )


def shares_of(tiles: int, blocks_n: int, count: int) -> int:
    """Parts to cut K into so that all blocks run at once; depends on the weight and the GPU, never on M."""
    wanted = max(1, BLOCKS_PER_PROCESSOR * count // blocks_n)
    wanted = min(wanted, max(1, tiles // WARPS), 32)
    return -(-tiles // -(-tiles // wanted))


def chunk_of(share: int, tile: int, m: int) -> int:
    """Tiles whose activations are staged at a time."""
    fits = STAGED_BYTES // (2 * min(m, COLUMNS) * tile * CHUNK)
    return CHUNK * max(1, min(fits, -(-share // CHUNK)))


def shared_bytes(bits: int, m: int = COLUMNS, share: int = 2**20) -> int:
    """Shared memory of a launch; by default of the largest."""
    tile = layout.tile_features(bits)
    return max(2 * min(m, COLUMNS) * chunk_of(share, tile, m) * tile, 4 * WARPS * ROWS * COLUMNS)


def configuration(problem: Problem) -> str:
    """What `explain` says."""
    traits = traits_of(problem)
    tiles = -(-problem.shape[1] // layout.tile_features(traits.bits))
    shares = shares_of(tiles, -(-problem.shape[0] // ROWS), processors(torch.device(problem.device)))
    again = f", which reads the weight {-(-problem.m // COLUMNS)} times" if problem.m > COLUMNS else ""
    return f"{COLUMNS} rows of x and {ROWS} of W a block, K in {shares} shares{again}"


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a few in the emulator, so that it meets split K, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
