"""y = x @ W^T + bias, with W decoded from packed codes in registers: every weight-only format.

One program computes a (BLOCK_N, BLOCK_M) block of y^T = W @ x^T, or the part of it that one K slice
contributes. The product is transposed so that the decoded weight is the first operand of the dot:
tensor cores of sm_90 and later read that operand from registers. x comes through shared memory:

            K ->                         BLOCK_M
       +-----------+                    +------+
  rows | W, packed |  x   features (K)  | x^T  |   =   acc (BLOCK_N, BLOCK_M) float32
       +-----------+                    +------+

The K loop goes over the tiles of qkernels/layouts/weight_only.py. For each tile it loads
(BLOCK_N, 16) words, decodes them (shift and mask, then the format's decoder) and multiplies all
features of the tile in one dot. A *scale group* is the features of a tile that share a scale. The
scales are applied where they cost least:

    last_scale  acc = scale * sum of dot(value, x)   one scale for all of a row
    folded      acc += scale * dot(value, x')    very few columns: see below
    post_scale  acc += scale * dot(value, x)     few columns: one multiply-add per group and output,
                                                 one dot for each of up to 4 groups of the tile
    otherwise   acc += dot(round(value * scale), x)          many columns: one multiply per weight

folded: a dot has at least 16 columns. Where x has fewer rows, the unused columns hold the other
scale groups of the same row. Take a tile with 4 scale groups and x with up to 4 rows. Column
4 * group + m is row m of x, with zeros for the features of the other groups, so one dot gives the
product of each group separately:

      features        m = 0 1 2 3 | 0 1 2 3 | 0 1 2 3 | 0 1 2 3
      of group 0          x x x x     .         .         .
      of group 1          .           x x x x   .         .         . : zeros
      of group 2          .           .         x x x x   .
      of group 3          .           .         .         x x x x

The columns of a row of x are added up once, at the end. Zero points and mins are multiplied by the
sum of x over their group, which a dot of ones with x' computes.

Order of the rows: a warp's 16-byte loads cover 8 rows, and its half of a tensor-core tile is 16
rows, 8 apart in registers. Memory row (t, h, w, q) of the block is therefore taken as row
(t, w, h, q) of the dot (w: warp, q: 0..7, h: 0..1), so that the loaded words already are in the
registers that the dot reads. y is stored in memory order again.

Outliers (SpQR): a few sparse weights of each row, added to the same sums. In each step the program
takes the next outlier of each of its rows and loads the feature of x that it multiplies. A K slice
takes every K_SLICES-th outlier of a row.

K is summed in K_SLICES slices of whole tiles, in order: ((slice 0) + slice 1) + ... If SPLIT_K =
K_SLICES, each slice is a program. It writes its float32 sums to a workspace, and the program that
finishes last, as an integer counter tells, adds them up in that same order. If SPLIT_K = 1, one
program computes all slices. Each output is therefore always summed in the same order: results do
not vary from call to call, and with the same K_SLICES and the same block size along K they do not
depend on SPLIT_K or on M.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import all_k_slices, grouped, widened
from .launchable import kernel
from .pdl import fetch, launch_dependents, wait_for_previous


class KernelTraits(NamedTuple):
    """What a kernel has to know of a weight's format when it is compiled (argument TRAITS).

    Kernels can read the fields only: inside of them, triton makes this a tuple of its own class.

    tile: input features in one tile.
    bits: width of a code.
    width: width of the codes in `qdata`, less than `bits` if the codes are split into planes.
    high_words: words of `qhigh` in one tile of one row.
    high_step: `CodeKind.high_step` of qkernels/layouts/codecs.py.
    split, finish: the decoder (decoders.py).
    scaler: the function that loads scales (scalers.py).
    group_size: features along K, or weights of the flattened matrix, that share a scale.
    row_group: neighbouring output rows that share a scale.
    scale_group: features of a tile that share a scale.
    group_lookup: whether groups are looked up in `slice_group`.
    has_min: whether weight = scale * value - min.
    has_zero: whether weight = scale * (value - zero).
    last_scale: whether a row has only one scale.
    outliers: whether the weight has sparse outliers.
    """

    tile: int
    bits: int
    width: int
    high_words: int
    high_step: int
    split: Any
    finish: Any
    scaler: Any
    group_size: int
    row_group: int
    scale_group: int
    group_lookup: bool
    has_min: bool
    has_zero: bool
    last_scale: bool
    outliers: bool

    @property
    def cache_key(self) -> str:
        """Part of triton's cache key: it must change with the source of the functions."""
        return "-".join(str(getattr(value, "cache_key", value)) for value in self)


