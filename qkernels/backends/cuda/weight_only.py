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
from ..device import shared_bytes as device_shared_bytes
from ..device import sm_count
from ..plan import Plan, Symbolic
from ..weight_only import traits_of
from . import k_slices, transforms
from .calls import SCALE_TYPES, SCALINGS, WeightOnlyArgs, WeightOnlyCall, divisor
from .launch import start, whole

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: as in csrc/weight_only: the fewest rows of W of a block, tiles of a warp in shared memory
ROWS, STAGES = 32, 3
#: the most rows of x
MOST = 16
#: warps of a block: the first number with which every launch for a weight fits in shared memory
WARPS = (8, 4, 2)
#: bytes of the table of pairs, which codes of a table of 16 values are looked up in
PAIRS_BYTES = 64 * 1024
#: the most split-K slices of a launch
MAX_K_SLICES = 32
#: rows of x in one launch, so that the workspace stays small
MAX_ROWS = 384


def rejects(problem: Problem) -> str | None:
    """Why this kernel does not take the problem, or None."""
    if problem.m > MOST and not problem.batch_invariant:
        return f"for up to {MOST} rows of x"
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
        _multiply(plan, x, p, bias, y, call, traits, problem.batch_invariant)

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
    invariant: bool,
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
            _launch(plan, part, p, bias, y[rows], call, traits, invariant)


