"""Launches the weight-only decode kernel of csrc/weight_only/decode.h, for up to 16 rows of x.

It also fills in the arguments of a packed weight for the other weight-only kernels.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import layouts
from ...layouts import codecs
from ...layouts import weight_only as layout
from ...layouts.codecs import CodeKind
from ..device import sm_count
from ..plan import Plan, Symbolic
from ..weight_only import traits_of
from . import k_slices, transforms
from .calls import SCALE_TYPES, SCALINGS, WeightOnlyArgs, WeightOnlyCall, divisor
from .launch import start, whole

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: as in csrc/weight_only/decode.h: warps of a block, tiles that each has in flight, rows of W of a
#: block, and the most rows of x
WARPS, STAGES, ROWS, COLUMNS = 8, 4, 32, 16
#: bytes of shared memory for sums of outliers, as in csrc/weight_only/outliers.h: 8 threads a row
SPARSE_BYTES = {columns: 4 * 8 * (ROWS * columns + 4) for columns in (8, 16)}
#: blocks that run on an SM at a time
BLOCKS_PER_SM = 2
#: the most split-K slices of a launch
MAX_K_SLICES = 32
#: rows of x in one launch, so that the workspace stays small
MAX_ROWS = 384


def rejects(problem: Problem) -> str | None:
    """Why this kernel does not take the problem, or None."""
    if problem.m > COLUMNS and not problem.batch_invariant:
        return f"for up to {COLUMNS} rows of x"
    if problem.shape[0] < ROWS:
        return f"for {ROWS} rows of W and more"
    return unsupported(problem)


def unsupported(problem: Problem) -> str | None:
    """Why no CUDA weight-only kernel takes the format with these parameters, or None."""
    traits = traits_of(problem)
    if codecs.cuda_kernel(traits.codes, traits.scaler) is None:
        codes = f"{traits.bits}-bit {traits.decoder} codes"
        return f"no CUDA kernel for {codes} with scales {traits.scaler!r}"
    return None


def kernel_of(traits: layout.WeightOnlyTraits) -> str:
    """The kernel's name, for traits that `unsupported` accepts."""
    name = codecs.cuda_kernel(traits.codes, traits.scaler)
    assert name is not None
    return name


def declare(plan: Plan, p: PackedWeight, problem: Problem) -> None:
    """A `launch.Declare`.

    A weight between transforms is computed for slices of rows. The order of sums does not depend on
    M, so slices change no bit.
    """
    assert p.layout == layouts.WEIGHT_ONLY
    traits = traits_of(problem)
    x, bias = plan.operands
    call = call_of(p, traits, x.dtype)

    def multiply(x: Symbolic, bias: Symbolic | None, y: Symbolic) -> None:
        _multiply(plan, x, p, bias, y, call, traits)

    def rows(x: Symbolic, y: Symbolic) -> None:
        transforms.around(plan, multiply, x, p, bias, traits, y)

    plan.by_rows(rows, x, plan.y)


run = whole(declare)


def _multiply(
    plan: Plan,
    x: Symbolic,
    p: PackedWeight,
    bias: Symbolic | None,
    y: Symbolic,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
) -> None:
    """Multiply without transforms, MAX_ROWS rows at a time.

    x is in the order of codes. y is in x's dtype, or in float32 if a transform follows.
    """
    for first in range(0, x.shape[0], MAX_ROWS):
        rows = slice(first, first + MAX_ROWS)
        with plan.reused():
            part = x[rows]
            if part.data_ptr() % 4:  # the kernel reads two features at a time
                part = plan.empty(part.shape, x.dtype)
                plan.by_torch(Tensor.copy_, part, x[rows])
            _launch(plan, part, p, bias, y[rows], call, traits)