class Method(NamedTuple):
    """How a kernel multiplies the tiles (argument METHOD). The module's docstring explains the
    first two.

    folded, post_scale: where scales are applied.
    permuted: whether x is gathered through `perm`.
    upcast: whether to compute in float32: triton's interpreter takes bfloat16 for integers.
    wait: whether each tile waits until its product is done (backends/triton/launch.py,
        `overtakes`).
    """

    folded: bool
    post_scale: bool
    permuted: bool
    upcast: bool
    wait: bool


@triton.jit
def _finished(acc, WAIT: tl.constexpr):
    """acc. With WAIT an instruction without effect reads it, so every product is done by then."""
    if WAIT:
        return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return acc


@triton.jit
def _in_feature_order(value, BLOCK_N: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """(BLOCK_N, j, p, h, s bits, b) -> (BLOCK_N, features in order s, p, h, j, b)."""
    if WIDTH == 8:
        value = value.permute(0, 4, 2, 3, 1, 5)
    elif WIDTH == 4:
        value = value.permute(0, 5, 4, 2, 3, 1, 6)
    else:
        value = value.permute(0, 6, 5, 4, 2, 3, 1, 7)
    return value.reshape(BLOCK_N, TILE)


@triton.jit
def _in_row_order(tile, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Memory rows (t, h, w, q) of a (BLOCK_N, COLUMNS) tile -> tile rows (t, w, h, q)."""
    if BLOCK_N % (16 * WARPS) == 0:
        tile = tile.reshape(BLOCK_N // (16 * WARPS), 2, WARPS, 8, COLUMNS).permute(0, 2, 1, 3, 4)
    return tile.reshape(BLOCK_N, COLUMNS)


@triton.jit
def memory_row(r, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """The memory row that `_in_row_order` puts at tile row r."""
    if BLOCK_N % (16 * WARPS) == 0:
        t, w, h, q = r // (16 * WARPS), r // 16 % WARPS, r // 8 % 2, r % 8
        r = ((t * 2 + h) * WARPS + w) * 8 + q
    return r


@triton.jit
def accumulate(
    begin, end, k_slice, x_ptr, weight_args, scaler_args, outlier_args, sparse_x_ptr, pid_n, m,
    M, N, K, KP, TRAITS: tl.constexpr, METHOD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, K_SLICES: tl.constexpr,
):  # fmt: skip
    """The product over tiles begin..end-1, plus the outliers of K slice `k_slice`.

    Arguments as in `weight_only_gemm`. m: int32 (BLOCK_M), the row of x of each column. Returns
    float32 (BLOCK_N, BLOCK_M), whose rows are in the order of the dot.
    """
    qdata_ptr, qhigh_ptr, perm_ptr, table_ptr = weight_args
    TILE: tl.constexpr = TRAITS.tile
    SCALE_GROUP: tl.constexpr = TRAITS.scale_group
    SCALE_GROUPS: tl.constexpr = TILE // SCALE_GROUP
    LAST_SCALE: tl.constexpr = TRAITS.last_scale
    GROUP: tl.constexpr = TRAITS.group_size
    ROW_GROUP: tl.constexpr = TRAITS.row_group
    GROUP_LOOKUP: tl.constexpr = TRAITS.group_lookup
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty

    memory_rows = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = pid_n * BLOCK_N + memory_row(tl.arange(0, BLOCK_N), BLOCK_N, WARPS)
    x_rows = x_ptr + m.to(tl.int64)[None, :] * K
    i = tl.arange(0, 16)
    i8 = tl.arange(0, 8)
    i4 = tl.arange(0, 4)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # Scales are loaded one tile ahead, because triton pipelines only the operands of a dot: without
    # that, a program waits for memory in every tile. Not if a thread would hold more than 4 scales.
    CARRIED: tl.constexpr = not LAST_SCALE and BLOCK_N * SCALE_GROUPS <= 4 * 32 * WARPS
    if CARRIED:
        groups = begin * TILE + tl.arange(0, SCALE_GROUPS) * SCALE_GROUP
        next_scale, next_zero = TRAITS.scaler(
            scaler_args, rows, rows < N, groups, N, K, KP, GROUP, ROW_GROUP, GROUP_LOOKUP
        )
    for tile in range(begin, end):
        if CARRIED:
            scale, zero = next_scale, next_zero
            # Past the last tile, scalers read the scales of the last tile again.
            groups = (tile + 1) * TILE + tl.arange(0, SCALE_GROUPS) * SCALE_GROUP
            next_scale, next_zero = TRAITS.scaler(
                scaler_args, rows, rows < N, groups, N, K, KP, GROUP, ROW_GROUP, GROUP_LOOKUP
            )
        at = tile * N + memory_rows  # in words this fits int32 up to 2^34 weights of 4 bits
        words = tl.load(
            qdata_ptr + at[:, None] * 16 + i[None, :], mask=(memory_rows < N)[:, None], other=0
        )
        words = _in_row_order(words, BLOCK_N, 16, WARPS).reshape(BLOCK_N, 4, 2, 2)
        high = words
        if TRAITS.high_words == 16:
            high = tl.load(
                qhigh_ptr + at[:, None] * 16 + i[None, :], mask=(memory_rows < N)[:, None], other=0
            )
            high = _in_row_order(high, BLOCK_N, 16, WARPS).reshape(BLOCK_N, 4, 2, 2)
        elif TRAITS.high_words == 8:
            high = tl.load(
                qhigh_ptr + at[:, None] * 8 + i8[None, :], mask=(memory_rows < N)[:, None], other=0
            )
            high = _in_row_order(high, BLOCK_N, 8, WARPS).reshape(BLOCK_N, 4, 2)
            high = tl.join(high, high >> TRAITS.high_step).permute(0, 1, 3, 2)  # (BLOCK_N, j, p, h)
        elif TRAITS.high_words == 4:
            high = tl.load(
                qhigh_ptr + at[:, None] * 4 + i4[None, :], mask=(memory_rows < N)[:, None], other=0
            )
            high = _in_row_order(high, BLOCK_N, 4, WARPS)
            high = tl.join(high, high >> 1)  # (BLOCK_N, j, h)
            high = tl.join(high, high >> 2).permute(0, 1, 3, 2)  # (BLOCK_N, j, p, h)
        even, odd = TRAITS.split(words, high, table_ptr, TRAITS.bits, DTYPE)
        value = _in_feature_order(tl.join(even, odd), BLOCK_N, TILE, TRAITS.width)

        first = tile * TILE
        if not CARRIED and not LAST_SCALE:
            groups = first + tl.arange(0, SCALE_GROUPS) * SCALE_GROUP
            scale, zero = TRAITS.scaler(
                scaler_args, rows, rows < N, groups, N, K, KP, GROUP, ROW_GROUP, GROUP_LOOKUP
            )
        if LAST_SCALE:
            kk = first + tl.arange(0, TILE)
            x = _columns(x_rows, perm_ptr, kk, (m < M)[None, :], K, KP, METHOD.permuted)
            if METHOD.upcast:
                value, x = widened(value), widened(x)
            no_zero = tl.zeros((BLOCK_N, 1), dtype=tl.float32)
            value = TRAITS.finish(value, no_zero, TRAITS.bits, DTYPE).to(x.dtype)
            acc = _finished(tl.dot(value, x, acc, input_precision="ieee"), METHOD.wait)
        elif METHOD.folded:
            group = tl.arange(0, BLOCK_M) // (BLOCK_M // SCALE_GROUPS)
            kk = first + tl.arange(0, TILE)
            row_mask = (m < M)[None, :]
            in_group = (tl.arange(0, TILE) // SCALE_GROUP)[:, None] == group[None, :]
            x = _columns(x_rows, perm_ptr, kk, row_mask & in_group, K, KP, METHOD.permuted)
            scale = _repeated(scale.to(tl.float32), BLOCK_N, BLOCK_M, SCALE_GROUPS)
            if METHOD.upcast:
                value, x = widened(value), widened(x)
            no_zero = tl.zeros((BLOCK_N, 1), dtype=tl.float32)
            value = TRAITS.finish(value, no_zero, TRAITS.bits, DTYPE).to(x.dtype)
            part = tl.dot(value, x, input_precision="ieee")
            if TRAITS.has_min or TRAITS.has_zero:
                # Every row of `total` is the sum of x over the group.
                total = tl.dot(tl.full((BLOCK_N, TILE), 1.0, x.dtype), x, input_precision="ieee")
                zero = _repeated(zero.to(tl.float32), BLOCK_N, BLOCK_M, SCALE_GROUPS)
                if TRAITS.has_zero:
                    part -= zero * total
                else:
                    acc -= zero * total
            acc += scale * part
        elif METHOD.post_scale and SCALE_GROUPS <= 4:
            parts = _cut(value, BLOCK_N, TILE, SCALE_GROUPS)
            scales = _cut(scale, BLOCK_N, SCALE_GROUPS, SCALE_GROUPS)
            zeros = _cut(zero, BLOCK_N, SCALE_GROUPS, SCALE_GROUPS)
            for part in tl.static_range(SCALE_GROUPS):
                kk = first + part * SCALE_GROUP + tl.arange(0, SCALE_GROUP)
                x = _columns(x_rows, perm_ptr, kk, (m < M)[None, :], K, KP, METHOD.permuted)
                operand = parts[part]
                if METHOD.upcast:
                    operand, x = widened(operand), widened(x)
                operand = TRAITS.finish(operand, zeros[part], TRAITS.bits, DTYPE).to(x.dtype)
                acc += scales[part].to(tl.float32) * tl.dot(operand, x, input_precision="ieee")
                if TRAITS.has_min:
                    acc -= zeros[part] * tl.sum(x.to(tl.float32), axis=0)[None, :]
        else:
            kk = first + tl.arange(0, TILE)
            x = _columns(x_rows, perm_ptr, kk, (m < M)[None, :], K, KP, METHOD.permuted)
            value = value.reshape(BLOCK_N, SCALE_GROUPS, SCALE_GROUP)
            if METHOD.upcast:
                value, x = widened(value), widened(x)
            value = TRAITS.finish(value, zero[:, :, None], TRAITS.bits, DTYPE)
            if TRAITS.has_min:
                value = (value.to(tl.float32) * scale[:, :, None] - zero[:, :, None]).to(DTYPE)
            else:
                value = _scaled(value, scale[:, :, None], DTYPE)
            value = value.reshape(BLOCK_N, TILE).to(x.dtype)
            acc = _finished(tl.dot(value, x, acc, input_precision="ieee"), METHOD.wait)
    if LAST_SCALE:
        scale, zero = TRAITS.scaler(
            scaler_args, rows, rows < N, tl.arange(0, 1), N, K, KP, GROUP, ROW_GROUP, GROUP_LOOKUP
        )
        acc *= scale.to(tl.float32)
    if TRAITS.outliers:
        if METHOD.folded:  # only the columns of scale group 0 add them, so each row of x does once
            m = tl.where(tl.arange(0, BLOCK_M) < BLOCK_M // SCALE_GROUPS, m, M)
        acc += _sparse(
            outlier_args, sparse_x_ptr, k_slice, rows, m, M, N,
            METHOD.upcast, BLOCK_M, BLOCK_N, K_SLICES,
        )  # fmt: skip
    return acc


@triton.jit
def _sparse(args, x_ptr, k_slice, rows, m, M, N, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr, K_SLICES: tl.constexpr):  # fmt: skip
    """Outliers k_slice, k_slice + K_SLICES, ... of each row times x, (BLOCK_N, BLOCK_M) float32.

    args: row_offsets (N + 1), col_vals, and the strides of x, whose element (m, k) is at
    m * x_row + k * x_column.
    """
    offsets_ptr, col_vals_ptr, x_row, x_column = args
    first = tl.load(offsets_ptr + rows, mask=rows < N, other=0)
    count = tl.load(offsets_ptr + rows + 1, mask=rows < N, other=0) - first
    x_rows = x_ptr + m.to(tl.int64)[None, :] * x_row
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # The address of an outlier's x is known only once the outlier is loaded. So several outliers
    # are loaded at once, as many as registers hold. They are still added one after another.
    AT_ONCE: tl.constexpr = 4 if BLOCK_M <= 16 else 2 if BLOCK_M <= 32 else 1
    for j in range(k_slice, tl.max(count, axis=0), K_SLICES * AT_ONCE):
        outliers = (tl.load(col_vals_ptr + first + j, mask=j < count, other=0),)
        for i in tl.static_range(1, AT_ONCE):
            at = j + i * K_SLICES
            more = (tl.load(col_vals_ptr + first + at, mask=at < count, other=0),)
            outliers = outliers + more
        x = (_outlier_x(x_rows, outliers[0], x_column, (j < count)[:, None] & (m < M)[None, :]),)
        for i in tl.static_range(1, AT_ONCE):
            live = (j + i * K_SLICES < count)[:, None] & (m < M)[None, :]
            x = x + (_outlier_x(x_rows, outliers[i], x_column, live),)  # noqa: RUF005
        for i in tl.static_range(AT_ONCE):
            value = (outliers[i] >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            factor = x[i]
            if UPCAST:
                factor = widened(factor)
            acc += value[:, None] * factor.to(tl.float32)
    return acc


@triton.jit
def _outlier_x(x_rows, outliers, x_column, live):
    """The features of x that outliers multiply, (BLOCK_N, BLOCK_M)."""
    k = (outliers & 0xFFFF).to(tl.int64)
    return tl.load(x_rows + (k * x_column)[:, None], mask=live, other=0)


@triton.jit
def _repeated(value, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SCALE_GROUPS: tl.constexpr):
    """(BLOCK_N, SCALE_GROUPS) -> (BLOCK_N, BLOCK_M): each value in all columns of its group."""
    value = tl.broadcast_to(value[:, :, None], (BLOCK_N, SCALE_GROUPS, BLOCK_M // SCALE_GROUPS))
    return value.reshape(BLOCK_N, BLOCK_M)


@triton.jit
def _cut(value, BLOCK_N: tl.constexpr, TILE: tl.constexpr, SCALE_GROUPS: tl.constexpr):
    """(BLOCK_N, TILE) -> tuple of SCALE_GROUPS (at most 4) tiles of neighbouring features."""
    if SCALE_GROUPS == 1:
        return (value,)
    elif SCALE_GROUPS == 2:
        return value.reshape(BLOCK_N, 2, TILE // 2).permute(0, 2, 1).split()
    else:
        low, high = value.reshape(BLOCK_N, 2, TILE // 2).permute(0, 2, 1).split()
        a, b = low.reshape(BLOCK_N, 2, TILE // 4).permute(0, 2, 1).split()
        c, d = high.reshape(BLOCK_N, 2, TILE // 4).permute(0, 2, 1).split()
        return (a, b, c, d)


@triton.jit
def _columns(x_rows, perm_ptr, kk, mask, K, KP, PERMUTED: tl.constexpr):
    """x^T (features kk in kernel order, BLOCK_M), 0 for padding and where `mask` is false."""
    if PERMUTED:
        k = tl.load(perm_ptr + kk, mask=kk < KP, other=-1)
        live = k >= 0
    else:
        k = kk
        live = kk < K
    return tl.load(x_rows + k[:, None], mask=live[:, None] & mask, other=0)


@triton.jit
def _scaled(value, scale, DTYPE: tl.constexpr):
    """value * scale rounded to DTYPE once."""
    if scale.dtype == value.dtype:
        return value * scale
    else:
        return (value.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)


@kernel
def weight_only_gemm(
    x_ptr, weight_args, scaler_args, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    outlier_args, sparse_x_ptr, M, N, K, KP,
    TRAITS: tl.constexpr, METHOD: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, K_SLICES: tl.constexpr, SPLIT_K: tl.constexpr,
    GROUP_N: tl.constexpr, WARPS: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (M, N) = x (M, K) @ W^T + bias (N), x and y row-major. Grid: (blocks of N x of M, SPLIT_K).

    Tuples of pointers are tuples because functions pass them on together:
    weight_args: qdata, qhigh, perm and table, as qkernels/layouts/weight_only.py describes them.
    scaler_args: the tensors of TRAITS.scaler (qkernels/layouts/codecs.py).
    outlier_args: () or, with TRAITS.outliers, those of `_sparse`.

    sparse_x: the x that outliers multiply, x itself or its transposed copy.
    partial, counter: the workspace of `all_k_slices`, used if SPLIT_K > 1.
    KP: features in kernel order, padding included. K: features of a row of x.
    TRAITS: a KernelTraits. METHOD: a Method. WARPS: the launch's num_warps.
    GROUP_N: blocks of N that run next to each other.
    PREFETCH: tiles of W that a program fetches before it waits for x (pdl.py).
    """
    launch_dependents(PDL)
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    pid_n, pid_m = grouped(pid, blocks_n, blocks_m, GROUP_N)

    SCALE_GROUPS: tl.constexpr = TRAITS.tile // TRAITS.scale_group
    if METHOD.folded:
        m = tl.arange(0, BLOCK_M) % (BLOCK_M // SCALE_GROUPS)
    else:
        m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tiles = tl.cdiv(KP, TRAITS.tile)
    slice_tiles = tl.cdiv(tiles, K_SLICES)
    if PDL and PREFETCH > 0:
        # A tile of the block's rows is BLOCK_N * 64 contiguous bytes: lines of 32 words.
        tile = tl.minimum(tl.program_id(1) * slice_tiles + tl.arange(0, PREFETCH), tiles - 1)
        line = tl.minimum(pid_n * BLOCK_N * 16 + tl.arange(0, BLOCK_N // 2) * 32, N * 16 - 1)
        fetch(weight_args[0] + (tile.to(tl.int64) * N * 16)[:, None] + line[None, :])
    wait_for_previous(PDL)
    if K_SLICES == SPLIT_K:
        begin = tl.program_id(1) * slice_tiles
        acc = accumulate(
            begin, tl.minimum(begin + slice_tiles, tiles), tl.program_id(1), x_ptr, weight_args,
            scaler_args, outlier_args, sparse_x_ptr, pid_n, m, M, N, K, KP,
            TRAITS, METHOD, BLOCK_M, BLOCK_N, WARPS, K_SLICES,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for s in range(K_SLICES):
            begin = s * slice_tiles
            acc += accumulate(
                begin, tl.minimum(begin + slice_tiles, tiles), s, x_ptr, weight_args,
                scaler_args, outlier_args, sparse_x_ptr, pid_n, m, M, N, K, KP,
                TRAITS, METHOD, BLOCK_M, BLOCK_N, WARPS, K_SLICES,
            )  # fmt: skip

    last = True
    if SPLIT_K > 1:
        acc, last = all_k_slices(acc, pid, blocks_n * blocks_m, partial_ptr, counter_ptr, SPLIT_K)
    if last:
        rows = pid_n * BLOCK_N + memory_row(tl.arange(0, BLOCK_N), BLOCK_N, WARPS)
        if METHOD.folded:
            total = tl.sum(acc.reshape(BLOCK_N, SCALE_GROUPS, BLOCK_M // SCALE_GROUPS), axis=1)
            columns = tl.arange(0, BLOCK_M // SCALE_GROUPS)
        else:
            total = acc
            columns = m
        if HAS_BIAS:
            total += tl.load(bias_ptr + rows, mask=rows < N, other=0).to(tl.float32)[:, None]
        y = y_ptr + columns.to(tl.int64)[None, :] * N + rows[:, None]
        tl.store(
            y, total.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (columns < M)[None, :]
        )
