"""Mutations of the CUDA C++ kernels."""

from __future__ import annotations

DECODE, GEMM, TILE, CUDA_SCALERS = (
    f"csrc/weight_only/{f}.h" for f in ("decode", "gemm", "tile", "scalers")
)
QUAD, SPARSE, DECODE_MEMORY = (
    f"csrc/weight_only/{f}.h" for f in ("quad_scalers", "outliers", "decode_memory")
)
CODECS = "qkernels/layouts/codecs.py"
CUDA_DECODERS, MEMORY = "csrc/decoders/decoders.h", "csrc/ptx/memory.h"
EIGHT_BIT_GEMM, EIGHT_BIT_GEMV, EIGHT_BIT_ROWS, GEMV_ROWS, OUTLIERS = (
    f"csrc/eight_bit/{f}.h" for f in ("gemm", "gemv", "quantize", "rows", "outliers")
)
HOPPER, HOPPER8 = "csrc/weight_only/hopper.h", "csrc/eight_bit/hopper.h"
PAIR_SCALE = "csrc/weight_only/pair_scale.h"
CUDA_LAUNCH = "csrc/weight_only/launch.h"

CUDA = [
    (DECODE, "sum -= constants;", ""),
    (DECODE, "sum -= scale.zero * sum_x;", ""),
    (DECODE, "acc -= scale.zero * sum_x;", ""),
    (DECODE, "sum -= D::kZero * sum_x;", ""),
    (DECODE, "(Traits::kRaw ? D::kFactor : 1)", "1"),
    (DECODE, "copy_async_wait<depth - 1>();", "copy_async_wait<depth>();"),
    (DECODE, "        sync_warp();  // other lanes' copies of x are there, too\n", ""),
    (DECODE, "        sync_warp();  // no lane still reads the stage\n", ""),
    (DECODE, "k_slices > 1 && s < k_slices; s++", "k_slices > 1 && s < k_slices - 1; s++"),
    (DECODE, "w < warps; w++", "w < warps - 1; w++"),
    (DECODE, "if (n >= first_row) {", "if (n > first_row) {"),
    (DECODE_MEMORY, "if (args.x_tail &&", "if (false &&"),
    (DECODE, "sum += shuffle_xor(sum, 2);", ""),
    (DECODE_MEMORY, "const bool zero = ONE_ROW &&", "const bool zero = false &&"),
    (DECODE_MEMORY, "m + 8 < rows_x ? 8 * kChunks * 16 : 0", "0"),
    (DECODE, "left > 1 ? tile + warps : tile", "tile"),
    (DECODE, "total + sparse_total<COLUMNS>(sparse, at)", "total"),
    (TILE, "store_global(counter, 0)", "store_global(counter, 1)"),
    (GEMM, "copy_async_wait<kStages - 2>", "copy_async_wait<kStages - 1>"),
    (GEMM, "        sync_block();  // all threads have this step's", "        // all threads have this step's"),
    (GEMM, "acc[c][i] += group_scales.factor[i / 2] * sums", "acc[c][i] += group_scales.factor[i % 2] * sums"),
    (GEMM, "features_ > 0", "features_ >= 0"),
    (GEMM, "m + i * kApart < args.m", "m + i * kApart <= args.m"),
    (GEMM, "unit < rows * 4 ? 16 : 0", "16"),
    (GEMM, "unit < rows * D::kHigh ? 16 : 0", "16"),
    (GEMM, "codes_left_-- > 0 ? rows_of_w_ : 0", "rows_of_w_"),
    (GEMM, "x[c][p * 2], x[c][p * 2 + 1]", "x[c][p * 2 + 1], x[c][p * 2]"),
    (TILE, "words.w[h] >> p * D::kHighStep", "words.w[h]"),
    (TILE, "word >> (p * 2 + h) * D::kHighStep", "word >> (h * 2 + p) * D::kHighStep"),
    (TILE, "scale_at(&args, scales[i % 2], at + 1)", "scale_at(&args, scales[i % 2], at)"),
    (TILE, "if (k >= 0)", "if (k > 0)"),
    (CUDA_SCALERS, "kk = kk < args.kp ? kk : args.kp - 1;", ""),
    (CUDA_SCALERS, "/ 256);", "/ 255);"),
    (CUDA_SCALERS, "row_(row / args.row_group)", "row_(row % args.row_group)"),
    (CUDA_SCALERS, "inner + item<float>(args, 3, 0)", "inner"),
    (GEMM, "minimum[i % 2]);", "minimum[0]);"),
    (GEMM, "add_sparse<T>(acc, args, first, block.m0, block_index_y(), blocks_y());", ""),
    (QUAD, "group < last ? group : last", "group"),
    (TILE, "kept(first < last ? first : last)", "first"),
    (QUAD, "8 * (half * 2 + odd), raw.d[r]", "8 * (odd * 2 + half), raw.d[r]"),
    (QUAD, "(16 + group * 2) & 3", "16 & 3"),
    (QUAD, "raw.w[r] >> 8 * odd", "raw.w[r]"),
    (CUDA_SCALERS, "return slices == SCALE_GROUPS; }", "return false; }"),
    (CUDA_SCALERS, "number < args.last_group ? number : args.last_group", "number"),
    (CUDA_SCALERS, "multiply_high(2 * x + 1, divisor)", "multiply_high(2 * x, divisor)"),
    (CUDA_DECODERS, "shifted_right(high, shift - kWidth)", "shifted_right(high, shift)"),
    (CUDA_DECODERS, "kIsHalf && EXPONENT == 4 ? 256 : 1", "1"),
    (QUAD, "code << 23 : 0x00400000", "code << 23 : 0"),
    (CODECS, '"Unsigned<T, 5>", 0', '"Unsigned<T, 4>", 0'),
    (CODECS, "Only<Blocks<{groups}, true>>", "Only<Blocks<{groups}, false>>"),
    (QUAD, "nibble | top << 4) - 32", "nibble | top << 4) - 31"),
    (QUAD, "const bool second_half = tile % 2 != 0", "const bool second_half = false"),
    (QUAD, ">> tile % 2 * 16", ">> 0"),
    (QUAD, "(group % 4 * 8 + group / 8 * 4)", "(group % 4 * 8)"),
    (QUAD, "from_quad(raw.w[r], group / 2)", "raw.w[r]"),
    (QUAD, "from_quad(raw.w[r], group / 4)", "raw.w[r]"),
    (QUAD, "slice < slices ? slice : slices - 1", "slice"),
    (QUAD, "row_group_of(args, second_row)", "row_group_of(args, first_row)"),
    (SPARSE, "i += blocks_y() * parts", "i += parts"),
    (SPARSE, "const bool live = i + o * k_slices < end &&", "const bool live ="),
    (SPARSE, "m + c * 8 < args.x_rows", "true"),
    (CUDA_DECODERS, "shifted_right(high, (s - 1) * kWidth - UP)", "shifted_right(high, s * kWidth - UP)"),
    (CUDA_DECODERS, "halved<T, 1 << (BITS - 1)>", "halved<T, (1 << (BITS - 1)) - 1>"),
    (CUDA_DECODERS, "kBits = 0x43004300", "kBits = 0x43004301"),
    (CUDA_DECODERS, "prmt(low, high, 0x7362)", "prmt(low, high, 0x5140)"),
    (CUDA_DECODERS, "EXPONENT == 4 ? 0x7B807B80", "EXPONENT == 4 ? 0x7B007B00"),
    (MEMORY, "p, sizeof(T), false);\n#endif\n    return *p;", "p, 0, false);\n#endif\n    return *p;"),
]  # fmt: skip