def _launch(
    plan: Plan,
    x: Symbolic,
    p: PackedWeight,
    bias: Symbolic | None,
    y: Symbolic,
    call: WeightOnlyCall,
    traits: layout.WeightOnlyTraits,
    invariant: bool,
) -> None:
    """Declare the kernel's launch for at most MAX_ROWS rows."""
    m, n = x.shape[0], p.shape[0]
    args = call.args
    columns = columns_for(m, n, traits, call.scale_groups, invariant, device_shared_bytes(x.device))
    rows = rows_for(traits, columns)
    blocks = -(-n // rows) * -(-m // columns)
    count, warps = k_slices_for(p.shape, traits, x.device), warps_for(traits, x.device)
    args.k_slice = k_slices.steps_of(args.tiles, count)
    args.m, args.x, args.y = m, x.data_ptr(), y.data_ptr()
    args.x_chunks = int("perm" not in p.storage and x.shape[1] % 8 == 0 and args.x % 16 == 0)
    args.bias = None if bias is None else bias.data_ptr()
    args.stage_bytes = stage_bytes(traits, columns, min(m, columns))
    call.grid_x, call.grid_y, call.threads = blocks, count, 32 * warps
    call.rows, call.columns = rows, columns
    call.shared = shared_bytes(traits, columns, min(m, columns), warps)
    scratch: list[Symbolic] = []
    if count > 1:
        scratch = partial_sums(plan, args, count * blocks * rows * columns, blocks)
    reads = [x, *p.storage.values(), *([] if bias is None else [bias])]
    start(plan, kernel_of(traits), call, reads, [y, *scratch])


def partial_sums(plan: Plan, args: WeightOnlyArgs, sums: int, counters: int) -> list[Symbolic]:
    """Scratch memory of split-K slices, sums and counters, whose addresses are put into args."""
    scratch = [plan.empty((sums,), torch.float32), plan.counters(counters)]
    args.partial, args.counter = (t.data_ptr() for t in scratch)
    return scratch


def call_of(
    p: PackedWeight, traits: layout.WeightOnlyTraits, dtype: torch.dtype, kernel: int = 0
) -> WeightOnlyCall:
    """A copy of the weight's call template, in which x, y and scratch memory are not set."""
    key = ("cuda.weight_only", dtype, kernel)
    template: WeightOnlyCall | None = p.plans.get(key)
    if template is None:
        template = _call_template(p, traits, dtype)
        template.kernel = kernel
        if kernel == 0:
            template.scale_groups = decode_groups(traits, template)
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
    unit = layout.SLICE if traits.scaler == "two_level" else scale_group
    args = WeightOnlyArgs(
        n=n, k=k, kp=kp, tiles=-(-kp // codes.tile),
        group=group, row_group=traits.row_group, scale_group=scale_group,
        shift=group.bit_length() - 1 if group & (group - 1) == 0 else -1,
        scale_stride=-(-n // traits.row_group), last_group=(kp - 1) // group,
        scale_row_bytes=-(-n // traits.row_group) * scaler[0].element_size(),
        x_tail=int(k % codes.tile != 0),
        group_divisor=divisor(-(-group // unit), -(-kp // unit)),
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
    """Split-K slices of every launch for a weight. They depend on the GPU, and never on M.

    All blocks together are near twice the number of SMs, which hold two blocks each.
    """
    blocks, resident = -(-shape[0] // ROWS), 2 * sm_count(device)
    tiles, warps = tiles_of(shape, traits), warps_for(traits, device)
    return k_slices.count_for(tiles, blocks, resident + blocks // 2, warps, MAX_K_SLICES)


def decode_groups(traits: layout.WeightOnlyTraits, call: WeightOnlyCall) -> int:
    """Scale groups in a tile that the decode kernel is compiled for; 0 for any (`Plain<0>`)."""
    codes, scales = traits.codes, traits.scales
    if not scales.cuda.startswith("k"):  # kernels of one scaler
        return 1 if traits.scaler == "row_scale" else codes.tile // (scales.group or layout.SLICE)
    in_float = scales.zero == "point" and call.args.scale_type == SCALE_TYPES[torch.float32]
    looked_up = bool(call.args.slice_group)  # groups do not follow one another along K
    return 0 if scales.flat or in_float or looked_up else call.scale_groups


def columns_for(
    m: int,
    n: int,
    traits: layout.WeightOnlyTraits,
    scale_groups: int,
    invariant: bool,
    shared: int,
) -> int:
    """Rows of x of a block, which may have `shared` bytes of shared memory.

    One row has a kernel of its own, unless its sums must be in the order of more rows', scales are
    looked up one by one (scale_groups = 0), or SpQR's scales take too many registers. 16 rows of
    long tiles take too much shared memory, and those of tables where there is little.
    """
    own_kernel = scale_groups and not (traits.outliers and traits.codes.tile == 256)
    if m == 1 and own_kernel and not invariant and n >= rows_for(traits, 1):
        return 1
    codes = traits.codes
    no_room = codes.tile == 256 or (codes.table and shared < 160 * 1024)
    return 8 if m <= 8 or no_room else 16


def rows_for(traits: layout.WeightOnlyTraits, columns: int) -> int:
    """Rows of W of a block: `kRowTiles` of csrc/weight_only/decode.h."""
    codes = traits.codes
    many_registers = codes.high_words or codes.codebook or traits.outliers
    return 64 if columns == 1 and not many_registers else ROWS


def has_constants(codes: CodeKind) -> bool:
    """Whether the kernel decodes weights off by constants, which a product more puts right."""
    return codes.offset is not None or (codes.codebook and codes.bits == 2)


@lru_cache(maxsize=4096)
def warps_for(traits: layout.WeightOnlyTraits, device: torch.device) -> int:
    """Warps of a block, for any M: the order of sums depends on them."""
    return warps_in(traits, device_shared_bytes(device))


def warps_in(traits: layout.WeightOnlyTraits, shared: int) -> int:
    """`warps_for` a GPU whose blocks may have `shared` bytes of shared memory."""
    most = columns_for(MOST, ROWS, traits, 0, False, shared)
    for warps in WARPS:
        largest = max(shared_bytes(traits, columns, columns, warps) for columns in (1, 8, most))
        if largest <= shared:
            return warps
    raise RuntimeError(f"{traits}: expected a block to fit in {shared} bytes of shared memory")


def stage_bytes(traits: layout.WeightOnlyTraits, columns: int, rows_x: int) -> int:
    """Shared memory of a tile of a warp: codes, their high bits, and rows of x.

    With one row, a chunk of zeros and padding follow.
    """
    codes, zeros = traits.codes, 128 if columns == 1 else 0
    packed = rows_for(traits, columns) * (64 + 4 * codes.high_words)
    return packed + rows_x * codes.tile * 2 + zeros


def shared_bytes(traits: layout.WeightOnlyTraits, columns: int, rows_x: int, warps: int) -> int:
    """Shared memory of a block: codebook, sums and a flag, sums of outliers, and stages.

    A table of 16 values becomes one of pairs, for each lane.
    """
    book = PAIRS_BYTES if traits.codes.table else 4 * traits.codes.book_words
    sums = 4 * warps * rows_for(traits, columns) * rows_x + 256
    sparse = 4 * warps * (32 * columns + 4) if traits.outliers else 0
    stages = warps * STAGES * stage_bytes(traits, columns, rows_x)
    return book + sums + sparse + stages


def configuration(problem: Problem) -> str:
    """Block sizes and split-K slices in words, for `explain`."""
    traits, device = traits_of(problem), torch.device(problem.device)
    # As for scales that are not looked up one by one: few weights have others.
    columns = columns_for(
        problem.m, problem.shape[0], traits, 1, problem.batch_invariant, device_shared_bytes(device)
    )
    count = k_slices_for(problem.shape, traits, device)
    again = f", which reads the weight {-(-problem.m // columns)} times"
    rows = "1 row" if columns == 1 else f"{columns} rows"
    return (
        f"{rows} of x and {rows_for(traits, columns)} of W a block of "
        f"{warps_for(traits, device)} warps, K in "
        f"{count} slices{again if problem.m > columns else ''}"
    )
