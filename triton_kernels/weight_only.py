"""y = x @ W^T + bias with W decoded from packed codes in registers: every weight-only format.

One program computes a (BLOCK_N, BLOCK_M) tile of y^T = W @ x^T, or one of SPLIT_K shares of it. The
product is transposed so that the decoded weight is the first operand of the dot, which tensor cores
of sm_90 and later take from registers, while x comes through shared memory:

            K ->                         BLOCK_M
       +-----------+                    +------+
  rows | W, packed |  x   features (K)  | x^T  |   =   acc (BLOCK_N, BLOCK_M) float32
       +-----------+                    +------+

The K loop walks the tiles of qkernels/layouts/weight_only.py: one load of (BLOCK_N, 16) words, then
shift and mask -> DECODER -> one dot over the tile's features. Scales go where they cost least:

    LAST_SCALE  acc = scale * sum of dot(value, x)   one scale for all of a row
    FOLDED      acc += scale * dot(value, x')    very few columns: see below
    POST_SCALE  acc += scale * dot(value, x)     few columns: one multiply-add per group and output,
                                                 one dot for each of up to 4 groups of the tile
    otherwise   acc += dot(round(value * scale), x)          many columns: one multiply per weight

FOLDED: a dot has at least 16 columns. Where x has fewer, the others take what is scaled
differently: of a tile with 4 groups of features (runs) and x of up to 4 rows, column 4 * run + m is
row m of x with zeros for the features of other runs, so that one dot gives the product of each run
apart,

      features        m = 0 1 2 3 | 0 1 2 3 | 0 1 2 3 | 0 1 2 3
      of run 0            x x x x     .         .         .
      of run 1            .           x x x x   .         .         . : zeros
      of run 2            .           .         x x x x   .
      of run 3            .           .         .         x x x x

and the columns of a row of x are added up once, at the end. Zero points and minimums take the sum
of x over the run with them, which a dot of ones with x' has ready in the same registers.

Order of the rows: a warp's 16-byte loads cover 8 rows, and its half of a tensor-core tile is 16
rows, 8 apart in registers. So that the words land where the dot wants them, memory row (t, h, w, q)
of the block is taken as row (t, w, h, q) of the tile (w: warp, q: 0..7, h: 0..1), and y is stored
back the same way.

Outliers (SpQR) are weights besides, a few in each row, added to the same sums: in each step the
program takes the next one of each of its rows and the feature of x that it multiplies. A share
takes every K_SLICES-th of a row's.

K is summed in K_SLICES runs of tiles, one after another: ((share 0) + share 1) + ... With SPLIT_K =
K_SLICES each share is a program of its own, which writes float32 partial sums to a workspace; the
one that finishes last, as an integer counter tells, adds them up in that same order. With SPLIT_K =
1 one program does all shares. So each output is summed in one order, results do not vary from run
to run, and with the same K_SLICES and block sizes along K not with the way of splitting or M
either.
"""

import triton
import triton.language as tl

from .blocks import all_k_slices, grouped
from .launchable import kernel
from .pdl import fetch, launch_dependents, wait_for_previous