CUDA_EIGHT_BIT = [
    (EIGHT_BIT_GEMM, "copy_async_wait<P::kStages - 2>();", "copy_async_wait<P::kStages - 1>();"),
    (EIGHT_BIT_GEMM, "        sync_block();  // all threads have this step", "        // all threads have this step"),
    (EIGHT_BIT_GEMM, "    P::sync();  // all threads are done with the last contents of `out`", ""),
    (EIGHT_BIT_GEMM, "(step + 1) % args.k_slice == 0 ||", ""),
    (EIGHT_BIT_GEMV, "args.counter + block_index_x(), 0)", "args.counter + block_index_x(), 1)"),
    (EIGHT_BIT_GEMV, "    sync_block();  // no thread still reads `shared`", ""),
    (EIGHT_BIT_ROWS, "store_global(mask + w, 0u);", ""),
    (EIGHT_BIT_ROWS, "bits != 0 && lane_index() % 4 == 0", "bits != 0 && lane_index() % 8 == 0"),
    (OUTLIERS, "x -= float(int8_t(load_global(args.x + int64_t(m) * args.kp + k))) * scale;", ""),
]  # fmt: skip

ROWS_IN_THE_GEMV = [
    (GEMV_ROWS, "        sync_warp();  // no lane still reads the last step\n", ""),
    (GEMV_ROWS, "first += kAhead * kEightThreads", "first += (kAhead + 1) * kEightThreads"),
    (GEMV_ROWS, "maxima + t * kEightWarps + w", "maxima + t * kEightWarps + w % 2"),
    (GEMV_ROWS, "zero, args.k - k)", "zero, 4)"),
    (GEMV_ROWS, "scale = load_shared(scales + m);", "scale = load_shared(scales);"),
    (GEMV_ROWS, "words + m * kRowWords + 32));", "words + 32));"),
    (EIGHT_BIT_ROWS, "fminf(fmaxf(x * scale.inverse, -4096.0f), 4096.0f)", "x * scale.inverse"),
    (EIGHT_BIT_ROWS, "fmaf(-fmaf(near, scale.value, -x), scale.inverse, near)", "near"),
    (EIGHT_BIT_ROWS, "fmaf(near, scale.value, -x), scale.inverse", "fmaf(-near, scale.value, x), -scale.inverse"),
    (EIGHT_BIT_ROWS, "scale < 0x1p-80f ? 0x1p62f : 1.0f", "1.0f"),
]  # fmt: skip

