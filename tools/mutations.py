"""Breaks the kernels on purpose, one line at a time, and checks that the tests notice.

    python -m tools.mutations [--only PART]

Prints one line a mutation and exits with 1 if one went unnoticed. Works on a copy of the tree.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL, DECODERS, SCALERS = (
    f"triton_kernels/{f}.py" for f in ("weight_only", "decoders", "scalers")
)
LAYOUT, LAUNCH = "qkernels/layouts/weight_only.py", "qkernels/backends/triton/weight_only.py"
GEMM8, ACTIVATIONS = "triton_kernels/eight_bit.py", "triton_kernels/activations.py"
BLOCKS = "triton_kernels/blocks.py"
LAYOUT8, LAUNCH8 = "qkernels/layouts/eight_bit.py", "qkernels/backends/triton/eight_bit.py"

WORK = "qkernels/backends/plan.py"

#: (file, what it says, what it says instead)
WEIGHT_ONLY = [
    (DECODERS, "0x64006400 if DTYPE", "0x64016400 if DTYPE"),
    (DECODERS, "else 0x43004300", "else 0x43004301"),
    (DECODERS, "(_shifts(high, 2) & 0x10001) << 2", "(_shifts(high, 2) & 0x10001) << 1"),
    (DECODERS, "join(word >> 8, word >> 12)", "join(word >> 12, word >> 8)"),
    (DECODERS, "- (zero + OFFSET)", "- OFFSET"),
    (DECODERS, "tl.load(at + 4 + code // 4)", "tl.load(at + code // 4)"),
    (DECODERS, "prmt.b32 $3, lo, hi, 0x7362", "prmt.b32 $3, lo, hi, 0x5140"),
    (DECODERS, "or.b32 bit3, bit3, 0x32103210", "or.b32 bit3, bit3, 0x32103211"),
    (DECODERS, "256.0 if DTYPE", "128.0 if DTYPE"),
    (DECODERS, "(pair & 0x007F007F) << 5", "(pair & 0x007F007F) << 4"),
    (SCALERS, "g = kk // GROUP", "g = kk // GROUP + 1"),
    (SCALERS, "tl.load(group_ptr + kk // 16)", "tl.load(group_ptr + kk // 32)"),
    (SCALERS, "rows[:, None] // ROW_GROUP", "rows[:, None] % ROW_GROUP"),
    (SCALERS, "tl.cdiv(N, ROW_GROUP)", "N // ROW_GROUP"),
    (SCALERS, "block // 256", "block // 128"),
    (SCALERS, "inner + tl.load(offset_ptr)", "inner"),
    (SCALERS, "rows.to(tl.int64)[:, None] * K", "rows.to(tl.int64)[:, None] * KP if False else rows[:, None]"),
    (KERNEL, "permute(0, 5, 4, 2, 3, 1, 6)", "permute(0, 5, 4, 2, 1, 3, 6)"),
    (KERNEL, "permute(0, 2, 1, 3, 4)", "permute(0, 1, 2, 3, 4)"),
    (KERNEL, "live = kk < K", "live = kk < K - 1"),
    (KERNEL, "live = k >= 0", "live = k >= 1"),
    (KERNEL, "mask=kk < KP, other=-1", "mask=kk < KP - 1, other=-1"),
    (KERNEL, "kk = first + part * SCALE_GROUP", "kk = first"),
    (KERNEL, "kk = first + tl.arange(0, TILE)", "kk = tl.arange(0, TILE)"),
    (KERNEL, "begin = tl.program_id(1) * slice_tiles", "begin = 0"),
    (BLOCKS, "for s in range(SPLIT_K):", "for s in range(SPLIT_K - 1):"),
    (BLOCKS, "tl.store(counter_ptr + pid, 0)", "tl.store(counter_ptr + pid, 1)"),
    (KERNEL, "for s in range(K_SLICES):", "for s in range(1, K_SLICES):"),
    (BLOCKS, "group_n = tl.minimum(blocks_n - first_n, GROUP_N)", "group_n = GROUP_N"),
    (KERNEL, "total += tl.load(bias_ptr + rows", "total += 0 * tl.load(bias_ptr + rows"),
    (KERNEL, "mask=(rows < N)[:, None] & (columns < M)", "mask=(rows < N - 1)[:, None] & (columns < M)"),
    (KERNEL, "mask=live[:, None] & mask, other=0)", "mask=live[:, None] & (mask == 0), other=0)"),
    (KERNEL, "[:, None] == group[None, :]", "[:, None] <= group[None, :]"),
    (KERNEL, "first + tl.arange(0, SCALE_GROUPS) * SCALE_GROUP", "first + tl.arange(0, SCALE_GROUPS) * 0"),
    (KERNEL, "groups = (tile + 1) * TILE", "groups = tile * TILE"),
    (KERNEL, "operand = TRAITS.finish(operand, zeros[part]", "operand = TRAITS.finish(operand, zeros[0]"),
    (KERNEL, "acc += scales[part]", "acc += scales[0]"),
    (KERNEL, "% (BLOCK_M // SCALE_GROUPS)", "% BLOCK_M"),
    (KERNEL, "part -= zero * total", "part -= zero * 0"),
    (KERNEL, "acc -= zero * total", "acc -= zero * 0"),
    (KERNEL, "tl.where(tl.arange(0, BLOCK_M) < BLOCK_M // SCALE_GROUPS, m, M)", "m"),
    (KERNEL, "x = x + (_outlier_x(x_rows, outliers[i], x_column, live),)", "x = x + (_outlier_x(x_rows, outliers[0], x_column, live),)"),
    (KERNEL, "K_SLICES * AT_ONCE)", "K_SLICES * AT_ONCE + 1)"),
    (DECODERS, "^ 0x43804380", "^ 0x43004300"),
    ("triton_kernels/gather.py", "mask=k >= 0", "mask=k >= 1"),
    (LAYOUT, "(s // 2) * 16 + (s % 2) * 8 + b * 4", "(s // 2) * 16 + (s % 2) * 4 + b * 8"),
    (LAYOUT, "padded = -(-count // SLICE) * SLICE", "padded = count // SLICE * SLICE"),
    (LAYOUT, "math.gcd(tile, traits.group_size)", "tile"),
    (LAUNCH, '"K": x.shape[1], "KP": x.shape[1]}', '"K": x.shape[1]}'),
    (LAUNCH, "problem.m * groups <= config.block_m", "problem.m <= config.block_m"),
]  # fmt: skip

REPLAY = [
    (WORK, "place.offset + address - start", "place.offset"),
    (WORK, "self._sizes[base] = offset + t.numel()", "self._sizes[base] = t.numel()"),
    (WORK, "low.end > high.start and", "False and"),
    (WORK, "self._uses_counters = True", "self._uses_counters = False"),
    (WORK, "pattern |= (address & 15 != 0) << i", "pattern |= 0"),
    (WORK, "self._give_up()\n        return parts", "pass\n        return parts"),
    ("qkernels/backends/cuda/launch.py", "bases[base] + offset", "bases[base]"),
    ("qkernels/backends/cuda/launch.py", "words[word] = stream", "words[word] = 0"),
    ("qkernels/ops/operator_plans.py", "weakref.ref(first, lambda _: forget())", "weakref.ref(first)"),
]  # fmt: skip

EIGHT_BIT = [
    (GEMM8, "moved = ((bits & 0x80) << 8 | (bits & 0x7F) << 7)", "moved = ((bits & 0x80) << 8 | (bits & 0x7F) << 6)"),
    (GEMM8, "value *= 256.0", "value *= 128.0"),
    (GEMM8, "(codes & 0x7F) == 0x7F", "(codes & 0x7F) == 0x80"),
    (GEMM8, "mask=(k < KP)[None, :], other=0.0", "mask=(k < KP - 16)[None, :], other=0.0"),
    (GEMM8, "x_scale_ptr + step * M + m", "x_scale_ptr + m"),
    (GEMM8, "first_n // STEP * blocks_k + step", "first_n // STEP * blocks_k"),
    (GEMM8, "n // STEP * blocks_k + step)[:, None]", "first_n // STEP * blocks_k + step)"),
    (GEMM8, "tl.load(w_scale_ptr + n)[:, None]", "tl.load(w_scale_ptr + first_n)"),
    (GEMM8, "x_scale_ptr + (m * 0 if ONE_SCALE else m)", "x_scale_ptr + m * 0"),
    (GEMM8, "acc -= tl.load(row_sum_ptr + n)", "acc += tl.load(row_sum_ptr + n)"),
    (GEMM8, "for start in range(0, count, COLUMNS):", "for start in range(0, count - COLUMNS, COLUMNS):"),
    (GEMM8, "live = start + i < count", "live = start + i < count - 1"),
    (GEMM8, "x -= coded * scale", "x -= coded * 0"),
    (GEMM8, "tl.where(tl.abs(x) >= threshold, x, 0.0)", "x"),
    (GEMM8, "begin = tl.program_id(1) * slice_steps", "begin = 0"),
    (BLOCKS, "for s in range(SPLIT_K):", "for s in range(SPLIT_K - 1):"),
    (GEMM8, "for s in range(K_SLICES):", "for s in range(1, K_SLICES):"),
    (BLOCKS, "tl.store(counter_ptr + pid, 0)", "tl.store(counter_ptr + pid, 1)"),
    (BLOCKS, "group_n = tl.minimum(blocks_n - first_n, GROUP_N)", "group_n = GROUP_N"),
    (GEMM8, "y += tl.load(bias_ptr + n)", "y += 0 * tl.load(bias_ptr + n)"),
    (GEMM8, "mask=(n < N)[:, None] & (m < M)[None, :])", "mask=(n < N - 1)[:, None] & (m < M)[None, :])"),
    (ACTIVATIONS, "(value + 12582912.0) - 12582912.0", "(value + 12582912.25) - 12582912.0"),
    (ACTIVATIONS, "(size + 0x7FFFF + ((size >> 20) & 1)) >> 20", "(size + 0x80000) >> 20"),
    (ACTIVATIONS, "tl.minimum(normal, 0x7E)", "tl.minimum(normal, 0x7F)"),
    (ACTIVATIONS, "size < 0x3C800000", "size < 0x3C000000"),
    (ACTIVATIONS, "tl.where(size > 0x7F800000, 0x7F, code)", "tl.where(size > 0x7F800000, 0x7E, code)"),
    (ACTIVATIONS, "scale < TOKEN_FLOOR, TOKEN_FLOOR, scale", "scale < TOKEN_FLOOR, scale, scale"),
    (ACTIVATIONS, "absmax < GROUP_AMAX_FLOOR, GROUP_AMAX_FLOOR, absmax", "absmax < GROUP_AMAX_FLOOR, absmax, absmax"),
    (ACTIVATIONS, "group * M + row", "group + row"),
    (ACTIVATIONS, "size = tl.where(tl.abs(x) >= threshold, 0, size)", "size = tl.where(tl.abs(x) > threshold, 0, size)"),
    (ACTIVATIONS, "value = tl.where(tl.abs(x) >= threshold, 0.0, value)", "value = value * 1.0"),
    (ACTIVATIONS, "tl.clamp(value, -128.0, 127.0)", "tl.clamp(value, -127.0, 127.0)"),
    (ACTIVATIONS, "tl.where(k < K, tl.clamp(", "tl.where(k < KP, tl.clamp("),
    (ACTIVATIONS, "for start in range(BLOCK, K, BLOCK):", "for start in range(BLOCK, K - 1, BLOCK):"),
    (ACTIVATIONS, "count + tl.cumsum(flag, 0) - flag", "count + tl.cumsum(flag, 0)"),
    (ACTIVATIONS, "tl.store(counter_ptr + 1 + here, flag * 0", "tl.store(counter_ptr + 1 + here, flag"),
    (ACTIVATIONS, "tl.store(counter_ptr, 0)", "tl.store(counter_ptr, 1)"),
    (ACTIVATIONS, "x = _as(_as(x * inverse, DTYPE) * weight, DTYPE)", "x = _as(x * inverse * weight, DTYPE)"),
    (LAYOUT8, "(0, padded(k) - k)", "(padded(k) - k, 0)"),
    (LAYOUT8, "weight.sum(dim=1, dtype=torch.int32)", "weight.sum(dim=1, dtype=torch.int8)"),
    (LAUNCH8, "layout.padded(shape[1]) % STEP == 0", "layout.padded(shape[1]) % 16 == 0"),
]  # fmt: skip

KRONECKER, TRANSFORMS = "triton_kernels/kronecker.py", "qkernels/backends/triton/transforms.py"
INCOHERENT = [
    (KRONECKER, "return (i ^ (i >> 1)) & 1", "return (i ^ (i >> 3)) & 1"),
    (KRONECKER, "at = i[:, None] * A + j[None, :] if TRANSPOSED", "at = i[:, None] * A + j[None, :] if A < 0"),
    (KRONECKER, "box - high, factor, tl.dot(high", "box - box, factor, tl.dot(high"),
    (KRONECKER, ".permute(0, 3, 1, 2)", ".permute(0, 3, 2, 1)"),
    (KRONECKER, "_odd_bits(program_c & c)", "_odd_bits(program_c ^ c)"),
    (KRONECKER, "at = c * C + program_c if TRANSPOSED", "at = program_c * C + c if TRANSPOSED"),
    (KRONECKER, "source = (i0 * C + c)", "source = (i0 * C + program_c)"),
    (KRONECKER, "target = (i0 * C + program_c)", "target = (i0 * C + C - 1 - own)"),
    (KRONECKER, "tl.load(pre_ptr + source", "tl.load(pre_ptr + (i0 * C + c)[:, None] * (A1 * A2) + rest"),
    (KRONECKER, "tl.load(post_ptr + target", "tl.load(post_ptr + (i0 * C + program_c)[:, None] * (A1 * A2) + rest"),
    (KRONECKER, "tl.load(bias_ptr + target", "0 * tl.load(bias_ptr + target"),
    (KRONECKER, "target % 16 // 8 * 4", "target % 16 // 8 * 2"),
    (KRONECKER, "live = inside & (m < M)[:, None]", "live = inside & (m < M - 1)[:, None]"),
    (KRONECKER, "box.reshape(ROWS * B0 * B1, B2) * scale", "box.reshape(ROWS * B0 * B1, B2)"),
    (TRANSFORMS, "empty = work.empty if width == x.shape[1] else work.zeros", "empty = work.empty"),
    (TRANSFORMS, "rows = max(1, 16 * max(padded) // total)", "rows = max(2, 16 * max(padded) // total) - 1"),
    (DECODERS, "p = p ^ (p >> 2)", "p = p ^ (p >> 3)"),
    (DECODERS, "signs = signs ^ p", "signs = signs + 0 * p"),
    (DECODERS, "flips = (signs << 1) | (signs << 2)", "flips = signs | (signs << 1) | (signs << 2)"),
    (DECODERS, "tl.load(table + ((code >> 8) & 255))", "tl.load(table + (code & 255))"),
    (DECODERS, "_e8p(words >> 16, table), DTYPE)", "_e8p(words, table), DTYPE)"),
    (DECODERS, "RESIDUAL: tl.constexpr = 1 / 3.45", "RESIDUAL: tl.constexpr = 1 / 3.5"),
    (DECODERS, "RESIDUAL: tl.constexpr = 1 / 2.04", "RESIDUAL: tl.constexpr = 1 / 2.0"),
    (DECODERS, "MIDDLE: tl.constexpr = OFFSET + 8", "MIDDLE: tl.constexpr = OFFSET + 7.5"),
    (DECODERS, "- ((1 << BITS) - 1) * 0.5", "- (1 << BITS) * 0.5"),
    (KERNEL, "acc *= scale.to(tl.float32)", "acc *= 1"),
    (KERNEL, "high = tl.join(high, high >> TRAITS.high_step)", "high = tl.join(high, high >> 1)"),
    (LAYOUT, "halves[:, :, :, 0] | (halves[:, :, :, 1] << 16)", "halves[:, :, :, 1] | (halves[:, :, :, 0] << 16)"),
    (LAYOUT, "return 16 if codebook", "return 8 if codebook"),
]  # fmt: skip

GEMV, GEMM, TILE, CUDA_SCALERS = (
    f"csrc/weight_only/{f}.h" for f in ("gemv", "gemm", "tile", "scalers")
)
QUAD, SPARSE = (f"csrc/weight_only/{f}.h" for f in ("quad_scalers", "outliers"))
CUDA_DECODERS, MEMORY = "csrc/decoders/decoders.h", "csrc/ptx/memory.h"
CUDA = [
    (GEMV, "acc[i] += group_scales.factor[i / 2] * sums[i]", "acc[i] += group_scales.factor[0] * sums[i]"),
    (GEMV, "    sync_block();  // no thread still reads the activations", ""),
    (GEMV, "        sync_block();\n        stage<T, D>", "        stage<T, D>"),
    (GEMV, "store_global(counter, 0)", "store_global(counter, 1)"),
    (GEMV, "w < kGemvWarps; w++", "w < kGemvWarps - 1; w++"),
    (GEMV, "for (int s = 0; s < k_slices; s++)", "for (int s = 1; s < k_slices; s++)"),
    (GEMM, "copy_async_wait<kStages - 2>", "copy_async_wait<kStages - 1>"),
    (GEMM, "        sync_block();  // all threads have this step's", "        // all threads have this step's"),
    (GEMM, "acc[c][i] += group_scales.factor[i / 2] * sums", "acc[c][i] += group_scales.factor[i % 2] * sums"),
    (GEMM, "k < args.x_stride", "k <= args.x_stride"),
    (GEMM, "block.m0 + m < args.m", "block.m0 + m <= args.m"),
    (GEMM, "x[c][p * 2], x[c][p * 2 + 1]", "x[c][p * 2 + 1], x[c][p * 2]"),
    (TILE, "words.w[h] >> p * D::kHighStep", "words.w[h]"),
    (TILE, "word >> (p * 2 + h) * D::kHighStep", "word >> (h * 2 + p) * D::kHighStep"),
    (TILE, "tile < end && rows[r] < args.n", "tile < end && rows[r] <= args.n"),
    (TILE, "scale_at(&args, scales[i % 2], at + 1)", "scale_at(&args, scales[i % 2], at)"),
    (TILE, "if (k >= 0)", "if (k > 0)"),
    (CUDA_SCALERS, "kk = kk < args.kp ? kk : args.kp - 1;", ""),
    (CUDA_SCALERS, "/ 256);", "/ 255);"),
    (CUDA_SCALERS, "row_(row / args.row_group)", "row_(row % args.row_group)"),
    (CUDA_SCALERS, "inner + load_global(args.nested_offset)", "inner"),
    (GEMV, "minimum[i / 2] * x_sums[i]", "minimum[0] * x_sums[i]"),
    (GEMV, "x_sums[i] = 0;", ""),
    (GEMV, "total += sparse_total(sparse, t);", ""),
    (GEMM, "minimum[i % 2]);", "minimum[0]);"),
    (GEMM, "add_sparse<T>(acc, args, first, block.m0);", ""),
    (QUAD, "group < last ? group : last", "group"),
    (QUAD, "rows.row[r] < args.n ? word(rows.row[r]) : 0", "word(rows.row[r])"),
    (QUAD, "nibble | top << 4) - 32", "nibble | top << 4) - 31"),
    (QUAD, "const bool second_half = tile % 2 != 0", "const bool second_half = false"),
    (QUAD, ">> tile % 2 * 16", ">> 0"),
    (QUAD, "(group % 4 * 8 + group / 8 * 4)", "(group % 4 * 8)"),
    (QUAD, "from_quad(raw.w[r], group / 2)", "raw.w[r]"),
    (QUAD, "from_quad(raw.w[r], group / 4)", "raw.w[r]"),
    (QUAD, "slice < slices ? slice : slices - 1", "slice"),
    (QUAD, "rows.row[r] / args.row_group", "rows.row[r] / 16"),
    (SPARSE, "i += blocks_y() * kSparseParts", "i += kSparseParts"),
    (SPARSE, "const bool live = i + o * k_slices < end &&", "const bool live ="),
    (SPARSE, "m + c * 8 < args.x_rows", "true"),
    (CUDA_DECODERS, "shifted_right(high, (s - 1) * kWidth - UP)", "shifted_right(high, s * kWidth - UP)"),
    (CUDA_DECODERS, "halved<T, 1 << (BITS - 1)>", "halved<T, (1 << (BITS - 1)) - 1>"),
    (CUDA_DECODERS, "kBits = 0x43004300", "kBits = 0x43004301"),
    (CUDA_DECODERS, "prmt(low, high, 0x7362)", "prmt(low, high, 0x5140)"),
    (CUDA_DECODERS, "EXPONENT == 4 ? 0x7B807B80", "EXPONENT == 4 ? 0x7B007B00"),
    (MEMORY, "p, sizeof(T), false);\n#endif\n    return *p;", "p, 0, false);\n#endif\n    return *p;"),
]  # fmt: skip

EIGHT_BIT_GEMM, EIGHT_BIT_GEMV, EIGHT_BIT_ROWS, OUTLIERS = (
    f"csrc/eight_bit/{f}.h" for f in ("gemm", "gemv", "quantize", "outliers")
)
CUDA_EIGHT_BIT = [
    (EIGHT_BIT_GEMM, "copy_async_wait<P::kStages - 2>();", "copy_async_wait<P::kStages - 1>();"),
    (EIGHT_BIT_GEMM, "        sync_block();  // all threads have this step", "        // all threads have this step"),
    (EIGHT_BIT_GEMM, "    P::sync();  // all threads are done with the last contents of `out`", ""),
    (EIGHT_BIT_GEMM, "(step + 1) % args.k_slice == 0 ||", ""),
    (EIGHT_BIT_GEMV, "args.counter + block_index_x(), 0)", "args.counter + block_index_x(), 1)"),
    (EIGHT_BIT_GEMV, "    sync_block();  // no thread still reads `shared`", ""),
    (EIGHT_BIT_ROWS, "store_global(mask + w, 0u);", ""),
    (EIGHT_BIT_ROWS, "outliers != 0 && lane_index() % 4 == 0", "outliers != 0 && lane_index() % 8 == 0"),
    (OUTLIERS, "x -= float(int8_t(load_global(args.x + int64_t(m) * args.kp + k))) * scale;", ""),
]  # fmt: skip

HOPPER, HOPPER8 = "csrc/weight_only/hopper.h", "csrc/eight_bit/hopper.h"
CUDA_LAUNCH = "csrc/weight_only/launch.h"
HOPPERS = [
    (HOPPER, "factor = group_scales.factor[i % 2];", "factor = group_scales.factor[0];"),
    (HOPPER, "product_wait<1>();", "product_wait<2>();"),
    (HOPPER, "in_chunk * kSlice * 2", "in_chunk * kSlice"),
    (HOPPER, "barrier_wait(me.shared.codes_full(me.codes.index), me.codes.parity);", ""),
    (HOPPER, "barrier_wait(me.shared.chunk_full(me.chunk.index), me.chunk.parity);", ""),
    (HOPPER, "barrier_wait(shared.chunk_empty(chunk.index), chunk.parity ^ 1);", ""),
    (HOPPER, "release(me.shared.codes_empty(me.codes.index));", ""),
    (HOPPER, "(unit ^ m % 8) * 16, in)", "unit * 16, in)"),
    (HOPPER, "    sync_warpgroup(1 + warpgroup);  // no thread still reads the last work tile", ""),
    (HOPPER, "m < args.m && n < args.n", "m <= args.m && n < args.n"),
    (HOPPER, "w.n - work_tile.n0 < kHopperRows ? w.n - work_tile.n0 : kHopperRows", "kHopperRows"),
    (HOPPER, "load_book<D>(args.weight, shared.book(), kHopperThreads);", ""),
    (HOPPER, "kBytes = kBookAt + kBookBytes<D>", "kBytes = kBookAt"),
    (HOPPER, "factor[r] * sums[i]", "sums[i]"),
    (HOPPER, "r = i / 2 % 2, n = first", "r = i % 2, n = first"),
    (HOPPER, "n < args.n && m < args.m", "n < args.n && m <= args.m"),
    (CUDA_LAUNCH, "hopper.row_scale != (call.args.is_float != 0)", "false"),
    (CUDA_LAUNCH, "call.args.group < call.args.k || ", ""),
    (CUDA_LAUNCH, "|| call.args.bias != nullptr", ""),
    (HOPPER8, "scale[i / 2 % 2]", "scale[i % 2]"),
    (HOPPER8, "accumulate || k > 0", "accumulate"),
    (HOPPER8, "product_wait<1>();", "product_wait<2>();"),
    (HOPPER8, "release(P::empty(ring.index));", "barrier_arrive(P::empty(ring.index));"),
    (HOPPER8, "tile.n + n, tile.block", "tile.n, tile.block"),
    (HOPPER8, "warpgroup * P::kRows * kStep", "0 * warpgroup"),
]  # fmt: skip

EXPERTS_KERNEL, EXPERTS_LAUNCH = "triton_kernels/experts.py", "qkernels/backends/triton/experts.py"
EXPERTS = [
    (EXPERTS_KERNEL, "(expert < EXPERTS), expert", "(expert <= EXPERTS + 1), expert"),
    (EXPERTS_KERNEL, "(expert >= 0) & ", ""),
    (EXPERTS_KERNEL, "tl.cumsum(flag, 0) - flag", "tl.cumsum(flag, 0)"),
    (EXPERTS_KERNEL, "written += tl.sum(flag, 0)", "written += 0"),
    (EXPERTS_KERNEL, "mask=padding < count * BLOCK_M)", "mask=padding < count)"),
    (EXPERTS_KERNEL, "i * 0 - 1, mask", "i * 0, mask"),
    (EXPERTS_KERNEL, "bins < expert, blocks, 0", "bins <= expert, blocks, 0"),
    (BLOCKS, "group_n = tl.minimum(blocks_n - first_n, GROUP_N)", "group_n = GROUP_N"),
    (EXPERTS_KERNEL, "pointers[0] + expert * strides[0]", "pointers[0]"),
    (EXPERTS_KERNEL, "pointers[i] + expert * strides[i]", "pointers[i]"),
    (EXPERTS_KERNEL, "bias_ptr + expert * N + rows", "bias_ptr + rows"),
    (EXPERTS_KERNEL, "weights_ptr + slots, mask", "weights_ptr + slots * 0, mask"),
    (EXPERTS_KERNEL, "acc = tl.where(here, acc, 0.0)", "acc = acc + 0.0"),
    (EXPERTS_KERNEL, "slots // PER_ROW, M)", "slots, M)"),
    (EXPERTS_KERNEL, "weight = _expert_pointers(weight_args, weight_strides, e)", "weight = weight_args"),
    (EXPERTS_KERNEL, "weight_ptr + e * weight_stride", "weight_ptr"),
    (EXPERTS_KERNEL, "w_scale_ptr += e * w_scale_stride", "w_scale_ptr += 0"),
    (EXPERTS_KERNEL, "slots // PER_ROW, 0)", "slots, 0)"),
    (EXPERTS_KERNEL, "tl.load(row + N, ", "tl.load(row, "),
    (EXPERTS_KERNEL, "slot = token * TOP_K + choice", "slot = token * TOP_K"),
    (EXPERTS_LAUNCH, "used = min(slots, experts + 1)", "used = min(slots, experts)"),
    (EXPERTS_LAUNCH, "block_m = min(first.block_m, second.block_m)", "block_m = first.block_m // 2"),
]  # fmt: skip

ATOMIC = "qkernels/checkpoints/atomic.py"
SAVING = [
    (ATOMIC, "        if not os.path.lexists(folder.parent / old.name):", "        if False:"),
    (ATOMIC, "                _sync(folder / _NEW)\n", ""),
    (ATOMIC, "                    _sync_one(parent)\n", "                    pass\n"),
    (ATOMIC, "            elif not _exchange(fresh, target):", "            elif True:"),
    (ATOMIC, "(errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)", "(errno.ENOENT,)"),
    (ATOMIC, "(errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)", "(errno.ENOTEMPTY, errno.EEXIST)"),
    (ATOMIC, "host != socket.gethostname()", "False"),
    (ATOMIC, "        return False\n    fcntl.flock", "        return True\n    fcntl.flock"),
    (ATOMIC, "                _restore(folder)\n", "                pass\n"),
    (ATOMIC, "if os.getpid() == process:", "if True:"),
    (ATOMIC, " or _handled_in_c()", ""),
    (ATOMIC, "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB if False else fcntl.LOCK_UN"),
    (ATOMIC, "if entry.name != _LOCK:", "if True:"),
    (ATOMIC, "folder.mkdir(mode=0o700)", "folder.mkdir()"),
    (ATOMIC, "folder.mkdir(mode=0o700)", "folder.mkdir(mode=0o700, exist_ok=True)"),
    (ATOMIC, "        raise _Terminated", "        return"),
    (ATOMIC, "            os.kill(os.getpid(), signal.SIGTERM)", "            pass"),
    (ATOMIC, "or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or", "or"),
    (ATOMIC, "if stat.S_ISDIR(status.st_mode) and (", "if ("),
    ("qkernels/checkpoints/tensor_files.py", "raise OSError(f\"{path}: cannot be written: {error}\") from error", "raise"),
    ("qkernels/checkpoints/directories.py", "        yield fresh\n        check_target(target)", "        yield fresh"),
]  # fmt: skip

ALGORITHMS, CALIBRATION = "qkernels/quantizers/algorithms.py", "qkernels/quantizers/calibration.py"
DRIVER = "qkernels/quantizers/driver.py"
CALIBRATED = [
    (ALGORITHMS, "grid = spqr_search.spqr(weight, hessian,", "grid = spqr_search.spqr(weight, None,"),
    (ALGORITHMS, "**options, **self.settings)", "**options)"),
    (ALGORITHMS, "packed[name] = self.rounded(linears[name].weight, hessian=hessian)", "packed[name] = self.rounded(linears[name].weight)"),
    (ALGORITHMS, "                hessian,\n", "                torch.eye(len(hessian)),\n"),
    (ALGORITHMS, "                hessian,\n", "                hessian.diag().diag(),\n"),
    (ALGORITHMS, "                **self.settings,", "                **self.options,"),
    (ALGORITHMS, 'act_order=resolved[0].get("act_order", False)', "act_order=False"),
    (ALGORITHMS, "                packed[name] = PackedWeight(self.fmt.name, shape, tensors, params)\n                linears[name].weight.copy_(packed[name].dequantize())", "                packed[name] = PackedWeight(self.fmt.name, shape, tensors, params)"),
    (ALGORITHMS, "                packed[name] = PackedWeight(self.fmt.name, shape, tensors, params)\n                linears[name].weight.copy_(packed[name].dequantize())\n        return packed\n\n\nclass Ldlq", "                packed[name] = PackedWeight(self.fmt.name, shape, tensors, params)\n        return packed\n\n\nclass Ldlq"),
    (ALGORITHMS, "(weight.shape[0], weight.shape[1])\n                params = self.fmt.resolve(shape, self.params)", "(weight.shape[0], weight.shape[1])\n                hessian = hessian.flip(0, 1)\n                params = self.fmt.resolve(shape, self.params)"),
    (ALGORITHMS, "                packed[name] = self.rounded(linears[name].weight, hessian=hessian)\n                linears[name].weight.copy_(packed[name].dequantize())", "                packed[name] = self.rounded(linears[name].weight, hessian=hessian)"),
    (ALGORITHMS, "stacked, shared.hessian, shared.mean_abs,", "stacked, shared.hessian, shared.max_abs,"),
    (ALGORITHMS, "stacked, shared.hessian,", "stacked, torch.eye(len(shared.hessian)),"),
    (ALGORITHMS, "for name in names:\n                    statistics[name].rescale(scale)", "for name in names:\n                    statistics[name].rescale(scale * 0 + 1)"),
    (ALGORITHMS, "awq.search_clip(weight, statistics[name].hessian,", "awq.search_clip(weight, torch.eye(weight.shape[1]),"),
    (ALGORITHMS, "statistics[rule.layers[0]].max_abs, weights", "statistics[rule.layers[0]].mean_abs, weights"),
    (ALGORITHMS, "for name in rule.layers:\n                    statistics[name].rescale(scale)", "for name in rule.layers:\n                    statistics[name].rescale(scale * 0 + 1)"),
    (ALGORITHMS, 'weights, self.settings["alpha"]', 'weights, self.options["alpha"]'),
    (ALGORITHMS, "largest = float(statistics[name].max_abs.max())", "largest = float(statistics[name].max_abs.mean())"),
    (ALGORITHMS, "largest = float(statistics[name].max_abs.max())", "largest = float(max(f.max_abs.max() for f in statistics.values()))"),
    (ALGORITHMS, '{"importance": statistics[name].mean_square} if weighted else {}', "{}"),
    (ALGORITHMS, '{"importance": statistics[name].mean_square}', '{"importance": statistics[name].mean_abs}'),
    (ALGORITHMS, '{"importance": statistics[name].mean_square}', '{"importance": statistics[name].mean_square.flip(0)}'),
    (CALIBRATION, "self._sum.addmm_(x.T, x)", "self._sum = x.T @ x"),
    (CALIBRATION, "self._sum_square += magnitude.square().sum(0)", "self._sum_square += magnitude.square().mean(0)"),
    (CALIBRATION, "self._sum_abs += magnitude.sum(0)", "self._sum_abs += magnitude.mean(0)"),
    (CALIBRATION, "torch.maximum(self.max_abs, magnitude.amax(0))", "magnitude.amax(0)"),
    (CALIBRATION, "statistics[name].add(args[0])", "statistics[min(statistics)].add(args[0])"),
    (CALIBRATION, "for args, kwargs in self._calls:\n                left", "for args, kwargs in self._calls[:1]:\n                left"),
    (CALIBRATION, "            out = block(*args, **kwargs)", "            out = args[0]"),
    (DRIVER, "                inputs.advance(block)", "                pass"),
    (DRIVER, "                layers[name].weight.copy_(weight.dequantize())", "                pass"),
    (DRIVER, "inputs = BlockInputs(model, blocks[0][1], batches)", "inputs = BlockInputs(model, blocks[0][1], batches[::-1][:1])"),
]  # fmt: skip

DIGEST = "qkernels/quantizers/digest.py"
RESUMED = [
    (DRIVER, '        "model": digest.of_model(model),\n', ""),
    (DRIVER, '        "calibration": digest.of_tensors((str(i), batch) for i, batch in enumerate(batches)),\n', ""),
    (DRIVER, '        "params": algorithm.params,\n', ""),
    (DRIVER, '        "settings": algorithm.settings,\n', ""),
    (DRIVER, '        "algorithm": algorithm.name,\n', ""),
    (DRIVER, '        "format": algorithm.fmt.name,\n', ""),
    (DRIVER, '        "layers": sorted(linears),\n', ""),
    (DRIVER, '        "version": f"{__version__}, files {_FILES}",\n', ""),
    (DRIVER, "if metadata.get(key) != value:", "if False:"),
    (DRIVER, '"job": self.job, "block": str(number)}.items()', '"job": self.job}.items()'),
    (DRIVER, "        if differing:", "        if False:"),
    (DRIVER, "if (tensor.dtype, tensor.shape) != (parameter.dtype, parameter.shape):", "if tensor.dtype != parameter.dtype:"),
    (DRIVER, "if (tensor.dtype, tensor.shape) != (parameter.dtype, parameter.shape):", "if tensor.shape != parameter.shape:"),
    (DRIVER, 'parameter.data.copy_(tensors[f"plain.{name}"])', "pass"),
    (DRIVER, "any(not file.name.startswith(atomic.PREFIX) for file", "any(True for file"),
    (DRIVER, "except (SafetensorError, OSError, ValueError)", "except OSError"),
    (DIGEST, "model.named_parameters(remove_duplicate=False)", "model.model.layers.named_parameters(remove_duplicate=False)"),
    (DIGEST, "*model.named_buffers(remove_duplicate=False)", ""),
    (DIGEST, "[modules, tensors, values]", "[modules, tensors]"),
    (DIGEST, "[modules, tensors, values]", "[tensors, values]"),
    (DIGEST, " {m.extra_repr()}", ""),
    (DIGEST, " {type(m).__qualname__}", ""),
    (DIGEST, "{name} {tensor.dtype} {tuple(tensor.shape)} {first_name}", "{name} {tuple(tensor.shape)} {first_name}"),
    (DIGEST, "{name} {tensor.dtype} {tuple(tensor.shape)} {first_name}", "{name} {tensor.dtype} {first_name}"),
    (DIGEST, "{name} {tensor.dtype} {tuple(tensor.shape)} {first_name}", "{name} {tensor.dtype} {tuple(tensor.shape)}"),
    (DIGEST, "for part in rows.split(rows_at_once):", "for part in rows.split(rows_at_once)[:1]:"),
    (DIGEST, "for part in rows.split(rows_at_once):", "for part in rows[:-1].split(rows_at_once):"),
    (DIGEST, "if key not in _IGNORED_KEYS", "if key"),
]  # fmt: skip

SCALING = "triton_kernels/scalers.py"
#: reads and writes beyond a tensor, of which the interpreter says nothing
BEYOND = [
    (SCALING, "kk = tl.minimum(kk, K - 1)", "kk = tl.minimum(kk, K)"),
    (SCALING, "kk = tl.minimum(kk, KP - 1)", "kk = tl.minimum(kk, KP)"),
    (SCALING, "tl.minimum(kk, KP - 1) // 256", "tl.minimum(kk, KP) // 256"),
    (KERNEL, "at[:, None] * 16 + i[None, :], mask=(memory_rows < N)", "at[:, None] * 16 + i[None, :], mask=(memory_rows <= N)"),
    (KERNEL, "tl.load(bias_ptr + rows, mask=rows < N", "tl.load(bias_ptr + rows, mask=rows <= N"),
    (KERNEL, "        live = kk < K", "        live = kk <= K"),
    (KERNEL, "offsets_ptr + rows + 1, mask=rows < N", "offsets_ptr + rows + 1, mask=rows <= N"),
    (ACTIVATIONS, "tl.load(x_row + k, mask=k < K,", "tl.load(x_row + k, mask=k <= K,"),
    (ACTIVATIONS, "tl.store(q_row + here, q, mask=here < KP)", "tl.store(q_row + here, q, mask=here <= KP)"),
    ("triton_kernels/gather.py", "mask=kk < KP, other=-1", "mask=kk <= KP, other=-1"),
    ("triton_kernels/eight_bit.py", "n = tl.minimum(first_n + r, N - 1)", "n = tl.minimum(first_n + r, N)"),
    ("triton_kernels/eight_bit.py", "w_rows + k[None, :], mask=(k < KP)", "w_rows + k[None, :], mask=(k <= KP)"),
    ("triton_kernels/experts.py", "e = tl.minimum(expert, EXPERTS - 1).to", "e = tl.minimum(expert, EXPERTS).to"),
]  # fmt: skip
FLOORS = [
    ("qkernels/formats/fp8.py", "_GROUP_AMAX_FLOOR = 1e-4", "_GROUP_AMAX_FLOOR = 1e-10"),
    ("qkernels/formats/fp8.py", "_TOKEN_FLOOR = 1 / (448 * 512)", "_TOKEN_FLOOR = 1e-10"),
    (ACTIVATIONS, "GROUP_AMAX_FLOOR = tl.constexpr(1e-4)", "GROUP_AMAX_FLOOR = tl.constexpr(1e-10)"),
]  # fmt: skip
READERS = [
    ("qkernels/checkpoints/gguf/header.py", "tensor.offset < end:", "tensor.offset < end - 32:"),
    ("qkernels/checkpoints/gguf/header.py", "tensor.offset < end:", "tensor.offset + 1 < end:"),
    ("qkernels/checkpoints/gguf/header.py", "+ nbytes > self.size", "+ nbytes > self.size + 1"),
]  # fmt: skip

HF = "qkernels/checkpoints/hf/reader.py"
LOADED = [
    ("qkernels/formats/base.py", "1 << 20, 1 << 12", "1 << 20, 1 << 20"),
    (HF, "files.read_as(name, dtype)", "files.read(name).to(dtype or files.read(name).dtype)"),
]
OUT_OF_MEMORY = [
    ("qkernels/checkpoints/files.py", "if is_out_of_memory(error):", "if False:"),
]

CONFIGS = "qkernels/backends/triton/configs.py"
#: what makes the sum of a row depend on the rows that come with it
INVARIANT = [
    (LAUNCH, "all_blocks = blocks_n if problem.batch_invariant else", "all_blocks = blocks_n if False else"),
    (LAUNCH8, "all_blocks = blocks_n if problem.batch_invariant else", "all_blocks = blocks_n if False else"),
    (LAUNCH, "    if problem.batch_invariant:\n        return config.post_scale\n", "    if problem.batch_invariant:\n        return problem.m < 70\n"),
    (LAUNCH, 'and not traits.last_scale and not problem.batch_invariant', 'and not traits.last_scale'),
    (LAUNCH, "few = problem.m <= transforms.DECODE_ROWS or problem.batch_invariant", "few = problem.m <= transforms.DECODE_ROWS"),
    (LAUNCH8, '"BY_ELEMENT": problem.batch_invariant', '"BY_ELEMENT": False'),
    (CONFIGS, "    if batch_invariant:\n        name", "    if batch_invariant and m > 64:\n        name"),
    (CONFIGS, "BATCH_INVARIANT[name]._replace(block_m=_INVARIANT_BLOCK_M[m_class(m)])", "BATCH_INVARIANT[name]._replace(block_m=_INVARIANT_BLOCK_M[m_class(m)], k_slices=1 + (m > 100))"),
    (KERNEL, "acc += scales[part]", "acc += (1 + 1e-6 * (BLOCK_M > 16)) * scales[part]"),
    (KERNEL, "kk = first + part * SCALE_GROUP", "kk = first + part * SCALE_GROUP * (BLOCK_M <= 16)"),
    (GEMM8, "tl.load(w_scale_ptr + n)[:, None]", "tl.load(w_scale_ptr + n)[:, None] * (1 + 1e-3 * (BLOCK_M > 16))"),
]  # fmt: skip

#: what to break, and the tests that must notice
SUITES = (
    (WEIGHT_ONLY, ("tests/kernels/test_decoders.py", "tests/kernels/test_weight_only.py")),
    (BEYOND, ("tests/kernels/test_guarded.py",)),
    (FLOORS, ("tests/kernels/test_activation_floors.py",)),
    (READERS, ("tests/checkpoints/test_gguf_header.py",)),
    (REPLAY, ("tests/kernels/test_launch.py", "tests/cuda/test_launch.py")),
    (INVARIANT, ("tests/kernels/test_batch_invariant.py",)),
    (EIGHT_BIT, ("tests/kernels/test_activations.py", "tests/kernels/test_eight_bit.py")),
    (INCOHERENT, ("tests/kernels/test_incoherent.py",)),
    (EXPERTS, ("tests/kernels/test_experts.py",)),
    (CUDA, ("tests/cuda",)),
    (CUDA_EIGHT_BIT, ("tests/cuda/test_eight_bit.py",)),
    (HOPPERS, ("tests/cuda/test_hopper.py",)),
    (SAVING, ("tests/checkpoints/test_atomic.py", "tests/checkpoints/test_saving_faults.py")),
    (CALIBRATED, ("tests/quantizers/test_calibration.py",)),
    (LOADED, ("tests/checkpoints/test_load_memory.py",)),
    (OUT_OF_MEMORY, ("tests/checkpoints/test_out_of_memory.py",)),
    (RESUMED, ("tests/quantizers/test_resume.py",)),
)


def copy_of(root: Path, tree: Path) -> Path:
    """A copy of the repository at `root` in `tree`, whose package has the copy's Triton kernels."""
    shutil.copytree(
        root,
        tree,
        symlinks=True,
        ignore=shutil.ignore_patterns(".git", ".venv", "smollm2*", "__pycache__"),
    )
    link = tree / "qkernels" / "triton_kernels"
    link.unlink(missing_ok=True)
    link.symlink_to("../triton_kernels")
    return tree


def survives(tree: Path, file: str, old: str, new: str, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass with `old` replaced. ValueError if it is not there."""
    path = tree / file
    text = path.read_text()
    if old not in text:
        raise ValueError(f"{file}: {old!r} is not there: bring the list up to date")
    path.write_text(text.replace(old, new, 1))
    environment = {**os.environ, "PYTHONPATH": str(tree), "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n",
        os.environ.get("MUTATION_WORKERS", "2"),
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=900)
    finally:
        path.write_text(text)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutations whose file name contains this")
    parser.add_argument("--suite", help="those that tests with this in their name must notice")
    only, suite = (args := parser.parse_args()).only, args.suite or ""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of(ROOT, Path(folder) / "tree")
        for (file, old, new), tests in (
            (m, tests) for mutations, tests in SUITES for m in mutations
        ):
            if only in file and any(suite in test for test in tests):
                alive = survives(tree, file, old, new, tests)
                missed += alive
                print(f"{'MISSED' if alive else 'caught'}  {file}: {old}  ->  {new}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