@triton.jit
def _finished(acc, WAIT: tl.constexpr):
    """acc, with WAIT once every product that adds to it is done: an instruction of no effect reads
    it.
    """
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
def _memory_row(r, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """The memory row that `_in_row_order` puts at tile row r."""
    if BLOCK_N % (16 * WARPS) == 0:
        t, w, h, q = r // (16 * WARPS), r // 16 % WARPS, r // 8 % 2, r % 8
        r = ((t * 2 + h) * WARPS + w) * 8 + q
    return r


@triton.jit
def _accumulate(
    begin, end, s, outlier_args, sparse_x_ptr,
    x_ptr, qdata_ptr, qhigh_ptr, perm_ptr, table_ptr, scaler_args, pid_n, m, M, N, K, KP,
    BITS: tl.constexpr, WIDTH: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr, FINISH: tl.constexpr, SCALER: tl.constexpr,
    GROUP: tl.constexpr, ROW_GROUP: tl.constexpr, SCALE_GROUP: tl.constexpr, GROUP_LOOKUP: tl.constexpr, HAS_MIN: tl.constexpr,
    ZERO: tl.constexpr, FOLDED: tl.constexpr, PERMUTED: tl.constexpr, POST_SCALE: tl.constexpr, LAST_SCALE: tl.constexpr, UPCAST: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, OUTLIERS: tl.constexpr,
    K_SLICES: tl.constexpr,
):  # fmt: skip
    """The product over tiles begin..end-1 and share s of the outliers, (BLOCK_N, BLOCK_M) float32.

    WIDTH: of the codes in `qdata`. HIGH: words of `qhigh` in a tile of a row. STEP: see
    `high_step`.
    """
    TILE: tl.constexpr = 16 * (32 // WIDTH)
    SCALE_GROUPS: tl.constexpr = TILE // SCALE_GROUP
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty

    loaded = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = pid_n * BLOCK_N + _memory_row(tl.arange(0, BLOCK_N), BLOCK_N, WARPS)
    x_rows = x_ptr + m.to(tl.int64)[None, :] * K
    i = tl.arange(0, 16)
    i8 = tl.arange(0, 8)
    i4 = tl.arange(0, 4)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # Scales are loaded a tile ahead: triton pipelines the operands of a dot only, and a program
    # would wait for memory in every tile otherwise. Not where a thread would hold more than a few.
    CARRIED: tl.constexpr = not LAST_SCALE and BLOCK_N * SCALE_GROUPS <= 4 * 32 * WARPS
    if CARRIED:
        runs = begin * TILE + tl.arange(0, SCALE_GROUPS) * SCALE_GROUP
        next_scale, next_zero = SCALER(
            scaler_args, rows, rows < N, runs, N, K, KP, GROUP, ROW_GROUP, GROUP_LOOKUP
        )
    for tile in range(begin, end):
        if CARRIED:
            scale, zero = next_scale, next_zero
            # Past the last tile scalers read the last one again.
            runs = (tile + 1) * TILE + tl.arange(0, SCALE_GROUPS) * SCALE_GROUP
            next_scale, next_zero = SCALER(
                scaler_args, rows, rows < N, runs, N, K, KP, GROUP, ROW_GROUP, GROUP_LOOKUP
            )
        at = tile * N + loaded  # in words this fits int32 up to 2^34 weights of 4 bits
        words = tl.load(
            qdata_ptr + at[:, None] * 16 + i[None, :], mask=(loaded < N)[:, None], other=0
        )
        words = _in_row_order(words, BLOCK_N, 16, WARPS).reshape(BLOCK_N, 4, 2, 2)
        high = words
        if HIGH == 16:
            high = tl.load(
                qhigh_ptr + at[:, None] * 16 + i[None, :], mask=(loaded < N)[:, None], other=0
            )
            high = _in_row_order(high, BLOCK_N, 16, WARPS).reshape(BLOCK_N, 4, 2, 2)
        elif HIGH == 8:
            high = tl.load(
                qhigh_ptr + at[:, None] * 8 + i8[None, :], mask=(loaded < N)[:, None], other=0
            )
            high = _in_row_order(high, BLOCK_N, 8, WARPS).reshape(BLOCK_N, 4, 2)
            high = tl.join(high, high >> STEP).permute(0, 1, 3, 2)  # (BLOCK_N, j, p, h)
        elif HIGH == 4:
            high = tl.load(
                qhigh_ptr + at[:, None] * 4 + i4[None, :], mask=(loaded < N)[:, None], other=0
            )
            high = _in_row_order(high, BLOCK_N, 4, WARPS)
            high = tl.join(high, high >> 1)  # (BLOCK_N, j, h)
            high = tl.join(high, high >> 2).permute(0, 1, 3, 2)  # (BLOCK_N, j, p, h)
        even, odd = SPLIT(words, high, table_ptr, BITS, DTYPE)
        value = _in_feature_order(tl.join(even, odd), BLOCK_N, TILE, WIDTH)

        first = tile * TILE
        if not CARRIED and not LAST_SCALE:
            runs = first + tl.arange(0, SCALE_GROUPS) * SCALE_GROUP
            scale, zero = SCALER(
                scaler_args, rows, rows < N, runs, N, K, KP, GROUP, ROW_GROUP, GROUP_LOOKUP
            )
        if LAST_SCALE:
            x = _columns(
                x_rows, perm_ptr, first + tl.arange(0, TILE), (m < M)[None, :], K, KP, PERMUTED
            )
            if UPCAST:
                value, x = _widened(value), _widened(x)
            value = FINISH(value, tl.zeros((BLOCK_N, 1), dtype=tl.float32), BITS, DTYPE)
            acc = _finished(tl.dot(value.to(x.dtype), x, acc, input_precision="ieee"), WAIT)
        elif FOLDED:
            run = tl.arange(0, BLOCK_M) // (BLOCK_M // SCALE_GROUPS)
            kk = first + tl.arange(0, TILE)
            live = (m < M)[None, :] & ((tl.arange(0, TILE) // SCALE_GROUP)[:, None] == run[None, :])
            x = _columns(x_rows, perm_ptr, kk, live, K, KP, PERMUTED)
            scale = _repeated(scale.to(tl.float32), BLOCK_N, BLOCK_M, SCALE_GROUPS)
            if UPCAST:
                value, x = _widened(value), _widened(x)
            value = FINISH(value, tl.zeros((BLOCK_N, 1), dtype=tl.float32), BITS, DTYPE).to(x.dtype)
            part = tl.dot(value, x, input_precision="ieee")
            if HAS_MIN or ZERO:
                # Every row of this is the sum of x over the run.
                total = tl.dot(tl.full((BLOCK_N, TILE), 1.0, x.dtype), x, input_precision="ieee")
                zero = _repeated(zero.to(tl.float32), BLOCK_N, BLOCK_M, SCALE_GROUPS)
                if ZERO:
                    part -= zero * total
                else:
                    acc -= zero * total
            acc += scale * part
        elif POST_SCALE and SCALE_GROUPS <= 4:
            parts = _cut(value, BLOCK_N, TILE, SCALE_GROUPS)
            scales = _cut(scale, BLOCK_N, SCALE_GROUPS, SCALE_GROUPS)
            zeros = _cut(zero, BLOCK_N, SCALE_GROUPS, SCALE_GROUPS)
            for part in tl.static_range(SCALE_GROUPS):
                kk = first + part * SCALE_GROUP
                x = _columns(
                    x_rows,
                    perm_ptr,
                    kk + tl.arange(0, SCALE_GROUP),
                    (m < M)[None, :],
                    K,
                    KP,
                    PERMUTED,
                )
                operand = parts[part]
                if UPCAST:
                    operand, x = _widened(operand), _widened(x)
                operand = FINISH(operand, zeros[part], BITS, DTYPE).to(x.dtype)
                acc += scales[part].to(tl.float32) * tl.dot(operand, x, input_precision="ieee")
                if HAS_MIN:
                    acc -= zeros[part] * tl.sum(x.to(tl.float32), axis=0)[None, :]
        else:
            x = _columns(
                x_rows, perm_ptr, first + tl.arange(0, TILE), (m < M)[None, :], K, KP, PERMUTED
            )
            value = value.reshape(BLOCK_N, SCALE_GROUPS, SCALE_GROUP)
            if UPCAST:
                value, x = _widened(value), _widened(x)
            value = FINISH(value, zero[:, :, None], BITS, DTYPE)
            if HAS_MIN:
                value = (value.to(tl.float32) * scale[:, :, None] - zero[:, :, None]).to(DTYPE)
            else:
                value = _scaled(value, scale[:, :, None], DTYPE)
            value = value.reshape(BLOCK_N, TILE).to(x.dtype)
            acc = _finished(tl.dot(value, x, acc, input_precision="ieee"), WAIT)
    if LAST_SCALE:
        scale, zero = SCALER(
            scaler_args, rows, rows < N, tl.arange(0, 1), N, K, KP, GROUP, ROW_GROUP, GROUP_LOOKUP
        )
        acc *= scale.to(tl.float32)
    if OUTLIERS:
        if FOLDED:  # once for each column of y
            m = tl.where(tl.arange(0, BLOCK_M) < BLOCK_M // SCALE_GROUPS, m, M)
        acc += _sparse(
            outlier_args, sparse_x_ptr, s, rows, m, M, N, UPCAST, BLOCK_M, BLOCK_N, K_SLICES
        )
    return acc


@triton.jit
def _sparse(args, x_ptr, s, rows, m, M, N, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr, K_SLICES: tl.constexpr):  # fmt: skip
    """Outliers s, s + K_SLICES, ... of each row times x, (BLOCK_N, BLOCK_M) float32.

    args: row_offsets (N + 1), col_vals, and what x's row and feature are multiplied by to find
    them.
    """
    offsets_ptr, col_vals_ptr, x_row, x_column = args
    first = tl.load(offsets_ptr + rows, mask=rows < N, other=0)
    count = tl.load(offsets_ptr + rows + 1, mask=rows < N, other=0) - first
    x_rows = x_ptr + m.to(tl.int64)[None, :] * x_row
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # Where an outlier's x lies only the outlier says. So several are on their way at a time, as
    # many as registers hold; they are added one after another all the same.
    AT_ONCE: tl.constexpr = 4 if BLOCK_M <= 16 else 2 if BLOCK_M <= 32 else 1
    for j in range(s, tl.max(count, axis=0), K_SLICES * AT_ONCE):
        found = (tl.load(col_vals_ptr + first + j, mask=j < count, other=0),)
        for i in tl.static_range(1, AT_ONCE):
            at = j + i * K_SLICES
            found = found + (tl.load(col_vals_ptr + first + at, mask=at < count, other=0),)  # noqa: RUF005
        x = (_outlier_x(x_rows, found[0], x_column, (j < count)[:, None] & (m < M)[None, :]),)
        for i in tl.static_range(1, AT_ONCE):
            live = (j + i * K_SLICES < count)[:, None] & (m < M)[None, :]
            x = x + (_outlier_x(x_rows, found[i], x_column, live),)  # noqa: RUF005
        for i in tl.static_range(AT_ONCE):
            value = (found[i] >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            factor = x[i]
            if UPCAST:
                factor = _widened(factor)
            acc += value[:, None] * factor.to(tl.float32)
    return acc


@triton.jit
def _outlier_x(x_rows, found, x_column, live):
    """The features of x that outliers multiply, (BLOCK_N, BLOCK_M)."""
    return tl.load(x_rows + ((found & 0xFFFF).to(tl.int64) * x_column)[:, None], mask=live, other=0)


@triton.jit
def _repeated(value, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SCALE_GROUPS: tl.constexpr):
    """(BLOCK_N, SCALE_GROUPS) -> (BLOCK_N, BLOCK_M), to all columns of a run."""
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
def _columns(x_rows, perm_ptr, kk, wanted, K, KP, PERMUTED: tl.constexpr):
    """x^T (features kk in kernel order, BLOCK_M), 0 where there is none, or `wanted` is false."""
    if PERMUTED:
        k = tl.load(perm_ptr + kk, mask=kk < KP, other=-1)
        live = k >= 0
    else:
        k = kk
        live = kk < K
    return tl.load(x_rows + k[:, None], mask=live[:, None] & wanted, other=0)


@triton.jit
def _widened(value):
    """bfloat16 -> float32 by its bits: triton's interpreter loses subnormal numbers otherwise."""
    return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(value, scale, DTYPE: tl.constexpr):
    """value * scale rounded to DTYPE once."""
    if scale.dtype == value.dtype:
        return value * scale
    else:
        return (value.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)


@kernel
def weight_only_gemm(
    x_ptr, qdata_ptr, qhigh_ptr, perm_ptr, table_ptr, scaler_args, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    outlier_args, sparse_x_ptr, M, N, K, KP,
    BITS: tl.constexpr, WIDTH: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr, FINISH: tl.constexpr, SCALER: tl.constexpr,
    GROUP: tl.constexpr, ROW_GROUP: tl.constexpr, SCALE_GROUP: tl.constexpr, GROUP_LOOKUP: tl.constexpr, HAS_MIN: tl.constexpr,
    ZERO: tl.constexpr, FOLDED: tl.constexpr, PERMUTED: tl.constexpr, HAS_BIAS: tl.constexpr, POST_SCALE: tl.constexpr, LAST_SCALE: tl.constexpr, UPCAST: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, K_SLICES: tl.constexpr, SPLIT_K: tl.constexpr,
    GROUP_N: tl.constexpr, WARPS: tl.constexpr, OUTLIERS: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (M, K) and y (M, N) row-major; see the module's docstring for the rest.

    PERMUTED: x is gathered through perm. UPCAST: compute in float32, for triton's interpreter,
    which takes bfloat16 for integers. WAIT: for products, in each tile (backends/triton/launch.py,
    `overtakes`). PREFETCH: tiles of W fetched before x is waited for (early.py). Grid: (blocks of N
    x blocks of M, SPLIT_K).
    """
    launch_dependents(PDL)
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    pid_n, pid_m = grouped(pid, blocks_n, blocks_m, GROUP_N)

    if FOLDED:
        SCALE_GROUPS: tl.constexpr = 16 * (32 // WIDTH) // SCALE_GROUP
        m = tl.arange(0, BLOCK_M) % (BLOCK_M // SCALE_GROUPS)
    else:
        m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tiles = tl.cdiv(KP, 16 * (32 // WIDTH))
    k_slice = tl.cdiv(tiles, K_SLICES)
    if PDL and PREFETCH > 0:
        # A tile of the block's rows is BLOCK_N * 64 bytes in one piece: lines of 32 words.
        ahead = tl.minimum(tl.program_id(1) * k_slice + tl.arange(0, PREFETCH), tiles - 1)
        line = tl.minimum(pid_n * BLOCK_N * 16 + tl.arange(0, BLOCK_N // 2) * 32, N * 16 - 1)
        fetch(qdata_ptr + (ahead.to(tl.int64) * N * 16)[:, None] + line[None, :])
    wait_for_previous(PDL)
    if K_SLICES == SPLIT_K:
        begin = tl.program_id(1) * k_slice
        acc = _accumulate(
            begin, tl.minimum(begin + k_slice, tiles), tl.program_id(1), outlier_args, sparse_x_ptr,
            x_ptr, qdata_ptr, qhigh_ptr, perm_ptr, table_ptr, scaler_args, pid_n, m, M, N, K, KP,
            BITS, WIDTH, HIGH, STEP, SPLIT, FINISH, SCALER,
            GROUP, ROW_GROUP, SCALE_GROUP, GROUP_LOOKUP, HAS_MIN, ZERO, FOLDED, PERMUTED, POST_SCALE, LAST_SCALE, UPCAST, WAIT,
            BLOCK_M, BLOCK_N, WARPS, OUTLIERS, K_SLICES,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for s in range(K_SLICES):
            acc += _accumulate(
                s * k_slice, tl.minimum(s * k_slice + k_slice, tiles), s, outlier_args, sparse_x_ptr,
                x_ptr, qdata_ptr, qhigh_ptr, perm_ptr, table_ptr, scaler_args, pid_n, m, M, N, K, KP,
                BITS, WIDTH, HIGH, STEP, SPLIT, FINISH, SCALER,
            GROUP, ROW_GROUP, SCALE_GROUP, GROUP_LOOKUP, HAS_MIN, ZERO, FOLDED, PERMUTED, POST_SCALE, LAST_SCALE, UPCAST, WAIT,
                BLOCK_M, BLOCK_N, WARPS, OUTLIERS, K_SLICES,
            )  # fmt: skip

    last = True
    if SPLIT_K > 1:
        acc, last = all_k_slices(acc, pid, blocks_n * blocks_m, partial_ptr, counter_ptr, SPLIT_K)
    if last:
        rows = pid_n * BLOCK_N + _memory_row(tl.arange(0, BLOCK_N), BLOCK_N, WARPS)
        if FOLDED:
            found = tl.sum(acc.reshape(BLOCK_N, SCALE_GROUPS, BLOCK_M // SCALE_GROUPS), axis=1)
            columns = tl.arange(0, BLOCK_M // SCALE_GROUPS)
        else:
            found = acc
            columns = m
        if HAS_BIAS:
            found += tl.load(bias_ptr + rows, mask=rows < N, other=0).to(tl.float32)[:, None]
        y = y_ptr + columns.to(tl.int64)[None, :] * N + rows[:, None]
        tl.store(
            y, found.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (columns < M)[None, :]
        )