HOPPERS = [
    (HOPPER, "pair_scale[i % 2].of(weights[i])", "pair_scale[0].of(weights[i])"),
    (HOPPER, "product_wait<1>();", "product_wait<2>();"),
    (HOPPER, "me.slices(s % 2)", "me.slices(0)"),
    (HOPPER, "further(x, kSlice * 2)", "x"),
    (HOPPER, "barrier_wait(me.shared.codes_full(me.codes.index), me.codes.parity);", ""),
    (HOPPER, "barrier_wait(me.shared.chunk_full(me.chunk.index), me.chunk.parity);", ""),
    (HOPPER, "barrier_wait(shared.chunk_empty(chunk.index), chunk.parity ^ 1);", ""),
    (HOPPER, "release(me.shared.codes_empty(me.codes.index));", ""),
    (HOPPER, "(drain || first)", "first"),
    (HOPPER, "me.last_chunk = me.chunk.index;", "me.last_chunk = 0;"),
    (HOPPER, "row + r * 8 < w.n ? row + r * 8 : w.n - 1", "row + r * 8"),
    (HOPPER, "(unit ^ m % 8) * 16, in)", "unit * 16, in)"),
    (HOPPER, "    sync_warpgroup(1 + warpgroup);  // no thread still reads the last work tile", ""),
    (HOPPER, "m < args.m && n < args.n", "m <= args.m && n < args.n"),
    (HOPPER, "left < kHopperRows ? left : kHopperRows", "kHopperRows"),
    (HOPPER, "begin + args.k_slice < args.tiles ? begin + args.k_slice : args.tiles", "begin + args.k_slice"),
    (HOPPER, "(work_tile.block - args.whole) * kHopperConsumers + warpgroup", "(work_tile.block - args.whole) * kHopperConsumers"),
    (HOPPER, "slice = (work - args.whole) / rest;", "slice = 0;"),
    (HOPPER, "block = args.whole + (work", "block = (work"),
    (HOPPER, "sums[i] += load_l2(parts + s", "sums[i] += load_l2(parts + 0 * s"),
    (HOPPER, "        sums[i] = 0;\n", ""),
    (HOPPER, "            fill_pairs(load_table<D>(args.weight, nullptr), shared.book());", ""),
    (HOPPER, "load_book<D>(args.weight, shared.book(), threads_x());", ""),
    (HOPPER, "(D::kTable ? kPairsBytes : kBookBytes<D>)", "0"),
    (HOPPER, "factor[r] * sums[i]", "sums[i]"),
    (HOPPER, "r = i / 2 % 2, n = first", "r = i % 2, n = first"),
    (HOPPER, "n < args.n && m < args.m", "n < args.n && m <= args.m"),
    (PAIR_SCALE, "fma2<T>(values, low, Magic<T>::kMinusZero)", "Magic<T>::kMinusZero"),
    (PAIR_SCALE, "S::kHalfScales ? Scale16::exact", "true ? Scale16::exact"),
    (CUDA_LAUNCH, "call.args.scale_type == kFloat16;", "true;"),
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

BUILD = "qkernels/backends/cuda/build.py"
BUILDS = [
    (BUILD, 'number_of(arch) == 90 and arch != "90a"', "False"),
    (BUILD, "number % 10 <= minor", "number % 10 == minor"),
    (BUILD, "{minor if major < 10 else 0}", "{minor}"),
    (HOPPER8, "not_for_this_gpu();", ""),
    (HOPPER, "not_for_this_gpu();", ""),
]  # fmt: skip

EMULATORS = [
    ("csrc/emulation/async.h", "memcmp(p.given, p.a, sizeof p.given) != 0", "false"),
]  # fmt: skip

#: what to break, and the tests that must notice
SUITES = (
    (CUDA, ("tests/cuda",)),
    (CUDA_EIGHT_BIT, ("tests/cuda/test_eight_bit.py",)),
    (ROWS_IN_THE_GEMV, ("tests/cuda/test_quantized_rows.py", "tests/cuda/test_eight_bit.py")),
    (HOPPERS, ("tests/cuda/test_hopper.py",)),
    (BUILDS, ("tests/cuda/test_build.py",)),
    (EMULATORS, ("tests/cuda/test_emulator.py",)),
)