def _launch(
    plan: Plan,
    x: Symbolic,
    p: PackedWeight,
    bias: Symbolic | None,
    y: Symbolic,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
) -> None:
    """Declare the kernel's launch for at most MAX_ROWS rows."""
    m, n = x.shape[0], p.shape[0]
    args, columns = call.args, columns_for(m)
    blocks = -(-n // ROWS) * -(-m // columns)
    count = k_slices_for(p.shape, traits, x.device)
    args.k_slice = k_slices.steps_of(args.tiles, count)
    args.m, args.x, args.y = m, x.data_ptr(), y.data_ptr()
    args.x_chunks = int("perm" not in p.storage and x.shape[1] % 8 == 0 and args.x % 16 == 0)
    args.bias = None if bias is None else bias.data_ptr()
    call.grid_x, call.grid_y = blocks, count
    args.stage_bytes = stage_bytes(traits.codes, m)
    call.shared = shared_bytes(traits.codes, m, outliers=traits.outliers)
    scratch: list[Symbolic] = []
    if count > 1:
        scratch = [
            plan.empty((count * blocks * ROWS * columns,), torch.float32), plan.counters(blocks)
        ]  # fmt: skip
        args.partial, args.counter = (t.data_ptr() for t in scratch)
    reads = [x, *p.storage.values(), *([] if bias is None else [bias])]
    start(plan, kernel_of(traits), call, reads, [y, *scratch])


def call_of(
    p: PackedWeight, traits: layout.WeightOnlyTraits, dtype: torch.dtype, kernel: int = 0
) -> WeightOnlyCall:
    """A copy of the weight's call template, in which x, y and scratch memory are not set."""
    key = ("cuda.weight_only", dtype, kernel)
    template: WeightOnlyCall | None = p.plans.get(key)
    if template is None:
        template = _call_template(p, traits, dtype)
        template.kernel = kernel
        p.plans[key] = template  # last, because other threads copy it from now on
    return template.copy()


def _call_template(
    p: PackedWeight, traits: layout.WeightOnlyTraits, dtype: torch.dtype
) -> WeightOnlyCall:
    """The call with the fields that depend only on the weight and x's dtype."""
    n, k = p.shape
    storage, codes, scales = p.storage, traits.codes, traits.scales
    scaler = [storage[f"scaler.{name}"] for name in scales.tensors]
    if codes.codebook:
        k = traits.group_size  # the transform writes x in whole tiles
    kp = storage["perm"].numel() if "perm" in storage else k
    scale_group = layout.scale_group(traits, k, group_lookup="slice_group" in storage)
    group = traits.group_size
    args = WeightOnlyArgs(
        n=n, k=k, kp=kp, tiles=-(-kp // codes.tile),
        group=group, row_group=traits.row_group, scale_group=scale_group,
        shift=group.bit_length() - 1 if group & (group - 1) == 0 else -1,
        scale_stride=-(-n // traits.row_group), last_group=(kp - 1) // group,
        group_divisor=divisor(max(1, group // scale_group), -(-kp // scale_group)),
        row_divisor=divisor(traits.row_group, n),
        # kernels of one scaler ignore it
        scaling=SCALINGS.get((scales.zero, scales.flat, scales.nested), 0),
        scale_type=SCALE_TYPES.get(scaler[0].dtype, 0),  # unused for codes of scales
        is_float=traits.transform_scales is not None,
    )  # fmt: skip
    for field, name in (
        ("qdata", "qdata"), ("qhigh", "qhigh"), ("perm", "perm"), ("slice_group", "slice_group"),
        ("row_offsets", "outlier.row_offsets"), ("col_vals", "outlier.col_vals"),
    ):  # fmt: skip
        if name in storage:
            setattr(args, field, storage[name].data_ptr())
    for i, tensor in enumerate(scaler):
        setattr(args, f"scaler{i}", tensor.data_ptr())
    # "lut" is a codebook; or the table's entries in float16, then in bfloat16, 8 words each
    if "lut" in storage:
        args.table = storage["lut"].data_ptr() + (
            32 if codes.table and dtype == torch.bfloat16 else 0
        )
    scale_groups = codes.tile // scale_group
    return WeightOnlyCall(
        args=args,
        scale_groups=scale_groups if scale_groups in (1, 2, 4) else 0,
        is_bfloat=int(dtype == torch.bfloat16),
        size=ctypes.sizeof(WeightOnlyCall),
    )


def tiles_of(shape: tuple[int, int], traits: layout.WeightOnlyTraits) -> int:
    """Tiles along K, which give the number of split-K slices.

    A launch has more tiles if groups are padded; it cuts them into the same number of slices.
    """
    return -(-shape[1] // traits.codes.tile)


def k_slices_for(
    shape: tuple[int, int], traits: layout.WeightOnlyTraits, device: torch.device
) -> int:
    """Split-K slices of every launch for a weight. They depend on the GPU, and never on M."""
    blocks_n, resident = -(-shape[0] // ROWS), BLOCKS_PER_SM * sm_count(device)
    return k_slices.count_for(tiles_of(shape, traits), blocks_n, resident, WARPS, MAX_K_SLICES)


def has_constants(codes: CodeKind) -> bool:
    """Whether the kernel decodes weights off by constants, which a product more puts right."""
    return codes.offset is not None or (codes.codebook and codes.bits == 2)


def columns_for(m: int) -> int:
    """Rows of x of a block."""
    return 8 if m <= 8 else COLUMNS


@lru_cache(maxsize=4096)
def shared_bytes(codes: CodeKind, m: int = COLUMNS, *, outliers: bool = False) -> int:
    """Shared memory of a block; by default of the largest launch."""
    columns = columns_for(m)
    sums = 4 * WARPS * ROWS * min(m, columns) + 256
    sparse = SPARSE_BYTES[columns] if outliers else 0
    return 4 * codes.book_words + sums + sparse + WARPS * STAGES * stage_bytes(codes, m)


def stage_bytes(codes: CodeKind, m: int) -> int:
    """Shared memory of a tile of a warp: codes, their high bits, and x."""
    return ROWS * (64 + 4 * codes.high_words) + min(m, columns_for(m)) * codes.tile * 2


def configuration(problem: Problem) -> str:
    """Block sizes and split-K slices in words, for `explain`."""
    count = k_slices_for(problem.shape, traits_of(problem), torch.device(problem.device))
    again = (
        f", which reads the weight {-(-problem.m // COLUMNS)} times" if problem.m > COLUMNS else ""
    )
    columns = columns_for(problem.m)
    return f"{columns} rows of x and {ROWS} of W a block, K in {count} slices{again}"
